"""What a run reports: JSON lines, and TensorBoard where it is installed"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hartist.errors import UserError
from hartist.files import write_text
from hartist.training.parallel import World


class RunLog:
    """Collects figures step by step and writes their means; only the main rank touches files.

    RUN/log.jsonl has one object a line: the means of the steps since the line before, or the figures of a
    validation. RUN/tensorboard has the same.
    """

    def __init__(self, run_dir: Path, start: int, world: World) -> None:
        self.world = world
        self._sums: dict[str, list[float]] = defaultdict(list)
        self._images = 0
        self._seconds = 0.0
        self._flops = 0.0
        self._since = time.monotonic()
        self._file: Any = None
        self._board: Any = None
        if world.main:
            path = run_dir / "log.jsonl"
            _drop_after(path, start)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed in `close`)
            self._board = _tensorboard(run_dir / "tensorboard", start)

    def add(self, figures: Mapping[str, float], images: int, flops: float) -> None:
        """One step's figures, its images over all ranks, and its floating-point operations."""
        for name, value in figures.items():
            self._sums[name].append(value)
        self._images += images
        self._flops += flops

    def pause(self) -> None:
        """Stop the clock: what follows (pictures, checkpoints) is no training."""
        self._seconds += time.monotonic() - self._since

    def go_on(self) -> None:
        self._since = time.monotonic()

    def write_means(self, step: int, rate: float, peak_flops: float) -> dict[str, float]:
        """Close the window of steps that ends here (collective); returns the line's figures.

        `peak_flops` is what all ranks together could do in a second; 0 leaves the utilisation (MFU) out.
        """
        self.pause()
        figures = self.world.mean({name: sum(values) / len(values) for name, values in self._sums.items()})
        figures |= {"rate": rate, "images_per_second": self._images / max(self._seconds, 1e-9)}
        if peak_flops and self._flops:
            figures["mfu"] = self._flops / self._seconds / peak_flops
        self._sums.clear()
        self._images, self._flops, self._seconds = 0, 0.0, 0.0
        self.write(step, figures)
        self.go_on()
        return figures

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """A line of its own."""
        if self._file is None:
            return
        row = {"step": step} | {name: float(f"{value:.6g}") for name, value in figures.items()}
        line = json.dumps(row).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]  # a disk that fills up takes a part, and then nothing
            if self._board is not None:
                for name, value in figures.items():
                    self._board.add_scalar(name, value, step)
        except OSError as error:
            self._board = None  # its thread would fail over the same disk when it is closed
            reason = error.strerror or error
            raise UserError(f"cannot write {self._file.name} ({reason}); free some space and run it again") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _tensorboard(directory: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory), purge_step=start + 1 if start else None)


def _drop_after(path: Path, step: int) -> None:
    """Remove lines of steps that are about to be run again, and one that a crash tore."""
    if not path.is_file():
        return

    def is_done(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if is_done(line)]
    if len(kept) < len(lines):
        write_text(path, "".join(line + "\n" for line in kept))
