"""Hartist: text-to-image with hybrid autoregressive transformers.

>>> from hartist import Pipeline
>>> pipe = Pipeline.from_pretrained()
>>> images = pipe("a red apple, 3d", num_images=4, seed=7)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Pipeline", "UserError", "__version__"]

if TYPE_CHECKING:
    from hartist.errors import UserError
    from hartist.generation.pipeline import Pipeline


def __getattr__(name: str) -> Any:
    # Imported on first use: `hartist --help` must not pay for PyTorch.
    if name == "Pipeline":
        from hartist.generation.pipeline import Pipeline

        return Pipeline
    if name == "UserError":
        from hartist.errors import UserError

        return UserError
    raise AttributeError(f"module 'hartist' has no attribute {name!r}")
