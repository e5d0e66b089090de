"""A benchmark's figures as tables for the terminal"""

from __future__ import annotations

from collections.abc import Sequence

from hartist.evaluation.bench.growth import QUANTITIES, Growth, memory_bytes
from hartist.evaluation.bench.operators import Kind
from hartist.evaluation.bench.roofline import MachinePeak, Share
from hartist.evaluation.bench.run import BenchResult
from hartist.evaluation.bench.timing import Seconds

GIB = 2**30


def format_bench(result: BenchResult) -> str:
    """All tables of one benchmark."""
    blocks = [format_head(result), format_parts(result)]
    if result.peak is not None:
        blocks += [format_peak(result.peak), format_shares(result.shares)]
    if result.kinds:
        blocks.append(format_kinds(result.kinds))
    return "\n\n".join(blocks)


def format_head(result: BenchResult) -> str:
    """What was measured, and on what."""
    s = result.settings
    h, w = result.image_size
    name = s.model or f"{s.preset}, random weights"
    changes = {name: value for name, value in s.sampling.items() if name != "guidance"}
    speed = [word for word, chosen in (("int8", s.int8), ("compiled", s.compile)) if chosen]
    mode = ", ".join([*speed, f"guidance {result.sampling.guidance:g}", *(f"{k} {v}" for k, v in changes.items())])
    millions = ", ".join(f"{part} {count / 1e6:.1f} M" for part, count in result.parameters.items())
    return "\n".join(
        [
            f"{name}: {h}×{w} px, batch {s.batch}, {result.dtype}, {mode}; {millions}",
            "{cpu}, {threads} threads, device {device}, torch {torch}".format(**result.machine),
            f"medians of {s.repeats} after {s.warmup} of warm-up, lowest and highest behind",
        ]
    )


def format_parts(result: BenchResult) -> str:
    """Seconds and MACs of every part; memory and throughput."""
    timing, work = result.timing, result.work
    rows = [
        (name, str(h * w), spread(seconds), tera(macs.total), tera(macs.attention))
        for name, (h, w), seconds, macs in zip(
            result.scale_names, result.grids, timing.scales, work.scales, strict=True
        )
    ]
    rows += [
        ("transformer", "", spread(timing.transformer), tera(work.transformer.total), tera(work.transformer.attention)),
        ("residual", "", spread(timing.residual), tera(work.residual.total), ""),
        ("decoder", "", spread(timing.decode), tera(work.decode.total), tera(work.decode.attention)),
        ("total", "", spread(timing.total), tera(work.total.total), tera(work.total.attention)),
    ]
    text = result.text
    if text is not None:
        rows.append(("text, a prompt", "", spread(text.seconds), tera(text.macs.total), tera(text.macs.attention)))
    lines = [table(("part", "tokens", "seconds", "TMACs", "attention"), rows)]
    lines.append("")
    if work.shared_prefix.total:
        lines.append(f"once a model: the unconditional prefix, {tera(work.shared_prefix.total)} TMACs")
    lines.append(f"first run {result.first_run_seconds:.2f} s; {result.images_per_second:.3g} images/s")
    lines.append(f"peak memory {result.memory.resident / GIB:.2f} GiB resident" + _device_memory(result.memory.device))
    if text is not None and text.memory is not None:
        memory = text.memory
        lines.append(f"text encoder {memory.resident / GIB:.2f} GiB more" + _device_memory(memory.device))
    return "\n".join(lines)


def format_peak(peak: MachinePeak) -> str:
    """The measured matrix products."""
    rows = [
        (p.name, f"{p.rows}×{p.inner}×{p.columns}", giga(p.flops_per_second)) for p in (*peak.squares, *peak.layers)
    ]
    rows.append(("a block's layers", "", giga(peak.layers_flops_per_second)))
    rows.append(("peak", "", giga(peak.flops_per_second)))
    return table((f"{peak.dtype} product", "shape", "GFLOP/s"), rows)


def format_shares(shares: Sequence[Share]) -> str:
    """The share of the peak that every part reaches, and where the rest goes."""
    rows = [
        (
            s.part,
            f"{s.seconds:.3f}",
            giga(s.flops_per_second),
            f"{s.share:.1%}",
            f"{s.lost_seconds:.3f}",
            f"{s.loss:.1%}",
        )
        for s in shares
    ]
    return table(("part", "seconds", "GFLOP/s", "of peak", "lost, s", "of the loss"), rows)


def format_kinds(kinds: Sequence[Kind]) -> str:
    """Seconds by kind of operator."""
    rows = [(kind.name, f"{kind.seconds:.3f}", f"{kind.share:.1%}", str(kind.calls)) for kind in kinds]
    return table(("operators, profiled", "seconds", "of the run", "calls"), rows)


def format_growth(growth: Growth) -> str:
    """A row a point, and the fitted powers below."""
    heads = ("size", "batch", *QUANTITIES, "images/s")
    rows = []
    for result in growth.results:
        h, w = result.image_size
        timing, work = result.timing, result.work
        seconds = (timing.transformer, timing.residual, timing.decode, timing.total)
        cells = [*(spread(s) for s in seconds), tera(work.total.total) + " T", tera(work.total.attention) + " T"]
        cells += [f"{memory_bytes(result) / GIB:.2f} GiB", f"{result.images_per_second:.3g}"]
        rows.append((f"{h}×{w}", str(result.settings.batch), *cells))
    powers = [f"{growth.exponents[name]:.2f}" if name in growth.exponents else "" for name in QUANTITIES]
    rows.append(("power", "", *powers, ""))
    return f"growth over {growth.over}; power: cost goes with {growth.over} to this\n" + table(heads, rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their cells; the first is left-aligned, figures right-aligned."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        return "  ".join([first.ljust(widths[0]), *padded]).rstrip()

    return "\n".join(line(cells) for cells in (heads, *rows))


def spread(seconds: Seconds) -> str:
    """Median, lowest and highest."""
    if len(seconds.runs) == 1:
        return f"{seconds.median:.3f}"
    return f"{seconds.median:.3f} ({seconds.low:.3f}–{seconds.high:.3f})"


def tera(macs: float) -> str:
    return f"{macs / 1e12:.3g}"


def giga(rate: float) -> str:
    return f"{rate / 1e9:.0f}"


def _device_memory(memory: int | None) -> str:
    return "" if memory is None else f", {memory / GIB:.2f} GiB on the device"
