"""The command line: what it writes, what it says, and how it fails."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import hartist
from hartist import Pipeline
from hartist.cli import build_parser, main, one_line
from hartist.commands import info as info_command
from hartist.commands import train as train_command
from hartist.commands.generate import image_name
from hartist.commands.output import SHEET_LIMIT, ContactSheet, slug
from hartist.errors import UserError
from hartist.generation.checkpoint import LoadedModel, save_model
from hartist.generation.pipeline import Generated
from hartist.generation.png import encode_png, read_metadata
from hartist.generation.sampling import SamplingSettings
from hartist.presets import PRESETS
from tiny import (
    NUM_CLASSES,
    SETTINGS,
    SIDES,
    SIZE,
    class_config,
    tiny_tokenizer,
    tiny_transformer,
    write_tiny_class_model,
    write_tiny_text_model,
)

PARITY = Path(__file__).parent / "parity"
COMMANDS = ("generate", "reconstruct", "info", "convert", "check", "data", "train", "bench")
EVERY_HELP = [
    [],
    *([name] for name in COMMANDS),
    ["data", "emoji"],
    ["data", "check"],
    ["data", "cache"],
    ["train", "tokenizer"],
    ["train", "generator"],
    ["train", "finetune"],
    ["evaluate", "tokenizer"],
    ["evaluate", "reconstruct"],
    ["evaluate", "emoji"],
    ["evaluate", "align"],
    ["evaluate", "model"],
    ["compare"],
    ["report"],
]


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("cli") / "text")


@pytest.fixture(scope="module")
def class_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_class_model(tmp_path_factory.mktemp("cli") / "class")


@pytest.fixture(scope="module")
def var_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class model without residual tokens, of a form that VAR's files can hold."""
    directory = tmp_path_factory.mktemp("cli") / "var-like"
    parts = tiny_tokenizer(stem=1), tiny_transformer(class_config(residual=False))
    save_model(LoadedModel(*parts, None, "var-like", SETTINGS), directory)
    return directory


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must succeed; returns what it printed."""
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must end in one line on stderr and exit code 2; returns the line."""
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert re.fullmatch(r"hartist: error: [^\n]+\n", output.err)
    return output.err


def subprocess_environment() -> dict[str, str]:
    source = str(Path(hartist.__file__).parent.parent)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**kept, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


# --- help -----------------------------------------------------------------------------------------


def test_the_parser_imports_nothing_heavy() -> None:
    heavy = "torch transformers PIL numpy safetensors tqdm jaxtyping huggingface_hub"
    program = (
        "import sys\n"
        "from hartist.cli import build_parser\n"
        "build_parser().format_help()\n"
        f"print([name for name in {heavy.split()!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=subprocess_environment(), check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", EVERY_HELP, ids=" ".join)
