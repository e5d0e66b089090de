"""The seed of every picture: its own, from (benchmark, prompt, index), and of nothing else

A seed of its own does not depend on batches, on the order of the prompts, on how they are shared out or on which are
left out by a limit. Harnesses that set one seed before each prompt start all prompts from the same noise: their
pictures resemble each other, which lowers diversity and raises the Fréchet distance. `fixed` reproduces that flaw, in
order to show it.
"""

from __future__ import annotations

import hashlib

from hartist.evaluation.benchmarks.base import Item
from hartist.evaluation.harness.result import Seeds

MASK = 2**63 - 1


def own_seed(benchmark: str, prompt: str | int, index: int) -> int:
    """The first eight bytes of sha256("benchmark, NUL, prompt, NUL, index"), big-endian, without the sign bit."""
    text = f"{benchmark}\0{prompt}\0{index}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") & MASK


def seed_of(benchmark: str, item: Item, seeds: Seeds = "per-image") -> int:
    """An item's seed; with `fixed`, its index: the same for every prompt."""
    return item.index if seeds == "fixed" else own_seed(benchmark, item.prompt, item.index)
