"""The engine: one thread that owns the model. Schedule, run, advance; then again. Latents are decoded beside it.

`submit` says by when a request will be done, and gives a Future; cancelling that takes its rows out of the batch before
the next step. The engine knows nothing of HTTP or asyncio, and sees the model as a model.rows.Runner.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple, Protocol, cast

import numpy as np

from model.rows import FirstStage, Forward, Image, Reading, Row, Runner
from service.engine.costs import Costs
from service.engine.decoding import Decoding
from service.engine.decoding import Observer as DecodingObserver
from service.engine.eta import eta
from service.engine.fairness import Places
from service.engine.health import DECODING, PASSES, Health
from service.engine.jobs import Batch, Task
from service.engine.observers import Unfailing
from service.engine.pulse import FIRST_TIME, Pulse
from service.engine.requests import Accepted, Clock, Finished, Request, Requests, Watcher, dead, draining
from service.engine.requests import Observer as RequestObserver
from service.engine.scheduler import Scheduler
from service.errors import ComputationFailed, Unavailable

log = logging.getLogger(__name__)

Status = Literal["loading", "ready", "draining", "failed"]
Phase = Literal["idle", "schedule", "admit", "pass", "advance"]

STARTED_PER_ROW = 4  # tasks with slots, for each row of the widest pass
_MEASURED = 3  # passes of each width, at warm-up


class Observer(RequestObserver, DecodingObserver, Protocol):
    """Is told of passes too."""

    def phase_done(self, phase: Phase, seconds: float) -> None: ...
    def pass_done(self, rows: int, seconds: float) -> None: ...
    def pass_failed(self) -> None: ...


class _Placed(NamedTuple):
    """A forward row of a pass, with what the runner knows of it."""

    task: Task
    forward: Forward


class Engine:
    """Runs requests on a runner.

    Args:
        runner: the model. Only the engine's thread calls it.
        probe: a row that shows that the model works, for the warm-up and for readiness.
        places: for requests accepted and not finished.
        observer: is told of passes and requests. What it raises is logged.
        clock: seconds, never falling.
        scheduler: makes the line of jobs.
        first_stage: makes images of what has taken its steps, where those are latents.
    """

    def __init__(
        self,
        runner: Runner,
        probe: Row,
        places: Places,
        observer: Observer,
        clock: Clock = time.monotonic,
        scheduler: Callable[[Costs, int], Scheduler] = Scheduler,
        first_stage: FirstStage | None = None,
    ) -> None:
        observer = cast(Observer, Unfailing(observer))
        self._runner = runner
        self._probe = probe
        self._observer = observer
        self._clock = clock
        self._new_scheduler = scheduler
        self._requests = Requests(places, observer, clock)
        self._changed = self._requests.changed  # guards the line, and what follows
        self._draining = self._stopping = False
        self._health = Health(self._requests, probe, clock, self._fail_all)
        self._pulse = self._health.new_pulse(PASSES)
        self._pulses = [self._pulse]
        self._decoding: Decoding | None = None
        if first_stage is not None:
            most, pulse = places.total, self._health.new_pulse(DECODING)
            self._pulses.append(pulse)
            told = observer, clock, self._decoded, self._died
            self._decoding = Decoding(first_stage, self._requests, most, pulse, *told)
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._free_since = clock()  # the end of the last pass, or of idleness

    # What other threads call.

    def start(self) -> None:
        """Start the thread, which warms the model up and then takes requests."""
        self._thread.start()

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
        return self._requests.accept(rows, timeout_s, client, watcher)

    def check_possible(self, rows: Sequence[Row], timeout_s: float) -> None:
        """Refuse rows that could not be done in time, before they are made: the first stage is at work on them.

        Raises:
            Invalid, Unavailable: as `submit`, for what does not depend on others.
        """
        self._requests.check_possible(rows, timeout_s)

    def probe(self) -> Future[Finished]:
        """Run the probe as a request of its own, which needs no place in the queue. One that is under way is shared.

        Raises:
            Unavailable: where the engine is loading, stuck or dead.
        """
        return self._health.probe()

    def asked(self) -> None:
        """Somebody asks whether the engine works. Where nothing has run for long, `check_pulse` starts a probe."""
        self._health.asked()

    def check_pulse(self) -> None:
        """Notice what does not return, probe where there is doubt, give up where there is no hope. For every second."""
        self._health.check()

    def encode(self, image: Image) -> Future[Image]:
        """Make latents, [c, h, w], of an image, [C, H, W], where the model has a first stage. Cancelling forgets it.

        Raises:
            Unavailable: where too many are waiting, or the engine is loading, draining or dead.
        """
        return self._open_decoding().encode(image)

    def decode(self, latents: Image) -> Future[Image]:
        """Make an image of latents, likewise."""
        return self._open_decoding().decode(latents)

    def _open_decoding(self) -> Decoding:
        assert self._decoding is not None
        with self._changed:
            self._requests.check_open()
            return self._decoding

    def drain(self) -> None:
        """Refuse new requests from now on."""
        with self._changed:
            self._draining = True
            self._requests.close(draining)

    def wait_loaded(self, timeout_s: float | None = None) -> bool:
        """Wait until the model is warm, or never will be. False where that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._requests.scheduler is not None or self._health.stopped, timeout_s
            )

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request and no upload is left. False where that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (len(self._requests) or self._has_errands), timeout_s)

    @property
    def _has_errands(self) -> bool:
        return self._decoding is not None and self._decoding.has_errands

    def close(self) -> None:
        """Stop the threads after what they are at. Requests that are not finished fail as Draining."""
        self.drain()
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._decoding is not None:
            self._decoding.close(draining)
        while self._thread.is_alive() or not (self._decoding is None or self._decoding.join(0.0)):
            if self._health.overdue is not None:  # it may never end
                self._fail_all(draining, "draining")
                self._health.check()
                return
            self._thread.join(1.0)
            if self._decoding is not None:
                self._decoding.join(1.0)

    def _fail_all(self, why: Callable[[], Unavailable], reason: str = "failed") -> None:
        """Answer everybody with an error."""
        self._requests.fail_all(why, reason)
        if self._decoding is not None:
            self._decoding.fail_errands(why)

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
        if self._draining:
            return "draining"
        if not self._health.alive or self._health.broken:
            return "failed"
        return "loading" if self._requests.scheduler is None else "ready"

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that forward passes run at."""
        return self._runner.widths

    @property
    def scheduler(self) -> Scheduler | None:
        """The line, for its counters and costs; None until the model is warm."""
        return self._requests.scheduler

    # What the engine's thread does.

    def _main(self) -> None:
        try:
            scheduler = self._warm_up()
            while (batch := self._schedule(scheduler)) is not None:
                self._advance(scheduler, self._run(scheduler, self._admit(scheduler, batch)))
        except Exception as error:
            if self.scheduler is None:
                why = str(error) if isinstance(error, ComputationFailed) else " ".join(repr(error).split())
                self._health.give_up(f"the model could not be warmed up: {why}")
            else:
                log.exception("the engine died")
                self._health.give_up("the engine has died")
        finally:
            self._end()

    def _died(self) -> None:
        """Decoding has died. Its thread calls this."""
        self._health.give_up("decoding has died")
        self._end()

    def _end(self) -> None:
        """A thread has ended: so does the other, and all that is left is answered."""
        with self._changed:
            self._stopping = self._health.stopped = True
            self._requests.close(dead)
            why, reason = (draining, "draining") if self._draining else (dead, "failed")
        if self._decoding is not None:
            self._decoding.close(why)
        self._fail_all(why, reason)

    def _warm_up(self) -> Scheduler:
        """Run the probe until it is known what passes cost."""
        self._pulse.beat(FIRST_TIME)
        slot = self._runner.admit(self._probe)
        for _ in range(len(self._probe.table)):
            self._pulse.beat(FIRST_TIME)
            self._runner.step([Forward(slot, 0)])
        self._pulse.beat(FIRST_TIME)
        image = self._runner.read(slot).x
        self._runner.release(slot)
        if not np.isfinite(image).all():
            raise ComputationFailed("the probe's image is not finite")
        self._pulse.rest()
        decoding = None if self._decoding is None else self._decoding.warm_up(image)
        costs = Costs({width: self._measure(width) for width in self._runner.widths}, decoding)
        scheduler = self._new_scheduler(costs, STARTED_PER_ROW * self._runner.widths[-1])
        self._pulse.rest()
        self._requests.open(scheduler)
        return scheduler

    def _measure(self, rows: int) -> float:
        """The fewest seconds of a pass; the first one also builds what it needs, and does not count."""
        seconds = []
        for _ in range(1 + _MEASURED):
            self._pulse.beat(FIRST_TIME)
            slots = [self._runner.admit(self._probe) for _ in range(rows)]
            began = self._clock()
            self._runner.step([Forward(slot, 0) for slot in slots])
            seconds.append(self._clock() - began)
            for slot in slots:
                self._runner.release(slot)
        return min(seconds[1:])

    def _beat(self, scheduler: Scheduler) -> None:
        """Something begins: whatever the device has still to do for the last pass, that takes no longer than a pass."""
        self._pulse.beat(scheduler.costs.seconds(self._runner.widths[-1]))

    def _schedule(self, scheduler: Scheduler) -> Batch | None:
        """Wait for work, and choose the next pass. None when it is time to stop."""
        now = self._clock()
        with self._changed:
            while not (scheduler.outstanding or self._requests.abandoned or self._stopping):
                self._pulse.rest()
                self._changed.wait()
                self._observer.phase_done("idle", self._clock() - now)
                now = self._free_since = self._clock()
            if self._stopping:
                self._pulse.rest()
                return None
            self._beat(scheduler)
            late = self._requests.take_out_late(now)
            abandoned, self._requests.abandoned = self._requests.abandoned, []
            batch = scheduler.next_batch(now)
        for slot in abandoned:
            self._runner.release(slot)
        self._requests.answer_late(late)
        self._observer.phase_done("schedule", self._clock() - now)
        return batch

    def _admit(self, scheduler: Scheduler, batch: Batch) -> list[_Placed]:
        """Give rows that start a slot. Rows that left meanwhile, or that cannot start, are left out."""
        began = self._clock()
        placed = []
        for task, branch in batch:
            request = self._requests.of(task.job)
            slot = None if request is None else request.slots.get(task)
            if request is not None and slot is None:
                self._beat(scheduler)
                slot = self._start(request, task, began)
            if slot is not None:
                placed.append(_Placed(task, Forward(slot, branch)))
        self._observer.phase_done("admit", self._clock() - began)
        return placed

    def _start(self, request: Request, task: Task, now: float) -> int | None:
        try:
            slot = self._runner.admit(request.rows[task.index])
        except Exception:
            log.exception("a row could not be admitted")
            self._pulse.raised()
            self._requests.fail(request, ComputationFailed("this request could not be started"))
            return None
        return slot if self._requests.start(request, task, slot, now) else None

    def _run(self, scheduler: Scheduler, batch: Sequence[_Placed]) -> Sequence[_Placed]:
        """Run the pass. Where it raises, each row is tried again alone. Returns what has run."""
        if not batch:
            return batch
        try:
            self._pass(scheduler, [forward for _, forward in batch])
        except Exception:
            log.exception("a forward pass of %d rows failed; each is tried alone", len(batch))
        else:
            return batch
        ran: list[_Placed] = []
        for _, rows in groupby(batch, lambda placed: placed.task):
            ran += self._run_alone(scheduler, list(rows))
        return ran

    def _run_alone(self, scheduler: Scheduler, rows: list[_Placed]) -> list[_Placed]:
        """Run the forward rows of one task. Where they raise again, its request fails."""
        request = self._requests.of(rows[0].task.job)
        if request is None:
            return []
        try:
            self._pass(scheduler, [forward for _, forward in rows])
        except Exception:
            log.exception("and alone")
            self._requests.fail(request, ComputationFailed("a forward pass of this request failed"))
            return []
        return rows

    def _pass(self, scheduler: Scheduler, forwards: Sequence[Forward]) -> None:
        began = self._clock()
        self._pulse.beat(scheduler.costs.seconds(len(forwards)))
        worked = False
        try:
            self._runner.step(forwards)
            worked = True
        finally:
            now = self._clock()
            free_since, self._free_since = self._free_since, now
            with self._changed:  # so that a check sees either all of this or nothing
                self._beat(scheduler)
                self._pulse.pass_ended(worked)
                if worked:
                    scheduler.costs.follow(len(forwards), now - free_since)
                self._health.reopen()
            self._observer.phase_done("pass", now - began)
            if not worked:
                self._observer.pass_failed()
        self._observer.pass_done(len(forwards), now - began)

    def _advance(self, scheduler: Scheduler, ran: Sequence[_Placed]) -> None:
        """Collect finished images, answer finished requests, and tell those who watch."""
        began = self._clock()
        with self._changed:
            ended = []
            for task in scheduler.advance([(task, forward.branch) for task, forward in ran]):
                request = self._requests.of(task.job)
                assert request is not None
                ended.append((request, task.index, request.slots.pop(task)))
                if task.job.undecoded:
                    request.stepped = began
            watched: dict[Request, float] = {}
            for job in dict.fromkeys(task.job for task, _ in ran):
                watching = self._requests.of(job)
                if watching is not None and watching.watcher is not None:
                    to_come = job.left or job.undecoded
                    watched[watching] = eta(job, scheduler, self._requests.arrivals, began) if to_come else 0.0
        for request, eta_s in watched.items():
            self._beat(scheduler)
            self._show(request, eta_s, [placed for placed in ran if placed.task.job is request.job])
        stepped = []
        for request, index, slot in ended:
            self._beat(scheduler)
            reading = self._read(request, slot)
            self._runner.release(slot)
            if reading is None:
                continue
            if request.job.undecoded:
                stepped.append((request, index, reading.x))
            else:
                self._take(request, index, reading.x, [self._pulse])
        if stepped:
            assert self._decoding is not None
            self._decoding.put(stepped)
        self._observer.phase_done("advance", self._clock() - began)

    def _read(self, request: Request, slot: int) -> Reading | None:
        """Copy out a row of a request. Where that raises, the request fails."""
        try:
            return self._runner.read(slot)
        except Exception:
            log.exception("a row could not be read")
            self._pulse.raised()
            self._requests.fail(request, ComputationFailed("what was computed for this request could not be read"))
            return None

    def _show(self, request: Request, eta_s: float, ran: Sequence[_Placed]) -> None:
        """Tell a watcher of its rows that ran."""
        steps = len(request.rows[0].table)
        self._tell(request, lambda watcher: watcher.progress(steps - request.job.steps, steps, eta_s))
        every = 0 if request.watcher is None else request.watcher.preview_every
        for task, forward in ran if every else ():
            step = steps - task.steps_left
            has_stepped = forward.branch == task.forwards_per_step - 1  # the last of its branches
            if has_stepped and step % every == 0 and (reading := self._read(request, forward.slot)) is not None:
                self._tell(request, partial(_preview, task.index, step, reading.x0))

    def _tell(self, request: Request, tell: Callable[[Watcher], None]) -> None:
        """Tell a request's watcher, if it has one. Where that raises, the request fails, and no other."""
        if request.watcher is None:
            return
        try:
            tell(request.watcher)
        except Exception:
            log.exception("a watcher failed")
            self._requests.fail(request, ComputationFailed("this request could not be followed to its end"))

    def _decoded(self, request: Request, index: int, image: Image) -> None:
        """Take an image from decoding. Its thread calls this."""
        assert self._requests.scheduler is not None
        with self._changed:
            self._requests.scheduler.decoded(request.job)
        self._take(request, index, image, self._pulses)

    def _take(self, request: Request, index: int, image: Image, pulses: Sequence[Pulse]) -> None:
        """Put a finished image to the others of its request. Both threads call this, each of requests of its own.

        Args:
            request: may have left, for another of its images failed.
            index: of the image.
            image: perhaps not finite.
            pulses: of what made it.
        """
        if self._requests.of(request.job) is None:
            return
        finite = bool(np.isfinite(image).all())
        for pulse in pulses:
            pulse.image_ended(finite)
        if not finite:
            self._requests.fail(request, ComputationFailed("the image has values that are not finite"))
            return
        request.images[index] = image
        self._tell(request, lambda watcher: watcher.image(index, image))
        if len(request.images) == len(request.rows):
            self._requests.finish(request)


def _preview(index: int, step: int, x0: Image, watcher: Watcher) -> None:
    watcher.preview(index, step, x0)
