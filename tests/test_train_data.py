"""Training on data as it comes: with broken images, without held-out ones, streamed, and of classes."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hartist import Pipeline
from hartist.cli import main
from hartist.config import ResidualConfig
from hartist.errors import UserError
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.training.config import GeneratorLossConfig, Phase, TokenizerLossConfig
from hartist.training.parallel import World
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.recipes import imagenet
from hartist.training.run import DataOptions, train_generator, train_tokenizer
from runs import assert_same_state, log_rows, loss_curve, saved_step, state_files
from small import SIDES, VAR, pictures, random_tokenizer, run_config, tokenizer_config, transformer_config
from tiny import SIZE, write_tiny_bert


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pictures(number + 1, side=SIZE)[number].numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, count: int) -> Path:
    """A captioned folder without splits; every image is of the class of its number."""
    folder.mkdir(parents=True)
    rows = []
    for n in range(count):
        (folder / f"{n}.png").write_bytes(png(n))
        rows.append({"file_name": f"{n}.png", "text": f"picture {n}", "class": n})
    write_rows(folder, rows)
    return folder


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(steps: int = 4, **changes: Any) -> TokenizerRecipe:
    return TokenizerRecipe(SIZE, tokenizer_config(), TokenizerLossConfig(revive_every=2), run_config(steps, **changes))


def train(folder: Path, out: Path, steps: int = 4, **options: Any) -> int:
    return train_tokenizer(str(folder), out, recipe(steps), options=DataOptions(**options), progress=False)


def test_broken_images_and_missing_captions_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "data", 7)
    (folder / "2.png").write_bytes(png(2)[:40])
    (folder / "4.png").unlink()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[5]["text"] = ""
    write_rows(folder, rows)
    assert train(folder, tmp_path / "run", steps=2) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "3 skipped" in lines[0]
    assert all(f"{n}.png" in lines[0] for n in (2, 4, 5))
    assert lines[1].startswith("training without held-out images: ")
    assert all(name not in row for row in log_rows(tmp_path / "run") for name in ("validation_psnr_hybrid",))


def test_data_that_broke_since_does_not_harm_the_run_it_stops(tmp_path: Path) -> None:
    """Another set of images is another run: refused, with the checkpoint as it was; mended, the run goes on."""
    folder = write_folder(tmp_path / "data", 6)
    assert train(folder, tmp_path / "whole", steps=3) == 3
    with pytest.MonkeyPatch.context() as patch:
        stopped = stop_at(patch, step=0)
        assert train(folder, tmp_path / "run", steps=3) == 1
        assert stopped
    before = state_files(tmp_path / "run")
    (folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="holds a run with another data"):
        train(folder, tmp_path / "run", steps=3)
    for n in range(6):
        (folder / f"{n}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no image in train that can be read: 6 skipped") as error:
        train(folder, tmp_path / "run", steps=3)
    assert "\n" not in str(error.value)
    assert state_files(tmp_path / "run") == before
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(n))
    assert train(folder, tmp_path / "run", steps=3) == 3
    assert_same_state(tmp_path / "run", tmp_path / "whole")


def stop_at(patch: pytest.MonkeyPatch, step: int) -> list[int]:
    """Have the process get a signal during a step of any tokenizer stage."""
    from hartist.training.tokenizer_stage import TokenizerStage

    plain, seen = TokenizerStage.after_step, []

    def after_step(self: TokenizerStage, now: int) -> dict[str, float]:
        if now == step:
            seen.append(now)
            signal.raise_signal(signal.SIGTERM)
        return plain(self, now)

    patch.setattr(TokenizerStage, "after_step", after_step)
    return seen


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_streamed_run_goes_on_with_the_next_image(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images in batches of four: stopped within the first epoch, and in the second."""
    data = write_folder(tmp_path / "data", 10) if kind == "folder" else write_tars(tmp_path / "data")
    options: dict[str, Any] = {"stream": True, "crop": "random", "flip": True}
    assert train(data, tmp_path / "whole", steps=5, **options) == 5
    for stop in (0, 3):
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, stop)
            assert train(data, tmp_path / "parts", steps=5, **options) == stop + 1
    assert json.loads((tmp_path / "parts" / "checkpoint" / "state.json").read_text())["positions"] != [None]
    assert train(data, tmp_path / "parts", steps=5, **options) == 5
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert loss_curve(tmp_path / "whole") == loss_curve(tmp_path / "parts")


