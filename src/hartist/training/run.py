"""Starting the stages from a dataset and a recipe"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from hartist.config import TransformerConfig
from hartist.data.reader import open_dataset
from hartist.data.stream import ImageStream, Settings
from hartist.data.transform import Crop
from hartist.errors import UserError
from hartist.generation.checkpoint import LoadedModel
from hartist.generation.loading import find_model, load_tokenizer_of
from hartist.scales import ScaleSchedule, Side
from hartist.text.loading import load_text_encoder
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.tokenizer.sides import tokenizer_with_sides
from hartist.tokenizer.stem import double_stem
from hartist.training.batches import micro_batches, step_seed
from hartist.training.config import RunConfig
from hartist.training.discriminator import read_released_discriminator
from hartist.training.generator_stage import VALIDATION_IMAGES, GeneratorStage, TrainingPhase, residual_scale
from hartist.training.image_source import ImageSource, MemorySource, StreamSource
from hartist.training.images import load_images
from hartist.training.loop import train
from hartist.training.lora import add_adapters
from hartist.training.parallel import Strategy, World
from hartist.training.perceptual import find_perceptual
from hartist.training.prepare import held_out, prepare_data
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.tokenizer_stage import TokenizerStage
from hartist.transformer.model import ScaleTransformer
from hartist.transformer.sides import transformer_with_sides


@dataclass(frozen=True)
class DataOptions:
    """How images are read."""

    stream: bool = False
    """Read as they are needed rather than all at the start: for more images than memory holds."""
    workers: int = 0
    """Processes that decode the images of a stream."""
    crop: Crop = "centre"
    """Of a stream; images in memory are cropped once, at their centre."""
    flip: bool = False
    """Mirror every other image."""


def train_tokenizer(
    data: Path | str,
    out: Path,
    recipe: TokenizerRecipe,
    *,
    options: DataOptions | None = None,
    start_from: Path | None = None,
    double: bool = False,
    sides: Sequence[Side] = (),
    trunk: Path | None = None,
    discriminator: Path | None = None,
    world: World | None = None,
    progress: bool = True,
) -> int:
    """Train a tokenizer; returns the number of finished steps. The result is in out/tokenizer.

    `start_from`: a tokenizer of any layout we read, to begin with instead of random weights (the recipe's
    sizes then give way to its own), with `double` for pictures of twice its size (`double_stem`), with `sides` on
    other scales than its own. `trunk`: weights of the perceptual network, where no package has them.
    `discriminator`: a released tokenizer whose PatchGAN the adversarial loss begins with.
    """
    world, options = world or World(), options or DataOptions()
    check_shares(recipe.run, world)
    if recipe.losses.frozen_encoder and start_from is None:
        raise UserError("this recipe trains the decoder of a discrete tokenizer: name one with --start-from")
    adversary = read_released_discriminator(discriminator) if discriminator is not None else None
    if adversary is not None and not (recipe.losses.adversarial and recipe.losses.adversary.kind == "patchgan"):
        raise UserError(
            f"{discriminator} is a PatchGAN, which this recipe doesn't use; "
            "add --set losses.adversary.kind=patchgan --set losses.adversarial=0.5"
        )
    started = carried(start_from, double=double, sides=sides)
    if started is not None:
        _check_cells(started.schedule, started, recipe.image_size, "its last scale")
    if recipe.losses.perceptual:
        find_perceptual(recipe.losses.perceptual_network, trunk)  # absent weights are told of before pictures are read
    source, validation = _image_source(data, recipe, options, world, progress and world.main)
    torch.manual_seed(recipe.run.seed)
    tokenizer = HybridTokenizer(recipe.tokenizer) if started is None else started
    stage = TokenizerStage(
        tokenizer, recipe.losses, recipe.run, source, validation, world=world, trunk=trunk, discriminator=adversary
    )
    return train(stage, recipe.run, out, world=world, progress=progress)


def carried(start_from: Path | None, *, double: bool = False, sides: Sequence[Side] = ()) -> HybridTokenizer | None:
    """The finished tokenizer to go on with, if any, at twice its resolution or on other scales if asked for.

    Raises UserError if that is asked for and there is none.
    """
    if start_from is None:
        if double:
            raise UserError("--double-stem doubles the stem of a finished tokenizer: name one with --start-from")
        if sides:
            raise UserError("--scales gives a finished tokenizer other scales: name one with --start-from")
        return None
    tokenizer = load_tokenizer_of(start_from)
    tokenizer = double_stem(tokenizer) if double else tokenizer
    return tokenizer_with_sides(tokenizer, sides) if sides else tokenizer


def check_shares(run: RunConfig, world: World, factor: int = 1) -> None:
    """Raise UserError if the ranks can't share a batch equally: here, and not after hours of reading data."""
    world.share(micro_batches(0, run.batch_size * factor, run.micro_batch, run.seed))


