"""Both paths of a tokenizer as results, so that `hartist compare` can say how sure their difference is

OUT/discrete/result.json and OUT/hybrid/result.json are of the same pictures: compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hartist.data.folder import CaptionedImage
from hartist.evaluation.benchmarks.base import Item, categories, fingerprint
from hartist.evaluation.harness import facts
from hartist.evaluation.harness.result import RESULT, BenchmarkFacts, Better, ModelFacts, Result, write_result
from hartist.evaluation.harness.rows import Findings, indices
from hartist.evaluation.harness.sets import Reals, score_sets
from hartist.evaluation.reconstruction import Measurements
from hartist.generation.model_options import ModelOptions
from hartist.tokenizer.hybrid import HybridTokenizer

BETTER: dict[str, Better] = {"psnr": "higher", "ssim": "higher", "lpips": "lower"}


def save_reconstructions(
    out: Path,
    measured: Measurements,
    rows: Sequence[CaptionedImage],
    tokenizer: HybridTokenizer,
    options: ModelOptions,
) -> None:
    """Write a result for each path, with its rows. `options` name the tokenizer's files."""
    items = [
        Item(row.path.stem, row.text, 0, str(row.extra.get("split_kind", "")), row.path, {"path": row.path.name})
        for row in rows
    ]
    names = categories(items)
    real = Reals(measured.originals_ND, indices([item.category for item in items], names))
    parameters = sum(parameter.numel() for parameter in tokenizer.parameters())
    machine = {"device": tokenizer.quantizer.codebook.device.type}
    name = Path(options.model or "emoji").name
    for path, features_ND in measured.features.items():
        findings = Findings.of(items)
        for (of, metric), value_N in measured.values.items():
            if of == path:
                findings.add_means(metric, None, value_N, BETTER[metric])
        score_sets(findings, ("frechet", "kernel"), measured.network, features_ND, real)
        findings.save(out / path)
        result = Result(
            BenchmarkFacts("reconstruction", fingerprint(items), {}),
            ModelFacts(f"{name}, {path} tokens", options.fingerprint(), parameters),
            {},
            "per-image",
            facts.software(),
            machine,
            {},
            len(items),
            names,
            findings.figures,
        )
        write_result(out / path / RESULT, result)
