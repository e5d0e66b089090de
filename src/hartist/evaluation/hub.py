"""Networks of the transformers library, from a folder or from what `hf download` has put into the Hub's cache

Nothing is downloaded in the middle of a measurement: what is absent is asked for by name, with the command that gets
it. Weights are read as safetensors only. Pictures are prepared by the library's PIL code, whether torchvision is
there or not: the two resize differently, and a figure must not depend on what else is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hartist.errors import UserError


def load_part(kind: Any, source: str | Path, what: str, files: Sequence[str] = (), **options: Any) -> Any:
    """`kind.from_pretrained(source)`, from this machine alone. `files`: what to download of a repository, "" for all.

    Raises UserError, calling the network `what`, with the command that gets it if it is absent, and with the
    library's reason if it can't be read.
    """
    try:
        return kind.from_pretrained(str(source), local_files_only=True, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:200]
        if isinstance(error, ImportError):
            raise UserError(f"{what} needs a package that is not installed ({reason}); pip install it") from error
        if Path(source).exists() or is_cached(source):
            raise UserError(f"{what} cannot be read from {source} ({reason}); download it again") from error
        command = " ".join(["hf download", str(source), *files])
        raise UserError(f"{what} is not here: {source} is no folder, and not downloaded; run: {command}") from error


def load_pretrained(kind: Any, source: str | Path, what: str, files: Sequence[str] = ()) -> Any:
    """A network with its weights, in float32, ready to compute. Raises UserError as `load_part` does."""
    network = load_part(kind, source, what, files, use_safetensors=True)
    return network.float().eval().requires_grad_(False)


def load_image_processor(source: str | Path, what: str, files: Sequence[str] = ()) -> Any:
    """What prepares pictures for a network. Raises UserError as `load_part` does."""
    import transformers

    choice = {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}
    return load_part(transformers.AutoImageProcessor, source, what, files, **choice)


def is_cached(source: str | Path) -> bool:
    """Whether the Hub's cache has the repository's configuration."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(str(source), "config.json"), str)
    except HFValidationError:  # a path, not a repository's name
        return False
