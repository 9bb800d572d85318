"""The engine on a fake runner and a fake clock: jobs join, leave and fail between passes, and nothing of them stays.

The runner can stop inside a pass, so that a test decides what happens while it runs; nothing here sleeps.
"""

import concurrent.futures
import gc
import itertools
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.rows import Forward, Image, Reading, Row
from model.samplers import Column, StepTable
from service.engine import Engine, Finished
from service.errors import (
    ComputationFailed,
    DeadlinePassed,
    Draining,
    Failed,
    Loading,
    QueueFull,
    Unavailable,
)

PATIENCE = 60.0  # seconds; longer than anything takes, so that what hangs fails
LONG = 1e9  # seconds of the fake clock
ENDLESS = 10**12  # steps
PROBE_SEED = 0


class FakeClock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeRow:
    row: Row
    steps: int = 0
    forwards: int = 0  # of the present step


class FakeRunner:
    """Counts steps in the place of images, and complains of calls that a real runner could not serve.

    The image of a row is [seed, steps taken], as [1, 1, 2].

    Attributes:
        widths: as of model.rows.Runner.
        clock: goes on by `seconds[width]` in each pass.
        passes: the forward rows of each pass that began, as (seed, branch).
        rows: the rows in flight, by slot.
        admitted: seeds of all rows ever admitted.
        refused, breaking, poisoned: seeds of rows whose admission raises, whose passes raise, whose image is NaN.
        complaints: what was called against the rules.
        during_pass: is called inside each pass, by the engine's thread.
    """

    def __init__(self, *widths: int, clock: FakeClock | None = None) -> None:
        self.widths: Sequence[int] = widths or (4,)
        self.clock = clock or FakeClock()
        self.seconds = dict.fromkeys(self.widths, 1.0)
        self.passes: list[list[tuple[int, int]]] = []
        self.rows: dict[int, FakeRow] = {}
        self.admitted: list[int] = []
        self.refused: set[int] = set()
        self.breaking: set[int] = set()
        self.poisoned: set[int] = set()
        self.complaints: list[str] = []
        self._threads: set[int] = set()
        self.during_pass: Callable[[], None] = lambda: None
        self._gate = threading.Condition()
        self._closed = False  # the gate
        self._seen = 0  # passes that the test knows of
        self._let_through = 0  # passes that may end while the gate is closed

    # What a test calls.

    def hold(self) -> None:
        """From now on each pass stops inside, until next_pass or let_go."""
        with self._gate:
            self._closed = True
            self._seen = self._let_through = len(self.passes)

    def next_pass(self) -> list[tuple[int, int]]:
        """Let the pass that is held end, wait until the next is inside, and say what it runs."""
        with self._gate:
            self._let_through = self._seen
            self._gate.notify_all()
            assert self._gate.wait_for(lambda: len(self.passes) > self._seen, PATIENCE), "no pass has begun"
            self._seen += 1
            return self.passes[self._seen - 1]

    def let_go(self) -> None:
        """Hold no pass any longer."""
        with self._gate:
            self._closed = False
            self._gate.notify_all()

    # What the engine calls.

    def admit(self, row: Row) -> int:
        self._called()
        if row.seed in self.refused:
            raise RuntimeError("this row is refused")
        slot = next((slot for slot in range(self.widths[-1]) if slot not in self.rows), None)
        if slot is None:
            self.complaints.append(f"no slot for the row of seed {row.seed}")
            raise RuntimeError("no slot is free")
        self.rows[slot] = FakeRow(row)
        self.admitted.append(row.seed)
        return slot

    def step(self, forwards: Sequence[Forward]) -> None:
        self._called()
        if not 1 <= len(forwards) <= self.widths[-1] or len(set(forwards)) < len(forwards):
            self.complaints.append(f"a pass of {forwards}")
        seeds = [self.rows[forward.slot].row.seed for forward in forwards]
        with self._gate:
            self.passes.append([(seed, forward.branch) for seed, forward in zip(seeds, forwards, strict=True)])
            number = len(self.passes)
            self._gate.notify_all()
            if not self._gate.wait_for(lambda: not self._closed or number <= self._let_through, PATIENCE):
                self.complaints.append("a held pass was forgotten")
        self.during_pass()
        self.clock.now += self.seconds[next(width for width in self.widths if width >= len(forwards))]
        if self.breaking & set(seeds):
            raise RuntimeError("this pass breaks")
        for forward in forwards:
            state = self.rows[forward.slot]
            if forward.branch != state.forwards or state.steps == len(state.row.table):
                self.complaints.append(f"branch {forward.branch} of seed {state.row.seed} out of turn")
            state.forwards += 1
            if state.forwards == state.row.forwards_per_step:
                state.steps, state.forwards = state.steps + 1, 0

    def read(self, slot: int) -> Reading:
        self._called()
        state = self.rows[slot]
        value = math.nan if state.row.seed in self.poisoned else state.row.seed
        x = np.array([[[value, state.steps]]], dtype=np.float32)
        return Reading(x, x)

    def release(self, slot: int) -> None:
        self._called()
        if self.rows.pop(slot, None) is None:
            self.complaints.append(f"slot {slot} was released twice")

    def _called(self) -> None:
        self._threads.add(threading.get_ident())
        if len(self._threads) > 1:
            self.complaints.append("a second thread")


