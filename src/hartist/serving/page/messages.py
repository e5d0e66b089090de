"""What a visitor is told when something can't be done: one readable sentence, never a traceback"""

from __future__ import annotations

import html

import gradio as gr
from pydantic import ValidationError

from hartist.serving.errors import as_api_error

NAMES = {"n": "pictures", "top_k": "top-k", "top_p": "top-p", "diffusion_steps": "diffusion steps"}
"""Fields that the form calls otherwise."""


def readable(error: Exception) -> str:
    """An exception as a sentence; what nobody foresaw goes to the log instead."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "the form"
        text = f"{NAMES.get(name, name)}: {first['msg'].removeprefix('Input ')}"
    else:
        text = str(as_api_error(error).detail)
    return text[:1].upper() + text[1:]


def alert(text: str) -> gr.Error:
    """A note over the page. The text may quote the visitor, and Gradio takes it for HTML."""
    return gr.Error(html.escape(text), print_exception=False)
