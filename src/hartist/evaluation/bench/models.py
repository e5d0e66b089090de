"""What is timed: a given model, or random weights of a preset at any resolution

Speed does not depend on the values of weights, as long as none are NaN or denormal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.generation.checkpoint import LoadedModel
from hartist.generation.pipeline import Pipeline
from hartist.presets import PRESETS, Preset
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024, ScaleSchedule, Side
from hartist.text.encoder import TextContext, TextEncoder
from hartist.tokenizer.hybrid import HybridTokenizer, fast_layout
from hartist.transformer.model import ScaleTransformer

PUBLISHED_SIDES: dict[int, tuple[int, ...]] = {sides[-1]: sides for sides in (SIDES_256, SIDES_512, SIDES_1024)}
"""The published schedules by the side of their finest grid."""


def sides_for(pixels: int, downsampling: int) -> tuple[Side, ...]:
    """The scales of square pictures: the published ones where there are some, else ten in geometric steps.

    Raises UserError for a side that is no whole number of cells.
    """
    cells, rest = divmod(pixels, downsampling)
    if cells < 1 or rest:
        raise UserError(
            f"size {pixels} is no multiple of the tokenizer's {downsampling} px per cell; choose one that is"
        )
    if cells in PUBLISHED_SIDES:
        return PUBLISHED_SIDES[cells]
    return tuple(sorted({round(cells ** (i / 9)) for i in range(10)}))


def find_preset(name: str, pixels: int | None = None) -> Preset:
    """A preset by name, at another resolution if asked for. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    tokenizer, transformer = PRESETS[name]()
    if pixels is not None:
        sides = sides_for(pixels, tokenizer.downsampling)
        tokenizer, transformer = replace(tokenizer, sides=sides), replace(transformer, sides=sides)
    return tokenizer, transformer


def random_pipeline(preset: Preset, dtype: torch.dtype, device: torch.device) -> Pipeline:
    """A pipeline of random weights; text states are random too, and cost nothing."""
    tokenizer, transformer = random_model(*preset, dtype, device)
    config = transformer.config
    text: TextEncoder | None = None
    if config.condition == "text":
        text = RandomText(config.context_tokens, config.context_dim)
    return Pipeline(LoadedModel(tokenizer, transformer, text, "random weights"), device)


def resize(pipe: Pipeline, pixels: int) -> None:
    """Go on at another resolution. Raises UserError for a model that is bound to one."""
    sides = sides_for(pixels, pipe.tokenizer.config.downsampling)
    pipe.transformer.use_schedule(ScaleSchedule.from_sides(sides))


def random_model(
    tokenizer_config: TokenizerConfig, transformer_config: TransformerConfig, dtype: torch.dtype, device: torch.device
) -> tuple[HybridTokenizer, ScaleTransformer]:
    """Both networks with small random weights, built without ever holding a second copy."""
    with torch.device("meta"):
        tokenizer, transformer = HybridTokenizer(tokenizer_config), ScaleTransformer(transformer_config)
    for module in (tokenizer, transformer):
        randomise(module, dtype, device)
    return fast_layout(tokenizer), transformer


def randomise(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a network without storage small random weights, in place, ready for inference."""
    module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.uniform_(parameter, -0.02, 0.02, generator=generator)
        else:
            nn.init.ones_(parameter)
    for buffer in module.buffers():
        buffer.zero_()  # whatever lay in memory might be NaN
    module.requires_grad_(False).eval()


class RandomText:
    """In a text encoder's place: states of a prompt as long as there is room, without a network behind them."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        self._shape = num_tokens, dim

    @property
    def num_tokens(self) -> int:
        return self._shape[0]

    @property
    def dim(self) -> int:
        return self._shape[1]

    def encode(self, prompts: Sequence[str]) -> TextContext:
        states_1SC: Tensor = torch.randn(1, *self._shape, generator=torch.Generator().manual_seed(0))
        mask_BS = torch.ones(len(prompts), self.num_tokens, dtype=torch.bool)
        return TextContext(states_1SC.expand(len(prompts), -1, -1), mask_BS, mask_BS.long().cumsum(1) - 1)

    def to(self, device: torch.device | str) -> RandomText:
        return self  # a pipeline moves states where it needs them

    def count_truncated_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [0] * len(prompts)

    def fingerprint(self) -> str:
        return "random"