class Recorder:
    """Remembers what the engine told."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, float]] = []
        self.started: list[float] = []
        self.ended: list[str | int] = []  # a reason, or the number of images

    def pass_done(self, rows: int, seconds: float) -> None:
        self.passes.append((rows, seconds))

    def job_started(self, queue_s: float) -> None:
        self.started.append(queue_s)

    def job_finished(self, images: int) -> None:
        self.ended.append(images)

    def job_cancelled(self, reason: str) -> None:
        self.ended.append(reason)


def a_row(seed: int, steps: int = 1, guided: bool = False) -> Row:
    table = StepTable(np.broadcast_to(np.int64(0), steps), np.broadcast_to(0.0, (steps, len(Column))))
    return Row(table, seed, label=1, guidance_scale=2.0 if guided else 1.0)


def an_image(seed: int, steps: int) -> list[list[list[float]]]:
    return [[[seed, steps]]]


def values(images: Sequence[Image]) -> list[list[list[list[float]]]]:
    return [image.tolist() for image in images]


def an_engine(runner: FakeRunner, max_queue: int = 16, observer: Recorder | None = None) -> Engine:
    return Engine(runner, a_row(PROBE_SEED), max_queue, observer or Recorder(), runner.clock)


@contextmanager
def started(engine: Engine, runner: FakeRunner) -> Iterator[None]:
    """The engine's thread, which in the end is joined. What the warm-up ran is forgotten."""
    engine.start()
    try:
        engine.probe().result(PATIENCE)
        runner.passes.clear()
        runner.admitted.clear()
        yield
    finally:
        runner.let_go()
        engine.close()
    assert runner.complaints == []


class Setting(NamedTuple):
    """A warm engine and all that it is made of."""

    engine: Engine
    runner: FakeRunner
    clock: FakeClock
    observer: Recorder

    def keep_busy(self) -> None:
        """Hold the engine in a pass of the probe, which no observer is told of: what is submitted now comes at once."""
        self.runner.hold()
        self.engine.probe()
        assert self.runner.next_pass() == [(PROBE_SEED, 0)]

    def is_empty(self) -> bool:
        """Whether nothing of any job is left."""
        engine = self.engine
        counters = engine.rows_running, engine.rows_waiting, engine.outstanding_row_steps
        return not self.runner.rows and counters == (0, 0, 0) and engine.wait_idle(0)


@contextmanager
def warm(*widths: int, max_queue: int = 16) -> Iterator[Setting]:
    runner, observer = FakeRunner(*widths), Recorder()
    engine = an_engine(runner, max_queue, observer)
    with started(engine, runner):
        observer.passes.clear()
        yield Setting(engine, runner, runner.clock, observer)


def status_of(engine: Engine) -> str:
    return engine.status


def error_of(future: Future[Finished]) -> BaseException | None:
    return future.exception(PATIENCE)


# Results


def test_a_job_gives_its_images_in_the_order_of_its_rows() -> None:
    with warm(2) as s:
        rows = [a_row(1, steps=5), a_row(2, steps=1), a_row(3, steps=2, guided=True), a_row(4)]
        finished = s.engine.submit(rows, LONG).result(PATIENCE)
    assert values(finished.images) == [an_image(1, 5), an_image(2, 1), an_image(3, 2), an_image(4, 1)]
    assert s.observer.ended == [4]
    assert s.is_empty()


