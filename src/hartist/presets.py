"""The published models as pairs of configurations (HART table 1; VAR)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024, Side

Preset = tuple[TokenizerConfig, TransformerConfig]


def hart_256() -> Preset:
    """Text-to-image at 256 px, the released size: 732.6 M parameters with the residual MLP."""
    return _hart_text(SIDES_256)


def hart_512() -> Preset:
    """Text-to-image at 512 px, the released size."""
    return _hart_text(SIDES_512)


def hart_1024() -> Preset:
    """Text-to-image at 1024 px: the released model."""
    return _hart_text(SIDES_1024)


def var_class(depth: int, sides: tuple[Side, ...] = SIDES_256, shared_modulation: bool = False) -> Preset:
    """VAR, class-conditional on ImageNet: width 64·depth, `depth` heads, no residual tokens."""
    transformer = TransformerConfig(
        sides=sides,
        condition="class",
        num_classes=1000,
        width=64 * depth,
        depth=depth,
        heads=depth,
        norm="layer",
        mlp="gelu",
        modulation="shared_adaln" if shared_modulation else "adaln",
        l2_norm=True,
        positions="absolute",
        step_embedding="table",
        context_norm=False,
        residual=None,
    )
    return TokenizerConfig(sides=sides), transformer


def hart_class(depth: int) -> Preset:
    """The paper's class-conditional HART at 256 px: VAR's transformer plus the residual MLP."""
    tokenizer, transformer = var_class(depth)
    return tokenizer, replace(transformer, residual=ResidualConfig())


def _hart_text(sides: tuple[Side, ...]) -> Preset:
    return TokenizerConfig(sides=sides), TransformerConfig(sides=sides)


PRESETS: dict[str, Callable[[], Preset]] = {
    "hart-256": hart_256,
    "hart-512": hart_512,
    "hart-1024": hart_1024,
    **{f"var-d{depth}": partial(var_class, depth) for depth in (16, 20, 24, 30)},
    "var-d36-512": partial(var_class, 36, SIDES_512, shared_modulation=True),
    **{f"hart-d{depth}": partial(hart_class, depth) for depth in (16, 20, 24, 30)},
}
