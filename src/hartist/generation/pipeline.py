"""The pipeline: encode the prompt, then scale by scale predict, sample and denoise, then decode."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from hartist.errors import UserError, quoted
from hartist.generation.checkpoint import LoadedModel, save_model
from hartist.generation.devices import choose_device, choose_dtype
from hartist.generation.loading import find_model, load_any
from hartist.generation.loop import ScaleResult, Scales, generate_scales
from hartist.generation.noise import ImageNoise
from hartist.generation.prompts import check_prompt, check_text
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST, guidance_strengths
from hartist.pixels import to_uint8
from hartist.text.encoder import CachedTextEncoder, TextContext, unconditional_context
from hartist.tokenizer.hybrid import fast_layout
from hartist.tokenizer.strips import decode_latent_in_strips
from hartist.transformer.compiled import compile_blocks, refuse_both
from hartist.transformer.int8 import quantize_int8
from hartist.transformer.prefix import Prefix, Prefixes


@dataclass(frozen=True)
class Request:
    """One image to make: a prompt or class label, and its seed."""

    prompt: str | int
    seed: int


@dataclass(frozen=True)
class Generated:
    """One finished image and what it takes to make it again."""

    image: Image.Image
    prompt: str | int
    negative_prompt: str | None
    seed: int
    settings: SamplingSettings
    model: str
    scale_images: tuple[Image.Image, ...] = ()
    """One picture a scale, coarse to fine, if asked for."""
    truncated_tokens: int = 0
    """Tokens at the end of the prompt that did not fit into the context."""


ScaleCallback = Callable[[ScaleResult], None]


class Pipeline:
    """A model ready to generate. `Pipeline.from_pretrained()` loads the bundled one.

    It keeps what depends on the weights and on nothing else: make another after changing them.
    """

    def __init__(
        self, model: LoadedModel, device: torch.device | str = "cpu", text_device: torch.device | str | None = None
    ) -> None:
        self.model = model
        self.device = torch.device(device)
        self.tokenizer = fast_layout(model.tokenizer.to(self.device))
        self.transformer = model.transformer.to(self.device)
        self.text_encoder = None
        if model.text_encoder is not None:
            model.text_encoder.to(text_device or self.device)
            self.text_encoder = CachedTextEncoder(model.text_encoder)
        self._prefixes = Prefixes(self.transformer)
        self.int8 = False

    # ----------------------------------------------------------------- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | str | None = None,
        text_model: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
        use_ema: bool = True,
        int8: bool = False,
        compile: bool = False,
        text_device: str | None = None,
    ) -> Pipeline:
        """Load a model: a directory, a Hugging Face Hub id, or nothing for the bundled one.

        Understands Hartist's own layout, the released HART layout (`llm/`, `tokenizer/`, and a Qwen2
        text model in `text_model`), and VAR's transformer `.pth` (with the autoencoder's `.pth` in
        `tokenizer`). `device` defaults to CUDA, then MPS, then CPU; `dtype` to bfloat16 on CUDA and
        float32 elsewhere. `text_device` is where prompts are encoded, if elsewhere. `int8` makes the transformer's
        products in eight bits, on a CPU. `compile` has PyTorch compile the transformer, which takes a minute at the
        first image and makes the later ones faster. Raises UserError if the model is unknown, damaged or foreign.
        """
        refuse_both(int8=int8, compile=compile)  # before minutes of loading
        chosen = choose_device(device)
        loaded = load_any(
            find_model(model),
            dtype=choose_dtype(dtype, chosen),
            text_model=Path(text_model) if text_model else None,
            tokenizer=Path(tokenizer) if tokenizer else None,
            use_ema=use_ema,
        )
        pipe = cls(loaded, chosen, choose_device(text_device) if text_device else None)
        pipe.speed_up(int8=int8, compile=compile)
        return pipe

    def speed_up(self, *, int8: bool = False, compile: bool = False) -> None:
        """Products in eight bits, or compiled blocks. Raises UserError where that can't be had, or for both at once."""
        refuse_both(int8=int8, compile=compile)
        if int8:
            quantize_int8(self.transformer)
            self.int8 = True
        if compile:
            compile_blocks(self.transformer)

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write the model in Hartist's layout. Raises UserError for one whose weights were rounded to eight bits."""
        if self.int8:
            raise UserError("a model loaded with int8 can't be saved; load it without")
        if self.text_encoder is not None and self.model.text_encoder is None:
            raise UserError("a model whose text encoder was unloaded can't be saved; load it anew")
        save_model(self.model, Path(directory), dtype)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub; returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model")
            api = HfApi()
            api.create_repo(repo_id, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "model", **options))

    # ----------------------------------------------------------------- properties

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        h, w = self.transformer.schedule.finest
        return h * self.tokenizer.config.downsampling, w * self.tokenizer.config.downsampling

    @property
    def is_class_conditional(self) -> bool:
        return self.transformer.config.condition == "class"

    def unload_text_encoder(self, prompts: Sequence[str]) -> None:
        """Encode these prompts, negative ones included, and free the text encoder: no others can be drawn then.

        The released model's text encoder has twice the transformer's parameters.
        """
        if self.text_encoder is not None:
            self.text_encoder.unload(prompts)
            self.model = dataclasses.replace(self.model, text_encoder=None)

    # ----------------------------------------------------------------- the five verbs

    def encode_prompts(self, prompts: Sequence[str | int]) -> TextContext | Int[Tensor, " b"]:
        """Context of prompts, or labels of a class-conditional model."""
        if self.is_class_conditional:
            return torch.tensor([self._label(prompt) for prompt in prompts], device=self.device)
        assert self.text_encoder is not None
        return self.text_encoder.encode([str(prompt) for prompt in prompts]).to(self.device)

    def unconditional(self, condition: TextContext | Tensor, negative_prompt: str | None) -> TextContext | Tensor:
        """The other branch of guidance: the negative prompt, or no condition at all."""
        if isinstance(condition, Tensor):
            return torch.full_like(condition, self.transformer.config.num_classes)
        if not negative_prompt:
            return unconditional_context(condition)
        assert self.text_encoder is not None
        return self.text_encoder.encode([negative_prompt] * len(condition)).to(self.device)

    def scales(
        self, requests: Sequence[Request], settings: SamplingSettings, negative_prompt: str | None = None
    ) -> Scales:
        """Predict, sample and denoise one batch; yields after every scale, takes the rows to go on with."""
        condition = self.encode_prompts([request.prompt for request in requests])
        return generate_scales(
            self.transformer,
            self.tokenizer.quantizer,
            condition,
            self._other_branch(condition, negative_prompt, settings),
            settings,
            ImageNoise([request.seed for request in requests], self.device),
        )

    def _other_branch(
        self, condition: TextContext | Tensor, negative_prompt: str | None, settings: SamplingSettings
    ) -> Prefix | TextContext | Tensor:
        """Guidance's other branch as a prefix, from the last few that were run."""
        if not settings.guidance:
            return self.unconditional(condition, negative_prompt)  # which nobody computes
        first = condition[:1] if isinstance(condition, Tensor) else condition.select([0])
        return self._prefixes.get(negative_prompt or "", lambda: self.unconditional(first, negative_prompt))

    @torch.inference_mode()
    def decode(self, f_hat_BChw: Float[Tensor, "b c h w"]) -> list[Image.Image]:
        """Pictures of a latent, one after the other: memory and pixels don't depend on the batch."""
        images = []
        for f_hat_1Chw in f_hat_BChw.split(1):
            if self.device.type == "cpu":  # as fast there
                image_13HW = decode_latent_in_strips(self.tokenizer, f_hat_1Chw)
            else:
                image_13HW = self.tokenizer.decode_latent(f_hat_1Chw)
            pixels = to_uint8(image_13HW)[0]
            images.append(Image.fromarray(pixels.cpu().numpy()))
        return images

    # ----------------------------------------------------------------- the whole

    def generate(
        self,
        requests: Sequence[Request],
        *,
        settings: SamplingSettings | None = None,
        negative_prompt: str | None = None,
        batch_size: int = 4,
        save_scales: bool = False,
        callback: ScaleCallback | None = None,
    ) -> Iterator[Generated]:
        """Make images in batches, yielding each as its batch is done.

        An image depends on its own request only, not on what is generated beside it.
        Raises UserError for prompts or settings the model can't serve.
        """
        settings = settings or self.model.settings
        self.check(requests, negative_prompt, batch_size, settings)
        truncated = self.truncated_tokens([request.prompt for request in requests])
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            strips: list[list[Image.Image]] = [[] for _ in batch]
            result: ScaleResult | None = None
            for result in self.scales(batch, settings, negative_prompt):
                if callback is not None:
                    callback(result)
                if save_scales:
                    for strip, image in zip(strips, self.decode(result.f_hat_BChw), strict=True):
                        strip.append(image)
            assert result is not None
            images = [strip[-1] for strip in strips] if save_scales else self.decode(result.f_hat_BChw)
            for i, (request, image) in enumerate(zip(batch, images, strict=True)):
                yield Generated(
                    image,
                    request.prompt,
                    negative_prompt,
                    request.seed,
                    settings,
                    self.model.name,
                    tuple(strips[i]),
                    truncated[start + i],
                )

    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        num_images: int = 1,
        seed: int = 0,
        negative_prompt: str | None = None,
        batch_size: int = 4,
        callback: ScaleCallback | None = None,
        fast: bool = False,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of one or several prompts (class labels for a class-conditional model).

        Image i of every prompt has the seed `seed + i`. Further keywords are the fields of
        SamplingSettings (guidance, top_k, temperature, …), and `fast=True` adds the shortcuts of fast mode.
        """
        prompts = [prompt] if isinstance(prompt, str | int) else list(prompt)
        requests = make_requests(prompts, num_images, seed)
        chosen = override(self.model.settings, **({**FAST, **settings} if fast else settings))
        generated = self.generate(
            requests, settings=chosen, negative_prompt=negative_prompt, batch_size=batch_size, callback=callback
        )
        return [item.image for item in generated]

    # ----------------------------------------------------------------- checks

    def check(
        self,
        requests: Sequence[Request],
        negative_prompt: str | None,
        batch_size: int,
        settings: SamplingSettings | None = None,
    ) -> None:
        """Raise a UserError for what can't be generated, before any work is done."""
        if settings is not None:  # refuses another number of scales
            guidance_strengths(settings, len(self.transformer.schedule), hold_last=True)
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}; it must be at least 1")
        for request in requests:
            if self.is_class_conditional:
                self._label(request.prompt)
            else:
                check_prompt(request.prompt)
        if negative_prompt and self.is_class_conditional:
            raise UserError("a class-conditional model takes no negative prompt; leave it out")
        if negative_prompt:
            check_text(negative_prompt, "the negative prompt")

    def _label(self, prompt: str | int) -> int:
        classes = self.transformer.config.num_classes
        try:
            label = int(prompt)
        except ValueError:
            label = -1
        if not 0 <= label < classes:
            raise UserError(f"{quoted(prompt)} is not a class of this model; give one from 0 to {classes - 1}")
        return label

    def truncated_tokens(self, prompts: Sequence[str | int]) -> list[int]:
        """Tokens at the end of each prompt that don't fit into the context."""
        if self.text_encoder is None:
            return [0] * len(prompts)
        return self.text_encoder.count_truncated_tokens([str(prompt) for prompt in prompts])


def make_requests(prompts: Sequence[str | int], num_images: int, seed: int) -> list[Request]:
    """Image i of every prompt has seed + i. Raises UserError for less than one image."""
    if num_images < 1:
        raise UserError(f"{num_images} images; ask for at least 1")
    if not prompts:
        raise UserError("no prompt given; describe the picture you want")
    return [Request(prompt, seed + i) for prompt in prompts for i in range(num_images)]


def override(settings: SamplingSettings, **changes: Any) -> SamplingSettings:
    """Settings with some fields changed; an unknown name is a UserError."""
    names = [field.name for field in dataclasses.fields(settings)]
    for name in changes:
        if name not in names:
            raise UserError(f"unknown setting {name!r}; there are {', '.join(names)}")
    return dataclasses.replace(settings, **changes)
