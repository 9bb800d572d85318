"""Whether the model works: what the last passes said, and whether the present one ever ends."""

import threading
from collections.abc import Callable

_IN_DOUBT_AFTER = 10.0  # seconds without a pass that worked
_FAILING_AFTER = 3  # passes in a row that raised
_STUCK_AFTER = 30.0  # seconds in one pass, and no less than
_TIMES_EXPECTED = 20.0  # times what it should take


class Pulse:
    """Is told by the engine's thread, and asked by others.

    Args:
        clock: seconds, never falling.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._began: float | None = None  # the present pass
        self._overdue = 0.0  # the time from which on it is stuck
        self._raised = 0  # passes in a row
        self._doubt = False  # what was computed last failed, and no good image has come since
        self._worked = clock()  # the last time that a pass did

    def pass_begins(self, expected_s: float) -> None:
        with self._lock:
            self._began = self._clock()
            self._overdue = self._began + max(_STUCK_AFTER, _TIMES_EXPECTED * expected_s)

    def pass_ended(self, worked: bool) -> None:
        with self._lock:
            self._began = None
            self._raised = 0 if worked else self._raised + 1
            if worked:
                self._worked = self._clock()
            else:
                self._doubt = True

    def image_ended(self, finite: bool) -> None:
        with self._lock:
            self._doubt = not finite

    @property
    def stuck_s(self) -> float:
        """How long a pass has run that should have ended long ago; 0 where there is none."""
        with self._lock:
            now = self._clock()
            return 0.0 if self._began is None or now < self._overdue else now - self._began

    @property
    def failing(self) -> bool:
        """Whether passes raise, one after the other."""
        with self._lock:
            return self._raised >= _FAILING_AFTER

    @property
    def failed(self) -> bool:
        """Whether what was computed last failed, and no good image has come since."""
        with self._lock:
            return self._doubt

    @property
    def in_doubt(self) -> bool:
        """Whether only a probe can tell: the last pass or image failed, or the last one is long ago."""
        with self._lock:
            return self._doubt or self._clock() - self._worked > _IN_DOUBT_AFTER
