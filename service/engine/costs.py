"""The seconds of each piece of work: passes, batches of decoding, encoding, checks, and the answer. Pure Python.

Costs are measured at the start, and follow each later pass. The model is shape × speed: the relative cost of each
width, times one factor for how fast the machine is now. A machine slows down at all widths and for all groups at once,
so each pass shows the speed. The shape changes slowly.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from model.rows import Group
from service.engine.trials import Trials

_SPEED_FOLLOWS = 0.1  # the weight of a new measurement
_SHAPE_FOLLOWS = 0.02
_OUTLIER = 4.0  # times the expected seconds; a slower pass counts as one of these
_MOVED = 0.03  # relative change; a smaller one does not settle the shape again
_SHORTEST = 1e-9  # seconds; a coarse clock may show 0
_WORTH = 1.02  # times the best cost of a row
_STAYS = 1.05  # times the best cost of a row; up to here the working width stays, so that noise does not change it
_SURPRISE = 0.8  # times the expected seconds; noise makes passes slower, and hardly ever so much faster
_TRIAL_FOLLOWS = 0.1
_LITTLE = 1.25  # times the seconds of a row in a full pass; a pass of one row that takes no longer
_ANSWER_RISES = 0.5
_ANSWER_FALLS = 0.05
_FALLEN = (
    0.2  # relative change; the answer's costs rise and fall all the time, and each new value weighs all jobs again
)


class Speed:
    """How fast the machine is now at one kind of work. The costs of several groups share it.

    Attributes:
        value: the factor for the machine now; 1 is its speed at the start, 2 is half as fast.
        best: the least value so far.
    """

    __slots__ = ("best", "value")

    def __init__(self) -> None:
        self.value = self.best = 1.0

    def follow(self, found: float) -> None:
        """Learn from a piece of work that took `found` times its seconds at speed 1."""
        self.value += _SPEED_FOLLOWS * (found - self.value)
        self.best = min(self.best, self.value)


class Costs:
    """Seconds of a pass of one group, or of a batch of decoding.

    Args:
        measured: seconds of a pass, for each width that was measured.
        speed: of the machine; shared by the groups.
        widths: at which passes run, rising; the measured ones if not given. The seconds of the others are guessed. A
            guess is not too low where a wider pass costs no less, and a row of it no more.

    Attributes:
        width: the narrowest width whose cost a row is within 2 % of the best. Wider passes gain nothing.
        ceilings: upper bounds at speed 1, by the rows of a pass from 0 on. They never fall from one width to the next.
        version: rises when `width` and `ceilings` change.
        trials: of other widths than the working width.
    """

    def __init__(
        self, measured: Mapping[int, float], speed: Speed | None = None, widths: Sequence[int] | None = None
    ) -> None:
        self._machine = Speed() if speed is None else speed
        self._widths = sorted(measured if widths is None else widths)
        known = {width: max(seconds, _SHORTEST) for width, seconds in measured.items()}
        self._unknown = set(self._widths) - known.keys()
        self._measured = {width: known[width] if width in known else _guess(width, known) for width in self._widths}
        self._width_of = [0, *(min(w for w in self._widths if w >= n) for n in range(1, self._widths[-1] + 1))]
        self._at_start = dict(self._measured)
        self._least = dict(self._measured)  # the fewest seconds of a pass so far, by width
        self.trials = Trials(self._widths)
        self.version = self.width = 0
        self._settle()

    @property
    def speed(self) -> float:
        """The factor for the machine now; 1 is its speed at the start."""
        return self._machine.value

    @property
    def seconds_per_row(self) -> float:
        """Seconds of a forward row in a pass of `width` rows. Passes have this width when there is enough work."""
        return self.seconds(self.width) / self.width

    @property
    def row(self) -> float:
        """An upper bound at speed 1 for a forward row in a pass of `width` rows."""
        return self.ceilings[self.width] / self.width

    @property
    def by_width(self) -> dict[int, float]:
        """The expected seconds of a pass at each width."""
        return {width: seconds * self.speed for width, seconds in self._measured.items()}

    @property
    def best(self) -> "Costs":
        """The least costs so far: the machine at its best."""
        best_speed = self._machine.best
        return Costs({width: min(self._least[width], best_speed * self._at_start[width]) for width in self._widths})

    def seconds(self, rows: int) -> float:
        """The expected seconds of a pass of `rows` rows."""
        return self._measured[self._width_of[rows]] * self.speed

    def at_most(self, rows: int) -> float:
        """An upper bound at speed 1 for a pass of `rows` rows."""
        return self.ceilings[rows]

    def rounds(self, forwards: int) -> float:
        """An upper bound at speed 1 for `forwards` forward rows in full passes and a last one."""
        full, rest = divmod(forwards, self.width)
        return full * self.ceilings[self.width] + self.ceilings[rest]

    def to_try(self) -> int | None:
        """Another width than the working one that is worth a trial now, if any."""
        if not self.trials.may_be_due:
            return None
        most = {width: 2 * width * self.seconds_per_row for width in self._widths}
        prices = {width: min(self.seconds(width), most[width]) for width in self._widths if width != self.width}
        return self.trials.due(prices, self._unknown)

    def follow(self, rows: int, seconds: float) -> None:
        """Learn from the seconds of a pass of `rows` rows."""
        width = self._width_of[rows]
        self._least[width] = min(self._least[width], max(seconds, _SHORTEST))
        is_trial = self.trials.note(width, rows == width, seconds)
        found = min(seconds / self._measured[width], _OUTLIER * self.speed)
        change = found / self.speed - 1
        if width in self._unknown:
            self._unknown.discard(width)
            self._reshape(width, max(seconds, _SHORTEST) / self.speed / self._measured[width] - 1)
        elif is_trial:
            self._reshape(width, change if change < _SURPRISE - 1 else _TRIAL_FOLLOWS * change)
        else:
            self._reshape(width, _SHAPE_FOLLOWS * change)
            self._machine.follow(found)

    def _reshape(self, width: int, change: float) -> None:
        """Change the seconds of a width by this share."""
        self._measured[width] = max(self._measured[width] * (1 + change), _SHORTEST)
        if abs(self._measured[width] / self._settled[width] - 1) > _MOVED:
            self._settle()
            self.version += 1

    def _settle(self) -> None:
        self._settled = dict(self._measured)
        a_row = {width: self._measured[width] / width for width in self._widths}
        best = min(a_row.values())
        width = next(width for width in self._widths if a_row[width] <= _WORTH * best)
        stays = self.width and a_row[self.width] <= _STAYS * best
        if not stays or (width < self.width and a_row[width] <= a_row[self.width]):
            self.width = width
        self.ceilings = list(accumulate((self._measured[w] if w else 0.0 for w in self._width_of), max))


def _guess(width: int, known: Mapping[int, float]) -> float:
    """The most seconds of a pass at a width, from those of the next widths that were measured."""
    below = max((w for w in known if w <= width), default=None)
    above = min((w for w in known if w >= width), default=None)
    most = [] if above is None else [known[above]]
    if below is not None:
        most.append(known[below] * width / below)
    return min(most)


class PerValue:
    """Seconds to encode the answer's images: a constant, and seconds for each value. An upper bound that is learned.

    How well an image compresses is not known before. So the costs follow half of the difference at once after a call
    that was slower than expected, and little of it after a faster call. There is no factor for the machine. The costs
    are the same for all groups.

    Args:
        seconds_a_value: at the start.
        constant_s: at the start.
        largest: values of the largest image.

    Attributes:
        version: rises when `seconds` changes.
        largest: values of the largest image, or of the largest call so far.
    """

    def __init__(self, seconds_a_value: float = 30e-9, constant_s: float = 1e-3, largest: int = 0) -> None:
        self._now = self._used = self._best = (constant_s, seconds_a_value)
        self.version, self.largest = 0, largest

    @property
    def best(self) -> "PerValue":
        """The least costs so far."""
        constant, a_value = self._best
        return PerValue(a_value, constant)

    def seconds(self, values: int, pieces: int = 1) -> float:
        """Seconds for `pieces` calls that encode `values` values together."""
        constant, a_value = self._used
        return pieces * constant + a_value * values

    def at_most(self, values: int) -> float:
        """The same as `seconds`, which is an upper bound already. Stages ask all costs in one way."""
        return self.seconds(values)

    def follow(self, values: int, seconds: float) -> None:
        """Learn from the seconds of a call that encoded `values` values."""
        self.largest = max(self.largest, values)
        constant, a_value = self._now
        expected = constant + a_value * values
        change = min(seconds / expected, _OUTLIER) - 1
        change *= _ANSWER_RISES if change > 0 else _ANSWER_FALLS
        share = a_value * values / expected
        constant, a_value = constant * (1 + (1 - share) * change), a_value * (1 + share * change)
        self._now = constant, a_value
        self._best = min(self._best[0], constant), min(self._best[1], a_value)
        moved = [now / used - 1 for now, used in zip(self._now, self._used, strict=True)]
        if max(moved) > _MOVED or min(moved) < -_FALLEN:
            self._used = self._now
            self.version += 1


class Machine:
    """What each piece of work costs on this machine.

    Passes, decoding, encoding and checks have a speed each, which all groups share. When they run beside each other,
    each slows down by its own factor. Texts and uploads share the speed of their one stage.

    Args:
        passes: by group.
        decode: of batches of images, by group; empty where rows are images.
        encode: of one uploaded image, by group; the only width is 1.
        answer: of the answer's images.
        text: of one text, the same for all groups; the only width is 1. None for a model without texts.
        check: of one image, by group; the only width is 1. Empty where images are not checked.
    """

    def __init__(
        self,
        passes: Mapping[Group, Costs],
        decode: Mapping[Group, Costs] | None = None,
        encode: Mapping[Group, Costs] | None = None,
        answer: PerValue | None = None,
        text: Costs | None = None,
        check: Mapping[Group, Costs] | None = None,
    ) -> None:
        self.passes = dict(passes)
        self.decode = dict(decode or {})
        self.encode = dict(encode or {})
        self.answer = PerValue() if answer is None else answer
        self.text = text
        self.check = dict(check or {})
        by_group = self.passes, self.decode, self.encode, self.check
        self._all = [costs for kind in by_group for costs in kind.values()] + ([] if text is None else [text])

    def encode_s(self, group: Group, texts: int, uploads: int) -> float:
        """An upper bound at speed 1 to encode the texts and uploads of a job."""
        seconds = uploads * self.encode[group].ceilings[1] if uploads else 0.0
        return seconds if self.text is None else seconds + texts * self.text.ceilings[1]

    @property
    def one_by_one(self) -> frozenset[Costs]:
        """The passes of groups that gain little from width, if there are several groups."""
        if len(self.passes) == 1:
            return frozenset()
        every = self.passes.values()
        return frozenset(costs for costs in every if costs.ceilings[1] <= _LITTLE * costs.row)

    @property
    def version(self) -> int:
        """Rises when one of the costs changes by which jobs are weighed."""
        return self.answer.version + sum(costs.version for costs in self._all)

    @property
    def best(self) -> "Machine":
        """The least costs so far: the machine at its best."""
        passes, decode, encode, check = (
            {group: costs.best for group, costs in kind.items()}
            for kind in (self.passes, self.decode, self.encode, self.check)
        )
        text = None if self.text is None else self.text.best
        return Machine(passes, decode, encode, self.answer.best, text, check)
