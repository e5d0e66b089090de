"""`hartist info`: what a model, a tokenizer or a preset consists of. Reads shapes, computes nothing."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from hartist import config as configs
from hartist.checkpoint import build_empty, read_component_config
from hartist.config import TokenizerConfig, TransformerConfig, from_dict
from hartist.errors import UserError
from hartist.files import read_json
from hartist.generation.loading import find_model, load_any
from hartist.generation.sampling import RELEASED_TOP_K, SamplingSettings
from hartist.interop.release import is_release, load_release
from hartist.presets import PRESETS
from hartist.text import minilm, qwen2
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8"}
NOT_TEXT = (*minilm.UNUSED_WEIGHTS, *qwen2.OTHER_PREFIXES)
TOKENIZER, TRANSFORMER, RESIDUAL, TEXT = "tokenizer", "transformer", "residual MLP", "text encoder"


@dataclass(frozen=True)
class ModelInfo:
    """What there is to know without running anything. A bare tokenizer has no condition and no sampling."""

    name: str
    layout: str
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    scales: tuple[tuple[int, int], ...]
    image_tokens: int
    codes: int
    latent_channels: int
    parameters: dict[str, int]
    """Of each part; the residual MLP is not counted as transformer."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Of each part as stored; empty for a preset."""
    condition: str | None = None
    condition_size: int | None = None
    """Context tokens of a text model, classes of a class model."""
    sampling: dict[str, Any] | None = None


def run(args: argparse.Namespace) -> int:
    info = describe(args)
    print(json.dumps(asdict(info), indent=2) if args.json else format_info(info))
    return 0


def describe(args: argparse.Namespace) -> ModelInfo:
    """Raises UserError if there is no such model, tokenizer or preset, or if it is damaged."""
    preset = str(args.model).replace("_", "-")
    if preset in PRESETS and not Path(args.model).exists():
        return _assemble(preset, "preset", *PRESETS[preset]())
    try:
        path = find_model(args.model)
    except UserError as error:
        if args.model is None:
            raise
        raise UserError(f"{error}; presets are {', '.join(PRESETS)}") from error
    config = path / "config.json"
    values = read_json(config) if config.is_file() else None
    form = values.get("format") if isinstance(values, dict) else None
    if form == "hartist-model":
        return _describe_model(path)
    if form == "hartist-tokenizer":
        return _assemble(path.name, "tokenizer", _read_config(path), dtypes={TOKENIZER: _stored_dtype(path)})
    return _describe_foreign(path, args)


def _describe_model(path: Path) -> ModelInfo:
    values = read_component_config(path, "model")
    folders = {TOKENIZER: path / "tokenizer", TRANSFORMER: path / "transformer"}
    where = folders[TRANSFORMER] / "config.json"
    transformer = from_dict(TransformerConfig, read_component_config(where.parent, "transformer"), str(where))
    if transformer.condition == "text":
        folders[TEXT] = path / "text_encoder"
    return _assemble(
        str(values.get("name") or path.name),
        "hartist",
        _read_config(folders[TOKENIZER]),
        transformer,
        text_encoder=folders.get(TEXT),
        dtypes={part: _stored_dtype(folder) for part, folder in folders.items()},
        sampling=from_dict(SamplingSettings, values.get("sampling") or {}, f"{path / 'config.json'}: sampling"),
    )


def _describe_foreign(path: Path, args: argparse.Namespace) -> ModelInfo:
    text_encoder, sampling = None, SamplingSettings()
    if path.is_dir() and is_release(path):
        released = load_release(path, args.text_model, dtype=None, use_ema=not args.no_ema)
        parts: dict[str, nn.Module] = {TOKENIZER: released.tokenizer, TRANSFORMER: released.transformer}
        layout, text_encoder = "release", released.text_encoder_path
    else:
        var = load_any(path, dtype=None, text_model=args.text_model, tokenizer=args.tokenizer)
        parts = {TOKENIZER: var.tokenizer, TRANSFORMER: var.transformer}
        layout, sampling = "var", var.settings
    dtypes = {part: str(next(module.parameters()).dtype).removeprefix("torch.") for part, module in parts.items()}
    if text_encoder is not None:
        dtypes[TEXT] = _stored_dtype(text_encoder)
    tokenizer, transformer = (parts[part].config for part in (TOKENIZER, TRANSFORMER))
    return _assemble(
        path.resolve().name,
        layout,
        tokenizer,  # type: ignore[arg-type]
        transformer,  # type: ignore[arg-type]
        text_encoder=text_encoder,
        dtypes=dtypes,
        sampling=sampling,
    )


