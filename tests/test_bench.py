"""`hartist bench` counts what the equations say, times what it says it times, and draws what it found."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hartist.cli import main
from hartist.config import ResidualConfig, TransformerConfig
from hartist.errors import UserError
from hartist.evaluation.bench import BenchSettings, run_bench
from hartist.evaluation.bench.growth import fit_power, grow
from hartist.evaluation.bench.hardware import peak, reset_peak
from hartist.evaluation.bench.macs import Macs, Work, count_macs, generation_work
from hartist.evaluation.bench.models import find_preset, random_pipeline, resize, sides_for
from hartist.evaluation.bench.operators import kind_of
from hartist.evaluation.bench.report import format_bench
from hartist.evaluation.bench.roofline import measure_product, shares
from hartist.evaluation.bench.run import to_json
from hartist.evaluation.bench.text_cost import time_released_text
from hartist.evaluation.bench.timing import Run, Timing, requests_for, time_run
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST
from hartist.presets import PRESETS, Preset
from tiny import SIDES, class_config, tiny_tokenizer, write_tiny_class_model, write_tiny_text_model

CPU = torch.device("cpu")
UNGUIDED = SamplingSettings(guidance=0.0)


def tiny_text() -> Preset:
    """A text model of the released form at 32 px."""
    return tiny_tokenizer().config, TransformerConfig(
        sides=SIDES,
        vocab_size=64,
        latent_channels=8,
        context_tokens=12,
        context_dim=24,
        width=32,
        depth=2,
        heads=4,
        residual=ResidualConfig(width=32, depth=2),
    )


def tiny_class() -> Preset:
    return tiny_tokenizer().config, class_config()


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PRESETS, "tiny-preset", tiny_text)
    monkeypatch.setattr("hartist.evaluation.bench.roofline.SQUARES", {"cpu": (64, 128)})
    monkeypatch.setattr("hartist.evaluation.bench.roofline.SECONDS", 0.01)
    return "tiny-preset"


def quick(preset: str, **changes: object) -> BenchSettings:
    return BenchSettings(preset=preset, repeats=2, dtype="float32", device="cpu", **changes)  # type: ignore[arg-type]


# ----------------------------------------------------------------- MACs


def branch_by_hand(config: TransformerConfig) -> tuple[float, float]:
    """MACs of a text model's prefix and scales, one image and one branch: in all, and attention alone."""
    D, C, V, S = config.width, config.latent_channels, config.vocab_size, config.context_tokens
    lengths = config.schedule.lengths
    embedding = 256 * D + D * D
    whole = S * config.context_dim * D + embedding  # the context's projection
    attention = 0
    for k, cells in enumerate(lengths):
        rows, keys = (S, S) if k == 0 else (cells, S + sum(lengths[1 : k + 1]))
        whole += config.depth * rows * (4 * D * D + 3 * D * config.mlp_hidden)
        attention += config.depth * 2 * rows * keys * D
        whole += cells * D * V + 2 * D * D  # the head and its modulation
        whole += (cells * C * D + embedding) if k else 0
    return float(whole + attention), float(attention)


def residual_by_hand(config: TransformerConfig) -> float:
    """MACs of the residual tokens, one image and one branch."""
    assert config.residual is not None
    W, C, D, cells = config.residual.width, config.latent_channels, config.width, config.schedule.lengths[-1]
    step = C * W + config.residual.depth * 5 * W * W + 2 * W * W + 2 * C * W
    return cells * (C * D + D * W + config.residual.steps * step)


@pytest.mark.parametrize(("preset", "whole", "attention"), [("hart-512", 4.07, 0.59), ("hart-1024", 22.20, 8.83)])
def test_counted_macs_are_those_of_the_shapes(preset: str, whole: float, attention: float) -> None:
    tokenizer, config = find_preset(preset)
    assert [2 * macs / 1e12 for macs in branch_by_hand(config)] == pytest.approx([whole, attention], abs=0.005)
    shallow = dataclasses.replace(config, depth=1)  # the same for every block, and soon counted
    small = dataclasses.replace(tokenizer, channels=32)
    work = generation_work(small, shallow)
    by_hand = branch_by_hand(shallow)
    assert work.transformer + work.shared_prefix == Macs(2 * by_hand[0], 2 * by_hand[1])
    assert work.residual.total == 2 * residual_by_hand(shallow)


