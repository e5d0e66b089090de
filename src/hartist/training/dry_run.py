"""What a run would take: parameters, tokens, memory and time, told before anything starts"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hartist.precision import autocast
from hartist.scales import ScaleSchedule
from hartist.tokenizer.hybrid import HybridTokenizer
from hartist.training.config import GeneratorLossConfig, Phase, RunConfig
from hartist.training.cost import peak_flops
from hartist.training.generator_cost import empty_pass, mean_kept, step_flops
from hartist.training.muon import hidden_matrices
from hartist.training.parallel import Strategy, World
from hartist.training.recipe import GeneratorRecipe, TokenizerRecipe
from hartist.training.tokenizer_stage import image_flops
from hartist.transformer.model import ScaleTransformer

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Work:
    """The steps of one phase."""

    steps: int
    batch: int
    flops: float
    """Per image."""


REFERENCE = "8×H100", 8 * 989e12
REFERENCE_MFU = 0.35
"""Assumed, not measured: a usual utilisation of such machines by transformers of this size."""


def describe_tokenizer(recipe: TokenizerRecipe, world: World) -> str:
    """The lines of `--dry-run` for a tokenizer."""
    side, config = recipe.image_size, recipe.tokenizer
    network = _on_meta(lambda: HybridTokenizer(config))

    def forward(network: HybridTokenizer, batch: int) -> Tensor:
        image = torch.empty(batch, 3, side, side, device=next(network.parameters()).device)
        return network.decoder(network.post_quant_conv(network.quant_conv(network.encoder(image))))

    flops = image_flops(config, side)
    lines = [f"tokenizer: {_millions(network)} M parameters, {side} px → {'×'.join(map(str, config.schedule.finest))}"]
    lines.append(f"tokens per image: {config.schedule.num_tokens:,} on {len(config.schedule)} scales")
    micro = recipe.run.micro_batch or max(1, recipe.run.batch_size // world.size)
    activations = saved_bytes(network, lambda: forward(network, micro), recipe.run.bf16)
    lines += _memory(network, activations, recipe.run, world, "ddp")
    lines += _time(recipe.run, world, [Work(recipe.run.steps, recipe.run.batch_size, flops)])
    if _fits_here(network, activations, recipe.run, world):
        count = recipe.run.batch_size // micro // world.size
        seconds = measured_seconds(lambda: HybridTokenizer(config), lambda net: forward(net, micro), recipe.run, world)
        lines.append(_measured(seconds * count, recipe.run.steps))
    lines.append("perceptual network and discriminator come on top of these figures")
    return "\n".join(lines)


def describe_generator(recipe: GeneratorRecipe, world: World, strategy: Strategy) -> str:
    """The lines of `--dry-run` for a generator."""
    config, losses = recipe.transformer, recipe.losses

    def build() -> ScaleTransformer:
        network = ScaleTransformer(config)
        network.activation_checkpointing = recipe.run.activation_checkpointing
        return network

    network = _on_meta(build)
    lines = [f"transformer: {_millions(network)} M parameters, width {config.width}, {config.depth} blocks"]
    work: list[Work] = []
    most = 0.0
    firsts = [*recipe.first_steps(), recipe.run.steps]
    for i, phase in enumerate(recipe.phases):
        schedule = ScaleSchedule.from_sides(phase.sides)
        lines.append(_tokens(phase, schedule, config.prefix_tokens, losses))
        batch = recipe.run.batch_size * phase.batch_factor
        scales = phase.scales or len(schedule)
        flops = step_flops(config, schedule, losses, scales)
        work.append(Work(firsts[i + 1] - firsts[i], batch, flops))
        micro = recipe.run.micro_batch or max(1, batch // world.size)
        forward = functools.partial(_logits, schedule=schedule, losses=losses, images=micro, scales=scales)
        most = max(most, saved_bytes(network, functools.partial(forward, network), recipe.run.bf16))
    lines += _memory(network, most, recipe.run, world, strategy)
    lines += _time(recipe.run, world, work)
    if _fits_here(network, most, recipe.run, world):
        count = batch // micro // world.size
        seconds = measured_seconds(build, forward, recipe.run, world)
        lines.append(_measured(seconds * count, work[-1].steps))
    return "\n".join(lines)


def _logits(network: ScaleTransformer, **what: Any) -> Tensor:
    return empty_pass(network, **what)[1]


def _tokens(phase: Phase, schedule: ScaleSchedule, prefix: int, losses: GeneratorLossConfig) -> str:
    image = schedule.num_tokens
    line = f"tokens per image at {phase.image_size} px: {prefix} of the condition, {image:,} on {len(schedule)} scales"
    if losses.subsample_last_scale:
        line += f"; {image - schedule.lengths[-1] + mean_kept(schedule, losses):,} seen on average"
    return line


def saved_bytes(network: nn.Module, forward: Callable[[], Tensor], bf16: bool) -> float:
    """What the backward pass would keep of a forward pass, beside the weights; nothing is computed."""
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor, storage.nbytes()  # holding the tensor keeps its address from being reused
        return tensor

    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        forward()
    total = float(sum(size for _, size in kept.values()))
    return total / 2 if bf16 else total


def _on_meta(build: Callable[[], Network]) -> Network:
    with torch.device("meta"):
        return build()


def _millions(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:,.1f}"


def _state_bytes(network: nn.Module, run: RunConfig) -> int:
    """Weight, gradient, moments and average of every parameter, float32 each."""
    numbers = 5 * sum(p.numel() for p in network.parameters())
    if run.optimizer.kind == "muon":  # one moment where AdamW has two
        numbers -= sum(p.numel() for p in hidden_matrices(network))
    return 4 * numbers


def _memory(network: nn.Module, activations: float, run: RunConfig, world: World, strategy: Strategy) -> list[str]:
    state = _state_bytes(network, run) / (world.size if strategy == "fsdp" else 1)
    return [
        f"memory per rank: {(state + activations) / 2**30:.2f} GiB, of it {state / 2**30:.2f} for weights, gradients, "
        f"moments and average, about {activations / 2**30:.2f} for activations"
    ]


def _fits_here(network: nn.Module, activations: float, run: RunConfig, world: World) -> bool:
    """Whether a step can be tried: at most a third of a GPU's memory, or 4 GiB on a CPU."""
    needed = _state_bytes(network, run) + activations
    if world.device.type == "cuda":
        return needed < torch.cuda.get_device_properties(world.device).total_memory / 3
    return world.device.type == "cpu" and needed < 4 * 2**30


