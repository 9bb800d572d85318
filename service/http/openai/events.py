"""The events of a streamed request to OpenAI's Images API."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from model.rows import Image
from service.engine.requests import Accepted, Finished
from service.errors import ServiceError
from service.http.events import Event, News, event
from service.http.openai.answers import encoded, output_format, usage
from service.http.openai.errors import told
from service.http.openai.fields import Asked
from service.http.problems import document
from service.plan.plan import Plan
from service.plan.served import Served
from service.plan.texts import read_by


class ImageEvents:
    """Partial images, spread over the steps, and an event for each finished image. Implements events.Telling.

    Args:
        kind: with which the types of events begin.
        plan: of the request.
        asked: the format of images.
        served: turns latent previews into rough images.
        most: partial images of each image.

    Attributes:
        preview_every: steps from one preview to the next; 0 for none.
    """

    def __init__(self, kind: str, plan: Plan, asked: Asked, served: Served, most: int) -> None:
        self._kind = kind
        self._plan = plan
        self._asked = asked
        self._served = served
        self._most = most
        self._steps = len(plan.rows[0].table)
        self._read = read_by(plan.rows, served)
        self._sent: Counter[int] = Counter()  # partial images, by index
        self.preview_every = max(1, self._steps // (most + 1)) if most else 0

    def queued(self, accepted: Accepted) -> Iterator[Event]:
        yield from ()

    def news(self, news: News) -> Iterator[Event | Callable[[], Event]]:
        for index, (step, x0) in news.previews.items():
            # The last step is the image itself. A job with values that are not finite is about to fail.
            if step < self._steps and self._sent[index] < self._most and np.isfinite(x0).all():
                yield partial(self._partial, index, self._sent[index], x0)
                self._sent[index] += 1
        for index, image in news.images.items():
            yield partial(self._event, "completed", index, image, {"usage": usage(self._read[index])})

    def done(self, finished: Finished) -> Iterator[Event]:
        yield event("[DONE]")

    def failed(self, error: ServiceError) -> Iterator[Event]:
        said = document(error)
        yield event(told(said["status"], said["detail"], error).document, "error")

    def _partial(self, index: int, number: int, x0: Image) -> Event:
        rough = self._served.preview
        image = encoded(self._asked, x0 if rough is None else rough(x0), {})
        return self._event("partial_image", index, image, {"partial_image_index": number})

    def _event(self, name: str, index: int, image: bytes, about: dict[str, Any]) -> Event:
        kind = f"{self._kind}.{name}"
        data = {
            "type": kind,
            "b64_json": image.decode(),
            **about,
            "created_at": int(time.time()),
            "size": str(self._plan.group),
            "quality": "auto",
            "background": "opaque",
            "output_format": output_format(self._asked.media_type),
            "index": index,
            "seed": self._plan.seeds[index],
        }
        return event(data, kind)
