"""Which metrics a run measures, and the scorers for them: networks are opened, or asked for by name, at the start"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hartist.errors import UserError
from hartist.evaluation.alignment import load_alignment
from hartist.evaluation.benchmarks.base import Benchmark, Item, categories
from hartist.evaluation.features import LITE2, FeatureNetwork, load_feature_network
from hartist.evaluation.harness.judged import DpgScorer, GenEvalScorer
from hartist.evaluation.harness.metrics import CLIPS, INCEPTION_ONLY, SETS, check_metrics, parse_metrics
from hartist.evaluation.harness.pictures import check_sizes
from hartist.evaluation.harness.score import RealPictures, Scorer, SetScorer, TextScorer
from hartist.evaluation.judges.answering import DEFAULT as ANSWERER
from hartist.evaluation.judges.answering import load_answerer
from hartist.evaluation.judges.colours import ClipColours
from hartist.evaluation.judges.detectors import DEFAULT as DETECTOR
from hartist.evaluation.judges.detectors import load_detector
from hartist.evaluation.networks import compare_by_heads, load_network, load_text_image
from hartist.generation.loading import find_model
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder

FALLBACK = "lite0"


@dataclass(frozen=True)
class Choices:
    """What is to be measured, as the command line says it."""

    metrics: str | None = None
    """Names divided by commas; None: the benchmark's own, as far as their networks are there."""
    network: str = "auto"
    align: Path | None = None
    judge: str | None = None
    crop: bool = False
    cache: Path | None = None
    """For features of real pictures."""


def prepare(benchmark: Benchmark, items: Sequence[Item], choices: Choices, device: torch.device) -> list[Scorer]:
    """The scorers of a run.

    A network that only the benchmark's own list needs, and that is absent, is done without, and a line on stderr says
    so. Raises UserError for metrics that make no sense there, for networks that were asked for and are absent, and
    for real pictures that are too few or of mixed sizes.
    """
    asked = parse_metrics(choices.metrics) if choices.metrics is not None else None
    names = benchmark.metrics() if asked is None else asked
    file: Path | None = getattr(benchmark, "features", None)
    references = benchmark.references()
    is_text = not any(isinstance(item.prompt, int) for item in items)
    check_metrics(names, benchmark.name, has_references=bool(references or file), is_text=is_text)
    if set(names) & set(SETS) and not choices.crop and file is None:
        check_sizes([reference.path for reference in references])
    scorers: list[Scorer] = []
    sets = [name for name in names if name in (*SETS, "is")]
    if sets:
        network = choose_network(choices.network, sets, benchmark.name, device)
        scorers.append(SetScorer(sets, network, RealPictures(references, categories(items), file, choices.cache)))
    for name in names:
        try:
            if name in CLIPS:
                scorers.append(TextScorer(load_text_image(CLIPS[name], device)))
            elif name == "alignment":
                scorers.append(open_heads(choices, device))
            elif name not in sets:
                scorers.append(open_judge(name, choices.judge, device))
        except UserError as error:
            if asked is not None or name == benchmark.name:
                raise
            print(f"hartist: {name} is left out: {error}", file=sys.stderr)
    if not scorers and asked != ():
        raise UserError(
            f"none of {', '.join(names)} can be measured here, see above; install a network, train heads for --align, "
            "or make the pictures only with --metrics none"
        )
    return scorers


def choose_network(choice: str, names: Sequence[str], benchmark: str, device: torch.device) -> FeatureNetwork:
    """The network asked for; else FID's, as the benchmark's published figures have it; else a packaged one, told so.

    Raises UserError if what is asked for is absent, or can't give a figure that is named.
    """
    inception = "inception-tensorflow" if benchmark == "imagenet" else "inception"
    strict = [name for name in names if name in INCEPTION_ONLY]
    if choice != "auto":
        if strict and not choice.startswith("inception"):
            raise UserError(f"{strict[0]} is a figure of FID's network, not of {choice}; ask for frechet or kernel")
        return load_network(choice, device)
    try:
        return load_network(inception, device)
    except UserError as error:
        if strict:
            raise
        network = load_network(FALLBACK, device)
        print(f"hartist: distances are by {network.name}, and are no FID: {error}", file=sys.stderr)
        return network


def open_heads(choices: Choices, device: torch.device) -> TextScorer:
    """The alignment heads of --align. Raises UserError if they are absent or of other networks."""
    if choices.align is None:
        raise UserError("alignment needs --align DIR, what `hartist evaluate align` wrote")
    encoder: TextEncoder = load_text_encoder(find_model(None) / "text_encoder")
    cache = choices.align / "cache"
    alignment = load_alignment(choices.align, load_feature_network(LITE2, device), encoder, cache)
    return TextScorer(compare_by_heads(alignment), alignment.config.families, retrieval=True)


def open_judge(name: str, judge: str | None, device: torch.device) -> Scorer:
    """The judge of a benchmark: the one that is named, else the nearest to the published one.

    Raises UserError with the command that gets it if it is absent, or judges nothing of the kind.
    """
    if name == "dpg":
        return DpgScorer(load_answerer(judge or ANSWERER, device))
    detector = load_detector(judge or DETECTOR, device)
    return GenEvalScorer(detector, ClipColours(load_text_image(CLIPS["clip"], device)))
