"""The machine that figures are taken on: what it is, and the memory a process has had on it."""

from __future__ import annotations

import contextlib
import gc
import platform
import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch

from hartist.memory import give_back_memory


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    return {
        "cpu": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


@dataclass(frozen=True)
class Peak:
    """Memory at its highest, bytes."""

    resident: int
    """Of the process: Python and libraries included."""
    device: int | None
    """What tensors took on the accelerator; None on a CPU. MPS tells no peak: what its driver holds."""


def reset_peak(device: torch.device) -> bool:
    """Let `peak` count from here on; whether the system can do that for resident memory (Linux can).

    What was freed is given back first: the C library keeps it otherwise, and it would count again.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    give_back_memory()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def peak(device: torch.device) -> Peak:
    """The highest memory of this process since `reset_peak`, or since its start where that can't be reset."""
    on_device = None
    if device.type == "cuda":
        on_device = torch.cuda.max_memory_allocated(device)
    elif device.type == "mps":
        on_device = torch.mps.driver_allocated_memory()
    return Peak(peak_resident(), on_device)


def peak_resident() -> int:
    """The highest resident memory of this process, bytes."""
    # Linux's getrusage would count a parent's memory too, and can't be reset.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
