"""Released checkpoints ↔ ours: names, configurations, loading, conversion, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hartist.config import ResidualConfig, TokenizerConfig, TransformerConfig
from hartist.errors import UserError
from hartist.interop.arguments import tokenizer_values, transformer_values
from hartist.interop.build import build_tokenizer, build_transformer
from hartist.interop.configs import tokenizer_config, transformer_config
from hartist.interop.convert import (
    export_release,
    export_var,
    release_to_state,
    released_tokenizer,
    released_transformer,
    var_to_state,
)
from hartist.interop.keys import is_ignored, released_names, to_ours, to_released, transformer_rules
from hartist.interop.release import is_release, load_release
from hartist.interop.var import load_var
from hartist.scales import SIDES_256, SIDES_512, SIDES_1024
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.transformer.model import ScaleTransformer

RELEASE = Path(__file__).parent / "parity" / "release_layout"

TOKENIZER = TokenizerConfig(vocab_size=24, latent_channels=4, channels=32, channel_multipliers=(1, 2), sides=(1, 2, 4))
TEXT = TransformerConfig(
    sides=(1, 2, 4),
    vocab_size=24,
    latent_channels=4,
    context_tokens=5,
    context_dim=12,
    width=32,
    depth=2,
    heads=2,
    residual=ResidualConfig(width=16, depth=2, steps=3),
)
CLASS = dataclasses.replace(
    TEXT,
    condition="class",
    context_tokens=300,
    context_dim=1536,
    num_classes=7,
    norm="layer",
    mlp="gelu",
    modulation="adaln",
    l2_norm=True,
    positions="absolute",
    step_embedding="table",
    context_norm=False,
)
VAR = dataclasses.replace(CLASS, residual=None)

VARIANTS = {
    "text": (TOKENIZER, TEXT),
    "text, no modulation": (
        dataclasses.replace(TOKENIZER, phi_sharing=1),
        dataclasses.replace(TEXT, modulation="none", context_norm=False, step_embedding="table"),
    ),
    "text, AdaLN": (
        dataclasses.replace(TOKENIZER, phi_sharing=0, quant_conv_kernel=1, beta=0.5),
        dataclasses.replace(TEXT, modulation="adaln", pooling="mean", l2_norm=True, mlp="gelu"),
    ),
    "text, absolute": (
        dataclasses.replace(TOKENIZER, phi_sharing=3),
        dataclasses.replace(TEXT, norm="layer", positions="absolute", context_norm=False, norm_eps=1e-5),
    ),
    "class": (dataclasses.replace(TOKENIZER, phi_sharing=0, phi_per_scale_count=2), CLASS),
    "class, shared": (
        dataclasses.replace(TOKENIZER, phi_ratio=0.0),
        dataclasses.replace(CLASS, modulation="shared_adaln"),
    ),
}


def random_module(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    module = build()
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module.eval()


def random_pair(
    tokenizer: TokenizerConfig = TOKENIZER, transformer: TransformerConfig = TEXT
) -> tuple[HybridTokenizer, ScaleTransformer]:
    return (
        random_module(lambda: HybridTokenizer(tokenizer)),  # type: ignore[return-value]
        random_module(lambda: ScaleTransformer(transformer), 1),
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A writable copy of the tiny release."""
    return Path(shutil.copytree(RELEASE, tmp_path / "release"))


# --------------------------------------------------------------------------- names and configurations

