"""`hartist serve`: the API and the page, until a signal comes"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hartist.errors import UserError
from hartist.generation.cluster import ray_running, threads_each
from hartist.generation.loading import find_model
from hartist.generation.model_options import ModelOptions, absolute
from hartist.serving.prompt_filter import AllowAll, PromptFilter, WordFilter


def run(args: argparse.Namespace) -> int:
    try:
        from fastapi import FastAPI

        from hartist.serving.access import LOOPBACK, AccessRules, outside, read_keys
        from hartist.serving.app import ServerOptions, create_app
        from hartist.serving.model import WorkerOptions
        from hartist.serving.run import listen, serve
        from hartist.serving.scheduler import Backend, Limits
        from hartist.serving.worker import WorkerProcess
    except ImportError as error:
        raise UserError(f"serving needs the package {error.name}; pip install 'hartist[serve]'") from error

    _check(args)
    settle_replicas(args)
    keys = read_keys(os.environ.get("HARTIST_API_KEY"))
    way_in = outside(args.host, args.allow_host)
    if way_in and not keys and not args.allow_anonymous:
        raise UserError(f"{way_in}; set HARTIST_API_KEY, or pass --allow-anonymous")
    path = find_model(args.model)  # a wrong name is told before anything is started
    worker = WorkerOptions(
        ModelOptions(
            absolute(path),
            absolute(args.text_model),
            absolute(args.tokenizer),
            args.device,
            args.dtype,
            not args.no_ema,
            threads_each(args.threads, args.max_replicas or args.workers, args.ray_address),
            args.int8,
            args.text_device,
            args.compile,
        ),
        args.image_filter,
    )
    hosts = (*LOOPBACK, *args.allow_host) if args.host in LOOPBACK else tuple(args.allow_host)
    options = ServerOptions(
        AccessRules(keys, hosts, images_per_minute=args.images_per_minute),
        Limits(args.max_batch, args.max_queue, args.deadline),
        args.drain,
    )

    mount, prompt_filter = _page(args), _prompt_filter(args)

    def build(backends: Sequence[Backend]) -> FastAPI:
        return create_app(backends, options, prompt_filter(), mount)

    listener = listen(args.host, args.port)
    if args.ray:
        with listener:
            port = listener.getsockname()[1]  # free; a proxy of Ray's will listen there
        with ray_running(args.ray_address, args.max_replicas * worker.model.threads):
            from hartist.serving.ray_app import Replicas, serve_on_ray

            serve_on_ray(build, worker, Replicas(args.min_replicas, args.max_replicas), args.host, port, args.stall)
        return 0
    serve(
        build([WorkerProcess(worker, args.stall) for _ in range(args.workers)]),
        listener,
        head_seconds=args.head_timeout,
    )
    return 0


def _page(args: argparse.Namespace) -> Any:
    """What adds the page to the application, or None. Raises UserError if its package is missing."""
    if args.no_page:
        return None
    try:
        from hartist.serving.page.mount import mount_page
    except ImportError as error:
        raise UserError(
            f"the page needs the package {error.name}; pip install 'hartist[serve]', or leave it out with --no-page"
        ) from error
    return mount_page


def _prompt_filter(args: argparse.Namespace) -> Callable[[], PromptFilter]:
    """What makes the prompt filter, in the process that needs it; by default the words, if other machines can ask.

    Raises UserError for what doesn't go together, and for a list that can't be read.
    """
    from hartist.serving.access import outside

    words = args.blocked_words is not None or outside(args.host, args.allow_host) is not None
    kind = args.prompt_filter or ("words" if words else "none")
    if args.blocked_words is not None and kind != "words":
        raise UserError("--blocked-words goes with --prompt-filter words")
    if kind == "words":
        loaded = WordFilter.load(args.blocked_words)
        return lambda: loaded
    if kind == "shieldgemma":
        from hartist.serving.shieldgemma import load_shieldgemma

        return partial(load_shieldgemma, args.shieldgemma, args.device)
    return AllowAll


def settle_replicas(args: argparse.Namespace) -> None:
    """Set `min_replicas` and `max_replicas`, from `replicas` where that is given. Raises UserError."""
    given = (args.replicas, args.min_replicas, args.max_replicas)
    if not args.ray:
        if any(number is not None for number in (*given, args.ray_address)):
            raise UserError("--replicas, --min-replicas, --max-replicas and --ray-address go with --ray; add it")
        return
    if args.workers != 1:
        raise UserError("--workers are processes of a server without Ray; with --ray, give --replicas")
    if args.replicas is not None and given[1:] != (None, None):
        raise UserError("--replicas is a fixed number; leave it out with --min-replicas and --max-replicas")
    fixed = 1 if args.replicas is None else args.replicas
    args.min_replicas = fixed if args.min_replicas is None else args.min_replicas
    args.max_replicas = max(fixed, args.min_replicas) if args.max_replicas is None else args.max_replicas
    if not 1 <= args.min_replicas <= args.max_replicas <= 1024:
        raise UserError(f"from {args.min_replicas} to {args.max_replicas} replicas; give 1 to 1024, the least first")


def _check(args: argparse.Namespace) -> None:
    """Raise UserError for a number out of range."""
    for name, least, most in (
        ("port", 0, 65535),
        ("workers", 1, 256),
        ("threads", 1, 4096),
        ("max_batch", 1, 1024),
        ("max_queue", 1, 10**6),
        ("images_per_minute", 0, 10**9),
        ("deadline", 1, 10**6),
        ("drain", 0, 10**6),
        ("stall", 1, 10**6),
        ("head_timeout", 0.1, 10**6),
        ("image_filter", 0, 1),
    ):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range; give {least} to {most}")
