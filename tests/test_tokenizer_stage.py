"""The tokenizer stage: what the decoder sees, which codes are revived, and what stays frozen."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hartist.errors import UserError
from hartist.pixels import from_uint8, to_uint8
from hartist.tokenizer.checkpoint import load_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.batches import MicroBatch
from hartist.training.codebook import kmeans, revive_dead_codes, scale_vectors
from hartist.training.config import OptimizerConfig, TokenizerLossConfig
from hartist.training.image_source import ImageSource, MemorySource
from hartist.training.loop import Stage, train
from hartist.training.perceptual import random_crops
from hartist.training.tokenizer_stage import TokenizerStage, image_flops
from runs import log_rows, state_tensors
from small import (
    make_generator_stage,
    make_tokenizer_stage,
    normal,
    pictures,
    random_quantizer,
    run_config,
    tokenizer_config,
)


def whole(step: int) -> MicroBatch:
    """A step's batch of four in one part."""
    return MicroBatch(step, 0, 1, 4, seed=0)


def test_training_a_tokenizer_reduces_its_loss(tmp_path: Path) -> None:
    losses = TokenizerLossConfig(continuous_steps=5, revive_every=10)
    run = dataclasses.replace(run_config(40, batch_size=8), picture_every=40)
    stage = make_tokenizer_stage(run, losses)
    assert isinstance(stage, Stage)
    train(stage, run, tmp_path, progress=False)
    rows = [row for row in log_rows(tmp_path) if "loss" in row]

    def mean(key: str, part: list[dict]) -> float:
        values = [row[key] for row in part if key in row]
        return sum(values) / len(values)

    assert mean("loss", rows[-8:]) < 0.6 * mean("loss", rows[5:10])
    # the coin: both paths were trained
    assert all(sum(f"l1_{path}" in row for row in rows) >= 10 for path in ("discrete", "hybrid"))
    assert sum("l1_continuous" in row for row in rows) == 5
    # a window of ten steps counts the codes in use, scale by scale, and moves the others
    windows = [row for row in rows if "perplexity_0" in row]
    assert [row["step"] for row in windows] == [10, 20, 30, 40]
    assert all(1 <= row[f"perplexity_{k}"] <= row[f"codes_{k}"] <= 32 for row in windows for k in range(4))
    assert [("revived" in row) for row in windows] == [True, True, True, False]
    figures = log_rows(tmp_path)[-1]
    assert figures["validation_psnr_hybrid"] > 8
    assert (tmp_path / "pictures" / "reconstruction_0000040.png").exists()
    loaded = load_tokenizer(tmp_path / "tokenizer")
    image = from_uint8(pictures(2))
    assert loaded.decode(loaded.encode(image)).shape == image.shape
    average = state_tensors(tmp_path)["average.tokenizer.quantizer.codebook"]
    assert torch.equal(loaded.quantizer.codebook, average)


def test_bfloat16_autocast_trains_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hartist.precision.computes_bf16", lambda device: True)
    run = run_config(2, bf16=True)
    losses = TokenizerLossConfig(adversarial=0.1, adversary=AdversarialConfig(channels=4, layers=2, start=0.0))
    train(make_tokenizer_stage(run, losses), run, tmp_path / "tokenizer", progress=False)
    train(make_generator_stage(run, tmp_path), run, tmp_path / "generator", progress=False)
    for folder in ("tokenizer", "generator"):
        rows = [row for row in log_rows(tmp_path / folder) if "loss" in row]
        assert len(rows) == 2
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert all(tensor.dtype != torch.bfloat16 for tensor in state_tensors(tmp_path / folder).values())


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5])
def test_few_validation_images_still_make_a_picture(tmp_path: Path, count: int) -> None:
    stage = make_tokenizer_stage(run_config(1))
    stage.validation = pictures(5)[:count]
    with torch.no_grad():
        figures = stage.pictures({"tokenizer": stage.tokenizer}, tmp_path, 1)
    assert (tmp_path / "reconstruction_0000001.png").exists() == bool(count)
    assert figures.keys() == ({"validation_psnr_discrete", "validation_psnr_hybrid"} if count else set())
    assert all(math.isfinite(value) for value in figures.values())


