"""The resumable state: what is saved comes back, and damage of any kind is named and leaves the last good one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hartist.errors import UserError
from hartist.training.config import OptimizerConfig, TokenizerLossConfig
from hartist.training.loop import train
from hartist.training.optimizer import ExponentialAverage, build_optimizer
from hartist.training.state import load_state, save_state
from runs import assert_same_state, finish, loss_curve, python, saved_step
from small import make_tokenizer_stage, normal, run_config

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def small_part(seed: int = 0, channels_last: bool = False, kind: Any = "adamw") -> dict[str, tuple]:
    torch.manual_seed(seed)
    module: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(module, OptimizerConfig(kind=kind))
    return {"net": (module, optimizer, ExponentialAverage(module, 0.9))}


def take_steps(parts: dict[str, tuple], count: int) -> None:
    module, optimizer, average = parts["net"]
    for step in range(count):
        optimizer.zero_grad()
        module(normal(2, 3, 8, 8, seed=step)).square().mean().backward()
        optimizer.step()
        average.update(module, step)


def all_tensors(parts: dict[str, tuple]) -> list[Tensor]:
    module, optimizer, average = parts["net"]
    moments = [value for p in module.parameters() for _, value in sorted(optimizer.state[p].items())]
    return [*(p.detach() for p in module.parameters()), *moments, *average.shadow.values()]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_state_goes_on_like_the_one_that_was_saved(tmp_path: Path, channels_last: bool, kind: str) -> None:
    parts, hits = small_part(0, channels_last, kind), torch.arange(6).view(2, 3)
    take_steps(parts, 3)
    save_state(tmp_path / "state", 3, parts, {"run": {"a": 1}}, {"hits": hits}, position={"row": 7})
    other, restored = small_part(1, channels_last, kind), torch.zeros_like(hits)
    found = load_state(tmp_path / "state", other, {"run": {"a": 1}}, {"hits": restored})
    assert found == (3, {"row": 7})
    assert torch.equal(restored, hits)
    take_steps(parts, 2)
    take_steps(other, 2)
    for a, b in zip(all_tensors(parts), all_tensors(other), strict=True):
        assert torch.equal(a, b)


def test_without_a_state_training_starts_at_zero(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nothing", small_part(), {}) == (0, None)


def test_the_position_of_another_number_of_ranks_is_left_out(tmp_path: Path) -> None:
    save_state(tmp_path / "state", 3, small_part(), {}, position=5)
    meta = json.loads((tmp_path / "state" / "state.json").read_text())
    assert meta["positions"] == [5]
    (tmp_path / "state" / "state.json").write_text(json.dumps(meta | {"positions": [5, 6]}))
    assert load_state(tmp_path / "state", small_part(), {}) == (3, None)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def forget(prefix: str) -> Callable[[Path], None]:
    """Remove the first tensor with such a name."""
    return lambda path: rewrite(path, lambda tensors: tensors.pop(min(n for n in tensors if n.startswith(prefix))))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "half the weights": (SHARD, truncate),
    "no weights": (SHARD, Path.unlink),
    "garbage for weights": (SHARD, lambda path: path.write_bytes(b"garbage")),
    "a weight missing": (SHARD, forget("weights.")),
    "an average missing": (SHARD, forget("average.")),
    "a moment missing": (SHARD, forget("optimizer.")),
    "a tensor of another shape": (
        SHARD,
        lambda path: rewrite(path, lambda tensors: tensors.update({"weights.net.0.bias": torch.zeros(7)})),
    ),
    "half the settings": ("state.json", truncate),
    "settings that are no object": ("state.json", lambda path: path.write_text("[]")),
    "no step": ("state.json", lambda path: path.write_text('{"run": 1}')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "state"
    parts = small_part()
    take_steps(parts, 1)
    save_state(directory, 1, parts, {"run": 1})
    assert {path.name for path in directory.iterdir()} == {SHARD, "state.json"}
    name, inflict = DAMAGE[damage]
    inflict(directory / name)
    with pytest.raises(UserError, match=str(directory)) as error:
        load_state(directory, small_part(), {"run": 1})
    assert "\n" not in str(error.value)
    assert "delete the folder" in str(error.value) or "write it again" in str(error.value)


def test_a_state_in_many_shards_is_read_and_a_lost_one_is_noticed(tmp_path: Path) -> None:
    """As three ranks would have written it, each a third of the rows."""
    directory, parts = tmp_path / "state", small_part()
    take_steps(parts, 1)
    save_state(directory, 1, parts, {})
    whole = load_file(directory / SHARD)
    (directory / SHARD).unlink()
    for rank in range(3):
        tensors, offsets = {}, {}
        for name, tensor in whole.items():
            rows = tensor.tensor_split(3) if tensor.ndim else (tensor, tensor[None][:0], tensor[None][:0])
            if not rows[rank].numel():
                continue
            start = sum(len(part) for part in rows[:rank]) if tensor.ndim else 0
            tensors[name] = rows[rank].contiguous()
            offsets[name] = {"saved_offsets": [start, *[0] * (tensor.ndim - 1)][: tensor.ndim]}
        metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        save_file(tensors, directory / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors", metadata)
    other = small_part(1)
    assert load_state(directory, other, {}) == (1, None)
    for a, b in zip(all_tensors(parts), all_tensors(other), strict=True):
        assert torch.equal(a, b)
    for lost in sorted(directory.glob("shard-*")):
        moved = lost.rename(tmp_path / lost.name)
        with pytest.raises(UserError, match="is damaged") as error:
            load_state(directory, small_part(), {})
        if "shard-00002" in lost.name:  # between two others: the shapes alone would not tell
            assert "with a part missing" in str(error.value)
        moved.rename(lost)


def test_a_state_of_other_settings_is_refused_and_the_setting_named(tmp_path: Path) -> None:
    save_state(tmp_path / "state", 1, small_part(), {"data": "a", "run": {"steps": 3, "more": {"x": 1}}})
    for info, named in (
        ({"data": "a", "run": {"steps": 4, "more": {"x": 1}}}, r"another run\.steps \(3, not 4\)"),
        ({"data": "a", "run": {"steps": 3, "more": {"x": 2}}}, r"another run\.more\.x \(1, not 2\)"),
        ({"data": "b", "run": {"steps": 3, "more": {"x": 1}}}, r"another data \(a, not b\)"),
    ):
        with pytest.raises(UserError, match=named):
            load_state(tmp_path / "state", small_part(), info)


def test_a_crash_between_the_two_renames_of_a_save_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, parts = tmp_path / "state", small_part()
    take_steps(parts, 1)
    save_state(directory, 1, parts, {})
    renamed: list[str] = []
    plain = os.replace

    class PowerCut(BaseException):
        pass

    def replace(source: Any, target: Any) -> None:
        renamed.append(str(target))
        if Path(target) == directory:
            raise PowerCut
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        # nothing runs after a power cut, so neither does any tidying up
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(PowerCut):
            save_state(directory, 2, parts, {})
    assert str(directory) in renamed
    assert load_state(directory, small_part(1), {})[0] in (1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]  # what the crash left is gone


SMALL_DISK = """
import resource, sys
from pathlib import Path
from hartist.cli import main
from hartist.training import run
from hartist.training.config import TokenizerLossConfig
from hartist.training.loop import train
from runs import stop_after
from small import make_tokenizer_stage, run_config