text_configs = st.builds(
    lambda modulation, step, l2_norm, mlp, rope, norm, residual: dataclasses.replace(
        TEXT,
        modulation=modulation,
        step_embedding=step,
        l2_norm=l2_norm,
        mlp=mlp,
        positions="rope" if rope else "absolute",
        norm="rms" if rope else "layer",
        context_norm=norm and rope,
        residual=TEXT.residual if residual else None,
    ),
    st.sampled_from(["table", "none", "adaln", "shared_adaln"]),
    st.sampled_from(["table", "sinusoidal"]),
    st.booleans(),
    st.sampled_from(["swiglu", "gelu"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(text_configs)
def test_renaming_is_one_to_one_and_comes_back(config: TransformerConfig) -> None:
    with torch.device("meta"):
        state = ScaleTransformer(config).state_dict()
    rules = transformer_rules(config)
    released = to_released(state, rules)
    assert len(released) == len(state)
    assert not any(is_ignored(key) for key in released)
    back = to_ours(released, state, rules)
    assert {key: tensor.shape for key, tensor in back.items()} == {k: v.shape for k, v in state.items()}


def test_renaming_copies_nothing() -> None:
    _, transformer = random_pair(*VARIANTS["class, shared"])
    state = transformer.state_dict()
    released = to_released(state, transformer_rules(transformer.config))
    assert released["blocks.1.ada_gss"].shape == (1, 1, 6, 32)
    for ours, name in released_names(state, transformer_rules(transformer.config)).items():
        assert released[name.key].data_ptr() == state[ours].data_ptr()


@pytest.mark.parametrize("variant", VARIANTS)
def test_configurations_survive_the_authors_arguments(variant: str) -> None:
    tokenizer, transformer = VARIANTS[variant]
    values = json.loads(json.dumps([tokenizer_values(tokenizer), transformer_values(transformer)]))
    modules = random_pair(tokenizer, transformer)
    state = to_released(modules[1].state_dict(), transformer_rules(transformer))
    assert tokenizer_config(values[0], {}, "here") == tokenizer
    assert transformer_config(values[1], state, tokenizer, "here") == transformer


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_tell_what_the_arguments_leave_open(variant: str) -> None:
    tokenizer, transformer = VARIANTS[variant]
    modules = random_pair(tokenizer, transformer)
    # what no tensor shows
    shown = {"v_patch_nums", "beta", "quant_resi"}
    values = {key: value for key, value in tokenizer_values(tokenizer).items() if key in shown}
    assert tokenizer_config(values, released_tokenizer(modules[0]), "here") == tokenizer
    shown = {"sep_aln_pooling_mode", "norm_eps", "num_sampling_steps", "num_heads", "context_norm_scale"}
    values = {key: value for key, value in transformer_values(transformer).items() if key in shown}
    assert transformer_config(values, released_transformer(modules[1]), tokenizer, "here") == transformer


def test_keys_decide_about_the_modulation() -> None:
    _, transformer = random_pair()
    values = {**transformer_values(TEXT), "disable_aln": False, "shared_aln": False}
    built = build_transformer(values, released_transformer(transformer), TOKENIZER, "here")
    assert built.config.modulation == "table"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"using_znorm": True}, "using_znorm"),
        ({"double_decoder": True}, "double_decoder"),
        ({"quantizer_type": "fsq"}, "quantizer_type 'fsq'"),
        ({"ch": "wide"}, "ch is 'wide'"),
        ({"v_patch_nums": [1, 0]}, "v_patch_nums"),
    ],
)
def test_unsupported_tokenizers_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tokenizer_config(values, {}, "here")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_cross_attn": True}, "use_cross_attn"),
        ({"sampler": "dpm"}, "sampler"),
        ({"attn_type": "mamba"}, "attn_type 'mamba'"),
        ({"sep_aln_pooling_mode": "median"}, "sep_aln_pooling_mode 'median'"),
        ({"num_sampling_steps": "ddim8"}, "num_sampling_steps"),
        ({"depth": -1}, "depth"),
    ],
)
def test_unsupported_transformers_are_named(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        transformer_config({"context_token": 5, **values}, {}, TOKENIZER, "here")


# --------------------------------------------------------------------------- loading a release


def test_a_release_loads_without_touching_random_numbers() -> None:
    before = torch.get_rng_state()
    model = load_release(RELEASE)
    assert torch.equal(torch.get_rng_state(), before)
    assert is_release(RELEASE)
    assert model.text_encoder_path == RELEASE / "text_model"
    assert not model.transformer.training
    assert not any(p.requires_grad for p in (*model.tokenizer.parameters(), *model.transformer.parameters()))
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float32}


def test_ema_weights_are_used_unless_declined() -> None:
    plain = load_file(RELEASE / "llm" / "model.safetensors")["head.weight"]
    ema = torch.load(RELEASE / "llm" / "ema_model.bin", weights_only=True)["head.weight"]
    assert not torch.equal(plain, ema)
    with_ema, without = load_release(RELEASE), load_release(RELEASE, use_ema=False)
    assert (with_ema.ema, without.ema) == (True, False)
    assert torch.equal(with_ema.transformer.head.linear.weight, ema)
    assert torch.equal(without.transformer.head.linear.weight, plain)


