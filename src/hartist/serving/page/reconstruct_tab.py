"""The tab that shows what tokens keep of a picture: the original, the discrete and the hybrid path side by side"""

from __future__ import annotations

import base64
import math
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from hartist.errors import UserError
from hartist.serving.app import Server
from hartist.serving.images import failure
from hartist.serving.page.assets import read_asset, read_script
from hartist.serving.page.messages import alert, readable
from hartist.serving.page.runs import Runs, Stopped, Visitor
from hartist.serving.page.stage import message
from hartist.serving.tasks import Failed, Reconstructed, ReconstructTask

MAX_BYTES = 8 << 20
"""Of a picture's file: as base64 it has to pass `AccessRules.max_upload`."""
WAITING = "Encoding and decoding"


class ReconstructTab:
    """The tab's component and what happens when a picture is dropped on it."""

    def __init__(self, server: Server) -> None:
        self.server, self.runs = server, Runs(server.scheduler)
        script = read_script("reconstruct.js").replace("MAX_BYTES", str(MAX_BYTES))
        self.area = gr.HTML(
            None, html_template=read_asset("reconstruct.html"), js_on_load=script, padding=False, elem_id="reconstruct"
        )
        self.area.picture(self.reconstruct, None, self.area, show_progress="hidden", api_visibility="private")

    async def reconstruct(self, event: gr.EventData, request: gr.Request) -> AsyncGenerator[dict[str, Any], None]:
        """Reconstruct the picture that an event carries; yields what the tab shows."""
        try:
            self.server.ready_service()
            visitor = Visitor.of(request)
            task = ReconstructTask(secrets.token_hex(8), picture_of(event._data))
            with self.server.rates.charged(visitor.client, 1):
                yield message("waiting", WAITING)
                async with aclosing(self.runs.follow(visitor, [task])) as events:
                    async for news in events:
                        if news is None:
                            yield message("waiting", WAITING)  # if nobody is there any more, this ends here
                        if isinstance(news, Failed):
                            raise failure(news) if news.retry else UserError(news.message)
                        if isinstance(news, Reconstructed):
                            yield message("done", "") | {"pictures": self._pictures(news)}
        except Stopped:
            return  # another picture was dropped
        except Exception as error:
            text = readable(error)
            yield message("error", text)
            raise alert(text) from None

    def _pictures(self, done: Reconstructed) -> list[dict[str, str]]:
        """Labels, figures and addresses, from left to right."""
        return [
            {
                "label": label,
                "caption": caption,
                "source": "/v1/images/results/" + self.server.results.add(png, "image/png"),
                "file": f"{label.lower()}.png",
            }
            for label, caption, png in (
                ("Original", "as the model takes it", done.original),
                ("Discrete", decibels(done.discrete_psnr), done.discrete),
                ("Hybrid", decibels(done.hybrid_psnr), done.png),
            )
        ]


def picture_of(data: Any) -> bytes:
    """The file in an event. Raises UserError if there is none, or too much of it."""
    text = data.get("base64") if isinstance(data, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError("no picture was sent; choose one")
    if len(text) > MAX_BYTES * 4 // 3 + 4:
        raise UserError(f"this picture has more than {MAX_BYTES >> 20} MB; choose a smaller one")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise UserError("the picture was damaged on its way; send it again") from None


def decibels(psnr: float) -> str:
    """A PSNR for people."""
    return "no difference" if math.isinf(psnr) else f"{psnr:.2f} dB PSNR"
