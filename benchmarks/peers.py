"""Our generation against diffusion models on one machine: python benchmarks/peers.py

PixArt-Σ, SDXL, SD3-medium and Sana as `diffusers` has them (pip install 'hartist[peers]'), with random weights,
guidance and their own decoders, and ours at the released size, exact and fast; each in a process of its own, one after
another. A few denoising steps are timed and their median multiplied by the number of steps, unless --whole runs them
all. Text encoders are left out on all sides. Decoders take one picture at a time, convolutions have channels last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peer_models import PEERS, Peer, build, decode, denoise_inputs, predict, tiny
from tables import describe, markdown
from torch import Tensor

from hartist.commands.flags_training import integers
from hartist.commands.output import require_writable
from hartist.config import ResidualConfig, TokenizerConfig
from hartist.errors import UserError
from hartist.evaluation.bench.hardware import machine, peak, reset_peak
from hartist.evaluation.bench.macs import count_macs, generation_work
from hartist.evaluation.bench.models import find_preset, random_pipeline, randomise
from hartist.evaluation.bench.timing import Timing, requests_for, time_run
from hartist.files import write_json
from hartist.generation.devices import choose_device, choose_dtype, now
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST
from hartist.precision import computes_bf16
from hartist.presets import Preset

INT8 = "Hartist-fast-int8"
"""With eight-bit products too, on a CPU."""
OURS = {"Hartist": SamplingSettings(), "Hartist-fast": SamplingSettings(**FAST), INT8: SamplingSettings(**FAST)}
DEFAULT = ("Hartist", "Hartist-fast", "PixArt-Σ", "SDXL", "SD3-medium", "Sana-0.6B")
GUIDANCE = 4.5


# ----------------------------------------------------------------- one process: one model


@torch.inference_mode()
def measure_peer(peer: Peer, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds, MACs and memory of one peer at `args.size`."""
    reset_peak(device)
    denoiser, decoder = build(peer, args.size)
    work, decode_work = peer_macs(peer, args.size, args.batch)
    for network in (denoiser, decoder):
        randomise(network, dtype, device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    side, steps = args.size // peer.downsampling, args.steps or peer.steps
    x_BChw, inputs = make(args.batch, peer.channels, side, side), denoise_inputs(peer, 2 * args.batch, make)
    seconds = []
    for step in range(args.warmup + (steps if args.whole else args.measured)):
        start = now(device)
        t_R = torch.full((2 * args.batch,), 999.0 * (1 - step / 1000), device=device)
        output_RChw = predict(peer, denoiser, torch.cat([x_BChw, x_BChw]), t_R, inputs)
        other, own = output_RChw.chunk(2)
        x_BChw = x_BChw - (other + GUIDANCE * (own - other)) / steps  # as cheap as any sampler's step
        seconds.append(now(device) - start)
    seconds = seconds[args.warmup :]
    latent_BChw = make(*x_BChw.shape)
    decoding = []
    for _ in range(args.warmup + args.repeats):
        start = now(device)
        for row_1Chw in latent_BChw.split(1):
            decode(decoder, row_1Chw)
        decoding.append(now(device) - start)
    return {
        "steps": steps,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "step_seconds": seconds,
        "generate_seconds": sum(seconds) if args.whole else statistics.median(seconds) * steps,
        "decode_seconds": statistics.median(decoding[args.warmup :]),
        "macs": asdict(work * steps),
        "decode_macs": asdict(decode_work),
        "memory": asdict(peak(device)),
    }


def peer_macs(peer: Peer, pixels: int, batch: int) -> tuple[Any, Any]:
    """MACs of a guided step and of decoding, both of one batch; nothing is computed."""
    denoiser, decoder = build(peer, pixels)
    side = pixels // peer.downsampling
    with torch.device("meta"):
        x_RChw, t_R = torch.empty(2, peer.channels, side, side), torch.empty(2)
        inputs = denoise_inputs(peer, 2, torch.empty)
        step = count_macs(lambda: predict(peer, denoiser, x_RChw, t_R, inputs))
        decoding = count_macs(lambda: decode(decoder, x_RChw[:1]))
    return step * batch, decoding * batch


def measure_ours(
    preset: Preset, settings: SamplingSettings, args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The same of ours: what denoising is there, scales and residual tokens are here."""
    reset_peak(device)
    pipe = random_pipeline(preset, dtype, device)
    pipe.speed_up(int8=args.worker == INT8)
    requests = requests_for(pipe, args.batch)
    runs = [time_run(pipe, requests, settings) for _ in range(args.warmup + args.repeats)]
    memory, timing = peak(device), Timing.of(runs[args.warmup :])
    work = generation_work(*preset, settings=settings, batch=args.batch)
    decoding = timing.decode.median
    return {
        "steps": len(pipe.transformer.schedule),
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "step_seconds": [],
        "generate_seconds": timing.total.median - decoding,
        "decode_seconds": decoding,
        "macs": asdict(work.transformer + work.residual),
        "decode_macs": asdict(work.decode),
        "memory": asdict(memory),
    }


def tiny_preset(preset: Preset) -> Preset:
    """The released model's form at 64 px, in a moment."""
    tokenizer = TokenizerConfig(vocab_size=64, latent_channels=8, channels=32, sides=(1, 2, 4))
    transformer = replace(
        preset[1],
        sides=tokenizer.sides,
        vocab_size=64,
        latent_channels=8,
        context_tokens=8,
        context_dim=16,
        width=32,
        depth=1,
        heads=2,
        residual=ResidualConfig(width=32, depth=1),
    )
    return tokenizer, transformer


def work(args: argparse.Namespace) -> dict[str, Any]:
    """What the process of one model does."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype or ("bfloat16" if computes_bf16(device) else "float32"), device)
    if args.worker in OURS:
        preset = find_preset("hart-256", None if args.tiny else args.size)
        figures = measure_ours(tiny_preset(preset) if args.tiny else preset, OURS[args.worker], args, device, dtype)
    else:
        peer = PEERS[args.worker]
        figures = measure_peer(tiny(peer) if args.tiny else peer, args, device, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    return {"model": args.worker, "size": args.size, "dtype": dtype_name, "machine": machine(device), **figures}


# ----------------------------------------------------------------- all of them


def run_all(args: argparse.Namespace, forwarded: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of all models, small pictures first; what is there so far is written after each."""
    found: list[dict[str, Any]] = []
    for size in sorted(args.sizes):
        for name in args.models:
            command = [sys.executable, str(Path(__file__).resolve()), *forwarded, "--worker", name, "--size", str(size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name} at {size} px failed (exit code {done.returncode}); see above", file=sys.stderr)
                continue
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}, {size} px: {total(found[-1]):.3f} s", file=sys.stderr, flush=True)
            if args.json is not None:
                write_json(args.json, {"batch": args.batch, "models": found})
    return found


def total(figures: Mapping[str, Any]) -> float:
    """Seconds from text states to pixels."""
    return float(figures["generate_seconds"] + figures["decode_seconds"])


def format_report(found: Sequence[Mapping[str, Any]], batch: int) -> str:
    """The Markdown table, a row a model and size."""
    ours = {figures["size"]: total(figures) for figures in found if figures["model"] == "Hartist"}
    rows = []
    for figures in found:
        size, memory = figures["size"], figures["memory"]
        tera = {name: figures["macs"][name] / batch / 1e12 for name in ("total", "attention")}
        rows.append(
            {
                "model": figures["model"],
                "px": str(size),
                "M parameters": f"{figures['parameters'] / 1e6:.0f}",
                "steps": str(figures["steps"]),
                "all steps, s": f"{figures['generate_seconds']:.3g}",
                "decoder, s": f"{figures['decode_seconds']:.3g}",
                "total, s": f"{total(figures):.3g}",
                "times ours": f"{total(figures) / ours[size]:.2f}" if size in ours else "",
                "images/s": f"{batch / total(figures):.3g}",
                "TMACs": f"{tera['total']:.3g}",
                "attention": f"{tera['attention']:.2g}",
                "decoder TMACs": f"{figures['decode_macs']['total'] / batch / 1e12:.3g}",
                "peak GiB": f"{(memory['resident'] if memory['device'] is None else memory['device']) / 2**30:.2f}",
            }
        )
    return markdown(rows)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(DEFAULT), metavar="A,B,…", help="(default: %(default)s)")
    parser.add_argument("--sizes", type=integers, default=(512, 1024), help="pixels along a side (default: 512,1024)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as published: 20, SD3 28)")
    parser.add_argument("--measured", type=int, default=3, help="denoising steps that are timed (default: 3)")
    parser.add_argument("--whole", action="store_true", help="run all denoising steps instead")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of ours and of decoders (default: 3)")
    parser.add_argument("--warmup", type=int, default=1, help="steps and runs before them (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks at 64 px, to see that all works")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: bfloat16 where the machine has it)")
    parser.add_argument("--device", help="cpu, cuda, … (default: the best one there is)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise a UserError for what no process could do, before the first one starts."""
    args.models = args.models.split(",")
    for name in args.models:
        if name not in OURS and name not in PEERS:
            raise UserError(f"no model {name!r}; there are {', '.join((*OURS, *PEERS))}")
    if args.tiny:
        args.sizes = (64,)
    if min(args.batch, args.measured, args.repeats, *args.sizes, args.steps or 1) < 1 or args.warmup < 0:
        raise UserError("sizes, batch, steps, measured and repeats must be at least 1, warmup at least 0")
    if any(size % 64 for size in args.sizes):
        raise UserError(f"sizes {args.sizes}: all must be multiples of 64 px")
    if args.json is not None:
        require_writable(args.json, replaced=True)
    choose_dtype(args.dtype, choose_device(args.device))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = make_parser().parse_args(arguments)
    torch.set_num_threads(args.threads)
    try:
        if args.worker:
            print(json.dumps(work(args)))
            return 0
        check(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = run_all(args, arguments)
    if found:
        first = found[0]
        print(
            f"batch {args.batch}, {first['dtype']}, device {first['machine']['device']}; {describe(first['machine'])}\n"
        )
        print(format_report(found, args.batch))
        how = "all steps run" if args.whole else f"a step is the median of {args.measured}, times the number of steps"
        print(f"\nText encoders left out; of diffusion models, {how}. MACs are of one picture with guidance.")
    return 0 if len(found) == len(args.sizes) * len(args.models) else 1


if __name__ == "__main__":
    raise SystemExit(main())