def test_without_an_ema_file_the_plain_weights_are_used(release: Path) -> None:
    (release / "llm" / "ema_model.bin").unlink()
    model = load_release(release)
    assert not model.ema
    assert same(model.transformer.state_dict(), load_release(RELEASE, use_ema=False).transformer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_can_be_loaded_in_fewer_bits(dtype: torch.dtype) -> None:
    model = load_release(RELEASE, dtype=dtype)
    assert {p.dtype for p in model.transformer.parameters()} == {dtype}
    assert {p.dtype for p in model.tokenizer.parameters()} == {dtype}


def test_shards_are_joined(release: Path) -> None:
    whole = release / "llm" / "model.safetensors"
    (release / "llm" / "ema_model.bin").unlink()
    expected = load_release(release).transformer.state_dict()
    tensors = load_file(whole)
    whole.unlink()
    keys = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, release / "llm" / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (release / "llm" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load_release(release).transformer.state_dict(), expected)


def test_pickled_plain_weights_are_read(release: Path) -> None:
    (release / "llm" / "ema_model.bin").unlink()
    tensors = load_file(release / "llm" / "model.safetensors")
    expected = load_release(release).transformer.state_dict()
    (release / "llm" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither"):
        load_release(release)
    torch.save(tensors, release / "llm" / "pytorch_model.bin")
    assert same(load_release(release).transformer.state_dict(), expected)


@pytest.mark.parametrize("prefix", ["module.", "ema_model.", "model.module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_prefixes_and_wrappers_are_taken_off(release: Path, prefix: str, zipped: bool) -> None:
    path = release / "llm" / "ema_model.bin"
    tensors = torch.load(path, weights_only=True)
    wrapped = {"state_dict": {prefix + key: tensor for key, tensor in tensors.items()}, "epoch": 3}
    torch.save(wrapped, path, _use_new_zipfile_serialization=zipped)
    expected = load_release(RELEASE).transformer.state_dict()
    assert same(load_release(release).transformer.state_dict(), expected)
    del wrapped["state_dict"][f"{prefix}head.bias"]
    torch.save(wrapped, path)
    with pytest.raises(UserError, match=re.escape(f"missing key '{prefix}head.bias'")):
        load_release(release)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("vae.encoder.conv_in.bias"), "missing key 'vae.encoder.conv_in.bias'"),
        (lambda tensors: tensors.update({"vae.more": torch.zeros(1)}), "unexpected key 'vae.more'"),
        (lambda tensors: tensors.update({"stray": torch.zeros(1)}), "unexpected key 'stray'"),
        (
            lambda tensors: tensors.pop("vae.quantize.embedding.weight"),
            "missing key 'quantize.embedding.weight'",
        ),
        (lambda tensors: tensors.update({"vae.decoder2.conv_in.bias": torch.zeros(1)}), "second decoder"),
        (
            lambda tensors: tensors.update({"vae.decoder.conv_out.bias": torch.zeros(4)}),
            r"'vae.decoder.conv_out.bias' is \[4\], expected \[3\]",
        ),
    ],
)
def test_tokenizer_weights_that_do_not_fit_are_named(release: Path, change: Callable, message: str) -> None:
    edit(release / "tokenizer" / "model.safetensors", change)
    with pytest.raises(UserError, match=message) as caught:
        load_release(release)
    assert str(release / "tokenizer") in str(caught.value)


def test_one_tokenizer_serves_another_schedule(release: Path) -> None:
    path = release / "tokenizer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "v_patch_nums": [1, 2, 4]}))
    model = load_release(release)
    assert model.tokenizer.config.sides == model.transformer.config.sides == (1, 2, 3, 5, 8)


def test_missing_parts_of_a_release_are_named(release: Path) -> None:
    shutil.rmtree(release / "text_model")
    assert load_release(release).text_encoder_path is None
    assert load_release(release, text_model=RELEASE / "text_model").text_encoder_path == RELEASE / "text_model"
    with pytest.raises(UserError, match="elsewhere"):
        load_release(release, text_model=release / "elsewhere")
    shutil.rmtree(release / "tokenizer")
    assert not is_release(release)
    with pytest.raises(UserError, match="no folder 'tokenizer'"):
        load_release(release)


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["cut", "text", "empty", "bomb", "raw bomb", "list", "no tensors"])
def test_damaged_and_foreign_pickles_are_refused_in_one_line(release: Path, kind: str) -> None:
    path, trap = release / "llm" / "ema_model.bin", release / "trap"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-4000])
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "bomb":
        torch.save({"head.bias": torch.zeros(2), "x": Bomb(trap)}, path)
    elif kind == "raw bomb":
        path.write_bytes(pickle.dumps(Bomb(trap)))
    elif kind == "list":
        torch.save([torch.zeros(2)], path)
    else:
        torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match=r"ema_model\.bin") as caught:
        load_release(release)
    assert "\n" not in str(caught.value)
    assert not trap.exists()


