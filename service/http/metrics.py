"""The metrics for Prometheus, in base units: stepwise_*, and the usual process_*."""

from collections.abc import Iterable, Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

import service
from model.rows import Group
from service.engine.admission import REFUSALS
from service.engine.costs import Costs
from service.engine.denoising import Phase
from service.engine.engine import Engine
from service.engine.requests import Finished
from service.engine.stage import Name
from service.http.checks import Outcome
from service.plan.served import Served

CONTENT_TYPE = CONTENT_TYPE_LATEST

_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_ERROR_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4)


class Metrics:
    """The metrics of one server. Implements service.engine.engine.Observer."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, descriptors, CPU time
        self._requests = self._counter("requests", "Requests answered", "endpoint", "code")
        self._request_seconds = self._histogram(
            "request_seconds", "Seconds from a request to the end of its answer", _REQUEST_BUCKETS, "endpoint"
        )
        self._queue_seconds = self._histogram(
            "queue_seconds", "Seconds that a request waited for its first step", _REQUEST_BUCKETS
        )
        self._denoise_seconds = self._histogram(
            "denoise_seconds", "Seconds from a request's first step to its last", _REQUEST_BUCKETS
        )
        self._decode_seconds = self._histogram(
            "decode_seconds", "Seconds to decode a batch of latents", _REQUEST_BUCKETS
        )
        self._decode_images = self._histogram("decode_images", "Images of a batch of latents decoded", _BATCH_BUCKETS)
        self._decode_failures = self._counter("decode_failures", "Batches of latents whose decoding raised an error")
        self._encode_seconds = self._histogram("encode_seconds", "Seconds to encode an answer", _REQUEST_BUCKETS)
        self._text_seconds = self._histogram("text_seconds", "Seconds to encode a prompt", _REQUEST_BUCKETS)
        self._texts = self._counter("texts", "Prompts of requests, by where their contexts come from", "source")
        self._images = self._counter("images", "Images finished")
        self._step_seconds = self._histogram("step_seconds", "Seconds of a forward pass", _STEP_BUCKETS)
        self._batch_rows = self._histogram("batch_rows", "Forward rows of a pass", _BATCH_BUCKETS)
        self._pass_failures = self._counter("pass_failures", "Forward passes that raised an error")
        self._accepted = self._counter("accepted", "Requests for images that were accepted, and given a promise")
        self._refused = self._counter("refused", "Requests for images that were not accepted", "reason")
        self._cancelled = self._counter("cancelled", "Requests for images that ended before they were done", "reason")
        self._promises = self._counter("promises", "Promised times that were kept, or missed", "outcome")
        self._checks = self._counter("checks", "Calls of the operator's check of prompts and images", "outcome")
        self._eta_error = self._histogram(
            "eta_error_ratio", "How far the time expected at arrival was from the time taken, over that", _ERROR_BUCKETS
        )
        engine_seconds = self._counter("engine_seconds", "Seconds of the engine's thread", "phase")
        self._phase_seconds = {phase: engine_seconds.labels(phase) for phase in get_args(Phase)}  # each pass uses these
        stage_seconds = self._counter("stage_seconds", "Seconds of the stages beside denoising", "stage")
        self._stage_seconds = {name: stage_seconds.labels(name) for name in get_args(Name)}
        self._stage_failures = self._counter("stage_failures", "Batches of a stage that raised an error", "stage")
        for counter, values in (
            (self._stage_failures, get_args(Name)),
            (self._refused, REFUSALS.values()),
            (self._cancelled, ("disconnect", "timeout", "failed", "refused", "draining")),
            (self._texts, ("encoder", "cache")),
            (self._promises, ("kept", "missed")),
            (self._checks, get_args(Outcome)),
        ):
            for value in values:
                counter.labels(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"stepwise_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"stepwise_{name}", text, labels, buckets=buckets, registry=self.registry)

    def request_done(self, endpoint: str, code: int, seconds: float) -> None:
        self._requests.labels(endpoint, str(code)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def check_done(self, outcome: Outcome) -> None:
        self._checks.labels(outcome).inc()

    def phase_done(self, phase: Phase, seconds: float) -> None:
        self._phase_seconds[phase].inc(seconds)

    def pass_done(self, rows: int, seconds: float) -> None:
        self._batch_rows.observe(rows)
        self._step_seconds.observe(seconds)

    def batch_done(self, stage: Name, pieces: int, seconds: float) -> None:
        self._stage_seconds[stage].inc(seconds)
        if stage == "decode":
            self._decode_images.observe(pieces)
            self._decode_seconds.observe(seconds)

    def batch_failed(self, stage: Name) -> None:
        self._stage_failures.labels(stage).inc()
        if stage == "decode":
            self._decode_failures.inc()

    def text_encoded(self, seconds: float) -> None:
        self._texts.labels("encoder").inc()
        self._text_seconds.observe(seconds)

    def text_known(self) -> None:
        self._texts.labels("cache").inc()

    def pass_failed(self) -> None:
        self._pass_failures.inc()

    def request_accepted(self) -> None:
        self._accepted.inc()

    def request_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def request_started(self, queue_s: float) -> None:
        self._queue_seconds.observe(queue_s)

    def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None:
        self._images.inc(len(finished.images))
        if finished.denoise_s > 0:  # /noise takes no steps
            self._denoise_seconds.observe(finished.denoise_s)
        self._encode_seconds.observe(finished.encode_s)
        self._promises.labels("kept" if kept else "missed").inc()
        if taken_s > 0:
            self._eta_error.observe(abs(eta_s - taken_s) / taken_s)

    def request_cancelled(self, reason: str) -> None:
        self._cancelled.labels(reason).inc()
        if reason == "timeout":
            self._promises.labels("missed").inc()


def exposition(metrics: Metrics, engine: Engine, served: Served) -> bytes:
    """All metrics as Prometheus text: the counters, the model, and the state of the engine."""
    return generate_latest(metrics.registry) + generate_latest(_State(engine, served))


class _State(Collector):
    """Reads what is served, and the scheduler's own counters."""

    def __init__(self, engine: Engine, served: Served) -> None:
        self._engine = engine
        self._served = served

    def collect(self) -> Iterable[Metric]:
        model = self._served.model
        facts = {
            "name": model.name,
            "digest": model.digest,
            "architecture": model.architecture,
            "fingerprint": self._served.fingerprint,
            "device": self._served.device,
            "version": service.__version__,
        }
        yield InfoMetricFamily("stepwise_model", "The model that is served", value=facts)
        line = self._engine.scheduler
        for name, text, value in (
            ("rows_running", "Images that have started", line.running if line else 0),
            ("rows_waiting", "Images that wait for their first step", line.waiting if line else 0),
            (
                "backlog_seconds",
                "Expected seconds of all work that is accepted and not done",
                line.backlog_s if line else 0,
            ),
            (
                "outstanding_row_steps",
                "Deprecated: see backlog_seconds. Forward rows still to run",
                line.outstanding if line else 0,
            ),
            ("images_decoding", "Images that are decoded, or wait for it", line.decoding if line else 0),
        ):
            yield GaugeMetricFamily(f"stepwise_{name}", text, value=value)
        preemptions = line.preemptions if line else 0
        yield CounterMetricFamily(
            "stepwise_preemptions", "How often an image had to wait between two steps", value=preemptions
        )
        machine = line.machine if line else None
        yield _cost("step_cost", "a forward pass, by its width", "rows", machine.passes if machine else {})
        if machine is not None and machine.decode:
            yield _cost("decode_cost", "decoding, by the images of a batch", "images", machine.decode)
        if machine is not None and machine.text is not None:
            text_s = machine.text.seconds(1)
            yield GaugeMetricFamily("stepwise_text_cost_seconds", "Expected seconds to encode a prompt", value=text_s)


def _cost(name: str, what: str, by: str, costs: Mapping[Group, Costs]) -> Metric:
    """The expected seconds of batches of each size of images."""
    found = GaugeMetricFamily(f"stepwise_{name}_seconds", f"Expected seconds of {what}", labels=[by, "size"])
    for group, its in costs.items():
        for width, seconds in its.by_width.items():
            found.add_metric([str(width), str(group)], seconds)
    return found