def test_a_finished_job_says_how_long_it_waited_and_ran() -> None:
    with warm(1) as s:
        s.runner.hold()
        first = s.engine.submit([a_row(1)], LONG)
        assert s.runner.next_pass() == [(1, 0)]
        s.clock.now += 0.5
        second = s.engine.submit([a_row(2, steps=3)], LONG)
        s.runner.let_go()
        assert first.result(PATIENCE)[1:] == (0.0, 1.5)
        assert second.result(PATIENCE)[1:] == (1.0, 3.0)
    assert s.observer.started == [0.0, 1.0]


def test_passes_are_told_to_the_observer() -> None:
    with warm(2, 4) as s:
        s.runner.seconds = {2: 0.25, 4: 0.5}
        s.engine.submit([a_row(1), a_row(2, steps=2), a_row(3)], LONG).result(PATIENCE)
    assert s.observer.passes == [(3, 0.5), (1, 0.25)]


# Joining and leaving


def test_jobs_that_arrive_during_a_pass_join_the_next() -> None:
    with warm(3) as s:
        s.runner.hold()
        jobs = [s.engine.submit([a_row(1, steps=3)], LONG)]
        assert s.runner.next_pass() == [(1, 0)]
        jobs.append(s.engine.submit([a_row(2, guided=True)], LONG))
        jobs.append(s.engine.submit([a_row(3)], LONG))
        assert s.runner.next_pass() == [(1, 0), (2, 0), (2, 1)]
        assert s.runner.next_pass() == [(1, 0), (3, 0)]
        s.runner.let_go()
        assert [values(job.result(PATIENCE).images) for job in jobs] == [
            [an_image(1, 3)],
            [an_image(2, 1)],
            [an_image(3, 1)],
        ]


def test_a_running_job_that_is_cancelled_leaves_before_the_next_pass() -> None:
    with warm(2) as s:
        s.runner.hold()
        leaver = s.engine.submit([a_row(1, steps=9), a_row(2, steps=9)], LONG)
        stayer = s.engine.submit([a_row(3, steps=2)], LONG)
        assert s.runner.next_pass() == [(1, 0), (2, 0)]
        assert leaver.cancel()
        assert s.runner.next_pass() == [(3, 0)]
        assert [state.row.seed for state in s.runner.rows.values()] == [3]
        assert (s.engine.rows_running, s.engine.rows_waiting, s.engine.outstanding_row_steps) == (1, 0, 2)
        s.runner.let_go()
        assert values(stayer.result(PATIENCE).images) == [an_image(3, 2)]
    assert s.observer.ended == ["disconnect", 1]
    assert s.is_empty()


def test_a_waiting_job_that_is_cancelled_never_gets_a_slot() -> None:
    with warm(1) as s:
        s.runner.hold()
        stayer = s.engine.submit([a_row(1, steps=2)], LONG)
        leaver = s.engine.submit([a_row(2)], LONG)
        assert s.runner.next_pass() == [(1, 0)]
        leaver.cancel()
        assert s.runner.next_pass() == [(1, 0)]
        assert s.engine.rows_waiting == 0
        s.runner.let_go()
        stayer.result(PATIENCE)
    assert s.runner.admitted == [1]
    assert s.observer.started == [0.0]
    assert s.observer.ended == ["disconnect", 1]


def test_a_job_that_is_cancelled_before_the_engine_saw_it_never_runs() -> None:
    with warm(1) as s:
        s.runner.hold()
        stayer = s.engine.submit([a_row(1)], LONG)
        assert s.runner.next_pass() == [(1, 0)]
        s.engine.submit([a_row(2)], LONG).cancel()
        s.runner.let_go()
        stayer.result(PATIENCE)
    assert s.runner.admitted == [1]
    assert Counter(s.observer.ended) == {1: 1, "disconnect": 1}
    assert s.is_empty()


