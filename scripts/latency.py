"""Seconds that one picture of the bundled model takes, warm: python scripts/latency.py"""

from __future__ import annotations

import statistics
import time

from hartist import Pipeline


def main() -> None:
    pipe = Pipeline.from_pretrained(device="cpu")
    pipe("red apple, 3d", seed=0)
    seconds = []
    for seed in range(1, 11):
        start = time.perf_counter()
        pipe("red apple, 3d", seed=seed)
        seconds.append(time.perf_counter() - start)
    print(f"median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f} s over {len(seconds)}")


if __name__ == "__main__":
    main()