# --------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_survives_the_released_layout(tmp_path: Path, variant: str) -> None:
    tokenizer, transformer = random_pair(*VARIANTS[variant])
    export_release(tokenizer, transformer, tmp_path / "out", RELEASE / "text_model")
    state = release_to_state(tmp_path / "out")
    assert (state.tokenizer_config, state.transformer_config) == VARIANTS[variant]
    assert same(state.tokenizer, tokenizer.state_dict())
    assert same(state.transformer, transformer.state_dict())
    assert state.text_encoder_path == tmp_path / "out" / "text_model"
    assert not (tmp_path / "out" / "llm" / "ema_model.bin").exists()


def test_the_tiny_release_comes_back_with_every_key(tmp_path: Path) -> None:
    model = load_release(RELEASE, dtype=None)
    export_release(model.tokenizer, model.transformer, tmp_path / "out")
    original = torch.load(RELEASE / "llm" / "ema_model.bin", weights_only=True)
    assert same(load_file(tmp_path / "out" / "llm" / "model.safetensors"), original)
    original = load_file(RELEASE / "tokenizer" / "model.safetensors")
    written = load_file(tmp_path / "out" / "tokenizer" / "model.safetensors")
    assert written.keys() == {key for key in original if not key.startswith("disc.")}
    for folder in ("llm", "tokenizer"):
        given, made = (json.loads((root / folder / "config.json").read_text()) for root in (RELEASE, tmp_path / "out"))
        assert {key: given[key] for key in made} == made


def test_an_export_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        export_release(*random_pair(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("tokenizer", "transformer", "message"),
    [
        ({}, {"rope": "axial"}, "axial"),
        ({"stem": 2}, {}, "stem 2"),
        ({"blocks_per_level": 1}, {}, "1 blocks a level"),
        ({}, {"residual": None}, "residual"),
        ({}, {"attention_scale": 1.0}, "attention scale"),
        ({}, {"modulation": "shared_adaln"}, "shared AdaLN"),
        ({}, {"residual": ResidualConfig(16, 1, target_scale=1.0)}, "target scale"),
        ({"sides": (1, (1, 2), 4)}, {"sides": (1, (1, 2), 4)}, "square grids"),
    ],
)
def test_what_the_released_layout_cannot_express_is_refused(
    tmp_path: Path, tokenizer: dict, transformer: dict, message: str
) -> None:
    pair = random_pair(dataclasses.replace(TOKENIZER, **tokenizer), dataclasses.replace(TEXT, **transformer))
    with pytest.raises(UserError, match=message):
        export_release(*pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modulation": "shared_adaln"},
        {"mlp_ratio": 2.0, "depth": 3},
        {"l2_norm": False, "width": 64, "heads": 1},
    ],
)
def test_a_class_model_survives_vars_files(tmp_path: Path, changes: dict) -> None:
    config = dataclasses.replace(VAR, **changes)
    tokenizer, transformer = random_pair(TOKENIZER, config)
    export_var(tokenizer, transformer, tmp_path / "var.pth", tmp_path / "vae.pth")
    state = var_to_state(tmp_path / "var.pth", tmp_path / "vae.pth")
    assert (state.tokenizer_config, state.transformer_config) == (TOKENIZER, config)
    assert same(state.tokenizer, tokenizer.state_dict())
    assert same(state.transformer, transformer.state_dict())
    assert state.text_encoder_path is None


