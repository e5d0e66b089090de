"""Going on with a finished model: low-rank adapters, and the command on a folder of one's own pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from hartist import Pipeline
from hartist.checkpoint import read_safetensors
from hartist.cli import main
from hartist.errors import UserError
from hartist.generation.checkpoint import load_model, load_transformer
from hartist.training.finetune import finetune_recipe
from hartist.training.generator_stage import GeneratorStage
from hartist.training.loop import train
from hartist.training.lora import add_adapters, has_adapters, merged
from hartist.transformer.model import ScaleTransformer
from runs import assert_same_state, log_rows, loss_curve, state_tensors, stop_after
from small import VAR, make_generator_stage, normal, pictures, random_context, random_transformer, randomise, run_config
from tiny import SIZE, write_tiny_class_model, write_tiny_text_model

pytest.importorskip("peft")


def logits(transformer: ScaleTransformer, labels: Tensor | None = None) -> Tensor:
    latents = normal(2, 29, 4)
    with torch.no_grad():
        condition = transformer.prepare(random_context(2) if labels is None else labels)
        return transformer.logits(transformer.forward_all(latents, condition).hidden_BTD, condition)


def adapters(transformer: ScaleTransformer) -> dict[str, Tensor]:
    return {name: p for name, p in transformer.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("changes", [{}, VAR], ids=["text", "class"])
def test_a_new_adapter_changes_nothing_and_a_trained_one_can_be_merged(changes: dict[str, Any]) -> None:
    transformer = random_transformer(**changes)
    labels = torch.tensor([3, 7]) if changes else None
    plain, names = logits(transformer, labels), list(transformer.state_dict())
    assert merged(transformer) is transformer
    assert not has_adapters(transformer)
    add_adapters(transformer, rank=3)
    assert has_adapters(transformer)
    torch.testing.assert_close(logits(transformer, labels), plain, rtol=1e-5, atol=1e-5)

    for name, p in adapters(transformer).items():
        p.data.copy_(0.3 * normal(*p.shape, seed=len(name)))
    adapted = logits(transformer, labels)
    assert float((adapted - plain).abs().max()) > 0.1
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    whole = merged(transformer)
    assert list(whole.state_dict()) == names
    assert not any(p.requires_grad for p in whole.parameters())
    torch.testing.assert_close(logits(whole, labels), adapted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in transformer.state_dict().items())


def test_adapters_are_beside_attention_feed_forward_and_inputs_and_nothing_else_is_trained() -> None:
    for changes, layers in (
        ({}, "attn.qkv attn.proj mlp.gate mlp.up mlp.down"),
        (VAR, "attn.qkv attn.proj mlp.fc1 mlp.fc2"),
    ):
        transformer = random_transformer(**changes)
        add_adapters(transformer, rank=3)
        found = {name.split(".lora_")[0] for name in adapters(transformer)}
        wanted = {f"blocks.{i}.{layer}" for i in range(2) for layer in layers.split()} | {"word_embed"}
        assert found == wanted | (set() if changes else {"context_embed"})
        trained = {name for name, p in transformer.named_parameters() if p.requires_grad}
        assert trained == set(adapters(transformer))
        shapes = {p.shape[0 if ".lora_A." in name else 1] for name, p in adapters(transformer).items()}
        assert shapes == {3}


def test_adapters_begin_with_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        transformer = random_transformer()
        add_adapters(transformer, 2, seed)
        found.append(adapters(transformer)["word_embed.lora_A.default.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_impossible_adapters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="rank of 0 makes no adapter"):
        add_adapters(random_transformer(), 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'hartist\[train\]'"):
        add_adapters(random_transformer(), 2)


def test_training_moves_adapters_alone_and_ships_plain_weights(tmp_path: Path) -> None:
    run = run_config(4)

    def stage() -> GeneratorStage:
        made = make_generator_stage(run, tmp_path)
        randomise(made.transformer)
        add_adapters(made.transformer, 2)
        return made

    first = stage()
    before = {name: tensor.clone() for name, tensor in first.transformer.state_dict().items()}
    train(first, run, tmp_path / "whole", progress=False)
    moved = {name for name, tensor in first.transformer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(adapters(first.transformer))
    saved = state_tensors(tmp_path / "whole")
    assert {name.removeprefix("average.transformer.") for name in saved if name.startswith("average.")} == moved

    shipped = load_transformer(tmp_path / "whole" / "model" / "transformer")
    assert not has_adapters(shipped)
    changed = {name for name, tensor in shipped.state_dict().items() if not torch.equal(tensor, plain_of(before, name))}
    assert changed <= {f"{name.split('.lora_')[0]}.weight" for name in moved}
    assert len(changed) > 5

    stopped = stage()
    stop_after(stopped, 1)
    assert train(stopped, run, tmp_path / "parts", progress=False) == 2
    assert train(stage(), run, tmp_path / "parts", progress=False) == 4
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def plain_of(weights: dict[str, Tensor], name: str) -> Tensor:
    """A weight before training, as a model is stored: bfloat16."""
    layer, _, kind = name.rpartition(".")
    tensor = weights.get(name, weights.get(f"{layer}.base_layer.{kind}"))
    assert tensor is not None, name
    return tensor.bfloat16().float()


# --------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("model") / "text")


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder, as people have it: images beside a metadata.jsonl, nothing held out."""
    folder = tmp_path_factory.mktemp("own")
    lines = []
    for i, pixels in enumerate(pictures(6, side=SIZE)):
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "a red apple, 3d" if i % 2 else "a cat"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_is_fine_tuned_on_a_folder_by_one_command(
    model: Path, own_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    out = tmp_path / "run"
    call = ["train", "finetune", "--data", str(own_pictures), "--out", str(out), "--start-from", str(model)]
    call += ["--steps", "8", "--batch-size", "3", "--device", "cpu", "--no-bf16", "-q"]
    call += ["--set", "run.log_every=1", "--set", "run.optimizer.warmup_steps=1", "--learning-rate", "0.01"]
    call += ["--lora", str(rank)] if rank else []
    assert main(call) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(out / "model")
    assert "without held-out images" in printed.err
    losses = list(loss_curve(out).values())
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    assert list((out / "pictures").glob("samples_*.png"))

    pipe = Pipeline.from_pretrained(out / "model", device="cpu")
    assert pipe("a red apple, 3d", seed=1)[0].size == (SIZE, SIZE)
    start, tuned = load_model(model), load_model(out / "model")
    assert tuned.settings == start.settings
    assert tuned.transformer.config == start.transformer.config
    names = [f"{part}/model.safetensors" for part in ("tokenizer", "text_encoder")]
    for name in names:
        ours, theirs = read_safetensors(out / "model" / name), read_safetensors(model / name)
        assert all(torch.equal(ours[key].float(), theirs[key].to(ours[key].dtype).float()) for key in theirs)

    before = log_rows(out)
    assert main(call) == 0  # the run is finished
    assert log_rows(out) == before


def test_class_models_and_missing_captions_are_refused_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = write_tiny_class_model(tmp_path / "classes")
    with pytest.raises(UserError, match="class-conditional; fine-tuning takes a text-conditional model"):
        finetune_recipe(load_model(classes))
    folder = tmp_path / "untitled"
    folder.mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(folder / "0.png")
    for line in ({"file_name": "0.png"}, {"file_name": "0.png", "text": " "}):
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        call = ["train", "finetune", "--data", str(folder), "--out", str(tmp_path / "run"), "--start-from", str(model)]
        assert main([*call, "--device", "cpu", "-q"]) == 2
        (error,) = capsys.readouterr().err.strip().splitlines()
        assert error.startswith("hartist: error: ")
        assert "caption" in error
