"""Clients for serving_load.py: each asks for a picture, waits for it, and asks for the next"""

from __future__ import annotations

import itertools
import json
import os
import time

from locust import constant, task
from locust.contrib.fasthttp import FastHttpUser

STREAM = os.environ.get("HARTIST_LOAD_STREAM") == "1"
SUBJECTS = ("red apple", "sleeping face", "sunflower", "pizza", "snowman", "frog", "red heart", "watermelon")
STYLES = ("3d", "flat", "noto")
PROMPTS = [f"{subject}, {style}" for subject in SUBJECTS for style in STYLES]
numbers = itertools.count()


class Client(FastHttpUser):
    """One client of a closed loop."""

    wait_time = constant(0)
    connection_timeout = network_timeout = 600.0

    @task
    def picture(self) -> None:
        number = next(numbers)
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number}
        path = "/v1/images/generations"
        if not STREAM:
            with self.client.post(path, json=body, catch_response=True, name="picture") as reply:
                if reply.status_code == 429:  # what a full queue is meant to answer
                    reply.success()
                    self.environment.events.request.fire(
                        request_type="429",
                        name="refused",
                        response_time=0,
                        response_length=0,
                        exception=None,
                        context={},
                    )
                    time.sleep(float(reply.headers.get("Retry-After", "1")))
            return
        started, first = time.perf_counter(), None
        with self.client.post(
            path, json={**body, "stream": True}, stream=True, catch_response=True, name="stream"
        ) as reply:
            last = ""
            for line in reply.iter_lines():
                text = line if isinstance(line, str) else line.decode()
                if text.startswith("data:"):
                    last = json.loads(text[5:])["type"]
                    first = first or time.perf_counter() - started
            if last != "image_generation.completed":
                reply.failure(f"the stream ended with {last or 'nothing'}")
        whole = time.perf_counter() - started
        if first is not None:
            for name, seconds in (("first preview", first), ("whole", whole)):
                self.environment.events.request.fire(
                    request_type="SSE",
                    name=name,
                    response_time=1000 * seconds,
                    response_length=0,
                    exception=None,
                    context={},
                )
