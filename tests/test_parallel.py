"""Several ranks as one run: torchrun with gloo, two processes on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.training.parallel import World
from ranks import GENERATOR_STEPS, MUON, PLAIN, TOKENIZER_STEPS, train_generator, train_tokenizer
from runs import TESTS, assert_close_state, assert_same_state, finish, loss_curve, python, saved_step, state_files

RANKS = TESTS / "ranks.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by one process and by two, and checkpoints of each that the other goes on from."""
    folder = tmp_path_factory.mktemp("ranks")
    assert train_tokenizer(folder / "tokenizer-one") == TOKENIZER_STEPS
    assert train_tokenizer(folder / "accumulated-one", losses=PLAIN, steps=4, micro_batch=1) == 4
    assert train_generator(folder / "generator-one") == GENERATOR_STEPS
    assert train_generator(folder / "muon-one", optimizer=MUON) == GENERATOR_STEPS
    assert train_generator(folder / "one-then-ddp", stop=2) == 3
    shutil.copytree(folder / "one-then-ddp", folder / "one-then-fsdp")
    process = python(RANKS, folder, "together", ranks=2)
    output = finish(process)
    assert process.returncode == 0, output
    for first in ("fsdp", "ddp"):
        assert train_generator(folder / f"{first}-then-one") == GENERATOR_STEPS
    return folder


def assert_same_run(a: Path, b: Path, tolerance: float = 1e-5) -> None:
    """The same losses to the six digits of the log, and the same state in the end."""
    one, other = loss_curve(a), loss_curve(b)
    assert one.keys() == other.keys()
    assert one
    for step, loss in one.items():
        assert other[step] == pytest.approx(loss, rel=2e-5), step
    assert_close_state(a, b, tolerance)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_are_the_run_of_one(runs: Path, strategy: str) -> None:
    assert_same_run(runs / f"generator-{strategy}", runs / "generator-one")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_make_whole_matrices_orthogonal_as_one_does(runs: Path, strategy: str) -> None:
    """Weights may differ where a gradient is nothing but rounding: that direction becomes as long as any other."""
    one, other = loss_curve(runs / "muon-one"), loss_curve(runs / f"muon-{strategy}")
    assert len(one) == GENERATOR_STEPS
    assert other == pytest.approx(one, rel=1e-4)


def test_two_ranks_that_accumulate_gradients_are_the_run_of_one(runs: Path) -> None:
    """A bias that a norm takes away again has no gradient but rounding, which Adam blows up to a part of its rate."""
    assert_same_run(runs / "accumulated-ddp", runs / "accumulated-one", tolerance=2e-3)


def test_where_no_rank_adds_up_several_parts_the_bits_are_those_of_one_process(runs: Path) -> None:
    """Through k-means and the revival of codes, which would make much of the smallest difference."""
    assert_same_state(runs / "tokenizer-ddp", runs / "tokenizer-one")


@pytest.mark.parametrize("first", ["one", "ddp", "fsdp"])
@pytest.mark.parametrize("second", ["one", "ddp", "fsdp"])
def test_a_checkpoint_of_one_kind_is_resumed_by_another(runs: Path, first: str, second: str) -> None:
    if first != second:
        assert_same_run(runs / f"{first}-then-{second}", runs / "generator-one")


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        ("tokenizer-ddp", "tokenizer-parts"),
        ("adversarial-ddp", "adversarial-parts"),
        ("generator-fsdp", "generator-parts"),
    ],
)
def test_two_ranks_that_are_stopped_and_resumed_end_with_the_same_bits(runs: Path, whole: str, parts: str) -> None:
    assert_same_state(runs / whole, runs / parts)
    assert state_files(runs / whole).keys() == state_files(runs / parts).keys()
    assert loss_curve(runs / whole) == loss_curve(runs / parts)


def test_ranks_share_the_writing_of_a_checkpoint(runs: Path) -> None:
    """And nothing is written twice."""
    sizes = {}
    for kind in ("one", "ddp", "fsdp"):
        files = state_files(runs / f"generator-{kind}")
        del files["state.json"]
        sizes[kind] = [len(content) for content in files.values()]
        assert len(sizes[kind]) == (1 if kind == "one" else 2)
        assert sum(sizes[kind]) < 1.2 * sum(sizes["one"])
        assert max(sizes[kind]) < 1.2 * sum(sizes["one"]) / len(sizes[kind])


def test_the_main_rank_ships_what_one_process_would(runs: Path) -> None:
    one, *others = (
        read_safetensors(runs / f"generator-{kind}" / "model" / "transformer" / "model.safetensors", torch.float32)
        for kind in ("one", "ddp", "fsdp")
    )
    for other in others:
        assert other.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-3, msg=name)  # stored as bfloat16


@pytest.fixture(scope="module")
def disturbed(runs: Path) -> str:
    """What torchrun printed when one rank died, and later the whole got a signal."""
    process = python(RANKS, runs, "mortal", "endless", ranks=2, restarts=2)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if "under way" in line:
            break
    process.terminate()
    return "".join(lines) + finish(process)


def test_a_run_goes_on_by_itself_when_a_rank_dies(runs: Path, disturbed: str) -> None:
    assert "exitcode: -9" in disturbed, disturbed
    assert_same_state(runs / "mortal", runs / "tokenizer-ddp")
    assert loss_curve(runs / "mortal") == loss_curve(runs / "tokenizer-ddp")


def test_a_signal_to_torchrun_saves_and_stops_all_ranks(runs: Path, disturbed: str) -> None:
    step = saved_step(runs / "endless")
    assert step >= 3, disturbed
    assert all(f"rank {rank} stopped after step {step}" in disturbed for rank in range(2)), disturbed
    assert (runs / "endless" / "model" / "config.json").exists()
    assert not list((runs / "endless").glob(".*"))


def test_ranks_share_a_batch_equally_or_not_at_all() -> None:
    items = list(range(6))
    shares = [World(rank, 3).share(items) for rank in range(3)]
    assert shares == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="6 micro-batches can't be shared by 4 processes"):
        World(0, 4).share(items)
