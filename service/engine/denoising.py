"""Denoising: the thread that owns the runners. It schedules, runs a pass, advances the rows, and begins again."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

from model.rows import Forward, Group, Image, Reading, Runner
from service.engine.answer import Made
from service.engine.decode import Stepped
from service.engine.health import PASSES
from service.engine.jobs import Batch
from service.engine.progress import tell, tell_progress
from service.engine.requests import Request, Watcher
from service.engine.scheduler import Scheduler
from service.engine.waves import RowState
from service.engine.worker import Worker, Workplace
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

Phase = Literal["idle", "schedule", "admit", "pass", "advance"]


class Observer(Protocol):
    """Hears of passes."""

    def phase_done(self, phase: Phase, seconds: float) -> None: ...
    def pass_done(self, rows: int, seconds: float) -> None: ...
    def pass_failed(self) -> None: ...


class _Placed(NamedTuple):
    """A forward row of a pass, and its row."""

    row: RowState
    forward: Forward


class Denoising(Worker):
    """The thread.

    Args:
        runners: by group. Only this thread calls them.
        warm_up: warms up the engine on this thread, before its first work, and returns the scheduler.
        stepped: gets the rows that have taken their steps.
        at: what the engine's threads share.
    """

    def __init__(
        self,
        runners: Mapping[Group, Runner],
        warm_up: Callable[[], Scheduler],
        stepped: Stepped,
        at: Workplace[Observer],
    ) -> None:
        super().__init__("denoising", PASSES, at, self._open)
        self._runners = runners
        self._warm_up = warm_up
        self._stepped = stepped
        self._observer = at.observer
        self._changed = at.queue.changed
        self._free_since = at.clock()  # the end of the last pass, or of idleness

    def _open(self) -> None:
        """Warm up, and open the queue."""
        self._scheduler = self._warm_up()
        self.stage_health.rest()
        self._queue.open(self._scheduler)

    def _work(self) -> bool:
        batch = self._schedule()
        if batch is None:
            return False
        if batch:
            group = batch[0][0].job.group
            self._advance(group, self._run(group, batch))
        return True

    def _beat(self, group: Group) -> None:
        """Note that a call begins. The call may wait for the device's last pass, and no longer than one pass."""
        self.stage_health.beat(self._scheduler.machine.passes[group].seconds(self._runners[group].widths[-1]))

    # Schedule

    def _schedule(self) -> Batch | None:
        """Wait for work, and choose the next pass. None when the thread must stop."""
        self._wait()
        now = self._clock()
        with self._queue.lock:
            if self._queue.stopping:
                return None
            self.stage_health.beat(0.0)
            late = self._queue.take_out_late(now)
            abandoned, self._queue.abandoned = self._queue.abandoned, []
            batch = self._scheduler.next_batch(now)
        for group, slot in abandoned:
            self._beat(group)
            self._runners[group].release(slot)
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
                self.stage_health.rest()
                self._changed.wait()
        self._free_since = self._clock()
        self._observer.phase_done("idle", self._free_since - began)

    @property
    def _has_work(self) -> bool:
        return bool(self._scheduler.runnable or self._queue.abandoned or self._queue.stopping)

    # Run

    def _run(self, group: Group, batch: Batch) -> Sequence[_Placed]:
        """Run a pass, and return the forward rows that have run."""
        placed = self._place(group, batch)
        if not placed:
            return placed
        try:
            self._pass(group, [forward for _, forward in placed])
        except Exception:
            log.exception("a forward pass of %d rows failed; each is tried alone", len(placed))
        else:
            return placed
        ran: list[_Placed] = []
        for _, rows in groupby(placed, lambda one: one.row):
            ran += self._run_alone(group, list(rows))
        return ran

    def _place(self, group: Group, batch: Batch) -> list[_Placed]:
        """Give each starting row a slot. Leave out rows that have left or cannot start."""
        began = self._clock()
        placed = []
        for row, branch in batch:
            request = self._queue.of(row.job)
            if request is None:
                continue
            slot = row.slot
            if slot is None:
                self._beat(group)
                slot = self._start(request, row, began)
            if slot is not None:
                placed.append(_Placed(row, Forward(slot, branch, row.line)))
        self._observer.phase_done("admit", self._clock() - began)
        return placed

    def _start(self, request: Request, row: RowState, now: float) -> int | None:
        group = request.job.group
        try:
            slot = self._runners[group].admit(request.rows[row.index])
        except Exception:
            log.exception("a row could not be admitted")
            self.stage_health.raised(group)
            self._queue.fail(request, ComputationFailed("this request could not be started"))
            return None
        return slot if self._queue.start(request, row, slot, now) else None

    def _run_alone(self, group: Group, rows: list[_Placed]) -> list[_Placed]:
        """Run the forward rows of one row. If they raise again, its request fails."""
        request = self._queue.of(rows[0].row.job)
        if request is None:
            return []
        try:
            self._pass(group, [forward for _, forward in rows])
        except Exception:
            log.exception("and alone")
            self._queue.fail(request, ComputationFailed("a forward pass of this request failed"))
            return []
        return rows

    def _pass(self, group: Group, forwards: Sequence[Forward]) -> None:
        began, costs = self._clock(), self._scheduler.machine.passes[group]
        self.stage_health.beat(costs.seconds(len(forwards)))
        worked = False
        try:
            self._runners[group].step(forwards)
            worked = True
        finally:
            now = self._clock()
            free_since, self._free_since = self._free_since, now
            with self._queue.lock:  # so that a health check sees all of these changes or none
                self._beat(group)
                self.stage_health.call_ended(group, worked)
                if worked:
                    costs.follow(len(forwards), now - free_since)
                self._health.reopen()
            self._observer.phase_done("pass", now - began)
            if not worked:
                self._observer.pass_failed()
        self._observer.pass_done(len(forwards), now - began)

    # Advance

    def _advance(self, group: Group, ran: Sequence[_Placed]) -> None:
        """Tell watchers, and hand on the rows that have taken their last step."""
        began = self._clock()
        ended, watched = self._account(ran)
        for request in watched:
            self._beat(group)
            self._show(request, ran)
        made: list[Made] = []
        for request, row, slot in ended:
            self._beat(group)
            reading = self._read(request, slot)
            self._runners[group].release(slot)
            if reading is not None:
                made.append((request, row, reading.x))
        self._stepped.take(made)
        self._observer.phase_done("advance", self._clock() - began)

    def _account(self, ran: Sequence[_Placed]) -> tuple[list[tuple[Request, RowState, int]], list[Request]]:
        """Count the pass. Returns the rows that have taken their last step, and the watched requests."""
        ended: list[tuple[Request, RowState, int]] = []
        with self._queue.lock:
            for row in self._scheduler.advance([(row, forward.branch) for row, forward in ran]):
                request = self._queue.of(row.job)
                assert request is not None
                assert row.slot is not None
                ended.append((request, row, row.slot))
                row.slot = None
            present = [self._queue.of(job) for job in dict.fromkeys(row.job for row, _ in ran)]
            watched = [request for request in present if request is not None and request.watcher is not None]
            for request in watched:
                request.taken = request.job.rows[0].steps - request.job.steps
        return ended, watched

    def _show(self, request: Request, ran: Sequence[_Placed]) -> None:
        """Tell a watcher about its rows in this pass."""
        tell_progress(self._queue, request, self._clock)
        is_shown = request.watcher is not None and not request.job.stages.checked  # a preview may show what is refused
        every = request.watcher.preview_every if request.watcher is not None and is_shown else 0
        own = [one for one in ran if one.row.job is request.job] if every else []
        for row, forward in own:
            has_stepped = forward.branch == row.forwards[forward.line] - 1  # the last branch completes a step
            step = forward.line + 1
            if has_stepped and step % every == 0 and (reading := self._read(request, forward.slot)) is not None:
                tell(self._queue, request, partial(_preview, row.index, step, reading.x0))

    def _read(self, request: Request, slot: int) -> Reading | None:
        """Copy a row out of its slot. If the copy raises, the request fails."""
        group = request.job.group
        try:
            return self._runners[group].read(slot)
        except Exception:
            log.exception("a row could not be read")
            self.stage_health.raised(group)
            self._queue.fail(request, ComputationFailed("what was computed for this request could not be read"))
            return None


def _preview(index: int, step: int, x0: Image, watcher: Watcher) -> None:
    watcher.preview(index, step, x0)
