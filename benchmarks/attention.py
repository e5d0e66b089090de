"""Blocked attention against PyTorch's fused kernel, bfloat16 on CPU: python benchmarks/attention.py

Shapes are four heads of the last scales at 1024 and 512 px. Best of three, in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hartist.transformer.attend import blocked_attention

SHAPES = ((4096, 9751), (1296, 3351), (1024, 2539))
HEADS, HEAD_DIM, SCALE = 4, 64, 1 / 32


def seconds(run: Callable[[], Tensor]) -> float:
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def main() -> None:
    print("queries  keys   fused GFLOP/s  blocked GFLOP/s  ratio")
    for queries, keys in SHAPES:
        q, k, v = (torch.randn(1, HEADS, n, HEAD_DIM).bfloat16() for n in (queries, keys, keys))
        work = 4 * queries * keys * HEAD_DIM * HEADS / 1e9
        fused = seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, scale=SCALE))
        blocked = seconds(lambda q=q, k=k, v=v: blocked_attention(q, k, v, SCALE))
        print(f"{queries:7} {keys:6} {work / fused:14.0f} {work / blocked:16.0f} {fused / blocked:6.2f}")


if __name__ == "__main__":
    main()
