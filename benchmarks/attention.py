"""Our attention against PyTorch's fused kernel, bfloat16 on CPU: python benchmarks/attention.py

Generation: the last scales at 1024 and 512 px (four heads) and short ones (24), in blocks. Training: forward and
backward pass over all scales of 256 px, without and with the mean subsampling, each scale on its prefix. Best of three,
in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hartist.scales import SIDES_256, ScaleSchedule
from hartist.training.subsampling import MEAN_DROP, kept_count
from hartist.transformer.attend import blocked_attention
from hartist.transformer.block_causal import dense_mask
from hartist.transformer.prefix_attention import prefix_attention

SHAPES = ((4, 4096, 9751), (4, 1296, 3351), (4, 1024, 2539), (24, 256, 979), (24, 100, 454), (24, 36, 354))
"""Heads, queries, keys."""
HEAD_DIM, SCALE = 64, 1 / 32
BATCH, TRAINING_HEADS, CONTEXT = 8, 8, 32


def seconds(run: Callable[[], Tensor]) -> float:
    run()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def generation() -> None:
    print("queries  keys   fused GFLOP/s  blocked GFLOP/s  ratio")
    for heads, queries, keys in SHAPES:
        q, k, v = (torch.randn(1, heads, n, HEAD_DIM).bfloat16() for n in (queries, keys, keys))
        work = 4 * queries * keys * HEAD_DIM * heads / 1e9
        fused = seconds(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, scale=SCALE))
        blocked = seconds(lambda q=q, k=k, v=v: blocked_attention(q, (k,), (v,), SCALE))
        print(f"{queries:7} {keys:6} {work / fused:14.0f} {work / blocked:16.0f} {fused / blocked:6.2f}")


def training() -> None:
    print("tokens  masked ms  prefix ms  ratio   (forward and backward)")
    lengths = ScaleSchedule.from_sides(SIDES_256).lengths
    for last in (lengths[-1], kept_count(lengths[-1], MEAN_DROP)):
        runs = (CONTEXT, *lengths[1:-1], last)
        shape = BATCH, TRAINING_HEADS, sum(runs), HEAD_DIM
        q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
        gradient = torch.randn(shape).bfloat16()
        mask = dense_mask(runs)

        def masked(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Tensor = mask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)

        def prefix(q: Tensor = q, k: Tensor = k, v: Tensor = v, runs: tuple[int, ...] = runs) -> Tensor:
            return prefix_attention(q, k, v, SCALE, runs)

        a, b = (
            seconds(lambda run=run, x=(q, k, v), g=gradient: torch.autograd.grad(run(), x, g)[0])
            for run in (masked, prefix)
        )
        print(f"{sum(runs):6} {a * 1e3:10.1f} {b * 1e3:10.1f} {a / b:6.2f}")


def main() -> None:
    generation()
    training()


if __name__ == "__main__":
    main()
