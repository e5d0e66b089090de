"""Training: batches, rates, averages, and the loop with its stops, skipped steps and logs."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.batches import MicroBatch, batch_indices, micro_batches, step_seed
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, RunConfig, TokenizerLossConfig
from hartist.training.loop import Part, Stage, StepLoss, train
from hartist.training.optimizer import ExponentialAverage, build_optimizer, learning_rate
from hartist.training.parallel import World
from hartist.training.run_log import RunLog
from runs import assert_same_state, log_rows, loss_curve, saved_step, state_tensors, stop_after
from small import make_generator_stage, make_tokenizer_stage, run_config

# --------------------------------------------------------------------- batches, seeds, rates


@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 100))
def test_every_epoch_has_every_item_once_across_batch_boundaries(items: int, batch: int, seed: int) -> None:
    epochs = 3
    steps = math.ceil(epochs * items / batch)
    order = [i for step in range(steps) for i in batch_indices(items, batch, step, seed)]
    assert len(order) == steps * batch
    for epoch in range(epochs):
        assert sorted(order[epoch * items : (epoch + 1) * items]) == list(range(items))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(batch_indices(50, 50, epoch, seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_step_seeds_differ_between_steps_streams_and_runs() -> None:
    seeds = {step_seed(seed, step, stream) for seed in range(10) for step in range(500) for stream in range(4)}
    assert len(seeds) == 20_000
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.integers(0, 9), st.integers(0, 5))
def test_the_parts_of_a_batch_are_the_batch(count: int, size: int, items: int, step: int, first: int) -> None:
    parts = micro_batches(step + first, count * size, size, seed=3, first_step=first)
    assert [(part.index, part.size) for part in parts] == [(i, size) for i in range(count)]
    rows = [row for part in parts for row in part.rows(items)]
    (whole,) = micro_batches(step + first, count * size, 0, seed=3, first_step=first)
    assert rows == whole.rows(items)
    if first == 0:
        assert rows == batch_indices(items, count * size, step, seed=3)


def test_the_parts_of_a_batch_have_draws_of_their_own_and_some_in_common() -> None:
    parts = [part for step in range(2) for part in micro_batches(step, 6, 2, seed=0)]
    own, common = [], []
    for part in parts:
        part.seed_global_generator()
        own.append(float(torch.rand(())))
        common.append(float(torch.rand((), generator=part.generator(stream=2))))
    assert len(set(own)) == 6
    assert len(set(common[:3])) == len(set(common[3:])) == 1
    assert len(set(common)) == 2


def test_every_phase_goes_through_the_data_anew() -> None:
    phase = [row for step in (7, 8) for row in MicroBatch(step, 0, 1, 5, seed=0, first_step=7).rows(10)]
    assert sorted(phase) == list(range(10))
    assert phase != [row for step in (0, 1) for row in MicroBatch(step, 0, 1, 5, seed=0).rows(10)]


def test_batches_without_equal_parts_are_refused() -> None:
    with pytest.raises(UserError, match="a batch of 10 has no equal parts of 4 images"):
        RunConfig(batch_size=10, micro_batch=4)


def test_the_learning_rate_warms_up_and_falls_to_its_floor() -> None:
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=10, final_fraction=0.05)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[9] == pytest.approx(0.1)
    assert rates[10] == 0.1 == max(rates)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.005)
    assert rates[55] == pytest.approx((0.1 + 0.005) / 2)
    assert learning_rate(200, 100, config) == pytest.approx(0.005)
    assert learning_rate(3, 2, config) == pytest.approx(0.04)  # a run shorter than its warm-up


def test_a_constant_rate_stays_and_wsd_falls_along_a_line_in_the_last_fifth() -> None:
    constant = OptimizerConfig(learning_rate=0.1, warmup_steps=10, schedule="constant")
    assert {learning_rate(step, 110, constant) for step in range(10, 120)} == {0.1}
    wsd = OptimizerConfig(learning_rate=0.1, warmup_steps=10, schedule="wsd", final_fraction=0.2)
    rates = [learning_rate(step, 110, wsd) for step in range(111)]
    assert rates[:10] == [learning_rate(step, 110, constant) for step in range(10)]
    assert rates[10:91] == [pytest.approx(0.1)] * 81
    falls = [a - b for a, b in itertools.pairwise(rates[90:])]
    assert falls == [pytest.approx(0.08 / 20)] * 20
    assert rates[110] == pytest.approx(0.02)
    assert learning_rate(500, 110, wsd) == pytest.approx(0.02)


def test_weight_decay_acts_on_matrices_only() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(1, 2, 3))
    module[2].weight.requires_grad_(False)
    decayed, plain = build_optimizer(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,), (2,)]


def test_the_average_follows_quickly_at_first_and_can_be_swapped_in() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    average = ExponentialAverage(module, decay=0.9)
    assert average.shadow.keys() == {"weight"}  # what isn't trained has no average
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    average.update(module, step=0)
    torch.testing.assert_close(average.shadow["weight"], start + 0.9)  # decay 1/10 in the first step
    before = module.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), average.swapped_into(module):  # noqa: PT012
        assert torch.equal(module.weight, average.shadow["weight"])
        assert not module.training
        raise ZeroDivisionError
    assert torch.equal(module.weight, before)
    assert module.training
    shadow = average.shadow["weight"].clone()
    average.update(module, step=10_000)
    torch.testing.assert_close(average.shadow["weight"], 0.9 * shadow + 0.1 * before)


# --------------------------------------------------------------------- stopping and resuming

REVIVING = TokenizerLossConfig(continuous_steps=2, revive_every=3)


def train_tokenizer(run_dir: Path, steps: int, losses: TokenizerLossConfig = REVIVING, stop: int | None = None) -> int:
    run = run_config(steps)
    stage = make_tokenizer_stage(run, losses)
    if stop is not None:
        stop_after(stage, stop)
    return train(stage, run, run_dir, progress=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of the tokenizer in one go."""
    run_dir = tmp_path_factory.mktemp("uninterrupted")
    assert train_tokenizer(run_dir, 8) == 8
    return run_dir


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 6])
def test_a_tokenizer_interrupted_anywhere_ends_up_the_same(uninterrupted: Path, tmp_path: Path, stop: int) -> None:
    """Also within the window over which dead codes are counted, and around the codebook's initialisation."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert train_tokenizer(tmp_path, 8, stop=stop) == stop + 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert (tmp_path / "tokenizer" / "model.safetensors").exists()
    assert saved_step(tmp_path) == stop + 1
    assert train_tokenizer(tmp_path, 8) == 8
    assert_same_state(tmp_path, uninterrupted)
    ours, theirs = (read_safetensors(path / "tokenizer" / "model.safetensors") for path in (tmp_path, uninterrupted))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [row["step"] for row in log_rows(tmp_path)] == [row["step"] for row in log_rows(uninterrupted)]
    assert loss_curve(tmp_path) == loss_curve(uninterrupted)


def test_a_finished_run_is_left_alone(uninterrupted: Path) -> None:
    state = uninterrupted / "checkpoint" / "state.json"
    before = state.stat().st_mtime_ns
    assert train_tokenizer(uninterrupted, 8) == 8
    assert state.stat().st_mtime_ns == before


def test_an_adversarial_run_resumes_with_both_networks(tmp_path: Path) -> None:
    adversary = AdversarialConfig(channels=4, layers=2, start=0.25, ramp=0.5)
    losses = TokenizerLossConfig(adversarial=0.5, adversary=adversary, revive_every=0)
    train_tokenizer(tmp_path / "whole", 4, losses)
    assert train_tokenizer(tmp_path / "parts", 4, losses, stop=1) == 2
    train_tokenizer(tmp_path / "parts", 4, losses)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    rows = {row["step"]: row for row in log_rows(tmp_path / "whole") if "loss" in row}
    assert "discriminator" not in rows[1]  # joins in after a quarter of the run
    assert all(math.isfinite(rows[step][key]) for step in (2, 3, 4) for key in ("discriminator", "adversarial"))
    tensors = state_tensors(tmp_path / "whole")
    moments = [name for name in tensors if name.startswith("optimizer.discriminator")]
    assert len(moments) == 3 * len([name for name in tensors if name.startswith("average.discriminator")]) > 0
    assert int(tensors["optimizer.discriminator.discriminator.stem.weight.step"]) == 3


@pytest.mark.parametrize("coarse_share", [0.0, 0.7])
def test_an_interrupted_generator_ends_up_the_same(tmp_path: Path, coarse_share: float) -> None:
    """Also where the first steps give some weights no gradient, and so no moments."""
    run, losses = run_config(4), GeneratorLossConfig(coarse_share=coarse_share, coarse_until=0.75)

    def go(name: str, stop: int | None = None) -> int:
        stage = make_generator_stage(run, tmp_path, losses)
        if stop is not None:
            stop_after(stage, stop, signal.SIGINT)
        return train(stage, run, tmp_path / name, progress=False)

    assert go("whole") == 4
    assert go("parts", stop=1) == 2
    assert go("parts") == 4
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole" / "pictures" / "samples_0000004.png").exists()


def test_a_torn_last_line_of_the_log_does_not_stop_a_resumption(uninterrupted: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, 8, stop=4)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 6, "loss": 0.1}\n{"step": 7, "lo')
    train_tokenizer(tmp_path, 8)
    assert loss_curve(tmp_path) == loss_curve(uninterrupted)
    assert [row["step"] for row in log_rows(tmp_path)] == [row["step"] for row in log_rows(uninterrupted)]


def test_changed_settings_are_not_resumed_but_reports_and_saves_may_come_more_often(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, 2)
    with pytest.raises(UserError, match=r"another run\.steps \(2, not 3\)"):
        train_tokenizer(tmp_path, 3)
    with pytest.raises(UserError, match=r"another losses\.l1"):
        train_tokenizer(tmp_path, 2, TokenizerLossConfig(l1=2.0, continuous_steps=2, revive_every=3))
    run = run_config(2, log_every=2, picture_every=1, checkpoint_seconds=0.0)
    assert train(make_tokenizer_stage(run, REVIVING), run, tmp_path, progress=False) == 2


# --------------------------------------------------------------------- steps


class Explosive:
    """A stage whose loss is not a number in some steps."""

    gathered: Mapping[str, Tensor] = {}
    position = None

    def __init__(self, bad_steps: range = range(0)) -> None:
        torch.manual_seed(0)
        self.module, self.bad = nn.Linear(1, 1), bad_steps
        self.identity: dict[str, Any] = {}
        self.seen: list[float] = []

    @property
    def parts(self) -> list[Part]:
        return [Part("net", self.module, self.loss)]

    def loss(self, micro: MicroBatch) -> StepLoss:
        bad = math.nan if micro.step in self.bad else 1
        loss = self.module(torch.ones(1, 1)).square().sum() * bad
        return StepLoss(loss, {"loss": loss.item()})

    def batch_at(self, step: int) -> tuple[int, int]:
        return 4, 0

    def flops(self, step: int) -> float:
        return 100.0

    def seek(self, position: Any) -> None:
        pass

    def after_step(self, step: int) -> dict[str, float]:
        self.seen.append(self.module.weight.item())
        return {}

    def pictures(self, networks: Mapping[str, nn.Module], directory: Path, step: int) -> dict[str, float]:
        return {}

    def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
        pass


def test_steps_without_finite_gradients_are_skipped_and_too_many_stop_the_run(tmp_path: Path) -> None:
    stage = Explosive(range(2, 5))
    assert isinstance(stage, Stage)
    assert train(stage, run_config(7), tmp_path / "few", progress=False, max_skipped=3) == 7
    assert stage.seen[1] == stage.seen[2] == stage.seen[4] != stage.seen[5]
    assert all(math.isfinite(weight) for weight in stage.seen)
    rows = {row["step"]: row for row in log_rows(tmp_path / "few")}
    assert [rows[step]["net_skipped"] for step in range(1, 8)] == [0, 0, 1, 1, 1, 0, 0]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert "loss" in rows[2]
    assert "loss" not in rows[3]
    tensors = state_tensors(tmp_path / "few")
    assert int(tensors["optimizer.net.weight.step"]) == 4

    run = run_config(7, checkpoint_seconds=0.0)
    with pytest.raises(UserError, match="net: 4 steps in a row") as error:
        train(Explosive(range(2, 7)), run, tmp_path / "many", progress=False, max_skipped=3)
    assert "\n" not in str(error.value)
    assert saved_step(tmp_path / "many") == 5
    # the cause found, the run goes on from the last good state
    again = Explosive()
    assert train(again, run, tmp_path / "many", progress=False, max_skipped=3) == 7
    assert len(again.seen) == 2
    assert again.seen[0] != stage.seen[1]


def test_a_skipped_step_changes_neither_weights_nor_averages_nor_moments(tmp_path: Path) -> None:
    """Of the tokenizer, with revival of dead codes due in the bad step."""

    def state_after(steps: int, bad: bool) -> dict[str, Tensor]:
        run = run_config(4)
        stage = make_tokenizer_stage(run, TokenizerLossConfig(revive_every=2))
        stop_after(stage, steps - 1)
        plain = stage._images

        def images(micro: MicroBatch) -> Tensor:
            return plain(micro) * (math.nan if bad and micro.step == 1 else 1)

        stage._images = images  # type: ignore[method-assign]
        name = f"{steps}{bad}"
        assert train(stage, run, tmp_path / name, progress=False) == steps
        return {k: v for k, v in state_tensors(tmp_path / name).items() if k != "gathered.hits"}

    before, after = state_after(1, bad=False), state_after(2, bad=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_one_healthy_network_does_not_hide_another_that_gets_no_gradients(tmp_path: Path) -> None:
    class Pair(Explosive):
        @property
        def parts(self) -> list[Part]:
            healthy = nn.Linear(1, 1)
            return [
                *super().parts,
                Part("healthy", healthy, lambda _: StepLoss(healthy(torch.ones(1, 1)).sum(), {})),
            ]

    with pytest.raises(UserError, match="net: 4 steps in a row"):
        train(Pair(range(9)), run_config(9), tmp_path, progress=False, max_skipped=3)


def test_gradients_of_the_parts_of_a_batch_are_averaged_and_clipped_once(tmp_path: Path) -> None:
    """Against the mean gradient of the same parts, by hand."""
    run = run_config(1, micro_batch=2, optimizer=OptimizerConfig(warmup_steps=0, clip_norm=0.1, weight_decay=0.0))
    stage = make_tokenizer_stage(run, TokenizerLossConfig(revive_every=0))
    by_hand = make_tokenizer_stage(run, TokenizerLossConfig(revive_every=0))
    parameters = list(by_hand.tokenizer.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    losses = []
    for micro in micro_batches(0, 4, 2, run.seed):
        micro.seed_global_generator()
        loss = by_hand.tokenizer_loss(micro).loss
        losses.append(loss.item())
        for total, grad in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
            total += grad / 2
    for p, total in zip(parameters, sums, strict=True):
        p.grad = total
    norm = nn.utils.clip_grad_norm_(parameters, 0.1)
    build_optimizer(by_hand.tokenizer, run.optimizer).step()

    train(stage, run, tmp_path, progress=False)
    row = log_rows(tmp_path)[0]
    assert row["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert row["tokenizer_grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for ours, theirs in zip(stage.tokenizer.parameters(), parameters, strict=True):
        # Adam's first step is the rate times the gradient's sign, if that isn't rounding
        large = theirs.grad.abs() > 1e-6  # type: ignore[union-attr]
        torch.testing.assert_close(ours[large], theirs[large], rtol=1e-4, atol=1e-6)


def test_pictures_and_exports_show_the_averaged_weights_and_training_goes_on_with_its_own(tmp_path: Path) -> None:
    class Watcher(Explosive):
        def pictures(self, networks: Mapping[str, nn.Module], directory: Path, step: int) -> dict[str, float]:
            assert not networks["net"].training
            assert not torch.is_grad_enabled()
            return {"average": networks["net"].weight.item()}  # type: ignore[union-attr, operator]

        def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
            self.exported = networks["net"].weight.item()  # type: ignore[union-attr, operator]

    stage = Watcher()
    train(stage, run_config(6, picture_every=3), tmp_path, progress=False)
    shown = {row["step"]: row["average"] for row in log_rows(tmp_path) if "average" in row}
    assert shown.keys() == {3, 6}
    average = state_tensors(tmp_path)["average.net.weight"].item()
    assert shown[6] == pytest.approx(average, rel=1e-4)
    assert stage.exported == average != stage.module.weight.item() == stage.seen[-1]


@pytest.mark.parametrize("last", ["state", "result"])
def test_a_crash_between_checkpoint_and_result_does_not_leave_a_finished_run_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    class PowerCut(BaseException):
        pass

    class Exporting(Explosive):
        def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
            (directory / "result").write_text("here")

    def fail(*_: Any, **__: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        if last == "state":
            patch.setattr("hartist.training.loop.save_state", fail)
        else:
            patch.setattr(Exporting, "export", fail)
        with pytest.raises(PowerCut):
            train(Exporting(), run_config(2), tmp_path, progress=False)
    assert train(Exporting(), run_config(2), tmp_path, progress=False) == 2
    assert (tmp_path / "result").exists()
    assert saved_step(tmp_path) == 2


# --------------------------------------------------------------------- the log


def make_log(run_dir: Path, start: int = 0) -> RunLog:
    return RunLog(run_dir, start, World())


def test_a_line_is_the_mean_of_the_steps_since_the_one_before(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.add({"loss": 1.0, "l1_hybrid": 3.0}, images=4, flops=100.0)
    log.add({"loss": 2.0}, images=4, flops=100.0)
    first = log.write_means(2, rate=0.5, peak_flops=1000.0)
    log.add({"loss": 5.0}, images=4, flops=100.0)
    log.write_means(3, rate=0.25, peak_flops=0.0)
    log.write(3, {"validation": 1 / 3})
    log.close()
    rows = log_rows(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 3]
    assert (rows[0]["loss"], rows[0]["l1_hybrid"], rows[0]["rate"]) == (1.5, 3.0, 0.5)
    assert (rows[1]["loss"], rows[1]["rate"], rows[2]["validation"]) == (5.0, 0.25, 0.333333)
    assert "l1_hybrid" not in rows[1]
    assert "mfu" not in rows[1]  # the machine's peak isn't known
    # 8 images and 200 operations in the same time, on a machine that does 1000 a second
    assert first["mfu"] == pytest.approx(first["images_per_second"] / 8 * 200 / 1000)
    assert rows[0]["mfu"] == pytest.approx(first["mfu"], rel=1e-5)


def test_pauses_do_not_count_as_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("hartist.training.run_log.time.monotonic", lambda: clock[0])
    log = make_log(tmp_path)
    clock[0] = 2.0
    log.pause()
    clock[0] = 100.0
    log.go_on()
    clock[0] = 103.0
    log.add({}, images=10, flops=50.0)
    assert log.write_means(1, 0.1, peak_flops=100.0)["images_per_second"] == pytest.approx(10 / 5)
    clock[0] = 104.0
    log.add({}, images=10, flops=50.0)
    figures = log.write_means(2, 0.1, peak_flops=100.0)
    assert figures["images_per_second"] == pytest.approx(10)
    assert figures["mfu"] == pytest.approx(0.5)
    log.close()


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "lo')
    make_log(tmp_path, start=4).close()
    assert [row["step"] for row in log_rows(tmp_path)] == [2, 4]


def test_only_the_main_rank_writes(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, World(rank=1, size=1))
    log.add({"loss": 1.0}, 1, 1.0)
    assert log.write_means(1, 0.1, 0.0)["loss"] == 1.0
    log.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_on_a_full_disk_is_named(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  (closed with the log)
    with pytest.raises(UserError, match=r"cannot write /dev/full \(No space left.*free some space") as error:
        log.write(1, {"loss": 1.0})
    assert "\n" not in str(error.value)
    log.close()


def test_a_run_logs_its_speed_and_its_share_of_the_peak(uninterrupted: Path) -> None:
    rows = [row for row in log_rows(uninterrupted) if "loss" in row]
    assert len(rows) == 8
    assert all(row["images_per_second"] > 0 and 0 < row["mfu"] < 1 for row in rows)
    assert list((uninterrupted / "tensorboard").iterdir())
