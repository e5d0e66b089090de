"""The bundled model: it loads, draws, and draws the same picture however it is asked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hartist import Pipeline
from hartist.files import read_json
from hartist.generation.loading import BUNDLED, BUNDLED_NAME
from hartist.generation.pipeline import Request
from hartist.pixels import from_uint8

MODEL = BUNDLED / BUNDLED_NAME
PROMPTS = ["red apple, 3d", "grinning face, flat", "dog face, noto", "blue car, 3d", "birthday cake, flat"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(device="cpu")


def ids_and_pixels(pipe: Pipeline, requests: list[Request]) -> list[tuple[list[int], np.ndarray]]:
    """Token ids of all scales and 8-bit pixels of every request, made in one batch."""
    ids: list[torch.Tensor] = []
    for result in pipe.scales(requests, pipe.model.settings):
        ids.append(result.ids_Bl)
    images = pipe.decode(result.f_hat_BChw)
    return [(row.tolist(), np.asarray(image)) for row, image in zip(torch.cat(ids, 1), images, strict=True)]


def test_same_seed_same_picture_alone_and_beside_others_for_a_hundred_images(pipe: Pipeline) -> None:
    count = 100
    requests = [Request(PROMPTS[i % len(PROMPTS)], 1000 + i) for i in range(count)]
    for start in range(0, count, 4):
        batch = requests[start : start + 4]
        for request, (ids, pixels) in zip(batch, ids_and_pixels(pipe, batch), strict=True):
            ((alone_ids, alone_pixels),) = ids_and_pixels(pipe, [request])
            assert ids == alone_ids, request
            assert np.abs(pixels.astype(int) - alone_pixels.astype(int)).max() <= 1, request


def test_byte_equal_pngs_in_a_second_process(tmp_path: Path) -> None:
    digests = []
    for run in ("first", "second"):
        command = [sys.executable, "-m", "hartist", "generate", "red apple, 3d", "-n", "2", "--seed", "7", "--quiet"]
        subprocess.run([*command, "-o", str(tmp_path / run)], check=True, capture_output=True)
        files = sorted((tmp_path / run).glob("*.png"))
        digests.append([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 3  # two images and the contact sheet


def test_prompts_differ_and_pictures_are_on_white(pipe: Pipeline) -> None:
    apple, face = (np.asarray(pipe(prompt, seed=3)[0]).astype(int) for prompt in ("red apple, 3d", "grinning face, 3d"))
    assert apple.shape == (256, 256, 3)
    assert np.abs(apple - face).mean() > 5
    for picture in (apple, face):
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.min() > 200, "emoji stand on white"


def test_hybrid_reconstruction_beats_discrete_on_a_drawn_emoji(pipe: Pipeline) -> None:
    image = from_uint8(torch.from_numpy(np.asarray(pipe("red apple, 3d", seed=1)[0]).copy()))[None]
    tokens = pipe.tokenizer.encode(image)
    discrete = (pipe.tokenizer.decode_discrete(tokens.ids) - image).square().mean()
    hybrid = (pipe.tokenizer.decode(tokens) - image).square().mean()
    assert hybrid < discrete


def test_text_encoder_files_match_their_hashes() -> None:
    directory = MODEL / "text_encoder"
    hashes = read_json(directory / "sha256.json")
    assert set(hashes) == {"config.json", "model.safetensors", "tokenizer.json"}
    for name, expected in hashes.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == expected


def test_the_box_is_small() -> None:
    total = sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file())
    assert total < 70 * 2**20
