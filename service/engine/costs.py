"""The cost of a forward pass by its rows, or of a decoding batch by its images. Pure Python.

Costs are measured at the start, and follow each later pass. The model is shape × speed: the relative cost of each
width, times one factor for how fast the machine is now. A machine slows down at all widths at once, so each pass shows
the speed. The shape changes slowly.
"""

from collections.abc import Mapping
from itertools import accumulate

_SPEED_FOLLOWS = 0.1  # the weight of a new measurement
_SHAPE_FOLLOWS = 0.02
_OUTLIER = 4.0  # times the expected seconds; a slower pass counts as one of these
_MOVED = 0.03  # relative change; a smaller one does not settle the shape again
_SHORTEST = 1e-9  # seconds; a coarse clock may show 0
_WORTH = 1.02  # times the best cost of a row


class Costs:
    """Seconds of a pass.

    Args:
        measured: seconds of a pass, for each width at which passes run.
        decoding: the costs of decoding, by the images of a batch; None where rows are images.

    Attributes:
        width: the narrowest width whose cost a row is within 2 % of the best. Wider passes gain nothing.
        ceilings: upper bounds at speed 1, by the rows of a pass from 0 on. They never fall from one width to the next.
        speed: the factor for the machine now; 1 is its speed at the start.
        version: rises when `width` and `ceilings` change.
    """

    def __init__(self, measured: Mapping[int, float], decoding: "Costs | None" = None) -> None:
        self.decoding = decoding
        self._widths = sorted(measured)
        self._measured = {width: max(seconds, _SHORTEST) for width, seconds in measured.items()}
        self._width_of = [0, *(min(w for w in self._widths if w >= n) for n in range(1, self._widths[-1] + 1))]
        self._at_start = dict(self._measured)
        self._least = dict(self._measured)  # the fewest seconds of a pass so far, by width
        self._best_speed = self.speed = 1.0
        self.version = 0
        self._settle()

    @property
    def seconds_per_row(self) -> float:
        """Seconds of a forward row in a pass of `width` rows. Passes have this width when there is enough work."""
        return self.seconds(self.width) / self.width

    @property
    def by_width(self) -> dict[int, float]:
        """The expected seconds of a pass at each width."""
        return {width: seconds * self.speed for width, seconds in self._measured.items()}

    @property
    def best(self) -> "Costs":
        """The least costs of passes and decoding so far: the machine at its best."""
        least = {width: min(self._least[width], self._best_speed * self._at_start[width]) for width in self._widths}
        return Costs(least, None if self.decoding is None else self.decoding.best)

    def seconds(self, rows: int) -> float:
        """The expected seconds of a pass of `rows` rows."""
        return self._measured[self._width_of[rows]] * self.speed

    def rounds(self, forwards: int) -> float:
        """An upper bound at speed 1 for `forwards` forward rows in full passes and a last one."""
        full, rest = divmod(forwards, self.width)
        return full * self.ceilings[self.width] + self.ceilings[rest]

    def follow(self, rows: int, seconds: float) -> None:
        """Learn from the seconds of a pass of `rows` rows."""
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
