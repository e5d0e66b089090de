"""The benchmark scripts at tiny sizes: they time what they say they time, and never run twice what is finished."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hartist import Pipeline
from hartist.evaluation.alignment import AlignmentConfig, AlignmentHeads, save_alignment
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.batches import micro_batches
from hartist.training.generator_stage import GeneratorStage
from small import transformer_config
from small_ablations import STEPS, fake_network, tiny_sizes, write_dataset

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ablation_runs  # noqa: E402
import ablations  # noqa: E402
import against_var  # noqa: E402
import training_step  # noqa: E402
import turns  # noqa: E402
import var_checkout  # noqa: E402
from random_training import random_cache, random_trainer  # noqa: E402
from tables import markdown  # noqa: E402

# ----------------------------------------------------------------- timing in turns


def test_a_table_is_markdown_with_figures_on_the_right() -> None:
    table = markdown([{"what": "a", "s": "1.5"}, {"what": "longer", "s": "10"}])
    assert table.splitlines() == ["| what   |   s |", "| ------ | --: |", "| a      | 1.5 |", "| longer |  10 |"]


def variant(name: str, log: Path, body: str = "") -> list[str]:
    """A command whose step writes its name to the log."""
    code = (
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "from turns import answer\n"
        "def make():\n"
        "    print('what the making prints', flush=True)\n"
        "    return step\n"
        "def step():\n"
        f"    open({str(log)!r}, 'a').write({name!r})\n"
        "    print('what the step prints', flush=True)\n"
        f"    {body or 'pass'}\n"
        "answer(make)\n"
    )
    return [sys.executable, "-c", code]


def test_variants_take_turns_and_only_steps_after_the_warm_up_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = {"first": variant("a", log), "large": variant("b", log, "globals().update(x=bytearray(b'1') * 2**26)")}
    timings = turns.time_in_turns(commands, rounds=2, steps=2, warmup=1)
    assert log.read_text() == "aaabbbaaabbb"
    assert [[len(seconds) for seconds in timing.rounds] for timing in timings.values()] == [[2, 2], [2, 2]]
    assert timings["large"].peak_bytes > timings["first"].peak_bytes + 2**25


def test_a_variant_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"process of broken .* code 3"):
        turns.time_in_turns({"broken": variant("a", tmp_path / "log", "sys.exit(3)")}, rounds=1, steps=1, warmup=0)


def test_a_speedup_is_the_median_ratio_of_the_rounds() -> None:
    slow = turns.Timing(((2.0, 9.0, 2.0), (8.0, 8.0, 8.0), (30.0, 30.0, 30.0)), 1)
    fast = turns.Timing(((1.0, 1.0, 7.0), (2.0, 2.0, 2.0), (10.0, 10.0, 10.0)), 1)
    assert turns.speedup(slow, fast) == 3.0  # of 2, 4 and 3; the medians of all steps have the ratio 4
    assert (slow.median, fast.median) == (8.0, 2.0)


@pytest.mark.parametrize("condition", ["text", "class"])
def test_a_random_cache_is_one_the_trainer_reads(condition: str) -> None:
    cache = random_cache(6, transformer_config(condition=condition))
    batch = cache.rows(torch.tensor([5, 0]))
    assert torch.equal(batch.ids_NL, cache.ids_NL[[5, 0]].int())
    assert (batch.label_N is None) == (condition == "text")
    if condition == "text":
        assert torch.equal(batch.context(batch.first_caption_N).states_BSC, cache.texts.parts[0].states_USC[[5, 0]])


# ----------------------------------------------------------------- the training step


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What steps encode and train on."""
    found: dict[str, list[Any]] = {"encoded": [], "bf16": [], "kept": [], "residual": []}
    encode, batch_loss = HybridTokenizer.encode_latent, GeneratorStage.batch_loss

    def encode_latent(self: HybridTokenizer, image: Tensor) -> Tensor:
        found["encoded"].append(len(image))
        found["bf16"].append(torch.is_autocast_enabled("cpu"))
        return encode(self, image)

    def loss(self: GeneratorStage, *arguments: Any, **options: Any) -> Any:
        found["kept"].append(options["kept"])
        result = batch_loss(self, *arguments, **options)
        found["residual"].append("residual" in result.logs)
        return result

    monkeypatch.setattr(HybridTokenizer, "encode_latent", encode_latent)
    monkeypatch.setattr(GeneratorStage, "batch_loss", loss)
    return found


