"""The health of one thread that calls the model: whether the thread gets on, and whether its results are good.

The thread reports each call, its end, and the absence of work. Other threads ask. Two questions are separate:

- Does the thread get on? A call is overdue after many times its expected seconds. Time alone is never a failure.
- Does the model work? A request may cause its own failure, so the failure is only a suspicion. The engine's own probe
  decides: while the probe fails, the model is broken. A finite image ends both states.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

# A call of milliseconds may wait for a busy machine: for swapped memory, or for other processes on the cores. Eight
# seconds are far more. They are 16 times a pass of 0.5 s. With a check every second, the engine finds such a pass to
# hang within 20 times its time. For slower passes, the factor holds.
_AT_LEAST = 8.0  # seconds
_TIMES_EXPECTED = 15.0

FIRST_TIME = 40.0  # expected seconds of a first call, which may compile; the call is overdue after ten minutes
_PROBES = 5  # failed probes in a row, without a success between them; the next would fail as well


class Overdue(NamedTuple):
    """An overdue call: the seconds that it has taken, and the seconds that it was given."""

    taken_s: float
    given_s: float


class StageHealth:
    """The health of one thread.

    Args:
        clock: seconds, never falling.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards the state below
        self._began: float | None = None  # when the present call began; None at rest
        self._given = 0.0  # seconds for the present call
        self._resting_since = clock()
        self._suspected = False
        self._broken = False
        self._raised = False  # whether the last pass raised
        self._probes_failed = 0  # in a row

    # Reports of the thread.

    def beat(self, expected_s: float) -> None:
        """A call begins, and should take `expected_s`. The call before has ended."""
        with self._lock:
            self._began = self._clock()
            self._given = max(_AT_LEAST, _TIMES_EXPECTED * expected_s)

    def rest(self) -> None:
        """The thread has no work."""
        with self._lock:
            if self._began is not None:
                self._began = None
                self._resting_since = self._clock()

    def pass_ended(self, worked: bool) -> None:
        """A pass or a decoding batch has ended. Its results may still be wrong."""
        with self._lock:
            if not worked:
                self._suspected = True
            elif self._raised:  # a pass works again, so failed probes no longer count as a row
                self._probes_failed = 0
            self._raised = not worked

    def raised(self) -> None:
        """A call other than a pass has raised an error."""
        with self._lock:
            self._suspected = True

    def image_ended(self, finite: bool) -> None:
        """An image of any request is done."""
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

    # Questions of other threads.

    @property
    def overdue(self) -> Overdue | None:
        """The present call, if it is overdue."""
        with self._lock:
            taken = 0.0 if self._began is None else self._clock() - self._began
            return Overdue(taken, self._given) if self._began is not None and taken >= self._given else None

    @property
    def rest_s(self) -> float:
        """How long the thread has had no work; 0 during a call."""
        with self._lock:
            return self._clock() - self._resting_since if self._began is None else 0.0

    @property
    def suspected(self) -> bool:
        """Whether a call has failed, without a finite image since."""
        with self._lock:
            return self._suspected

    @property
    def broken(self) -> bool:
        """Whether the engine's own probe has failed, without a finite image since."""
        with self._lock:
            return self._broken

    @property
    def hopeless(self) -> bool:
        """Whether the engine's own probe fails again and again, and nothing else works."""
        with self._lock:
            return self._probes_failed >= _PROBES
