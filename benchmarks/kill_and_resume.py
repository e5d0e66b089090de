"""Kill a training run at random moments until it is done: its weights must be those of an undisturbed run

  python benchmarks/kill_and_resume.py --kills 20 --ranks 2

The run is the real command on a tiny tokenizer, with all that a step can depend on: a codebook from k-means,
dead codes revived, a discriminator with moving averages. It saves after every step, so that about every other
kill falls into the writing of a checkpoint. Killed (SIGKILL) are all its processes at once, as by a power cut.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from tables import markdown

SIZE = 32
SETTINGS = {
    "image_size": SIZE,
    "tokenizer.vocab_size": 32,
    "tokenizer.latent_channels": 4,
    "tokenizer.channels": 32,
    "tokenizer.channel_multipliers": [1, 1],
    "tokenizer.sides": [1, 2, 3, 4],
    "losses.perceptual": 0,
    "losses.continuous_steps": 3,
    "losses.revive_every": 4,
    "losses.adversarial": 0.5,
    "losses.adversary.channels": 4,
    "losses.adversary.layers": 2,
    "run.optimizer.warmup_steps": 2,
    "run.picture_every": 5,
    "run.log_every": 1,
}
POLL_SECONDS = 0.002


@dataclass(frozen=True)
class Kill:
    """One kill: after which saved step, and what was going on."""

    step: int
    during: str


def write_pictures(folder: Path, seed: int) -> None:
    """A captioned folder: 12 pictures to train on, 4 held out."""
    rng = random.Random(seed)
    for split, count in (("train", 12), ("validation", 4)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            image = Image.new("RGB", (SIZE, SIZE), "white")
            left, top = rng.randrange(SIZE // 2), rng.randrange(SIZE // 2)
            colour = tuple(rng.randrange(256) for _ in range(3))
            ImageDraw.Draw(image).rectangle((left, top, left + SIZE // 3, top + SIZE // 3), fill=colour)
            image.save(folder / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": "a rectangle"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def command(data: Path, run: Path, steps: int, ranks: int, checkpoint_seconds: float) -> list[str]:
    """The command that starts the run, and resumes it."""
    launcher = [sys.executable, "-m"]
    if ranks > 1:
        launcher += ["torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        launcher += ["--nproc-per-node", str(ranks), "-m"]
    arguments = ["hartist", "train", "tokenizer", "--data", data, "--out", run, "--steps", steps, "--no-bf16", "-q"]
    arguments += ["--batch-size", 4, "--micro-batch", 2, "--device", "cpu", "--threads", 1]
    settings = SETTINGS | {"run.checkpoint_seconds": checkpoint_seconds}
    for name, value in settings.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    return [*launcher, *map(str, arguments)]


def start(arguments: list[str], output: Path) -> subprocess.Popen:
    """A process group of its own; what it prints is appended to a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with open(output, "ab") as file:
        return subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all below it, which under torchrun have sessions of their own."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(parent) for pid, parent in map(str.split, table.splitlines())}
    family = [process.pid]
    for pid in family:  # grows on the way
        family += [child for child, parent in parents.items() if parent == pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def last_step(run: Path) -> int:
    """The last step that the log has."""
    with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
        return json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def saved_step(run: Path) -> int:
    """Finished steps in the checkpoint that the next start will find."""
    for name in ("checkpoint", ".checkpoint.old"):
        with contextlib.suppress(FileNotFoundError):
            return json.loads((run / name / "state.json").read_text())["step"]
    return 0


def activity(run: Path) -> str:
    """What is going on in the run's folder, as far as its temporary names tell."""
    if not (run / "checkpoint").exists() and (run / ".checkpoint.old").exists():
        return "between a checkpoint's two renames"
    if list(run.glob(".checkpoint.*.tmp")):
        return "writing a checkpoint"
    if list(run.glob(".tokenizer.*")):
        return "writing the result"
    return "training"


def wait(process: subprocess.Popen, until: Callable[[], bool], output: Path) -> bool:
    """Wait for a condition; False if the process is done before. Raises RuntimeError if it failed."""
    while process.poll() is None:
        if until():
            return True
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(f"the run failed:\n{output.read_text()[-3000:]}")
    return False


def train_and_kill(arguments: list[str], run: Path, steps: int, kills: int, rng: random.Random) -> list[Kill]:
    """Start the run again and again; the last start goes to its end."""
    output = run.with_suffix(".out")
    found: list[Kill] = []
    while True:
        process = start(arguments, output)
        try:
            if len(found) == kills:
                wait(process, lambda: False, output)
                return found
            first = saved_step(run)
            share = max(1, (steps - first) // (kills - len(found) + 1))
            target = first + rng.randint(1, share)
            if not wait(process, lambda target=target: last_step(run) >= target, output):
                return found
            if rng.random() < 0.5:  # else wherever it happens to be
                wait(process, lambda: activity(run) != "training", output)
            time.sleep(rng.random() * 0.2)
        finally:
            kill(process)
        found.append(Kill(saved_step(run), activity(run)))


def differences(one: Path, other: Path) -> list[str]:
    """Tensors of checkpoint and result, and losses of the log, that are not the same bit for bit."""
    different = []
    names = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    if names != sorted(path.relative_to(other) for path in other.rglob("*.safetensors")):
        return ["the files"]
    for name in names:
        a, b = load_file(one / name), load_file(other / name)
        different += [f"{name}: {key}" for key in a.keys() ^ b.keys()]
        different += [f"{name}: {key}" for key in a.keys() & b.keys() if not torch.equal(a[key], b[key])]
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    for a, b in zip(*logs, strict=True):
        clock = {"images_per_second", "mfu"}
        different += [f"step {a['step']}: {key}" for key in (a.keys() | b.keys()) - clock if a.get(key) != b.get(key)]
    return different


def compare(kills: int, ranks: int, seed: int, folder: Path) -> tuple[list[Kill], list[str]]:
    """Train undisturbed and killed; returns the kills, and what differs in the end."""
    write_pictures(folder / "data", seed)
    steps = 6 * kills + 6
    whole, killed = folder / "whole", folder / "killed"
    output = whole.with_suffix(".out")
    process = start(command(folder / "data", whole, steps, ranks, 1e9), output)
    try:
        wait(process, lambda: False, output)
    finally:
        kill(process)
    found = train_and_kill(
        command(folder / "data", killed, steps, ranks, 0.0), killed, steps, kills, random.Random(seed)
    )
    left = [str(path.relative_to(killed)) for path in killed.rglob(".*")]
    return found, differences(whole, killed) + [f"{path} left behind" for path in left]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        kills, different = compare(options.kills, options.ranks, options.seed, Path(folder))
    rows = [{"killed while": one.during, "saved steps": str(one.step)} for one in kills]
    print(markdown(rows) if rows else "no kills")
    writing = sum(one.during != "training" for one in kills)
    print(f"{len(kills)} kills of {options.ranks} rank(s), {writing} of them while files were being written")
    if different:
        print(f"different in the end: {', '.join(different[:10])}")
    else:
        print("weights, averages, moments and logged losses are those of an undisturbed run, bit for bit")
    return int(bool(different) or len(kills) < options.kills)


if __name__ == "__main__":
    sys.exit(main())
