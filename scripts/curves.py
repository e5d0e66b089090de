"""Draw a run's log.jsonl: python scripts/curves.py RUN/log.jsonl OUT.png NAME[,NAME…] …   (one panel an argument)

A name may end in * to take all that begin so: codes_* draws the codes in use on every scale.
Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(log: str, out: str, *panels: str) -> None:
    rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    names = list(dict.fromkeys(name for row in rows for name in row))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels, strict=True):
        for wanted in panel.split(","):
            stem = wanted.removesuffix("*")
            for name in (n for n in names if n == wanted or (stem != wanted and n.startswith(stem))):
                points = [(row["step"], row[name]) for row in rows if name in row]
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
