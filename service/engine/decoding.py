"""Decoding: a thread beside the engine's that owns the first stage of latent diffusion.

What has taken its steps is decoded in batches of its own, while others take theirs: the earliest promise first. Between
batches it encodes and decodes what clients upload or ask to see, which has no promise.
"""

import heapq
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from model.rows import FirstStage, Image
from service.engine.costs import Costs
from service.engine.pulse import FIRST_TIME, Pulse
from service.engine.requests import Clock, Request, Requests, dead
from service.errors import ComputationFailed, QueueFull, ServiceError, Unavailable

log = logging.getLogger(__name__)

_MEASURED = 3  # batches of each width, at warm-up


class Observer(Protocol):
    """Is told of batches."""

    def batch_decoded(self, images: int, seconds: float) -> None: ...
    def decoding_failed(self) -> None: ...


@dataclass(frozen=True, order=True, slots=True)
class Latents:
    """What has taken its steps, in the order in which it is decoded."""

    promise: float
    number: int
    index: int
    request: Request = field(compare=False)
    latents: Image = field(compare=False)


class _Errand(NamedTuple):
    """What a client waits for that is no request."""

    run: Callable[[], Image]
    future: Future[Image]


class Decoding:
    """The thread, and what waits for it.

    Args:
        first_stage: only this thread calls it, once the engine is warm.
        requests: those that latents belong to. Their lock guards what waits.
        most: errands that may wait.
        pulse: of this thread.
        observer: is told of batches.
        clock: seconds, never falling.
        take: is given each image. It may find its request gone.
        died: is called where the thread ends, and should not have.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        requests: Requests,
        most: int,
        pulse: Pulse,
        observer: Observer,
        clock: Clock,
        take: Callable[[Request, int, Image], None],
        died: Callable[[], None],
    ) -> None:
        self._first_stage = first_stage
        self._requests = requests
        self._most = most
        self._pulse = pulse
        self._observer = observer
        self._clock = clock
        self._take = take
        self._died = died
        self._changed = requests.changed
        self._waiting: list[Latents] = []
        self._errands: deque[_Errand] = deque()  # the first may be under way
        self._closed: Callable[[], Unavailable] | None = None
        self._costs: Costs | None = None
        self._encode_s = 0.0  # what encoding took at warm-up
        self._thread = threading.Thread(target=self._main, name="decoding", daemon=True)

    # What the engine's thread calls.

    def warm_up(self, latents: Image) -> Costs:
        """Decode until it is known what that costs, then start the thread.

        Raises:
            ComputationFailed: where the image of these latents is not finite.
        """
        self._pulse.beat(FIRST_TIME)
        [image] = self._first_stage.decode([latents])
        if not np.isfinite(image).all():
            raise ComputationFailed("the probe's image is not finite")
        self._pulse.beat(FIRST_TIME)
        began = self._clock()
        self._first_stage.encode(image)
        self._encode_s = self._clock() - began
        self._costs = Costs({width: self._measure(latents, width) for width in self._first_stage.widths})
        self._pulse.rest()
        self._thread.start()
        return self._costs

    def _measure(self, latents: Image, images: int) -> float:
        """The fewest seconds of a batch; the first one also builds what it needs, and does not count."""
        seconds = []
        for _ in range(1 + _MEASURED):
            self._pulse.beat(FIRST_TIME)
            began = self._clock()
            self._first_stage.decode([latents] * images)
            seconds.append(self._clock() - began)
        return min(seconds[1:])

    def put(self, stepped: Iterable[tuple[Request, int, Image]]) -> None:
        """Have latents decoded: of each the request and the index of the row. They come at once, to share batches."""
        with self._changed:
            for request, index, latents in stepped:
                job = request.job
                heapq.heappush(self._waiting, Latents(job.promise, job.number, index, request, latents))
            self._changed.notify_all()

    # What other threads call.

    def close(self, why: Callable[[], Unavailable]) -> None:
        """Stop after the present batch. What waits is forgotten; its requests are not answered here."""
        with self._changed:
            self._closed = self._closed or why
            self._changed.notify_all()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread. False where that takes longer than `timeout_s`."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def encode(self, image: Image) -> Future[Image]:
        """The latents of an image, [c, h, w]. Raises Unavailable."""
        return self._ask(partial(self._first_stage.encode, image))

    def decode(self, latents: Image) -> Future[Image]:
        """The image of latents, [C, H, W]. Raises Unavailable."""
        return self._ask(lambda: self._first_stage.decode([latents])[0])

    def _ask(self, run: Callable[[], Image]) -> Future[Image]:
        with self._changed:
            if self._closed is not None:
                raise self._closed()
            self._forget_cancelled()
            if len(self._errands) >= self._most:
                seconds = 0.0 if self._costs is None else len(self._errands) * self._costs.seconds(1)
                raise QueueFull(f"{len(self._errands)} uploads wait to be encoded or decoded", seconds)
            errand = _Errand(run, Future())
            self._errands.append(errand)
            self._changed.notify_all()
            return errand.future

    def _forget_cancelled(self) -> None:
        self._errands = deque(errand for errand in self._errands if not errand.future.cancelled())

    @property
    def has_errands(self) -> bool:
        """Whether somebody waits for one."""
        return any(not errand.future.cancelled() for errand in self._errands)

    def fail_errands(self, why: Callable[[], Unavailable]) -> None:
        """Answer all of them with an error, also one that is under way."""
        with self._changed:
            errands, self._errands = self._errands, deque()
            self._changed.notify_all()
        for errand in errands:
            _answer(errand.future, why())

    # What its own thread does.

    def _main(self) -> None:
        try:
            while self._work():
                pass
        except Exception:
            log.exception("decoding died")
            self._died()
        finally:
            self._pulse.rest()
            self.close(dead)
            assert self._closed is not None
            self.fail_errands(self._closed)

    def _work(self) -> bool:
        """Wait for something to do, and do it. False when it is time to stop."""
        assert self._costs is not None
        with self._changed:
            while not (self._waiting or self._errands or self._closed):
                self._pulse.rest()
                self._changed.wait()
            if self._closed:
                return False
            self._pulse.beat(self._costs.seconds(1))
            late = self._requests.take_out_late(self._clock())
            batch = self._earliest(self._costs.width)
            self._forget_cancelled()
            errand = self._errands[0] if self._errands else None
        self._requests.answer_late(late)
        if batch:
            self._decode(batch, self._costs)
        elif errand is not None:
            self._run(errand, self._costs)
        return True

    def _earliest(self, most: int) -> list[Latents]:
        """Take out those that are decoded next, without those whose requests have left."""
        batch: list[Latents] = []
        while self._waiting and len(batch) < most:
            latents = heapq.heappop(self._waiting)
            if self._requests.of(latents.request.job) is not None:
                batch.append(latents)
        return batch

    def _decode(self, batch: Sequence[Latents], costs: Costs) -> None:
        """Decode a batch. Where that raises, each image is tried again alone."""
        try:
            images = self._batch(batch, costs)
        except Exception:
            log.exception("decoding of %d images failed; each is tried alone", len(batch))
            for one in batch:
                self._decode_alone(one, costs)
            return
        for one, image in zip(batch, images, strict=True):
            self._take(one.request, one.index, image)

    def _decode_alone(self, one: Latents, costs: Costs) -> None:
        if self._requests.of(one.request.job) is None:
            return
        try:
            [image] = self._batch([one], costs)
        except Exception:
            log.exception("and alone")
            self._requests.fail(one.request, ComputationFailed("an image of this request could not be decoded"))
        else:
            self._take(one.request, one.index, image)

    def _batch(self, batch: Sequence[Latents], costs: Costs) -> list[Image]:
        began = self._clock()
        self._pulse.beat(costs.seconds(len(batch)))
        try:
            images = self._first_stage.decode([one.latents for one in batch])
        except Exception:
            self._pulse.pass_ended(worked=False)
            self._observer.decoding_failed()
            raise
        finally:
            self._pulse.beat(costs.seconds(1))
        self._pulse.pass_ended(worked=True)
        seconds = self._clock() - began
        with self._changed:
            costs.follow(len(batch), seconds)
        self._observer.batch_decoded(len(batch), seconds)
        return images

    def _run(self, errand: _Errand, costs: Costs) -> None:
        """Run an errand. What a client sent may be why it fails, so only requests tell whether decoding works again."""
        outcome: Image | ServiceError
        self._pulse.beat(max(costs.seconds(1), self._encode_s))
        try:
            outcome = errand.run()
        except Exception:
            log.exception("an upload could not be encoded or decoded")
            outcome = ComputationFailed("this could not be encoded or decoded")
        else:
            if not np.isfinite(outcome).all():
                outcome = ComputationFailed("what was encoded or decoded has values that are not finite")
        self._pulse.beat(costs.seconds(1))
        with self._changed:
            is_here = bool(self._errands) and self._errands[0] is errand  # else it has been answered, or cancelled
            if is_here:
                self._errands.popleft()
                self._changed.notify_all()
        if is_here:
            _answer(errand.future, outcome)


def _answer(future: Future[Image], outcome: Image | ServiceError) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, ServiceError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
