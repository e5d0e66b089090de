"""bfloat16 is computed where the hardware has it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hartist.evaluation.bench import BenchSettings, run_bench
from hartist.precision import autocast, computes_bf16
from hartist.presets import PRESETS
from hartist.training.loop import Trainer
from hartist.training.muon import orthogonalise
from hartist.training.parallel import World
from small import make_tokenizer_stage, normal, run_config

CPU = torch.device("cpu")


def says(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: answer)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.mark.parametrize("has", [False, True])
def test_a_cpu_without_bfloat16_computes_in_float32(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, has)
    assert computes_bf16(CPU) is has
    assert computes_bf16(torch.device("cuda"))
    kind = torch.bfloat16 if has else torch.float32
    with autocast(CPU, True):
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == kind
    with autocast(CPU, False):
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == torch.float32
    assert orthogonalise(normal(1, 4, 6)).dtype == kind
    losses = []
    for bf16 in (False, True):
        stage = make_tokenizer_stage(run_config(1, bf16=bf16))
        figures, _ = Trainer(stage, stage.run, World(), "ddp").step(0, 1e-3)
        losses.append(figures["loss"])
    assert (losses[0] != losses[1]) is has


@pytest.mark.parametrize("has", [False, True])
def test_the_benchmark_takes_the_type_that_the_machine_has(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, has)
    seen: list[torch.dtype] = []

    class Seen(Exception):
        pass

    def look(tokenizer: object, transformer: object, dtype: torch.dtype, device: torch.device) -> None:
        seen.append(dtype)
        raise Seen

    monkeypatch.setattr("hartist.evaluation.bench.models.random_model", look)
    for asked in (None, "float32"):
        with pytest.raises(Seen):
            run_bench(BenchSettings(preset=next(iter(PRESETS)), dtype=asked, device="cpu"))
    assert seen == [torch.bfloat16 if has else torch.float32, torch.float32]
