"""The engine, as other threads call it. Its own threads work: denoising, and decoding where rows are latents.

`submit` returns a promise and a Future. A cancelled Future takes its rows out before the next step. The engine knows
nothing of HTTP or asyncio, and sees the model as a model.rows.Runner.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol, cast

from model.rows import VAE, Image, Row, Runner
from service.engine.costs import Group, Machine
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
    """Hears of requests, passes and decoding batches."""


class Engine:
    """Runs requests on a runner.

    Args:
        runner: the network.
        probe: a row that shows that the model works, for the warm-up and for readiness.
        places: for requests that are accepted and not finished.
        observer: hears of requests, passes and batches. Its errors are logged.
        clock: seconds, never falling.
        scheduler: makes the scheduler.
        vae: decodes latents into images; None where rows are images.
    """

    def __init__(
        self,
        runner: Runner,
        probe: Row,
        places: Places,
        observer: Observer,
        clock: Clock = time.monotonic,
        scheduler: Callable[[Machine, Mapping[Group, int]], Scheduler] = Scheduler,
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
        """Start to warm up the model. The engine then accepts requests."""
        self._denoising.thread.start()

    # Requests

    def submit(self, rows: Sequence[Row], timeout_s: float, client: str, watcher: Watcher | None = None) -> Accepted:
        """Accept a request.

        Args:
            rows: one for each image.
            timeout_s: the seconds that the request may take, waiting included.
            client: of the request.
            watcher: hears how the request goes.

        Raises:
            Invalid: the request takes longer than `timeout_s` even without other requests.
            Unavailable: the request takes longer now, the queue is full, or the engine is loading, draining or dead.
        """
        return self._queue.accept(rows, timeout_s, client, watcher)

    def check_possible(self, rows: Sequence[Row], timeout_s: float) -> None:
        """Refuse rows that cannot be done in time, before the image that they start from is encoded.

        Raises:
            Invalid, Unavailable: as for `submit`, by the rules that do not depend on other requests.
        """
        self._queue.check_possible(rows, timeout_s)

    def encode(self, image: Image) -> Future[Image]:
        """Encode an image, [C, H, W], into latents, [c, h, w], with the model's VAE. The Future may be cancelled.

        Raises:
            Unavailable: too many errands wait, or the engine is loading, draining or dead.
        """
        assert self._decoding is not None
        return self._decoding.encode(image)

    def decode(self, latents: Image) -> Future[Image]:
        """Decode latents into an image. As `encode`."""
        assert self._decoding is not None
        return self._decoding.decode(latents)

    # Coming up and going down

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        """Wait until the model is warm or has failed to warm up. False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._queue.scheduler is not None or self._health.stopped, timeout_s)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._queue.close(draining)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request and no errand is left. False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (len(self._queue) or len(self._errands)), timeout_s)

    def close(self) -> None:
        """Stop the threads after their present calls. Unfinished requests fail as Draining."""
        self.drain()
        self._queue.stop()
        while running := [thread for thread in self._threads if thread.is_alive()]:
            if self._health.overdue is not None:  # the call may never end
                self._health.fail_all(draining)
                self._health.check()
                return
            running[0].join(1.0)

    @property
    def _threads(self) -> list[threading.Thread]:
        return [self._denoising.thread] + ([] if self._decoding is None else [self._decoding.thread])

    # Health

    def probe(self) -> Future[Finished]:
        """Run the probe as a request without a place in the queue. Callers share a running probe.

        Raises:
            Unavailable: the engine is loading, stuck or dead.
        """
        return self._health.probe()

    def asked(self) -> None:
        """Note a question about health. If nothing has run for long, `check_health` starts a probe."""
        self._health.asked()

    def check_health(self) -> None:
        """Notice stuck calls, start a probe in doubt, and give up a hopeless engine. To be called every second."""
        self._health.check()

    @property
    def alive(self) -> bool:
        """Whether the threads go on: none has ended, and none is known to be stuck."""
        return self._health.alive

    @property
    def in_doubt(self) -> bool:
        """Whether the last call failed, or nothing has run for long."""
        return self._health.in_doubt

    @property
    def beyond_help(self) -> str | None:
        """Why only a new process helps; None while the engine may recover."""
        return self._health.beyond_help

    @property
    def status(self) -> Status:
        """`failed` if the threads do not go on, or if the probe has failed and nothing has worked since."""
        if self._queue.is_draining:
            return "draining"
        if not self._health.alive or self._health.broken:
            return "failed"
        return "loading" if self._queue.scheduler is None else "ready"

    # Facts

    @property
    def widths(self) -> Sequence[int]:
        """The widths at which forward passes run."""
        return self._runner.widths

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler, for its counters and costs; None until the model is warm."""
        return self._queue.scheduler