@pytest.mark.parametrize("breaking", [set(), {1}], ids=["that works", "that fails"])
def test_a_job_that_is_cancelled_in_its_last_pass_counts_as_cancelled_and_not_as_finished(breaking: set[int]) -> None:
    with warm(1) as s:
        s.runner.breaking = breaking
        s.runner.hold()
        job = s.engine.submit([a_row(1)], LONG)
        s.runner.next_pass()
        job.cancel()
        s.runner.let_go()
        s.engine.submit([a_row(2)], LONG).result(PATIENCE)
    assert s.observer.ended == ["disconnect", 1]
    assert s.is_empty()


def test_a_job_that_is_done_cannot_be_cancelled() -> None:
    with warm(1) as s:
        job = s.engine.submit([a_row(1)], LONG)
        job.result(PATIENCE)
        assert not job.cancel()
    assert s.observer.ended == [1]


# Deadlines


def test_jobs_whose_deadline_passes_fail_whether_they_run_or_wait() -> None:
    with warm(1) as s:
        s.runner.hold()
        running = s.engine.submit([a_row(1, steps=9)], 5)
        waiting = s.engine.submit([a_row(2)], 5.5)
        patient = s.engine.submit([a_row(3)], 500)
        assert s.runner.next_pass() == [(1, 0)]
        s.clock.now += 7
        assert s.runner.next_pass() == [(3, 0)]
        assert [state.row.seed for state in s.runner.rows.values()] == [3]
        for job, message in ((running, "not done within 5 s"), (waiting, "not done within 5.5 s")):
            error = error_of(job)
            assert isinstance(error, DeadlinePassed)
            assert str(error) == message
        s.runner.let_go()
        patient.result(PATIENCE)
    assert s.observer.ended == ["timeout", "timeout", 1]
    assert s.is_empty()


def test_a_job_that_ends_just_in_time_is_done() -> None:
    with warm(1) as s:
        assert error_of(s.engine.submit([a_row(1, steps=3)], 3)) is None
        assert isinstance(error_of(s.engine.submit([a_row(2, steps=4)], 3)), DeadlinePassed)
    assert s.observer.ended == [1, "timeout"]


def test_a_job_that_was_cancelled_has_no_deadline() -> None:
    with warm(1) as s:
        s.runner.hold()
        stayer = s.engine.submit([a_row(1, steps=3)], LONG)
        s.runner.next_pass()
        leaver = s.engine.submit([a_row(2)], 5)
        s.runner.next_pass()
        leaver.cancel()
        s.clock.now += 10
        s.runner.let_go()
        stayer.result(PATIENCE)
    assert s.observer.ended == ["disconnect", 1]


def test_nothing_holds_on_to_jobs_that_are_done() -> None:
    """Their deadlines may be far away; kept until then, images would fill the memory."""
    with warm(1) as s:
        jobs = []
        for seed in range(1, 6):
            job = s.engine.submit([a_row(seed)], LONG)
            job.result(PATIENCE)
            jobs.append(weakref.ref(job))
            del job
        s.engine.submit([a_row(9)], LONG).result(PATIENCE)  # the engine's own variables now tell of this one
        gc.collect()
        assert [job() for job in jobs] == [None] * 5


# What is refused at the door


def test_a_full_queue_refuses_and_says_when_the_backlog_will_be_done() -> None:
    with warm(2, max_queue=2) as s:
        s.runner.seconds = {2: 3.0}
        s.engine.submit([a_row(9), a_row(9)], LONG).result(PATIENCE)
        s.runner.hold()
        jobs = [s.engine.submit([a_row(1, steps=4), a_row(2, steps=2)], LONG)]
        s.runner.next_pass()
        jobs.append(s.engine.submit([a_row(3, steps=4, guided=True)], LONG))
        s.runner.next_pass()  # 3 + 1 and 8 forward rows are left, two in a pass
        with pytest.raises(QueueFull, match="all 2 places of the queue are taken") as refusal:
            s.engine.submit([a_row(4)], LONG)
        assert refusal.value.retry_after == s.engine.backlog_s
        seconds_per_pass = s.engine.seconds_per_step[2]
        assert s.engine.backlog_s == pytest.approx(6 * seconds_per_pass)
        s.runner.let_go()
        for job in jobs:
            job.result(PATIENCE)
        assert s.engine.backlog_s == 0
        s.engine.submit([a_row(5)], LONG).result(PATIENCE)  # places are free again


