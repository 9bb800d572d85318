"""Decoding: a thread beside denoising. The thread owns the VAE of latent diffusion.

Rows that have taken their steps are decoded in batches, the earliest promise first. Between batches, the thread runs
errands.
"""

import heapq
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from model.rows import VAE, Image
from service.engine.costs import Costs
from service.engine.delivery import deliver
from service.engine.errands import Errand, Errands
from service.engine.health import DECODING, Health
from service.engine.queue import Queue
from service.engine.requests import Clock, Request
from service.engine.warm_up import measure_vae
from service.engine.waves import RowState
from service.errors import ComputationFailed, ServiceError

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Hears of decoding batches."""

    def batch_decoded(self, images: int, seconds: float) -> None: ...
    def decoding_failed(self) -> None: ...


@dataclass(frozen=True, order=True, slots=True)
class _Latents:
    """The latents of a row that has taken its steps. They sort in the order of decoding."""

    promise: float
    number: float
    index: int
    request: Request = field(compare=False)
    row: RowState = field(compare=False)
    latents: Image = field(compare=False)


class Decoding:
    """The thread, and the latents that wait for it.

    Args:
        vae: once the engine is warm, only this thread calls the VAE.
        queue: the requests. Its lock guards the waiting latents.
        errands: other work for the VAE.
        health: hears how the thread gets on.
        observer: hears of batches.
        clock: seconds, never falling.
    """

    def __init__(
        self,
        vae: VAE,
        queue: Queue,
        errands: Errands,
        health: Health,
        observer: Observer,
        clock: Clock,
    ) -> None:
        self._vae = vae
        self._queue = queue
        self._errands = errands
        self._health = health
        self._stage = health.new_stage(DECODING)
        self._observer = observer
        self._clock = clock
        self._changed = queue.changed
        self._waiting: list[_Latents] = []
        self.thread = threading.Thread(target=self._main, name="decoding", daemon=True)

    # Calls from denoising.

    def warm_up(self, latents: Image) -> Costs:
        """Measure the costs of decoding, then start the thread.

        Raises:
            ComputationFailed: the image of these latents is not finite.
        """
        measured = measure_vae(self._vae, latents, self._stage, self._clock)
        self._costs, self._encode_s = measured
        self._errands.seconds = self._costs.seconds(1)
        self.thread.start()
        return self._costs

    def put(self, stepped: Iterable[tuple[Request, RowState, Image]]) -> None:
        """Add rows to decode: each request, row and latents. One call adds all of them, so that they share batches."""
        with self._changed:
            for request, row, latents in stepped:
                job = request.job
                heapq.heappush(self._waiting, _Latents(job.promise, job.number, row.index, request, row, latents))
            self._changed.notify_all()

    # Calls from other threads.

    def encode(self, image: Image) -> Future[Image]:
        """The latents of an image, [c, h, w]. Raises Unavailable."""
        return self._errands.add(partial(self._vae.encode, image))

    def decode(self, latents: Image) -> Future[Image]:
        """The image of latents, [C, H, W]. Raises Unavailable."""
        return self._errands.add(lambda: self._vae.decode([latents])[0])

    # The thread's own work.

    def _main(self) -> None:
        try:
            while self._work():
                pass
        except Exception:
            log.exception("decoding died")
            self._health.give_up("decoding has died")
        finally:
            self._stage.rest()
            self._health.end()

    def _work(self) -> bool:
        """Wait for a batch or an errand, and run it. False when the thread must stop."""
        with self._changed:
            while not (self._waiting or len(self._errands) or self._queue.stopping):
                self._stage.rest()
                self._changed.wait()
            if self._queue.stopping:
                return False
            self._stage.beat(self._costs.seconds(1))
            late = self._queue.take_out_late(self._clock())
            batch = self._earliest(self._costs.width)
            errand = self._errands.first()
        self._queue.answer_late(late)
        if batch:
            self._decode(batch)
        elif errand is not None:
            self._run(errand)
        return True

    def _earliest(self, most: int) -> list[_Latents]:
        """Take out the next latents to decode. Latents of requests that have left are dropped."""
        batch: list[_Latents] = []
        while self._waiting and len(batch) < most:
            latents = heapq.heappop(self._waiting)
            if self._queue.of(latents.request.job) is not None:
                batch.append(latents)
        return batch

    def _decode(self, batch: Sequence[_Latents]) -> None:
        """Decode a batch. If the batch raises, try each row alone."""
        try:
            images = self._batch(batch)
        except Exception:
            log.exception("decoding of %d images failed; each is tried alone", len(batch))
            for one in batch:
                self._decode_alone(one)
            return
        for one, image in zip(batch, images, strict=True):
            self._deliver(one, image)

    def _decode_alone(self, one: _Latents) -> None:
        if self._queue.of(one.request.job) is None:
            return
        try:
            [image] = self._batch([one])
        except Exception:
            log.exception("and alone")
            self._queue.fail(one.request, ComputationFailed("an image of this request could not be decoded"))
        else:
            self._deliver(one, image)

    def _batch(self, batch: Sequence[_Latents]) -> list[Image]:
        began = self._clock()
        self._stage.beat(self._costs.seconds(len(batch)))
        try:
            images = self._vae.decode([one.latents for one in batch])
        except Exception:
            self._stage.pass_ended(worked=False)
            self._observer.decoding_failed()
            raise
        finally:
            self._stage.beat(self._costs.seconds(1))
        self._stage.pass_ended(worked=True)
        seconds = self._clock() - began
        with self._changed:
            self._costs.follow(len(batch), seconds)
        self._observer.batch_decoded(len(batch), seconds)
        return images

    def _deliver(self, one: _Latents, image: Image) -> None:
        assert self._queue.scheduler is not None
        with self._changed:
            self._queue.scheduler.decoded(one.request.job)
        deliver(self._queue, one.request, one.row, image, self._health.stages.values())

    def _run(self, errand: Errand) -> None:
        """Run an errand. A failure does not count against the VAE's health: the client's upload may be the cause."""
        outcome: Image | ServiceError
        self._stage.beat(max(self._costs.seconds(1), self._encode_s))
        try:
            outcome = errand.run()
        except Exception:
            log.exception("an upload could not be encoded or decoded")
            outcome = ComputationFailed("this could not be encoded or decoded")
        else:
            if not np.isfinite(outcome).all():
                outcome = ComputationFailed("what was encoded or decoded has values that are not finite")
        self._stage.beat(self._costs.seconds(1))
        self._errands.answer(errand, outcome)
