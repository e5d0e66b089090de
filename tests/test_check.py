"""`hartist check`: the implementation against the authors' numbers, and the check against broken sets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hartist.errors import UserError
from hartist.interop.check import TOLERANCE, CheckReport, CheckRow, check_folder, format_report

PARITY = Path(__file__).parent / "parity"
SETS = ["hart", "hart_no_modulation", "var", "release_layout"]


def row(report: CheckReport, quantity: str) -> CheckRow:
    return next(row for row in report.rows if row.quantity == quantity)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """A writable copy of a set."""

    def make(name: str) -> Path:
        return Path(shutil.copytree(PARITY / name, tmp_path / name))

    return make


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", SETS)
def test_every_key_of_every_set_is_covered_and_passes(name: str) -> None:
    report = check_folder(PARITY / name)
    failed = [row for row in report.rows if not row.passed]
    assert report.passed, format_report(report)
    assert not failed
    compared = [key for row in report.rows for key in row.keys]
    assert sorted([*compared, *report.inputs]) == sorted(load_file(PARITY / name / "expected.safetensors"))


def test_differences_are_those_of_rounding_not_of_the_tolerance() -> None:
    for name in SETS:
        for found in check_folder(PARITY / name).rows:
            assert found.max_difference <= 0.1 * found.tolerance, (name, found)


@pytest.mark.parametrize(
    ("name", "file", "key", "quantity"),
    [
        ("hart", "transformer.safetensors", "blocks.1.attn.proj.weight", "ar.cfg_logits"),
        ("hart", "transformer.safetensors", "diffloss.net.final_layer.linear.weight", "diff.out"),
        ("hart", "tokenizer.safetensors", "vae.decoder.conv_out.bias", "tok.continuous_image"),
        ("var", "transformer.safetensors", "blocks.0.attn.scale_mul_1H11", "train.logits"),
    ],
)
def test_a_changed_weight_fails(copy: Callable, name: str, file: str, key: str, quantity: str) -> None:
    folder = copy(name)
    edit(folder / file, lambda tensors: tensors[key].mul_(1.05))
    report = check_folder(folder)
    assert not report.passed
    assert not row(report, quantity).passed
    assert "FAILED" in format_report(report)


def test_not_a_number_fails(copy: Callable) -> None:
    folder = copy("hart")
    edit(folder / "transformer.safetensors", lambda tensors: tensors["head.bias"].fill_(torch.nan))
    report = check_folder(folder)
    assert not row(report, "ar.cfg_logits").passed
    assert not row(report, "train.logits").passed


@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (1.1, False)])
def test_the_tolerance_is_relative_to_the_largest_expected_value(copy: Callable, share: float, passes: bool) -> None:
    folder = copy("var")

    def change(tensors: dict[str, Tensor]) -> None:
        tensor = tensors["ar.fhat"]
        largest = tensor.abs().max()
        smallest = tensor.abs().argmin()
        tensor.view(-1)[smallest] += share * TOLERANCE * (1 + largest)

    edit(folder / "expected.safetensors", change)
    assert check_folder(folder).passed is passes


def test_one_wrong_id_fails(copy: Callable) -> None:
    folder = copy("var")
    edit(folder / "expected.safetensors", lambda tensors: tensors["tok.ids.3"][0, 7].add_(1))
    found = row(check_folder(folder), "tok.ids")
    assert (found.kind, found.max_difference, found.passed) == ("ids", 1.0, False)


@pytest.mark.parametrize("key", ["ar.surprise", "tok.ids.17", "ar.diffusion_noise.40"])
def test_an_unknown_key_is_a_failure(copy: Callable, key: str) -> None:
    folder = copy("hart")
    edit(folder / "expected.safetensors", lambda tensors: tensors.update({key: torch.zeros(3)}))
    report = check_folder(folder)
    assert not report.passed
    assert [found.note for found in report.rows if key in found.keys] == ["not understood"]


def test_a_key_whose_inputs_are_absent_is_a_failure(copy: Callable) -> None:
    folder = copy("hart")
    edit(folder / "expected.safetensors", lambda tensors: tensors.pop("diff.z"))
    assert not row(check_folder(folder), "diff.out").passed


def test_a_wrong_shape_fails(copy: Callable) -> None:
    folder = copy("var")
    edit(folder / "expected.safetensors", lambda tensors: tensors.update({"ar.fhat": torch.zeros(2, 8, 4, 4)}))
    found = row(check_folder(folder), "ar.fhat")
    assert not found.passed
    assert "shape" in found.note


@pytest.mark.parametrize(
    "keep",
    [
        ["tok.latent", "tok.ids.4"],
        ["diff.gen_betas"],
        ["diff.x", "diff.t", "diff.z", "diff.out"],
        ["ar.context", "ar.context_mask", "ar.context_position_ids", "ar.cfg_logits.4"],
    ],
)
def test_any_part_of_a_set_can_be_checked_alone(copy: Callable, keep: list[str]) -> None:
    folder = copy("hart")
    tensors = load_file(folder / "expected.safetensors")
    save_file({key: tensors[key] for key in keep}, folder / "expected.safetensors")
    assert check_folder(folder).passed


def test_train_works_from_given_tokenizer_outputs(copy: Callable) -> None:
    folder = copy("hart")
    names = ("ar.context", "train.", "tok.teacher", "tok.last")
    tensors = load_file(folder / "expected.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith(names)}
    save_file(kept, folder / "expected.safetensors")
    report = check_folder(folder)
    assert report.passed
    assert {found.quantity for found in report.rows} == {
        "train.logits",
        "train.diffusion_z",
        "train.diffusion_target",
    }


def test_a_set_may_name_its_guidance(copy: Callable) -> None:
    folder = copy("var")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "cfg": 1.5}))
    assert check_folder(folder).passed
    (folder / "config.json").write_text(json.dumps({**config, "cfg": 2.0}))
    assert not check_folder(folder).passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("blocks.1.scale_shift_table"),
            "missing key 'blocks.1.scale_shift_table'",
        ),
        (
            lambda tensors: tensors.pop("diffloss.net.input_proj.bias"),
            "missing key 'diffloss.net.input_proj.bias'",
        ),
        (lambda tensors: tensors.update({"head.extra": torch.zeros(1)}), "unexpected key 'head.extra'"),
        (
            lambda tensors: tensors.update({"head.bias": torch.zeros(5)}),
            r"'head.bias' is \[5\], expected \[96\]",
        ),
        (lambda tensors: tensors.pop("word_embed.weight"), "missing key 'word_embed.weight'"),
    ],
)
def test_weights_that_do_not_fit_are_named(copy: Callable, change: Callable, message: str) -> None:
    folder = copy("hart")
    edit(folder / "transformer.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        check_folder(folder)
    assert "\n" not in str(caught.value)


def test_tokenizer_keys_are_named_as_the_file_has_them(copy: Callable) -> None:
    folder = copy("hart")
    edit(
        folder / "tokenizer.safetensors",
        lambda tensors: tensors.pop("vae.quantize.quant_resi.qresi_ls.2.bias"),
    )
    with pytest.raises(UserError, match=r"'vae\.quantize\.quant_resi\.qresi_ls\.2\.bias'"):
        check_folder(folder)


def test_a_folder_that_is_no_check_set_is_named(tmp_path: Path, copy: Callable) -> None:
    with pytest.raises(UserError, match=r"no expected\.safetensors"):
        check_folder(tmp_path)
    folder = copy("var")
    (folder / "config.json").write_text('{"tokenizer": {}}')
    with pytest.raises(UserError, match="no entries 'tokenizer' and 'transformer'"):
        check_folder(folder)
    (folder / "expected.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        check_folder(folder)


def test_the_report_has_one_line_a_quantity() -> None:
    report = check_folder(PARITY / "hart")
    text = format_report(report)
    for found in report.rows:
        assert sum(line.split()[0] == found.quantity for line in text.splitlines()[1:]) == 1
    assert "ar.cfg_logits (5 scales)" in text
    assert text.endswith("28 quantities, 28 inputs: all passed")
