"""The rate at which work has arrived lately, by job size. Pure Python."""

import math
from collections.abc import Callable

_MEMORY = 60.0  # seconds after which an arrival counts for 1/e
_AT_LEAST = 10.0  # seconds of observation; a shorter time gives no good rate
_DIGITS = 4  # the leading binary digits of a size; sizes with the same digits count as one


class Arrivals:
    """Remembers arrivals, and forgets them slowly.

    Args:
        now: the beginning of the observation.
    """

    def __init__(self, now: float) -> None:
        self._began = now
        self._seen: dict[float, tuple[float, float]] = {}  # by size: seconds of work, and the time of that count

    def note(self, work: float, now: float) -> None:
        """Note the arrival of a job with so many seconds of passes at speed 1."""
        if work:
            size = _rounded(work)
            self._seen[size] = self._seconds(size, now) + work, now

    def rates(self, now: float) -> Callable[[float], float]:
        """A function from a size to the seconds of work a second that arrive in smaller jobs."""
        window = _MEMORY * (1 - math.exp(-max(now - self._began, _AT_LEAST) / _MEMORY))
        seen = [(size, self._seconds(size, now) / window) for size in self._seen]

        def below(size: float) -> float:
            limit = _rounded(size)
            return sum(rate for smaller, rate in seen if smaller < limit)

        return below

    def _seconds(self, size: float, now: float) -> float:
        seconds, then = self._seen.get(size, (0.0, now))
        return seconds * math.exp((then - now) / _MEMORY)


def _rounded(work: float) -> float:
    mantissa, exponent = math.frexp(work)
    return math.ldexp(math.floor(math.ldexp(mantissa, _DIGITS)), exponent - _DIGITS)
