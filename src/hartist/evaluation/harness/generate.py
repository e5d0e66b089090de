"""Making a benchmark's pictures: what is there stays, what is missing is made, by this process and others

Batches are formed from the whole plan and shared out by their number, so that it makes no difference to a picture how
many processes there are, or where a run was interrupted. Each of several shards lists its pictures in a manifest of
its own; the first one waits for the others and joins them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hartist.errors import UserError
from hartist.evaluation.harness.plan import PICTURES
from hartist.evaluation.harness.workers import make_in_processes
from hartist.files import write_text
from hartist.generation.cluster import ray_running
from hartist.generation.model_options import ModelOptions
from hartist.generation.offline import MANIFEST, Batch, Made, Manifest, batches, make
from hartist.generation.offline_plan import Picture
from hartist.generation.pipeline import Pipeline

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Shard:
    """This process's share of the batches: every `size`-th from `rank` on."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Shard:
        """As torchrun tells it, by RANK and WORLD_SIZE. Raises UserError for numbers that are none."""
        try:
            shard = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        except ValueError as error:
            raise UserError(
                f"RANK and WORLD_SIZE must be numbers ({error}); start several processes by torchrun"
            ) from error
        if not 0 <= shard.rank < shard.size:
            raise UserError(f"RANK {shard.rank} is outside 0..{shard.size - 1}; start several processes by torchrun")
        return shard

    @property
    def main(self) -> bool:
        """Whether this process scores."""
        return self.rank == 0

    @property
    def manifest(self) -> str:
        return MANIFEST if self.size == 1 else f"manifest.{self.rank}-of-{self.size}.jsonl"


@dataclass(frozen=True)
class Means:
    """What pictures are made with."""

    options: ModelOptions
    fingerprint: str
    """`options.fingerprint()`."""
    batch_size: int
    processes: int = 1
    ray_address: str | None = None


def make_missing(
    out: Path, plan: Sequence[Picture], means: Means, pipe: Pipeline | None, shard: Shard, *, progress: bool = True
) -> list[dict[str, Any]]:
    """Make what is missing of the plan; returns the manifest's entry of every picture, in the plan's order.

    `pipe` is the model of this process, needed unless others make the pictures. Shards other than the first return
    when their share is made, with nothing. Raises UserError for what can't be made.
    """
    found = find_pictures(out, plan, means.fingerprint)
    missing = {picture.file for picture in plan if picture.file not in found}
    share = [
        dataclasses.replace(batch, wanted=batch.wanted & missing)
        for batch in batches(plan, plan, means.batch_size)[shard.rank :: shard.size]
    ]
    work = [batch for batch in share if batch.wanted]
    if work:
        total = sum(len(batch.pictures) for batch in share)
        there = total - sum(len(batch.wanted) for batch in work)
        with (
            ShardManifest(out, shard) as manifest,
            contextlib.closing(_make(means, pipe, work)) as finished,
            tqdm(
                total=total, initial=there, desc="generating", unit="img", disable=not (progress and shard.main)
            ) as bar,
        ):
            for made in finished:
                for one in made:
                    manifest.add(one, means.fingerprint)
                bar.update(len(made))
    return _join(out, plan, means.fingerprint, found) if shard.main else []


class ShardManifest(Manifest):
    """A manifest under the name of a shard."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        super().__init__(folder)
        self.path = folder / shard.manifest


def find_pictures(out: Path, plan: Sequence[Picture], model: str) -> dict[str, dict[str, Any]]:
    """The manifest entries of those pictures of the plan that are there, whole, by file name."""
    entries = read_entries(out)
    found = {}
    for picture in plan:
        entry = entries.get((picture.file, picture.key(model)))
        if entry is None:
            continue
        try:
            content = (out / picture.file).read_bytes()
        except OSError:
            continue
        if hashlib.sha256(content).hexdigest() == entry.get("sha256"):
            found[picture.file] = entry
    return found


def read_entries(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What the folder's manifests list, by file name and key. Unfinished lines don't count.

    The shards' come first: when one of them has just been joined, the whole manifest has its lines.
    """
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for path in [*sorted(out.glob("manifest.*-of-*.jsonl")), out / MANIFEST]:
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue
        for line in lines:
            try:
                entry = json.loads(line)
                entries[entry["file"], entry["key"]] = entry
            except (ValueError, TypeError, KeyError):
                continue
    return entries


def _make(means: Means, pipe: Pipeline | None, work: Sequence[Batch]) -> Generator[list[Made], None, None]:
    if not work:
        return
    if means.ray_address is not None:
        with ray_running(means.ray_address, means.processes * means.options.threads):
            from hartist.generation.offline_ray import make_on_ray

            plan = [picture for batch in work for picture in batch.pictures]
            for one in make_on_ray(means.options, plan, work, means.processes):
                yield [one]
    elif means.processes > 1:
        yield from make_in_processes(means.options, work, means.processes)
    else:
        assert pipe is not None
        for batch in work:
            yield make(pipe, batch)


def _join(out: Path, plan: Sequence[Picture], model: str, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Wait until all shards are done, then make one manifest of theirs, in the plan's order."""
    told = False
    while rest := [picture for picture in plan if picture.file not in found]:
        found |= find_pictures(out, rest, model)
        if len(found) < len(plan):
            if not told:
                print(f"waiting for {len(plan) - len(found)} pictures of other processes", file=sys.stderr)
                told = True
            time.sleep(POLL_SECONDS)
    entries = [found[picture.file] for picture in plan]
    write_text(out / MANIFEST, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    for path in [*out.glob("manifest.*-of-*.jsonl"), *(out / PICTURES).glob(".*.tmp")]:
        path.unlink(missing_ok=True)
    return entries
