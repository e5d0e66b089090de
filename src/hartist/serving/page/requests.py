"""What a visitor asks for, by the form or by a link (`?prompt=…&seed=…&guidance=…`), checked like the API's requests"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode

from hartist.errors import UserError
from hartist.generation.pipeline import override
from hartist.generation.sampling import SamplingSettings
from hartist.generation.shortcuts import FAST, is_fast
from hartist.serving.schemas import ImageRequest
from hartist.serving.tasks import ImageTask

NUMBERS = {"seed": int, "guidance": float, "temperature": float, "top_k": int, "top_p": float, "diffusion_steps": int}
MAX_QUERY = 1 << 16
"""Characters; a prompt of 4,000 takes 48,000 at most."""


def from_form(prompt: Any, count: Any, seed: Any, **settings: Any) -> ImageRequest:
    """What the form asks for, as the browser sends it; whatever is left empty is the model's own.

    Raises UserError, or pydantic's ValidationError, for values that can't be.
    """
    found = {"prompt": prompt or "", "n": count, **settings}
    if isinstance(seed, str) and seed.strip():
        found["seed"] = _number("seed", seed.strip())
    return _request({name: value for name, value in found.items() if value is not None})


def from_query(query: str) -> ImageRequest | None:
    """What a link asks for; None if it names no prompt. Other parameters are passed over. Raises like `from_form`."""
    if len(query) > MAX_QUERY:
        raise UserError(f"this link has {len(query)} characters; at most {MAX_QUERY} are read")
    found: dict[str, Any] = {}
    for name, text in parse_qsl(query.removeprefix("?")):
        if name in ("prompt", "negative_prompt"):
            found[name] = text
        elif name in ("residual", "fast"):
            found[name] = bool(_number(name, text, int))
        elif name in NUMBERS:
            found[name] = _number(name, text)
    return _request(found) if "prompt" in found else None


def to_query(task: ImageTask, own: SamplingSettings) -> str:
    """The query of a link to a picture: prompt, seed, guidance, and what differs from the model's own settings."""
    values = {"prompt": task.prompt, "seed": task.seed, "guidance": task.settings.guidance}
    if is_fast(task.settings) and not is_fast(own):
        values["fast"] = 1
        own = override(own, **FAST)
    for name in ("temperature", "top_k", "top_p", "residual", "diffusion_steps"):
        value = getattr(task.settings, name)
        if value != getattr(own, name):
            values[name] = int(value) if name == "residual" else value
    if task.negative_prompt:
        values["negative_prompt"] = task.negative_prompt
    return "?" + urlencode(values)


def _number(name: str, text: str, kind: type[int] | type[float] | None = None) -> int | float:
    try:
        if len(text) > 40:
            raise ValueError
        return (kind or NUMBERS[name])(text)
    except ValueError:
        whole = "whole " if (kind or NUMBERS[name]) is int else ""
        raise UserError(f"the {name.replace('_', ' ')} is no {whole}number; correct it or leave it out") from None


def _request(found: dict[str, Any]) -> ImageRequest:
    return ImageRequest(**found, stream=True)  # with a preview at every scale
