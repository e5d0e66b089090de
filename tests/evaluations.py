"""Evaluations for the tests: miniatures of benchmarks, networks without weights, and processes that are killed.

As a program, `evaluations.py DIR MODEL DATA` interrupts the same evaluation by SIGKILL at each of POINTS, in a folder
for each, and makes it once more in two shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hartist.cli import main
from hartist.evaluation.clip import TextImageNetwork
from hartist.evaluation.features import FeatureNetwork
from hartist.evaluation.harness import generate, prepare, run
from hartist.evaluation.harness import result as results

SIZE = 32
POINTS = ("first picture", "picture", "half a line", "last picture", "features", "rows", "result")
PROMPTS = ("a red apple", "a green apple", "a cat", "a sleeping cat", "a red cat", "a green table", "a table, flat")


def thumbnail(name: str = "Thumbnail", key: str = "thumbnail-1") -> FeatureNetwork:
    """A network without weights: the picture at 3×3 pixels; five of them are its logits."""

    def compute(pixels_BHW3: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels_BHW3.movedim(-1, 1).float() / 255, 3).flatten(1)

    return FeatureNetwork(name, key, compute, lambda features_BD: 10 * features_BD[:, :5])


def text_vectors(texts: Sequence[str]) -> Tensor:
    """A unit vector a text, of its hash."""
    rows = [list(hashlib.sha256(text.encode()).digest()[:27]) for text in texts]
    return F.normalize(torch.tensor(rows).float(), dim=1)


def use_stand_ins(replace: Callable[[Any, str, Any], None]) -> None:
    """No packaged network is opened, and scoring has one thread. `replace` is monkeypatch.setattr, or setattr."""
    names = {"lite0": "EfficientNet-Lite0", "lite2": "EfficientNet-Lite2", "inception": "Inception (stand-in)"}

    def load_network(name: str, device: Any = "cpu") -> FeatureNetwork:
        return thumbnail(names.get(name, name), f"{name}-1")

    def load_text_image(name: str, device: Any = "cpu") -> TextImageNetwork:
        return TextImageNetwork(f"CLIP {name}", thumbnail(name, f"{name}-1"), text_vectors)

    replace(prepare, "load_network", load_network)
    replace(prepare, "load_text_image", load_text_image)
    replace(run, "scoring_threads", lambda: 1)


def picture(path: Path, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """A file of coloured squares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.NEAREST).save(path)
    return path


def write_emoji(root: Path) -> Path:
    """Seven prompts for training and seven held out, of two kinds; one has a twin with the same text."""
    for split, kinds in (("train", ("train",)), ("validation", ("unseen_pair", "unseen_concept"))):
        rows = []
        for i, prompt in enumerate((*PROMPTS, PROMPTS[0])):
            picture(root / split / f"{split}{i}.png", len(split) * 100 + i)
            kind = kinds[i % len(kinds)]
            row = {"file_name": f"{split}{i}.png", "text": f"{prompt} {split}", "background": "white"}
            rows.append(row | {"split_kind": kind, "family": f"{split}{i}"})
        text = "\n".join(map(json.dumps, rows))
        (root / split / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    return root


def evaluate(model: object, benchmark: str, data: object, out: Path, *flags: object) -> int:
    """The command in this process; makes pictures here unless told otherwise."""
    arguments = ["evaluate", model, "--benchmark", benchmark, "--data", data, "--out", out, "-q", "--device", "cpu"]
    arguments += [] if "--processes" in flags else ["--processes", 1]
    return main([str(argument) for argument in (*arguments, *flags)])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(point: str) -> None:
    """Let this process be killed when it gets there."""
    add, calls = generate.ShardManifest.add, [0]

    def watched(self: Any, made: Any, model: str) -> None:
        calls[0] += 1
        if point == "first picture" and calls[0] == 1:
            die()
        if point == "half a line" and calls[0] == 4:
            with self.path.open("ab") as file:
                file.write(b'{"file": "pictures/tr')
            die()
        add(self, made, model)
        if point == "picture" and calls[0] == 5:
            die()

    def deadly(*_: Any, **__: Any) -> None:
        die()

    generate.ShardManifest.add = watched  # type: ignore[method-assign]
    if point == "last picture":
        generate.write_text = deadly
    if point == "features":
        network = thumbnail("Inception (stand-in)", "inception-1")
        compute, batches = network.compute, [0]

        def slow(pixels: Tensor) -> Tensor:
            batches[0] += 1
            return die() if batches[0] == 2 else compute(pixels)  # type: ignore[return-value]

        prepare.load_network = lambda *_: FeatureNetwork(network.name, network.key, slow)
    if point == "rows":
        from hartist.evaluation.harness import rows

        write, files = rows.write_safetensors, [0]

        def once(*arguments: Any) -> None:
            files[0] += 1
            return die() if files[0] == 2 else write(*arguments)

        rows.write_safetensors = once
    if point == "result":
        run.write_result = deadly


def in_child(work: Callable[[], int], **environment: str) -> int:
    """Start work in a copy of this process; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    try:
        os._exit(work())
    finally:
        os._exit(99)


def interrupt_everywhere(root: Path, model: str, data: str, flags: Sequence[str]) -> None:
    torch.set_num_threads(1)
    use_stand_ins(setattr)
    for point in POINTS:

        def work(point: str = point) -> int:
            kill_at(point)
            return evaluate(model, "emoji", data, root / point, *flags)

        _, status = os.waitpid(in_child(work), 0)
        assert os.WIFSIGNALED(status), f"{point} was not reached"
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not (root / point / results.RESULT).exists()
    shards = [
        in_child(lambda: evaluate(model, "emoji", data, root / "shards", *flags), RANK=str(rank), WORLD_SIZE="2")
        for rank in range(2)
    ]
    assert [os.waitpid(pid, 0)[1] for pid in shards] == [0, 0]


if __name__ == "__main__":
    folder, of_model, of_data, *more = sys.argv[1:]
    interrupt_everywhere(Path(folder), of_model, of_data, more)