@pytest.mark.parametrize("ending", ["cancelled", "failed", "late"])
def test_a_place_in_the_queue_is_free_again_however_its_job_ends(ending: str) -> None:
    with warm(1, max_queue=1) as s:
        s.runner.hold()
        job = s.engine.submit([a_row(1, ENDLESS)], 5)
        s.runner.next_pass()
        match ending:
            case "cancelled":
                job.cancel()
            case "failed":
                s.runner.breaking = {1}
            case "late":
                s.clock.now += 5
        s.runner.let_go()
        assert s.engine.wait_idle(PATIENCE)
        s.engine.submit([a_row(2)], LONG).result(PATIENCE)


def test_the_probe_needs_no_place_in_the_queue_and_takes_none() -> None:
    with warm(1, max_queue=1) as s:
        s.runner.hold()
        probes = [s.engine.probe()]
        s.runner.next_pass()
        job = s.engine.submit([a_row(1)], LONG)
        probes.append(s.engine.probe())
        s.runner.let_go()
        job.result(PATIENCE)
        for probe in probes:
            probe.result(PATIENCE)
    assert s.observer.ended == [1]
    assert s.observer.started == [1.0]


def test_a_cancelled_probe_leaves_without_being_counted() -> None:
    with warm(1) as s:
        s.runner.hold()
        job = s.engine.submit([a_row(1, steps=2)], LONG)
        s.runner.next_pass()
        s.engine.probe().cancel()
        s.runner.let_go()
        job.result(PATIENCE)
    assert s.observer.ended == [1]
    assert s.is_empty()


# The engine's state


def test_an_engine_is_loading_until_it_is_warm_and_then_ready() -> None:
    runner = FakeRunner(2)
    engine = an_engine(runner)
    assert status_of(engine) == "loading"
    with pytest.raises(Loading):
        engine.submit([a_row(1)], LONG)
    runner.hold()
    engine.start()
    assert runner.next_pass() == [(PROBE_SEED, 0)]
    assert status_of(engine) == "loading"
    with pytest.raises(Loading):
        engine.submit([a_row(1)], LONG)
    probe = engine.probe()  # waits for the warm-up
    runner.let_go()
    probe.result(PATIENCE)
    assert status_of(engine) == "ready"
    assert not engine.in_doubt
    engine.submit([a_row(1)], LONG).result(PATIENCE)
    engine.close()
    assert runner.complaints == []


def test_a_draining_engine_refuses_new_jobs_and_finishes_the_others() -> None:
    with warm(1) as s:
        s.runner.hold()
        running = s.engine.submit([a_row(1, steps=2)], LONG)
        waiting = s.engine.submit([a_row(2)], LONG)
        s.runner.next_pass()
        s.engine.drain()
        assert status_of(s.engine) == "draining"
        with pytest.raises(Draining):
            s.engine.submit([a_row(3)], LONG)
        assert not s.engine.wait_idle(0)
        s.runner.let_go()
        assert values(running.result(PATIENCE).images) == [an_image(1, 2)]
        assert values(waiting.result(PATIENCE).images) == [an_image(2, 1)]
        assert s.engine.wait_idle(PATIENCE)


def test_wait_idle_ends_when_the_last_job_has_left() -> None:
    with warm(1) as s:
        assert s.engine.wait_idle(0)
        s.runner.hold()
        job = s.engine.submit([a_row(1, ENDLESS)], LONG)
        s.runner.next_pass()
        assert not s.engine.wait_idle(0)
        idle = threading.Event()
        threading.Thread(
            target=lambda: idle.set() if s.engine.wait_idle(threading.TIMEOUT_MAX) else None, daemon=True
        ).start()
        s.runner.next_pass()
        s.runner.next_pass()
        assert not idle.is_set()
        job.cancel()
        s.runner.let_go()
        assert idle.wait(PATIENCE)


def test_closing_fails_what_is_not_done_and_joins_the_thread() -> None:
    runner, observer = FakeRunner(1), Recorder()
    engine = an_engine(runner, observer=observer)
    with started(engine, runner):
        runner.hold()
        jobs = [engine.submit([a_row(1, ENDLESS)], LONG), engine.submit([a_row(2)], LONG)]
        runner.next_pass()
        jobs.append(engine.submit([a_row(3)], LONG))
        told: list[int] = []
        for job in jobs:  # by the engine's thread, and not at once
            job.add_done_callback(lambda _: told.append(sum(range(10**6))))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            closing = pool.submit(engine.close)
            runner.let_go()
            closing.result(PATIENCE)
        assert len(told) == 3
        assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
        assert all(isinstance(error_of(job), Draining) for job in jobs)
        assert engine.wait_idle(0)
        assert status_of(engine) == "draining"
        with pytest.raises(Draining):
            engine.submit([a_row(4)], LONG)
        with pytest.raises(Unavailable):
            engine.probe()
        engine.close()  # a second time does nothing


