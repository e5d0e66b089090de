"""Tokenizer stage: reconstruction with the paper's coin flip between discrete and hybrid decoding

The published way (paper section 4) starts from a discrete tokenizer and trains the decoder alone
(`frozen_encoder`); from scratch, a continuous warm-up and a discrete phase may come before the coin.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from hartist import config as configs
from hartist.config import TokenizerConfig
from hartist.errors import UserError
from hartist.evaluation.image_metrics import psnr
from hartist.files import atomic_directory, clear_temporaries
from hartist.pixels import from_uint8, save_grid, to_uint8
from hartist.precision import autocast
from hartist.tokenizer.autoencoder import last_layer
from hartist.tokenizer.checkpoint import save_tokenizer
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.quantizer import QuantizerTraining
from hartist.training.adversarial import AdversarialLoss
from hartist.training.adversarial_terms import adaptive_weight
from hartist.training.batches import MicroBatch, step_seed
from hartist.training.codebook import kmeans, revive_dead_codes, scale_vectors
from hartist.training.config import RunConfig, TokenizerLossConfig
from hartist.training.cost import BACKWARD, forward_flops
from hartist.training.discriminator import PatchDiscriminator
from hartist.training.image_source import ImageSource
from hartist.training.loop import Part, StepLoss
from hartist.training.parallel import World
from hartist.training.perceptual import find_perceptual, random_crops
from hartist.training.usage import perplexity_per_scale


class TokenizerStage:
    """A tokenizer on the run's device, and optionally a discriminator."""

    def __init__(
        self,
        tokenizer: HybridTokenizer,
        losses: TokenizerLossConfig,
        run: RunConfig,
        source: ImageSource,
        validation: UInt8[Tensor, "m h w 3"],
        *,
        world: World | None = None,
        trunk: Path | None = None,
        discriminator: PatchDiscriminator | None = None,
    ) -> None:
        """`trunk`: the file of the perceptual network's weights, where the package has none. `discriminator`: one
        to go on with, in place of a fresh one."""
        self.losses, self.run, self.source, self.validation = losses, run, source, validation
        self.world = world or World()
        self.device = self.world.device
        # channels_last: convolutions on CPU run about twice as fast
        self.tokenizer = tokenizer.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tokenizer.requires_grad_(True)
        if losses.frozen_encoder:
            for module in (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantizer):
                module.requires_grad_(False)
        if run.compile:
            if self.device.type == "cpu":
                # PyTorch 2.13's Inductor returned zeros for half the gradients, in bfloat16 with channels last.
                raise UserError("run.compile gives a tokenizer wrong gradients on a CPU; leave it out")
            tokenizer.encoder.compile()
            tokenizer.decoder.compile()
        torch.manual_seed(step_seed(run.seed, 0, stream=4))
        self.adversarial: AdversarialLoss | None = None
        if losses.adversarial:
            self.adversarial = AdversarialLoss(losses.adversary, discriminator).to(self.device)
        self.perceptual: nn.Module | None = None
        if losses.perceptual:
            self.perceptual = find_perceptual(losses.perceptual_network, trunk).to(self.device)
        scales, codes = len(tokenizer.schedule), tokenizer.config.vocab_size
        self.hits_KV = torch.zeros(scales, codes, dtype=torch.long, device=self.device)
        """Codes chosen on each scale since dead ones were last looked for."""
        self._step_hits_KV = torch.zeros_like(self.hits_KV)
        self._latent_BChw: Tensor | None = None
        self._reconstructions: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def parts(self) -> list[Part]:
        parts = [Part("tokenizer", self.tokenizer, self.tokenizer_loss)]
        if self.adversarial is not None:
            start = self.losses.adversary.first_step(self.run.steps)
            parts.append(Part("discriminator", self.adversarial, self.discriminator_loss, start))
        return parts

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "tokenizer_config": configs.to_json(self.tokenizer.config),
            "losses": configs.to_json(self.losses),
            "run": self.run.identity,
            "data": self.source.fingerprint,
        }

    @property
    def gathered(self) -> dict[str, Tensor]:
        return {"hits": self.hits_KV}

    @property
    def position(self) -> Any:
        return self.source.position

    def seek(self, position: Any) -> None:
        self.source.seek(position)

    def batch_at(self, step: int) -> tuple[int, int]:
        return self.run.batch_size, 0

    def flops(self, step: int) -> float:
        """Of autoencoder and its gradients; perceptual network and discriminator are not counted."""
        return image_flops(self.tokenizer.config, self.validation.shape[1]) * self.run.batch_size

    def _images(self, micro: MicroBatch) -> Float[Tensor, "b 3 h w"]:
        pixels = self.source.batch(micro).to(self.device)
        return from_uint8(pixels).to(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        return autocast(self.device, self.run.bf16)

    def path(self, micro: MicroBatch) -> str:
        """What the decoder sees in this step: one draw for the whole batch, as in the paper."""
        losses, step = self.losses, micro.step
        if step < losses.continuous_steps:
            return "continuous"
        coin = bool(torch.rand((), generator=micro.generator(stream=2)) < losses.hybrid_probability)
        hybrid = coin and step >= losses.continuous_steps + losses.discrete_steps
        return "hybrid" if hybrid else "discrete"

    def tokenizer_loss(self, micro: MicroBatch) -> StepLoss:
        losses, tokenizer, path = self.losses, self.tokenizer, self.path(micro)
        image = self._images(micro)
        with self._autocast(), torch.set_grad_enabled(not losses.frozen_encoder):
            f_BChw = tokenizer.quant_conv(tokenizer.encoder(image))
        f_BChw = f_BChw.float()
        if micro.index == 0:
            self._latent_BChw = f_BChw.detach()
        quantized: QuantizerTraining | None = None
        if path != "continuous":
            with torch.set_grad_enabled(not losses.frozen_encoder):
                quantized = tokenizer.quantizer.training_pass(f_BChw, add_residual=path == "hybrid")
            self._step_hits_KV += quantized.hits_KV
        with self._autocast():
            decoder_input = f_BChw if quantized is None else quantized.f_hat_BChw
            output = tokenizer.decoder(tokenizer.post_quant_conv(decoder_input)).float()

        l1, l2 = (output - image).abs().mean(), (output - image).square().mean()
        loss = losses.l1 * l1 + losses.l2 * l2
        logs = {f"l1_{path}": l1.item(), f"psnr_{path}": float(psnr(output.detach(), image).mean())}
        if self.perceptual is not None:
            seen = max(1, round(losses.perceptual_share * len(image)))
            crops = random_crops([output[:seen], image[:seen]], losses.perceptual_crop, micro.generator(stream=6))
            with self._autocast():
                perceptual = self.perceptual(*crops)
            loss = loss + losses.perceptual * perceptual
            logs["perceptual"] = perceptual.item()
        if self.adversarial is not None and micro.step >= losses.adversary.first_step(self.run.steps):
            self._reconstructions[micro.index] = image, output.detach()
            with self._autocast():
                adversarial = self.adversarial.generator_loss(output, micro.generator(stream=7)).float()
            weight = adaptive_weight(loss, adversarial, last_layer(tokenizer.decoder))
            weight = weight * losses.adversary.share(micro.step, self.run.steps)
            loss = loss + losses.adversarial * weight * adversarial
            logs |= {"adversarial": adversarial.item(), "adversarial_weight": float(weight)}
        if quantized is not None:
            loss = loss + losses.quantizer * quantized.loss
            logs |= {"quantizer": quantized.loss.item(), "usage": quantized.usage}
            logs |= {f"usage_{k}": usage for k, usage in enumerate(quantized.usage_per_scale)}
        return StepLoss(loss, {"loss": loss.item(), **logs})

    def discriminator_loss(self, micro: MicroBatch) -> StepLoss:
        assert self.adversarial is not None
        image, reconstruction = self._reconstructions.pop(micro.index)
        with self._autocast():
            result = self.adversarial.discriminator_loss(image, reconstruction, micro.step, micro.generator(stream=8))
        return StepLoss(result.loss, result.logs)

    @torch.no_grad()
    def after_step(self, step: int) -> dict[str, float]:
        """Initialise the codebook when the continuous warm-up ends; revive dead codes from time to time."""
        losses, quantizer = self.losses, self.tokenizer.quantizer
        self._average_buffers()
        if step < losses.continuous_steps - 1:
            return {}
        if losses.continuous_steps and step == losses.continuous_steps - 1:
            self._initialise_codebook(step)
            return {}
        self.hits_KV += self.world.sum(self._step_hits_KV)
        self._step_hits_KV.zero_()
        window = losses.revive_every or 100
        if (step + 1) % window:
            return {}
        figures = {f"codes_{k}": float(n) for k, n in enumerate((self.hits_KV > 0).sum(1).tolist())}
        figures |= {f"perplexity_{k}": p for k, p in enumerate(perplexity_per_scale(self.hits_KV).tolist())}
        # Not in the last tenth: a code moved late has no time to settle.
        if losses.revive_every and not losses.frozen_encoder and step < 0.9 * self.run.steps:
            generator = torch.Generator().manual_seed(step_seed(self.run.seed, step, stream=3))
            latent_BChw = self._latent_BChw
            if self.world.main and latent_BChw is not None and latent_BChw.isfinite().all():
                vectors_NC = scale_vectors(latent_BChw, quantizer.schedule, quantizer.phi_function, 256, generator)
                figures["revived"] = revive_dead_codes(
                    quantizer.codebook.data, self.hits_KV.sum(0), vectors_NC, generator
                )
            figures["revived"] = float(self.world.broadcast(figures.get("revived", 0)))
            self.world.broadcast_tensor(quantizer.codebook.data)
        self.hits_KV.zero_()
        return figures

    def _initialise_codebook(self, step: int) -> None:
        """k-means on what the loop meets, from the first batches' images of the run (same on every machine)."""
        quantizer = self.tokenizer.quantizer
        generator = torch.Generator().manual_seed(step_seed(self.run.seed, step, stream=3))
        if self.world.main:
            assert self._latent_BChw is not None
            latents = [self._latent_BChw, *self._more_latents(512 - len(self._latent_BChw), step)]
            vectors_NC = scale_vectors(torch.cat(latents), quantizer.schedule, quantizer.phi_function, 4096, generator)
            quantizer.codebook.copy_(kmeans(vectors_NC, len(quantizer.codebook), generator))
        self.world.broadcast_tensor(quantizer.codebook.data)
        self.hits_KV.zero_()
        self._step_hits_KV.zero_()

    def _more_latents(self, count: int, step: int) -> list[Tensor]:
        """Latents of further images; none from a stream, whose place must not move."""
        if self.source.position is not None or count <= 0:
            return []
        self.tokenizer.eval()
        size = min(count, 32)
        parts = [MicroBatch(step + 1, i, -(-count // size), size, self.run.seed) for i in range(-(-count // size))]
        return [self.tokenizer.encode_latent(self._images(part)) for part in parts]

    def _average_buffers(self) -> None:
        """A discriminator's running statistics are each rank's own until here."""
        if self.adversarial is not None and self.world.size > 1:
            for buffer in self.adversarial.buffers():
                if buffer.is_floating_point():
                    self.world.sum(buffer).div_(self.world.size)

    def pictures(self, networks: Mapping[str, nn.Module], directory: Path, step: int) -> dict[str, float]:
        """Strips of original, discrete and hybrid reconstruction; PSNR of both paths on held-out images."""
        tokenizer = networks["tokenizer"]
        assert isinstance(tokenizer, HybridTokenizer)
        if not len(self.validation):
            return {}
        sums: dict[str, list[Tensor]] = {"discrete": [], "hybrid": []}
        rows: list[list[Tensor]] = []
        # Evenly from all held-out images: they may be sorted by subject.
        chosen = self.validation[:: max(1, len(self.validation) // 256)][:256]
        for pixels in chosen.split(32):
            image = from_uint8(pixels.to(self.device))
            tokens = tokenizer.encode(image)
            discrete, hybrid = tokenizer.decode_discrete(tokens.ids), tokenizer.decode(tokens)
            sums["discrete"].append(psnr(discrete, image))
            sums["hybrid"].append(psnr(hybrid, image))
            if len(rows) < 6:
                rows += [[to_uint8(x[i]) for x in (image, discrete, hybrid)] for i in range(min(2, len(image)))]
        strips = [[pixels for row in rows[i : i + 2] for pixels in row] for i in range(0, len(rows), 2)]
        save_grid(directory / f"reconstruction_{step:07d}.png", strips)
        return {f"validation_psnr_{path}": float(torch.cat(values).mean()) for path, values in sums.items()}

    def export(self, networks: Mapping[str, nn.Module], directory: Path) -> None:
        tokenizer = networks["tokenizer"]
        assert isinstance(tokenizer, HybridTokenizer)
        clear_temporaries(directory / "tokenizer")
        with atomic_directory(directory / "tokenizer") as temporary:
            save_tokenizer(tokenizer, temporary)


@functools.cache
def image_flops(config: TokenizerConfig, side: int) -> float:
    """Operations of the autoencoder's forward and backward pass for one image of `side` pixels."""

    def run(network: nn.Module) -> None:
        assert isinstance(network, HybridTokenizer)
        network.decode_latent(network.encode_latent(torch.empty(1, 3, side, side)))

    return (1 + BACKWARD) * forward_flops(lambda: HybridTokenizer(config), run)
