"""Files: what is written is complete or not there, and what is read is checked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from hartist.checkpoint import (
    assign_weights,
    check_keys,
    read_component_config,
    read_safetensors,
    read_weights,
    save_component,
    write_safetensors,
)
from hartist.config import TokenizerConfig, from_dict, to_dict
from hartist.errors import UserError
from hartist.files import (
    atomic_directory,
    atomic_path,
    read_json,
    recover_directory,
    write_bytes,
    write_json,
    write_text,
)
from hartist.generation.checkpoint import (
    LoadedModel,
    load_model,
    load_transformer,
    save_model,
    save_transformer,
)
from hartist.generation.sampling import SamplingSettings
from hartist.tokenizer.checkpoint import load_tokenizer, save_tokenizer
from small import RECTANGLES, VAR, normal, random_tokenizer, random_transformer, tokenizer_config


class Failure(Exception):
    pass


def assert_one_line(error: pytest.ExceptionInfo[UserError], *names: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(name in message for name in names), message


# --------------------------------------------------------------------- writing


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent  # or the rename might cross file systems
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise Failure

    with pytest.raises(Failure):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_first_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_bytes(tmp_path / "atomic", b"x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers(-(2**53), 2**53) | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_json_survives_the_round_trip(tmp_path: Path, value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates are no text
        return
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value


def test_an_impossible_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for write in (
        lambda target: write_text(target, "x"),
        lambda target: atomic_directory(target).__enter__(),
    ):
        with pytest.raises(UserError) as error:
            write(tmp_path / "file" / "inside")
        assert_one_line(error, "inside", "writable")


def test_a_directory_appears_whole_and_replaces_the_old_one_completely(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ({"a": "1", "sub/b": "2"}, {"a": "3"}):
        with atomic_directory(target) as temporary:
            for name, text in content.items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(text)
        found = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
        assert {name.replace(os.sep, "/"): text for name, text in found.items()} == content
        assert list(tmp_path.iterdir()) == [target]


def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("old")

    def fail() -> None:
        with atomic_directory(target) as temporary:
            (temporary / "a").write_text("half")
            raise Failure

    with pytest.raises(Failure):
        fail()
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_brings_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("old")
    plain, calls = os.replace, []

    def replace(source: Any, destination: Any) -> None:
        calls.append(destination)
        if len(calls) == failing:
            raise OSError("disk full")
        plain(source, destination)

    def write() -> None:
        with atomic_directory(target) as temporary:
            (temporary / "a").write_text("new")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UserError, match="cannot write"):
        write()
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_recovery_restores_a_missing_directory_and_clears_a_stale_backup(tmp_path: Path) -> None:
    target, backup = tmp_path / "model", tmp_path / ".model.old"
    recover_directory(target)
    assert not target.exists()
    backup.mkdir()
    (backup / "a").write_text("old")
    recover_directory(target)
    assert (target / "a").read_text() == "old"
    backup.mkdir()
    recover_directory(target)
    assert list(tmp_path.iterdir()) == [target]


# --------------------------------------------------------------------- reading


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xfe", b""])
def test_unreadable_json_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert_one_line(error, "config.json")


def test_tensors_survive_the_round_trip_and_change_their_type_on_demand(tmp_path: Path) -> None:
    tensors = {"a": normal(3, 4), "strided": normal(4, 3).T, "ids": torch.arange(5)}
    write_safetensors(tmp_path / "t.safetensors", tensors, {"note": "x"})
    for name, tensor in read_safetensors(tmp_path / "t.safetensors").items():
        assert torch.equal(tensor, tensors[name])
        assert tensor.dtype == tensors[name].dtype
    half = read_safetensors(tmp_path / "t.safetensors", torch.bfloat16)
    assert half["a"].dtype == torch.bfloat16
    assert half["ids"].dtype == torch.int64


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 10, "truncated"])
def test_a_damaged_safetensors_file_is_named(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "model.safetensors"
    if content == "truncated":
        save_file({"a": torch.zeros(100)}, path)
        path.write_bytes(path.read_bytes()[:-10])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_safetensors(path)
    assert_one_line(error, "model.safetensors")


def write_shards(directory: Path, weight_map: Any) -> None:
    save_file({"a": torch.zeros(1)}, directory / "one.safetensors")
    save_file({"b": torch.ones(2)}, directory / "two.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert {name: t.tolist() for name, t in read_weights(tmp_path).items()} == {"a": [0.0], "b": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("weight_map", "name"),
    [
        ({"a": "one.safetensors", "c": "two.safetensors"}, "'c'"),
        ({"a": "three.safetensors"}, "three.safetensors"),
        ({"a": "../one.safetensors"}, "outside"),
        (None, "weight_map"),
        ([1], "index.json"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, weight_map: Any, name: str) -> None:
    write_shards(tmp_path, weight_map)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path)
    assert_one_line(error, name)


def test_the_first_wrong_key_is_named() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for tensors, name in [
        ({"a": torch.zeros(2)}, "missing key 'b'"),
        ({**expected, "c": torch.zeros(1)}, "unexpected key 'c'"),
        ({"a": torch.zeros(2), "b": torch.zeros(4)}, "'b' is [4], expected [3]"),
    ]:
        with pytest.raises(UserError) as error:
            check_keys(expected, tensors, "somewhere")
        assert_one_line(error, "somewhere", name)
    check_keys(expected, dict(expected), "somewhere")


def test_assigned_weights_are_the_given_tensors_frozen() -> None:
    with torch.device("meta"):
        layer = nn.Linear(2, 3)
    tensors = {"weight": normal(3, 2), "bias": normal(3)}
    assign_weights(layer, tensors, "here")
    assert layer.weight.data_ptr() == tensors["weight"].data_ptr()
    assert not layer.weight.requires_grad
    assert not layer.training


# --------------------------------------------------------------------- components, models


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"format": "hartist-transformer", "version": 1}, "does not describe a Hartist tokenizer"),
        ({"version": 1}, "does not describe"),
        ({"format": "hartist-tokenizer", "version": 99}, "version 99"),
        ([], "does not describe"),
        ({"format": "hartist-tokenizer", "version": 1, "colour": 3}, "colour"),
        ({"format": "hartist-tokenizer", "version": 1, "sides": [3, 2]}, "schedule"),
    ],
)
def test_a_foreign_configuration_is_named(tmp_path: Path, values: Any, name: str) -> None:
    save_tokenizer(random_tokenizer(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert_one_line(error, name)


def test_configurations_survive_json_with_rectangles() -> None:
    config = tokenizer_config(sides=RECTANGLES)
    assert from_dict(TokenizerConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_weights_of_another_configuration_are_refused(tmp_path: Path) -> None:
    tokenizer = random_tokenizer()
    save_component(tmp_path, "tokenizer", tokenizer_config(vocab_size=33), tokenizer.state_dict())
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert_one_line(error, "quantizer.codebook", "[32, 4]", "[33, 4]")


def test_a_saved_transformer_is_the_same_transformer(tmp_path: Path) -> None:
    model = random_transformer(**VAR)
    save_transformer(model, tmp_path)
    assert read_component_config(tmp_path, "transformer")["condition"] == "class"
    loaded = load_transformer(tmp_path)
    assert loaded.config == model.config
    labels, inputs = torch.tensor([0, 7]), normal(2, 29, 4)
    hidden = [m.forward_all(inputs, m.prepare(labels)).hidden_BTD for m in (model, loaded)]
    assert torch.equal(*hidden)


def test_a_whole_model_survives_and_its_parts_must_fit(tmp_path: Path) -> None:
    chosen = SamplingSettings(guidance=2.0, top_k=9)
    model = LoadedModel(random_tokenizer(), random_transformer(**VAR), None, "small", chosen)
    save_model(model, tmp_path / "model", card="# A card\n")
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"
    loaded = load_model(tmp_path / "model")
    assert (loaded.name, loaded.settings, loaded.text_encoder) == ("small", chosen, None)
    for name, tensor in loaded.transformer.state_dict().items():
        assert torch.equal(tensor, model.transformer.state_dict()[name])
    save_tokenizer(random_tokenizer(vocab_size=16), tmp_path / "model" / "tokenizer")
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "model")
    assert_one_line(error, "vocab_size 16", "32")
