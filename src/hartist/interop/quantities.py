"""The quantities of a check set, computed by the very functions that train and generate.

Each function returns what it can compute from the inputs that are there. Where a set lacks an input
that an earlier function computed, the computed value is taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from hartist.generation.loop import generate_scales
from hartist.generation.sampling import SamplingSettings
from hartist.interop.fixtures import Fixture, Subject
from hartist.residual.denoise import denoise
from hartist.residual.loss import diffusion_loss
from hartist.residual.schedule import respaced_schedule, training_schedule
from hartist.text.encoder import TextContext, unconditional_context
from hartist.transformer.model import ScaleTransformer

Quantities = dict[str, Tensor]


class ReplayedNoise:
    """The noise a set recorded, in the order it was drawn. Greedy decoding needs no other."""

    def __init__(self, recorded: list[Tensor], images: int) -> None:
        self._recorded = iter(recorded)
        self._images = images

    def uniform(self, tokens: int) -> Tensor:
        return torch.zeros(self._images, tokens, dtype=torch.float64)

    def gumbel(self, tokens: int, codes: int) -> Tensor:
        raise NotImplementedError("check sets are generated without smoothing")

    def normal(self, tokens: int, channels: int) -> Tensor:
        return next(self._recorded)

    def select(self, rows: Sequence[int]) -> None:
        raise NotImplementedError("check sets are generated whole")


def text_quantities(subject: Subject, fixture: Fixture, done: Quantities) -> Quantities:
    """Prompts → token ids, mask, positions and states, with and without the instruction."""
    encoder, plain = subject.text_encoder, subject.plain_text_encoder
    if encoder is None or plain is None:
        return {}
    context = encoder.encode(subject.prompts)
    found = {
        "text.mask": context.mask_BS.long(),
        "text.position_ids": context.position_ids_BS,
        "text.context": context.states_BSC,
    }
    if hasattr(encoder, "token_ids"):
        found["text.token_ids"] = encoder.token_ids(subject.prompts)
    if fixture.wants("text.context_without_instruction"):
        found["text.context_without_instruction"] = plain.encode(subject.prompts).states_BSC
    return found


def tokenizer_quantities(subject: Subject, fixture: Fixture, done: Quantities) -> Quantities:
    """Encode, dequantize, teacher forcing, training pass; pixels too if there is an autoencoder."""
    tokenizer, quantizer = subject.tokenizer, subject.quantizer
    found: Quantities = {}
    if tokenizer is not None and "tok.image" in fixture:
        latent = found["tok.latent"] = tokenizer.encode_latent(fixture.read("tok.image"))
    elif "tok.latent" in fixture:
        latent = fixture.read("tok.latent")
    else:
        return {}
    tokens = quantizer.encode(latent)
    for k, ids in enumerate(tokens.ids):
        found[f"tok.ids.{k}"] = ids
    found["tok.last_scale_continuous"] = tokens.last_scale_BlC
    found["tok.teacher_forcing_input"] = quantizer.teacher_forcing_input(tokens.ids)
    f_hat = found["tok.var_discrete_fhat"] = quantizer.dequantize_discrete(tokens.ids)
    for skip in (0, 1):
        training = quantizer.training_pass(latent, add_residual=not skip)
        found[f"tok.train_fhat.skip{skip}"] = training.f_hat_BChw
        found[f"tok.train_vq_loss.skip{skip}"] = training.loss
        found[f"tok.train_usage.skip{skip}"] = torch.tensor(100 * training.usage)
    if tokenizer is not None:
        found["tok.var_discrete_image"] = tokenizer.decode_latent(f_hat)
        found["tok.continuous_image"] = tokenizer.decode_latent(latent)
    return found


def generation_quantities(subject: Subject, fixture: Fixture, done: Quantities) -> Quantities:
    """Greedy generation with guidance, scale by scale through the cache."""
    condition = _condition(subject, fixture, done)
    if condition is None or not fixture.wants("ar."):
        return {}
    images = len(condition)
    recorded = fixture.read_list("ar.diffusion_noise")
    settings = SamplingSettings(guidance=subject.guidance, temperature=0.0, residual=bool(recorded))
    noise = ReplayedNoise(recorded, images)
    unconditional = _unconditional(subject.transformer, condition)
    found: Quantities = {}
    f_hat = discrete = None
    loop = generate_scales(subject.transformer, subject.quantizer, condition, unconditional, settings, noise)
    for scale in loop:
        found[f"ar.cfg_logits.{scale.k}"] = scale.logits_BlV
        found[f"ar.ids.{scale.k}"] = scale.ids_Bl
        f_hat, discrete = scale.f_hat_BChw, scale.discrete_f_hat_BChw
    assert f_hat is not None
    assert discrete is not None
    for name, latent in (("ar", f_hat), ("ar.hybrid", f_hat), ("ar.discrete", discrete)):
        found[f"{name}.fhat"] = latent
        if subject.tokenizer is not None:
            found[f"{name}.image"] = (subject.tokenizer.decode_latent(latent) + 1) / 2
    if not recorded:
        del found["ar.hybrid.fhat"]
        found.pop("ar.hybrid.image", None)
    return found


def training_quantities(subject: Subject, fixture: Fixture, done: Quantities) -> Quantities:
    """The teacher-forced pass, on a subset of the last scale's cells if the set names one."""
    condition = _condition(subject, fixture, done)
    if condition is None or not fixture.wants("train."):
        return {}
    model, quantizer = subject.transformer, subject.quantizer
    scale_inputs = _computed_or_given("tok.teacher_forcing_input", fixture, done)
    if scale_inputs is None:
        return {}
    kept_name = "train.kept_last_scale_positions"
    kept = fixture.read(kept_name) if kept_name in fixture else None
    prepared = model.prepare(condition)
    forced = model.forward_all(scale_inputs, prepared, kept)
    logits = model.logits(forced.hidden_BTD, prepared)
    found = {"train.logits": logits}
    if model.config.residual is None:
        return found
    codes = quantizer.lookup(logits[:, -forced.last_scale_BmD.shape[1] :].argmax(-1))
    found["train.diffusion_z"] = model.residual_condition(forced.last_scale_BmD, codes)
    continuous = _computed_or_given("tok.last_scale_continuous", fixture, done)
    if continuous is not None:
        if kept is not None:
            continuous = continuous.gather(1, kept[..., None].expand(-1, -1, continuous.shape[-1]))
        found["train.diffusion_target"] = continuous - codes
    return found


