"""The pipeline on tiny random models: images depend on their request alone, and every setting counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hartist import Pipeline
from hartist.errors import UserError
from hartist.generation.loop import ScaleResult
from hartist.generation.pipeline import Generated, Request, make_requests, override
from hartist.generation.prompts import MAX_PROMPT_CHARACTERS
from hartist.generation.sampling import SamplingSettings
from hartist.transformer.model import ScaleTransformer
from hartist.transformer.prefix import Prefix, run_prefix
from tiny import NUM_CLASSES, SETTINGS, SIDES, SIZE, write_tiny_class_model, write_tiny_text_model

PROMPTS = ["a red apple, 3d", "a sleeping cat on a table, flat", "green"]
STEADY = settings(max_examples=10, deadline=None)


@pytest.fixture(scope="module")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("models") / "text")


@pytest.fixture(scope="module")
def class_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_class_model(tmp_path_factory.mktemp("models") / "class")


@pytest.fixture(scope="module")
def pipe(text_directory: Path) -> Pipeline:
    return Pipeline.from_pretrained(text_directory, device="cpu")


@pytest.fixture(scope="module")
def class_pipe(class_directory: Path) -> Pipeline:
    return Pipeline.from_pretrained(class_directory, device="cpu")


@dataclass(frozen=True)
class Made:
    """Some images: token ids of all scales (B×L) and pixels (B×H×W×3)."""

    ids: torch.Tensor
    pixels: np.ndarray

    def __getitem__(self, rows: slice) -> Made:
        return Made(self.ids[rows], self.pixels[rows])


def make(pipe: Pipeline, requests: Sequence[Request], *, batch_size: int = 64, **changes: object) -> Made:
    negative_prompt = changes.pop("negative_prompt", None)
    batches: list[list[torch.Tensor]] = []

    def collect(result: ScaleResult) -> None:
        if result.k == 0:
            batches.append([])
        batches[-1].append(result.ids_Bl)

    images = pipe.generate(
        requests,
        settings=override(pipe.model.settings, **changes),
        negative_prompt=negative_prompt,  # type: ignore[arg-type]
        batch_size=batch_size,
        callback=collect,
    )
    pixels = np.stack([np.asarray(item.image).astype(int) for item in images])
    return Made(torch.cat([torch.cat(scales, 1) for scales in batches]), pixels)


def assert_same_image(a: Made, b: Made, levels: int = 1) -> None:
    assert torch.equal(a.ids, b.ids)
    assert abs(a.pixels - b.pixels).max() <= levels


def distance(a: Made, b: Made) -> float:
    """Mean difference in levels."""
    return float(abs(a.pixels - b.pixels).mean())


# --- an image depends on its own request alone ---------------------------------------------------


@STEADY
@given(
    prompts=st.lists(st.sampled_from([*PROMPTS, "a", "word " * 20]), min_size=2, max_size=5),
    seeds=st.lists(st.integers(-(2**40), 2**64), min_size=5, max_size=5),
    guidance=st.sampled_from([0.0, 1.0, 3.0]),
    smoothing=st.booleans(),
)
def test_a_batch_of_n_is_n_single_images(
    pipe: Pipeline, prompts: list[str], seeds: list[int], guidance: float, smoothing: bool
) -> None:
    requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=False)]
    together = make(pipe, requests, guidance=guidance, smoothing=smoothing)
    alone = make(pipe, requests, batch_size=1, guidance=guidance, smoothing=smoothing)
    assert_same_image(together, alone)


def test_an_image_is_the_same_alone_in_a_batch_of_four_and_beside_another_prompt(pipe: Pipeline) -> None:
    for seed in range(3):
        alone = make(pipe, [Request(PROMPTS[0], seed)])
        four = make(pipe, make_requests([PROMPTS[0]], 4, seed))
        beside = make(pipe, [Request(PROMPTS[1], 99), Request(PROMPTS[0], seed)])
        assert_same_image(alone, four[:1])
        assert_same_image(alone, beside[1:])


@STEADY
@given(labels=st.lists(st.integers(0, NUM_CLASSES - 1), min_size=2, max_size=5), seed=st.integers(0, 2**32))
def test_a_batch_of_classes_is_single_images_too(class_pipe: Pipeline, labels: list[int], seed: int) -> None:
    requests = [Request(label, seed + i) for i, label in enumerate(labels)]
    assert_same_image(make(class_pipe, requests), make(class_pipe, requests, batch_size=1))


def test_the_batch_size_only_splits_the_work(pipe: Pipeline) -> None:
    requests = make_requests(PROMPTS, 2, 5)
    whole = make(pipe, requests, batch_size=6)
    for batch_size in (2, 4):
        assert_same_image(make(pipe, requests, batch_size=batch_size), whole)


def test_seed_and_prompt_both_matter(pipe: Pipeline) -> None:
    made = make(pipe, [Request(PROMPTS[0], 0), Request(PROMPTS[0], 1), Request(PROMPTS[1], 0)])
    assert distance(made[:1], made[1:2]) > 1
    assert distance(made[:1], made[2:]) > 1
    again = make(pipe, [Request(PROMPTS[0], 0)])
    assert_same_image(again, make(pipe, [Request(PROMPTS[0], 0)]), levels=0)


def test_calling_the_pipeline_gives_image_i_of_every_prompt_the_seed_plus_i(pipe: Pipeline) -> None:
    images = pipe(PROMPTS[:2], num_images=2, seed=7)
    assert [image.size for image in images] == [(SIZE, SIZE)] * 4
    for prompt in range(2):
        for i in range(2):
            (single,) = pipe(PROMPTS[prompt], seed=7 + i)
            gap = abs(np.asarray(single).astype(int) - np.asarray(images[2 * prompt + i]))
            assert gap.max() <= 1


def test_global_random_state_plays_no_part_and_is_left_alone(pipe: Pipeline) -> None:
    torch.manual_seed(1)
    first = make(pipe, [Request("a cat", 3)], smoothing=True)
    after = torch.rand(1)
    torch.manual_seed(2)
    assert_same_image(make(pipe, [Request("a cat", 3)], smoothing=True), first, levels=0)
    torch.manual_seed(1)
    assert torch.rand(1) == after


# --- settings -------------------------------------------------------------------------------------


def test_a_negative_prompt_changes_the_image(pipe: Pipeline) -> None:
    request = [Request(PROMPTS[0], 0)]
    plain = make(pipe, request)
    negative = make(pipe, request, negative_prompt="flat")
    assert distance(negative, plain) > 1
    assert not torch.equal(negative.ids, plain.ids)
    assert_same_image(make(pipe, request, negative_prompt=""), plain, levels=0)


def test_the_other_branchs_prefix_is_run_once_for_all_images(
    text_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Pipeline.from_pretrained(text_directory, device="cpu")
    run: list[int] = []

    def counted(model: ScaleTransformer, condition: Any) -> Prefix:
        run.append(len(condition))
        return run_prefix(model, condition)

    monkeypatch.setattr("hartist.transformer.prefix.run_prefix", counted)
    requests = [Request(prompt, seed) for prompt in PROMPTS[:2] for seed in range(3)]
    make(fresh, requests, batch_size=2)
    make(fresh, requests[:1], guidance=0.0)
    assert run == [1]
    for negative in ("a", "b", "c", "", "a", "d", "b"):  # one more than are kept: b had been unused for longest
        make(fresh, requests[:1], negative_prompt=negative)
    assert run == [1] * 6


def test_the_prompt_as_its_own_negative_cancels_guidance(pipe: Pipeline) -> None:
    # (1 + t)·c − t·c = c
    for seed in range(4):
        request = [Request(PROMPTS[0], seed)]
        cancelled = make(pipe, request, negative_prompt=PROMPTS[0], guidance=4.0)
        assert_same_image(cancelled, make(pipe, request, guidance=0.0))


def test_guidance_and_temperature_move_the_image(pipe: Pipeline) -> None:
    request = [Request(PROMPTS[0], 0)]
    images = [make(pipe, request, guidance=g) for g in (0.0, 1.0, 3.0)]
    images.append(make(pipe, request, temperature=3.0))
    for i, a in enumerate(images):
        for b in images[i + 1 :]:
            assert distance(a, b) > 0.5
            assert not torch.equal(a.ids, b.ids)


def test_top_k_1_is_greedy_and_greedy_ids_need_no_seed(pipe: Pipeline) -> None:
    for seed in range(3):
        greedy = make(pipe, [Request(PROMPTS[1], seed)], temperature=0.0)
        assert_same_image(make(pipe, [Request(PROMPTS[1], seed)], top_k=1), greedy, levels=0)
        assert_same_image(make(pipe, [Request(PROMPTS[1], seed)], top_p=1e-9), greedy, levels=0)
    other = make(pipe, [Request(PROMPTS[1], 17)], temperature=0.0)
    assert torch.equal(other.ids, greedy.ids)
    assert distance(other, greedy) > 0  # the residual tokens still have noise of their own


def test_without_residual_tokens_the_image_is_the_discrete_path(pipe: Pipeline) -> None:
    requests = make_requests(PROMPTS, 1, 4)
    *_, last = pipe.scales(requests, pipe.model.settings)
    assert torch.equal(last.ids_Bl, make(pipe, requests, residual=False).ids[:, -(SIDES[-1] ** 2) :])
    discrete = np.stack([np.asarray(image) for image in pipe.decode(last.discrete_f_hat_BChw)]).astype(int)
    without = make(pipe, requests, residual=False)
    assert abs(without.pixels - discrete).max() <= 1
    assert distance(make(pipe, requests), without) > 1


def test_diffusion_steps_change_the_residual_tokens_alone(pipe: Pipeline) -> None:
    request = [Request(PROMPTS[0], 0)]
    usual, many = make(pipe, request), make(pipe, request, diffusion_steps=25)
    assert torch.equal(usual.ids, many.ids)
    assert distance(usual, many) > 0.1
    assert_same_image(make(pipe, request, diffusion_steps=4), usual, levels=0)  # the model's own number
    one = make(pipe, request, diffusion_steps=1)
    assert torch.equal(one.ids, usual.ids)


def test_smoothing_mixes_codes(pipe: Pipeline) -> None:
    request = [Request(PROMPTS[0], 0)]
    assert distance(make(pipe, request, smoothing=True), make(pipe, request)) > 1


def test_the_models_own_settings_are_the_default(pipe: Pipeline) -> None:
    assert pipe.model.settings == SETTINGS
    item = next(pipe.generate([Request("a cat", 0)]))
    assert item.settings == SETTINGS
    other = SamplingSettings(guidance=1.0)
    assert next(pipe.generate([Request("a cat", 0)], settings=other)).settings == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance": -1.0}, "guidance -1"),
        ({"guidance": float("nan")}, "guidance nan"),
        ({"top_k": -3}, "top-k -3"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"diffusion_steps": 0}, "0 diffusion steps"),
        ({"diffusion_steps": 1001}, "1001 diffusion steps"),
        ({"sampler": "ddim"}, "unknown setting 'sampler'"),
        ({"num_images": 0}, "0 images"),
        ({"num_images": -2}, "-2 images"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_unfit_settings_are_named(pipe: Pipeline, changes: dict[str, float], message: str) -> None:
    assert message in one_line(lambda: pipe("a cat", **changes))  # type: ignore[arg-type]


# --- what generate() yields -----------------------------------------------------------------------


def test_the_callback_sees_every_scale_in_order(pipe: Pipeline) -> None:
    seen: list[ScaleResult] = []
    list(pipe.generate(make_requests(PROMPTS, 1, 0), batch_size=2, callback=seen.append))
    assert [result.k for result in seen] == [0, 1, 2, 3] * 2
    assert [result.grid for result in seen[:4]] == [(side, side) for side in SIDES]
    assert [len(result.ids_Bl) for result in seen] == [2] * 4 + [1] * 4
    assert all(result.num_scales == 4 and result.seconds >= result.residual_seconds >= 0 for result in seen)


def test_scale_images_go_from_coarse_to_the_image_itself(pipe: Pipeline) -> None:
    requests = make_requests(PROMPTS[:2], 1, 0)
    with_scales = list(pipe.generate(requests, save_scales=True))
    plain = list(pipe.generate(requests))
    for item, without in zip(with_scales, plain, strict=True):
        assert len(item.scale_images) == len(SIDES)
        assert item.scale_images[-1].tobytes() == item.image.tobytes() == without.image.tobytes()
        assert len({image.tobytes() for image in item.scale_images}) == len(SIDES)
        assert without.scale_images == ()


def test_truncated_tokens_are_counted_per_prompt(pipe: Pipeline) -> None:
    long = "word " * 15  # and two special tokens, of which twelve fit
    items = list(pipe.generate([Request("a cat", 0), Request(long, 0)], batch_size=1))
    assert [item.truncated_tokens for item in items] == [0, 5]
    assert isinstance(items[0], Generated)


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t", "word " * 10_000, "\udcff cat"])
def test_prompts_that_cannot_be_drawn_are_refused_before_any_work(pipe: Pipeline, prompt: str) -> None:
    started: list[ScaleResult] = []
    message = one_line(lambda: list(pipe.generate([Request("a cat", 0), Request(prompt, 0)], callback=started.append)))
    assert "prompt" in message
    assert not started


def test_prompts_at_the_limit_and_of_any_script_work(pipe: Pipeline) -> None:
    for prompt in ("x" * MAX_PROMPT_CHARACTERS, "猫 🍎 ñ ا", "../../etc/passwd", "\0", "[PAD] [SEP]"):
        assert make(pipe, [Request(prompt, 0)]).pixels.shape == (1, SIZE, SIZE, 3)
    for negative in ("x" * (MAX_PROMPT_CHARACTERS + 1), "\udcff"):
        assert "negative prompt" in one_line(lambda n=negative: pipe("a cat", negative_prompt=n))


def test_no_prompt_at_all_is_an_error(pipe: Pipeline) -> None:
    assert "no prompt" in one_line(lambda: pipe([]))


# --- class-conditional ----------------------------------------------------------------------------


def test_class_labels_are_numbers_or_their_spelling(class_pipe: Pipeline) -> None:
    made = make(class_pipe, [Request(3, 0), Request("3", 0), Request(1, 0)])
    assert_same_image(made[:1], made[1:2])
    assert distance(made[:1], made[2:]) > 1
    assert class_pipe.is_class_conditional
    assert class_pipe.image_size == (SIZE, SIZE)
    unguided = make(class_pipe, [Request(3, 0)], guidance=0.0)
    assert distance(unguided, made[:1]) > 0.1


@pytest.mark.parametrize("label", [-1, NUM_CLASSES, "cat", "", "1.5", 10**30, "9" * 5000])
def test_labels_that_are_no_class_are_refused(class_pipe: Pipeline, label: int | str) -> None:
    message = one_line(lambda: class_pipe(label))
    assert "not a class" in message
    assert f"0 to {NUM_CLASSES - 1}" in message
    assert len(message) < 200


def test_a_class_model_takes_no_negative_prompt(class_pipe: Pipeline) -> None:
    assert "negative prompt" in one_line(lambda: class_pipe(1, negative_prompt="flat"))


# --- loading and saving ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "class"])
def test_a_saved_pipeline_makes_identical_pixels(
    pipe: Pipeline, class_pipe: Pipeline, tmp_path: Path, kind: str
) -> None:
    original, prompt = (pipe, PROMPTS[0]) if kind == "text" else (class_pipe, 2)
    original.save_pretrained(tmp_path / "copy")
    copy = Pipeline.from_pretrained(tmp_path / "copy", device="cpu", dtype="float32")
    assert copy.model.settings == original.model.settings
    assert copy.model.name == original.model.name
    requests = make_requests([prompt], 2, 11)
    assert_same_image(make(copy, requests), make(original, requests), levels=0)
    copy.save_pretrained(tmp_path / "copy")  # onto the files it was loaded from
    again = Pipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert_same_image(make(again, requests), make(original, requests), levels=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_bfloat16_weights_take_half_the_space_and_still_draw(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "half", torch.bfloat16)
    pipe.save_pretrained(tmp_path / "full")
    sizes = {name: (tmp_path / name / "transformer" / "model.safetensors").stat().st_size for name in ("half", "full")}
    assert sizes["half"] < 0.6 * sizes["full"]
    for dtype in ("float32", torch.bfloat16):
        half = Pipeline.from_pretrained(tmp_path / "half", device="cpu", dtype=dtype)
        assert make(half, [Request("a cat", 0)]).pixels.std() > 1


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), "is not a model"),
    "foreign config": (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "is not a model"),
    "config is a list": (lambda d: (d / "config.json").write_text("[1]"), "is not a model"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "not readable JSON"),
    "config is binary": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\0"), "not readable JSON"),
    "newer format": (lambda d: _edit(d / "config.json", version=99), "version 99"),
    "unknown sampling field": (lambda d: _edit(d / "config.json", sampling={"magic": 1}), "'magic'"),
    "unfit sampling value": (lambda d: _edit(d / "config.json", sampling={"top_p": 7}), "top-p 7"),
    "sampling of a wrong type": (lambda d: _edit(d / "config.json", sampling={"top_p": "x"}), "sampling"),
    "text tokens of a wrong type": (lambda d: _edit(d / "config.json", text_tokens="many"), "text_tokens"),
    "text tokens that don't fit": (lambda d: _edit(d / "config.json", text_tokens=11), "11"),
    "no transformer": (lambda d: shutil.rmtree(d / "transformer"), "transformer"),
    "no tokenizer weights": (lambda d: (d / "tokenizer/model.safetensors").unlink(), "does not exist"),
    "no text encoder": (lambda d: shutil.rmtree(d / "text_encoder"), "text_encoder"),
    "truncated weights": (
        lambda d: _truncate(d / "transformer/model.safetensors"),
        "not a complete safetensors",
    ),
    "truncated text encoder": (lambda d: _truncate(d / "text_encoder/model.safetensors"), "cannot be read"),
    "empty weights": (lambda d: (d / "tokenizer/model.safetensors").write_bytes(b""), "safetensors"),
    "weights are text": (lambda d: (d / "tokenizer/model.safetensors").write_text("hi" * 99), "safetensors"),
    "config of another kind": (
        lambda d: shutil.copy(d / "tokenizer/config.json", d / "transformer/config.json"),
        "does not describe a Hartist transformer",
    ),
    "weights of another kind": (
        lambda d: shutil.copy(d / "tokenizer/model.safetensors", d / "transformer/model.safetensors"),
        "missing key",
    ),
    "other width": (lambda d: _edit(d / "transformer/config.json", width=64), "expected"),
    "other vocabulary": (lambda d: _edit(d / "transformer/config.json", vocab_size=63), "expected"),
    "no heads": (lambda d: _edit(d / "transformer/config.json", heads=0), "transformer"),
    "width is a word": (lambda d: _edit(d / "transformer/config.json", width="wide"), "transformer"),
    "negative width": (lambda d: _edit(d / "tokenizer/config.json", latent_channels=-8), "tokenizer"),
    "channels no norm can group": (lambda d: _edit(d / "tokenizer/config.json", channels=33), "tokenizer"),
    "depth is a list": (lambda d: _edit(d / "transformer/config.json", depth=[2]), "transformer"),
    "no scales": (lambda d: _edit(d / "transformer/config.json", sides=[]), "schedule is empty"),
    "other scales": (lambda d: _edit(d / "transformer/config.json", sides=[1, 5, 3]), "coarse to fine"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_and_foreign_models_are_named(text_directory: Path, tmp_path: Path, case: str) -> None:
    damage, expected = DAMAGE[case]
    copy = tmp_path / "model"
    shutil.copytree(text_directory, copy)
    damage(copy)
    message = one_line(lambda: Pipeline.from_pretrained(copy, device="cpu"))
    assert expected in message
    assert str(copy) in message or case == "unfit sampling value"


def test_parts_of_different_models_are_refused(text_directory: Path, class_directory: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(text_directory, mixed)
    values = json.loads((mixed / "transformer" / "config.json").read_text())
    assert values["condition"] == "text"
    shutil.rmtree(mixed / "transformer")
    shutil.copytree(class_directory / "transformer", mixed / "transformer")
    # a class model simply ignores the text encoder beside it
    assert Pipeline.from_pretrained(mixed, device="cpu").is_class_conditional
    shutil.copytree(text_directory, tmp_path / "wrong")
    shutil.rmtree(tmp_path / "wrong" / "tokenizer")
    shutil.copytree(text_directory / "transformer", tmp_path / "wrong" / "tokenizer")
    assert "tokenizer" in one_line(lambda: Pipeline.from_pretrained(tmp_path / "wrong", device="cpu"))


@pytest.mark.parametrize("model", ["no-such-model", "no/such/model", "x" * 5000, "a" * 300, "", "~nobody"])
def test_unknown_models_are_named(model: str) -> None:
    message = one_line(lambda: Pipeline.from_pretrained(model, device="cpu"))
    assert "no model" in message


def test_a_hub_id_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("the network is down\nand has been for a while")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = one_line(lambda: Pipeline.from_pretrained("someone/something", device="cpu"))
    assert "someone/something" in message
    assert "the network is down" in message


def test_a_hub_id_is_downloaded_and_loaded(text_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: str(text_directory))
    assert Pipeline.from_pretrained("someone/something", device="cpu").model.name == "tiny-text"


@pytest.mark.parametrize("device", ["cuda:99", "quantum", "", "meta", "cpu:x"])
def test_devices_that_are_not_there_are_named(text_directory: Path, device: str) -> None:
    message = one_line(lambda: Pipeline.from_pretrained(text_directory, device=device))
    assert repr(device) in message
    assert "cpu" in message


def test_unknown_dtypes_are_named(text_directory: Path) -> None:
    for dtype in ("int8", "float99", ""):
        message = one_line(lambda d=dtype: Pipeline.from_pretrained(text_directory, device="cpu", dtype=d))
        assert "dtype" in message
        assert "bfloat16" in message


def one_line(action: object) -> str:
    """The message of the UserError that `action` raises, which is one line."""
    with pytest.raises(UserError) as caught:
        action()  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    assert message
    return message


def test_without_its_text_encoder_a_pipeline_draws_the_prompts_it_had(text_directory: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(text_directory, device="cpu", text_device="cpu")
    expected = [image.tobytes() for image in pipe(["a cat", "a red apple"], negative_prompt="flat")]
    pipe = Pipeline.from_pretrained(text_directory, device="cpu")
    pipe.unload_text_encoder(["a cat", "a red apple", "flat"])
    assert pipe.model.text_encoder is None
    assert [image.tobytes() for image in pipe(["a cat", "a red apple"], negative_prompt="flat")] == expected
    with pytest.raises(UserError, match="text encoder was unloaded"):
        pipe("a green apple")
    with pytest.raises(UserError, match="can't be saved"):
        pipe.save_pretrained(tmp_path / "copy")
