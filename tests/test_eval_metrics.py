"""Metrics against reference implementations and closed forms; each tolerance is beside its comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from hartist.data.folder import CaptionedImage
from hartist.errors import UserError
from hartist.evaluation import precision_recall as precision_recall_module
from hartist.evaluation.classifier_score import inception_score
from hartist.evaluation.clip_score import clip_score
from hartist.evaluation.codebook import codebook_entropy, codebook_usage, count_codes
from hartist.evaluation.distances import (
    Gaussian,
    fit_gaussian,
    frechet_distance,
    kernel_distance,
    kernel_distance_of_subsets,
)
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.image_metrics import lpips, psnr, ssim
from hartist.evaluation.precision_recall import PrecisionRecall, precision_recall, squared_radii
from hartist.evaluation.reconstruction import evaluate_tokenizer
from hartist.pixels import from_uint8
from hartist.training.lpips import CONVS, LpipsLoss
from small import normal, pictures, random_tokenizer


class Identity(nn.Module):
    """Stands in for the network of torchmetrics' metrics: features go in, and come out."""

    num_features = 8

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def feed(metric: Any, features: Tensor, **options: Any) -> None:
    """Rows as pictures of one pixel, which torchmetrics asks for."""
    metric.update(features[:, :, None, None], **options)


# --- Fréchet and kernel distance ------------------------------------------------------------------


def test_frechet_distance_of_known_gaussians() -> None:
    # in one dimension: (difference of means)² + (difference of deviations)²
    one = Gaussian(torch.tensor([1.0]).double(), torch.tensor([[2.0]]).double())
    other = Gaussian(torch.tensor([4.0]).double(), torch.tensor([[0.5]]).double())
    assert frechet_distance(one, other) == pytest.approx(9 + 1.5**2, rel=1e-12)
    # Σ and c·Σ: the trace of Σ times (1 − √c)²
    root = normal(6, 6, seed=1).double()
    scaled = Gaussian(torch.zeros(6).double(), 3 * root)
    expected = root.square().sum().item() * (1 - 3) ** 2
    assert frechet_distance(Gaussian(torch.zeros(6).double(), root), scaled) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [6, 300])
def test_frechet_distance_is_torchmetrics_fid(count: int) -> None:
    real, generated = normal(count, 8, seed=1), 0.7 * normal(count + 3, 8, seed=2) + 0.3
    reference = FrechetInceptionDistance(feature=Identity(), normalize=True, input_img_size=(8, 1, 1))
    feed(reference, real, real=True)
    feed(reference, generated, real=False)
    # torchmetrics takes roots of eigenvalues, whose rounding errors show where there are few pictures
    assert frechet_distance(fit_gaussian(generated), fit_gaussian(real)) == pytest.approx(
        reference.compute().item(), rel=1e-4
    )


def test_kernel_distance_is_torchmetrics_kid() -> None:
    real, generated = normal(40, 8, seed=1), normal(40, 8, seed=2) + 0.5
    reference = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=40, normalize=True)
    feed(reference, real, real=True)
    feed(reference, generated, real=False)
    mean, _ = reference.compute()
    # one subset of all rows: the order of drawing does not matter; torchmetrics computes in float32
    assert kernel_distance(generated, real) == pytest.approx(mean.item(), rel=1e-4)
    assert kernel_distance_of_subsets(generated, real, size=40, subsets=1).mean == pytest.approx(mean.item(), rel=1e-4)


def test_kernel_distance_of_equal_sets_is_what_its_diagonal_takes_away() -> None:
    x = normal(30, 5).double()
    kernel = (x @ x.T / 5 + 1) ** 3
    off_diagonal = (kernel.sum() - kernel.trace()) / (30 * 29)
    expected = 2 * (off_diagonal - kernel.mean()).item()
    assert expected < 0  # unbiased, and so below zero
    assert kernel_distance(x, x) == pytest.approx(expected, rel=1e-10)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    values = [kernel_distance(normal(50, 4, seed=i), normal(50, 4, seed=1000 + i)) for i in range(100)]
    error = torch.tensor(values).std().item() / 100**0.5
    assert abs(sum(values) / 100) < 3 * error
    assert kernel_distance(normal(50, 4, seed=0), normal(50, 4, seed=1) + 1) > 30 * error


# --- Inception Score ------------------------------------------------------------------------------


def test_inception_score_of_undecided_pictures_is_one() -> None:
    assert inception_score(torch.zeros(20, 7)).mean == pytest.approx(1, abs=1e-12)
    same = normal(1, 7).expand(20, 7)
    assert inception_score(same, splits=1).mean == pytest.approx(1, abs=1e-12)


def test_inception_score_of_sure_and_even_pictures_is_the_number_of_classes() -> None:
    sure = 1e4 * torch.eye(6).repeat(5, 1)  # probabilities of exactly 0 and 1
    found = inception_score(sure, splits=1)
    assert found.mean == pytest.approx(6, abs=1e-12)
    assert found.deviation == 0