def measured_seconds(
    build: Callable[[], Network], forward: Callable[[Network], Tensor], run: RunConfig, world: World
) -> float:
    """Of forward and backward pass with weights and inputs without content, the second time."""
    with torch.device(world.device):
        network = build()
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with autocast(world.device, run.bf16):
            output = forward(network)
        output.float().mean().backward()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds = time.perf_counter() - start
    return seconds


def _measured(seconds: float, steps: int) -> str:
    return f"measured on this machine: {seconds:.2f} s a step of the last kind, {_duration(seconds * steps)} for them"


def _time(run: RunConfig, world: World, work: list[Work]) -> list[str]:
    lines = [f"{w.steps:,} steps of {w.batch:,} images, {w.batch * w.flops / 1e12:.3g} TFLOP each" for w in work]
    total = sum(w.steps * w.batch * w.flops for w in work)
    measured = peak_flops(world, run.bf16)
    if measured:
        ranks = f"{world.size} {'rank' if world.size == 1 else 'ranks'}"
        lines.append(
            f"this machine ({ranks}, {measured / 1e12:.2f} TFLOP/s at best): at least {_duration(total / measured)}"
        )
    name, peak = REFERENCE
    hours = _duration(total / peak / REFERENCE_MFU)
    lines.append(f"{name}, an estimate: {hours} at an assumed utilisation of {REFERENCE_MFU:.0%}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 200 * 3600 else f"{seconds / 86400:.1f} days"
