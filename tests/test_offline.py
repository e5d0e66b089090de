"""Offline batches: what a file of prompts may hold, what is made of it, and what a second run still makes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hartist import Pipeline
from hartist.cli import main
from hartist.errors import UserError
from hartist.generation.offline import Manifest, batches
from hartist.generation.offline_plan import FIELDS, Defaults, Picture, read_plan
from hartist.generation.png import read_metadata
from tiny import write_tiny_class_model, write_tiny_text_model

LINES = (
    {"prompt": "a red apple", "seed": 5, "n": 2},
    {"prompt": "a cat", "id": "cat", "guidance": 2},
    {"prompt": "a green apple", "seed": 1, "negative_prompt": "red", "top_k": 3},
    {"prompt": "a cat on a table"},
)
NAMES = ["000001_seed5.png", "000001_seed6.png", "000003_seed1.png", "000005_seed0.png", "cat_seed0.png"]
"""Of `write_lines(LINES)`, in order of the alphabet; line 4 is blank."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "tiny")


def write_lines(path: Path, lines: Any = LINES, blank_before: int = 3) -> Path:
    text = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    text.insert(blank_before, "")
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def generate(model: Path, file: Path, out: Path, *flags: object) -> int:
    return main(
        ["generate", "--prompts", str(file), "-o", str(out), "--model", str(model), "--quiet", *map(str, flags)]
    )


def entries(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def failure(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line that a run ends with which can't be done."""
    assert generate(*arguments) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"hartist: error: [^\n]+\n", message)
    return message


# --- what is made ---------------------------------------------------------------------------------


def test_every_line_becomes_its_pictures_and_the_manifest_tells_all(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out"
    assert generate(model, file, out, "--top-p", 0.9) == 0
    assert "5 pictures made, 0 were there" in capsys.readouterr().out
    assert list(pictures(out)) == NAMES
    listed = {entry["file"]: entry for entry in entries(out)}
    assert sorted(listed) == NAMES
    for name, entry in listed.items():
        made = read_metadata(out / name)
        assert {key: entry[key] for key in made} == made
        assert entry["sha256"] == hashlib.sha256((out / name).read_bytes()).hexdigest()
        assert (made["settings"]["top_p"], entry["truncated_tokens"]) == (0.9, 0)
        assert entry["seconds"] > 0
    assert (listed["cat_seed0.png"]["id"], listed["cat_seed0.png"]["line"]) == ("cat", 2)
    assert listed["cat_seed0.png"]["settings"]["guidance"] == 2
    third = listed["000003_seed1.png"]
    assert (third["negative_prompt"], third["settings"]["top_k"], third["settings"]["guidance"]) == ("red", 3, 3.0)


def test_a_picture_is_the_one_that_generate_makes(model: Path, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a red apple", "seed": 5, "guidance": 2}])
    assert generate(model, file, tmp_path / "out") == 0
    alone = Pipeline.from_pretrained(model)("a red apple", seed=5, guidance=2.0)[0]
    assert read_metadata(tmp_path / "out" / "000001_seed5.png")["seed"] == 5
    with Image.open(tmp_path / "out" / "000001_seed5.png") as image:
        assert image.tobytes() == alone.tobytes()


def test_flags_stand_for_what_lines_leave_open(model: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "a cat", "guidance": 1}, {"prompt": "a cat", "negative_prompt": "", "seed": None}]
    file = write_lines(tmp_path / "prompts.jsonl", lines)
    flags = ["-n", 2, "--seed", 9, "--guidance", 4, "--negative-prompt", "red"]
    assert generate(model, file, tmp_path / "out", *flags) == 0
    listed = {entry["file"]: entry for entry in entries(tmp_path / "out")}
    assert sorted(listed) == ["000001_seed10.png", "000001_seed9.png", "000002_seed10.png", "000002_seed9.png"]
    first, second = listed["000001_seed9.png"], listed["000002_seed9.png"]
    assert (first["settings"]["guidance"], first["negative_prompt"]) == (1, "red")
    assert (second["settings"]["guidance"], second["negative_prompt"]) == (4, None)


# --- going on -------------------------------------------------------------------------------------


def test_the_same_command_again_makes_nothing_and_loads_no_model(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out"
    assert generate(model, file, out) == 0
    before = (out / "manifest.jsonl").read_bytes()
    monkeypatch.delattr(Pipeline, "from_pretrained")
    assert generate(model, file, out) == 0
    assert "0 pictures made, 5 were there" in capsys.readouterr().out
    assert (out / "manifest.jsonl").read_bytes() == before


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_is_lost_or_damaged_is_made_again_to_the_bit(model: Path, tmp_path: Path, size: int) -> None:
    file, out = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out"
    assert generate(model, file, out, "--batch-size", size) == 0
    whole = pictures(out)
    (out / "000001_seed6.png").unlink()
    (out / "cat_seed0.png").write_bytes(whole["cat_seed0.png"][:-20])
    lines = (out / "manifest.jsonl").read_bytes().splitlines(keepends=True)
    torn = next(line for line in lines if b"000005_seed0.png" in line)
    kept = [line for line in lines if line is not torn]
    (out / "manifest.jsonl").write_bytes(b"".join(kept) + torn[:-30])
    assert generate(model, file, out, "--batch-size", size) == 0
    assert pictures(out) == whole
    assert len(entries(out)) == len(kept) + 3  # one line a picture made, none of them torn


def test_an_interrupted_run_leaves_whole_pictures_and_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "prompts.jsonl")
    assert generate(model, file, tmp_path / "whole", "--batch-size", 1) == 0
    decode, calls = Pipeline.decode, []

    def interrupted(self: Pipeline, f_hat: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, f_hat)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "decode", interrupted)
        assert generate(model, file, out, "--batch-size", 1) == 130
    assert len(pictures(out)) == len(entries(out)) == 2
    assert generate(model, file, out, "--batch-size", 1) == 0
    assert pictures(out) == pictures(tmp_path / "whole")
    assert len(calls) == 3


def test_another_request_or_model_under_the_same_name_is_made_anew(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a cat"}, {"prompt": "red"}])
    assert generate(model, file, out) == 0
    write_lines(file, [{"prompt": "a cat"}, {"prompt": "green"}])
    assert generate(model, file, out) == 0
    assert "1 pictures made, 1 were there" in capsys.readouterr().out
    assert generate(model, file, out, "--guidance", 1) == 0
    assert "2 pictures made" in capsys.readouterr().out
    other = write_tiny_text_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"name": "other"}))
    assert generate(other, file, out, "--guidance", 1) == 0
    assert "2 pictures made" in capsys.readouterr().out