@torch.no_grad()
def test_the_decoder_sees_the_latent_in_hybrid_steps_and_the_codes_alone_in_discrete_ones() -> None:
    stage = make_tokenizer_stage(run_config(20))
    tokenizer = stage.tokenizer
    seen: list[Tensor] = []
    tokenizer.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    paths = set()
    for step in range(8):
        hits = stage.hits_KV.clone()
        path = "hybrid" if "l1_hybrid" in stage.tokenizer_loss(whole(step)).logs else "discrete"
        assert path == stage.path(whole(step))
        paths.add(path)
        latent = tokenizer.encode_latent(from_uint8(stage.source.batch(whole(step))))
        ids = tokenizer.quantizer.encode(latent).ids
        wanted = latent if path == "hybrid" else tokenizer.quantizer.dequantize_discrete(ids)
        torch.testing.assert_close(seen[-1], wanted, rtol=0, atol=1e-5)
        stage.after_step(step)
        counts = torch.stack([part.flatten().bincount(minlength=32) for part in ids])
        assert torch.equal(stage.hits_KV - hits, counts)
    assert paths == {"hybrid", "discrete"}


def test_the_phases_are_continuous_discrete_and_then_the_coin() -> None:
    losses = TokenizerLossConfig(continuous_steps=3, discrete_steps=4)
    stage = make_tokenizer_stage(run_config(40), losses)
    paths = [stage.path(whole(step)) for step in range(40)]
    assert paths[:7] == ["continuous"] * 3 + ["discrete"] * 4
    assert 8 < paths[7:].count("hybrid") < 25
    assert "continuous" not in paths[7:]
    stage.losses = dataclasses.replace(losses, hybrid_probability=0.0)
    assert {stage.path(whole(step)) for step in range(7, 40)} == {"discrete"}
    stage.losses = dataclasses.replace(losses, hybrid_probability=1.0)
    assert {stage.path(whole(step)) for step in range(7, 40)} == {"hybrid"}


def test_every_part_of_a_step_takes_the_same_path() -> None:
    stage = make_tokenizer_stage(run_config(20))
    for step in range(20):
        assert len({stage.path(MicroBatch(step, i, 4, 1, seed=0)) for i in range(4)}) == 1


def test_a_frozen_encoder_keeps_its_bits_and_the_decoder_learns(tmp_path: Path) -> None:
    """Codes are counted, but none are moved; neither weight decay nor the average touches what is frozen."""
    run = run_config(3, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.5))
    stage = make_tokenizer_stage(run, TokenizerLossConfig(frozen_encoder=True, revive_every=1, adversarial=0.0))
    before = {name: tensor.clone() for name, tensor in stage.tokenizer.state_dict().items()}
    train(stage, run, tmp_path, progress=False)
    shipped = load_tokenizer(tmp_path / "tokenizer").state_dict()
    for name, tensor in stage.tokenizer.state_dict().items():
        frozen = name.startswith(("encoder.", "quant_conv.", "quantizer."))
        assert torch.equal(tensor, before[name]) == frozen, name
        assert torch.equal(shipped[name], before[name]) == frozen, name
    saved = state_tensors(tmp_path)
    moments = {name.split(".")[2] for name in saved if name.startswith("optimizer.tokenizer.")}
    assert moments == {name.split(".")[2] for name in saved if name.startswith("average.tokenizer.")}
    assert moments == {"decoder", "post_quant_conv"}
    rows = [row for row in log_rows(tmp_path) if "loss" in row]
    assert all("revived" not in row for row in rows)
    assert all(row["codes_3"] > 0 for row in rows)


