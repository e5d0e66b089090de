"""What Prometheus is told"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hartist.serving.scheduler import Scheduler

SECONDS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "hartist_requests", "HTTP requests by route and status", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "hartist_request_seconds", "Time to the last image", buckets=SECONDS, registry=self.registry
        )
        self.first_preview = Histogram(
            "hartist_first_preview_seconds", "Time to a stream's first preview", buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "hartist_batch_images", "Images in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.batch_seconds = Histogram(
            "hartist_batch_seconds", "Time to make a batch", buckets=SECONDS, registry=self.registry
        )
        for name, text, value in (
            ("hartist_waiting_images", "Images no worker has begun", lambda: scheduler.waiting),
            ("hartist_running_images", "Images being made", lambda: scheduler.running),
            ("hartist_ready_workers", "Workers with a loaded model", lambda: scheduler.ready),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)
        self.registry.register(_SchedulerCounters(scheduler))
        scheduler.on_batch = self._batch

    def _batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """In the exposition format."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware around all else: counts replies, by the route that a request took, if any, and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        def count(status: int) -> None:
            # The pattern, not the path: what clients make up must not become a label.
            self.metrics.requests.labels(getattr(scope.get("route"), "path", "other"), str(status)).inc()

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                count(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            if not started:
                count(500)  # whoever catches it answers so, and is further out than this
            raise


class _SchedulerCounters(Collector):
    """The scheduler counts for itself; this hands its figures on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler

    def collect(self) -> list[CounterMetricFamily]:
        """One family a figure."""
        counts = self.scheduler.statistics
        images = CounterMetricFamily("hartist_images", "Images by what became of them", labels=["outcome"])
        for outcome in ("finished", "failed", "cancelled", "retried"):
            images.add_metric([outcome], getattr(counts, outcome))
        return [
            images,
            CounterMetricFamily("hartist_workers_lost", "Workers that died or got stuck", value=counts.workers_lost),
        ]