@given(st.integers(1, 5), st.lists(st.sampled_from(["x", "y"]), min_size=1, max_size=12), st.data())
def test_batches_cover_what_is_missing_and_depend_on_the_plan_alone(
    size: int, prompts: list[str], data: st.DataObject
) -> None:
    plan = [
        Picture(f"{i}.png", i, None, prompt, 0, None, (("guidance", float(prompt == "x")),))
        for i, prompt in enumerate(prompts)
    ]
    missing = data.draw(st.sets(st.sampled_from(plan)))
    full, part = batches(plan, plan, size), batches(plan, missing, size)
    assert {file for batch in part for file in batch.wanted} == {picture.file for picture in missing}
    assert {batch.pictures for batch in part} <= {batch.pictures for batch in full}
    assert sorted(picture.line for batch in full for picture in batch.pictures) == list(range(len(plan)))
    for batch in full:
        assert len(batch.pictures) <= size
        assert len({picture.changes for picture in batch.pictures}) == 1


# --- what can't be done ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "no JSON"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "no JSON"),
        ('{"seed": ' + "1" * 5000 + "}", "no JSON"),
        ({}, "no prompt"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": ["a"]}, "prompt is ['a']; give a text"),
        ({"prompt": True}, "prompt is True"),
        ('{"prompt": "\\ud800"}', "no UTF-8"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt is 3; give a text"),
        ({"prompt": "a", "colour": "red"}, "unknown field 'colour'"),
        ({"prompt": "a", "seed": 1.5}, "seed is 1.5; give a whole number"),
        ({"prompt": "a", "seed": 2**64}, "does not fit into 64 bits"),
        ({"prompt": "a", "seed": 2**64 - 1, "n": 2}, "does not fit into 64 bits"),
        ({"prompt": "a", "n": 0}, "n is 0"),
        ({"prompt": "a", "n": 10**9}, "n is 1000000000"),
        ({"prompt": "a", "n": True}, "n is True"),
        ({"prompt": "a", "guidance": "high"}, "guidance is 'high'; give a number"),
        ({"prompt": "a", "guidance": 101}, "guidance 101.0 is outside"),
        ({"prompt": "a", "guidance": 10**400}, "too large"),
        ('{"prompt": "a", "guidance": NaN}', "guidance nan is outside"),
        ({"prompt": "a", "top_k": 2.5}, "top_k is 2.5; give a whole number"),
        ({"prompt": "a", "residual": 1}, "residual is 1; give true or false"),
        ({"prompt": "a", "id": "../../x"}, "makes no file name"),
        ({"prompt": "a", "id": ""}, "makes no file name"),
        ({"prompt": "a", "id": "ONE"}, "line 1 asks for"),
    ],
)
def test_a_broken_line_is_named_before_anything_starts(
    line: Any, part: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a", "id": "one"}, line], blank_before=1)
    message = failure(capsys, model, file, tmp_path / "out")
    assert f"{file} line 3: " in message
    assert part in message
    assert not (tmp_path / "out").exists()


def test_all_broken_lines_are_counted(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "prompts.jsonl", ["x", {"prompt": "a"}, "y", "z", "w", "v"], blank_before=6)
    with pytest.raises(UserError, match=r"line 1: no .*; line 3: no .*; line 4: no .*; and 2 more broken lines"):
        read_plan(file, Defaults())


@given(
    st.dictionaries(st.sampled_from(FIELDS), st.none() | st.booleans() | st.integers() | st.floats() | st.text())
    | st.recursive(st.none() | st.text() | st.floats(), st.lists)
)
def test_any_line_is_understood_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(value), encoding="utf-8")
    try:
        plan = read_plan(file, Defaults())
    except UserError:
        return
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+\.png", picture.file) for picture in plan)