def test_every_help_has_examples_that_parse(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 110
    _, found, examples = text.partition("examples:\n")
    assert found
    for line in re.sub(r"\\\n\s+", "", examples.strip()).splitlines():
        example = re.split(r"\s{2,}", line.strip())[0]  # what it does stands behind it
        words = shlex.split(example)
        if words[0] == "torchrun":
            words = words[words.index("hartist") :]
        assert words[0] == "hartist"
        if "COMMAND" not in words:
            assert isinstance(build_parser().parse_args(words[1:]), argparse.Namespace)


def test_every_command_is_a_module_and_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert re.search(rf"^ +{name}\b", text, re.MULTILINE)
        assert (Path(hartist.__file__).parent / "commands" / f"{name}.py").is_file()


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate", "--seed", "x"], ["generate", "--sed", "1"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: hartist" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"hartist {hartist.__version__}"


# --- generate: what it writes ---------------------------------------------------------------------


def test_generate_writes_names_metadata_and_a_contact_sheet(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    arguments = ["generate", "a red apple, 3d", "A CAT!", "-n", 2, "--seed", 7, "-o", out, "--model", text_model]
    printed = run(capsys, *arguments, "--negative-prompt", "flat", "--guidance", "2.5", "--top-k", "0")
    names = [
        "000_a-red-apple-3d_seed7.png",
        "001_a-red-apple-3d_seed8.png",
        "002_a-cat_seed7.png",
        "003_a-cat_seed8.png",
        "contact_sheet.png",
    ]
    assert sorted(path.name for path in out.iterdir()) == names
    assert printed.splitlines() == [str(out / name) for name in names]
    for name, prompt, seed in zip(names, ["a red apple, 3d"] * 2 + ["A CAT!"] * 2, [7, 8, 7, 8], strict=False):
        assert read_metadata(out / name) == {
            "prompt": prompt,
            "negative_prompt": "flat",
            "seed": seed,
            "model": "tiny-text",
            "settings": {**vars(SETTINGS), "guidance": 2.5, "top_k": 0},
            "hartist": hartist.__version__,
        }
        with Image.open(out / name) as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.size == (2 * SIZE + 4, 2 * SIZE + 4)
        corners = [(0, 0), (SIZE + 4, 0), (0, SIZE + 4), (SIZE + 4, SIZE + 4)]
        for name, (x, y) in zip(names, corners, strict=False):
            assert sheet.crop((x, y, x + SIZE, y + SIZE)).tobytes() == Image.open(out / name).tobytes()


def test_metadata_is_enough_to_make_the_image_again(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(capsys, "generate", "a green cat", "--seed", -3, "-o", tmp_path, "--model", text_model, "--smoothing")
    known = read_metadata(path.strip())
    assert known["settings"] == {**vars(SETTINGS), "smoothing": True}  # the rest are the model's own
    pipe = Pipeline.from_pretrained(text_model, device="cpu")
    (again,) = pipe(known["prompt"], seed=known["seed"], **known["settings"])
    assert again.tobytes() == Image.open(path.strip()).tobytes()


def test_one_image_has_no_contact_sheet_and_scales_make_a_strip(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "generate", "a cat", "-o", tmp_path, "--model", text_model, "--save-scales", "--size", f"{SIZE}x{SIZE}")
    names = ["000_a-cat_seed0.png", "000_a-cat_seed0_scales.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with Image.open(tmp_path / names[0]) as image, Image.open(tmp_path / names[1]) as strip:
        assert strip.size == (len(SIDES) * (SIZE + 4) - 4, SIZE)
        parts = [strip.crop((k * (SIZE + 4), 0, k * (SIZE + 4) + SIZE, SIZE)).tobytes() for k in range(len(SIDES))]
        assert parts[-1] == image.tobytes()
        assert len(set(parts)) == len(SIDES)
    assert read_metadata(tmp_path / names[1]) == read_metadata(tmp_path / names[0])


def test_the_same_call_in_a_second_process_gives_the_same_bytes(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "a red apple, 3d", "green", "-n", "2", "--seed", "5", "--save-scales", "--threads", "1"]
    call += ["--model", str(text_model), "--device", "cpu", "-o"]
    run(capsys, *call, tmp_path / "first")
    done = subprocess.run(
        [sys.executable, "-m", "hartist", *call, str(tmp_path / "second")],
        capture_output=True,
        text=True,
        env=subprocess_environment(),
        check=True,
    )
    assert done.stderr == ""  # not a terminal, so no progress bar
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert len(first) == 9
    assert first == second
    assert done.stdout.splitlines()[-1] == str(tmp_path / "second" / "contact_sheet.png")


def test_an_image_of_a_call_is_that_of_its_own_call(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "generate", "a cat", "-n", 3, "--seed", 10, "-o", tmp_path / "a", "--model", text_model)
    run(capsys, "generate", "a cat", "--seed", 12, "-o", tmp_path / "b", "--model", text_model)
    together = np.asarray(Image.open(tmp_path / "a" / "002_a-cat_seed12.png")).astype(int)
    alone = np.asarray(Image.open(tmp_path / "b" / "000_a-cat_seed12.png")).astype(int)
    assert abs(together - alone).max() <= 1


def test_prompts_come_from_a_file_or_stdin_too(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa cat\r\n\n  green table  \n".encode())
    printed = run(capsys, "generate", "red", "--prompts-file", file, "-o", tmp_path / "o", "--model", text_model)
    names = ["000_red_seed0.png", "001_a-cat_seed0.png", "002_green-table_seed0.png", "contact_sheet.png"]
    assert [Path(line).name for line in printed.splitlines()] == names
    monkeypatch.setattr(sys, "stdin", open(file, encoding="utf-8-sig"))  # noqa: SIM115
    printed = run(capsys, "generate", "--prompts-file", "-", "-o", tmp_path / "p", "--model", text_model)
    assert len(printed.splitlines()) == 3


def test_a_prompt_that_does_not_fit_is_announced_once(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["generate", "word " * 15, "a cat", "-n", "2", "-o", str(tmp_path), "--model", str(text_model)]
    assert main([*call, "--negative-prompt", "flat " * 11]) == 0
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert "last 5 tokens of 'word word" in warnings[0]
    assert "last 1 tokens of 'flat flat" in warnings[1]


def test_class_numbers_are_prompts_of_a_class_model(
    class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "generate", "3", "0", "-o", tmp_path, "--model", class_model, "--no-residual", "--temperature", 0)
    assert (tmp_path / "000_3_seed0.png").is_file()
    assert read_metadata(tmp_path / "001_0_seed0.png")["settings"]["residual"] is False
    for label in ("5", "-1", "cat"):
        message = fail(capsys, "generate", "-o", tmp_path / "no", "--model", class_model, "--", label)
        assert f"0 to {NUM_CLASSES - 1}" in message
    assert not (tmp_path / "no").exists()


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.integers(-(2**63), 2**64))
def test_names_are_safe_bounded_and_never_collide(prompts: list[str], seed: int) -> None:
    items = [Generated(Image.new("RGB", (1, 1)), p, None, seed, SamplingSettings(), "m") for p in prompts]
    names = [image_name(i, len(items), item) for i, item in enumerate(items)]
    assert len(set(names)) == len(names)
    assert sorted(names) == names
    for name in names:
        assert re.fullmatch(r"\d{3,}_[a-z0-9]+(-[a-z0-9]+)*_seed-?\d+\.png", name)
        assert len(name) <= 100
        assert Path(name).name == name


def test_slugs() -> None:
    assert slug("A red apple, 3D") == "a-red-apple-3d"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("Crème brûlée") == "creme-brulee"
    assert slug("猫 🍎") == slug("") == slug("...") == "image"
    assert slug("word " * 1000) == "-".join(["word"] * 8)
    assert len(slug("x" * 1000)) == 40


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from([(32, 32), (1024, 1024), (512, 2048)]))
def test_contact_sheets_hold_all_images_within_their_limit(prompts: int, each: int, size: tuple[int, int]) -> None:
    sheet = ContactSheet(prompts, each, size)
    assert max(sheet.image.size) <= SHEET_LIMIT + 4
    image = Image.new("RGB", size, "black")
    for _ in range(prompts * each if prompts * each < 10 else 0):
        sheet.add(image)
    width, height = sheet.image.size
    rows = (height + 4) // (sheet.cell[1] + 4)
    assert sheet.columns * rows >= prompts * each > sheet.columns * (rows - 1)
    assert (width + 4) // (sheet.cell[0] + 4) == sheet.columns
    if 1 < prompts * each < 10:
        pixels = np.asarray(sheet.image)
        assert (pixels == 0).all(-1).sum() == prompts * each * sheet.cell[0] * sheet.cell[1]


# --- PNG metadata ---------------------------------------------------------------------------------


def test_metadata_survives_any_text(tmp_path: Path) -> None:
    values = {"prompt": "猫\n\0 🍎 \x1b[31m", "seed": -(2**62), "settings": {"top_k": None}}
    data = encode_png(Image.new("RGB", (3, 2), "red"), values)
    (tmp_path / "a.png").write_bytes(data)
    assert read_metadata(tmp_path / "a.png") == values
    assert data == encode_png(Image.new("RGB", (3, 2), "red"), values)


@pytest.mark.parametrize("content", [None, b"", b"text", "plain", "list", "broken"])
def test_files_without_metadata_are_named(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "image.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        data = encode_png(Image.new("RGB", (300, 300), "red"), {"seed": 1} if content == "broken" else None)
        path.write_bytes(data[:-30] if content == "broken" else data)
    if content == "list":
        chunk = PngImagePlugin.PngInfo()
        chunk.add_text("hartist", "[1]")
        Image.new("RGB", (3, 3)).save(path, pnginfo=chunk)
    with pytest.raises(UserError, match=r"image\.png"):
        read_metadata(path)


# --- generate: how it fails -----------------------------------------------------------------------


def _truncated(model: Path, tmp_path: Path) -> list[object]:
    copy = tmp_path / "truncated"
    shutil.copytree(model, copy)
    weights = copy / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return ["--model", copy]


def _foreign(model: Path, tmp_path: Path) -> list[object]:
    copy = tmp_path / "foreign"
    copy.mkdir()
    (copy / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": torch.zeros(1)}, copy / "model.safetensors")
    return ["--model", copy]


def _other_kind(model: Path, tmp_path: Path) -> list[object]:
    copy = tmp_path / "mixed"
    shutil.copytree(model, copy)
    shutil.copy(copy / "tokenizer" / "config.json", copy / "transformer" / "config.json")
    return ["--model", copy]


def _pickle(model: Path, tmp_path: Path) -> list[object]:
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "was-run",)

    torch.save({"weights": Payload()}, tmp_path / "var.pth")
    return ["--model", tmp_path / "var.pth"]


def _regular_file(model: Path, tmp_path: Path) -> list[object]:
    (tmp_path / "file").write_text("x")
    return ["--model", model, "-o", tmp_path / "file" / "deep" / "out"]


def _prompts_of(data: bytes) -> object:
    def write(model: Path, tmp_path: Path) -> list[object]:
        (tmp_path / "prompts.txt").write_bytes(data)
        return ["--model", model, "--prompts-file", tmp_path / "prompts.txt"]

    return write


PROMPT = ["a cat"]
BAD_CALLS = {
    "unknown model": (PROMPT, ["--model", "no-such-model"], "no-such-model"),
    "endless model name": (PROMPT, ["--model", "x" * 5000], "no model"),
    "truncated weights": (PROMPT, _truncated, "truncated/transformer/model.safetensors"),
    "foreign checkpoint": (PROMPT, _foreign, "foreign is not a model"),
    "config of another kind": (PROMPT, _other_kind, "does not describe a Hartist transformer"),
    "pickle with code": (PROMPT, _pickle, "more than plain data"),
    "no prompt": ([], [], "no prompt"),
    "empty prompt": ([""], [], "prompt is empty"),
    "one empty among others": (["a cat", " \n"], [], "prompt is empty"),
    "endless prompt": (["word " * 10_000], [], "the prompt has 50000 characters"),
    "endless negative prompt": (PROMPT, ["--negative-prompt", "x" * 20_001], "the negative prompt has 20001"),
    "bytes that are no text": (["cat \udcff"], [], r"'cat \udcff'"),
    "out below a file": (PROMPT, _regular_file, "file/deep/out"),
    "endless out": (PROMPT, ["-o", "x" * 5000], "name too long"),
    "size not in the schedule": (PROMPT, ["--size", "48"], "8x8, 16x16, 24x24, 32x32 pixels"),
    "size of an early scale": (PROMPT, ["--size", "16x16"], "use --size 32x32"),
    "size of wrong shape": (PROMPT, ["--size", "32x16"], "use --size 32x32"),
    "size that is none": (PROMPT, ["--size", "big"], "'big'"),
    "unknown device": (PROMPT, ["--device", "quantum"], "'quantum'"),
    "absent device": (PROMPT, ["--device", "cuda:63"], "'cuda:63'"),
    "unknown dtype": (PROMPT, ["--dtype", "int3"], "'int3'"),
    "negative n": (PROMPT, ["-n", "-4"], "-4 images"),
    "no images": (PROMPT, ["-n", "0"], "0 images"),
    "too many images": (PROMPT, ["-n", "1000000000"], "at most 10000"),
    "seed beyond 64 bits": (PROMPT, ["--seed", str(2**64)], "64 bits"),
    "no batch": (PROMPT, ["--batch-size", "0"], "batch size 0"),
    "no threads": (PROMPT, ["--threads", "0"], "0 threads"),
    "guidance": (PROMPT, ["--guidance", "-1"], "guidance -1"),
    "guidance that is none": (PROMPT, ["--guidance", "nan"], "guidance nan"),
    "top-k": (PROMPT, ["--top-k", "-1"], "top-k -1"),
    "top-p": (PROMPT, ["--top-p", "2"], "top-p 2"),
    "temperature": (PROMPT, ["--temperature", "-1"], "temperature -1"),
    "diffusion steps": (PROMPT, ["--diffusion-steps", "0"], "0 diffusion steps"),
    "absent prompts file": ([], ["--prompts-file", "absent.txt"], "absent.txt"),
    "empty prompts file": ([], _prompts_of(b"\n \n"), "no prompt"),
    "binary prompts file": ([], _prompts_of(b"\xff\xfe\x00"), "prompts.txt"),
    "absent decoder for a model": (PROMPT, ["--tokenizer", "vae.pth"], "vae.pth"),
    "text model for one that has its own": (PROMPT, ["--text-model", "qwen"], "has its own text model"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, extra, expected = BAD_CALLS[case]
    monkeypatch.chdir(tmp_path)
    flags = extra(text_model, tmp_path) if callable(extra) else extra
    before = sorted(tmp_path.rglob("*"))
    message = fail(capsys, "generate", "-o", "out", "--model", text_model, *flags, "--", *prompts)
    assert expected in message
    assert len(message) < 700
    assert sorted(tmp_path.rglob("*")) == before


TOLD_EARLY = ["out below a file", "negative n", "too many images", "no prompt", "top-p", "no threads"]


@pytest.mark.parametrize("case", TOLD_EARLY)
def test_what_needs_no_model_is_told_before_it_is_loaded(
    case: str, text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> Pipeline:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", load)
    prompts, extra, expected = BAD_CALLS[case]
    flags = extra(text_model, tmp_path) if callable(extra) else extra
    assert expected in fail(capsys, "generate", "-o", tmp_path / "out", *flags, "--", *prompts)


def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = fail(capsys, "generate", "a cat", "-o", tmp_path / "out", "--model", text_model)
    assert "No space left on device" in message
    assert "000_a-cat_seed0.png" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_call_leaves_finished_images_only(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = Pipeline.decode, []

    def interrupted(self: Pipeline, f_hat: torch.Tensor) -> list[Image.Image]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, f_hat)

    monkeypatch.setattr(Pipeline, "decode", interrupted)
    call = ["generate", "a cat", "-n", "4", "--batch-size", "1", "-o", str(tmp_path), "--model", str(text_model)]
    assert main(call) == 130
    assert capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000_a-cat_seed0.png", "001_a-cat_seed1.png"]


# --- errors in general ----------------------------------------------------------------------------


def _raise(error: BaseException) -> object:
    def run_(_: argparse.Namespace) -> int:
        raise error

    return run_


def test_errors_of_every_kind(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(error: BaseException) -> tuple[int, str]:
        monkeypatch.setattr(info_command, "run", _raise(error))
        return main(["info"]), capsys.readouterr().err

    assert outcome(UserError("a\nb\x1b[31m\r\udcff é")) == (2, "hartist: error: a\\nb\\x1b[31m\\r\\udcff é\n")
    assert outcome(KeyboardInterrupt()) == (130, "")
    assert outcome(BrokenPipeError(errno.EPIPE, "gone")) == (141, "")
    full = OSError(errno.ENOSPC, "No space left on device", "/some/file")
    assert outcome(full) == (2, "hartist: error: /some/file: No space left on device\n")
    for bug in (ValueError("a bug"), OSError("a library's own"), AssertionError()):
        with pytest.raises(type(bug)):
            outcome(bug)


@given(st.text())
def test_messages_are_one_printable_line(text: str) -> None:
    line = one_line(text)
    assert len(f"{line}.".splitlines()) == 1
    assert len(line) <= 600
    assert line.isprintable()
    if text.isprintable():
        assert line == text
    long = one_line(f"start {text * 1000}{'x' * 700} end")
    assert len(long) == 600
    assert long.startswith("start ")
    assert long.endswith("x end")


def test_a_closed_pipe_and_a_full_stdout_are_no_tracebacks() -> None:
    command = [sys.executable, "-m", "hartist", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=subprocess_environment())
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    if os.path.exists("/dev/full"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=subprocess_environment())
        assert done.returncode == 2
        assert re.fullmatch(r"hartist: error: [^\n]*No space left on device\n", done.stderr)


# --- reconstruct ----------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    noise = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    paths = [tmp_path / name for name in ("wide photo.jpg", "tall.webp", "grey.gif", "clear.png")]
    Image.fromarray(noise).save(paths[0])
    Image.fromarray(noise.transpose(1, 0, 2).copy()).save(paths[1])
    Image.fromarray(noise[..., 0]).save(paths[2])
    Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0)).save(paths[3])
    return paths


def test_reconstruct_shows_both_paths_and_their_psnr(
    text_model: Path, tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(capsys, "reconstruct", *pictures, "-o", tmp_path / "out", "--model", text_model).splitlines()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[0] == "000_wide-photo_reconstructed.png"
    assert printed[: len(pictures)] == [str(tmp_path / "out" / name) for name in names]
    rows = [line.rsplit(maxsplit=2) for line in printed if line][len(pictures) + 1 :]
    assert [row[0] for row in rows] == [*(path.name for path in pictures), "mean"]
    figures = np.array([[float(x) for x in row[1:]] for row in rows])
    np.testing.assert_allclose(figures[-1], figures[:-1].mean(0), atol=0.011)
    for i, name in enumerate(names):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size == (3 * SIZE + 8, SIZE)
            panes = [np.asarray(image).astype(float)[:, x : x + SIZE] for x in (0, SIZE + 4, 2 * SIZE + 8)]
        for column in (1, 2):
            error = ((panes[0] - panes[column]) ** 2).mean()
            assert 10 * np.log10(255**2 / error) == pytest.approx(figures[i, column - 1], abs=0.02)


def test_reconstruct_takes_a_bare_tokenizer_and_vars_autoencoder(
    text_model: Path, var_like: Path, tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(capsys, "reconstruct", pictures[0], "-o", tmp_path / "a", "--model", text_model)
    bare = run(capsys, "reconstruct", pictures[0], "-o", tmp_path / "b", "--model", text_model / "tokenizer")
    assert whole.splitlines()[1:] == bare.splitlines()[1:]
    run(capsys, "reconstruct", pictures[0], "-o", tmp_path / "c", "--model", PARITY / "release_layout")
    run(capsys, "convert", var_like, tmp_path / "var", "--to", "var")
    (vae,) = (tmp_path / "var").glob("vae*.pth")
    run(capsys, "reconstruct", pictures[0], "-o", tmp_path / "d", "--model", vae)


@pytest.mark.parametrize("case", ["text", "truncated", "absent", "folder", "unwritable", "no tokenizer"])
def test_reconstruct_refuses_bad_input(
    case: str, text_model: Path, tmp_path: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, out, model = tmp_path / "bad.png", tmp_path / "out", text_model
    if case == "text":
        bad.write_text("no picture at all")
    elif case == "truncated":
        Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(bad)
        bad.write_bytes(bad.read_bytes()[:60])
    elif case == "folder":
        bad.mkdir()
    else:
        Image.new("RGB", (9, 9)).save(bad)
        out = bad / "out" if case == "unwritable" else out
        model = tmp_path if case == "no tokenizer" else model
        bad = tmp_path / "absent.png" if case == "absent" else bad
    message = fail(capsys, "reconstruct", pictures[0], bad, "-o", out, "--model", model)
    assert str(tmp_path / "config.json" if case == "no tokenizer" else bad) in message
    assert not out.exists()


# --- info -----------------------------------------------------------------------------------------


def test_info_counts_every_parameter(text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "info", text_model, "--json"))
    pipe = Pipeline.from_pretrained(text_model, device="cpu")
    residual = sum(
        parameter.numel() for name, parameter in pipe.transformer.named_parameters() if name.startswith("residual_")
    )
    assert found["parameters"] == {
        "tokenizer": sum(p.numel() for p in pipe.tokenizer.parameters()),
        "transformer": sum(p.numel() for p in pipe.transformer.parameters()) - residual,
        "residual MLP": residual,
        "text encoder": sum(p.numel() for p in pipe.model.text_encoder.model.parameters()),  # type: ignore[union-attr]
    }
    assert found["image_size"] == [SIZE, SIZE]
    assert found["scales"] == [[side, side] for side in SIDES]
    assert (found["image_tokens"], found["codes"]) == (30, 64)
    assert (found["condition"], found["condition_size"]) == ("text", 12)
    assert found["sampling"] == vars(SETTINGS)
    assert set(found["dtypes"].values()) == {"float32"}
    text = run(capsys, "info", text_model)
    assert f"{found['parameters']['transformer']:,}" in text
    assert f"{sum(found['parameters'].values()):,}" in text


def test_info_reads_every_layout_and_preset(
    text_model: Path, class_model: Path, var_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "convert", var_like, tmp_path / "var", "--to", "var")
    (var,) = (tmp_path / "var").glob("var*.pth")
    expected = {
        text_model: ("hartist", "text"),
        class_model: ("hartist", "class"),
        text_model / "tokenizer": ("tokenizer", None),
        PARITY / "release_layout": ("release", "text"),
        var: ("var", "class"),
        "hart-1024": ("preset", "text"),
        "hart_1024": ("preset", "text"),
        "var-d16": ("preset", "class"),
    }
    for model, (layout, condition) in expected.items():
        found = json.loads(run(capsys, "info", model, "--json"))
        assert (found["layout"], found["condition"]) == (layout, condition)
        assert run(capsys, "info", model).count("\n") >= 5


def test_info_knows_the_papers_number(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "info", "hart-1024", "--json"))
    assert found["parameters"]["transformer"] + found["parameters"]["residual MLP"] == pytest.approx(732.6e6, rel=1e-4)
    assert found["image_size"] == [1024, 1024]
    assert found["image_tokens"] == 9451


def test_info_refuses_what_is_no_model(text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hart-1024" in fail(capsys, "info", "no-such-thing")  # names the presets
    assert "is not a model" in fail(capsys, "info", tmp_path)
    shutil.copytree(text_model, tmp_path / "copy")
    weights = tmp_path / "copy" / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    assert str(weights) in fail(capsys, "info", tmp_path / "copy")
    weights.unlink()
    assert "text_encoder" in fail(capsys, "info", tmp_path / "copy")


# --- convert and check ----------------------------------------------------------------------------


def pixels_of(model: Path, prompt: str | int, **options: str) -> np.ndarray:
    (image,) = Pipeline.from_pretrained(model, device="cpu", **options)(prompt, seed=3, guidance=2.0, top_k=0)
    return np.asarray(image)


def test_a_release_goes_through_our_layout_and_back_unchanged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = PARITY / "release_layout"
    run(capsys, "convert", release, tmp_path / "ours")
    run(capsys, "convert", tmp_path / "ours", tmp_path / "theirs", "--to", "release")
    np.testing.assert_array_equal(pixels_of(release, "a cat"), pixels_of(tmp_path / "ours", "a cat"))
    np.testing.assert_array_equal(pixels_of(release, "a cat"), pixels_of(tmp_path / "theirs", "a cat"))
    for name in ("expected.safetensors", "prompts.json"):
        shutil.copy(release / name, tmp_path / "theirs")
    assert "all passed" in run(capsys, "check", release, tmp_path / "theirs")


def test_a_class_model_goes_to_vars_files_and_back(
    var_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "convert", var_like, tmp_path / "var", "--to", "var")
    names = sorted(path.name for path in (tmp_path / "var").iterdir())
    assert names == ["vae_ch32v64z8.pth", "var_d1.pth"]
    run(capsys, "convert", tmp_path / "var" / names[1], tmp_path / "back")
    (tmp_path / "apart").mkdir()
    for target in ("var.pth", "tok.pth"):
        shutil.copy(tmp_path / "var" / names[target == "var.pth"], tmp_path / "apart" / target)
    apart = [tmp_path / "apart" / "var.pth", tmp_path / "again", "--tokenizer", tmp_path / "apart" / "tok.pth"]
    run(capsys, "convert", *apart)
    original = pixels_of(var_like, 2)
    for model in (tmp_path / "var" / names[1], tmp_path / "back", tmp_path / "again"):
        np.testing.assert_array_equal(pixels_of(model, 2), original)


def test_convert_keeps_or_changes_the_stored_dtype_and_the_card(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "convert", text_model, tmp_path / "half", "--dtype", "bfloat16")
    (tmp_path / "half" / "README.md").write_text("about it")
    run(capsys, "convert", tmp_path / "half", tmp_path / "copy")
    for name in ("half", "copy"):
        tensors = load_file(tmp_path / name / "transformer" / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (tmp_path / "copy" / "README.md").read_text() == "about it"


def test_convert_never_destroys(
    text_model: Path, class_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    run(capsys, "convert", class_model, tmp_path / "empty")
    run(capsys, "convert", text_model, out)
    before = sorted(tmp_path.rglob("*"))
    assert "--force" in fail(capsys, "convert", class_model, out)
    run(capsys, "convert", class_model, out, "--force")
    assert Pipeline.from_pretrained(out, device="cpu").is_class_conditional
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "me.jpg").write_text("dear")
    assert "replaces nothing else" in fail(capsys, "convert", text_model, photos, "--force")
    (out / "notes.txt").write_text("dear")
    assert "replaces nothing else" in fail(capsys, "convert", text_model, out, "--force")
    (out / "notes.txt").unlink()
    assert "which is to be converted" in fail(capsys, "convert", out, out, "--force")
    assert "which is to be converted" in fail(capsys, "convert", out, tmp_path, "--force")
    (tmp_path / "file").write_text("x")
    assert "already exists" in fail(capsys, "convert", text_model, tmp_path / "file")
    assert "file/x" in fail(capsys, "convert", text_model, tmp_path / "file" / "x")
    assert "axial" in fail(capsys, "convert", text_model, tmp_path / "new", "--to", "release")
    assert "text model" in fail(capsys, "convert", PARITY / "release_layout", tmp_path / "new", "--to", "var")
    assert "dtype" in fail(capsys, "convert", text_model, tmp_path / "new", "--dtype", "int4")
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.rglob(".*") if path not in before]


def test_check_tells_passed_failed_and_wrong_folders_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "all passed" in run(capsys, "check", PARITY / "var")
    shutil.copytree(PARITY / "var", tmp_path / "set")
    path = tmp_path / "set" / "expected.safetensors"
    expected = load_file(path)
    expected["ar.fhat"][0, 0, 0, 0] += 0.01
    save_file(expected, path)
    assert main(["check", str(PARITY / "var"), str(tmp_path / "set")]) == 1
    output = capsys.readouterr()
    assert re.search(r"ar\.fhat +1\.0e-02 .*FAILED", output.out)
    assert output.err == ""
    assert "expected.safetensors" in fail(capsys, "check", tmp_path)


# --- data, train, bench ---------------------------------------------------------------------------


def test_data_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "npm pack" in fail(capsys, "data", "emoji", tmp_path / "data", "--source", tmp_path, "-q")
    assert "size 5000" in fail(capsys, "data", "emoji", tmp_path / "data", "--size", "5000")
    (tmp_path / "file").write_text("x")
    assert "file/data" in fail(capsys, "data", "emoji", tmp_path / "file" / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_train_hands_over_the_recipe_with_its_changes(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def train(*arguments: object, **options: object) -> int:
        seen[:] = [*arguments, options]
        return 7

    monkeypatch.setattr(train_command, f"train_{stage}", train)
    call = ["train", stage, "--data", str(tmp_path / "d"), "--out", str(tmp_path / "o"), "-q"]
    extra = ["--tokenizer", str(tmp_path / "t"), "--text-encoder", str(tmp_path / "e")] if stage == "generator" else []
    changes = ["--steps", "7", "--batch-size", "3", "--seed", "5", "--learning-rate", "0.5", "--no-bf16"]
    printed = run(capsys, *call, *extra, *changes)
    data, *paths, recipe, options = seen
    assert data == str(tmp_path / "d")  # may be a Hub id
    assert paths == [tmp_path / name for name in ("to" if stage == "generator" else "o")]
    assert options["progress"] is False  # type: ignore[index]
    assert options.get("text_encoder_dir") == (tmp_path / "e" if stage == "generator" else None)  # type: ignore[attr-defined]
    config = recipe.run  # type: ignore[attr-defined]
    assert (config.steps, config.batch_size, config.seed, config.bf16) == (7, 3, 5, False)
    assert config.optimizer.learning_rate == 0.5
    assert printed.strip() == str(tmp_path / "o" / ("model" if stage == "generator" else "tokenizer"))
    assert main([*call, *extra, "--steps", "8"]) == 130
    assert "after step 7 of 8" in capsys.readouterr().out
    for flag, value in {"--steps": "0", "--batch-size": "-1", "--learning-rate": "nan", "--recipe": "magic"}.items():
        assert value in fail(capsys, *call, *extra, flag, value)


def test_train_refuses_missing_data_and_unwritable_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["train", "tokenizer", "--set", "losses.perceptual=0", "--data", tmp_path / "absent", "--out"]
    assert "metadata.jsonl" in fail(capsys, *call, tmp_path / "run")
    (tmp_path / "file").write_text("x")
    assert "file/run" in fail(capsys, *call, tmp_path / "file" / "run")
    assert not (tmp_path / "run").exists()


def test_bench_prints_and_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "tiny-preset", lambda: (tiny_tokenizer().config, class_config()))
    call = ["bench", "--preset", "tiny_preset", "--device", "cpu", "--dtype", "float32", "--batch", "2"]
    assert "tiny-preset" in run(capsys, *call, "--json", tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert len(found["scales"]) == len(SIDES)
    assert found["total_seconds"] > 0
    assert "no-such" in fail(capsys, "bench", "--preset", "no-such")
    assert "file" in fail(capsys, *call, "--json", tmp_path / "bench.json" / "file")
