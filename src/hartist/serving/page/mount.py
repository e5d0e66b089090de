"""The page of `hartist serve`: Gradio within the same application, from this machine alone"""

from __future__ import annotations

import os

# Before Gradio is imported: it reads them then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # what it would keep of every event in memory

import gradio as gr
from fastapi import FastAPI

from hartist.serving.app import Server
from hartist.serving.page.assets import read_asset
from hartist.serving.page.generate_tab import GenerateTab
from hartist.serving.page.reconstruct_tab import ReconstructTab
from hartist.serving.page.routes import PageRoutes

EVENTS_AT_ONCE = 1024
"""Runs of all open pages; who is served when is the scheduler's affair, not Gradio's."""
SESSIONS = 512
"""Open pages whose form Gradio remembers."""

MASTHEAD = '<h1>Hartist</h1><span id="about">${value}</span>'


def mount_page(app: FastAPI, server: Server) -> FastAPI:
    """Add the page at `/` to the application. Routes that the application has already keep their addresses."""
    blocks = build(server)
    app = gr.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=read_asset("style.css"),
    )
    gradio = app.router.routes.pop()
    functions = {number for number, function in blocks.fns.items() if function.fn is not None}
    app.router.routes.append(PageRoutes(gradio.app, functions))  # type: ignore[attr-defined]
    return app


def build(server: Server) -> gr.Blocks:
    """The page's components and events."""
    with gr.Blocks(title="Hartist", analytics_enabled=False, fill_width=True) as blocks:
        about = gr.HTML("", html_template=MASTHEAD, padding=False, elem_id="masthead")
        query = gr.Textbox(visible=False)
        with gr.Tabs():
            with gr.Tab("Create"):
                create = GenerateTab(server, about)
            with gr.Tab("Reconstruct"):
                ReconstructTab(server)
        blocks.load(
            create.open,
            query,
            [create.stage, *create.outputs],
            js="() => window.location.search",
            show_progress="hidden",
            api_visibility="private",
        )
    blocks.max_threads = EVENTS_AT_ONCE
    blocks.state_session_capacity = SESSIONS
    blocks.queue(max_size=EVENTS_AT_ONCE, default_concurrency_limit=None)
    # How often Gradio looks for events and for progress bars, which there are none of: not a thousand times a second.
    blocks._queue.sleep_when_free, blocks._queue.progress_update_sleep_when_free = 0.02, 1.0
    return blocks


def theme() -> gr.themes.Base:
    """Quiet greys and the system's own fonts: nothing is fetched for it."""
    return gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="zinc",
        radius_size="lg",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
