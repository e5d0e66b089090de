"""Twice the resolution with the same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hartist import Pipeline
from hartist.cli import main
from hartist.generation.loading import load_tokenizer_of
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.stem import double_stem
from small import pictures, randomise, tokenizer_config, write_images
from tiny import write_tiny_text_model


def tokenizer(stem: int) -> HybridTokenizer:
    torch.manual_seed(0)
    built = HybridTokenizer(tokenizer_config(stem=stem, sides=(1, 2, 4))).eval().requires_grad_(False)
    randomise(built)
    return built


@pytest.mark.parametrize("stem", [1, 2, 4])
def test_the_tokens_are_those_of_half_the_picture_and_the_pixels_come_twice(stem: int) -> None:
    half = tokenizer(stem)
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    whole = double_stem(half)
    assert whole.config.stem == 2 * stem
    assert whole.config.downsampling == 2 * half.config.downsampling
    side = 4 * whole.config.downsampling
    image = torch.rand(2, 3, side, side) * 2 - 1
    small = F.avg_pool2d(image, 2)
    expected, found = half.encode(small), whole.encode(image)
    assert all(torch.equal(a, b) for a, b in zip(expected.ids, found.ids, strict=True))
    assert len(found.ids[-1].unique()) > 5
    torch.testing.assert_close(found.residual_BlC, expected.residual_BlC, rtol=1e-4, atol=1e-4)
    large = F.interpolate(half.decode(expected), scale_factor=2.0)
    torch.testing.assert_close(whole.decode(found), large, rtol=1e-4, atol=1e-4)
    assert large.std() > 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.state_dict().items())


def test_a_run_begins_with_the_doubled_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = tokenizer(4)
    save_tokenizer(half, tmp_path / "half")
    data = tmp_path / "data"
    for split in ("train", "validation"):
        write_images(data / split, pictures(6, 0, 64), ["a thing"] * 6)
    command = ["train", "tokenizer", "--data", str(data), "--out", str(tmp_path / "run"), "-q", "--double-stem"]
    command += ["--steps", "1", "--batch-size", "2", "--set", "image_size=64", "--set", "losses.perceptual=0"]
    command += ["--set", "losses.continuous_steps=0"]
    for call in (command, [*command, "--dry-run"]):
        assert main(call) == 2
        assert "--double-stem" in capsys.readouterr().err
    command += ["--set", "losses.frozen_encoder=true"]
    assert main([*command, "--start-from", str(tmp_path / "half")]) == 0
    trained = load_tokenizer_of(tmp_path / "run" / "tokenizer")
    assert trained.config.stem == 8
    start = double_stem(half).state_dict()
    for name, tensor in trained.state_dict().items():
        same = torch.equal(tensor, start[name])
        assert same or name.startswith(("decoder", "post_quant_conv"))


def test_a_model_takes_a_decoder_of_its_tokens_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_text_model(tmp_path / "model")
    own = load_tokenizer_of(model)
    save_tokenizer(double_stem(own), tmp_path / "doubled")
    call = ["convert", str(model), str(tmp_path / "larger"), "--tokenizer"]
    assert main([*call, str(tmp_path / "doubled")]) == 0
    small, large = (Pipeline.from_pretrained(tmp_path / name, device="cpu") for name in ("model", "larger"))
    assert large.image_size == tuple(2 * side for side in small.image_size)
    before, after = (np.asarray(pipe("red apple, 3d", seed=1)[0]).astype(int) for pipe in (small, large))
    assert np.abs(after - before.repeat(2, 0).repeat(2, 1)).max() <= 1  # the same tokens, each pixel four times
    capsys.readouterr()
    with torch.no_grad():
        own.quantizer.codebook[0] += 1
    save_tokenizer(own, tmp_path / "other")
    assert main([*call[:2], str(tmp_path / "wrong"), "--tokenizer", str(tmp_path / "other")]) == 2
    assert "scales and codes" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
