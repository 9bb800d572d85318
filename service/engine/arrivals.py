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
        self._seen: dict[int, tuple[float, float]] = {}  # by size: forward rows, and the time of that count

    def note(self, forwards: int, now: float) -> None:
        """Note the arrival of a job with `forwards` forward rows."""
        size = _rounded(forwards)
        self._seen[size] = self._rows(size, now) + forwards, now

    def rates(self, now: float) -> Callable[[float], float]:
        """A function from a size to the forward rows a second that arrive in smaller jobs."""
        window = _MEMORY * (1 - math.exp(-max(now - self._began, _AT_LEAST) / _MEMORY))
        seen = [(size, self._rows(size, now) / window) for size in self._seen]

        def below(size: float) -> float:
            limit = _rounded(math.ceil(size))
            return sum(rate for smaller, rate in seen if smaller < limit)

        return below

    def _rows(self, size: int, now: float) -> float:
        rows, then = self._seen.get(size, (0.0, now))
        return rows * math.exp((then - now) / _MEMORY)


def _rounded(forwards: int) -> int:
    dropped = max(0, forwards.bit_length() - _DIGITS)
    return forwards >> dropped << dropped