def test_an_engine_that_never_started_can_be_closed() -> None:
    engine = an_engine(FakeRunner())
    engine.close()
    assert status_of(engine) == "draining"


def test_an_idle_engine_comes_into_doubt_after_ten_seconds_and_a_probe_clears_that() -> None:
    with warm(1) as s:
        s.clock.now += 10
        assert not s.engine.in_doubt
        s.clock.now += 0.5
        assert s.engine.in_doubt
        assert status_of(s.engine) == "ready"
        s.engine.probe().result(PATIENCE)
        assert not s.engine.in_doubt


# Failures


def test_a_pass_that_raises_fails_the_jobs_in_it_and_the_others_go_on() -> None:
    with warm(2) as s:
        s.keep_busy()
        s.runner.breaking = {2}
        innocent = s.engine.submit([a_row(1, steps=2)], LONG)
        culprit = s.engine.submit([a_row(2), a_row(3)], LONG)
        bystander = s.engine.submit([a_row(4, steps=2)], LONG)
        assert s.runner.next_pass() == [(1, 0), (2, 0)]
        assert status_of(s.engine) == "ready"
        assert s.runner.next_pass() == [(4, 0)]  # row 3 left with its job
        for job in (innocent, culprit):
            error = error_of(job)
            assert isinstance(error, ComputationFailed)
            assert "breaks" not in str(error)  # what was raised is for the log
        assert status_of(s.engine) == "failed"
        assert s.engine.in_doubt
        s.runner.let_go()
        assert values(bystander.result(PATIENCE).images) == [an_image(4, 2)]
        assert status_of(s.engine) == "ready"
        assert not s.engine.in_doubt
    assert s.observer.ended == [1]
    assert s.is_empty()


def test_a_failed_engine_takes_jobs_and_recovers_with_a_pass_that_works() -> None:
    with warm(1) as s:
        s.runner.breaking = {PROBE_SEED, 1}
        assert isinstance(error_of(s.engine.submit([a_row(1)], LONG)), ComputationFailed)
        assert isinstance(error_of(s.engine.probe()), ComputationFailed)
        assert status_of(s.engine) == "failed"
        s.runner.breaking = set()
        s.engine.probe().result(PATIENCE)
        assert status_of(s.engine) == "ready"
        s.engine.submit([a_row(1)], LONG).result(PATIENCE)


def test_an_image_that_is_not_finite_fails_its_job_alone() -> None:
    with warm(3) as s:
        s.keep_busy()
        s.runner.poisoned = {2}
        good = s.engine.submit([a_row(1, steps=2)], LONG)
        bad = s.engine.submit([a_row(2), a_row(3, steps=9)], LONG)
        assert s.runner.next_pass() == [(1, 0), (2, 0), (3, 0)]
        assert s.runner.next_pass() == [(1, 0)]
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match="not finite"):
            bad.result(PATIENCE)
        assert values(good.result(PATIENCE).images) == [an_image(1, 2)]
        assert status_of(s.engine) == "ready"
    assert s.observer.ended == [1]
    assert s.is_empty()


def test_all_rows_of_a_job_may_be_done_in_the_pass_in_which_one_is_not_finite() -> None:
    with warm(3) as s:
        s.runner.poisoned = {1}
        with pytest.raises(ComputationFailed):
            s.engine.submit([a_row(1), a_row(2), a_row(3)], LONG).result(PATIENCE)
    assert s.is_empty()


