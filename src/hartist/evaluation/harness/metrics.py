"""The metrics by the names that `--metrics` takes"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hartist.errors import UserError, quoted

Needs = Literal["references", "prompts", "pictures", "judge"]


@dataclass(frozen=True)
class Metric:
    """What a name stands for."""

    name: str
    meaning: str
    needs: Needs


METRICS = {
    metric.name: metric
    for metric in (
        Metric("frechet", "Fréchet distance to the real pictures; FID where the network is Inception", "references"),
        Metric("kernel", "kernel distance to the real pictures; KID where the network is Inception", "references"),
        Metric("precision", "share of the pictures that lie among the real ones", "references"),
        Metric("recall", "share of the real pictures that lie among the generated ones", "references"),
        Metric("diversity", "typical distance of two pictures, over that of two real ones", "references"),
        Metric("fid", "frechet with FID's Inception network and no other", "references"),
        Metric("kid", "kernel with FID's Inception network and no other", "references"),
        Metric("is", "Inception Score; of another network, named so", "pictures"),
        Metric("clip", "CLIP score, ViT-L/14", "prompts"),
        Metric("clip-h", "CLIP score, ViT-H/14", "prompts"),
        Metric("alignment", "agreement with the prompt by the heads of --align", "prompts"),
        Metric("geneval", "GenEval's rules on what a detector finds", "judge"),
        Metric("dpg", "DPG-Bench's questions, answered by a VQA model", "judge"),
    )
}
SETS = ("frechet", "kernel", "precision", "recall", "diversity", "fid", "kid")
INCEPTION_ONLY = ("fid", "kid")
CLIPS = {"clip": "clip-vit-l-14", "clip-h": "clip-vit-h-14"}
NONE = "none"
"""To make the pictures only."""


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names divided by commas, or `none`. Raises UserError for an unknown one."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if names == (NONE,):
        return ()
    for name in names:
        if name not in METRICS:
            raise UserError(f"no metric {quoted(name)}; there are {', '.join(METRICS)}, and {NONE}")
    if not names:
        raise UserError(f"no metric is named; there are {', '.join(METRICS)}, and {NONE}")
    return names


def check_metrics(names: Sequence[str], benchmark: str, *, has_references: bool, is_text: bool) -> None:
    """Raise a UserError for a metric that makes no sense on a benchmark."""
    for name in names:
        needs = METRICS[name].needs
        if needs == "references" and not has_references:
            raise UserError(f"{name} compares with real pictures, and {benchmark} has none; leave it out")
        if needs == "prompts" and not is_text:
            raise UserError(f"{name} compares with texts, and {benchmark} has none; leave it out")
        if needs == "judge" and name != benchmark:
            raise UserError(f"{name} is judged on the benchmark {name}, not on {benchmark}; leave it out")
