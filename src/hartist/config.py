"""Frozen configurations of the three networks, and their JSON form."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hartist.errors import UserError, quoted
from hartist.scales import SIDES_256, ScaleSchedule, Side

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerConfig:
    """The hybrid tokenizer (paper section 3.1). Defaults are the released sizes."""

    vocab_size: int = 4096
    latent_channels: int = 32
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks_per_level: int = 2
    stem: int = 1
    """Side of the pixel blocks folded into channels before the first convolution; 1 = as released."""
    sides: tuple[Side, ...] = SIDES_256
    phi_ratio: float = 0.5
    phi_sharing: int = 4
    """0: one φ a scale, 1: a single φ, n: n partially shared."""
    phi_per_scale_count: int = 0
    """With phi_sharing = 0, how many φ; 0 means as many as scales."""
    beta: float = 0.25
    quant_conv_kernel: int = 3

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.from_sides(self.sides)

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell along a side."""
        return self.stem * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def phi_count(self) -> int:
        """How many φ convolutions there are."""
        return self.phi_sharing or self.phi_per_scale_count or len(self.sides)


@dataclass(frozen=True)
class ResidualConfig:
    """The residual diffusion MLP (paper section 3.2)."""

    width: int = 1024
    depth: int = 6
    steps: int = 8
    """Denoising steps at generation; training always uses the full 1000."""
    target_scale: float = 0.6
    """Residual tokens are divided by this before diffusion, which then works within ±1."""


@dataclass(frozen=True)
class TransformerConfig:
    """The scale-wise transformer (paper section 3.2). Defaults are the released text-to-image model."""

    sides: tuple[Side, ...] = SIDES_256
    vocab_size: int = 4096
    latent_channels: int = 32
    condition: Literal["text", "class"] = "text"
    context_tokens: int = 300
    context_dim: int = 1536
    num_classes: int = 1000
    width: int = 1536
    depth: int = 24
    heads: int = 24
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    mlp_ratio: float = 4.0
    modulation: Literal["table", "none", "adaln", "shared_adaln"] = "table"
    pooling: Literal["max", "mean"] = "max"
    l2_norm: bool = False
    positions: Literal["rope", "absolute"] = "rope"
    rope: Literal["released", "axial"] = "released"
    step_embedding: Literal["table", "sinusoidal"] = "sinusoidal"
    context_norm: bool = True
    context_norm_scale: float = 0.01
    attention_scale: float = 0.25
    """Multiplies 1/√E in attention without l2-norm; the released models use ¼."""
    residual: ResidualConfig | None = ResidualConfig()

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.positions == "rope" and self.head_dim % 4:
            raise UserError(f"head dimension {self.head_dim} must be divisible by 4 for 2-D RoPE")
        if self.condition == "text" and self.schedule.lengths[0] != 1:
            raise UserError("a text model predicts scale 1 from one context token: the first side must be 1")
        if self.norm == "layer" and self.context_norm:
            raise UserError("context_norm needs norm='rms'")

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.from_sides(self.sides)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def prefix_tokens(self) -> int:
        """Tokens before scale 2: the context, or the class model's start tokens."""
        return self.context_tokens if self.condition == "text" else self.schedule.lengths[0]

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the feed-forward layer (SwiGLU: rounded up to a multiple of 256)."""
        if self.mlp == "swiglu":
            return int((self.width * self.mlp_ratio * 2) / 3 + 255) // 256 * 256
        return round(self.width * self.mlp_ratio)


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config dataclass."""
    return dataclasses.asdict(config)


def to_json(config: Any) -> dict[str, Any]:
    """The same as it looks after a round trip through JSON (tuples become lists): for comparisons with files."""
    return json.loads(json.dumps(to_dict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """Build a config dataclass from its JSON form; an unknown or unfit entry is a UserError naming it."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object with the fields of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r} for {cls.__name__}; is it from a newer Hartist?")
    kinds = get_type_hints(cls)
    built: dict[str, Any] = {}
    for name, value in values.items():
        if name == "residual" and isinstance(value, dict):
            value = from_dict(ResidualConfig, value, f"{where}.residual")
        elif isinstance(value, list):
            value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
        if not fits(value, kinds[name]):
            raise UserError(f"{where}: {name} is {quoted(value)}, not what {cls.__name__} takes; correct it")
        built[name] = float(value) if kinds[name] is float else value
    try:
        return cls(**built)
    except (UserError, TypeError, ArithmeticError) as error:
        raise UserError(f"{where}: {error}") from error


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value (lists already tuples) fits the annotation of a config's field."""
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, option) for option in arguments)
    if get_origin(kind) is Literal:
        return value in arguments
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        items = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(items) == len(value) and all(map(fits, value, items))
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)