@pytest.mark.slow
def test_the_released_model_is_counted_whole() -> None:
    tokenizer, config = find_preset("hart-1024")
    work = generation_work(tokenizer, config)
    by_hand = branch_by_hand(config)
    assert work.transformer + work.shared_prefix == Macs(2 * by_hand[0], 2 * by_hand[1])
    assert work.decode.total / 1e12 == pytest.approx(3.23, abs=0.01)


def test_guidance_and_the_batch_multiply_the_work() -> None:
    both, one = generation_work(*tiny_text()), generation_work(*tiny_text(), settings=UNGUIDED)
    assert one.transformer + one.residual == both.transformer * 0.5 + both.residual * 0.5 + one.scales[0] * 0.5
    assert both.shared_prefix == both.scales[0] == one.scales[0]
    assert one.shared_prefix == Macs()
    assert generation_work(*tiny_text(), batch=3).total == both.total * 3
    assert both.decode.total > 0


def test_shortcuts_leave_work_out() -> None:
    preset = tiny_text()
    whole = generation_work(*preset)
    last = generation_work(*preset, settings=SamplingSettings(unguided_scales=1))
    assert last.scales[-1] == whole.scales[-1] * 0.5
    assert last.scales[:-1] == whole.scales[:-1]
    assert last.residual == whole.residual * 0.5
    half = generation_work(*preset, settings=SamplingSettings(last_scale_share=0.5))
    assert half.residual == whole.residual * 0.5
    assert 0.4 < half.scales[-1].total / whole.scales[-1].total < 0.6
    assert generation_work(*preset, settings=SamplingSettings(residual=False)).residual == Macs()
    long = tuple(dataclasses.replace(config, sides=(1, 1, 2, 2, 3, 3, 4, 4)) for config in preset)
    near = generation_work(*long, settings=SamplingSettings(attended_scales=1))  # type: ignore[arg-type]
    far = generation_work(*long)  # type: ignore[arg-type]
    assert near.transformer.attention < far.transformer.attention
    assert near.transformer.total - near.transformer.attention == far.transformer.total - far.transformer.attention


def test_fused_attention_counts_like_its_products() -> None:
    def attend(device: str) -> Macs:
        q, k = torch.ones(2, 3, 5, 8, device=device), torch.ones(2, 3, 7, 8, device=device)
        return count_macs(lambda: F.scaled_dot_product_attention(q, k, k))

    assert attend("cpu") == attend("meta") == Macs(3360.0, 3360.0)
    assert count_macs(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == Macs(24.0)
    assert count_macs(lambda: nn.Conv2d(2, 3, 3)(torch.ones(1, 2, 4, 4))) == Macs(4.0 * 2 * 3 * 9)


# ----------------------------------------------------------------- seconds


@pytest.mark.parametrize("slow", ["residual", "decode", "scale 3"])
def test_a_slow_part_shows_in_its_own_seconds(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = random_pipeline(tiny_text(), torch.float32, CPU)
    owner, name = {
        "residual": (pipe.transformer, "residual_condition"),
        "decode": (pipe, "decode"),
        "scale 3": (pipe.transformer, "forward_scale"),
    }[slow]
    original = getattr(owner, name)
    clock = 0.0

    def late(*arguments: object, **options: object) -> object:
        nonlocal clock
        if slow != "scale 3" or arguments[0] == 2:
            clock += 1
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, late)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    run = time_run(pipe, requests_for(pipe, 2), SamplingSettings())
    scales = (0.0, 0.0, float(slow == "scale 3"), 0.0)
    assert run == Run(scales, float(slow == "residual"), float(slow == "decode"), 1.0)


def test_a_slow_run_is_not_the_median() -> None:
    timing = Timing.of(
        [Run((1.0, 2.0), 0.5, 1.0, 5.0), Run((9.0, 2.0), 0.5, 1.0, 13.0), Run((2.0, 2.0), 0.5, 1.0, 6.0)]
    )
    assert (timing.total.median, timing.total.low, timing.total.high) == (6.0, 5.0, 13.0)
    assert timing.transformer.median == 4.0
    assert [seconds.median for seconds in timing.scales] == [2.0, 2.0]


def test_memory_of_a_moment_counts_until_it_is_reset() -> None:
    if not reset_peak(CPU):
        pytest.skip("this system can't reset the peak of resident memory")
    before = peak(CPU).resident
    torch.ones(2**26).sum()  # 256 MiB, gone at once
    assert peak(CPU).resident - before > 200 * 2**20
    reset_peak(CPU)
    assert peak(CPU).resident - before < 100 * 2**20


# ----------------------------------------------------------------- the roofline


def test_shares_tell_where_the_rest_goes() -> None:
    timing = Timing.of([Run((1.0, 2.0), 1.0, 2.0, 7.0)])
    work = Work((Macs(25.0), Macs(100.0)), Macs(1000.0), Macs(0.0), Macs(50.0))
    found = {share.part: share for share in shares(timing, work, 100.0, ("a", "b"))}
    assert [(name, share.share) for name, share in found.items()] == [
        ("a", 0.5), ("b", 1.0), ("residual", 0.0), ("decoder", 0.5), ("between", 0.0), ("whole", pytest.approx(0.5)),
    ]  # fmt: skip
    assert [share.lost_seconds for share in found.values()] == pytest.approx([0.5, 0.0, 1.0, 1.0, 1.0, 3.5])
    assert sum(share.loss for name, share in found.items() if name != "whole") == pytest.approx(found["whole"].loss)
    assert found["whole"].loss == pytest.approx(1.0)


def test_a_product_is_as_fast_as_its_best_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *[0.0, 4.0], *[4.0, 6.0], *[6.0, 11.0]])
    monkeypatch.setattr("hartist.evaluation.bench.roofline.now", lambda device: next(clock))
    assert measure_product("x", 2, 3, 4, torch.float32, CPU, 10.0).flops_per_second == 2 * 2 * 3 * 4 / 2.0


