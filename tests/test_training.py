"""Training: the loop and its resumption, both stages, and the arithmetic around them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hartist.checkpoint import read_safetensors
from hartist.config import ResidualConfig
from hartist.errors import UserError
from hartist.files import recover_directory
from hartist.generation.checkpoint import LoadedModel, load_transformer
from hartist.pixels import from_uint8, to_uint8
from hartist.residual.loss import diffusion_loss
from hartist.text.encoder import TextContext, TextEncoder, unconditional_context
from hartist.tokenizer.checkpoint import load_tokenizer
from hartist.tokenizer.residual_loop import nearest_codes
from hartist.training.codebook import kmeans, revive_dead_codes, scale_vectors
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, TokenizerLossConfig
from hartist.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from hartist.training.generator_stage import drop_condition, residual_scale
from hartist.training.loop import Part, StepLoss, batch_indices, step_seed, train
from hartist.training.optimizer import ExponentialAverage, build_optimizer, learning_rate, restore
from hartist.training.perceptual import random_crops
from hartist.training.state import load_state, save_state
from hartist.training.subsampling import drop_ratio, kept_count, kept_positions
from hartist.training.token_cache import build_token_cache
from hartist.transformer.model import Condition, TeacherForced
from small import (
    TOKENS,
    WordEncoder,
    image_set,
    make_generator_stage,
    make_tokenizer_stage,
    normal,
    pictures,
    random_context,
    random_quantizer,
    random_tokenizer,
    randomise,
    run_config,
)


def weights(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of a run's resumable state: weights, averages, moments."""
    return load_file(run_dir / "checkpoint" / "state.safetensors")


