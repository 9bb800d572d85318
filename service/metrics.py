"""What Prometheus sees. Base units, prefix stepwise_."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import service
from service.engine import Engine
from service.served import Served

CONTENT_TYPE = CONTENT_TYPE_LATEST

_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server. Implements service.engine.Observer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self._requests = Counter("stepwise_requests", "Requests answered", ["endpoint", "code"], registry=r)
        self._request_seconds = Histogram(
            "stepwise_request_seconds",
            "Seconds from a request to the end of its answer",
            ["endpoint"],
            buckets=_REQUEST_BUCKETS,
            registry=r,
        )
        self._queue_seconds = Histogram(
            "stepwise_queue_seconds",
            "Seconds that a job waited for its first step",
            buckets=_REQUEST_BUCKETS,
            registry=r,
        )
        self._images = Counter("stepwise_images", "Images finished", registry=r)
        self._step_seconds = Histogram(
            "stepwise_step_seconds", "Seconds of a forward pass", buckets=_STEP_BUCKETS, registry=r
        )
        self._batch_rows = Histogram(
            "stepwise_batch_rows", "Forward rows of a pass", buckets=_BATCH_BUCKETS, registry=r
        )
        self._cancelled = Counter("stepwise_cancelled", "Jobs that ended before they were done", ["reason"], registry=r)
        for reason in ("disconnect", "timeout"):
            self._cancelled.labels(reason)

    def watch(self, engine: Engine, served: Served) -> None:
        """Show an engine's state whenever the metrics are read."""
        for name, help_text, value in (
            ("stepwise_rows_running", "Images that have started", lambda: engine.rows_running),
            ("stepwise_rows_waiting", "Images that wait for their first step", lambda: engine.rows_waiting),
            ("stepwise_outstanding_row_steps", "Forward rows still to run", lambda: engine.outstanding_row_steps),
        ):
            Gauge(name, help_text, registry=self.registry).set_function(value)
        Info("stepwise_model", "The model that is served", registry=self.registry).info(
            {
                "name": served.model.name,
                "digest": served.model.digest,
                "architecture": served.model.architecture,
                "fingerprint": served.fingerprint,
                "device": served.device,
                "version": service.__version__,
            }
        )

    def exposition(self) -> bytes:
        """All metrics, as Prometheus text."""
        return generate_latest(self.registry)

    def request_done(self, endpoint: str, code: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(code)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def pass_done(self, rows: int, seconds: float) -> None:
        self._batch_rows.observe(rows)
        self._step_seconds.observe(seconds)

    def job_started(self, queue_s: float) -> None:
        self._queue_seconds.observe(queue_s)

    def job_finished(self, images: int) -> None:
        self._images.inc(images)

    def job_cancelled(self, reason: str) -> None:
        self._cancelled.labels(reason).inc()