def test_inception_score_is_torchmetrics_without_splits() -> None:
    logits = 3 * normal(64, 8)
    reference = InceptionScore(feature=Identity(), splits=1)
    feed(reference, logits)
    mean, _ = reference.compute()
    assert inception_score(logits, splits=1).mean == pytest.approx(mean.item(), rel=1e-5)  # float32 there


def test_inception_score_over_splits_by_its_definition() -> None:
    logits = 3 * normal(23, 5)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(4))
    p = logits.double().softmax(1)[order]
    parts = [p[:8], p[8:16], p[16:]]  # as even as can be, the longer ones first
    scores = [math.exp((part * (part / part.mean(0)).log()).sum(1).mean().item()) for part in parts]
    found = inception_score(logits, splits=3, seed=4)
    assert found.mean == pytest.approx(sum(scores) / 3, rel=1e-12)
    assert found.deviation == pytest.approx(torch.tensor(scores).std(correction=0).item(), rel=1e-5)


def test_inception_score_does_not_depend_on_the_order_of_classes() -> None:
    in_order = 1e4 * torch.eye(4).repeat_interleave(50, 0)
    assert inception_score(in_order, splits=4).mean > 3.5  # unshuffled, each part would have one class and score 1


@pytest.mark.parametrize("splits", [0, 6])
def test_too_few_pictures_for_the_splits_are_refused(splits: int) -> None:
    with pytest.raises(UserError, match=f"{splits} splits"):
        inception_score(normal(5, 3), splits=splits)


# --- precision and recall -------------------------------------------------------------------------


def naive_share(x: Tensor, centres: Tensor, k: int) -> float:
    distance = [[math.dist(a, b) for b in centres.tolist()] for a in centres.tolist()]
    radii = [sorted(row)[k] for row in distance]
    inside = [
        any(math.dist(row, centre) <= radius for centre, radius in zip(centres.tolist(), radii, strict=True))
        for row in x.tolist()
    ]
    return sum(inside) / len(inside)


@pytest.mark.parametrize(("rows", "columns"), [(1024, 8192), (7, 5)])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_precision_and_recall_by_their_definition(
    k: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_recall_module, "ROWS", rows)
    monkeypatch.setattr(precision_recall_module, "COLUMNS", columns)
    real, generated = normal(40, 3, seed=k), 0.6 * normal(30, 3, seed=10 + k) + 0.5
    found = precision_recall(real, generated, k)
    assert found == PrecisionRecall(naive_share(generated, real, k), naive_share(real, generated, k))
    assert 0 < found.recall < 1
    assert found.precision > 0


def test_equal_sets_have_full_precision_and_recall_and_distant_ones_none() -> None:
    x = normal(50, 16)
    assert precision_recall(x, x) == PrecisionRecall(1.0, 1.0)
    assert precision_recall(x, x + 100) == PrecisionRecall(0.0, 0.0)


def test_one_repeated_picture_is_precise_and_recalls_little() -> None:
    real = normal(100, 4) + 1000  # far from the origin, where products round
    found = precision_recall(real, real[:1].expand(20, 4))
    assert found.precision == 1
    assert found.recall == 0.01  # its balls have no width: only the picture itself is in them


@given(st.integers(2, 20), st.integers(0, 50), st.floats(-1e4, 1e4))
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_radii_stand_still_when_everything_is_moved(count: int, seed: int, shift: float) -> None:
    x = normal(count, 3, seed=seed).double()
    moved = x + shift
    centred = squared_radii(moved - moved.mean(0), 1)
    assert torch.allclose(centred, squared_radii(x - x.mean(0), 1), rtol=1e-6, atol=1e-8)


def test_equal_rows_are_at_no_distance_whatever_their_products_round_to() -> None:
    x = normal(50, 300).double() + 1000
    assert squared_radii(x.repeat(2, 1), 1).tolist() == [0.0] * 100
    assert (squared_radii(x.repeat(2, 1), 2) > 100).all()


def test_too_few_pictures_for_the_neighbours_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4 pictures each, there are 3"):
        precision_recall(normal(9, 2), normal(3, 2))


# --- SSIM and LPIPS -------------------------------------------------------------------------------


def photo(side: int = 40, count: int = 3, seed: int = 0) -> Tensor:
    return (normal(count, side, side + 5, 3, seed=seed) * 40 + 120).clamp(0, 255).byte()


@pytest.mark.parametrize("pair", ["noise", "blurred", "shifted"])
def test_ssim_is_that_of_torchmetrics(pair: str) -> None:
    a = photo()
    b = {"noise": photo(seed=1), "blurred": (a.float() * 0.5 + 50).byte(), "shifted": a.roll(1, 1)}[pair]
    channels = (x.movedim(-1, 1).double() for x in (a, b))
    _, everywhere = structural_similarity_index_measure(*channels, data_range=255.0, return_full_image=True)
    # torchmetrics mirrors the picture at its borders; the paper's authors and scikit-image leave these windows out
    expected = everywhere[..., 5:-5, 5:-5].mean((1, 2, 3))
    assert expected.max() < 0.9
    assert torch.allclose(ssim(a, b), expected, atol=1e-9)