def diffusion_quantities(subject: Subject, fixture: Fixture, done: Quantities) -> Quantities:
    """The residual MLP alone: output, loss, guided sampling, schedule."""
    config = subject.transformer.config.residual
    if config is None or not fixture.wants("diff."):
        return {}
    mlp = subject.transformer.residual_mlp
    schedule = respaced_schedule(config.steps)
    found = {
        "diff.gen_timesteps": torch.tensor(schedule.timesteps),
        "diff.gen_betas": torch.from_numpy(schedule.betas),
    }
    if not fixture.has("diff.z"):
        return found
    z = fixture.read("diff.z")
    if fixture.has("diff.x", "diff.t"):
        found["diff.out"] = mlp(fixture.read("diff.x"), fixture.read("diff.t"), z)
    if fixture.has("diff.t", "diff.loss_target", "diff.loss_noise"):
        x0 = fixture.read("diff.loss_target") / config.target_scale
        t, noise = fixture.read("diff.t"), fixture.read("diff.loss_noise")
        loss = diffusion_loss(lambda x, step: mlp(x, step, z), x0, t, noise, training_schedule())
        found |= {"diff.loss": loss.total_N, "diff.loss_mse": loss.mse_N, "diff.loss_vb": loss.vb_N}
    noises = fixture.read_list("diff.sample_noise")
    for key in fixture.tensors:
        match = re.fullmatch(r"diff\.sample_cfg(\d+)(?:p(\d+))?", key)
        if match and len(noises) > config.steps:
            guidance = float(f"{match[1]}.{match[2] or 0}")
            rows = torch.cat([z, z.flip(0)])
            found[key] = denoise(mlp, rows, guidance, noises.__getitem__, schedule, config.target_scale)
    return found


QUANTITIES = (
    text_quantities,
    tokenizer_quantities,
    generation_quantities,
    training_quantities,
    diffusion_quantities,
)
"""In this order: later ones build on what earlier ones computed."""


def _condition(subject: Subject, fixture: Fixture, done: Quantities) -> TextContext | Tensor | None:
    if subject.transformer.config.condition == "class":
        return fixture.read("ar.labels") if "ar.labels" in fixture else None
    if fixture.has("ar.context", "ar.context_mask", "ar.context_position_ids"):
        return TextContext(
            fixture.read("ar.context"),
            fixture.read("ar.context_mask").bool(),
            fixture.read("ar.context_position_ids"),
        )
    if "text.context" in done:
        return TextContext(done["text.context"], done["text.mask"].bool(), done["text.position_ids"])
    return None


def _unconditional(model: ScaleTransformer, condition: TextContext | Tensor) -> TextContext | Tensor:
    if isinstance(condition, TextContext):
        return unconditional_context(condition)
    return torch.full_like(condition, model.config.num_classes)


def _computed_or_given(key: str, fixture: Fixture, done: Quantities) -> Tensor | None:
    if key in done:
        return done[key]
    return fixture.read(key) if key in fixture else None
