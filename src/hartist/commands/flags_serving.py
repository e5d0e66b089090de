"""The flags of `hartist serve`. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hartist.commands.flags import add_command, add_device, add_foreign_parts, add_model, add_precision


def add_serve(commands: Any) -> None:
    """`hartist serve`."""
    parser = add_command(
        commands,
        "serve",
        "an HTTP server: OpenAI's Images API and a page",
        "Serve a model on http://HOST:PORT. The page is at /, the API at /v1 (any OpenAI client works), its schema\n"
        "at /openapi.json, figures for Prometheus at /metrics. With HARTIST_API_KEY in the environment (several,\n"
        "separated by commas) every request needs one of them. SIGTERM finishes what was accepted, then stops.",
        """\
  hartist serve                                           the bundled model, for this machine only
  HARTIST_API_KEY=… hartist serve --host 0.0.0.0          for others, with a key
  curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
       -d '{"prompt": "red apple, 3d", "seed": 7}'        a picture, base64 in JSON""",
    )
    add_model(parser)
    add_device(parser)
    add_foreign_parts(parser)
    place = parser.add_argument_group("address and access")
    place.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    place.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on (default: %(default)s)")
    place.add_argument("--allow-anonymous", action="store_true", help="listen beyond this machine without a key")
    place.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name clients may call the server by"
    )
    place.add_argument(
        "--images-per-minute", type=int, default=0, metavar="N", help="a key's (or address's) rate (default: no limit)"
    )
    work = parser.add_argument_group("work")
    add_precision(work)
    work.add_argument("--workers", type=int, default=1, metavar="N", help="processes with a model (default: 1)")
    work.add_argument("--max-batch", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)")
    work.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="images that may wait; then 429 (default: %(default)s)"
    )
    work.add_argument(
        "--deadline", type=float, default=300, metavar="S", help="seconds a request may take (default: %(default)s)"
    )
    work.add_argument(
        "--drain", type=float, default=60, metavar="S", help="seconds for the rest after SIGTERM (default: %(default)s)"
    )
    work.add_argument(
        "--stall", type=float, default=600, metavar="S", help="seconds a scale may take; then the worker is replaced"
    )
    work.add_argument(
        "--head-timeout", type=float, default=15, metavar="S", help="seconds a connection may be silent (default: 15)"
    )
    ray = parser.add_argument_group("many machines, by Ray Serve (pip install 'hartist[ray]')")
    ray.add_argument("--ray", action="store_true", help="run model replicas that Ray starts, watches and replaces")
    ray.add_argument("--replicas", type=int, metavar="N", help="processes with a model (default: 1)")
    ray.add_argument("--min-replicas", type=int, metavar="N", help="with little work; more are added for much work")
    ray.add_argument("--max-replicas", type=int, metavar="N", help="with much work (default: --min-replicas)")
    ray.add_argument("--ray-address", metavar="HOST:PORT", help="a Ray cluster to use (default: start Ray here)")
    page = parser.add_argument_group("page and filters")
    page.add_argument("--no-page", action="store_true", help="the API alone")
    page.add_argument(
        "--prompt-filter",
        choices=("none", "words", "shieldgemma"),
        help="what turns prompts away (default: words if other machines can ask, else none)",
    )
    page.add_argument("--blocked-words", type=Path, metavar="FILE", help="words and phrases beside the built-in list")
    page.add_argument(
        "--shieldgemma",
        default="google/shieldgemma-2b",
        metavar="MODEL",
        help="folder or Hub id for --prompt-filter shieldgemma (default: %(default)s)",
    )
    page.add_argument(
        "--image-filter",
        nargs="?",
        type=float,
        const=0.5,
        metavar="P",
        help="withhold pictures that score P or more (0.5 if left out) for nudity; pip install 'hartist[filters]'",
    )
