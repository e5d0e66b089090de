"""What a process of its own needs to know to load the model: plain values, cheap to import and to send"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hartist.generation.pipeline import Pipeline

SAMPLE = 1 << 16
"""Bytes at either end of a file of weights that tell it from others of its size."""


@dataclass(frozen=True)
class ModelOptions:
    """Arguments of `Pipeline.from_pretrained`, with names and paths as text."""

    model: str | None = None
    text_model: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    dtype: str | None = None
    use_ema: bool = True
    threads: int = 0
    """0: all cores."""
    int8: bool = False
    text_device: str | None = None
    compile: bool = False

    def load(self) -> Pipeline:
        """Load the model. Raises UserError if that can't be done."""
        import torch

        from hartist.generation.pipeline import Pipeline

        if self.threads:
            torch.set_num_threads(self.threads)
        return Pipeline.from_pretrained(
            self.model,
            device=self.device,
            dtype=self.dtype,
            text_model=self.text_model,
            tokenizer=self.tokenizer,
            use_ema=self.use_ema,
            int8=self.int8,
            compile=self.compile,
            text_device=self.text_device,
        )

    def fingerprint(self) -> str:
        """Tells models on disk apart without reading all of them: names, sizes, beginnings and ends of their files."""
        digest = hashlib.sha256(f"{self.dtype} {self.use_ema} {self.int8}{' compiled' * self.compile}".encode())
        for part in map(Path, filter(None, (self.model, self.text_model, self.tokenizer))):
            files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part]
            for path in files:
                size = path.stat().st_size
                digest.update(f"\n{path.relative_to(part)} {size}\n".encode())
                with path.open("rb") as file:
                    digest.update(file.read(SAMPLE))
                    file.seek(max(0, size - SAMPLE))
                    digest.update(file.read(SAMPLE))
        return digest.hexdigest()


def absolute(path: Path | None) -> str | None:
    """A path as other processes, in other folders, can read it."""
    return str(path.absolute()) if path is not None else None
