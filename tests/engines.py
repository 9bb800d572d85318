"""An engine on a fake runner and a fake clock, for tests.

The runner can stop inside a pass, so that a test decides what happens while it runs; nothing here sleeps.
"""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from model.rows import Forward, Image, Reading, Row
from model.samplers import Column, StepTable
from service.engine import Engine, Phase
from service.places import Places
from service.requests import Accepted, Finished, Watcher
from service.scheduler import Scheduler

PATIENCE = 60.0  # seconds; longer than anything takes, so that what hangs fails
LONG = 1e9  # seconds of the fake clock
ENDLESS = 10**6  # steps
PROBE_SEED = 0
PROBE = [(PROBE_SEED, 0)]  # its pass
WARM_UP_PASSES = 4  # of each width, besides the probe's

T = TypeVar("T")


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

    The image of a row is [seed, steps taken], as [1, 1, 2]; its estimate of x_0 is [seed, -steps taken].

    Attributes:
        widths: as of model.rows.Runner.
        clock: goes on by `seconds[width]` in each pass.
        passes: the forward rows of each pass that began, as (seed, branch).
        rows: the rows in flight, by slot.
        admitted: seeds of all rows ever admitted.
        refused, breaking, poisoned: seeds of rows whose admission raises, whose passes raise, whose image is NaN.
        faults: passes to come that raise, whatever is in them.
        complaints: what was called against the rules.
        during: is called inside each call, by the engine's thread, with its name: admit, pass, read or release.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.widths: Sequence[int] = list(seconds)
        self.clock = FakeClock()
        self.seconds = dict(seconds)
        self.passes: list[list[tuple[int, int]]] = []
        self.rows: dict[int, FakeRow] = {}
        self.admitted: list[int] = []
        self.refused: set[int] = set()
        self.breaking: set[int] = set()
        self.poisoned: set[int] = set()
        self.faults = 0
        self.complaints: list[str] = []
        self.during: Callable[[str], None] = lambda call: None
        self._threads: set[int] = set()
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
        self._called("admit")
        if row.seed in self.refused:
            raise RuntimeError("this row is refused")
        slot = next(slot for slot in itertools.count() if slot not in self.rows)
        self.rows[slot] = FakeRow(row)
        self.admitted.append(row.seed)
        return slot

    def step(self, forwards: Sequence[Forward]) -> None:
        if not 1 <= len(forwards) <= self.widths[-1] or len(set(forwards)) < len(forwards):
            self.complaints.append(f"a pass of {forwards}")
        seeds = [self.rows[forward.slot].row.seed for forward in forwards]
        with self._gate:
            self.passes.append([(seed, forward.branch) for seed, forward in zip(seeds, forwards, strict=True)])
            number = len(self.passes)
            self._gate.notify_all()
            if not self._gate.wait_for(lambda: not self._closed or number <= self._let_through, PATIENCE):
                self.complaints.append("a held pass was forgotten")
        self._called("pass")
        self.clock.now += self.seconds[next(width for width in self.widths if width >= len(forwards))]
        if self.faults:
            self.faults -= 1
            raise RuntimeError("a fault of the device")
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
        self._called("read")
        state = self.rows[slot]
        value = math.nan if state.row.seed in self.poisoned else state.row.seed
        return Reading(*(np.array([[[value, steps]]], dtype=np.float32) for steps in (state.steps, -state.steps)))

    def release(self, slot: int) -> None:
        self._called("release")
        if self.rows.pop(slot, None) is None:
            self.complaints.append(f"slot {slot} was released twice")

    def _called(self, call: str) -> None:
        self._threads.add(threading.get_ident())
        if len(self._threads) > 1:
            self.complaints.append("a second thread")
        try:
            self.during(call)
        except Exception as error:  # which would look like the runner's own
            self.complaints.append(repr(error))


class Recorder:
    """Remembers what the engine told."""

    def __init__(self) -> None:
        self.told_of_pass = threading.Condition()
        self.phases: list[tuple[Phase, float]] = []
        self.passes: list[tuple[int, float]] = []
        self.failed_passes = 0
        self.accepted = 0
        self.refused: list[str] = []
        self.started: list[float] = []
        self.finished: list[tuple[Finished, bool, float, float]] = []
        self.ended: list[str | int] = []  # a reason, or the number of images

    def phase_done(self, phase: Phase, seconds: float) -> None:
        self.phases.append((phase, seconds))

    def pass_done(self, rows: int, seconds: float) -> None:
        with self.told_of_pass:
            self.passes.append((rows, seconds))
            self.told_of_pass.notify_all()

    def pass_failed(self) -> None:
        with self.told_of_pass:
            self.failed_passes += 1
            self.told_of_pass.notify_all()

    def request_accepted(self) -> None:
        self.accepted += 1

    def request_refused(self, reason: str) -> None:
        self.refused.append(reason)

    def request_started(self, queue_s: float) -> None:
        self.started.append(queue_s)

    def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None:
        self.finished.append((finished, kept, eta_s, taken_s))
        self.ended.append(len(finished.images))

    def request_cancelled(self, reason: str) -> None:
        self.ended.append(reason)


