"""Colours of objects by CLIP, as GenEval tells them: the object alone on grey, beside ten sentences about it"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from hartist.evaluation.clip import TextImageNetwork
from hartist.evaluation.judges.base import Detection

SENTENCES = ("a photo of a {colour} {label}", "a photo of a {colour}-colored {label}", "a photo of a {colour} object")
BACKGROUND = 0x99
"""The grey that hides what is around an object."""


@dataclass(frozen=True)
class ClipColours:
    """Zero-shot classification (Radford et al. 2021, section 3.1): the nearest mean of a colour's sentences."""

    network: TextImageNetwork
    classes: dict[tuple[str, tuple[str, ...]], Tensor] = field(default_factory=dict)
    """Vectors of the colours, by label: computed once."""

    @property
    def name(self) -> str:
        return self.network.name

    def colours(
        self, picture_HW3: UInt8[Tensor, "h w 3"], found: Sequence[Detection], colours: Sequence[str]
    ) -> list[str]:
        if not found:
            return []
        crops = [self.network.images.compute(cut_out(picture_HW3, detection)[None]) for detection in found]
        similarity_NC = torch.cat(crops) @ self.vectors(found[0].label, tuple(colours)).T
        return [colours[i] for i in similarity_NC.argmax(1).tolist()]

    def vectors(self, label: str, colours: tuple[str, ...]) -> Float[Tensor, "c e"]:
        """A unit vector for each colour of such an object."""
        key = label, colours
        if key not in self.classes:
            texts = [sentence.format(colour=colour, label=label) for colour in colours for sentence in SENTENCES]
            sentence_CSE = self.network.embed_texts(texts).unflatten(0, (len(colours), len(SENTENCES)))
            self.classes[key] = F.normalize(sentence_CSE.mean(1), dim=1)
        return self.classes[key]


def cut_out(picture_HW3: UInt8[Tensor, "h w 3"], detection: Detection) -> UInt8[Tensor, "_h _w 3"]:
    """The detection's box, grey around its mask; at least one pixel."""
    h, w = picture_HW3.shape[:2]
    if detection.mask is not None:
        picture_HW3 = picture_HW3.masked_fill(~detection.mask[..., None], BACKGROUND)
    left, top, right, bottom = (round(edge) for edge in detection.box)
    left, top = min(max(left, 0), w - 1), min(max(top, 0), h - 1)
    return picture_HW3[top : max(bottom, top + 1), left : max(right, left + 1)]
