"""The tables that `hartist evaluate` prints"""

from __future__ import annotations

from collections.abc import Sequence

from hartist.evaluation.generation import KindReport, Quality
from hartist.evaluation.harness.result import Figure, Result
from hartist.evaluation.reconstruction import ReconstructionReport
from hartist.evaluation.report.wording import titled
from hartist.evaluation.retrieval import Retrieval


def format_reconstruction(report: ReconstructionReport) -> str:
    """Both paths side by side, then the codes in use."""
    is_fid = report.network.startswith("Inception")
    rows = (
        ("PSNR (dB)", "psnr", 1),
        ("SSIM", "ssim", 1),
        ("LPIPS", "lpips", 1),
        (f"{'rFID' if is_fid else 'Fréchet distance'} ({report.network})", "frechet_distance", 1),
        (f"{'rKID' if is_fid else 'kernel distance'} × 1000 ({report.network})", "kernel_distance", 1000),
    )
    width = max(len(title) for title, _, _ in rows)
    lines = [f"{report.pictures} pictures", "", f"{'':<{width}}  discrete  hybrid"]
    for title, name, factor in rows:
        values = [getattr(path, name) for path in (report.discrete, report.hybrid)]
        if None in values:
            continue
        digits = 3 if name in ("ssim", "lpips") else 2
        discrete, hybrid = (value * factor for value in values)
        lines.append(f"{title:<{width}}  {discrete:8.{digits}f}  {hybrid:6.{digits}f}")
    scales = " ".join(f"{100 * share:.1f}" for share in report.usage_per_scale)
    entropies = " ".join(f"{bits:.1f}" for bits in report.entropy_per_scale)
    return "\n".join(
        [
            *lines,
            "",
            f"codes in use: {report.usage:.1%}; scale by scale, in %: {scales}",
            f"entropy of the codes, scale by scale, in bits: {entropies}",
        ]
    )


def format_agreement(figures: dict[str, Retrieval]) -> str:
    """Real pictures that the heads have not seen, by kind."""
    lines = [f"{'real pictures':<16}  prompts    R@1   R@10    AUC"]
    lines += [f"{kind:<16}  {figure.prompts:7}  {_scores(figure)}" for kind, figure in figures.items()]
    return "\n".join(lines)


def format_generation(reports: Sequence[KindReport]) -> str:
    """A generated and a real row for every kind, and what the columns are."""

    def row(kind: str, whose: str, quality: Quality) -> str:
        scores = _scores(quality.retrieval)
        distances = f"{quality.frechet_distance:8.1f}  {1000 * quality.kernel_distance:8.2f}"
        return f"{kind:<16}  {whose:<9}  {quality.retrieval.prompts:7}  {scores}  {distances}"

    lines = [f"{'prompts':<16}  {'pictures':<9}  prompts    R@1   R@10    AUC   Fréchet    kernel"]
    for report in reports:
        lines += [row(report.kind, "generated", report.generated), row("", "real", report.real)]
    counts = ", ".join(f"{report.reference_pictures} ({report.kind})" for report in reports)
    first = reports[0]
    return "\n".join(
        [
            *lines,
            "",
            f"R@1, R@10, AUC: a picture and its prompt, by heads on {first.alignment_network} and MiniLM",
            f"Fréchet distance ({first.distance_network}) and kernel distance × 1000 ({first.distance_network}):",
            f"to other real pictures, {counts}",
        ]
    )


def _scores(retrieval: Retrieval) -> str:
    return f"{retrieval.recall_at_1:5.3f}  {retrieval.recall_at_10:5.3f}  {retrieval.auc:5.3f}"


def format_result(result: Result, title: str) -> str:
    """A row a metric, a column for all pictures and one for each category."""
    columns = [None, *(name for name in result.categories if len(result.categories) > 1)]
    by_metric: dict[tuple[str, str | None], dict[str | None, Figure]] = {}
    for figure in result.figures:
        by_metric.setdefault((figure.metric, figure.network), {})[figure.category] = figure
    shown = [name for name in columns if any(name in found for found in by_metric.values())]
    rows = [["", *("all" if name is None else name for name in shown)]]
    for found in by_metric.values():
        first = next(iter(found.values()))
        factor = " × 1000" if first.kind == "kernel" else ""
        rows.append([titled(first) + factor, *(_value(found.get(name)) for name in shown)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    seeds = "a seed of its own for each" if result.seeds == "per-image" else "ONE SEED FOR ALL PROMPTS"
    head = f"{title}: {result.pictures} pictures by {result.model.name}, {seeds}"
    return "\n".join([head, "", *(line.rstrip() for line in lines)])


def _value(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return f"{1000 * figure.value:.2f}" if figure.kind == "kernel" else f"{figure.value:.4g}"