class Diary:
    """A watcher that writes down what it is told, in its order. Implements service.requests.Watcher."""

    def __init__(self, preview_every: int = 0) -> None:
        self.preview_every = preview_every
        self.entries: list[tuple[Any, ...]] = []
        self.etas: list[float] = []
        self.future: Future[Finished] | None = None  # of the request that is watched
        self.was_done: list[bool] = []  # whether that was, at each image

    def progress(self, step: int, steps: int, eta_s: float) -> None:
        self.entries.append(("progress", step, steps))
        self.etas.append(eta_s)

    def preview(self, index: int, step: int, x0: Image) -> None:
        self.entries.append(("preview", index, step, x0.tolist()))

    def image(self, index: int, image: Image) -> None:
        self.entries.append(("image", index, image.tolist()))
        if self.future is not None:
            self.was_done.append(self.future.done())

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.entries if entry[0] == kind]


def a_row(seed: int, steps: int = 1, guided: bool = False) -> Row:
    table = StepTable(np.broadcast_to(np.int64(0), steps), np.broadcast_to(0.0, (steps, len(Column))))
    return Row(table, seed, label=1, guidance_scale=2.0 if guided else 1.0)


def an_image(seed: int, steps: int) -> list[list[list[float]]]:
    return [[[seed, steps]]]


def an_estimate(seed: int, steps: int) -> list[list[list[float]]]:
    return an_image(seed, -steps)


def images_of(future: Future[Finished]) -> list[list[list[list[float]]]]:
    return [image.tolist() for image in future.result(PATIENCE).images]


def error_of(future: Future[Finished]) -> BaseException | None:
    return future.exception(PATIENCE)


def status_of(engine: Engine) -> str:
    return engine.status


def elsewhere(act: Callable[[], T]) -> T:
    """Do this on another thread, as clients do, and wait for it."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(PATIENCE)


class Setting(NamedTuple):
    """A warm engine and all that it is made of."""

    engine: Engine
    runner: FakeRunner
    clock: FakeClock
    observer: Recorder
    places: Places

    def accept(
        self, *rows: Row, timeout_s: float = LONG, client: str = "alice", watcher: Watcher | None = None
    ) -> Accepted:
        return self.engine.submit(rows, timeout_s, client, watcher)

    def submit(self, *rows: Row, timeout_s: float = LONG, client: str = "alice") -> Future[Finished]:
        return self.accept(*rows, timeout_s=timeout_s, client=client).future

    def keep_busy(self) -> None:
        """Hold the engine in a pass of the probe, which no observer is told of: what is submitted now comes at once."""
        self.runner.hold()
        self.engine.probe()
        assert self.runner.next_pass() == PROBE

    def settle(self) -> None:
        """Wait until the passes that have begun are over."""
        told, began = self.observer, len(self.runner.passes)
        with told.told_of_pass:
            over = told.told_of_pass.wait_for(lambda: len(told.passes) + told.failed_passes >= began, PATIENCE)
        assert over, "a pass does not end"

    @property
    def line(self) -> Scheduler:
        assert self.engine.scheduler is not None
        return self.engine.scheduler

    @property
    def counters(self) -> tuple[int, int, int]:
        """Rows that run and that wait, and forward rows to come."""
        return self.line.running, self.line.waiting, self.line.outstanding

    @property
    def in_flight(self) -> list[int]:
        """The seeds of rows with a slot."""
        return sorted(state.row.seed for state in self.runner.rows.values())

    def is_empty(self) -> bool:
        """Whether nothing of any request is left."""
        return (
            not self.runner.rows and not self.places.taken and self.counters == (0, 0, 0) and self.engine.wait_idle(0)
        )


def a_setting(runner: FakeRunner, max_queue: int = 16, observer: Recorder | None = None) -> Setting:
    """An engine that has not started."""
    places, told = Places(max_queue), observer or Recorder()
    return Setting(Engine(runner, a_row(PROBE_SEED), places, told, runner.clock), runner, runner.clock, told, places)


@contextmanager
def started(s: Setting) -> Iterator[Setting]:
    """The engine's thread, which in the end is joined. What the warm-up ran is forgotten."""
    s.engine.start()
    try:
        assert s.engine.wait_loaded(PATIENCE)
        s.runner.passes.clear()
        s.runner.admitted.clear()
        yield s
    finally:
        s.runner.let_go()
        s.engine.close()
    assert s.runner.complaints == []


@contextmanager
def warm(*widths: int, seconds: float = 1.0, max_queue: int = 16) -> Iterator[Setting]:
    """A warm engine, whose passes take the same at all these widths."""
    with started(a_setting(FakeRunner(dict.fromkeys(widths, seconds)), max_queue)) as s:
        yield s
