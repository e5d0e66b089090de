"""`hartist serve` under load: python benchmarks/serving_load.py [--clients 1,4,16,64] [--seconds 60] [--soak 600]

Closed loops of clients (locust) against the bundled model on this machine, each number of clients for so long, with
batching and, at the largest number, without (`--max-batch 1`); then a stream alone, for the time to its first preview;
then, with --soak, 16 clients for so many seconds, with the server's resident memory sampled. Prints Markdown.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from tables import describe, markdown

from hartist.evaluation.bench import machine
from hartist.files import write_json

HERE = Path(__file__).resolve().parent
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

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


def load(folder: Path, clients: int, seconds: float, *, stream: bool = False) -> dict[str, dict[str, Any]]:
    """Run locust; its statistics by request name."""
    prefix = folder / f"load-{clients}-{time.time_ns()}"
    command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless", "--host", URL]
    command += ["-u", str(clients), "-r", str(clients), "-t", f"{seconds:.0f}s", "--csv", str(prefix), "--only-summary"]
    environment = {**os.environ, "HARTIST_LOAD_STREAM": "1" if stream else "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    path = prefix.with_name(prefix.name + "_stats.csv")
    if not path.exists():
        raise SystemExit(done.stdout + done.stderr)
    with path.open(newline="") as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def row_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Throughput and quantiles of plain requests."""
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
    parser.add_argument("--soak", type=float, default=0, help="seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    counts = [int(part) for part in args.clients.split(",")]
    results: dict[str, Any] = {"machine": machine(), "load": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arguments, numbers in (((), counts), (("--max-batch", "1"), counts[-1:])):
            server = Server(folder, *arguments)
            load(folder, 2, 5)  # warm
            for clients in numbers:
                row = {"batching": "no" if arguments else "yes", "clients": clients}
                results["load"].append(row | row_of(load(folder, clients, args.seconds)))
                print(results["load"][-1], file=sys.stderr)
            if not arguments:
                found = load(folder, 1, args.seconds, stream=True)
                first, whole = (float(found[key]["50%"]) / 1000 for key in ("first preview", "whole"))
                results["stream"] = {"first preview s": first, "whole s": whole, "share": first / whole}
                if args.soak:
                    results["soak"] = soak(server, folder, args.soak)
            server.stop()
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
    if "soak" in results:
        print(f"soak: {results['soak']}")


def soak(server: Server, folder: Path, seconds: float) -> dict[str, Any]:
    """16 clients for long; resident memory after a tenth of the time, and at the end."""
    parts = 10
    resident, errors, requests = [], 0, 0
    for _ in range(parts):
        row = row_of(load(folder, 16, seconds / parts))
        errors, requests = errors + row["errors"], requests + row["requests"]
        resident.append(server.resident())
    return {
        "seconds": seconds,
        "requests": requests,
        "errors": errors,
        "resident MiB": [round(value) for value in resident],
        "growth after the first tenth": resident[-1] / resident[0] - 1,
    }


if __name__ == "__main__":
    main()