def assert_same_state(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    different = [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
    assert not different


def log_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def stop_after(stage: Any, step: int, number: int = signal.SIGTERM) -> None:
    """Have the process get a signal during step `step`, as when a machine is taken back."""
    plain = stage.after_step

    def after_step(now: int) -> None:
        plain(now)
        if now == step:
            os.kill(os.getpid(), number)

    stage.after_step = after_step


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


def test_weight_decay_acts_on_matrices_only() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv2d(1, 2, 3))
    module[2].weight.requires_grad_(False)
    decayed, plain = build_optimizer(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert [p.shape for p in decayed["params"]] == [(4, 3)]
    assert [p.shape for p in plain["params"]] == [(4,), (4,), (4,), (2,)]


def test_the_average_follows_quickly_at_first_and_can_be_swapped_in_and_out() -> None:
    module = nn.Linear(2, 2)
    average = ExponentialAverage(module, decay=0.9)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    average.update(module, step=0)
    torch.testing.assert_close(average.shadow["weight"], start + 0.9)  # decay 1/10 in the first step
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    saved = average.swap_into(module)
    assert torch.equal(module.weight, average.shadow["weight"])
    restore(module, saved)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    shadow = average.shadow["weight"].clone()
    average.update(module, step=10_000)
    torch.testing.assert_close(average.shadow["weight"], 0.9 * shadow + 0.1 * before["weight"])


# --------------------------------------------------------------------- state


def small_part(seed: int = 0, channels_last: bool = False) -> dict[str, tuple]:
    torch.manual_seed(seed)
    module: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    if channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(module, OptimizerConfig())
    return {"net": (module, optimizer, ExponentialAverage(module, 0.9))}


def take_steps(parts: dict[str, tuple], count: int) -> None:
    module, optimizer, average = parts["net"]
    for step in range(count):
        optimizer.zero_grad()
        module(normal(2, 3, 8, 8, seed=step)).square().mean().backward()
        optimizer.step()
        average.update(module, step)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_state_goes_on_like_the_one_that_was_saved(tmp_path: Path, channels_last: bool) -> None:
    parts = small_part(0, channels_last)
    take_steps(parts, 3)
    save_state(tmp_path / "state", 3, parts, {"run": {"a": 1}})
    other = small_part(1, channels_last)
    assert load_state(tmp_path / "state", other, {"run": {"a": 1}}) == 3
    take_steps(parts, 2)
    take_steps(other, 2)
    for a, b in zip(parts["net"][0].parameters(), other["net"][0].parameters(), strict=True):
        assert torch.equal(a, b)
    for name, shadow in parts["net"][2].shadow.items():
        assert torch.equal(shadow, other["net"][2].shadow[name])


def test_without_a_state_training_starts_at_zero(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nothing", small_part(), {}) == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)


def reshape_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["weights.net.0.bias"] = torch.zeros(7)
    save_file(tensors, path)


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "half the weights": ("state.safetensors", truncate),
    "no weights": ("state.safetensors", Path.unlink),
    "garbage for weights": ("state.safetensors", lambda path: path.write_bytes(b"garbage")),
    "a tensor missing": ("state.safetensors", drop_a_tensor),
    "a tensor of another shape": ("state.safetensors", reshape_a_tensor),
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
    name, inflict = DAMAGE[damage]
    inflict(directory / name)
    with pytest.raises(UserError, match=r"state\.(safetensors|json)") as error:
        load_state(directory, small_part(), {"run": 1})
    assert "\n" not in str(error.value)


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", 1, small_part(), {"data": "a", "run": {"steps": 3}})
    with pytest.raises(UserError, match="another run"):
        load_state(tmp_path / "state", small_part(), {"data": "a", "run": {"steps": 4}})
    with pytest.raises(UserError, match="another data"):
        load_state(tmp_path / "state", small_part(), {"data": "b", "run": {"steps": 3}})


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
        if len(renamed) > 2 or (Path(target) == directory):
            raise PowerCut
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        # nothing runs after a power cut, so neither does any tidying up
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(PowerCut):
            save_state(directory, 2, parts, {})
    assert load_state(directory, small_part(1), {}) in (1, 2)


# --------------------------------------------------------------------- the loop

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
    assert train_tokenizer(tmp_path, 8) == 8
    assert_same_state(tmp_path, uninterrupted)
    ours, theirs = (read_safetensors(path / "tokenizer" / "model.safetensors") for path in (tmp_path, uninterrupted))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [row["step"] for row in log_rows(tmp_path)] == [row["step"] for row in log_rows(uninterrupted)]


def test_a_finished_run_is_left_alone(uninterrupted: Path) -> None:
    state = uninterrupted / "checkpoint" / "state.safetensors"
    before = state.stat().st_mtime_ns
    assert train_tokenizer(uninterrupted, 8) == 8
    assert state.stat().st_mtime_ns == before


def test_an_adversarial_run_resumes_with_both_networks(tmp_path: Path) -> None:
    losses = TokenizerLossConfig(adversarial=0.5, adversarial_start=0.25, revive_every=0)
    train_tokenizer(tmp_path / "whole", 4, losses)
    assert train_tokenizer(tmp_path / "parts", 4, losses, stop=1) == 2
    train_tokenizer(tmp_path / "parts", 4, losses)
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    rows = {row["step"]: row for row in log_rows(tmp_path / "whole") if "loss" in row}
    assert "discriminator" not in rows[1]  # joins in after a quarter of the run
    assert all(math.isfinite(rows[step][key]) for step in (2, 3, 4) for key in ("discriminator", "adversarial"))
    moments = [name for name in weights(tmp_path / "whole") if name.startswith("optimizer.discriminator")]
    assert len(moments) == 3 * len(list(PatchDiscriminator().parameters()))


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


def test_a_killed_process_resumes_to_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 during the fifth step, or while the files after the fourth are being written."""
    script = (
        "import sys, time, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from small import make_tokenizer_stage, run_config\n"
        "from hartist.training.config import TokenizerLossConfig\n"
        "from hartist.training.loop import train\n"
        "run = run_config(8)\n"
        "stage = make_tokenizer_stage(run, TokenizerLossConfig(continuous_steps=2, revive_every=3))\n"
        "batch = stage.batch\n"
        "stage.batch = lambda step: (time.sleep(600 if step > 3 else 0), batch(step))[1]\n"
        "object.__setattr__(run, 'checkpoint_seconds', 0)\n"
        "train(stage, run, Path(sys.argv[1]), progress=False)\n"
    )
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "src")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=environment)
    state = tmp_path / "checkpoint" / "state.json"

    def finished_steps() -> int:
        try:
            return json.loads(state.read_text())["step"]
        except FileNotFoundError:  # not yet, or just being replaced
            return 0

    try:
        until = time.monotonic() + 300
        while process.poll() is None and finished_steps() < 4 and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    recover_directory(state.parent)
    assert finished_steps() == 4
    # how often to save is part of a run's identity, and was only changed to be quick here
    meta = json.loads(state.read_text())
    meta["run"]["checkpoint_seconds"] = 1e9
    state.write_text(json.dumps(meta))
    assert train_tokenizer(tmp_path, 8) == 8
    assert_same_state(tmp_path, uninterrupted)


def test_a_torn_last_line_of_the_log_does_not_stop_a_resumption(uninterrupted: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path, 8, stop=4)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 6, "loss": 0.1}\n{"step": 7, "lo')
    train_tokenizer(tmp_path, 8)
    assert [row["step"] for row in log_rows(tmp_path)] == [row["step"] for row in log_rows(uninterrupted)]


def test_changed_settings_are_not_resumed(tmp_path: Path) -> None:
    train_tokenizer(tmp_path, 2)
    with pytest.raises(UserError, match="another run"):
        train_tokenizer(tmp_path, 3)
    with pytest.raises(UserError, match="another losses"):
        train_tokenizer(tmp_path, 2, TokenizerLossConfig(l1=2.0))


class Explosive:
    """A stage whose loss is not a number in some steps."""

    def __init__(self, bad_steps: range) -> None:
        self.module, self.bad = nn.Linear(1, 1), bad_steps
        self.identity: dict[str, Any] = {}
        self.gathered: dict[str, Tensor] = {}
        self.seen: list[float] = []

    @property
    def parts(self) -> list[Part]:
        return [Part("net", self.module, self.loss)]

    def loss(self, step: int) -> StepLoss:
        loss = self.module(torch.ones(1, 1)).square().sum() * (math.nan if step in self.bad else 1)
        return StepLoss(loss, {"loss": loss.item()})

    def after_step(self, step: int) -> None:
        self.seen.append(self.module.weight.item())

    def pictures(self, directory: Path, step: int) -> dict[str, float]:
        return {}

    def export(self, directory: Path) -> None:
        pass


def test_steps_without_finite_gradients_are_skipped_and_too_many_stop_the_run(tmp_path: Path) -> None:
    stage = Explosive(range(2, 5))
    assert train(stage, run_config(7), tmp_path / "few", progress=False, max_skipped=3) == 7
    assert stage.seen[1] == stage.seen[2] == stage.seen[4] != stage.seen[5]
    assert all(math.isfinite(weight) for weight in stage.seen)
    with pytest.raises(UserError, match="4 steps in a row"):
        train(Explosive(range(2, 7)), run_config(7), tmp_path / "many", progress=False, max_skipped=3)


def test_one_healthy_network_does_not_hide_another_that_gets_no_gradients(tmp_path: Path) -> None:
    class Pair(Explosive):
        @property
        def parts(self) -> list[Part]:
            healthy = nn.Linear(1, 1)
            return [
                *super().parts,
                Part("healthy", healthy, lambda _: StepLoss(healthy(torch.ones(1, 1)).sum(), {})),
            ]

    with pytest.raises(UserError, match="4 steps in a row"):
        train(Pair(range(9)), run_config(9), tmp_path, progress=False, max_skipped=3)


def test_pictures_and_exports_show_the_averaged_weights_and_training_goes_on_with_its_own(
    tmp_path: Path,
) -> None:
    class Watcher(Explosive):
        def pictures(self, directory: Path, step: int) -> dict[str, float]:
            assert not self.module.training
            assert not torch.is_grad_enabled()
            return {"average": self.module.weight.item()}

        def export(self, directory: Path) -> None:
            self.exported = self.module.weight.item()

    stage = Watcher(range(0))
    train(stage, run_config(6, picture_every=3), tmp_path, progress=False)
    shown = {row["step"]: row["average"] for row in log_rows(tmp_path) if "average" in row}
    assert shown.keys() == {3, 6}
    average = weights(tmp_path)["average.net.weight"].item()
    assert shown[6] == pytest.approx(average, rel=1e-4)
    assert stage.exported == average != stage.module.weight.item() == stage.seen[-1]


# --------------------------------------------------------------------- tokenizer stage


def test_training_a_tokenizer_reduces_its_loss(tmp_path: Path) -> None:
    losses = TokenizerLossConfig(continuous_steps=5, revive_every=10)
    run = dataclasses.replace(run_config(40, batch_size=8), picture_every=40)
    stage = make_tokenizer_stage(run, losses)
    train(stage, run, tmp_path, progress=False)
    rows = [row for row in log_rows(tmp_path) if "loss" in row]

    def mean(key: str, part: list[dict]) -> float:
        values = [row[key] for row in part if key in row]
        return sum(values) / len(values)

    assert mean("loss", rows[-8:]) < 0.6 * mean("loss", rows[5:10])
    # the coin: both paths were trained
    assert all(sum(f"l1_{path}" in row for row in rows) >= 10 for path in ("discrete", "hybrid"))
    assert sum("l1_continuous" in row for row in rows) == 5
    figures = log_rows(tmp_path)[-1]
    assert figures["validation_psnr_hybrid"] > 8
    assert (tmp_path / "pictures" / "reconstruction_0000040.png").exists()
    loaded = load_tokenizer(tmp_path / "tokenizer")
    image = from_uint8(pictures(2))
    assert loaded.decode(loaded.encode(image)).shape == image.shape
    average = weights(tmp_path)["average.tokenizer.quantizer.codebook"]
    assert torch.equal(loaded.quantizer.codebook, average)


def test_bfloat16_autocast_trains_too(tmp_path: Path) -> None:
    run = run_config(2, bf16=True)
    losses = TokenizerLossConfig(adversarial=0.1, adversarial_start=0.0)
    train(make_tokenizer_stage(run, losses), run, tmp_path / "tokenizer", progress=False)
    train(make_generator_stage(run, tmp_path), run, tmp_path / "generator", progress=False)
    for folder in ("tokenizer", "generator"):
        rows = [row for row in log_rows(tmp_path / folder) if "loss" in row]
        assert len(rows) == 2
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert all(tensor.dtype != torch.bfloat16 for tensor in weights(tmp_path / folder).values())


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_few_validation_images_still_make_a_picture(tmp_path: Path, count: int) -> None:
    stage = make_tokenizer_stage(run_config(1))
    stage.validation = pictures(count)
    with torch.no_grad():
        figures = stage.pictures(tmp_path, 1)
    assert (tmp_path / "reconstruction_0000001.png").exists()
    assert all(math.isfinite(value) for value in figures.values())


@torch.no_grad()
def test_the_decoder_sees_the_latent_in_hybrid_steps_and_the_codes_alone_in_discrete_ones() -> None:
    stage = make_tokenizer_stage(run_config(20))
    tokenizer = stage.tokenizer
    seen: list[Tensor] = []
    tokenizer.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    paths = set()
    for step in range(8):
        hits = stage.hits_V.clone()
        path = "hybrid" if "l1_hybrid" in stage.tokenizer_loss(step).logs else "discrete"
        paths.add(path)
        latent = stage.latent_BChw
        assert latent is not None
        ids = tokenizer.quantizer.encode(latent).ids
        wanted = latent if path == "hybrid" else tokenizer.quantizer.dequantize_discrete(ids)
        torch.testing.assert_close(seen[-1], wanted, rtol=0, atol=1e-5)
        assert torch.equal(stage.hits_V - hits, torch.cat(ids, 1).flatten().bincount(minlength=32))
    assert paths == {"hybrid", "discrete"}


def test_the_codebook_starts_on_latents_and_dead_codes_are_revived() -> None:
    run = run_config(20)
    stage = make_tokenizer_stage(run, TokenizerLossConfig(continuous_steps=2, revive_every=3))
    codebook = stage.tokenizer.quantizer.codebook
    start = codebook.detach().clone()
    with torch.no_grad():
        for step in (0, 1):
            loss = stage.tokenizer_loss(step)
            assert "l1_continuous" in loss.logs
            stage.after_step(step)
    assert not torch.allclose(codebook, start)  # k-means over what the loop meets
    spread = (codebook.detach()[:, None] - codebook.detach()).norm(dim=-1)
    assert (spread + torch.eye(32)).min() > 0

    with torch.no_grad():
        for step in (2, 3, 4):
            stage.tokenizer_loss(step)
        codebook[:20] = 100.0  # nothing is near
        stage.hits_V[:20] = 0
        alive = codebook[stage.hits_V > 0].clone()
        hits = stage.hits_V.clone()
        assert hits.sum() > 0
        stage.after_step(5)  # the third step of a window
    assert codebook.abs().max() < 100
    assert torch.equal(codebook[hits > 0], alive)
    assert not stage.hits_V.any()


def test_codes_are_not_moved_in_the_last_tenth() -> None:
    stage = make_tokenizer_stage(run_config(10), TokenizerLossConfig(revive_every=1))
    with torch.no_grad():
        stage.tokenizer_loss(9)
        before = stage.tokenizer.quantizer.codebook.clone()
        stage.after_step(9)
        assert torch.equal(stage.tokenizer.quantizer.codebook, before)
        stage.hits_V.zero_()
        stage.after_step(8)
        assert not torch.equal(stage.tokenizer.quantizer.codebook, before)


def test_kmeans_finds_separate_clusters() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    vectors = (centres[:, None] + 0.1 * normal(3, 50, 2)).flatten(0, 1)
    found = min(
        (kmeans(vectors, 3, torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda c: float(torch.cdist(vectors, c).amin(1).sum()),
    )
    assert torch.cdist(centres, found).amin(1).max() < 0.1


def test_kmeans_never_increases_the_error() -> None:
    vectors = normal(300, 4)
    errors = [
        float(
            torch.cdist(vectors, kmeans(vectors, 10, torch.Generator().manual_seed(3), rounds)).amin(1).square().sum()
        )
        for rounds in range(8)
    ]
    assert all(later <= earlier * 1.001 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_the_vectors_for_the_codebook_come_equally_from_every_scale() -> None:
    quantizer = random_quantizer(phi_ratio=0.0)
    f = normal(6, 4, 4, 4)
    vectors = scale_vectors(f, quantizer.schedule, quantizer.phi_function, 20, torch.Generator().manual_seed(0))
    assert vectors.shape == (80, 4)
    means = f.mean((2, 3))
    assert torch.cdist(vectors[:20], means).amin(1).max() < 1e-5  # scale 1 is the mean of an image
    assert vectors[20:40].abs().mean() > 0.01


def test_only_dead_codes_are_moved() -> None:
    codebook, vectors = normal(5, 2), normal(9, 2, seed=1)
    before = codebook.clone()
    hits = torch.tensor([3, 0, 1, 0, 2])
    assert revive_dead_codes(codebook, hits, vectors, torch.Generator()) == 2
    assert torch.equal(codebook[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.cdist(codebook[[1, 3]], vectors).amin(1).max() == 0
    assert revive_dead_codes(codebook, torch.ones(5, dtype=torch.long), vectors, torch.Generator()) == 0


def test_hinge_loss_and_adaptive_weight() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])
    assert float(hinge_loss(real, fake)) == pytest.approx(0.5 * (0.5 + 1.0))
    layer = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    weight = adaptive_weight((6 * layer).sum(), (2 * layer).sum(), layer)
    assert float(weight) == pytest.approx(3, rel=1e-3)
    assert not weight.requires_grad
    assert float(adaptive_weight((6 * layer).sum(), (0 * layer).sum(), layer)) == 1e4


def test_the_discriminator_learns_to_tell_pictures_from_noise() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    real, fake = from_uint8(pictures(8)), normal(8, 3, 32, 32).clamp(-1, 1)
    for _ in range(15):
        optimizer.zero_grad()
        loss = hinge_loss(discriminator(real), discriminator(fake))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert discriminator(real).shape[2] > 1  # a map of patches


def test_random_crops_cut_the_same_square_out_of_both() -> None:
    x = normal(2, 3, 10, 12)
    a, b = random_crops([x, x], 6, torch.Generator().manual_seed(1))
    assert a.shape == (2, 3, 6, 6)
    assert torch.equal(a, b)
    places = [(i, j) for i in range(5) for j in range(7) if torch.equal(x[..., i : i + 6, j : j + 6], a)]
    assert len(places) == 1
    assert random_crops([x], 50, torch.Generator())[0].shape == (2, 3, 10, 10)


@given(st.integers(0, 255))
def test_pixels_survive_the_round_trip(value: int) -> None:
    pixels = torch.full((2, 2, 3), value, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(pixels)), pixels)


# --------------------------------------------------------------------- subsampling, condition dropout


def test_drop_ratios_follow_the_truncated_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.tensor([drop_ratio(generator) for _ in range(4000)])
    assert ratios.min() >= 0.5
    assert ratios.max() <= 1
    # E|z| over the half normal cut at two deviations
    phi0, phi2 = (math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) for z in (0, 2))
    mean = 1 - 0.25 * (phi0 - phi2) / (0.5 * math.erf(2 / math.sqrt(2)))
    assert mean == pytest.approx(0.82, abs=0.005)
    assert float(ratios.mean()) == pytest.approx(mean, abs=0.01)


@given(st.integers(1, 5000), st.floats(0.5, 1))
def test_kept_cells_follow_the_formula(tokens: int, ratio: float) -> None:
    count = kept_count(tokens, ratio)
    if tokens >= 32:
        assert count == tokens - min(math.ceil(tokens * ratio), tokens - 32)
        assert 32 <= count <= max(32, tokens // 2)
    else:
        assert count == tokens


def test_kept_positions_are_distinct_sorted_and_uniform() -> None:
    kept = kept_positions(2000, 10, 4, torch.Generator().manual_seed(0))
    assert kept.shape == (2000, 4)
    assert (kept.diff(dim=1) > 0).all()
    shares = kept.flatten().bincount(minlength=10) / 2000
    torch.testing.assert_close(shares, torch.full((10,), 0.4), rtol=0, atol=0.05)


def test_dropped_conditions_are_the_unconditional_context_at_the_given_rate() -> None:
    context = random_context(2000)
    torch.manual_seed(0)
    dropped = drop_condition(context, 0.1)
    empty = unconditional_context(context)

    def rows_equal(a: TextContext, b: TextContext) -> Tensor:
        same = (a.states_BSC == b.states_BSC).flatten(1).all(1)
        return same & (a.mask_BS == b.mask_BS).all(1) & (a.position_ids_BS == b.position_ids_BS).all(1)

    gone, kept = rows_equal(dropped, empty), rows_equal(dropped, context)
    assert (gone ^ kept).all()
    assert float(gone.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert rows_equal(drop_condition(context, 0.0), context).all()
    assert rows_equal(drop_condition(context, 1.0), empty).all()


# --------------------------------------------------------------------- token cache


def test_the_token_cache_is_reused_and_rebuilt_when_anything_changes(tmp_path: Path) -> None:
    path, tokenizer, images = tmp_path / "tokens.safetensors", random_tokenizer(), image_set(7)
    encoder = WordEncoder()
    assert isinstance(encoder, TextEncoder)

    def computed(*, of: Any = images, by: Any = tokenizer, text: WordEncoder = encoder) -> bool:
        before = text.calls
        build_token_cache(path, of, by, text, progress=False)
        return text.calls > before

    assert computed()
    assert not computed()
    changed = random_tokenizer()
    changed.decoder.conv_out.bias.add_(1e-3)
    assert computed(by=changed)
    assert not computed(by=changed)
    assert computed()
    assert computed(of=image_set(7, seed=2))
    assert computed(of=image_set(7, seed=2), text=WordEncoder(name="others"))
    truncate(path)
    assert computed()
    assert not computed()


def test_the_token_cache_holds_what_tokenizer_and_encoder_give(tmp_path: Path) -> None:
    tokenizer, images, encoder = random_tokenizer(), image_set(7), WordEncoder()
    built = build_token_cache(tmp_path / "tokens.safetensors", images, tokenizer, encoder, progress=False)
    read = build_token_cache(tmp_path / "tokens.safetensors", images, tokenizer, encoder, progress=False)
    tokens = tokenizer.encode(from_uint8(images.pixels))
    for cache in (built, read):
        assert torch.equal(cache.ids_NL, torch.cat(tokens.ids, 1).int())
        torch.testing.assert_close(cache.last_scale_NmC, tokens.last_scale_BlC)
        assert cache.num_captions_N.tolist() == [1, 2, 3, 1, 2, 3, 1]
        assert cache.first_caption_N.tolist() == [0, 1, 3, 6, 7, 9, 12]
        for i, item in enumerate(images.items):
            rows = cache.first_caption_N[i] + torch.arange(len(item.captions))
            context, wanted = cache.context(rows), encoder.encode(item.captions)
            torch.testing.assert_close(context.states_BSC, wanted.states_BSC, rtol=0, atol=2e-3)  # float16
            assert torch.equal(context.mask_BS, wanted.mask_BS)
            assert torch.equal(context.position_ids_BS, wanted.position_ids_BS)


def test_the_residual_scale_holds_nearly_all_targets(tmp_path: Path) -> None:
    tokenizer = random_tokenizer()
    cache = build_token_cache(tmp_path / "t.safetensors", image_set(7), tokenizer, WordEncoder(), progress=False)
    scale = residual_scale(cache, tokenizer.quantizer)
    ids = nearest_codes(cache.last_scale_NmC, tokenizer.quantizer.codebook)
    residual = (cache.last_scale_NmC - tokenizer.quantizer.lookup(ids)) / scale
    assert 0.7 < float(residual.abs().quantile(0.999)) < 0.9


# --------------------------------------------------------------------- generator stage


def test_training_a_generator_reduces_its_loss(tmp_path: Path) -> None:
    run = run_config(30, batch_size=10, optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=2, ema_decay=0.9))
    stage = make_generator_stage(run, tmp_path)
    train(stage, run, tmp_path / "run", progress=False)
    rows = [row for row in log_rows(tmp_path / "run") if "loss" in row]
    assert rows[0]["cross_entropy"] == pytest.approx(math.log(32), rel=0.05)  # the head starts uniform
    last = [sum(row[key] for row in rows[-5:]) / 5 for key in ("cross_entropy", "residual")]
    assert last[0] < 0.8 * rows[0]["cross_entropy"]
    assert last[1] < rows[0]["residual"]
    figures = log_rows(tmp_path / "run")[-1]
    assert math.isfinite(figures["validation_cross_entropy"])
    exported = load_transformer(tmp_path / "run" / "model" / "transformer")
    average = weights(tmp_path / "run")["average.transformer.head.linear.weight"]
    torch.testing.assert_close(exported.head.linear.weight, average, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_the_generators_loss_is_the_cross_entropy_of_a_plain_pass(tmp_path: Path, dropout: float) -> None:
    """Without subsampling and residual tokens nothing is random but the caption and whether it is dropped."""
    losses = GeneratorLossConfig(condition_dropout=0.0, subsample_last_scale=False, residual=0.0)
    stage = make_generator_stage(run_config(1), tmp_path, losses)
    randomise(stage.transformer)  # freshly initialised, it hardly heeds its condition
    rows = torch.tensor([0, 3, 6])  # images with one caption
    result = stage.batch_loss(stage.cache, rows, dropout=dropout)
    transformer, quantizer = stage.transformer, stage.tokenizer.quantizer
    ids = stage.cache.ids_NL[rows].long().split(transformer.schedule.lengths, 1)
    context = stage.cache.context(stage.cache.first_caption_N[rows])
    condition = transformer.prepare(unconditional_context(context) if dropout else context)
    hidden = transformer.forward_all(quantizer.teacher_forcing_input(ids), condition).hidden_BTD
    chances = transformer.logits(hidden, condition).log_softmax(-1)
    wanted = -chances.gather(-1, torch.cat(ids, 1)[..., None]).mean()
    torch.testing.assert_close(result.loss, wanted)
    assert "residual" not in result.logs
    shares = [n / transformer.schedule.num_tokens for n in transformer.schedule.lengths]
    parts = [result.logs[f"cross_entropy_{k}"] for k in range(len(shares))]
    assert sum(s * p for s, p in zip(shares, parts, strict=True)) == pytest.approx(
        result.logs["cross_entropy"], rel=1e-5
    )


def test_the_residual_target_is_what_the_sampled_code_leaves_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the MLP is told which code that was; the codes are the transformer's own choice, not the right ones."""
    losses = GeneratorLossConfig(subsample_last_scale=False, diffusion_repeats=3)
    scale = 0.25
    residual = ResidualConfig(width=32, depth=1, target_scale=scale)
    stage = make_generator_stage(run_config(1), tmp_path, losses, residual=residual)
    conditions, targets = [], []
    plain = stage.transformer.residual_condition

    def residual_condition(hidden_BlD: Tensor, code_BlC: Tensor) -> Tensor:
        conditions.append(code_BlC)
        return plain(hidden_BlD, code_BlC)

    def loss(model: Any, x0_NC: Tensor, t_N: Tensor, noise_NC: Tensor, schedule: Any) -> Any:
        targets.append(x0_NC)
        assert len(t_N.unique()) > 10  # every row has a time of its own
        return diffusion_loss(model, x0_NC, t_N, noise_NC, schedule)

    stage.transformer.residual_condition = residual_condition  # type: ignore[method-assign]
    monkeypatch.setattr("hartist.training.generator_stage.diffusion_loss", loss)
    rows = torch.arange(4)
    stage.batch_loss(stage.cache, rows)
    (codes_BmC,), (x0_NC,) = conditions, targets
    wanted = (stage.cache.last_scale_NmC[rows] - codes_BmC).flatten(0, 1).repeat(3, 1)
    torch.testing.assert_close(scale * x0_NC, wanted, rtol=0, atol=1e-5)
    codebook = stage.tokenizer.quantizer.codebook
    chosen = torch.cdist(codes_BmC.flatten(0, 1), codebook)
    assert chosen.amin(1).max() < 1e-3
    right = stage.cache.ids_NL[rows, -16:].flatten()
    assert 0.5 < float((chosen.argmin(1) != right).float().mean()) < 1  # an untrained one is mostly wrong


def test_scale_weights_can_make_every_scale_count_alike(tmp_path: Path) -> None:
    losses = GeneratorLossConfig(residual=0.0, scale_weight_power=1.0)
    stage = make_generator_stage(run_config(1), tmp_path, losses)
    logs = stage.batch_loss(stage.cache, torch.tensor([0, 1, 2]), dropout=0.1).logs
    parts = [logs[f"cross_entropy_{k}"] for k in range(len(stage.transformer.schedule))]
    assert logs["loss"] == pytest.approx(sum(parts) / len(parts), rel=1e-5)


def test_subsampling_and_residual_weight_reach_the_loss(tmp_path: Path) -> None:
    stage = make_generator_stage(run_config(1), tmp_path)
    result = stage.batch_loss(stage.cache, torch.tensor([0, 1]), dropout=0.1)
    assert result.logs["loss"] == pytest.approx(result.logs["cross_entropy"] + result.logs["residual"], rel=1e-5)
    stage.losses = dataclasses.replace(stage.losses, residual=3.0)
    result = stage.batch_loss(stage.cache, torch.tensor([0, 1]), dropout=0.1)
    assert result.logs["loss"] == pytest.approx(result.logs["cross_entropy"] + 3 * result.logs["residual"], rel=1e-5)


def test_a_coarse_step_is_the_loss_of_the_first_scales_alone(tmp_path: Path) -> None:
    losses = GeneratorLossConfig(subsample_last_scale=False, residual=0.0, coarse_share=1.0, coarse_until=0.5)
    stage = make_generator_stage(run_config(4), tmp_path, losses)
    randomise(stage.transformer)
    rows = torch.tensor([0, 3, 6])  # images with one caption
    coarse = stage.batch_loss(stage.cache, rows, coarse_share=1.0)
    full = stage.batch_loss(stage.cache, rows)
    assert coarse.logs.keys() == {"coarse_loss", "cross_entropy_0", "cross_entropy_1"}
    for k in range(2):
        assert coarse.logs[f"cross_entropy_{k}"] == pytest.approx(full.logs[f"cross_entropy_{k}"], rel=1e-5)
    first, second = (coarse.logs[f"cross_entropy_{k}"] for k in range(2))
    assert coarse.loss.item() == pytest.approx((first + 4 * second) / 5, rel=1e-5)  # 1 and 4 tokens
    assert ["coarse_loss" in stage.loss(step).logs for step in range(4)] == [True, True, False, False]


def test_training_sees_a_part_of_a_large_last_scale(tmp_path: Path) -> None:
    """At 64 px the last scale has 64 cells, of which 32 are kept however many the draw would drop."""
    sides, images, encoder = (1, 3, 8), image_set(4), WordEncoder()
    images = dataclasses.replace(images, pixels=pictures(4, side=64))
    tokenizer = random_tokenizer(sides=sides)
    cache = build_token_cache(tmp_path / "tokens.safetensors", images, tokenizer, encoder, progress=False)
    stage = make_generator_stage(run_config(1), tmp_path, sides=sides)
    stage.model = LoadedModel(tokenizer, stage.transformer, encoder, "tiny")
    seen: list[Tensor] = []
    plain = stage.transformer.forward_all

    def forward_all(input_BLC: Tensor, condition: Condition, kept_Bm: Tensor | None = None) -> TeacherForced:
        assert kept_Bm is not None
        seen.append(kept_Bm)
        return plain(input_BLC, condition, kept_Bm)

    stage.transformer.forward_all = forward_all  # type: ignore[method-assign]
    torch.manual_seed(0)
    rows = torch.arange(4)
    result = stage.batch_loss(cache, rows, dropout=0.1)
    assert math.isfinite(result.logs["loss"])
    assert seen[0].shape == (4, 32)
    assert not torch.equal(seen[0][0], seen[0][1])  # other cells in every image
    stage.losses = dataclasses.replace(stage.losses, subsample_last_scale=False)
    with pytest.raises(AssertionError):
        stage.batch_loss(cache, rows, dropout=0.1)


def test_the_tokenizer_is_frozen_while_the_generator_trains(tmp_path: Path) -> None:
    run = run_config(2)
    stage = make_generator_stage(run, tmp_path)
    before = {name: tensor.clone() for name, tensor in stage.tokenizer.state_dict().items()}
    train(stage, run, tmp_path / "run", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.tokenizer.state_dict().items())
    assert not any("tokenizer" in name for name in weights(tmp_path / "run"))


def test_the_word_encoder_counts_what_it_cuts() -> None:
    assert WordEncoder().count_truncated_tokens(["a", "a b c d e f"]) == [0, 7 - TOKENS]
