"""The engine: what other threads call. Two threads of its own work: denoising, and decoding where rows are latents.

`submit` says by when a request will be done, and gives a Future. To cancel the Future takes its rows out of the batch
before the next step. The engine knows nothing of HTTP or asyncio, and sees the model as a model.rows.Runner.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol, cast

from model.rows import VAE, Image, Row, Runner
from service.engine.costs import Costs
from service.engine.decoding import Decoding
from service.engine.decoding import Observer as DecodingObserver
from service.engine.denoising import Denoising
from service.engine.denoising import Observer as DenoisingObserver
from service.engine.errands import Errands
from service.engine.fairness import Places
from service.engine.health import Health
from service.engine.observers import Unfailing
from service.engine.queue import Queue
from service.engine.requests import Accepted, Clock, Finished, Watcher, draining
from service.engine.requests import Observer as RequestObserver
from service.engine.scheduler import Scheduler

Status = Literal["loading", "ready", "draining", "failed"]


class Observer(RequestObserver, DenoisingObserver, DecodingObserver, Protocol):
    """Is told of requests, of passes and of batches."""


class Engine:
    """Runs requests on a runner.

    Args:
        runner: the network.
        probe: a row that shows that the model works, for the warm-up and for readiness.
        places: for requests accepted and not finished.
        observer: is told of passes and requests. What it raises is logged.
        clock: seconds, never falling.
        scheduler: makes the line of jobs.
        vae: makes images of latents, where rows are latents.
    """

    def __init__(
        self,
        runner: Runner,
        probe: Row,
        places: Places,
        observer: Observer,
        clock: Clock = time.monotonic,
        scheduler: Callable[[Costs, int], Scheduler] = Scheduler,
        vae: VAE | None = None,
    ) -> None:
        observer = cast(Observer, Unfailing(observer))
        self._runner = runner
        self._queue = queue = Queue(places, observer, clock)
        self._errands = errands = Errands(queue, places.total)
        self._health = health = Health(queue, errands, probe, clock)
        self._decoding: Decoding | None = None
        if vae is not None:
            self._decoding = Decoding(vae, queue, errands, health, observer, clock)
        self._denoising = Denoising(runner, probe, queue, health, observer, clock, scheduler, self._decoding)
        self._changed = queue.changed

    def start(self) -> None:
        """Start to warm the model up. Then requests are accepted."""
        self._denoising.thread.start()

    # Requests

    def submit(self, rows: Sequence[Row], timeout_s: float, client: str, watcher: Watcher | None = None) -> Accepted:
        """Accept a request.

        Args:
            rows: its images.
            timeout_s: the seconds that it may take, waiting included.
            client: who asks.
            watcher: is told how it goes.

        Raises:
            Invalid: where it would take longer than `timeout_s` even if there were no others.
            Unavailable: where it would now, where the queue is full, or the engine is loading, draining or dead.
        """
        return self._queue.accept(rows, timeout_s, client, watcher)

    def check_possible(self, rows: Sequence[Row], timeout_s: float) -> None:
        """Refuse rows that could not be done in time, before there is all that they start from.

        Raises:
            Invalid, Unavailable: as `submit`, for what does not depend on others.
        """
        self._queue.check_possible(rows, timeout_s)

    def encode(self, image: Image) -> Future[Image]:
        """Make latents, [c, h, w], of an image, [C, H, W], where the model has a VAE. Cancelling forgets it.

        Raises:
            Unavailable: where too many are waiting, or the engine is loading, draining or dead.
        """
        assert self._decoding is not None
        return self._decoding.encode(image)

    def decode(self, latents: Image) -> Future[Image]:
        """Make an image of latents, likewise."""
        assert self._decoding is not None
        return self._decoding.decode(latents)

    # Coming up and going down

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        """Wait until the model is warm, or never will be. False where that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._queue.scheduler is not None or self._health.stopped, timeout_s)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._queue.close(draining)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request and no upload is left. False where that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (len(self._queue) or len(self._errands)), timeout_s)

    def close(self) -> None:
        """Stop the threads after what they are at. Requests that are not finished fail as Draining."""
        self.drain()
        self._queue.stop()
        while running := [thread for thread in self._threads if thread.is_alive()]:
            if self._health.overdue is not None:  # it may never end
                self._health.fail_all(draining)
                self._health.check()
                return
            running[0].join(1.0)

    @property
    def _threads(self) -> list[threading.Thread]:
        return [self._denoising.thread] + ([] if self._decoding is None else [self._decoding.thread])

    # Health

    def probe(self) -> Future[Finished]:
        """Run the probe as a request of its own, which needs no place in the queue. One that is under way is shared.

        Raises:
            Unavailable: where the engine is loading, stuck or dead.
        """
        return self._health.probe()

    def asked(self) -> None:
        """Somebody asks whether the engine works. Where nothing has run for long, `check_health` starts a probe."""
        self._health.asked()

    def check_health(self) -> None:
        """Notice what does not return, probe where there is doubt, give up where there is no hope. For every second."""
        self._health.check()

    @property
    def alive(self) -> bool:
        """Whether the threads go on: they have not ended, and what they are at is not known to be stuck."""
        return self._health.alive

    @property
    def in_doubt(self) -> bool:
        """Whether something failed last, or nothing has run for long."""
        return self._health.in_doubt

    @property
    def beyond_help(self) -> str | None:
        """Why only a new process helps; None while there is hope."""
        return self._health.beyond_help

    @property
    def status(self) -> Status:
        """`failed` where the threads do not go on, or the probe has failed and nothing has worked since."""
        if self._queue.is_draining:
            return "draining"
        if not self._health.alive or self._health.broken:
            return "failed"
        return "loading" if self._queue.scheduler is None else "ready"

    # Facts

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that forward passes run at."""
        return self._runner.widths

    @property
    def scheduler(self) -> Scheduler | None:
        """The line, for its counters and costs; None until the model is warm."""
        return self._queue.scheduler
