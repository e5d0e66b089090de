"""What training costs: floating-point operations counted on networks without storage, and the machine's peak"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hartist.precision import computes_bf16
from hartist.training.parallel import World

BACKWARD = 2
"""The backward pass computes two products (of inputs and of weights) for every one of the forward pass."""

PEAK_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 peak of the tensor cores, operations a second, from the makers' data sheets."""


def forward_flops(build: Callable[[], nn.Module], run: Callable[[nn.Module], Any]) -> float:
    """Operations of `run(network)`, a product and a sum counted as two; on the meta device, so nothing is computed."""
    with torch.device("meta"):
        network = build()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(network)
    return float(counter.get_total_flops())


def peak_flops(world: World, bf16: bool) -> float:
    """Operations a second that all ranks could do at best: the data sheet's on CUDA, a matrix product's on CPU.

    0 where neither is known. Ranks on one CPU share it, so theirs are measured at the same time.
    """
    bf16 = bf16 and computes_bf16(world.device)
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        return next((peak for key, peak in PEAK_BF16.items() if key in name), 0.0) * world.size if bf16 else 0.0
    if world.device.type != "cpu":
        return 0.0
    world.barrier()
    own = torch.tensor(_measured_cpu_flops(bf16), dtype=torch.float64)
    return float(world.sum(own))


def _measured_cpu_flops(bf16: bool, side: int = 1024, seconds: float = 0.15) -> float:
    a = torch.ones(side, side, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
