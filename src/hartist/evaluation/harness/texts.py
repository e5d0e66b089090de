"""Figures of pictures and their prompts: how well they agree, picture by picture"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hartist.evaluation.clip import TextImageNetwork
from hartist.evaluation.clip_score import clip_score
from hartist.evaluation.harness.rows import Findings
from hartist.evaluation.retrieval import distinct, retrieve

MAX_PAIRS = 30_000_000
"""Of a picture and a text, up to which all are compared with all."""


def score_texts(
    findings: Findings,
    network: TextImageNetwork,
    images_NE: Float[Tensor, "n e"],
    *,
    seen_families: Sequence[str] = (),
    retrieval: bool = False,
) -> None:
    """Agreement of each picture with its own prompt, and with `retrieval`, whether it finds it among all prompts.

    Retrieval is within a category, and overall; with more than MAX_PAIRS it is left out. Pictures of `seen_families`,
    by which the network was trained, are not measured.
    """
    texts, own_N = distinct([str(item.prompt) for item in findings.items])
    texts_ME = network.embed_texts(texts).cpu()
    known = set(seen_families)
    unseen_N: Bool[Tensor, " n"] = torch.tensor([item.facts.get("family") not in known for item in findings.items])
    value_N = clip_score(images_NE, texts_ME[own_N]).masked_fill(~unseen_N, float("nan"))
    findings.add_means("clip_score" if network.name.startswith("CLIP ") else "agreement", network.name, value_N)
    for category, chosen_N in findings.groups() if retrieval else []:
        rows = (chosen_N & unseen_N).nonzero()[:, 0]
        own, column = own_N[rows].unique(return_inverse=True)
        if len(own) < 2 or len(own) * len(rows) > MAX_PAIRS:
            continue
        found = retrieve(images_NE[rows], texts_ME[own], column)
        for metric in ("recall_at_1", "recall_at_10", "auc"):
            findings.add(metric, network.name, category, getattr(found, metric), len(rows), "higher")
