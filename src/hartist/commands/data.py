"""`hartist data`: datasets to train on"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tqdm import tqdm

from hartist.commands.output import require_writable, use_threads
from hartist.data.emoji import STYLES, EmojiSummary, build_emoji
from hartist.data.reader import Source, open_dataset
from hartist.data.records import Broken, Skipped
from hartist.data.stream import ImageStream, Settings, read_bytes
from hartist.data.transform import BrokenImage, decode
from hartist.errors import UserError
from hartist.generation.devices import choose_device
from hartist.generation.loading import find_model
from hartist.scales import ScaleSchedule
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.checkpoint import load_tokenizer
from hartist.training.token_cache import cache_parts
from hartist.training.token_filling import fill_token_cache

SHOWN = 10
"""Skipped images of one kind that `hartist data check` names."""


def run(args: argparse.Namespace) -> int:
    return {"emoji": run_emoji, "check": run_check, "cache": run_cache}[args.dataset](args)


def run_emoji(args: argparse.Namespace) -> int:
    require_writable(args.out, replaced=True)
    summary = build_emoji(
        args.out,
        size=args.size,
        source=args.source,
        progress=not args.quiet,
        skin_tones=args.skin_tones,
        flags=args.flags,
        coloured=args.backgrounds,
    )
    print(format_summary(summary))
    return 0


def format_summary(summary: EmojiSummary) -> str:
    """Images by style and split."""
    kinds = list(next(iter(summary.counts.values())))
    lines = [f"{summary.out}: {summary.images:,} images of {summary.concepts:,} concepts, {summary.size} px"]
    lines.append(f"  {'':<6}" + "".join(f"{kind:>16}" for kind in kinds))
    for style in STYLES:
        lines.append(f"  {style:<6}" + "".join(f"{summary.counts[style][kind]:>16,}" for kind in kinds))
    return "\n".join(lines)


# --------------------------------------------------------------------- check


@dataclass
class Report:
    """What reading through a dataset found."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by (width, height)."""
    captions: int = 0
    texts: set[str] = field(default_factory=set)
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def images(self) -> int:
        return self.sizes.total()


def run_check(args: argparse.Namespace) -> int:
    source = _open(args)
    report = examine(source, args.limit, progress=not args.quiet)
    print(format_report(source, args.split, report))
    return 1 if len(report.skipped) else 0


def examine(source: Source, limit: int | None = None, *, progress: bool = True) -> Report:
    """Decode every image. Raises UserError if not one of them can be."""
    report = Report()
    total = None if source.rows is None else len(source.rows)
    records = itertools.islice(source.records(), limit)
    for record in tqdm(records, desc="reading", unit="img", total=limit or total, disable=not progress):
        if isinstance(record, Broken):
            report.skipped.add(record)
            continue
        try:
            report.sizes[decode(read_bytes(record.image)).size] += 1
        except BrokenImage as error:
            report.skipped.add(Broken(record.name, str(error), "image"))
            continue
        report.captions += len(record.captions)
        report.texts.update(record.captions)
    if not report.images:
        raise report.skipped.nothing_left(source.name)
    return report


def format_report(source: Source, split: str, report: Report) -> str:
    """Counts, sizes, and what is wrong."""
    used = ", ".join((source.columns.image, *source.columns.captions))
    lines = [f"{source.name} ({split}): {report.images:,} images, {report.captions:,} captions"]
    lines[0] += f" ({len(report.texts):,} different), in the columns {used}"
    shortest = sorted(min(size) for size in report.sizes.elements())
    low, middle, high = shortest[0], shortest[len(shortest) // 2], shortest[-1]
    lines.append(f"  shorter side: {low} px at least, {middle} at the median, {high} at most")
    common = [f"{w}×{h} ({count:,})" for (w, h), count in report.sizes.most_common(3)]
    lines.append(f"  most frequent of {len(report.sizes):,} sizes: {', '.join(common)}")
    for kind, label in (("image", "broken images"), ("caption", "images without captions"), ("shard", "broken shards")):
        found = report.skipped.of(kind)
        if found:
            lines.append(f"  {label}: {len(found):,}")
            lines += [f"    {broken.name}: {broken.reason}" for broken in found[:SHOWN]]
            lines += ["    …"] * (len(found) > SHOWN)
    if report.skipped.unnamed:
        lines.append(f"  and {report.skipped.unnamed:,} more of these")
    return "\n".join(lines)


# --------------------------------------------------------------------- cache


def run_cache(args: argparse.Namespace) -> int:
    use_threads(args.threads)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers} is out of range; 0 decodes without further processes")
    require_writable(args.out)
    device = choose_device(args.device)
    tokenizer = load_tokenizer(args.tokenizer).to(device)
    schedule = ScaleSchedule.from_sides(args.sides) if args.sides else tokenizer.schedule
    size = args.size if args.size is not None else schedule.finest[0] * tokenizer.config.downsampling
    source = _open(args)
    encoder = None
    if source.columns.captions:
        encoder_dir = args.text_encoder or find_model(None) / "text_encoder"
        encoder = load_text_encoder(encoder_dir, num_tokens=args.text_tokens, device=device)
    parts = cache_parts(tokenizer, encoder, size, schedule)
    parts |= {"data": source.fingerprint, "crop": args.crop, "flip": args.flip, "limit": args.limit}
    settings = Settings(size, crop=args.crop, shuffle=False, epochs=1, workers=args.workers)
    stream = ImageStream(source, settings)
    total = args.limit if source.rows is None else min(len(source.rows), args.limit or len(source.rows))
    started = time.monotonic()
    try:
        index = fill_token_cache(
            args.out, stream, tokenizer, encoder, parts, schedule=schedule, total=total, progress=not args.quiet
        )
    except KeyboardInterrupt:
        print("stopped; to resume, run the same command again", file=sys.stderr)
        raise
    seconds = time.monotonic() - started
    size_on_disk = sum(shard["bytes"] for shard in index["shards"])
    rate = f"{stream.taken / seconds:,.1f} images/s" if stream.taken else "complete before"
    print(
        f"{args.out}: {index['images']:,} images, {index['captions']:,} captions ({index['texts']:,} different), "
        f"{index['skipped']:,} skipped, {size_on_disk / 1e6:,.1f} MB, {rate}"
    )
    if len(stream.skipped):
        print(stream.skipped.summary(), file=sys.stderr)
    return 0


def _open(args: argparse.Namespace) -> Source:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} is out of range; give at least 1 or leave it out")
    return open_dataset(
        args.data,
        args.split,
        image_column=args.image_column,
        caption_columns=args.caption_column,
        label_column=args.label_column,
        streaming=True,
    )