def test_ssim_of_flat_pictures_is_its_luminance_term() -> None:
    a, b = torch.full((1, 16, 16, 3), 100).byte(), torch.full((1, 16, 16, 3), 150).byte()
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(a, b).item() == pytest.approx(expected, rel=1e-9)
    assert ssim(photo(), photo()).tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_ssim_needs_room_for_its_window() -> None:
    assert ssim(photo(11), photo(11)).shape == (3,)
    with pytest.raises(UserError, match=r"at least 11×11 pixels, these have 10×15"):
        ssim(photo(10), photo(10))


def lpips_network() -> LpipsLoss:
    """Random weights in the layouts of torchvision and of the package `lpips`, few channels."""
    trunk: dict[str, Tensor] = {}
    linear: dict[str, Tensor] = {}
    width = 3
    for block, numbers in enumerate(CONVS):
        for number in numbers:
            trunk[f"features.{number}.weight"] = normal(6, width, 3, 3, seed=number) / (9 * width) ** 0.5
            trunk[f"features.{number}.bias"] = normal(6, seed=100 + number) / 10
            width = 6
        linear[f"lin{block}.model.1.weight"] = normal(1, 6, 1, 1, seed=200 + block).abs()
    return LpipsLoss(trunk, linear, "here")


def test_lpips_of_each_picture_averages_to_the_loss_of_training() -> None:
    network, a, b = lpips_network(), photo(), photo(seed=1)
    found = lpips(network, a, b)
    assert found.shape == (3,)
    assert found.mean().item() == pytest.approx(network(from_uint8(a), from_uint8(b)).item(), rel=1e-6)
    alone = [lpips(network, a[i : i + 1], b[i : i + 1]).item() for i in range(3)]
    assert found.tolist() == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == 3
    assert lpips(network, a, a).tolist() == [0, 0, 0]


# --- CLIP score -----------------------------------------------------------------------------------


def test_clip_score_is_the_cosine_in_percent_and_never_negative() -> None:
    image = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    text = torch.tensor([[2.0, 0.0], [4.0, 3.0], [-1.0, 1.0], [1.0, 0.0]])
    assert clip_score(image, text).tolist() == pytest.approx([100, 96, 0, 0], abs=1e-12)


def test_clip_score_pairs_rows_and_not_batches() -> None:
    image, text = normal(5, 7, seed=1), normal(5, 7, seed=2)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (image, text)]
    expected = [max(0.0, 100 * float(a @ b)) for a, b in zip(*unit, strict=True)]
    assert clip_score(image, text).tolist() == pytest.approx(expected, rel=1e-5)  # the expectation is in float32


# --- the codebook ---------------------------------------------------------------------------------


def test_codes_are_counted_by_scale() -> None:
    ids = [torch.tensor([[3], [3]]), torch.tensor([[0, 1, 1, 2], [0, 0, 0, 0]])]
    counts = count_codes(ids, 5)
    assert counts.tolist() == [[0, 0, 0, 2, 0], [5, 2, 1, 0, 0]]
    assert codebook_usage(counts).tolist() == [1 / 5, 3 / 5]


def test_entropy_in_bits_of_known_counts() -> None:
    counts = torch.tensor([[8, 0, 0, 0], [4, 4, 4, 4], [2, 1, 1, 0], [0, 0, 0, 0]])
    assert codebook_entropy(counts).tolist() == pytest.approx([0, 2, 1.5, 0], abs=1e-12)


@pytest.mark.parametrize("perceptual", [None, lpips_network()], ids=["without", "with"])
def test_the_tokenizer_report_has_the_means_of_each_picture(tmp_path: Path, perceptual: LpipsLoss | None) -> None:
    pixels = pictures(5)
    rows = [CaptionedImage(tmp_path / f"{i}.png", "", ("",)) for i in range(5)]
    for row, picture in zip(rows, pixels, strict=True):
        Image.fromarray(picture.numpy()).save(row.path)
    means: Callable[[Tensor], Tensor] = lambda p: p.float().mean((1, 2))  # noqa: E731
    tokenizer = random_tokenizer()
    report = evaluate_tokenizer(
        tokenizer, rows, FeatureNetwork("mean", "mean", means), perceptual=perceptual, progress=False
    )
    image = from_uint8(pixels)
    tokens = tokenizer.encode(image)
    decoded = tokenizer.decode(tokens)
    rounded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1)
    assert report.hybrid.psnr == pytest.approx(psnr(decoded, image).mean().item(), abs=1e-3)
    assert report.hybrid.ssim == pytest.approx(ssim(rounded, pixels).mean().item(), abs=1e-6)
    if perceptual is None:
        assert report.hybrid.lpips is None
    else:
        assert report.hybrid.lpips == pytest.approx(lpips(perceptual, rounded, pixels).mean().item(), rel=1e-4)
    counts = count_codes(tokens.ids, 32)
    assert report.entropy_per_scale == tuple(codebook_entropy(counts).tolist())
    assert report.usage_per_scale == tuple(codebook_usage(counts).tolist())
    assert report.usage == len(set(torch.cat([ids.flatten() for ids in tokens.ids]).tolist())) / 32
