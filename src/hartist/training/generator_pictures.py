"""Sample grids of generator training: fixed prompts, fixed seeds"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from hartist.generation.checkpoint import LoadedModel
from hartist.generation.loop import generate_scales
from hartist.generation.noise import ImageNoise
from hartist.pixels import save_grid, to_uint8
from hartist.text.encoder import TextContext, unconditional_context

COLUMNS = 8


def draw_samples(model: LoadedModel, prompts: Sequence[str], path: Path, scales: int | None = None) -> None:
    """A grid with a picture of every prompt; of a class model, of the first classes. Nothing without prompts.

    `scales`: stop after so many scales and decode what is there.
    """
    transformer = model.transformer
    device = next(transformer.parameters()).device
    rows = []
    items: Sequence[str | int] = prompts
    if model.text_encoder is None:
        items = range(min(transformer.config.num_classes, 4 * COLUMNS))
    for start in range(0, len(items), COLUMNS):
        part = items[start : start + COLUMNS]
        condition: TextContext | torch.Tensor
        unconditional: TextContext | torch.Tensor
        if model.text_encoder is None:
            condition = torch.tensor(part, device=device)
            unconditional = torch.full_like(condition, transformer.config.num_classes)
        else:
            condition = context = model.text_encoder.encode([str(item) for item in part]).to(device)
            unconditional = unconditional_context(context)
        noise = ImageNoise(range(start, start + len(part)))
        quantizer = model.tokenizer.quantizer
        steps = generate_scales(transformer, quantizer, condition, unconditional, model.settings, noise)
        *_, result = itertools.islice(steps, scales)
        where = next(model.tokenizer.parameters()).device
        images = model.tokenizer.decode_latent(result.f_hat_BChw.to(where))
        rows.append([to_uint8(image) for image in images])
    if rows:
        save_grid(path, rows)
