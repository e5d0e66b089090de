"""`hartist evaluate`: a tokenizer's reconstructions, an alignment network, a model's pictures, in figures"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hartist.commands.output import require_writable, use_threads
from hartist.data.folder import CaptionedImage
from hartist.errors import UserError, quoted
from hartist.evaluation.alignment import load_alignment, save_alignment
from hartist.evaluation.alignment_training import STEPS, agreement_of_real, train_alignment
from hartist.evaluation.features import LITE0, LITE2, load_feature_network
from hartist.evaluation.generation import KindReport, Quality, draw_sample, generate_pictures, score_pictures
from hartist.evaluation.reconstruction import ReconstructionReport, evaluate_tokenizer
from hartist.evaluation.retrieval import Retrieval
from hartist.evaluation.selection import by_kind, family, load_rows, read_pictures
from hartist.files import write_json
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.generation.pipeline import Pipeline, choose_device, choose_dtype, fast_layout
from hartist.pixels import save_grid
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder

SIZES = (16, 2048)
SHOWN = 12
"""Pictures of each kind on the sheet."""


def run(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if args.limit is not None and args.limit < 2:
        raise UserError(f"--limit {args.limit}: figures need at least 2 pictures; raise it")
    for name in ("json", "pictures"):
        if getattr(args, name, None) is not None:
            require_writable(getattr(args, name), replaced=True)
    return {"tokenizer": tokenizer, "align": align, "model": model}[args.part](args)


def tokenizer(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    path = find_model(args.tokenizer or args.model)
    measured = fast_layout(load_tokenizer_of(path, choose_dtype(args.dtype, device)).to(device))
    rows = load_rows(args.data, "validation", all_backgrounds=args.all_backgrounds)[: args.limit]
    network = load_feature_network(LITE0, device)
    report = evaluate_tokenizer(measured, rows, network, cache=args.cache, progress=not args.quiet)
    print(format_reconstruction(report))
    if args.json is not None:
        write_json(args.json, asdict(report))
    return 0


def align(args: argparse.Namespace) -> int:
    if not SIZES[0] <= args.size <= SIZES[1]:
        raise UserError(f"--size {args.size} is outside {SIZES[0]}..{SIZES[1]}; give the size of the model's pictures")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1 is needed; leave it out")
    require_writable(args.out)
    held_out = {family(row) for row in load_rows(args.data, "validation", all_backgrounds=True)}
    rows = load_rows(args.data, "train", all_backgrounds=args.all_backgrounds)
    progress, encoder = not args.quiet, bundled_text_encoder()
    alignment = train_alignment(
        [row for row in rows if family(row) not in held_out][: args.limit],
        load_feature_network(LITE2),
        encoder,
        image_size=args.size,
        cache=args.cache or args.out / "cache",
        steps=args.steps or STEPS,
        seed=args.seed,
        progress=progress,
    )
    figures = {
        kind: agreement_of_real(alignment, unseen, progress=progress)
        for kind, unseen in unseen_rows(args.data, alignment.config.families, args.all_backgrounds).items()
    }
    save_alignment(alignment.heads, alignment.config, args.out)
    write_json(args.out / "real.json", {kind: asdict(figure) for kind, figure in figures.items()})
    print(format_agreement(figures))
    print(f"\n{args.out}")
    return 0


def model(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    networks = [load_feature_network(name, device) for name in (LITE0, LITE2)]
    alignment = load_alignment(args.align, networks[1], bundled_text_encoder(), args.cache or args.align / "cache")
    kinds = unseen_rows(args.data, alignment.config.families, args.all_backgrounds)
    chosen = args.split_kind or list(kinds)
    for kind in chosen:
        if kind not in kinds:
            raise UserError(
                f"no pictures of kind {quoted(kind)} that the heads have not seen; there are {', '.join(kinds)}"
            )
    samples = [draw_sample(kind, kinds[kind], args.limit) for kind in dict.fromkeys(chosen)]
    pipe = Pipeline.from_pretrained(args.model, device=args.device, dtype=args.dtype)
    reports, sheet = [], []
    for sample in samples:
        pixels = generate_pictures(
            pipe,
            [row.text for row in sample.prompts],
            seed=args.seed,
            batch_size=args.batch_size,
            progress=not args.quiet,
        )
        sheet += [list(read_pictures(sample.prompts[:SHOWN], pipe.image_size)), list(pixels[:SHOWN])]
        reports.append(score_pictures(pixels, sample, alignment, networks[0], progress=not args.quiet))
    print(format_generation(reports))
    if args.json is not None:
        write_json(
            args.json,
            {
                "model": pipe.model.name,
                "image_size": pipe.image_size,
                "sampling": asdict(pipe.model.settings),
                "seed": args.seed,
                "alignment": alignment.config.data,
                "kinds": [asdict(report) for report in reports],
            },
        )
    if args.pictures is not None:
        save_grid(args.pictures, sheet)
    return 0


def bundled_text_encoder() -> TextEncoder:
    """The MiniLM that the heads are trained on, whatever a model's own text encoder is."""
    return load_text_encoder(find_model(None) / "text_encoder")


def unseen_rows(data: Path, seen: Sequence[str], all_backgrounds: bool) -> dict[str, list[CaptionedImage]]:
    """Rows of both splits by kind, without the families that the heads trained on.

    Kinds of fewer than two different prompts, in which nothing can be confused, are left out.
    """
    known = set(seen)
    kinds: dict[str, list[CaptionedImage]] = {}
    for split in ("train", "validation"):
        rows = load_rows(data, split, all_backgrounds=all_backgrounds)
        for kind, found in by_kind([row for row in rows if family(row) not in known], split).items():
            kinds.setdefault(kind, []).extend(found)
    return {kind: rows for kind, rows in kinds.items() if len({row.text for row in rows}) > 1}


# ----------------------------------------------------------------- tables


def format_reconstruction(report: ReconstructionReport) -> str:
    """Both paths side by side, then the codes in use."""
    rows = (
        ("PSNR (dB)", "psnr", 1),
        (f"Fréchet distance ({report.network})", "frechet_distance", 1),
        (f"kernel distance × 1000 ({report.network})", "kernel_distance", 1000),
    )
    width = max(len(title) for title, _, _ in rows)
    lines = [f"{report.pictures} pictures", "", f"{'':<{width}}  discrete  hybrid"]
    for title, name, factor in rows:
        discrete, hybrid = (getattr(path, name) * factor for path in (report.discrete, report.hybrid))
        lines.append(f"{title:<{width}}  {discrete:8.2f}  {hybrid:6.2f}")
    scales = " ".join(f"{100 * share:.1f}" for share in report.usage_per_scale)
    return "\n".join([*lines, "", f"codes in use: {report.usage:.1%}; scale by scale, in %: {scales}"])


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
