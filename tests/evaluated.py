"""Folders of finished runs, as `hartist evaluate` leaves them, with features from a random generator."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hartist.evaluation.benchmarks.base import Item, fingerprint
from hartist.evaluation.distances import fit_gaussian, frechet_distance, kernel_distance
from hartist.evaluation.harness.result import BenchmarkFacts, ModelFacts, Result, write_result
from hartist.evaluation.harness.rows import Findings

NETWORK, JUDGE = "Tiny network", "Tiny judge"
WIDTH = 6
SIDE = 16
NAMES = ("people", "food & drink")
PROMPTS = ("a red apple", "a cat", '<script>alert("1")</script> & *x* | [y](z)', "`code` _u_ $5 #1 ~a~ \\ !")
SETTINGS = {"guidance": 4.5, "top_k": None, "smoothing": False, "diffusion_steps": 8}


def write_run(
    folder: Path,
    *,
    count: int = 40,
    shift: float = 0.0,
    noise: int = 0,
    prompts: Sequence[str] = PROMPTS,
    settings: dict[str, Any] | None = None,
    **facts: Any,
) -> Result:
    """Pictures of `prompts` in turn, all features moved by `shift`; `facts` replace parts of the result.

    Two folders have the same items and, in large part, the same features: `noise` is the seed of what differs.
    """
    items = [Item(f"{i:04d}", prompts[i % len(prompts)], i // len(prompts), NAMES[i % 2]) for i in range(count)]
    (folder / "pictures").mkdir(parents=True)
    lines = []
    for i, item in enumerate(items):
        Image.new("RGB", (SIDE, SIDE), (i * 6 % 256, 90, 200)).save(folder / "pictures" / f"{item.id}.png")
        lines.append({"file": f"pictures/{item.id}.png", "line": i + 1, "id": item.id, "prompt": item.prompt})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(noise)
    reference_MD, reference_category_M = torch.randn(60, WIDTH, generator=shared), torch.arange(60) % 2
    generated_ND = torch.randn(count, WIDTH, generator=shared) + shift
    generated_ND = generated_ND + 0.1 * torch.randn(count, WIDTH, generator=own)
    value_N = 0.3 + 0.05 * torch.randn(count, generator=shared) - 0.02 * shift
    value_N = value_N + 0.002 * torch.randn(count, generator=own)
    value_N[3] = torch.nan
    findings = Findings.of(items)
    tensors = {"generated": generated_ND, "reference": reference_MD, "reference_categories": reference_category_M}
    rows = findings.add_rows(NETWORK, tensors)
    for category, chosen_N in findings.groups():
        x = generated_ND[chosen_N]
        y = reference_MD if category is None else reference_MD[reference_category_M == NAMES.index(category)]
        frechet = frechet_distance(fit_gaussian(x), fit_gaussian(y))
        findings.add("frechet_distance", NETWORK, category, frechet, len(x), "lower", "frechet", rows)
        findings.add("kernel_distance", NETWORK, category, kernel_distance(x, y), len(x), "lower", "kernel", rows)
    findings.add("recall", NETWORK, None, 0.5, count, "higher")
    findings.add_means("clip_score", JUDGE, value_N)
    findings.save(folder)
    result = Result(
        BenchmarkFacts("tiny", fingerprint(items), {"limit": count}),
        ModelFacts("tiny-model", "ab" * 32, 1234567),
        SETTINGS | (settings or {}),
        "per-image",
        {"hartist": "0.1.0", "torch": "2.13.0"},
        {"device": "cpu"},
        {"generation": 12.5, "scoring": 3.25},
        count,
        findings.names,
        findings.figures,
    )
    result = dataclasses.replace(result, **facts)
    write_result(folder / "result.json", result)
    return result