def test_operators_are_told_apart_by_name_and_shape() -> None:
    weights = {(96, 32)}
    assert kind_of("aten::mm", [[7, 32], [32, 96]], weights) == "linear layers"
    assert kind_of("aten::addmm", [[96], [7, 32], [32, 96], []], weights) == "linear layers"
    assert kind_of("aten::mm", [[7, 8], [8, 50]], weights) == "attention"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu", [], weights) == "attention"
    assert kind_of("onednn::qlinear_pointwise", [[7, 32]], weights) == "linear layers"
    assert kind_of("aten::mkldnn_convolution", [], weights) == "convolutions"
    assert kind_of("aten::native_group_norm", [], weights) == "norms"
    assert kind_of("aten::copy_", [], weights) == "copies"
    assert kind_of("aten::mul", [], weights) == "element by element"


# ----------------------------------------------------------------- the whole


def test_a_benchmark_of_random_weights_is_complete(tiny_preset: str) -> None:
    result = run_bench(quick(tiny_preset, batch=2, operators=True))
    assert len(result.timing.scales) == len(result.work.scales) == len(SIDES)
    assert len(result.timing.total.runs) == 2
    assert result.images_per_second == 2 / result.timing.total.median
    assert result.image_size == (32, 32)
    assert result.shares[-1].part == "whole"
    assert result.shares[-1].share > 0
    kinds = {kind.name: kind for kind in result.kinds}
    assert {"linear layers", "attention", "convolutions"} <= set(kinds)
    assert sum(kind.share for kind in result.kinds) == pytest.approx(1, abs=0.2)
    values = json.loads(json.dumps(to_json(result)))
    assert values["macs"]["total"]["total"] == result.work.total.total
    assert values["scales"][-1]["tokens"] == 16
    text = format_bench(result)
    assert all(name in text for name in (*result.scale_names, "residual", "decoder", "peak", "linear layers"))


def test_random_weights_give_finite_pictures() -> None:
    for preset in (tiny_text(), tiny_class()):
        pipe = random_pipeline(preset, torch.float32, CPU)
        *_, result = pipe.scales(requests_for(pipe, 2), SamplingSettings())
        assert result.f_hat_BChw.isfinite().all()
        assert result.logits_BlV.isfinite().all()
        assert pipe.tokenizer.decode_latent(result.f_hat_BChw).isfinite().all()


def test_fast_mode_is_measured_with_its_shortcuts(tiny_preset: str) -> None:
    exact = run_bench(quick(tiny_preset, roofline=False))
    fast = run_bench(quick(tiny_preset, roofline=False, sampling=dict(FAST)))
    assert fast.sampling.diffusion_steps == FAST["diffusion_steps"]
    assert fast.work.transformer.total < exact.work.transformer.total
    assert fast.work.residual.total < exact.work.residual.total / 4  # half the steps, 3/4 of the cells, one branch
    assert "diffusion_steps" in format_bench(fast)


