"""What the front of a server and its model workers tell each other: pictures to make, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hartist.generation.sampling import SamplingSettings


@dataclass(frozen=True)
class ImageTask:
    """One picture to make."""

    id: str
    prompt: str
    seed: int
    settings: SamplingSettings
    negative_prompt: str | None = None
    previews: tuple[int, ...] = ()
    """Scales (from 0) after which the picture so far is wanted."""

    @property
    def shape(self) -> tuple[SamplingSettings, str | None]:
        """Only tasks of one shape share a batch."""
        return self.settings, self.negative_prompt


@dataclass(frozen=True)
class ReconstructTask:
    """One picture to encode and decode again."""

    id: str
    picture: bytes = field(repr=False)
    """A file as it was sent, not looked at yet."""

    @property
    def shape(self) -> tuple[str]:
        """They share batches among themselves."""
        return ("reconstruct",)


Task = ImageTask | ReconstructTask


@dataclass(frozen=True)
class Preview:
    """The picture after scale k."""

    task_id: str
    k: int
    num_scales: int
    png: bytes


@dataclass(frozen=True)
class Finished:
    task_id: str
    png: bytes
    truncated_tokens: int = 0
    """At the end of the prompt, those that did not fit into the context."""
    blocked: bool = False
    """The image filter has withheld the picture; `png` then is a blank one."""


@dataclass(frozen=True, kw_only=True)
class Reconstructed(Finished):
    """A picture by both paths of the tokenizer, PNGs; `png` is the hybrid one."""

    original: bytes
    """As the tokenizer took it: cropped and resized."""
    discrete: bytes
    discrete_psnr: float
    """dB; infinite for no difference."""
    hybrid_psnr: float


@dataclass(frozen=True)
class Failed:
    """The task can't be done. `message` is fit for whoever asked."""

    task_id: str
    message: str
    retry: bool = False
    """Whether another attempt may succeed: its worker was lost."""


Event = Preview | Finished | Failed


@dataclass(frozen=True)
class ModelInfo:
    """What a worker says of its model once it is loaded."""

    name: str
    height: int
    width: int
    num_scales: int
    settings: SamplingSettings
    """The model's own, for what a request leaves open."""
    num_classes: int = 0
    """Of a class-conditional model; 0 for text."""
    grids: tuple[tuple[int, int], ...] = ()
    """Height and width of every scale, in tokens."""
