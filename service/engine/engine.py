"""The engine, as other threads call it. Its own threads work: denoising, and one for each stage beside it.

`submit` returns a promise and a Future. A cancelled Future takes its rows out before the next step. The engine knows
nothing of HTTP or asyncio, and sees the model as model.rows.Runner and model.rows.VAE, one of each group, and as
model.rows.TextEncoder.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, Protocol, cast

from model.rows import VAE, Group, Row, Runner, TextEncoder
from service.engine.answer import Answer, Images
from service.engine.check import Check, CheckImage, Inspection
from service.engine.contexts import Contexts, Prompts
from service.engine.costs import Machine
from service.engine.decode import Decode, Stepped
from service.engine.denoising import Denoising
from service.engine.denoising import Observer as DenoisingObserver
from service.engine.encode import Encode
from service.engine.encode import Observer as TextObserver
from service.engine.fairness import Places
from service.engine.health import Health
from service.engine.observers import Unfailing
from service.engine.queue import Queue
from service.engine.requests import Accepted, Clock, Encoding, Finished, Request, Upload, Watcher, draining
from service.engine.requests import Observer as RequestObserver
from service.engine.scheduler import Scheduler
from service.engine.stage import Observer as StageObserver
from service.engine.stage import Piece, Stage
from service.engine.warm_up import Model, measure
from service.engine.worker import Worker, Workplace

Status = Literal["loading", "ready", "draining", "failed"]

STARTED_PER_ROW = 4  # rows with slots, for each row of the widest pass of their group


class Observer(RequestObserver, DenoisingObserver, StageObserver, TextObserver, Protocol):
    """Hears of requests, passes, batches and texts."""


class Engine:
    """Runs requests.

    Args:
        runners: the network, by group. The first group is the default one.
        probes: by group, a row that shows that the model works, for the warm-up and for readiness. Its texts have their
            contexts.
        places: for requests that are accepted and not finished.
        observer: hears of requests, passes and batches. Its errors are logged.
        clock: seconds, never falling.
        scheduler: makes the scheduler, from the costs and the most rows with slots of each group.
        vaes: decode latents into images, by group; None where rows are images.
        text_encoder: makes contexts of texts; None for a model without texts.
        check: is called with each image that a client is to get as a picture, float32 [C, H, W], one at a time, in a
            thread of its own. A reason that it returns refuses the request. Requests whose images are checked have no
            previews. None checks nothing.
    """

    def __init__(
        self,
        runners: Mapping[Group, Runner],
        probes: Mapping[Group, Row],
        places: Places,
        observer: Observer,
        clock: Clock = time.monotonic,
        scheduler: Callable[[Machine, Mapping[Group, int]], Scheduler] = Scheduler,
        vaes: Mapping[Group, VAE] | None = None,
        text_encoder: TextEncoder | None = None,
        check: CheckImage | None = None,
    ) -> None:
        self._runners, self._probes, self._vaes = runners, probes, vaes or {}
        self._text_encoder, self._check = text_encoder, check
        self._clock = clock
        self._observer = told = cast(Observer, Unfailing(observer))
        self._new_scheduler = scheduler
        self._queue = queue = Queue(places, told, clock)
        self._health = health = Health(queue, probes, self._begin, clock)
        self._contexts = contexts = Contexts()
        for branch in (branch for probe in probes.values() for branch in probe.branches):
            if branch.text is not None and branch.context is not None:  # many requests need the empty prompt
                contexts.keep(branch.text, branch.context)
        at = Workplace(queue, health, told, clock)
        # From the last stage to the first, because each hands its results to the next.
        answers = Answer(queue, clock)
        answer = Stage(answers, at)
        images = Images(answers, answer, queue, clock)
        checks = None if check is None else Stage(Check(check, images, queue), at)
        inspection = Inspection(checks, images, queue, health, clock)
        decode = Stage(Decode(self._vaes, inspection, queue), at) if vaes else None
        self._stepped = stepped = Stepped(decode, inspection, clock)
        self._denoising = Denoising(runners, self._warm_up, stepped, at)
        self._encode = None
        if vaes or text_encoder is not None:
            task = Encode(text_encoder, self._vaes, contexts, stepped, queue, health, told, clock)
            self._encode = Stage(task, at)
        self._stages = [stage for stage in (self._encode, decode, checks, answer) if stage is not None]
        self._changed = queue.changed

    def start(self) -> None:
        """Start to warm up the model. The engine then accepts requests."""
        self._denoising.thread.start()

    def _warm_up(self) -> Scheduler:
        """Check that the model works, measure what it costs, and start the other threads. Denoising calls this."""
        model = Model(self._runners, self._probes, self._vaes, self._text_encoder, self._check)
        machine = measure(model, self._health.stages, self._clock)
        for stage in self._stages:
            stage.thread.start()
        return self._new_scheduler(
            machine, {group: STARTED_PER_ROW * runner.widths[-1] for group, runner in self._runners.items()}
        )

    # Requests

    def submit(
        self,
        rows: Sequence[Row],
        timeout_s: float,
        client: str,
        encoding: Encoding | None = None,
        watcher: Watcher | None = None,
        upload: Upload | None = None,
    ) -> Accepted:
        """Accept a request.

        Args:
            rows: one for each image, all of one group; with an upload, a draft of them. A row without steps takes no
                pass: its `start` is decoded, if the row is to be decoded, and encoded. Texts without contexts are
                encoded first, unless their contexts are known.
            timeout_s: the seconds that the request may take, waiting and the encoding of the answer included.
            client: who sent the request.
            encoding: of the answer; None if the images themselves are wanted.
            watcher: hears how the request goes.
            upload: must be encoded first.

        Raises:
            Invalid: the request takes longer than `timeout_s` even without other requests.
            Unavailable: the request takes longer now, the queue is full, or the engine is loading, draining or dead.
        """
        prompts = Prompts.of(rows, self._contexts)
        if upload is None and not prompts.unknown:
            rows = prompts.given_to(rows)
        request, accepted = self._queue.accept(rows, timeout_s, client, encoding, watcher, upload, prompts)
        for _ in prompts.contexts:
            self._observer.text_known()
        self._begin(request)
        return accepted

    def _begin(self, request: Request) -> None:
        """Hand a new request to its first stage, unless it waits for a pass."""
        pieces = [Piece.of_text(request, index, text) for index, text in enumerate(request.prompts.unknown)]
        if request.upload is not None:
            pieces += [Piece.of_upload(request, index, image) for index, image in enumerate(request.upload.images)]
        if pieces:
            assert self._encode is not None
            self._encode.put(pieces)
        else:
            self._stepped.skip(request)

    # Coming up and going down

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        """Wait until the model is warm or has failed to warm up. False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._queue.scheduler is not None or self._health.stopped, timeout_s)

    def drain(self) -> None:
        """Refuse new requests from now on."""
        self._queue.close(draining)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is left. False after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not len(self._queue), timeout_s)

    def close(self) -> None:
        """Stop the threads after their present calls. Unfinished requests fail as Draining."""
        self.drain()
        self._queue.stop()
        workers: list[Worker] = [self._denoising, *self._stages]
        while running := [worker.thread for worker in workers if worker.thread.is_alive()]:
            if self._health.overdue is not None:  # the call may never end
                self._queue.fail_all(draining)
                self._health.check()
                return
            running[0].join(1.0)

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
        """Notice late requests and stuck calls, start a probe in doubt, and give up a hopeless engine.

        To be called every second.
        """
        with self._queue.lock:
            late = self._queue.take_out_late(self._clock())
        self._queue.answer_late(late)
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
        """The widths at which forward passes of the default group run."""
        return next(iter(self._runners.values())).widths

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler, for its counters and costs; None until the model is warm."""
        return self._queue.scheduler