def _assemble(
    name: str,
    layout: str,
    tokenizer: TokenizerConfig,
    transformer: TransformerConfig | None = None,
    *,
    text_encoder: Path | None = None,
    dtypes: dict[str, str] | None = None,
    sampling: SamplingSettings | None = None,
) -> ModelInfo:
    parameters = {TOKENIZER: _count(build_empty(lambda: HybridTokenizer(tokenizer), name))}
    schedule, condition_size = tokenizer.schedule, None
    if transformer is not None:
        schedule = transformer.schedule
        network = build_empty(lambda: ScaleTransformer(transformer), name)
        residual = [network.residual_mlp, network.residual_norm] if transformer.residual is not None else []
        parameters[RESIDUAL] = sum(map(_count, residual))
        parameters[TRANSFORMER] = _count(network) - parameters[RESIDUAL]
        condition_size = transformer.context_tokens if transformer.condition == "text" else transformer.num_classes
    if text_encoder is not None:
        parameters[TEXT] = sum(math.prod(shape) for shape, _ in _stored_tensors(text_encoder))
    height, width = (side * tokenizer.downsampling for side in schedule.finest)
    return ModelInfo(
        name=name,
        layout=layout,
        image_size=(height, width),
        scales=schedule.grids,
        image_tokens=schedule.num_tokens,
        codes=tokenizer.vocab_size,
        latent_channels=tokenizer.latent_channels,
        parameters=parameters,
        dtypes=dtypes or {},
        condition=transformer.condition if transformer else None,
        condition_size=condition_size,
        sampling=configs.to_dict(sampling) if sampling else None,
    )


def _read_config(directory: Path) -> TokenizerConfig:
    values = read_component_config(directory, "tokenizer")
    return from_dict(TokenizerConfig, values, str(directory / "config.json"))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stored_tensors(directory: Path) -> Iterable[tuple[list[int], str]]:
    """Shape and dtype of every weight in a folder's safetensors files, from their headers."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory} has no model.safetensors; download or write it again")
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
                    if not name.startswith(NOT_TEXT) and not name.endswith(minilm.ROW_SCALE):
                        tensor = file.get_slice(name)
                        yield tensor.get_shape(), tensor.get_dtype()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is not a complete safetensors file ({error}); download or write it again"
            ) from error


def _stored_dtype(directory: Path) -> str:
    """The dtype that most weights are stored in."""
    sizes: Counter[str] = Counter()
    for shape, dtype in _stored_tensors(directory):
        sizes[dtype] += math.prod(shape)
    (dtype, _), *_ = sizes.most_common(1) or [("none", 0)]
    return DTYPES.get(dtype, dtype)


def format_info(info: ModelInfo) -> str:
    """The same for people."""
    conditions = {
        "text": f"from text ({info.condition_size} tokens)",
        "class": f"of {info.condition_size} classes",
    }
    height, width = info.image_size
    sides = " ".join(str(h) if h == w else f"{h}x{w}" for h, w in info.scales)
    lines = [
        f"{info.name} ({info.layout})",
        f"  images        {height}x{width} pixels {conditions.get(info.condition or '', '')}".rstrip(),
        f"  scales        {sides}: {info.image_tokens:,} tokens",
        f"  codebook      {info.codes:,} codes of {info.latent_channels} channels",
    ]
    heading = "parameters"
    for part in (TOKENIZER, TRANSFORMER, RESIDUAL, TEXT):
        if info.parameters.get(part):
            dtype = info.dtypes.get(TRANSFORMER if part == RESIDUAL else part, "")
            lines.append(f"  {heading:<12}  {part:<12}  {info.parameters[part]:>15,}  {dtype}".rstrip())
            heading = ""
    if len(lines) > 5:
        lines.append(f"  {'':<12}  {'total':<12}  {sum(info.parameters.values()):>15,}")
    if info.sampling is not None:
        settings = dict(info.sampling)
        if settings["top_k"] is None:
            settings["top_k"] = "{}, from scale 8 on {}".format(*RELEASED_TOP_K)
        shown = (f"{name.replace('_', '-')} {value}" for name, value in settings.items() if value is not None)
        lines.append(f"  sampling      {', '.join(shown)}")
    return "\n".join(lines)
