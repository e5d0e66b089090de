"""Timing in turns: variants of a step, each in a process of its own

Round by round each variant takes a few steps, A B C A B C …, so that a machine that slows down slows them all alike;
the ratio of two variants is that of a round, whose steps ran within minutes. A process for each variant and round
tells their peak memory apart, and only one of them takes memory at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hartist.evaluation.bench.hardware import peak_resident


@dataclass(frozen=True)
class Timing:
    """What was measured of a variant."""

    rounds: tuple[tuple[float, ...], ...]
    """Seconds of every step after the warm-up, round by round."""
    peak_bytes: int
    """Resident memory of its processes at its highest, Python and libraries included."""

    @property
    def median(self) -> float:
        return statistics.median(second for seconds in self.rounds for second in seconds)


def answer(make_step: Callable[[], Callable[[], object]]) -> None:
    """A variant's side: for every line on stdin take a step, and answer with its seconds and the peak memory.

    Whatever is printed meanwhile goes to stderr. Ends with stdin.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        step = make_step()
        for _ in sys.stdin:
            start = time.perf_counter()
            step()
            report = {"seconds": time.perf_counter() - start, "peak_bytes": peak_resident()}
            out.write(json.dumps(report) + "\n")
            out.flush()


def add_turn_flags(parser: argparse.ArgumentParser) -> None:
    """How much `time_in_turns` runs."""
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (default: 3)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn (default: 4)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them (default: 1)")


def time_in_turns(commands: Mapping[str, Sequence[str]], *, rounds: int, steps: int, warmup: int) -> dict[str, Timing]:
    """Timings of the variants by name; each command is a process that calls `answer`.

    In every round each variant takes `warmup` steps that don't count, then `steps` that do. Raises RuntimeError
    if one dies.
    """
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0)
    for number in range(rounds):
        for name, command in commands.items():
            done = subprocess.run(command, input="\n" * (warmup + steps), stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise RuntimeError(f"the process of {name} failed (exit code {done.returncode}); see above")
            answers = [json.loads(line) for line in done.stdout.splitlines()]
            seconds[name].append(tuple(answer["seconds"] for answer in answers[warmup:]))
            peaks[name] = max(peaks[name], answers[-1]["peak_bytes"])
            median = statistics.median(seconds[name][-1])
            print(f"round {number + 1} of {rounds}, {name}: {median:.3f} s", file=sys.stderr, flush=True)
    return {name: Timing(tuple(seconds[name]), peaks[name]) for name in commands}


def speedup(slow: Timing, fast: Timing) -> float:
    """How many times as fast: the median over the rounds of the ratio of their medians."""
    medians = ([statistics.median(seconds) for seconds in timing.rounds] for timing in (slow, fast))
    return statistics.median(a / b for a, b in zip(*medians, strict=True))


def to_json(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {
        name: {"median_seconds": timing.median, "seconds": timing.rounds, "peak_bytes": timing.peak_bytes}
        for name, timing in timings.items()
    }