def tiny(data, out, recipe, **options):
    config = run_config(6, checkpoint_seconds=0.0)
    stage = make_tokenizer_stage(config, TokenizerLossConfig(revive_every=0))
    plain = stage.after_step
    def after_step(step):
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
        return plain(step)
    stage.after_step = after_step
    return train(stage, config, out, progress=False)

run.train_tokenizer = tiny
sys.exit(main(["train", "tokenizer", "--data", "none", "--out", sys.argv[1], "-q"]))
"""


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    """Of files that can't grow as large as the checkpoint is, from the fourth step on."""
    process = python("-c", SMALL_DISK, tmp_path / "run", 100_000)
    output = finish(process)
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("hartist: error:")]
    assert "cannot write" in line
    assert "free some space and run it again" in line
    assert "Traceback" not in output
    assert saved_step(tmp_path / "run") == 3
    assert not list((tmp_path / "run").glob(".checkpoint*"))

    losses = TokenizerLossConfig(revive_every=0)
    for name in ("run", "whole"):
        run = run_config(6)
        assert train(make_tokenizer_stage(run, losses), run, tmp_path / name, progress=False) == 6
    assert_same_state(tmp_path / "run", tmp_path / "whole")
    assert loss_curve(tmp_path / "run") == loss_curve(tmp_path / "whole")


def test_a_damaged_checkpoint_stops_a_run_before_it_changes_anything(tmp_path: Path) -> None:
    run = run_config(2)
    train(make_tokenizer_stage(run), run, tmp_path / "run", progress=False)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    truncate(tmp_path / "run" / "checkpoint" / SHARD)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is damaged"):
        train(make_tokenizer_stage(run), run, tmp_path / "run", progress=False)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