@pytest.mark.parametrize("sides", [SIDES_256, SIDES_512, SIDES_1024])
def test_the_number_of_positions_tells_a_published_schedule(tmp_path: Path, sides: tuple) -> None:
    tokenizer, transformer = random_pair(
        dataclasses.replace(TOKENIZER, sides=sides), dataclasses.replace(VAR, sides=sides, width=16, depth=1)
    )
    weights = to_released(transformer.state_dict(), transformer_rules(transformer.config))
    torch.save(weights, tmp_path / "var.pth")  # without the buffer that lists the scales
    torch.save(released_tokenizer(tokenizer), tmp_path / "vae.pth")
    assert load_var(tmp_path / "var.pth", tmp_path / "vae.pth").transformer.config.sides == sides


def test_an_unknown_number_of_positions_needs_the_sides(tmp_path: Path) -> None:
    tokenizer, transformer = random_pair(TOKENIZER, VAR)
    torch.save(to_released(transformer.state_dict(), transformer_rules(VAR)), tmp_path / "var.pth")
    torch.save(released_tokenizer(tokenizer), tmp_path / "vae.pth")
    with pytest.raises(UserError, match="21 positions"):
        load_var(tmp_path / "var.pth", tmp_path / "vae.pth")
    model = load_var(tmp_path / "var.pth", tmp_path / "vae.pth", sides=(1, 2, 4))
    assert model.transformer.config == VAR


def test_a_training_checkpoint_of_var_holds_both(tmp_path: Path) -> None:
    tokenizer, transformer = random_pair(TOKENIZER, VAR)
    trainer = {
        "config": {"patch_nums": (1, 2, 4)},
        "var_wo_ddp": released_transformer(transformer),
        "vae_local": released_tokenizer(tokenizer),
        "var_opt": {"step": 1},
    }
    torch.save({"epoch": 1, "trainer": trainer, "args": {"depth": 2}}, tmp_path / "last.pth")
    model = load_var(tmp_path / "last.pth")
    assert same(model.transformer.state_dict(), transformer.state_dict())
    assert same(model.tokenizer.state_dict(), tokenizer.state_dict())


def test_vars_files_name_what_is_wrong_with_them(tmp_path: Path) -> None:
    tokenizer, transformer = random_pair(TOKENIZER, VAR)
    var, vae = tmp_path / "var.pth", tmp_path / "vae.pth"
    export_var(tokenizer, transformer, var, vae)
    with pytest.raises(UserError, match=r"missing key 'word_embed\.weight'"):
        load_var(vae, var)  # the wrong way round
    with pytest.raises(UserError, match="does not exist"):
        load_var(tmp_path / "absent.pth", vae)
    weights = torch.load(var, weights_only=True)
    torch.save({key: weights[key] for key in weights if key != "blocks.1.ada_lin.1.bias"}, var)
    with pytest.raises(UserError, match=r"missing key 'blocks\.1\.ada_lin\.1\.bias'"):
        load_var(var, vae)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CLASS, "residual"),
        (TEXT, "text model"),
        (dataclasses.replace(VAR, step_embedding="sinusoidal"), "sinusoidal"),
        (dataclasses.replace(VAR, l2_norm=False), "heads of width 16"),
        (dataclasses.replace(VAR, norm_eps=1e-5), "norm_eps"),
    ],
)
def test_what_vars_files_cannot_express_is_refused(tmp_path: Path, config: TransformerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_var(*random_pair(TOKENIZER, config), tmp_path / "var.pth", tmp_path / "vae.pth")
    assert not list(tmp_path.iterdir())


def test_loading_holds_the_weights_once() -> None:
    tokenizer, _ = random_pair()
    weights = {f"vae.{key}": tensor for key, tensor in released_tokenizer(tokenizer).items()}
    built = build_tokenizer(tokenizer_values(TOKENIZER), weights, "here")
    assert built.decoder.conv_in.weight.data_ptr() == weights["vae.decoder.conv_in.weight"].data_ptr()
