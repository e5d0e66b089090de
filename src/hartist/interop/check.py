"""`hartist check`: does this implementation compute what the authors' does? One row a quantity.

A folder holds weights, inputs and expected outputs; every key of `expected.safetensors` must be
either compared or read as an input, or it counts as not understood, which is a failure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.interop.fixtures import Fixture, load_subject
from hartist.interop.quantities import QUANTITIES

TOLERANCE = 1e-4


@dataclass(frozen=True)
class CheckRow:
    """One quantity; several keys that differ only in a trailing number are one quantity."""

    quantity: str
    keys: tuple[str, ...]
    kind: Literal["ids", "float"]
    max_difference: float
    """The largest one (ids: how many differ), inf where nothing could be compared."""
    tolerance: float
    """What the key with the largest difference may differ by."""
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class CheckReport:
    directory: Path
    rows: tuple[CheckRow, ...]
    inputs: tuple[str, ...]
    """Keys that were read as inputs."""

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)


@torch.inference_mode()
def check_folder(directory: Path) -> CheckReport:
    """Compute every quantity in `directory/expected.safetensors` and compare, in float32.

    Ids must be equal, floats within 1e-4·(1 + max|expected|). Raises UserError if the folder has no
    form of a check set, or its weights do not fit its configuration.
    """
    directory = Path(directory)
    expected = directory / "expected.safetensors"
    if not expected.is_file():
        raise UserError(f"{directory} holds no expected.safetensors; give a folder of a check set")
    fixture = Fixture(read_safetensors(expected))
    subject = load_subject(directory)
    actual: dict[str, Tensor] = {}
    for compute in QUANTITIES:
        actual |= compute(subject, fixture, actual)
    return CheckReport(directory, *_compare(fixture, actual))


def _compare(fixture: Fixture, actual: dict[str, Tensor]) -> tuple[tuple[CheckRow, ...], tuple[str, ...]]:
    groups: dict[str, list[CheckRow]] = {}
    for key, tensor in fixture.tensors.items():
        if key in actual:
            row = _compare_one(key, tensor, actual[key])
        elif key in fixture.used:
            continue
        else:
            kind: Literal["ids", "float"] = "float" if tensor.is_floating_point() else "ids"
            row = CheckRow(key, (key,), kind, torch.inf, 0.0, False, "not understood")
        groups.setdefault(re.sub(r"\.\d+$", "", key), []).append(row)
    rows = tuple(_merge(quantity, rows) for quantity, rows in sorted(groups.items()))
    return rows, tuple(key for key in fixture.tensors if key in fixture.used and key not in actual)


def _compare_one(key: str, expected: Tensor, actual: Tensor) -> CheckRow:
    kind: Literal["ids", "float"] = "float" if expected.is_floating_point() else "ids"
    if expected.shape != actual.shape:
        note = f"shape {list(actual.shape)} instead of {list(expected.shape)}"
        return CheckRow(key, (key,), kind, torch.inf, 0.0, False, note)
    if kind == "ids":
        count = int((expected.long() != actual.long()).sum())
        return CheckRow(key, (key,), kind, float(count), 0.0, count == 0)
    tolerance = TOLERANCE * (1 + _largest(expected))
    difference = _largest(expected.double() - actual.double())
    return CheckRow(key, (key,), kind, difference, tolerance, difference <= tolerance)  # NaN fails


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _merge(quantity: str, rows: list[CheckRow]) -> CheckRow:
    """The row furthest from passing stands for all."""
    worst = max(rows, key=lambda row: (not row.passed, row.max_difference / (row.tolerance or 1.0)))
    return CheckRow(
        quantity,
        tuple(key for row in rows for key in row.keys),
        worst.kind,
        worst.max_difference,
        worst.tolerance,
        all(row.passed for row in rows),
        worst.note,
    )


def format_report(report: CheckReport) -> str:
    """A table: quantity, largest difference, tolerance, verdict; and a line that sums it up."""
    lines = [f"{report.directory}"]
    for row in report.rows:
        count = len(row.keys)
        name = row.quantity if count == 1 else f"{row.quantity} ({count} {_plural(row.quantity)})"
        if row.kind == "ids":
            difference = "equal" if row.passed else row.note or f"{row.max_difference:.0f} differ"
            lines.append(f"  {name:<38} {difference:<24} {'ok' if row.passed else 'FAILED'}")
        else:
            difference = row.note or f"{row.max_difference:.1e} (≤ {row.tolerance:.1e})"
            lines.append(f"  {name:<38} {difference:<24} {'ok' if row.passed else 'FAILED'}")
    failed = sum(not row.passed for row in report.rows)
    verdict = "all passed" if report.passed else f"{failed} FAILED"
    lines.append(f"  {len(report.rows)} quantities, {len(report.inputs)} inputs: {verdict}")
    return "\n".join(lines)


def _plural(quantity: str) -> str:
    return "scales" if quantity.startswith(("ar.", "tok.")) else "parts"