def _image_source(
    data: Path | str, recipe: TokenizerRecipe, options: DataOptions, world: World, progress: bool
) -> tuple[ImageSource, UInt8[Tensor, "m h w 3"]]:
    """The training images, and the held-out ones that are looked at now and then."""
    size = recipe.image_size
    if not options.stream:
        train_set = load_images(data, "train", size, progress=progress)
        validation = held_out(lambda: load_images(data, "validation", size, progress=progress), world)
        memory = MemorySource(train_set.pixels, train_set.fingerprint, flip=options.flip)
        return memory, train_set.pixels[:0] if validation is None else validation.pixels
    settings = Settings(
        size, options.crop, options.flip, seed=recipe.run.seed, world_size=world.size, workers=options.workers
    )
    opened = open_dataset(data, "train", streaming=True)
    fingerprint = f"{opened.fingerprint}-{options.crop}{'-flip' if options.flip else ''}"
    source = StreamSource(ImageStream(opened, settings, world.rank), fingerprint)
    pixels = held_out(lambda: _first_images(data, size), world)
    return source, torch.empty(0, size, size, 3, dtype=torch.uint8) if pixels is None else pixels


def _first_images(data: Path | str, size: int) -> UInt8[Tensor, "m h w 3"]:
    """Of the validation split, as many as are looked at."""
    stream = ImageStream(open_dataset(data, "validation", streaming=True), Settings(size, shuffle=False, epochs=1))
    return torch.stack([torch.from_numpy(sample.pixels) for sample in itertools.islice(stream, VALIDATION_IMAGES)])


