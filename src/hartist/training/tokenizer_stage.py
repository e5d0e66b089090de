"""Tokenizer stage: reconstruction with the paper's coin flip between discrete and hybrid decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hartist import config as configs
from hartist.config import TokenizerConfig
from hartist.evaluation.image_metrics import psnr
from hartist.pixels import from_uint8, save_grid, to_uint8
from hartist.tokenizer.autoencoder import last_layer
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import QuantizerTraining
from hartist.training.codebook import kmeans, revive_dead_codes, scale_vectors
from hartist.training.config import RunConfig, TokenizerLossConfig
from hartist.training.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from hartist.training.loop import Part, StepLoss, batch_indices, step_seed
from hartist.training.perceptual import PerceptualLoss, find_weights, random_crops


class TokenizerStage:
    """Images in memory (N×H×W×3, uint8), a tokenizer, and optionally a discriminator."""

    def __init__(
        self,
        config: TokenizerConfig,
        losses: TokenizerLossConfig,
        run: RunConfig,
        train_images: UInt8[Tensor, "n h w 3"],
        validation_images: UInt8[Tensor, "m h w 3"],
        data_hash: str,
    ) -> None:
        self.config, self.losses, self.run = config, losses, run
        self.images, self.validation, self.data_hash = train_images, validation_images, data_hash
        torch.manual_seed(run.seed)
        # channels_last: convolutions on CPU run about twice as fast
        self.tokenizer = HybridTokenizer(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.discriminator = PatchDiscriminator() if losses.adversarial else None
        self.perceptual = PerceptualLoss(find_weights()) if losses.perceptual else None
        self.hits_V = torch.zeros(config.vocab_size, dtype=torch.long)
        self.latent_BChw: Tensor | None = None
        self.reconstruction: Tensor | None = None

    @property
    def parts(self) -> list[Part]:
        parts = [Part("tokenizer", self.tokenizer, self.tokenizer_loss)]
        if self.discriminator is not None:
            parts.append(Part("discriminator", self.discriminator, self.discriminator_loss))
        return parts

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "tokenizer_config": _json(configs.to_dict(self.config)),
            "losses": _json(configs.to_dict(self.losses)),
            "run": _json(configs.to_dict(self.run)),
            "data": self.data_hash,
        }

    @property
    def gathered(self) -> dict[str, Tensor]:
        return {"hits": self.hits_V}

    def batch(self, step: int) -> Float[Tensor, "b 3 h w"]:
        indices = batch_indices(len(self.images), self.run.batch_size, step, self.run.seed)
        return from_uint8(self.images[indices]).to(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.run.bf16)

    def tokenizer_loss(self, step: int) -> StepLoss:
        losses, tokenizer = self.losses, self.tokenizer
        image = self.batch(step)
        generator = torch.Generator().manual_seed(step_seed(self.run.seed, step, stream=2))
        hybrid = bool(torch.rand((), generator=generator) < losses.hybrid_probability)
        with self._autocast():
            f_BChw = tokenizer.quant_conv(tokenizer.encoder(image))
        f_BChw = f_BChw.float()
        self.latent_BChw = f_BChw.detach()
        quantized: QuantizerTraining | None = None
        if step >= losses.continuous_steps:
            quantized = tokenizer.quantizer.training_pass(f_BChw, add_residual=hybrid)
            self.hits_V += quantized.hits_V
        with self._autocast():
            decoder_input = f_BChw if quantized is None else quantized.f_hat_BChw
            output = tokenizer.decoder(tokenizer.post_quant_conv(decoder_input)).float()
        self.reconstruction = output.detach()

        l1, l2 = (output - image).abs().mean(), (output - image).square().mean()
        loss = losses.l1 * l1 + losses.l2 * l2
        path = "continuous" if quantized is None else "hybrid" if hybrid else "discrete"
        logs = {f"l1_{path}": l1.item(), f"psnr_{path}": float(psnr(output.detach(), image).mean())}
        if self.perceptual is not None:
            seen = max(1, round(losses.perceptual_share * len(image)))
            crop, wanted = random_crops([output[:seen], image[:seen]], losses.perceptual_crop, generator)
            with self._autocast():
                perceptual = self.perceptual(crop, wanted)
            loss = loss + losses.perceptual * perceptual
            logs["perceptual"] = perceptual.item()
        if self.discriminator is not None and step >= losses.adversarial_start * self.run.steps:
            with self._autocast():
                adversarial = -self.discriminator(output).float().mean()
            weight = adaptive_weight(loss, adversarial, last_layer(tokenizer.decoder))
            loss = loss + losses.adversarial * weight * adversarial
            logs |= {"adversarial": adversarial.item(), "adversarial_weight": float(weight)}
        if quantized is not None:
            loss = loss + losses.quantizer * quantized.loss
            logs |= {"quantizer": quantized.loss.item(), "usage": quantized.usage}
            logs |= {f"usage_{k}": usage for k, usage in enumerate(quantized.usage_per_scale)}
        return StepLoss(loss, {"loss": loss.item(), **logs})

    def discriminator_loss(self, step: int) -> StepLoss | None:
        assert self.discriminator is not None
        assert self.reconstruction is not None
        if step < self.losses.adversarial_start * self.run.steps:
            return None
        with self._autocast():
            real = self.discriminator(self.batch(step)).float()
            fake = self.discriminator(self.reconstruction).float()
        loss = hinge_loss(real, fake)
        return StepLoss(loss, {"discriminator": loss.item(), "real": real.mean().item(), "fake": fake.mean().item()})

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Initialise the codebook when the continuous warm-up ends; revive dead codes from time to time."""
        losses, quantizer = self.losses, self.tokenizer.quantizer
        generator = torch.Generator().manual_seed(step_seed(self.run.seed, step, stream=3))
        assert self.latent_BChw is not None
        if losses.continuous_steps and step == losses.continuous_steps - 1:
            sample = torch.randperm(len(self.images), generator=generator)[:512]
            latents = [
                self.tokenizer.encode_latent(from_uint8(self.images[rows]).to(memory_format=torch.channels_last))
                for rows in sample.split(64)
            ]
            vectors_NC = scale_vectors(torch.cat(latents), quantizer.schedule, quantizer.phi_function, 4096, generator)
            quantizer.codebook.copy_(kmeans(vectors_NC, len(quantizer.codebook), generator))
            self.hits_V.zero_()
        elif losses.revive_every and step >= losses.continuous_steps and (step + 1) % losses.revive_every == 0:
            # Not in the last tenth: a code moved late has no time to settle.
            if step < 0.9 * self.run.steps:
                vectors_NC = scale_vectors(self.latent_BChw, quantizer.schedule, quantizer.phi_function, 256, generator)
                revive_dead_codes(quantizer.codebook.data, self.hits_V, vectors_NC, generator)
            self.hits_V.zero_()

    def pictures(self, directory: Path, step: int) -> dict[str, float]:
        """Strips of original, discrete and hybrid reconstruction; PSNR of both paths on held-out images."""
        tokenizer = self.tokenizer
        sums: dict[str, list[Tensor]] = {"discrete": [], "hybrid": []}
        rows: list[list[Tensor]] = []
        for pixels in self.validation[:256].split(32):
            image = from_uint8(pixels)
            tokens = tokenizer.encode(image)
            discrete, hybrid = tokenizer.decode_discrete(tokens.ids), tokenizer.decode(tokens)
            sums["discrete"].append(psnr(discrete, image))
            sums["hybrid"].append(psnr(hybrid, image))
            if len(rows) < 6:
                for i in range(min(4, len(image))):
                    rows.append([to_uint8(x[i]) for x in (image, discrete, hybrid)])
        strips = [[pixels for row in rows[i : i + 2] for pixels in row] for i in range(0, len(rows), 2)]
        save_grid(directory / f"reconstruction_{step:07d}.png", strips)
        return {f"validation_psnr_{path}": float(torch.cat(values).mean()) for path, values in sums.items()}

    def export(self, directory: Path) -> None:
        save_tokenizer(self.tokenizer, directory / "tokenizer")


def _json(value: Any) -> Any:
    """As the value looks after a round trip through JSON (tuples become lists)."""
    import json

    return json.loads(json.dumps(value))
