"""Jobs, as the scheduler sees them: the rows of a request, and the progress of each. Pure Python.

A step of a row takes one forward row, or two with guidance. The two may run in different passes.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from model.rows import Image
from service.engine.costs import Costs


class RowState:
    """The progress of one row of a job. No other object keeps it.

    Attributes:
        index: of the row in its request.
        steps: of the row in all.
        steps_left: steps still to take. A step counts as taken when its last forward row is chosen.
        forwards_per_step: forward rows of each step, 1 or 2.
        due: forward rows of the present step that are not chosen yet.
        line: of the row's table, for the forward rows chosen last.
        started: whether any forward row was chosen.
        stepped: whether the pass with the last step has ended.
        slot: the row's slot in the runner; None before the row starts, and after the row is read.
        image: the finished image; None until then.
    """

    __slots__ = (
        "due",
        "forwards_per_step",
        "group",
        "image",
        "index",
        "job",
        "line",
        "slot",
        "started",
        "stepped",
        "steps",
        "steps_left",
    )

    def __init__(self, job: "Job", index: int, group: "_Group", steps: int, forwards_per_step: int) -> None:
        self.job = job
        self.index = index
        self.group = group
        self.steps = self.steps_left = steps
        self.forwards_per_step = forwards_per_step
        self.due = forwards_per_step
        self.line = 0
        self.started = self.stepped = False
        self.slot: int | None = None
        self.image: Image | None = None

    @property
    def branches(self) -> range:
        """The branches of the present step that are not chosen yet."""
        return range(self.forwards_per_step - self.due, self.forwards_per_step)

    def choose(self) -> None:
        """Count a forward row of the present step as chosen."""
        self.started = True
        self.line = self.steps - self.steps_left
        self.due -= 1
        if self.due == 0:
            self.steps_left -= 1
            self.due = self.forwards_per_step


Batch = list[tuple[RowState, int]]  # the forward rows of a pass, each as row and branch


class _Group:
    """Rows of a job that step together, as many as fill a pass.

    Attributes:
        rows: the group's rows with steps left.
        at_once: forward rows of one step of all rows.
        left: forward rows that are not chosen yet.
        seconds: an upper bound for the group alone, at speed 1.
    """

    __slots__ = ("at_once", "left", "rows", "seconds")

    def __init__(self) -> None:
        self.rows: list[RowState] = []
        self.at_once = self.left = 0
        self.seconds = 0.0

    def add(self, row: RowState) -> None:
        self.rows.append(row)
        self.at_once += row.forwards_per_step
        self.left += row.steps_left * row.forwards_per_step

    def count(self, row: RowState) -> None:
        """Count a forward row of this row as chosen."""
        self.left -= 1
        row.choose()
        if row.steps_left == 0:
            self.rows.remove(row)
            self.at_once -= row.forwards_per_step

    def weigh(self, costs: Costs) -> None:
        """Add up the costs of the remaining steps. The rows furthest behind go first."""
        if len(self.rows) == 1:  # a shortcut for the most common group
            [row] = self.rows
            self.seconds = costs.rounds(row.due) + (row.steps_left - 1) * costs.rounds(row.forwards_per_step)
            return
        self.seconds, forwards = 0.0, 0
        levels = sorted({row.steps_left for row in self.rows}, reverse=True)
        for level, below in pairwise([*levels, 0]):
            here = [row for row in self.rows if row.steps_left == level]
            self.seconds += costs.rounds(forwards + sum(row.due for row in here))
            forwards += sum(row.forwards_per_step for row in here)
            self.seconds += (level - below - 1) * costs.rounds(forwards)


class Rest(NamedTuple):
    """What is left of a job, as estimates see it.

    Attributes:
        left: forward rows.
        is_decoded: whether its rows are decoded.
        groups: for rows that step together: how many, the forward rows of a step of theirs, and those left.
    """

    left: int
    is_decoded: bool
    groups: list[tuple[int, int, float]]


class Job:
    """The rows of a request.

    Args:
        rows: for each row, its steps and the forward rows of one step.
        costs: of passes.
        decoded: whether each row is decoded after its last step.

    Attributes:
        rows: all rows of the job.
        unstepped: rows that have not ended their last step.
        undecoded: rows still to be decoded, with those that have steps left.
        promise: the time by which all images are done.
        number: in the order of arrival; infinite before the job enters the queue.
        size: forward rows of the whole job.
        left: forward rows that are not chosen yet.
        steps: the most steps left of one row.
        seconds: an upper bound for the job alone, at speed 1. Its groups, which fill a pass, run one after the other.
    """

    __slots__ = (
        "_groups",
        "_rest",
        "left",
        "number",
        "promise",
        "rows",
        "seconds",
        "size",
        "steps",
        "undecoded",
        "unstepped",
    )

    def __init__(self, rows: Iterable[tuple[int, int]], costs: Costs, decoded: bool = False) -> None:
        self.promise = inf
        self.number = inf
        self.rows: list[RowState] = []
        self._groups: list[_Group] = []
        self._rest: Rest | None = None
        shapes = list(rows)
        together = max(1, costs.width // max(forwards_per_step for _, forwards_per_step in shapes))
        for index, (steps, forwards_per_step) in enumerate(shapes):
            if index % together == 0:
                self._groups.append(_Group())
            self.rows.append(RowState(self, index, self._groups[-1], steps, forwards_per_step))
            self._groups[-1].add(self.rows[-1])
        self.unstepped = len(self.rows)
        self.undecoded = len(self.rows) if decoded else 0
        self.size = self.left = sum(row.steps_left * row.forwards_per_step for row in self.rows)
        self.weigh(costs)

    def at(self, costs: Costs) -> "Job":
        """The same job with other costs, before its first pass."""
        rows = ((row.steps, row.forwards_per_step) for row in self.rows)
        return Job(rows, costs, decoded=bool(self.undecoded))

    @property
    def rest(self) -> Rest:
        """What is left of the job. A job that waits keeps its answer: each admission asks all jobs around."""
        if self._rest is None:
            groups = [(len(group.rows), group.at_once, float(group.left)) for group in self._groups]
            self._rest = Rest(self.left, self.undecoded > 0, groups)
        return self._rest

    def behind_first(self) -> Iterable[RowState]:
        """Rows with steps left, group after group. In a group, the rows furthest behind go first."""
        for group in self._groups:
            yield from sorted(group.rows, key=lambda row: -row.steps_left)

    def furthest_behind(self) -> list[RowState]:
        """The rows of the first group with the most steps left."""
        rows = self._groups[0].rows
        most = max(row.steps_left for row in rows)
        return [row for row in rows if row.steps_left == most]

    def end(self, row: RowState) -> None:
        """Note that the pass with a row's last step has ended."""
        row.stepped = True
        self.unstepped -= 1

    def count(self, rows: Sequence[RowState], costs: Costs) -> None:
        """Count a forward row of each of these rows as chosen. A row may appear twice, for two forward rows."""
        self._rest = None
        self.left -= len(rows)
        groups: dict[_Group, None] = {}
        for row in rows:
            row.group.count(row)
            groups[row.group] = None
        for group in groups:
            group.weigh(costs)
        self._add_up()

    def weigh(self, costs: Costs) -> None:
        """Compute `seconds` again, with new costs."""
        for group in self._groups:
            group.weigh(costs)
        self._add_up()

    def _add_up(self) -> None:
        if not all(group.rows for group in self._groups):
            self._groups = [group for group in self._groups if group.rows]
        self.seconds = sum(group.seconds for group in self._groups)
        self.steps = max((row.steps_left for group in self._groups for row in group.rows), default=0)
