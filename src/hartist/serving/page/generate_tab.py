"""The tab that makes pictures: a form, the pictures as they come into focus, and those made before"""

from __future__ import annotations

import asyncio
import html
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import gradio as gr

from hartist.serving.app import Server
from hartist.serving.page.assets import read_asset, read_script
from hartist.serving.page.messages import alert, readable
from hartist.serving.page.requests import from_form, from_query
from hartist.serving.page.runs import Runs, Stopped, Visitor
from hartist.serving.page.stage import Stage, message
from hartist.serving.schemas import ImageRequest
from hartist.serving.tasks import ModelInfo

BUNDLED = "emoji"
EXAMPLES = (
    "red apple, 3d",
    "grinning face, flat",
    "jack-o-lantern, noto",
    "sunflower, flat",
    "red heart, 3d",
    "frog, flat",
)
"""For the bundled model, which knows emoji and nothing else."""
LOADING_SECONDS = 0.5


class GenerateTab:
    """The tab's components and what happens when they are used."""

    def __init__(self, server: Server, about: gr.HTML) -> None:
        """`about` is where the model's name and size are shown."""
        self.server, self.runs, self.about = server, Runs(server.scheduler), about
        with gr.Row(equal_height=False, elem_id="create"):
            with gr.Column(scale=2, min_width=300, elem_id="form"):
                self._form()
            with gr.Column(scale=3, min_width=300, elem_id="pictures"):
                self.stage = gr.HTML(
                    None,
                    html_template=read_asset("pictures.html"),
                    js_on_load=read_script("pictures.js"),
                    padding=False,
                )
        gr.on(
            [self.go.click, self.prompt.submit],
            self.generate,
            self.form,
            self.stage,
            show_progress="hidden",
            api_visibility="private",
            preprocess=False,  # values are checked as the API's are, and told in the same words
        )
        self.halt.click(self.stop, None, None, show_progress="hidden", api_visibility="private")

    def _form(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", placeholder="What shall the picture show?", lines=1, max_lines=6, elem_id="prompt"
        )
        with gr.Row(visible=False, elem_id="examples") as self.examples:
            for example in EXAMPLES:
                button = gr.Button(example, size="sm", min_width=0, scale=0)
                button.click(None, None, self.prompt, js=f"() => {example!r}", api_visibility="private")
        with gr.Row(elem_id="numbers"):
            self.count = gr.Number(1, label="Pictures", min_width=80)
            self.seed = gr.Textbox(label="Seed", placeholder="random", max_lines=1, min_width=80, elem_id="seed")
            self.guidance = gr.Number(None, label="Guidance", step=0.5, min_width=80)
            self.fast = gr.Checkbox(False, label="Fast", info="less exact", min_width=80, elem_id="fast")
        with gr.Row(elem_id="buttons"):
            self.go = gr.Button("Generate", variant="primary", elem_id="go")
            self.halt = gr.Button("Stop", variant="stop", elem_id="halt")
        with gr.Accordion("Advanced", open=False):
            with gr.Row():
                self.temperature = gr.Number(None, label="Temperature", info="0 is greedy", step=0.1, min_width=120)
                self.top_k = gr.Number(None, label="Top-k", info="0 for all codes", min_width=120)
            with gr.Row():
                self.steps = gr.Number(None, label="Diffusion steps", info="empty: the model's own", min_width=120)
                self.residual = gr.Checkbox(
                    True, label="Residual tokens", info="the hybrid path", min_width=120, elem_id="residual"
                )
        self.form = [
            self.prompt,
            self.count,
            self.seed,
            self.guidance,
            self.fast,
            self.temperature,
            self.top_k,
            self.steps,
            self.residual,
        ]
        self.outputs = [*self.form, self.examples, self.about]

    # ----------------------------------------------------------------- what happens

    async def generate(
        self,
        prompt: Any,
        count: Any,
        seed: Any,
        guidance: Any,
        fast: Any,
        temperature: Any,
        top_k: Any,
        steps: Any,
        residual: Any,
        request: gr.Request,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Make what the form asks for; yields what the stage shows."""
        try:
            asked = from_form(
                prompt,
                count,
                seed,
                guidance=guidance,
                fast=fast,
                temperature=temperature,
                top_k=top_k,
                diffusion_steps=steps,
                residual=residual,
            )
        except Exception as error:
            text = readable(error)
            yield message("error", text)
            raise alert(text) from None
        async with aclosing(self.show(asked, Visitor.of(request))) as values:
            async for value in values:
                yield value

    async def show(self, asked: ImageRequest, visitor: Visitor) -> AsyncGenerator[dict[str, Any], None]:
        """Make pictures; yields what the stage shows at every scale, at last an alert if it went wrong."""
        stage = None
        try:
            arrived = asyncio.get_running_loop().time()
            service = self.server.ready_service()
            tasks = service.tasks(asked)
            with self.server.rates.charged(visitor.client, asked.n):
                await service.allow(asked, arrived)
                stage = Stage(service.info, tasks, service.results)
                yield stage.value()
                async with aclosing(self.runs.follow(visitor, tasks, arrived)) as events:
                    async for event in events:
                        if event is None:
                            stage.wait(self.server.scheduler.waiting)
                        else:
                            await stage.add(event)
                        yield stage.value()
            stage.end("done")
            yield stage.value()
        except Stopped as reason:
            if stage is not None and not reason.superseded:
                stage.end("stopped", "Stopped")
                yield stage.value()
        except Exception as error:
            text = readable(error)
            if stage is not None:
                stage.end("error", text)
            yield message("error", text) if stage is None else stage.value()
            raise alert(text) from None

    async def stop(self, request: gr.Request) -> None:
        """The Stop button."""
        self.runs.stop(Visitor.of(request))

    async def open(self, query: str | None, request: gr.Request) -> AsyncGenerator[dict[Any, Any], None]:
        """A page was opened, by a link perhaps: fill the form in, and make what the link asks for."""
        while self.server.service is None and self.server.failure is None:
            yield {self.stage: message("loading", "The model is being loaded")}
            await asyncio.sleep(LOADING_SECONDS)
        asked = info = None
        try:
            info = self.server.ready_service().info
            asked = from_query(query or "")
        except Exception as error:
            text = readable(error)
            yield {self.stage: message("error", text), **(self._filled(info, None) if info else {})}
            raise alert(text) from None
        yield {self.stage: message("idle", ""), **self._filled(info, asked)}
        if asked is not None:
            async with aclosing(self.show(asked, Visitor.of(request))) as values:
                async for value in values:
                    yield {self.stage: value}

    def _filled(self, info: ModelInfo, asked: ImageRequest | None) -> dict[Any, Any]:
        """The form with the model's own settings, and a link's over them."""
        own = info.settings

        def setting(name: str) -> Any:
            value = getattr(asked, name, None)
            return getattr(own, name) if value is None else value

        size = f"{info.width}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{info.height}\N{NO-BREAK SPACE}px"
        about = f"{html.escape(info.name)} · {size} · {info.num_scales}\N{NO-BREAK SPACE}scales"
        prompt: dict[str, Any] = {"value": asked.prompt if asked else ""}
        if info.num_classes:
            prompt |= {"label": "Class", "placeholder": f"0 to {info.num_classes - 1}"}
        return {
            self.prompt: gr.update(**prompt),
            self.examples: gr.update(visible=info.name == BUNDLED),
            self.seed: str(asked.seed) if asked and asked.seed is not None else "",
            self.guidance: setting("guidance"),
            self.fast: bool(asked and asked.fast),
            self.temperature: setting("temperature"),
            self.top_k: setting("top_k"),
            self.steps: setting("diffusion_steps"),
            self.residual: setting("residual"),
            self.about: about,
        }
