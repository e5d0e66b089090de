"""Small random networks, text states, pictures and training stages for the tests of the core."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.data.folder import CaptionedImage
from hartist.generation.checkpoint import LoadedModel
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext, context_from_states
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import Quantizer
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, RunConfig, TokenizerLossConfig
from hartist.training.generator_stage import GeneratorStage, TrainingPhase
from hartist.training.image_source import MemorySource
from hartist.training.images import ImageSet
from hartist.training.parallel import World
from hartist.training.token_cache import build_token_cache
from hartist.training.tokenizer_stage import TokenizerStage
from hartist.transformer.model import ScaleTransformer

Module = TypeVar("Module", bound=nn.Module)

SIDES = (1, 2, 3, 4)
RECTANGLES = ((1, 1), (1, 2), (2, 3), (3, 5))
TOKENS, DIM = 5, 8
"""Context tokens and the width of their states."""

VAR: dict[str, Any] = {
    "condition": "class",
    "norm": "layer",
    "mlp": "gelu",
    "modulation": "adaln",
    "l2_norm": True,
    "positions": "absolute",
    "step_embedding": "table",
    "context_norm": False,
    "residual": None,
}
"""What makes a transformer config VAR's."""


def tokenizer_config(**changes: Any) -> TokenizerConfig:
    """8 pixels a cell, 4 channels, 32 codes."""
    values: dict[str, Any] = {
        "vocab_size": 32,
        "latent_channels": 4,
        "channels": 32,
        "channel_multipliers": (1, 1),
        "blocks_per_level": 1,
        "stem": 4,
        "sides": SIDES,
    }
    return TokenizerConfig(**(values | changes))


def transformer_config(**changes: Any) -> TransformerConfig:
    """Width 32, two blocks, two heads; text-conditional unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "sides": SIDES,
        "vocab_size": 32,
        "latent_channels": 4,
        "context_tokens": TOKENS,
        "context_dim": DIM,
        "num_classes": 7,
        "width": 32,
        "depth": 2,
        "heads": 2,
        "residual": ResidualConfig(width=32, depth=2, steps=4),
    }
    return TransformerConfig(**(values | changes))


@torch.no_grad()
def randomise(module: Module, seed: int = 0) -> Module:
    """Lively weights everywhere, so that no branch is a no-op as after a training's initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            p.copy_(noise / (p.shape[-1] if p.ndim == 3 else p[0].numel()) ** 0.5)
        else:
            p.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return module.requires_grad_(False).eval()


def random_quantizer(seed: int = 0, **changes: Any) -> Quantizer:
    return randomise(Quantizer(tokenizer_config(**changes)), seed)


def random_tokenizer(seed: int = 0, **changes: Any) -> HybridTokenizer:
    return randomise(HybridTokenizer(tokenizer_config(**changes)), seed)


def random_transformer(seed: int = 0, **changes: Any) -> ScaleTransformer:
    model = randomise(ScaleTransformer(transformer_config(**changes)), seed)
    # what all cells share must not drown what tells them apart, or they would all get the same code
    model.head.modulation.weight.mul_(0.2)
    return model


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_context(rows: int, seed: int = 0) -> TextContext:
    """Prompts of 1, 2, … tokens, padded; the padding has states of its own, as the released encoder's has."""
    lengths_B = torch.arange(rows) % TOKENS + 1
    mask_BS = torch.arange(TOKENS)[None] < lengths_B[:, None]
    return context_from_states(normal(rows, TOKENS, DIM, seed=seed), mask_BS)