def test_a_row_that_cannot_be_admitted_fails_its_job_alone() -> None:
    with warm(4) as s:
        s.keep_busy()
        s.runner.refused = {2}
        first = s.engine.submit([a_row(1, steps=2)], LONG)
        bad = s.engine.submit([a_row(5), a_row(2, guided=True)], LONG)
        last = s.engine.submit([a_row(3)], LONG)
        assert s.runner.next_pass() == [(1, 0)]
        assert s.runner.next_pass() == [(1, 0), (3, 0)]
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match="could not be started") as error:
            bad.result(PATIENCE)
        assert "refused" not in str(error.value)
        assert values(first.result(PATIENCE).images) == [an_image(1, 2)]
        assert values(last.result(PATIENCE).images) == [an_image(3, 1)]
        assert status_of(s.engine) == "ready"
    assert s.observer.ended == [1, 1]
    assert s.is_empty()


def test_a_job_whose_first_row_cannot_be_admitted_has_never_started() -> None:
    with warm(4) as s:
        s.runner.refused = {1}
        assert isinstance(error_of(s.engine.submit([a_row(1), a_row(2)], LONG)), ComputationFailed)
    assert s.observer.started == []
    assert s.runner.admitted == []


@pytest.mark.parametrize("fault", ["refused", "breaking", "poisoned"])
def test_an_engine_whose_warm_up_fails_is_failed_and_refuses_jobs(fault: str) -> None:
    runner = FakeRunner(2)
    setattr(runner, fault, {PROBE_SEED})
    engine = an_engine(runner)
    probe = engine.probe()
    engine.start()
    assert isinstance(error_of(probe), Failed)
    assert status_of(engine) == "failed"
    with pytest.raises(Failed, match="the engine has stopped"):
        engine.submit([a_row(1)], LONG)
    with pytest.raises(Failed):
        engine.probe()
    engine.close()


def test_jobs_of_an_engine_that_dies_fail() -> None:
    class Bomb(Recorder):
        def job_finished(self, images: int) -> None:
            raise RuntimeError("the observer is broken")

    runner = FakeRunner(2)
    engine = an_engine(runner, observer=Bomb())
    with started(engine, runner):
        runner.hold()
        last = engine.submit([a_row(1)], LONG)
        runner.next_pass()
        others = [engine.submit([a_row(2)], LONG), engine.submit([a_row(3, ENDLESS)], LONG)]
        runner.let_go()
        assert error_of(last) is None
        assert all(isinstance(error_of(job), Failed) for job in others)
        assert status_of(engine) == "failed"
        assert engine.wait_idle(0)
        with pytest.raises(Failed):
            engine.submit([a_row(4)], LONG)


# Measured time


def test_seconds_of_a_pass_are_measured_by_the_width_that_it_really_ran_at() -> None:
    with warm(1, 2, 4) as s:
        assert s.engine.widths == (1, 2, 4)
        assert s.engine.seconds_per_step == {1: 1.0}  # the warm-up
        s.runner.seconds = {1: 1.0, 2: 1.5, 4: 2.0}
        s.engine.submit([a_row(1), a_row(2)], LONG).result(PATIENCE)
        s.engine.submit([a_row(1), a_row(2), a_row(3)], LONG).result(PATIENCE)
        assert s.engine.seconds_per_step == {1: 1.0, 2: 1.5, 4: 2.0}
        s.runner.seconds = {1: 1.0, 2: 1.5, 4: 3.0}
        s.engine.submit([a_row(1, guided=True), a_row(2, guided=True)], LONG).result(PATIENCE)
        smoothed = s.engine.seconds_per_step
        assert 2.0 < smoothed[4] < 3.0
        for _ in range(200):
            s.engine.submit([a_row(1, guided=True), a_row(2)], LONG).result(PATIENCE)
        assert s.engine.seconds_per_step == {**smoothed, 4: pytest.approx(3.0)}


def test_slow_first_passes_of_the_warm_up_are_forgotten() -> None:
    runner = FakeRunner(2)
    engine = an_engine(runner)
    runner.hold()
    engine.start()
    runner.seconds = {2: 50.0}
    runner.next_pass()
    runner.next_pass()
    runner.seconds = {2: 1.0}
    runner.let_go()
    engine.probe().result(PATIENCE)
    assert engine.seconds_per_step == {2: pytest.approx(1.0)}
    engine.close()


