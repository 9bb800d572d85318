"""The events of /sample: queued, progress, preview, image, and done or error."""

import base64
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from model.rows import Image
from service.engine.requests import Accepted, Finished, Progress
from service.errors import ServiceError
from service.http.events import Event, News, event
from service.http.png import encode_png
from service.http.problems import document
from service.http.responses import timings
from service.plan.plan import Plan
from service.plan.served import Served

_PARTS = 10_000  # of all work, in which progress is told


@dataclass(frozen=True, slots=True)
class SampleEvents:
    """Implements service.http.events.Telling.

    Attributes:
        plan: of the request.
        served: turns latent previews into rough images.
    """

    plan: Plan
    served: Served

    def queued(self, accepted: Accepted) -> Iterator[Event]:
        times = {"eta_s": _rounded(accepted.eta_s), "promise_s": _rounded(accepted.promise_s)}
        yield event({"position": accepted.position, **times, "warnings": self.plan.warnings}, "queued")

    def news(self, news: News) -> Iterator[Event | Callable[[], Event]]:
        if news.progress is not None:
            yield event(_shown(news.progress), "progress")
        for index, (step, x0) in news.previews.items():
            if np.isfinite(x0).all():  # a job with other values is about to fail
                yield partial(self._preview, index, step, x0)
        for index, png in news.images.items():
            yield event({"index": index, "seed": self.plan.seeds[index], **_encoded(png)}, "image")

    def done(self, finished: Finished) -> Iterator[Event]:
        yield event({"parameters": self.plan.parameters, "timings": timings(finished, self.served)}, "done")

    def failed(self, error: ServiceError) -> Iterator[Event]:
        yield event({**document(error)}, "error")

    def _preview(self, index: int, step: int, x0: Image) -> Event:
        decoder = {} if self.served.preview is None else {"decoder": "linear"}
        png = encode_png(self.served.shown(x0), {})
        return event({"index": index, "step": step, **decoder, **_encoded(png)}, "preview")


def _encoded(png: bytes) -> dict[str, str]:
    return {"b64_json": base64.b64encode(png).decode()}


def _shown(progress: Progress) -> dict[str, object]:
    """Progress as its event has it."""
    fraction = math.floor(progress.fraction * _PARTS) / _PARTS  # never rounded up to 1
    return {**progress._asdict(), "eta_s": _rounded(progress.eta_s), "fraction": fraction}


def _rounded(seconds: float) -> float:
    return round(seconds, 6)
