"""Training runs for the tests: what they left on disk, how to stop them, and processes to run them in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

TESTS = Path(__file__).resolve().parent


def state_tensors(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of a run's resumable state (weights, averages, moments), whole, however many ranks wrote it."""
    reader = HuggingFaceStorageReader(str(run_dir / "checkpoint"))
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_state(a: Path, b: Path) -> None:
    """Bit for bit."""
    one, other = state_tensors(a), state_tensors(b)
    assert one.keys() == other.keys()
    assert one
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not different


def assert_close_state(a: Path, b: Path, tolerance: float) -> None:
    """Up to rounding: gradients of ranks are summed in another order."""
    one, other = state_tensors(a), state_tensors(b)
    assert one.keys() == other.keys()
    different = {n: float((x - other[n]).abs().max()) for n, x in one.items() if not x.allclose(other[n], 0, tolerance)}
    assert not different


def state_files(run_dir: Path) -> dict[str, bytes]:
    """The files of a run's resumable state as they are."""
    return {path.name: path.read_bytes() for path in sorted((run_dir / "checkpoint").iterdir())}


def saved_step(run_dir: Path) -> int:
    """Finished steps in the resumable state; 0 if there is none, or it is just being replaced."""
    try:
        return json.loads((run_dir / "checkpoint" / "state.json").read_text())["step"]
    except FileNotFoundError:
        return 0


def log_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def loss_curve(run_dir: Path) -> dict[int, float]:
    """The loss of every logged step, full or coarse."""
    names = ("loss", "coarse_loss")
    return {row["step"]: row[name] for row in log_rows(run_dir) for name in names if name in row}


def stop_after(stage: Any, step: int, number: int = signal.SIGTERM) -> None:
    """Have the process get a signal during step `step`, as when a machine is taken back."""
    plain = stage.after_step

    def after_step(now: int) -> Any:
        if now == step:
            os.kill(os.getpid(), number)
        return plain(now)

    stage.after_step = after_step


def python(*arguments: object, ranks: int = 0, restarts: int = 0, **options: Any) -> subprocess.Popen:
    """Start Python with one thread; with `ranks`, under torchrun on this machine alone. Output is piped, as text."""
    command = [sys.executable, "-W", "ignore"]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        command += ["--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    folders = [str(TESTS), str(TESTS.parent / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, **(pipes | options))


def finish(process: subprocess.Popen, seconds: float = 300) -> str:
    """Wait for a process; returns its output. One that takes too long is killed, and fails the test."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its workers too
        output = process.communicate(timeout=60)[0]
        raise AssertionError(f"still running after {seconds} s:\n{output}") from None
