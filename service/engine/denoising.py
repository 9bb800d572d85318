"""Denoising: the thread that owns the network. Schedule, run, advance; then again."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

from model.rows import Forward, Image, Reading, Row, Runner
from service.engine.costs import Costs, Group, Machine
from service.engine.decoding import Decoding
from service.engine.delivery import deliver, new_outlook, tell, tell_progress
from service.engine.eta import Outlook
from service.engine.health import PASSES, Health
from service.engine.jobs import Batch
from service.engine.queue import Queue
from service.engine.requests import Clock, Request, Watcher
from service.engine.scheduler import Scheduler
from service.engine.warm_up import draw_probe, measure_passes
from service.engine.waves import RowState
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

Phase = Literal["idle", "schedule", "admit", "pass", "advance"]

STARTED_PER_ROW = 4  # rows with slots, for each row of the widest pass


class Observer(Protocol):
    """Hears of passes."""

    def phase_done(self, phase: Phase, seconds: float) -> None: ...
    def pass_done(self, rows: int, seconds: float) -> None: ...
    def pass_failed(self) -> None: ...


class _Placed(NamedTuple):
    """A forward row of a pass, and its row."""

    row: RowState
    forward: Forward


class Denoising:
    """The thread.

    Args:
        runner: the network. Only this thread calls the runner.
        probe: a row that shows that the model works.
        queue: the requests.
        health: hears how the thread gets on.
        observer: hears of passes.
        clock: seconds, never falling.
        new_scheduler: makes the scheduler.
        decoding: receives latents of rows that have taken their steps; None where rows are images.
    """

    def __init__(
        self,
        runner: Runner,
        probe: Row,
        queue: Queue,
        health: Health,
        observer: Observer,
        clock: Clock,
        new_scheduler: Callable[[Machine, Mapping[Group, int]], Scheduler],
        decoding: Decoding | None,
    ) -> None:
        self._runner = runner
        self._probe = probe
        self._queue = queue
        self._health = health
        self._stage = health.new_stage(PASSES)
        self._observer = observer
        self._clock = clock
        self._new_scheduler = new_scheduler
        self._decoding = decoding
        self._changed = queue.changed
        self._free_since = clock()  # the end of the last pass, or of idleness
        self.thread = threading.Thread(target=self._main, name="denoising", daemon=True)

    def _main(self) -> None:
        try:
            self._warm_up()
            while (batch := self._schedule()) is not None:
                ran = self._run(batch)
                self._advance(ran)
        except Exception as error:
            if self._queue.scheduler is None:
                why = str(error) if isinstance(error, ComputationFailed) else " ".join(repr(error).split())
                self._health.give_up(f"the model could not be warmed up: {why}")
            else:
                log.exception("the engine died")
                self._health.give_up("the engine has died")
        finally:
            self._stage.rest()
            self._health.end()

    def _warm_up(self) -> None:
        """Check that the model works, measure the costs of passes, and open the queue."""
        image = draw_probe(self._runner, self._probe, self._stage)
        decoding = None if self._decoding is None else self._decoding.warm_up(image)
        measured = measure_passes(self._runner, self._probe, self._stage, self._clock)
        self._costs, group = Costs(measured, widths=self._runner.widths), self._probe.group
        machine = Machine({group: self._costs}, {} if decoding is None else {group: decoding})
        self._scheduler = self._new_scheduler(machine, {group: STARTED_PER_ROW * self._runner.widths[-1]})
        self._stage.rest()
        self._queue.open(self._scheduler)

    def _beat(self) -> None:
        """Note that a call begins. The call may wait for the device's last pass, and no longer than one pass."""
        self._stage.beat(self._costs.seconds(self._runner.widths[-1]))

    # Schedule

    def _schedule(self) -> Batch | None:
        """Wait for work, and choose the next pass. None when the thread must stop."""
        self._wait()
        now = self._clock()
        with self._changed:
            if self._queue.stopping:
                return None
            self._beat()
            late = self._queue.take_out_late(now)
            abandoned, self._queue.abandoned = self._queue.abandoned, []
            batch = self._scheduler.next_batch(now)
        for slot in abandoned:
            self._runner.release(slot)
        self._queue.answer_late(late)
        self._observer.phase_done("schedule", self._clock() - now)
        return batch

    def _wait(self) -> None:
        """Wait for work, or for the order to stop."""
        if self._has_work:
            return
        began = self._clock()
        with self._changed:
            while not self._has_work:
                self._stage.rest()
                self._changed.wait()
        self._free_since = self._clock()
        self._observer.phase_done("idle", self._free_since - began)

    @property
    def _has_work(self) -> bool:
        return bool(self._scheduler.outstanding or self._queue.abandoned or self._queue.stopping)

    # Run

    def _run(self, batch: Batch) -> Sequence[_Placed]:
        """Run a pass, and return the forward rows that have run."""
        placed = self._place(batch)
        if not placed:
            return placed
        try:
            self._pass([forward for _, forward in placed])
        except Exception:
            log.exception("a forward pass of %d rows failed; each is tried alone", len(placed))
        else:
            return placed
        ran: list[_Placed] = []
        for _, rows in groupby(placed, lambda one: one.row):
            ran += self._run_alone(list(rows))
        return ran

    def _place(self, batch: Batch) -> list[_Placed]:
        """Give each starting row a slot. Leave out rows that have left or cannot start."""
        began = self._clock()
        placed = []
        for row, branch in batch:
            request = self._queue.of(row.job)
            if request is None:
                continue
            slot = row.slot
            if slot is None:
                self._beat()
                slot = self._start(request, row, began)
            if slot is not None:
                placed.append(_Placed(row, Forward(slot, branch, row.line)))
        self._observer.phase_done("admit", self._clock() - began)
        return placed

    def _start(self, request: Request, row: RowState, now: float) -> int | None:
        try:
            slot = self._runner.admit(request.rows[row.index])
        except Exception:
            log.exception("a row could not be admitted")
            self._stage.raised()
            self._queue.fail(request, ComputationFailed("this request could not be started"))
            return None
        return slot if self._queue.start(request, row, slot, now) else None

    def _run_alone(self, rows: list[_Placed]) -> list[_Placed]:
        """Run the forward rows of one row. If they raise again, its request fails."""
        request = self._queue.of(rows[0].row.job)
        if request is None:
            return []
        try:
            self._pass([forward for _, forward in rows])
        except Exception:
            log.exception("and alone")
            self._queue.fail(request, ComputationFailed("a forward pass of this request failed"))
            return []
        return rows

    def _pass(self, forwards: Sequence[Forward]) -> None:
        began = self._clock()
        self._stage.beat(self._costs.seconds(len(forwards)))
        worked = False
        try:
            self._runner.step(forwards)
            worked = True
        finally:
            now = self._clock()
            free_since, self._free_since = self._free_since, now
            with self._changed:  # so that a health check sees all of these changes or none
                self._beat()
                self._stage.pass_ended(worked)
                if worked:
                    self._costs.follow(len(forwards), now - free_since)
                self._health.reopen()
            self._observer.phase_done("pass", now - began)
            if not worked:
                self._observer.pass_failed()
        self._observer.pass_done(len(forwards), now - began)

    # Advance

    def _advance(self, ran: Sequence[_Placed]) -> None:
        """Tell watchers, deliver finished images, and pass latents on to decoding."""
        began = self._clock()
        ended, watched = self._account(ran, began)
        for request, ahead in watched.items():
            self._beat()
            self._show(request, ahead, began, ran)
        stepped: list[tuple[Request, RowState, Image]] = []
        for request, row, slot in ended:
            self._beat()
            reading = self._read(request, slot)
            self._runner.release(slot)
            if reading is None:
                continue
            if request.job.undecoded:
                stepped.append((request, row, reading.x))
            else:
                deliver(self._queue, request, row, reading.x, [self._stage])
        if stepped:
            assert self._decoding is not None
            self._decoding.put(stepped)
        self._observer.phase_done("advance", self._clock() - began)

    def _account(
        self, ran: Sequence[_Placed], now: float
    ) -> tuple[list[tuple[Request, RowState, int]], dict[Request, Outlook | None]]:
        """Count the pass. Returns the rows that have taken their last step, and the watched requests."""
        ended: list[tuple[Request, RowState, int]] = []
        watched: dict[Request, Outlook | None] = {}
        with self._changed:
            for row in self._scheduler.advance([(row, forward.branch) for row, forward in ran]):
                request = self._queue.of(row.job)
                assert request is not None
                assert row.slot is not None
                ended.append((request, row, row.slot))
                row.slot = None
                if row.job.undecoded:
                    request.stepped = now
            for job in dict.fromkeys(row.job for row, _ in ran):
                watching = self._queue.of(job)
                if watching is not None and watching.watcher is not None:
                    watched[watching] = new_outlook(watching, self._scheduler, self._queue.arrivals, now)
        return ended, watched

    def _show(self, request: Request, ahead: Outlook | None, now: float, ran: Sequence[_Placed]) -> None:
        """Tell a watcher about its rows in this pass."""
        tell_progress(self._queue, request, ahead, now)
        every = 0 if request.watcher is None else request.watcher.preview_every
        own = [one for one in ran if one.row.job is request.job] if every else []
        for row, forward in own:
            has_stepped = forward.branch == row.forwards[forward.line] - 1  # the last branch completes a step
            step = forward.line + 1
            if has_stepped and step % every == 0 and (reading := self._read(request, forward.slot)) is not None:
                tell(self._queue, request, partial(_preview, row.index, step, reading.x0))

    def _read(self, request: Request, slot: int) -> Reading | None:
        """Copy a row out of its slot. If the copy raises, the request fails."""
        try:
            return self._runner.read(slot)
        except Exception:
            log.exception("a row could not be read")
            self._stage.raised()
            self._queue.fail(request, ComputationFailed("what was computed for this request could not be read"))
            return None


def _preview(index: int, step: int, x0: Image, watcher: Watcher) -> None:
    watcher.preview(index, step, x0)
