"""What a result says of the software, the machine and the model that it comes from"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from hartist import __version__
from hartist.evaluation.harness.result import ModelFacts
from hartist.generation.model_options import ModelOptions
from hartist.generation.pipeline import Pipeline

PACKAGES = ("numpy", "pillow", "safetensors", "tokenizers", "transformers")


def software() -> dict[str, str]:
    """Versions of what computes."""
    found = {"hartist": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(options: ModelOptions, pipe: Pipeline) -> dict[str, Any]:
    """What it ran on, and what rounding may depend on."""
    device = pipe.device
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(next(pipe.transformer.parameters()).dtype).removeprefix("torch."),
        "threads": options.threads,
    }


def model_facts(pipe: Pipeline, fingerprint: str) -> ModelFacts:
    """Of a loaded model."""
    parameters = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    return ModelFacts(pipe.model.name, fingerprint, parameters)