def test_the_backlog_is_what_is_left_at_the_widest_pass() -> None:
    with warm(4) as s:
        assert s.engine.backlog_s == 0
        s.runner.hold()
        s.engine.submit([a_row(1, steps=3), a_row(2, steps=3, guided=True)], LONG)
        s.runner.next_pass()
        assert s.engine.outstanding_row_steps == 9
        assert s.engine.backlog_s == pytest.approx(9 / 4)
        s.runner.next_pass()
        assert s.engine.outstanding_row_steps == 6
        s.runner.let_go()


# All of it together


@dataclass(frozen=True)
class Submit:
    rows: tuple[tuple[int, bool, str], ...]  # steps, guided, fate
    timeout_s: float


@dataclass(frozen=True)
class Cancel:
    pick: int  # place in the list of all jobs, modulo its length


fates = st.sampled_from(("good", "good", "good", "good", "refused", "breaking", "poisoned"))
submissions = st.builds(
    Submit,
    st.lists(st.tuples(st.integers(1, 4), st.booleans(), fates), min_size=1, max_size=4).map(tuple),
    st.sampled_from((LONG, LONG, 1.0, 3.0, 6.0)),
)
scripts = st.lists(st.lists(st.one_of(submissions, st.integers(0, 99).map(Cancel)), max_size=4), max_size=12)


@settings(max_examples=100)
@given(st.integers(1, 5), scripts)
def test_nothing_is_left_behind_by_any_mix_of_jobs(max_batch: int, script: list[list[Submit | Cancel]]) -> None:
    """Whatever jobs arrive, leave, fail and come too late, during whatever pass."""
    with warm(max_batch, max_queue=5) as s:
        jobs: dict[Future[Finished], tuple[Submit, list[int]]] = {}
        seeds = itertools.count(1)
        fated = {
            "good": set(),
            "refused": s.runner.refused,
            "breaking": s.runner.breaking,
            "poisoned": s.runner.poisoned,
        }
        to_come = list(script)

        def act() -> None:
            for action in to_come.pop(0) if to_come else []:
                if isinstance(action, Cancel):
                    if jobs:
                        list(jobs)[action.pick % len(jobs)].cancel()
                    continue
                mine = [next(seeds) for _ in action.rows]
                rows = []
                for seed, (steps, guided, fate) in zip(mine, action.rows, strict=True):
                    fated[fate].add(seed)
                    rows.append(a_row(seed, steps, guided))
                with suppress(QueueFull):
                    jobs[s.engine.submit(rows, action.timeout_s)] = action, mine

        s.runner.during_pass = act
        while to_come:  # each round is at least one pass, and so one entry of the script
            s.engine.probe().exception(PATIENCE)
        for job in jobs:
            with suppress(CancelledError):
                job.exception(PATIENCE)
        s.engine.probe().result(PATIENCE)
        assert status_of(s.engine) == "ready"

    assert s.is_empty()
    ends: Counter[str] = Counter()
    for job, (submitted, mine) in jobs.items():
        fates_of_rows = {fate for _, _, fate in submitted.rows}
        if job.cancelled():
            ends["disconnect"] += 1
        elif (error := job.exception(0)) is None:
            ends["finished"] += 1
            assert fates_of_rows == {"good"}
            steps = [steps for steps, _, _ in submitted.rows]
            assert values(job.result().images) == [an_image(*row) for row in zip(mine, steps, strict=True)]
        elif isinstance(error, DeadlinePassed):
            ends["timeout"] += 1
            assert submitted.timeout_s < LONG
        else:
            assert isinstance(error, ComputationFailed)
            assert fates_of_rows != {"good"} or s.runner.breaking
    told = Counter(end if isinstance(end, str) else "finished" for end in s.observer.ended)
    assert told == ends


def test_what_a_finished_job_held_goes_without_the_garbage_collector() -> None:
    """Circles of jobs, rows and Futures, with images in them, once waited for it: 130 bytes of memory a digit."""
    gc.collect()
    gc.disable()
    try:
        with warm(4) as s:
            future = s.engine.submit([a_row(1), a_row(2)], 100)
            images = [weakref.ref(image) for image in future.result(PATIENCE).images]
            assert s.engine.wait_idle(PATIENCE)
            waiting = weakref.ref(future)
            del future
            s.engine.submit([a_row(3)], 100).result(PATIENCE)  # the engine's thread has let go of the first
            assert waiting() is None
            assert [image() for image in images] == [None, None]
    finally:
        gc.enable()
