"""Runs that are killed at random moments end with the weights of an undisturbed one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hartist.training.config import TokenizerLossConfig
from hartist.training.loop import train
from runs import TESTS, assert_same_state, loss_curve, python, saved_step
from small import make_tokenizer_stage, run_config

sys.path.insert(0, str(TESTS.parent / "benchmarks"))

import kill_and_resume

LASTING = """
import sys
from pathlib import Path
from hartist.training.config import TokenizerLossConfig
from hartist.training.loop import train
from small import make_tokenizer_stage, run_config

run = run_config(8, checkpoint_seconds=0.0)
stage = make_tokenizer_stage(run, TokenizerLossConfig(continuous_steps=2, revive_every=3))
plain = stage.source.batch
def batch(micro):
    if micro.step == 4:
        print("step 4", flush=True)
        sys.stdin.read()  # until the end of time
    return plain(micro)
stage.source.batch = batch
train(stage, run, Path(sys.argv[1]), progress=False)
"""


def test_a_process_killed_within_a_step_resumes_to_the_same_weights(tmp_path: Path) -> None:
    process = python("-c", LASTING, tmp_path / "killed", stdin=-1)
    try:
        assert process.stdout is not None
        assert "step 4" in process.stdout.readline()
    finally:
        process.kill()
        process.communicate()
    assert saved_step(tmp_path / "killed") == 4
    losses = TokenizerLossConfig(continuous_steps=2, revive_every=3)
    for name in ("killed", "whole"):
        run = run_config(8)
        assert train(make_tokenizer_stage(run, losses), run, tmp_path / name, progress=False) == 8
    assert_same_state(tmp_path / "killed", tmp_path / "whole")
    assert loss_curve(tmp_path / "killed") == loss_curve(tmp_path / "whole")


def check(kills: int, ranks: int, folder: Path) -> None:
    found, different = kill_and_resume.compare(kills, ranks, seed=ranks, folder=folder)
    assert different == []
    assert len(found) == kills
    assert [one.step for one in found] == sorted(one.step for one in found)


def test_three_kills(tmp_path: Path) -> None:
    check(3, 1, tmp_path)


def test_a_difference_would_be_seen(tmp_path: Path) -> None:
    """The comparison itself: of two runs with other seeds."""
    for seed in range(2):
        run = run_config(1, seed=seed)
        train(make_tokenizer_stage(run), run, tmp_path / str(seed), progress=False)
    different = kill_and_resume.differences(tmp_path / "0", tmp_path / "1")
    assert any("weights.tokenizer" in name for name in different)
    assert any(name.endswith(": loss") for name in different)
    assert kill_and_resume.differences(tmp_path / "0", tmp_path / "0") == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(tmp_path: Path, ranks: int) -> None:
    check(20, ranks, tmp_path)
