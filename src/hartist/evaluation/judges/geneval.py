"""GenEval's rules: are a prompt's objects there, in number, colour and place? (Ghosh et al. 2023, section 3)

Thresholds and order of the checks are those of the authors' program (djghosh13/geneval). It judges by Mask2Former
(Swin-S, COCO, mmdetection's weights) and tells colours by OpenAI's CLIP ViT-L/14.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from hartist.errors import UserError, quoted
from hartist.evaluation.judges.base import Box, ColourJudge, Detection, Detector

THRESHOLD = 0.3
"""A detection counts above this score …"""
COUNTING_THRESHOLD = 0.9
"""… and where objects are counted, above this one."""
COUNTING = "counting"
MAX_OBJECTS = 16
"""Of a label; those with the highest scores."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes by which their centres must be apart."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@dataclass(frozen=True)
class Requirement:
    """Objects that must be there, or must not be."""

    label: str
    count: int
    colour: str | None = None
    relation: str | None = None
    """left of, right of, above or below …"""
    target: int = 0
    """… the objects of the requirement with this number."""


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what its prompt says."""

    correct: bool
    reasons: tuple[str, ...]
    """What is wrong, for people."""


def judge(
    picture_HW3: UInt8[Tensor, "h w 3"], facts: Mapping[str, Any], detector: Detector, colours: ColourJudge
) -> Verdict:
    """Judge a picture by a line of `evaluation_metadata.jsonl`.

    All of `include` must hold: so many objects of the label at least, the surest ones of that many each of the
    colour, and each of them placed so towards each of the target's. None of `exclude` may: so many or more.
    Raises UserError for facts of another form, or a label that the detector doesn't know.
    """
    include, exclude = (_requirements(facts, key) for key in ("include", "exclude"))
    for requirement in (*include, *exclude):
        if requirement.label not in detector.labels:
            raise UserError(f"{detector.name} cannot find {quoted(requirement.label)}; give one of COCO's objects")
    threshold = COUNTING_THRESHOLD if facts.get("tag") == COUNTING else THRESHOLD
    objects = surest(detector.detect(picture_HW3, threshold), threshold)
    reasons: list[str] = []
    matched: list[Sequence[Detection]] = []
    for requirement in include:
        found = objects.get(requirement.label, [])[: requirement.count]
        reason = None
        if len(found) < requirement.count:
            reason = f"{len(found)} {requirement.label} of {requirement.count}"
        elif requirement.colour is not None:
            seen = colours.colours(picture_HW3, found, COLOURS)
            if seen.count(requirement.colour) < requirement.count:
                reason = f"{requirement.label} is {', '.join(seen)}, not {requirement.colour}"
        if reason is None and requirement.relation is not None:
            targets = matched[requirement.target]
            if not targets:
                reason = f"nothing there for {requirement.label} to be {requirement.relation}"
            elif not all(requirement.relation in relations(a.box, b.box) for a in found for b in targets):
                reason = f"{requirement.label} is not {requirement.relation} its target"
        if reason is not None:
            reasons.append(reason)
        matched.append(found if reason is None else ())
    for requirement in exclude:
        count = len(objects.get(requirement.label, []))
        if count >= requirement.count:
            reasons.append(f"{count} {requirement.label}, {requirement.count} or more")
    return Verdict(not reasons, tuple(reasons))


def surest(found: Sequence[Detection], threshold: float) -> dict[str, list[Detection]]:
    """Detections above `threshold` by label, the surest first, MAX_OBJECTS at most. Overlaps are not suppressed."""
    objects: dict[str, list[Detection]] = {}
    for detection in sorted(found, key=lambda detection: -detection.score):
        own = objects.setdefault(detection.label, [])
        if detection.score > threshold and len(own) < MAX_OBJECTS:
            own.append(detection)
    return objects


def relations(a: Box, b: Box) -> set[str]:
    """Where `a` is towards `b`: of left of, right of, above, below, none to two.

    The distance of the centres, less a tenth of both sizes along each axis, must make up more than half of the
    distance that it was: diagonal neighbours have two relations, those that overlap much none.
    """
    offsets, margins = [], []
    for low, high in ((0, 2), (1, 3)):
        offsets.append((a[low] + a[high]) / 2 - (b[low] + b[high]) / 2)
        margins.append(POSITION_MARGIN * (abs(a[high] - a[low]) + abs(b[high] - b[low])))
    rest = [math.copysign(max(abs(o) - m, 0.0), o) for o, m in zip(offsets, margins, strict=True)]
    if all(abs(r) < 1e-3 for r in rest):
        return set()
    dx, dy = (r / math.hypot(*offsets) for r in rest)
    places = (("left of", dx < -0.5), ("right of", dx > 0.5), ("above", dy < -0.5), ("below", dy > 0.5))
    return {name for name, holds in places if holds}


@dataclass(frozen=True)
class GenEvalScore:
    """Shares from 0 to 1."""

    overall: float
    """The mean of the tags' shares, whatever their numbers of pictures."""
    tags: dict[str, float]
    """Share of correct pictures by tag: single_object, two_object, counting, colors, position, color_attr."""
    pictures: float
    """Share of all pictures."""


def summarise(tags: Sequence[str], correct: Sequence[bool]) -> GenEvalScore:
    """The benchmark's figures from each picture's tag and verdict. Raises UserError without pictures."""
    if not tags:
        raise UserError("GenEval has no pictures to judge; give prompts")
    shares = {
        tag: fmean(verdict for own, verdict in zip(tags, correct, strict=True) if own == tag)
        for tag in dict.fromkeys(tags)
    }
    return GenEvalScore(fmean(shares.values()), shares, fmean(correct))


def _requirements(facts: Mapping[str, Any], key: str) -> list[Requirement]:
    found: list[Requirement] = []
    try:
        for row in facts.get(key, []):
            relation, target = row.get("position", (None, 0))
            requirement = Requirement(str(row["class"]), int(row["count"]), row.get("color"), relation, int(target))
            if requirement.count < 1 or (relation is not None and not 0 <= requirement.target < len(found)):
                raise ValueError(f"count {requirement.count}, target {target}")
            found.append(requirement)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"GenEval's {key} of {quoted(facts.get('prompt'))} cannot be read ({error!r}); fetch its prompts again"
        ) from error
    return found
