"""Figures of sets of pictures: how far the generated ones are from the real ones, and how varied they are"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation.classifier_score import SPLITS, inception_score
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.harness.rows import Findings
from hartist.evaluation.precision_recall import NEIGHBOURS, precision_recall

FID_KEY = "inception-"
"""How the keys of FID's network begin: only its figures are called FID, KID and Inception Score."""


@dataclass(frozen=True)
class Reals:
    """Features of real pictures."""

    features_MD: Float[Tensor, "m d"]
    category_M: Int[Tensor, " m"]
    """Each one's category, −1 for none."""


def score_sets(
    findings: Findings, names: Sequence[str], network: FeatureNetwork, generated_ND: Float[Tensor, "n d"], real: Reals
) -> None:
    """Add the distances of `names`, by features of `network`: overall, and to each category's own real pictures.

    A category of fewer than two pictures on either side has no figures of its own. Raises UserError if there are
    fewer than two in all.
    """
    for what, count in (("generated", len(generated_ND)), ("real", len(real.features_MD))):
        if count < 2:
            raise UserError(f"there are too few {what} pictures to compare ({count}); at least 2 are needed")
    tensors = {"generated": generated_ND.float(), "reference": real.features_MD.float()}
    by_category = bool((real.category_M >= 0).any())
    if by_category:
        tensors["reference_categories"] = real.category_M
    rows = findings.add_rows(network.name, tensors, network.key)
    for category, chosen_N in findings.groups():
        if category is None:
            own_ND, real_MD = generated_ND, real.features_MD
        else:
            own_ND = generated_ND[chosen_N]
            real_MD = real.features_MD[real.category_M == findings.names.index(category)]
        if min(len(own_ND), len(real_MD)) >= 2:
            _score(findings, names, network, category, own_ND, real_MD, rows)


def _score(
    findings: Findings,
    names: Sequence[str],
    network: FeatureNetwork,
    category: str | None,
    own_ND: Tensor,
    real_MD: Tensor,
    rows: str,
) -> None:
    count, is_fid = len(own_ND), network.key.startswith(FID_KEY)
    if {"frechet", "fid"} & set(names):
        value = frechet_distance(fit_gaussian(own_ND), fit_gaussian(real_MD))
        metric = "fid" if is_fid else "frechet_distance"
        findings.add(metric, network.name, category, value, count, "lower", "frechet", rows)
    if {"kernel", "kid"} & set(names):
        value = kernel_distance(own_ND, real_MD)
        metric = "kid" if is_fid else "kernel_distance"
        findings.add(metric, network.name, category, value, count, "lower", "kernel", rows)
    if {"precision", "recall"} & set(names) and min(count, len(real_MD)) > NEIGHBOURS:
        found = precision_recall(real_MD, own_ND)
        for name in ("precision", "recall"):
            if name in names:
                findings.add(name, network.name, category, getattr(found, name), count, "higher")
    if "diversity" in names and real_MD.double().var(0).sum() > 0:
        findings.add("diversity", network.name, category, diversity(own_ND, real_MD), count, "higher")


def diversity(own_ND: Float[Tensor, "n d"], real_MD: Float[Tensor, "m d"]) -> float:
    """√(tr Σ_own / tr Σ_real): the root mean square distance of two generated pictures over that of two real ones.

    1 is as varied as real pictures, which must not be all alike. The mean of |x − x'|² over pairs is 2·tr Σ.
    """
    own, real = (x.double().var(0).sum().item() for x in (own_ND, real_MD))
    return float((own / real) ** 0.5)


def score_classes(findings: Findings, network: FeatureNetwork, generated_ND: Float[Tensor, "n d"]) -> None:
    """Add the Inception Score of all pictures, from the logits of `network`. Raises UserError if it has none."""
    if network.logits is None:
        raise UserError(f"{network.name} has no classifier, which `is` needs; leave it out")
    splits = min(SPLITS, len(generated_ND))
    score = inception_score(network.logits(generated_ND), splits)
    metric = "inception_score" if network.key.startswith(FID_KEY) else "classifier_score"
    findings.add(metric, network.name, None, score.mean, len(generated_ND), "higher")