def test_the_codebook_starts_on_latents_and_dead_codes_are_revived() -> None:
    run = run_config(20)
    stage = make_tokenizer_stage(run, TokenizerLossConfig(continuous_steps=2, revive_every=3))
    codebook = stage.tokenizer.quantizer.codebook
    start = codebook.detach().clone()
    with torch.no_grad():
        for step in (0, 1):
            loss = stage.tokenizer_loss(whole(step))
            assert "l1_continuous" in loss.logs
            stage.after_step(step)
    assert not torch.allclose(codebook, start)  # k-means over what the loop meets
    spread = (codebook.detach()[:, None] - codebook.detach()).norm(dim=-1)
    assert (spread + torch.eye(32)).min() > 0

    with torch.no_grad():
        for step in (2, 3, 4):
            stage.tokenizer_loss(whole(step))
            if step < 4:
                stage.after_step(step)
        codebook[:20] = 100.0  # nothing is near
        stage.hits_KV[:, :20] = 0
        stage._step_hits_KV[:, :20] = 0
        hits = (stage.hits_KV + stage._step_hits_KV).sum(0)
        alive = codebook[hits > 0].clone()
        assert hits.sum() > 0
        figures = stage.after_step(5)  # the third step of a window
    assert figures["revived"] == float((hits == 0).sum()) >= 20
    assert codebook.abs().max() < 100
    assert torch.equal(codebook[hits > 0], alive)
    assert not stage.hits_KV.any()


def test_codes_are_not_moved_in_the_last_tenth_nor_onto_latents_that_are_no_numbers() -> None:
    stage = make_tokenizer_stage(run_config(10), TokenizerLossConfig(revive_every=1))
    codebook = stage.tokenizer.quantizer.codebook
    with torch.no_grad():
        stage.tokenizer_loss(whole(8))
        latent = stage._latent_BChw
        assert latent is not None
        before = codebook.clone()
        stage.after_step(9)
        assert torch.equal(codebook, before)
        stage._latent_BChw = latent * math.nan
        assert stage.after_step(8)["revived"] == 0
        assert torch.equal(codebook, before)
        stage._latent_BChw = latent
        assert stage.after_step(8)["revived"] > 0
        assert not torch.equal(codebook, before)


def test_images_come_from_the_source_and_are_mirrored_if_wanted() -> None:
    images = pictures(10)
    plain, mirrored = MemorySource(images, "x"), MemorySource(images, "x", flip=True)
    assert isinstance(plain, ImageSource)
    assert plain.fingerprint != mirrored.fingerprint
    for step in range(3):
        parts = [MicroBatch(step, i, 2, 5, seed=0) for i in range(2)]
        rows = [row for part in parts for row in part.rows(10)]
        assert torch.equal(torch.cat([plain.batch(part) for part in parts]), images[rows])
        flipped = torch.cat([mirrored.batch(part) for part in parts])
        same = (flipped == images[rows]).flatten(1).all(1)
        turned = (flipped == images[rows].flip(2)).flatten(1).all(1)
        assert (same | turned).all()
        assert 0 < int(same.sum()) < 10
        assert torch.equal(flipped, torch.cat([mirrored.batch(part) for part in parts]))


def test_the_operations_of_an_image_are_three_times_those_of_a_real_forward_pass() -> None:
    """The backward pass counts as two. The fused attention of CPUs is none of the operations that are counted."""
    config = tokenizer_config()
    tokenizer = HybridTokenizer(config)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tokenizer.decode_latent(tokenizer.encode_latent(normal(1, 3, 32, 32)))
    assert image_flops(config, 32) == 3 * counter.get_total_flops() > 0
    stage = make_tokenizer_stage(run_config(1))
    assert isinstance(stage, TokenizerStage)
    assert stage.flops(0) == 4 * image_flops(config, 32)


# --------------------------------------------------------------------- codebook, crops, pixels


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


def test_compiling_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"run\.compile"):
        make_tokenizer_stage(run_config(1, compile=True))
