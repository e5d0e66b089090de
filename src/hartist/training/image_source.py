"""Where the tokenizer stage's images come from: a set in memory, or a stream with a position"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.data.stream import ImageStream, Sample
from hartist.training.batches import MicroBatch


@runtime_checkable
class ImageSource(Protocol):
    """Batches of images, B×H×W×3 uint8."""

    @property
    def fingerprint(self) -> str:
        """Changes with the data: a run is resumed on the same data only."""
        ...

    @property
    def position(self) -> Any:
        """This rank's place, as JSON; None where batches follow from the step."""
        ...

    def seek(self, position: Any) -> None: ...

    def batch(self, micro: MicroBatch) -> UInt8[Tensor, "b h w 3"]: ...


class MemorySource:
    """All images in memory; batches follow from the step, so there is no position to keep."""

    position = None

    def __init__(self, pixels_NHW3: UInt8[Tensor, "n h w 3"], fingerprint: str, *, flip: bool = False) -> None:
        self.pixels_NHW3 = pixels_NHW3
        self.flip = flip
        self.fingerprint = f"{fingerprint}{'-flip' if flip else ''}"

    def seek(self, position: Any) -> None:
        pass

    def batch(self, micro: MicroBatch) -> UInt8[Tensor, "b h w 3"]:
        images_BHW3 = self.pixels_NHW3[micro.rows(len(self.pixels_NHW3))]
        if self.flip:
            # A stream for every part: its images are others.
            coin_B = torch.rand(len(images_BHW3), generator=micro.generator(stream=1000 + micro.index)) < 0.5
            images_BHW3 = torch.where(coin_B[:, None, None, None], images_BHW3.flip(2), images_BHW3)
        return images_BHW3


class StreamSource:
    """Images as they come from a dataset that is larger than memory; this rank's share, in order."""

    def __init__(self, stream: ImageStream, fingerprint: str) -> None:
        self.stream, self.fingerprint = stream, fingerprint
        self._images: Iterator[Sample] | None = None

    @property
    def position(self) -> Any:
        return self.stream.state_dict()

    def seek(self, position: Any) -> None:
        """Without a position the epoch begins anew: then another number of ranks shares it."""
        if position is not None:
            self.stream.load_state_dict(position)
        self._images = None

    def batch(self, micro: MicroBatch) -> UInt8[Tensor, "b h w 3"]:
        """The next images. Raises UserError if the data can't be read any further."""
        if self._images is None:
            self._images = iter(self.stream)
        return torch.stack([torch.from_numpy(next(self._images).pixels) for _ in range(micro.size)])
