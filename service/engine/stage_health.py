"""The health of one stage, which is one thread: whether the thread gets on, and whether its results are good.

The thread reports each call, its end, and the absence of work. Other threads ask. Two questions are separate:

- Does the thread get on? A call is overdue after many times its expected seconds. Time alone is never a failure.
- Does the model work? A request may cause its own failure, so the failure is only a suspicion. The engine's own probe
  decides: while the probe fails, the model is broken. A finite result ends both states. Each group has its own answer,
  because each group has its own passes.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from model.rows import Group

# Limits are counted in calls of the stage. A call of milliseconds may wait for a busy machine, for swapped memory or
# for other processes on the cores, and so counts as SHORTEST_CALL. With a check every second, the engine finds that a
# call of half a second hangs within 20 times its time. For slower calls, the factor holds.
SHORTEST_CALL = 0.5  # seconds
_OVERDUE_AFTER = 16.0  # times the expected seconds of a call

FIRST_TIME = 37.5  # expected seconds of a first call, which may compile; the call is overdue after ten minutes
_PROBES = 5  # failed probes in a row, without a success between them; the next would fail as well


class Overdue(NamedTuple):
    """An overdue call: the seconds that it has taken, and the seconds that it was given."""

    taken_s: float
    given_s: float


@dataclass(slots=True)
class _Results:
    """What is known of one group's results.

    Attributes:
        suspected: a call has failed, without a finite result since.
        broken: the engine's own probe has failed, without a finite result since.
        raised: the last call raised.
        probes_failed: in a row.
    """

    suspected: bool = False
    broken: bool = False
    raised: bool = False
    probes_failed: int = 0


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
        self._results: dict[Group, _Results] = {}

    # Reports of the thread.

    def beat(self, expected_s: float) -> None:
        """A call begins, and should take `expected_s`. The call before has ended."""
        with self._lock:
            self._began = self._clock()
            self._given = _OVERDUE_AFTER * max(SHORTEST_CALL, expected_s)

    def rest(self) -> None:
        """The thread has no work."""
        with self._lock:
            if self._began is not None:
                self._began = None
                self._resting_since = self._clock()

    def call_ended(self, group: Group, worked: bool) -> None:
        """A pass or a batch has ended. Its results may still be wrong."""
        with self._lock:
            its = self._of(group)
            if not worked:
                its.suspected = True
            elif its.raised:  # a call works again, so failed probes no longer count as a row
                its.probes_failed = 0
            its.raised = not worked

    def raised(self, group: Group) -> None:
        """Something beside a pass or a batch, such as reading a row, has raised an error."""
        with self._lock:
            self._of(group).suspected = True

    def made(self, group: Group, finite: bool) -> None:
        """An image of any request is finished, or the context of its text."""
        with self._lock:
            its = self._of(group)
            its.suspected = not finite
            if finite:
                its.broken = False
                its.probes_failed = 0

    def probe_failed(self, group: Group) -> None:
        """The engine's own probe has raised, or its image is not finite."""
        with self._lock:
            self._of(group).broken = True
            self._of(group).probes_failed += 1

    def _of(self, group: Group) -> _Results:
        return self._results.setdefault(group, _Results())

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
    def suspected(self) -> set[Group]:
        """The groups of which a call has failed, without a finite result since."""
        with self._lock:
            return {group for group, its in self._results.items() if its.suspected}

    @property
    def broken(self) -> bool:
        """Whether the engine's own probe has failed in a group, without a finite result of that group since."""
        with self._lock:
            return any(its.broken for its in self._results.values())

    @property
    def hopeless(self) -> bool:
        """Whether the engine's own probe fails again and again in a group, and nothing else of that group works."""
        with self._lock:
            return any(its.probes_failed >= _PROBES for its in self._results.values())
