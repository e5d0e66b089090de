"""Clients for serving_load.py: each asks for a picture, waits for it, and asks for the next"""

from __future__ import annotations

import itertools
import time

from locust import constant, task
from locust.contrib.fasthttp import FastHttpUser

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
        with self.client.post(path, json=body, catch_response=True, name="picture") as reply:
            if reply.status_code == 429:  # what a full queue is meant to answer
                reply.request_meta["name"] = "refused"
                reply.success()
                time.sleep(float(reply.headers.get("Retry-After", "1")))
