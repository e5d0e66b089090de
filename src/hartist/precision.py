"""Where computing in bfloat16 pays"""

from __future__ import annotations

import torch


def computes_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself.

    A CPU without AVX-512 (or an Arm CPU without its bfloat16 instructions) only emulates it: a hundred times
    slower than float32.
    """
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(device: torch.device, bf16: bool) -> torch.autocast:
    """Autocast to bfloat16 if that is wanted and pays; else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and computes_bf16(device))