def test_a_line_the_model_cannot_serve_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = write_tiny_class_model(tmp_path / "classes")
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": 3}, {"prompt": "5"}])
    assert "line 2: '5' is not a class of this model" in failure(capsys, classes, file, tmp_path / "out")
    assert pictures(tmp_path / "out") == {}
    write_lines(file, [{"prompt": 3}, {"prompt": 4}, {"prompt": 4, "guidance_by_scale": [1.0] * 99}])
    assert "line 3: guidance by scale has 99 numbers" in failure(capsys, classes, file, tmp_path / "out")
    assert pictures(tmp_path / "out") == {}
    write_lines(file, [{"prompt": 3}, {"prompt": "4"}])
    assert generate(classes, file, tmp_path / "out") == 0
    assert len(pictures(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--save-scales"], "--save-scales"),
        (["--size", "32"], "--size"),
        (["--prompts-file", "x"], "--prompts-file"),
        (["--processes", "0"], "--processes 0 is out of range"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["-n", "0"], "--num-images 0 is out of range"),
        (["a cat"], "prompts as arguments"),
    ],
)
def test_flags_that_make_no_sense_here(
    flags: list[str], part: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in failure(capsys, model, write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out", *flags)


def test_processes_are_for_offline_batches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--processes", "2"]) == 2
    assert "--prompts" in capsys.readouterr().err


def test_files_that_are_no_prompts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in failure(capsys, model, tmp_path / "none.jsonl", tmp_path / "out")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    assert "UTF-8" in failure(capsys, model, tmp_path / "bytes.jsonl", tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    assert "holds no prompts" in failure(capsys, model, tmp_path / "empty.jsonl", tmp_path / "out")


def test_what_is_no_manifest_is_left_alone(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.png"}\nmine\n')
    message = failure(capsys, model, write_lines(tmp_path / "prompts.jsonl"), tmp_path)
    assert "manifest.jsonl line 2 is no entry" in message
    assert (tmp_path / "manifest.jsonl").read_text().endswith("mine\n")


def test_many_processes_without_ray_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    file = write_lines(tmp_path / "prompts.jsonl")
    assert "pip install 'hartist[ray]'" in failure(capsys, model, file, tmp_path / "out", "--processes", 2)


def test_a_full_disk_leaves_what_is_finished(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, add = write_lines(tmp_path / "prompts.jsonl"), tmp_path / "out", Manifest.add
    written: list[str] = []

    def full(self: Manifest, made: Any, fingerprint: str) -> None:
        if len(written) == 2:
            raise UserError("cannot write: no space left")
        written.append(made.picture.file)
        add(self, made, fingerprint)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "add", full)
        assert "no space left" in failure(capsys, model, file, out)
    assert sorted(written) == list(pictures(out)) == sorted(entry["file"] for entry in entries(out))
