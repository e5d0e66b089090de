"""What the C library keeps of freed memory goes back when asked."""

from __future__ import annotations

import sys

import pytest
import torch

from hartist.memory import _malloc_trim, give_back_memory


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux" or _malloc_trim() is None, reason="no glibc")
def test_freed_tensors_leave_the_process() -> None:
    tensors = [torch.ones(100_000) for _ in range(500)]  # 200 MB in pieces that come from the heap
    del tensors[:-1]  # one stays, on top of them
    before = resident()
    give_back_memory()
    assert before - resident() > 100e6
    assert tensors[0].sum() == 100_000


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hartist.memory._malloc_trim", lambda: None)
    give_back_memory()
