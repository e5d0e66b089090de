"""Compares compiled and plain blocks, in a process without shape checks, which PyTorch's compiler can't see through."""

from __future__ import annotations

import copy
import sys

import torch

from hartist.transformer.compiled import compile_blocks
from small import random_transformer
from test_shortcuts import MODELS, assert_same, generate


def main(name: str) -> None:
    """Draw with both; print how many pieces were compiled."""
    torch.set_num_threads(1)
    model = random_transformer(**MODELS[name])
    compiled = compile_blocks(copy.deepcopy(model))
    for seeds in ((0, 1), (5, 6, 7)):
        assert_same(generate(compiled, seeds), generate(model, seeds))
    print(torch._dynamo.utils.counters["stats"]["unique_graphs"])  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(sys.argv[1])
