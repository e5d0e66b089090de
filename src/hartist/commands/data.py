"""`hartist data`: datasets to train on."""

from __future__ import annotations

import argparse

from hartist.commands.output import require_writable
from hartist.data.emoji import STYLES, EmojiSummary, build_emoji


def run(args: argparse.Namespace) -> int:
    require_writable(args.out, replaced=True)
    summary = build_emoji(
        args.out,
        size=args.size,
        source=args.source,
        progress=not args.quiet,
        skin_tones=args.skin_tones,
        flags=args.flags,
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