def write_tars(folder: Path, cut: int | None = None) -> Path:
    """Two WebDataset shards of five images each; `cut`: only so many bytes of the second."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for n in range(5 * shard, 5 * shard + 5):
                for name, content in ((f"{n}.png", png(n)), (f"{n}.txt", f"picture {n}".encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    if cut is not None:
        path = folder / "1.tar"
        path.write_bytes(path.read_bytes()[:cut])
    return folder


def test_a_cut_off_shard_costs_its_images_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_tars(tmp_path / "data", cut=2700)
    assert train(data, tmp_path / "read", steps=1) == 1
    assert "1.tar" in capsys.readouterr().err
    assert train(data, tmp_path / "streamed", steps=4, stream=True) == 4
    assert len(loss_curve(tmp_path / "streamed")) == 4


def test_ranks_that_cannot_share_a_batch_are_told_before_any_data_is_read(tmp_path: Path) -> None:
    for strange in (World(0, 3), World(0, 2)):
        with pytest.raises(UserError, match=r"can't be shared by \d processes equally"):
            train_tokenizer(tmp_path / "none", tmp_path / "run", recipe(batch_size=2), world=strange)
    with pytest.raises(UserError, match="does not exist"):
        train_tokenizer(tmp_path / "none", tmp_path / "run", recipe(batch_size=2), progress=False)


# --------------------------------------------------------------------- classes


def class_recipe(steps: int) -> GeneratorRecipe:
    """ImageNet's, made tiny."""
    config = transformer_config(**(VAR | {"residual": ResidualConfig(width=32, depth=1, steps=2)}))
    return dataclasses.replace(
        imagenet(16),
        phases=(Phase(SIZE, SIDES),),
        transformer=config,
        losses=GeneratorLossConfig(),
        run=run_config(steps, picture_every=2),
    )


@pytest.mark.parametrize("captions", [False, True])
def test_classes_train_from_a_cache_that_the_data_command_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], captions: bool
) -> None:
    """Captions beside the classes do no harm."""
    data = write_folder(tmp_path / "data", 5)
    rows = [{"file_name": f"{n}.png", "class": n} for n in range(5)]
    if captions:
        rows = [row | {"text": "a picture"} for row in rows]
    write_rows(data, rows)
    save_tokenizer(random_tokenizer(), tmp_path / "tokenizer")
    call = ["data", "cache", "--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "-q", "--device", "cpu"]
    cache = tmp_path / "caches" / f"train-{SIZE}"
    call += ["--text-encoder", str(write_tiny_bert(tmp_path / "bert"))]
    assert main([*call, "--label-column", "class", "--out", str(cache)]) == 0
    capsys.readouterr()
    options = {"cache_dir": tmp_path / "caches", "progress": False}
    assert train_generator(None, tmp_path / "tokenizer", tmp_path / "run", class_recipe(4), **options) == 4  # type: ignore[arg-type]
    assert saved_step(tmp_path / "run") == 4
    assert (tmp_path / "run" / "pictures" / "samples_0000004.png").exists()
    pipe = Pipeline.from_pretrained(tmp_path / "run" / "model", device="cpu")
    assert pipe.is_class_conditional
    assert pipe(3, seed=1)[0].size == (SIZE, SIZE)

    with pytest.raises(UserError, match="class-conditional model trains from a token cache"):
        train_generator(data, tmp_path / "tokenizer", tmp_path / "other", class_recipe(4), progress=False)
    with pytest.raises(UserError, match="is no token cache"):
        train_generator(None, tmp_path / "tokenizer", tmp_path / "other", class_recipe(4), progress=False)
    save_tokenizer(random_tokenizer(seed=3), tmp_path / "tokenizer2")
    with pytest.raises(UserError, match="made with another tokenizer"):
        train_generator(None, tmp_path / "tokenizer2", tmp_path / "other", class_recipe(4), **options)  # type: ignore[arg-type]
