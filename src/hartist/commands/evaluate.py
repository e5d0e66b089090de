"""`hartist evaluate`: benchmarks, a tokenizer's reconstructions, alignment heads, a model's pictures, in figures"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hartist.commands import evaluate_benchmark
from hartist.commands.evaluate_tables import format_agreement, format_generation, format_reconstruction
from hartist.commands.output import require_writable, use_threads
from hartist.data.folder import CaptionedImage
from hartist.errors import UserError, quoted
from hartist.evaluation.alignment import load_alignment, save_alignment
from hartist.evaluation.alignment_training import STEPS, agreement_of_real, train_alignment
from hartist.evaluation.features import LITE0, LITE2, FeatureNetwork, load_feature_network
from hartist.evaluation.generation import draw_sample, generate_pictures, score_pictures
from hartist.evaluation.harness.reconstructions import save_reconstructions
from hartist.evaluation.networks import load_network
from hartist.evaluation.reconstruction import measure_reconstructions, report_reconstructions
from hartist.evaluation.selection import by_kind, family, load_rows, read_pictures
from hartist.files import write_json
from hartist.generation.devices import choose_device, choose_dtype
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.generation.model_options import ModelOptions
from hartist.generation.pipeline import Pipeline
from hartist.pixels import save_grid
from hartist.text.encoder import TextEncoder
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.hybrid import fast_layout
from hartist.training.lpips import LpipsLoss, load_lpips

OFFLINE = {"lite0": LITE0, "lite2": LITE2}
SIZES = (16, 2048)
SHOWN = 12
"""Pictures of each kind on the sheet."""


def run(args: argparse.Namespace) -> int:
    if args.part == "benchmark":
        return evaluate_benchmark.run(args)
    use_threads(args.threads)
    if args.limit is not None and args.limit < 2:
        raise UserError(f"--limit {args.limit}: figures need at least 2 pictures; raise it")
    for name in ("json", "pictures"):
        if getattr(args, name, None) is not None:
            require_writable(getattr(args, name), replaced=True)
    return {"reconstruct": tokenizer, "tokenizer": tokenizer, "align": align, "model": model}[args.part](args)


def tokenizer(args: argparse.Namespace) -> int:
    device = choose_device(args.device)
    path = find_model(args.tokenizer or args.model)
    if args.out is not None:
        require_writable(args.out)
    measured = fast_layout(load_tokenizer_of(path, choose_dtype(args.dtype, device)).to(device))
    rows = load_rows(args.data, "validation", all_backgrounds=args.all_backgrounds)[: args.limit]
    found = measure_reconstructions(
        measured,
        rows,
        set_network(args.network, device),
        cache=args.cache,
        perceptual=perceptual_network(device),
        progress=not args.quiet,
    )
    report = report_reconstructions(found)
    print(format_reconstruction(report))
    if args.json is not None:
        write_json(args.json, asdict(report))
    if args.out is not None:
        save_reconstructions(args.out, found, rows, measured, ModelOptions(str(path), dtype=args.dtype))
    return 0


def set_network(choice: str, device: torch.device) -> FeatureNetwork:
    """The network asked for; else FID's where it is there, else the packaged one."""
    if choice in OFFLINE:
        return load_feature_network(OFFLINE[choice], device)
    try:
        return load_network("inception" if choice == "auto" else choice, device)
    except UserError:
        if choice != "auto":
            raise
        return load_feature_network(LITE0, device)


def perceptual_network(device: torch.device) -> LpipsLoss | None:
    """LPIPS's network, where it is installed."""
    try:
        return load_lpips().to(device)
    except UserError:
        return None


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
