"""What a forward pass costs by its rows, or a decoding batch by its images. Pure Python.

Costs are measured at the start and followed in operation. The model is shape × speed: the cost of each width beside the
others, times one factor for how fast the machine is now. A machine that slows down does so at every width at once, so
each pass tells the speed. The shape moves slowly.
"""

from collections.abc import Mapping
from itertools import accumulate

_SPEED_FOLLOWS = 0.1  # share of a new measurement
_SHAPE_FOLLOWS = 0.02
_OUTLIER = 4.0  # times the expected; a pass that took longer says no more of the next than this
_MOVED = 0.03  # a shape that moved less is still the same
_SHORTEST = 1e-9  # seconds; a clock may not have moved
_WORTH = 1.02  # times the best cost of a row


class Costs:
    """Seconds of a pass.

    Args:
        measured: seconds of a pass by its width, for each width at which passes really run.
        decoding: what decoding costs, by the images of a batch; None where rows are images.

    Attributes:
        width: the narrowest width whose cost of a row is within 2 % of the best. Wider passes gain nothing.
        ceilings: upper bounds at speed 1, by the rows of a pass from 0 on. They never fall.
        speed: the factor for the machine as it is now; 1 is as it was at the start.
        version: rises when `width` and `ceilings` change.
    """

    def __init__(self, measured: Mapping[int, float], decoding: "Costs | None" = None) -> None:
        self.decoding = decoding
        self._widths = sorted(measured)
        self._measured = {width: max(seconds, _SHORTEST) for width, seconds in measured.items()}
        self._width_of = [0, *(min(w for w in self._widths if w >= n) for n in range(1, self._widths[-1] + 1))]
        self._at_start = dict(self._measured)
        self._least = dict(self._measured)  # seconds that a pass of each width ever took
        self._best_speed = self.speed = 1.0
        self.version = 0
        self._settle()

    @property
    def seconds_per_row(self) -> float:
        """What a forward row costs in a pass of `width` rows, which is what passes have where there is plenty to do."""
        return self.seconds(self.width) / self.width

    @property
    def by_width(self) -> dict[int, float]:
        """The expected seconds of a pass at each width."""
        return {width: seconds * self.speed for width, seconds in self._measured.items()}

    @property
    def best(self) -> "Costs":
        """The least that passes and decoding ever cost: what this machine can do."""
        least = {width: min(self._least[width], self._best_speed * self._at_start[width]) for width in self._widths}
        return Costs(least, None if self.decoding is None else self.decoding.best)

    def seconds(self, rows: int) -> float:
        """The expected seconds of a pass of so many rows."""
        return self._measured[self._width_of[rows]] * self.speed

    def rounds(self, forwards: int) -> float:
        """A lower bound at speed 1 for so many forward rows that may all run at once."""
        full, rest = divmod(forwards, self.width)
        return full * self.ceilings[self.width] + self.ceilings[rest]

    def follow(self, rows: int, seconds: float) -> None:
        """Take in what a pass of so many rows took."""
        width = self._width_of[rows]
        self._least[width] = min(self._least[width], max(seconds, _SHORTEST))
        found = min(seconds / self._measured[width], _OUTLIER * self.speed)
        self._measured[width] *= 1 + _SHAPE_FOLLOWS * (found / self.speed - 1)
        self.speed += _SPEED_FOLLOWS * (found - self.speed)
        self._best_speed = min(self._best_speed, self.speed)
        if abs(self._measured[width] / self._settled[width] - 1) > _MOVED:
            self._settle()
            self.version += 1

    def _settle(self) -> None:
        self._settled = dict(self._measured)
        best = min(self._measured[width] / width for width in self._widths)
        self.width = next(width for width in self._widths if self._measured[width] / width <= _WORTH * best)
        self.ceilings = list(accumulate((self._measured[w] if w else 0.0 for w in self._width_of), max))
