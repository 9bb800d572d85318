"""Waves: the rows of a job that step together, as many as fill a pass. Pure Python."""

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

from model.rows import Image
from service.engine.costs import Costs

if TYPE_CHECKING:
    from service.engine.jobs import Job


class RowState:
    """The progress of one row of a job. No other object keeps it.

    Attributes:
        index: of the row in its request.
        forwards: forward rows of each line of its table.
        changes: the numbers of steps left at which `forwards` changes, falling, with 0.
        steps: of the row in all: its lines.
        steps_left: steps still to take. A step counts as taken when its last forward row is chosen.
        due: forward rows of the present step that are not chosen yet.
        line: of the row's table, for the forward rows chosen last.
        started: whether any forward row was chosen.
        stepped: whether the pass with the last step has ended. A row without lines has stepped from the start.
        slot: the row's slot in the runner; None before the row starts, and after the row is read.
        image: the finished image; None until then.
    """

    __slots__ = (
        "changes",
        "due",
        "forwards",
        "image",
        "index",
        "job",
        "line",
        "slot",
        "started",
        "stepped",
        "steps",
        "steps_left",
        "wave",
    )

    def __init__(self, job: "Job", index: int, wave: "Wave", forwards: tuple[int, ...]) -> None:
        self.job = job
        self.index = index
        self.wave = wave
        self.forwards = forwards
        self.changes = _changes(forwards)
        self.steps = self.steps_left = len(forwards)
        self.due = forwards[0] if forwards else 0
        self.line = 0
        self.started = False
        self.stepped = not forwards
        self.slot: int | None = None
        self.image: Image | None = None

    @property
    def branches(self) -> range:
        """The branches of the present step that are not chosen yet."""
        most = self.forwards[-self.steps_left]
        return range(most - self.due, most)

    def choose(self) -> None:
        """Count a forward row of the present step as chosen."""
        self.started = True
        self.line = self.steps - self.steps_left
        self.due -= 1
        if self.due == 0:
            self.steps_left -= 1
            self.due = self.forwards[-self.steps_left] if self.steps_left else 0

    def at(self, level: int) -> int:
        """The forward rows of the step after which `level` − 1 steps are left."""
        return self.due if level == self.steps_left else self.forwards[-level]


class Wave:
    """Rows of a job that step together.

    Attributes:
        rows: those with steps left.
        left: forward rows that are not chosen yet.
        seconds: an upper bound for the wave alone, at speed 1.
    """

    __slots__ = ("left", "rows", "seconds")

    def __init__(self) -> None:
        self.rows: list[RowState] = []
        self.left = 0
        self.seconds = 0.0

    @property
    def at_once(self) -> int:
        """Forward rows of one step of all rows, on the average of the steps left."""
        return -(-self.left // max(row.steps_left for row in self.rows))

    def add(self, row: RowState) -> None:
        if row.steps:
            self.rows.append(row)
            self.left += sum(row.forwards)

    def count(self, row: RowState) -> None:
        """Count a forward row of this row as chosen."""
        self.left -= 1
        row.choose()
        if row.steps_left == 0:
            self.rows.remove(row)

    def weigh(self, costs: Costs) -> None:
        """Add up the costs of the remaining steps. The rows furthest behind go first."""
        if len(self.rows) == 1:  # a shortcut for the most common wave
            [row] = self.rows
            level, self.seconds = row.steps_left - 1, costs.rounds(row.due)
            for below in row.changes:
                if below < level:
                    self.seconds += (level - below) * costs.rounds(row.forwards[-level])
                    level = below
            return
        levels = {0}
        for row in self.rows:
            levels |= {row.steps_left, row.steps_left - 1, *row.changes}
        self.seconds = 0.0
        for level, below in pairwise(sorted(levels, reverse=True)):
            forwards = sum(row.at(level) for row in self.rows if row.steps_left >= level)
            self.seconds += (level - below) * costs.rounds(forwards)


@lru_cache(maxsize=1024)
def _changes(forwards: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of steps left at which the next step has another number of forward rows, falling, with 0."""
    N = len(forwards)
    return (*(N - i for i in range(1, N) if forwards[i] != forwards[i - 1]), 0)