def test_the_released_text_encoder_is_timed_by_itself() -> None:
    sizes = {
        "vocab_size": 200, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e6,
    }  # fmt: skip
    cost = time_released_text(torch.float32, CPU, warmup=0, repeats=2, sizes=sizes)
    assert len(cost.seconds.runs) == 2
    assert cost.macs.total > cost.macs.attention > 2 * 2 * 300 * 300 * 16  # two layers, at least the prompt's tokens
    assert cost.memory is not None


def test_a_given_model_is_measured_with_its_encoder_and_at_another_size(tmp_path: Path) -> None:
    model = write_tiny_text_model(tmp_path / "text")
    settings = BenchSettings(model=str(model), size=24, repeats=1, device="cpu", roofline=False)
    result = run_bench(settings)
    assert result.image_size == (24, 24)
    assert result.grids[-1] == (3, 3)
    assert result.text is not None
    assert result.text.macs.total > 0
    assert result.sampling.guidance == 3.0  # the model's own
    bound = write_tiny_class_model(tmp_path / "class")
    with pytest.raises(UserError, match="resolution"):
        run_bench(dataclasses.replace(settings, model=str(bound)))


def test_other_sizes_take_the_published_scales_where_there_are_some() -> None:
    assert sides_for(512, 16) == find_preset("hart-512")[1].sides
    assert sides_for(80, 16) == (1, 2, 3, 4, 5)
    for sides in (find_preset("hart-256", 1024)[1].sides, find_preset("hart-256", 1024)[0].sides):
        assert sides == find_preset("hart-1024")[1].sides
    with pytest.raises(UserError, match="multiple"):
        sides_for(100, 16)
    pipe = random_pipeline(tiny_text(), torch.float32, CPU)
    resize(pipe, 40)
    assert pipe.image_size == (40, 40)


# ----------------------------------------------------------------- growth


def test_a_power_is_found_again() -> None:
    xs = [1.0, 2.0, 4.0, 9.0]
    assert fit_power(xs, [3 * x**1.5 for x in xs]) == pytest.approx(1.5)
    assert fit_power([1, 10], [5, 5]) == pytest.approx(0)


def test_cost_over_sizes_and_batches(tiny_preset: str) -> None:
    over_pixels, over_batch = grow(quick(tiny_preset, roofline=False), (48, 32), (2, 1))
    assert over_pixels.amounts() == [32 * 32, 48 * 48]
    assert over_batch.amounts() == [1, 2]
    assert over_batch.exponents["MACs"] == pytest.approx(1)
    work = [generation_work(*find_preset(tiny_preset, size)).total.total for size in (32, 48)]
    assert over_pixels.exponents["MACs"] == pytest.approx(math.log(work[1] / work[0]) / math.log((48 / 32) ** 2))
    for sizes in ((32,), (32, 32), (0, 32)):
        with pytest.raises(UserError, match="different"):
            grow(quick(tiny_preset), sizes)


# ----------------------------------------------------------------- the command


def test_the_command_prints_tables_and_draws(tiny_preset: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    call = ["bench", "--preset", tiny_preset, "--device", "cpu", "--dtype", "float32", "--repeats", "1"]
    assert main([*call, "--fast", "--plot", str(tmp_path / "bench.png")]) == 0
    assert "of the loss" in capsys.readouterr().out
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    files = ["--json", str(tmp_path / "growth.json"), "--plot", str(tmp_path / "growth.svg")]
    assert main([*call, "--sizes", "32,48", "--batches", "1,2", "--guidance", "0", "--no-roofline", *files]) == 0
    printed = capsys.readouterr()
    assert "growth over pixels" in printed.out
    assert "growth over batch" in printed.out
    assert "48×48 px, batch 1" in printed.err
    assert "<svg" in (tmp_path / "growth.svg").read_text()
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [point["image_size"] for point in found["pixels"]["points"]] == [[32, 32], [48, 48]]
    assert found["batch"]["points"][0]["sampling"]["guidance"] == 0
    assert found["batch"]["exponents"]["MACs"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--plot", "bench.gif"], "bench.gif"),
        (["--sizes", "32"], "sizes 32"),
        (["--size", "33"], "33"),
        (["--batch", "0"], "batch of 0"),
        (["--repeats", "0"], "repeats"),
        (["--model", "no-such"], "no-such"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    flags: list[str], named: str, tiny_preset: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["bench", "--preset", tiny_preset, "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
