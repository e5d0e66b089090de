"""`hartist serve` under load: python benchmarks/serving_load.py [--seconds 60] [--identical 200] [--soak 600]

Needs `pip install locust`. Closed loops of clients against the bundled model on this machine, each number of clients
for so long, with batching and, at the largest number, without (`--max-batch 1`); a stream alone, for the time to its
first preview; with --identical, so many pictures asked for one by one and again beside 16 other clients, compared
pixel by pixel; with --soak, 16 clients for so many seconds, with the server's resident memory sampled. Prints Markdown.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tables import describe, markdown

from hartist.evaluation.bench import machine
from hartist.files import write_json

HERE = Path(__file__).resolve().parent
PROMPTS = ("red apple, 3d", "sleeping face, flat", "sunflower, noto", "pizza, 3d", "snowman, flat", "frog, noto")
PORT = 8765
URL = f"http://127.0.0.1:{PORT}"


class Server:
    """`hartist serve` in a process of its own, its log in a temporary folder."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        command = [sys.executable, "-m", "hartist", "serve", "--port", str(PORT), "--no-page", "--max-queue", "256"]
        with (folder / "server.txt").open("w") as sink:
            self.process = subprocess.Popen([*command, *arguments], stdout=sink, stderr=sink)
        while True:
            if self.process.poll() is not None:
                raise SystemExit((folder / "server.txt").read_text())
            try:
                with urllib.request.urlopen(f"{URL}/readyz") as reply:
                    if reply.status == 200:
                        return
            except OSError:
                time.sleep(0.2)

    def resident(self) -> float:
        """MiB of the server and its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in [str(self.process.pid), *children]
        )
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


def start_load(folder: Path, clients: int, seconds: float) -> tuple[subprocess.Popen, Path]:
    """Start locust; it writes its statistics there."""
    prefix = folder / f"load-{clients}-{time.time_ns()}"
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless", "--host", URL]
    command += ["-u", str(clients), "-r", str(clients), "-t", f"{seconds:.0f}s", "--csv", str(prefix), "--only-summary"]
    with (folder / "locust.txt").open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    return process, prefix.with_name(prefix.name + "_stats.csv")


def load(folder: Path, clients: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Run locust; its statistics by request name."""
    process, path = start_load(folder, clients, seconds)
    process.wait()
    return read_statistics(folder, path)


def read_statistics(folder: Path, path: Path) -> dict[str, dict[str, Any]]:
    """What locust has written, by request name."""
    if not path.exists():
        raise SystemExit((folder / "locust.txt").read_text())
    with path.open(newline="") as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def row_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Throughput and quantiles of plain requests."""
    if "picture" not in found:
        raise SystemExit("not one picture was finished; give more --seconds (a soak is ten parts)")
    picture = found["picture"]
    refused = int(found["refused"]["Request Count"]) if "refused" in found else 0
    return {
        "images/s": float(picture["Requests/s"]),
        "p50 s": float(picture["50%"]) / 1000,
        "p99 s": float(picture["99%"]) / 1000,
        "requests": int(picture["Request Count"]),
        "429": refused,
        "errors": int(picture["Failure Count"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--identical", type=int, default=0, metavar="N", help="pictures to compare")
    parser.add_argument("--soak", type=float, default=0, help="seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    counts = [int(part) for part in args.clients.split(",")]
    results: dict[str, Any] = {"machine": machine(torch.device("cpu")), "load": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arguments, numbers in (((), counts), (("--max-batch", "1"), counts[-1:])):
            with Server(folder, *arguments) as server:
                load(folder, 2, 5)  # warm
                for clients in numbers:
                    row = {"batching": "no" if arguments else "yes", "clients": clients}
                    results["load"].append(row | row_of(load(folder, clients, args.seconds)))
                    print(results["load"][-1], file=sys.stderr)
                if not arguments:
                    results["stream"] = streams(args.seconds)
                    if args.identical:
                        results["identical"] = identical(folder, args.identical)
                    if args.soak:
                        results["soak"] = soak(server, folder, args.soak)
    rows = results["load"]
    results["batching"] = rows[len(counts) - 1]["images/s"] / rows[-1]["images/s"]
    if args.json:
        write_json(args.json, results)
    print(describe(results["machine"]))
    print(
        markdown(
            [
                {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items()}
                for row in rows
            ]
        )
    )
    print(f"\nbatching: {results['batching']:.2f} times the images a second without, at {counts[-1]} clients")
    print(f"stream: first preview after {results['stream']['share']:.0%} of the time to the picture")
    if "identical" in results:
        print(f"alone and under load: {results['identical']}")
    if "soak" in results:
        print(f"soak: {results['soak']}")


def ask(number: int, **more: Any) -> Any:
    """The reply to a request for one picture."""
    body = json.dumps({"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **more}).encode()
    request = urllib.request.Request(f"{URL}/v1/images/generations", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=600)


def picture(number: int) -> np.ndarray:
    """One picture of the served model, as pixels."""
    with ask(number) as reply:
        data = base64.b64decode(json.load(reply)["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def streams(seconds: float) -> dict[str, Any]:
    """One client after another asks for a stream with all previews: medians."""
    found: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not found:
        started, first, last = time.perf_counter(), 0.0, b""
        with ask(len(found), stream=True) as reply:
            for line in reply:
                if line.startswith(b"event:"):
                    last = line
                    first = first or time.perf_counter() - started
        if b"completed" not in last:
            raise SystemExit(f"a stream ended with {last.decode() or 'nothing'}")
        found.append((first, time.perf_counter() - started))
    first, whole = (statistics.median(values) for values in zip(*found, strict=True))
    share = statistics.median(a / b for a, b in found)
    return {"streams": len(found), "first preview s": first, "whole s": whole, "share": share}


def identical(folder: Path, count: int) -> dict[str, Any]:
    """The same pictures one by one on an idle server, and eight at a time beside 16 other clients."""
    alone = [picture(number) for number in range(count)]
    others, _ = start_load(folder, 16, 3600)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(picture, range(count)))
    others.send_signal(signal.SIGTERM)
    others.wait()
    levels = [int(abs(a - b).max()) for a, b in zip(alone, loaded, strict=True)]
    return {
        "pictures": count,
        "equal in every pixel": levels.count(0),
        "largest difference, levels of 255": max(levels),
    }


def soak(server: Server, folder: Path, seconds: float) -> dict[str, Any]:
    """16 clients for long; resident memory over each tenth of the time, sampled twice a second."""
    parts = 10
    medians, peaks, errors, requests = [], [], 0, 0
    for _ in range(parts):
        process, path = start_load(folder, 16, seconds / parts)
        samples = []
        while process.poll() is None:
            samples.append(server.resident())
            time.sleep(0.5)
        row = row_of(read_statistics(folder, path))
        errors, requests = errors + row["errors"], requests + row["requests"]
        medians.append(statistics.median(samples))
        peaks.append(max(samples))
    return {
        "seconds": seconds,
        "requests": requests,
        "errors": errors,
        "resident MiB, medians": [round(value) for value in medians],
        "resident MiB, peaks": [round(value) for value in peaks],
        "growth of the peak after the first tenth": peaks[-1] / peaks[0] - 1,
        "spread of the peaks": max(peaks) / min(peaks) - 1,
    }


if __name__ == "__main__":
    main()