def train_generator(
    data: Path | str | None,
    tokenizer_dir: Path | None,
    out: Path,
    recipe: GeneratorRecipe,
    *,
    text_encoder_dir: Path | None = None,
    start: LoadedModel | None = None,
    lora_rank: int = 0,
    cache_dir: Path | None = None,
    world: World | None = None,
    strategy: Strategy = "ddp",
    progress: bool = True,
) -> int:
    """Train a generator; returns the number of finished steps. The result is in out/model.

    `start` is a model whose transformer the run begins with, instead of random weights: the recipe's sizes then give
    way to its own, on the recipe's scales. Without `tokenizer_dir` its tokenizer is taken, and its text encoder; else
    the bundled model's MiniLM encodes the captions. Tokens and text states are computed once, into `cache_dir`
    (out/cache); without `data` they are there.
    """
    world = world or World()
    for phase in recipe.phases:
        check_shares(recipe.run, world, phase.batch_factor)
    if tokenizer_dir is None and start is None:
        raise UserError("a generator needs a tokenizer: name one with --tokenizer, or a model with --start-from")
    tokenizer = load_tokenizer_of(tokenizer_dir) if tokenizer_dir is not None else start.tokenizer  # type: ignore[union-attr]
    if start is not None:
        recipe = going_on(recipe, start, tokenizer)
    _check_scales(recipe, tokenizer)
    encoder = None
    if recipe.transformer.condition == "text":
        if text_encoder_dir is None:
            own = start.text_encoder_dir if start is not None else None
            text_encoder_dir = own or find_model(None) / "text_encoder"
        encoder = load_text_encoder(text_encoder_dir, num_tokens=recipe.transformer.context_tokens)
    prepared = prepare_data(
        data, cache_dir or out / "cache", recipe.phases, tokenizer, encoder, world=world, progress=progress
    )
    config = dataclasses.replace(
        recipe.transformer,
        vocab_size=tokenizer.config.vocab_size,
        latent_channels=tokenizer.config.latent_channels,
        context_dim=encoder.dim if encoder is not None else recipe.transformer.context_dim,
    )
    if config.residual is not None and start is None:
        # The spread of the residual tokens is the tokenizer's; diffusion wants it within ±1.
        last_length = ScaleSchedule.from_sides(recipe.phases[-1].sides).lengths[-1]
        scale = residual_scale(prepared.train[-1], tokenizer.quantizer, last_length)
        config = dataclasses.replace(config, residual=dataclasses.replace(config.residual, target_scale=scale))
    transformer = _first_transformer(config, start, recipe.run.seed)
    if lora_rank:
        add_adapters(transformer, lora_rank, recipe.run.seed)
    text_dir = text_encoder_dir if encoder is not None else None
    model = LoadedModel(tokenizer, transformer, encoder, recipe.name, recipe.sampling, text_dir)
    phases = [
        TrainingPhase(
            first,
            recipe.run.batch_size * phase.batch_factor,
            ScaleSchedule.from_sides(phase.sides),
            phase.scales or len(phase.sides),
            prepared.train[i],
            prepared.validation[i],
        )
        for i, (first, phase) in enumerate(zip(recipe.first_steps(), recipe.phases, strict=True))
    ]
    key = f"{prepared.key}{f'-lora{lora_rank}' if lora_rank else ''}"
    stage = GeneratorStage(recipe.losses, recipe.run, phases, model, key, prompts=prepared.prompts, world=world)
    return train(stage, recipe.run, out, world=world, strategy=strategy, progress=progress)


def _first_transformer(config: TransformerConfig, start: LoadedModel | None, seed: int) -> ScaleTransformer:
    """With random weights, or with those of a model, on the scales of `config`."""
    if start is None:
        torch.manual_seed(step_seed(seed, 0, stream=4))
        transformer = ScaleTransformer(config)
        transformer.initialise()
        return transformer
    return transformer_with_sides(start.transformer, config.sides).float()


def going_on(recipe: GeneratorRecipe, start: LoadedModel, tokenizer: HybridTokenizer) -> GeneratorRecipe:
    """The recipe with the sizes of the model it goes on from; scales, steps and losses stay the recipe's.

    Raises UserError if the model was made for another codebook.
    """
    config, codes = start.transformer.config, tokenizer.config
    if (config.vocab_size, config.latent_channels) != (codes.vocab_size, codes.latent_channels):
        raise UserError(
            f"the tokenizer has {codes.vocab_size:,} codes of {codes.latent_channels} channels, the model "
            f"{start.name!r} predicts {config.vocab_size:,} of {config.latent_channels}; take a tokenizer that "
            "began with the model's"
        )
    return dataclasses.replace(recipe, transformer=dataclasses.replace(config, sides=recipe.transformer.sides))


def _check_scales(recipe: GeneratorRecipe, tokenizer: HybridTokenizer) -> None:
    """Scales beside the tokenizer's own are fine if they share their φ: it is one tokenizer at every resolution."""
    for phase in recipe.phases:
        _check_cells(ScaleSchedule.from_sides(phase.sides), tokenizer, phase.image_size, f"the recipe {recipe.name}")


def _check_cells(schedule: ScaleSchedule, tokenizer: HybridTokenizer, image_size: int, whose: str) -> None:
    h, w = schedule.finest
    if h * tokenizer.config.downsampling != image_size:
        raise UserError(
            f"the tokenizer has {tokenizer.config.downsampling} pixels a cell: {image_size} px do not "
            f"make the {h}×{w} cells of {whose}"
        )