@pytest.mark.parametrize("name", training_step.VARIANTS)
def test_variants_of_the_step_do_what_their_names_say(name: str, seen: dict[str, list[Any]]) -> None:
    step = training_step.make_step(name, training_step.sizes("tiny"))
    step()
    step()
    assert seen["encoded"] == ([] if name.startswith("cached") else [2, 2])
    assert set(seen["bf16"]) <= {"bf16" in name}
    assert len(seen["kept"]) == 2
    assert all((kept is None) == name.endswith("all") for kept in seen["kept"])


def test_tokens_from_pixels_are_those_of_the_steps_images(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_trainer(*vars(training_step.sizes("tiny")).values())
    monkeypatch.setattr(training_step, "random_trainer", lambda *_: made)
    step = training_step.make_step("pixels/all", training_step.sizes("tiny"))
    cache = made[1]
    before = cache.ids_NL.clone()
    step()
    changed = (cache.ids_NL != before).any(1).nonzero()[:, 0]
    rows = micro_batches(0, 2, 0, 0)[0].rows(len(cache))
    assert sorted(rows) == changed.tolist()


def fake_timings(commands: Mapping[str, Sequence[str]], *, rounds: int, **_: int) -> dict[str, turns.Timing]:
    """The n-th variant takes n seconds."""
    return {name: turns.Timing(((float(n),),) * rounds, n * 2**30) for n, name in enumerate(commands, start=1)}


def test_the_steps_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(training_step, "time_in_turns", fake_timings)
    monkeypatch.setattr(training_step, "computes_bf16", lambda device: True)
    assert training_step.main(["--sizes", "tiny", "--json", str(tmp_path / "out.json")]) == 0
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["variants"]["pixels/subsampled"]["median_seconds"] == 2
    assert values["speedups"]["cache against pixels, subsampled"] == 2
    assert values["speedups"]["subsampling, cached"] == 4
    assert values["speedups"]["both together"] == 5
    out = capsys.readouterr().out
    assert "| subsampling, cached" in out
    assert "6.00" in out  # GiB of the last variant
    monkeypatch.setattr(training_step, "computes_bf16", lambda device: False)
    assert training_step.main(["--sizes", "tiny"]) == 0
    assert "bf16" not in capsys.readouterr().out


def test_the_script_answers_as_a_variant() -> None:
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--sizes", "tiny", "--threads", "1"]
    done = subprocess.run(
        [*command, "--worker", "cached/subsampled"], input="\n\n", capture_output=True, text=True, check=True
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(answer) for answer in answers] == [["peak_bytes", "seconds"]] * 2


# ----------------------------------------------------------------- against VAR

CHECKOUT = {
    "dist.py": "def get_device(): return 'nowhere'\n",
    "models/var.py": "",
    "models/__init__.py": """
import torch, dist
CALLS = []
class Autoencoder(torch.nn.Module):
    def __init__(self, V):
        super().__init__()
        self.vocab_size, self.quantize = V, None
        self.norm = torch.nn.Parameter(torch.full((3,), float('nan')))
        self.weight = torch.nn.Parameter(torch.full((3, 3), float('nan')))
    def img_to_idxBl(self, images):
        CALLS.append('encode')
        assert not any(p.isnan().any() for p in self.parameters())
        return [torch.zeros(len(images), 1, dtype=torch.long)]
def build_vae_var(V, Cvae, ch, device, patch_nums, depth, **options):
    assert dist.get_device() == 'cpu' and patch_nums == (1, 2, 3)
    return Autoencoder(V), torch.nn.Linear(4, V)
""",
    "utils/lr_control.py": """
def filter_params(model):
    print('like this', force=True)
    return [], list(model.parameters()), [{'params': list(model.parameters())}]
def lr_wd_annealing(kind, optimizer, rate, decay, decay_end, step, warmup, total, wp0, wpe):
    optimizer.param_groups[0]['lr'] = rate * step
""",
    "utils/amp_sc.py": """
import contextlib
class AmpOptimizer:
    def __init__(self, mixed, optimizer, names, paras, clip):
        self.optimizer, self.amp_ctx, self.clip = optimizer, contextlib.nullcontext(), clip
""",
    "trainer.py": """
import torch
import models
from utils.misc import MetricLogger, TensorboardLogger
class VARTrainer:
    def __init__(self, vae_local, var, var_opt, **options):
        self.vae, self.var, self.opt = vae_local, var, var_opt
    def train_step(self, it, metric_lg, inp_B3HW, label_B, **options):
        assert it not in metric_lg.log_iters
        ids = self.vae.img_to_idxBl(inp_B3HW)
        with self.opt.amp_ctx:
            loss = self.var(torch.ones(len(label_B), 4)).sum() + ids[0].sum()
            models.CALLS.append(torch.is_autocast_enabled('cpu'))
        loss.backward()
        self.opt.optimizer.step()
        models.CALLS.append(self.opt.optimizer.param_groups[0]['lr'])
""",
}
"""What the benchmark uses of VAR's repository, in a few lines with its interfaces."""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    for name, code in CHECKOUT.items():
        path = tmp_path / "VAR" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    modules, places = set(sys.modules), list(sys.path)
    yield tmp_path / "VAR"
    sys.path[:] = places
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize("given", [False, True])
def test_vars_own_trainer_takes_the_step(checkout: Path, given: bool) -> None:
    step = var_checkout.make_var_step(checkout, against_var.SIZES["tiny"], bf16=given, tokens_given=given)
    calls = sys.modules["models"].CALLS
    calls.clear()
    step()
    step()
    encoded = [] if given else ["encode"]
    rate = 1e-4 * 2 / 256
    assert calls == [*encoded, given, rate, *encoded, given, 2 * rate]


@pytest.mark.parametrize("name", [name for name in against_var.VARIANTS if name.startswith("ours")])
def test_our_side_of_the_comparison(name: str, seen: dict[str, list[Any]]) -> None:
    step = against_var.make_step(name, against_var.SIZES["tiny"], bf16=True, checkout=Path())
    step()
    assert seen["encoded"] == []
    assert (seen["kept"] == [None]) == (name == "ours, tokens given")
    assert seen["residual"] == [name.endswith("HART")]


def test_the_comparisons_report(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(against_var, "time_in_turns", fake_timings)
    assert against_var.main(["--var", str(checkout), "--json", str(tmp_path / "out.json")]) == 0
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["speedups"] == {
        "ours, tokens given": 1 / 2,
        "ours, whole step": 3 / 4,
        "ours, whole step of HART": 3 / 5,
    }
    whole = values["variants"]["ours, whole step"]
    assert whole["tokens_per_second"] == 8 / 4 * 680
    assert whole["tokens_seen_per_second"] == 8 / 4 * (680 - 210)
    assert "in every step of its trainer" in capsys.readouterr().out


def test_a_folder_that_is_no_checkout_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert against_var.main(["--var", str(tmp_path)]) == 2
    assert f"{tmp_path} is no checkout" in capsys.readouterr().err


# ----------------------------------------------------------------- ablations


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("ablations"))


def run_ablation(dataset: Path, monkeypatch: pytest.MonkeyPatch, name: str, *flags: str) -> int:
    """One command with tiny networks, a fake feature network and a tiny text encoder."""
    monkeypatch.setattr(ablations, "load_feature_network", fake_network)
    monkeypatch.setattr(ablations, "find_model", lambda _: dataset)
    monkeypatch.setattr("hartist.training.run.find_model", lambda _: dataset)
    arguments = [name, "--data", str(dataset / "data"), "--out", str(dataset / "out")]
    arguments += ["--tokenizer-steps", str(STEPS), "--generator-steps", str(STEPS), *flags]
    return ablations.main([*arguments, "--threads", "1"], tiny_sizes())


def no_training(*_: Any, **__: Any) -> int:
    raise AssertionError("this was finished")


def test_decoders_and_coins_share_their_runs(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ablation(dataset, monkeypatch, "decoders") == 0
    first = capsys.readouterr()
    assert "| two, each on its path" in first.out
    assert [line.split(":")[0] for line in first.err.splitlines() if line.endswith(f"{STEPS} steps")] == [
        f"{name}-{STEPS}-seed0" for name in ("base", "decoder-coin0.00", "decoder-coin0.50", "decoder-coin1.00")
    ]
    results = json.loads((dataset / "out" / "results.json").read_text())
    assert len(results) == 4

    assert run_ablation(dataset, monkeypatch, "coin") == 0
    second = capsys.readouterr()
    assert second.out.count("| hybrid in ") == 3
    assert len([line for line in second.err.splitlines() if line.endswith(f"{STEPS} steps")]) == 2

    monkeypatch.setattr(ablation_runs, "train_tokenizer", no_training)
    assert run_ablation(dataset, monkeypatch, "decoders") == 0
    assert capsys.readouterr().out == first.out


def test_decoders_keep_the_quantizer_and_differ_in_the_decoder(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shop = ablation_runs.Workshop(dataset / "data", dataset / "out", tiny_sizes(), ablation_runs.Budget(STEPS, STEPS))
    base, discrete, hybrid = (
        ablations.load_tokenizer_of(shop.tokenizer(coin)).state_dict() for coin in (None, 0.0, 1.0)
    )
    for name, tensor in base.items():
        frozen = not name.startswith(("decoder", "post_quant_conv"))
        assert torch.equal(tensor, discrete[name]) or not frozen
    assert not torch.equal(discrete["post_quant_conv.weight"], hybrid["post_quant_conv.weight"])


def test_subsampling_and_residual_tokens(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablations, "DROPPED", (0.0, 0.5))
    assert run_ablation(dataset, monkeypatch, "subsampling") == 0
    out = capsys.readouterr().out
    assert "| 0%" in out
    assert "| 50%" in out
    runs = [json.loads((path / "log.jsonl").read_text().splitlines()[0]) for path in dataset.glob("out/generator-*")]
    assert len(runs) == 2

    encoder = load_text_encoder(dataset / "text_encoder")
    config = AlignmentConfig(
        image_dim=12, text_dim=encoder.dim, image_network=f"fake-{ablations.LITE2}", text_encoder=encoder.fingerprint()
    )
    save_alignment(AlignmentHeads(config), config, dataset / "heads")
    monkeypatch.setattr(ablations, "DIFFUSION_STEPS", (None, 1))
    model = next(dataset.glob("out/generator-drop0.50-*")) / "model"
    flags = "--model", str(model), "--align", str(dataset / "heads")
    assert run_ablation(dataset, monkeypatch, "residual", *flags) == 0
    out = capsys.readouterr().out
    assert "| no residual tokens" in out
    assert "R@10" in out
    results = json.loads((dataset / "out" / "results.json").read_text())
    off, one = (figures for name, figures in results.items() if name.startswith("residual"))
    assert off["residual_seconds"] == 0 < one["residual_seconds"]
    assert off["frechet_distance"] != one["frechet_distance"]


def test_an_interrupted_run_is_reported_and_not_measured(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation_runs, "train_tokenizer", lambda *_, **__: 1)
    assert run_ablation(dataset, monkeypatch, "coin", "--out", str(tmp_path)) == 2
    assert f"base-{STEPS}-seed0 stopped after 1 of {STEPS} steps" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_a_folder_belongs_to_one_dataset(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dataset.json").write_text('{"dataset": "another"}')
    assert run_ablation(dataset, monkeypatch, "coin", "--out", str(tmp_path)) == 2
    assert "another dataset" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--tokenizer-steps", "--generator-steps"])
def test_a_budget_of_nothing_is_refused(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablations.main(["coin", "--data", str(tmp_path), "--out", str(tmp_path), flag, "0"]) == 2
    assert "at least one step" in capsys.readouterr().err


def test_a_finished_tokenizer_is_not_trained_again(dataset: Path, tmp_path: Path) -> None:
    sizes = replace(tiny_sizes(), base=dataset / "finished")
    shop = ablation_runs.Workshop(dataset / "data", tmp_path, sizes, ablation_runs.Budget(STEPS, STEPS))
    assert shop.tokenizer(None) == dataset / "finished"
    assert not list(tmp_path.iterdir())


def test_small_sizes_go_on_with_the_bundled_tokenizer() -> None:
    sizes = ablation_runs.small_sizes()
    assert sizes.base is not None
    assert (sizes.base / "config.json").is_file()
    assert sizes.transformer.vocab_size == sizes.tokenizer.vocab_size
    assert sizes.image_size == Pipeline.from_pretrained(device="cpu").image_size[0]
