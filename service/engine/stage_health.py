"""What is known of a thread that calls the model: whether it gets on, and whether what it computes is any good.

The thread says what it begins, how that ended, and when it has nothing to do. Others ask. Two questions are kept apart:

- Does the thread get on? A call is overdue after many times its expected seconds. Time alone is never a failure.
- Does the model work? A request that fails may be at fault itself, so its failure is only a suspicion. The engine's own
  probe tells: while the probe fails, the model is broken. A finite image ends both.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

# A call of milliseconds may have to wait for a busy machine: for swapped memory, or for other processes that hold the
# cores. Eight seconds are far beyond that. They are 16 times a pass of 0.5 s, and somebody looks every second: such a
# pass is found to hang within 20 times its time. For slower passes the factor holds.
_AT_LEAST = 8.0  # seconds
_TIMES_EXPECTED = 15.0

FIRST_TIME = 40.0  # seconds to expect of a first call, which may also compile; so it is overdue after ten minutes
_PROBES = 5  # that fail in a row, with nothing in between that works; the next would fail as well


class Overdue(NamedTuple):
    """A call that should have ended long ago: the seconds that it has taken, and those that it was given."""

    taken_s: float
    given_s: float


class StageHealth:
    """The health of one thread.

    Args:
        clock: seconds, never falling.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._began: float | None = None  # what the thread is at; None at rest
        self._given = 0.0  # seconds for that
        self._resting_since = clock()
        self._suspected = False
        self._broken = False
        self._raised = False  # the last pass
        self._probes_failed = 0  # in a row

    # What the thread tells.

    def beat(self, expected_s: float) -> None:
        """Something begins that should take so long. What was begun before has ended."""
        with self._lock:
            self._began = self._clock()
            self._given = max(_AT_LEAST, _TIMES_EXPECTED * expected_s)

    def rest(self) -> None:
        """There is nothing to do."""
        with self._lock:
            if self._began is not None:
                self._began = None
                self._resting_since = self._clock()

    def pass_ended(self, worked: bool) -> None:
        """A pass has ended, or a batch. What it computed may still be wrong."""
        with self._lock:
            if not worked:
                self._suspected = True
            elif self._raised:  # not every pass raises, so the probes whose passes did are no row
                self._probes_failed = 0
            self._raised = not worked

    def raised(self) -> None:
        """Another call of the model has raised an error."""
        with self._lock:
            self._suspected = True

    def image_ended(self, finite: bool) -> None:
        """An image is there, of whatever request."""
        with self._lock:
            self._suspected = not finite
            if finite:
                self._broken = False
                self._probes_failed = 0

    def probe_failed(self) -> None:
        """The engine's own probe has raised, or its image is not finite."""
        with self._lock:
            self._broken = True
            self._probes_failed += 1

    # What others ask.

    @property
    def overdue(self) -> Overdue | None:
        """What the thread is at, where that should have ended long ago."""
        with self._lock:
            taken = 0.0 if self._began is None else self._clock() - self._began
            return Overdue(taken, self._given) if self._began is not None and taken >= self._given else None

    @property
    def rest_s(self) -> float:
        """How long there has been nothing to do; 0 at work."""
        with self._lock:
            return self._clock() - self._resting_since if self._began is None else 0.0

    @property
    def suspected(self) -> bool:
        """Whether something failed last, and no finite image has come since."""
        with self._lock:
            return self._suspected

    @property
    def broken(self) -> bool:
        """Whether the engine's own probe has failed, and no finite image has come since."""
        with self._lock:
            return self._broken

    @property
    def hopeless(self) -> bool:
        """Whether the engine's own probe fails time after time, and nothing else works."""
        with self._lock:
            return self._probes_failed >= _PROBES