class WordEncoder:
    """A text encoder without a network: the states of a word are random numbers that depend on it alone."""

    def __init__(self, num_tokens: int = TOKENS, dim: int = DIM, name: str = "words") -> None:
        self.num_tokens, self.dim, self.name = num_tokens, dim, name
        self.calls = 0

    def encode(self, prompts: Sequence[str]) -> TextContext:
        self.calls += 1
        states = torch.zeros(len(prompts), self.num_tokens, self.dim)
        mask = torch.zeros(len(prompts), self.num_tokens, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for i, word in enumerate(["<start>", *prompt.split()][: self.num_tokens]):
                states[row, i] = normal(self.dim, seed=zlib.crc32(word.encode()))
                mask[row, i] = True
        return context_from_states(states, mask)

    def to(self, device: object) -> WordEncoder:
        return self

    def count_truncated_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [max(0, 1 + len(prompt.split()) - self.num_tokens) for prompt in prompts]

    def fingerprint(self) -> str:
        return f"{self.name}-{self.num_tokens}-{self.dim}"


def pictures(count: int, seed: int = 0, side: int = 32) -> Tensor:
    """Coloured rectangles on white, N×side×side×3, uint8."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.full((count, side, side, 3), 255, dtype=torch.uint8)
    for picture in pixels:
        top, left, height, width = torch.randint(2, side // 2, (4,), generator=generator).tolist()
        colour = torch.randint(0, 256, (3,), generator=generator).to(torch.uint8)
        picture[top : top + height, left : left + width] = colour
    return pixels


def write_images(folder: Path, pixels_NHW3: Tensor, texts: Sequence[str]) -> None:
    """A folder of pictures with metadata.jsonl."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(pixels_NHW3):
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    rows = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def image_set(count: int, seed: int = 0, side: int = 32) -> ImageSet:
    """Pictures with one, two or three captions each."""
    captions = [tuple(f"shape {i} {word}" for word in ("red", "big", "flat")[: 1 + i % 3]) for i in range(count)]
    items = [CaptionedImage(Path(f"{i}.png"), own[0], own) for i, own in enumerate(captions)]
    return ImageSet(pictures(count, seed, side), items, fingerprint=f"pictures-{count}-{seed}-{side}")


def run_config(steps: int, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "steps": steps,
        "batch_size": 4,
        "optimizer": OptimizerConfig(learning_rate=2e-3, warmup_steps=2, ema_decay=0.9),
        "log_every": 1,
        "picture_every": 1000,
        "checkpoint_seconds": 1e9,
        "bf16": False,
    }
    return RunConfig(**(values | changes))


def make_tokenizer_stage(
    run: RunConfig, losses: TokenizerLossConfig | None = None, world: World | None = None, **options: Any
) -> TokenizerStage:
    torch.manual_seed(run.seed)
    tokenizer = HybridTokenizer(tokenizer_config())
    source = MemorySource(pictures(10), "pictures")
    return TokenizerStage(
        tokenizer, losses or TokenizerLossConfig(), run, source, pictures(5, seed=1), world=world, **options
    )


def make_generator_stage(
    run: RunConfig,
    folder: Path,
    losses: GeneratorLossConfig | None = None,
    world: World | None = None,
    coarse_first: bool = False,
    **changes: Any,
) -> GeneratorStage:
    """A generator over ten pictures; `folder` holds the token caches. `coarse_first`: at half the size until step 2."""
    config = transformer_config(**changes)
    tokenizer, encoder = random_tokenizer(seed=5), WordEncoder()
    torch.manual_seed(run.seed)
    transformer = ScaleTransformer(config)
    transformer.initialise()
    phases = []
    for first_step, sides, side in [(0, SIDES[:2], 16), (2, SIDES, 32)] if coarse_first else [(0, SIDES, 32)]:
        schedule = ScaleSchedule.from_sides(sides)
        caches = [
            build_token_cache(folder / f"{split}-{side}", images, tokenizer, encoder, schedule=schedule, progress=False)
            for split, images in (("train", image_set(10, side=side)), ("val", image_set(3, seed=1, side=side)))
        ]
        phases.append(TrainingPhase(first_step, run.batch_size, schedule, len(schedule), *caches))
    model = LoadedModel(tokenizer, transformer, encoder, "tiny")
    prompts = ["shape 1 red", "shape 2"]
    return GeneratorStage(losses or GeneratorLossConfig(), run, phases, model, "pictures", prompts=prompts, world=world)
