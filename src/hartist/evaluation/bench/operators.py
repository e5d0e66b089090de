"""Which operators the time goes to: one run under PyTorch's profiler, sorted into kinds"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hartist.generation.devices import now

PRODUCTS = ("mm", "addmm", "_scaled_mm", "_int_mm", "_addmm_activation")
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("convolutions", ("conv",)),
    ("attention", ("attention", "bmm")),
    ("softmax", ("softmax",)),
    ("norms", ("norm",)),
    ("sampling", ("topk", "sort", "searchsorted", "cumsum", "multinomial", "argmax", "exponential", "uniform")),
    ("copies", ("copy", "cat", "clone", "to_copy", "index", "gather", "scatter", "fill", "zero", "pad", "repeat")),
    ("resampling", ("upsample", "pool", "interpolate")),
)
"""What the names of operators contain, first match first; the rest counts as element by element."""


@dataclass(frozen=True)
class Kind:
    """Operators of one kind in one run."""

    name: str
    seconds: float
    calls: int
    share: float
    """Of the run's wall-clock time, 0 to 1."""


def profile_kinds(run: Callable[[], object], modules: Iterable[nn.Module], device: torch.device) -> list[Kind]:
    """Seconds by kind of operator, most first, and last what no operator accounts for.

    A product is a linear layer's if its shape is that of a weight of `modules`, else attention's. On CUDA the seconds
    are the kernels', and what is left is time in which the device waited. The profiler slows the run down.
    """
    weights = {shape for module in modules for shape in _weight_shapes(module)}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    start = now(device)
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        run()
        end = now(device)
    found: dict[str, list[float]] = {}
    for event in profile.key_averages(group_by_input_shape=True):
        micro = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        if micro > 0 and "::" in event.key:
            entry = found.setdefault(kind_of(event.key, event.input_shapes, weights), [0.0, 0])
            entry[0] += micro / 1e6
            entry[1] += event.count
    whole = end - start
    kinds = [Kind(name, seconds, int(calls), seconds / whole) for name, (seconds, calls) in found.items()]
    kinds.sort(key=lambda kind: -kind.seconds)
    rest = max(0.0, whole - sum(kind.seconds for kind in kinds))
    return [*kinds, Kind("outside operators", rest, 0, rest / whole)]


def kind_of(operator: str, shapes: Sequence[Any], weights: set[tuple[int, int]]) -> str:
    """The kind of an operator such as `aten::mm`, given the shapes of its inputs."""
    name = operator.split("::", 1)[1]
    if "linear" in name:
        return "linear layers"
    if name in PRODUCTS:
        matrices = [tuple(shape) for shape in shapes if isinstance(shape, list | tuple) and len(shape) == 2]
        is_layer = not matrices or any(shape in weights or shape[::-1] in weights for shape in matrices)
        return "linear layers" if is_layer else "attention"
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "element by element")


def _weight_shapes(module: nn.Module) -> set[tuple[int, int]]:
    tensors = [*module.parameters(), *module.buffers()]
    return {(tensor.shape[0], tensor.shape[1]) for tensor in tensors if tensor.ndim == 2}
