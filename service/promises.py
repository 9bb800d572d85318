"""By when a job will be done, whatever comes later. Pure Python.

Two plans take the jobs in the order of their promises, and each bounds how long every one of them takes:

- alone: one job after the other, each in groups of images that fill a pass. Job k is done when those up to k, each of
  which takes its `seconds`, are.
- together: passes are filled, up to the width w. In a pass without all rows of job k that are due, all w rows are of
  the jobs up to k; there are at most (R - S)/w such passes, with R the forward rows that these jobs have left and S the
  steps of job k. The others, at most S, each advance it by a step. So it takes at most R/w + S·(1 - 1/w) passes
  (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).

A plan whose bounds, with a margin, keep all promises does so for as long as it is followed. And nothing that runs
instead, and no job that leaves, makes the bounds longer: so the time that a plan has to spare may be spent at will.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple

from service.costs import Costs
from service.jobs import Job

MARGIN = 0.25  # passes may take so much longer than expected, and all promises are kept
PATIENCE = 2.0  # a promise is so many times what the work ahead and its own take in full passes
SHORTEST = 0.25  # seconds; a shorter promise would hang on the whims of the operating system
_ROUNDING = 1e-9  # seconds


class Spare(NamedTuple):
    """The seconds that each plan could lose, and all promises would still be kept. Negative: they may not be."""

    alone: float
    together: float


class Bounds:
    """The plans' bounds in seconds, for one state of the costs, margin included."""

    def __init__(self, costs: Costs) -> None:
        self.unit = costs.speed * (1 + MARGIN)
        self._full = costs.ceilings[costs.width] * self.unit
        self.row = self._full / costs.width
        self.step = self._full - self.row

    def alone(self, seconds: float) -> float:
        """Of a job that, with those ahead of it, takes so many seconds at speed 1."""
        return self.unit * seconds

    def together(self, rows: int, steps: int) -> float:
        """Of a job with so many steps that, with those ahead of it, has so many forward rows."""
        return self.row * rows + self.step * steps


def spare(line: Sequence[Job], costs: Costs, start: float) -> Spare:
    """What the plans have to spare for jobs, in the order of their promises, that begin at `start`."""
    bounds = Bounds(costs)
    unit, row, step = bounds.unit, bounds.row, bounds.step
    alone = together = inf
    seconds, rows = 0.0, 0
    for job in line:  # a thousand of them, at every tick
        seconds += job.seconds
        rows += job.left
        promise = job.promise
        if promise - unit * seconds < alone:
            alone = promise - unit * seconds
        if promise - row * rows - step * job.steps < together:
            together = promise - row * rows - step * job.steps
    return Spare(alone - start, together - start)


def patient(job: Job, rows_ahead: int, costs: Costs) -> float:
    """The seconds that a promise allows, where others allow it: a multiple of the work ahead and of the job's own."""
    in_full_passes = Bounds(costs).together(rows_ahead + job.left, job.steps) / (1 + MARGIN)
    return max(SHORTEST, PATIENCE * in_full_passes)


def earliest(job: Job, line: Sequence[Job], costs: Costs, start: float, wanted: float) -> float:
    """The earliest promise for a job, not before `wanted`, with which its own and all others will be kept.

    Args:
        job: is not in line.
        line: the jobs that have promises, in their order.
        costs: of passes.
        start: when the next pass can begin.
        wanted: a time.
    """
    bounds = Bounds(costs)
    seconds = list(accumulate((other.seconds for other in line), initial=job.seconds))
    rows = list(accumulate((other.left for other in line), initial=job.left))
    steps = [0, *(other.steps for other in line)]
    left = spare(line, costs, start)
    enough = min(-_ROUNDING, max(left))  # where neither plan keeps all promises, the one that comes closer is followed
    promises = []
    if left.alone >= enough:
        own = [start + bounds.alone(s) for s in seconds]
        promises.append(_place(line, own, own, wanted))
    if left.together >= enough:
        own = [start + bounds.together(r, job.steps) for r in rows]
        theirs = [start + bounds.together(r, s) for r, s in zip(rows, steps, strict=True)]
        promises.append(_place(line, own, theirs, wanted))
    return min(promises)


def _place(line: Sequence[Job], own: Sequence[float], theirs: Sequence[float], wanted: float) -> float:
    """The earliest promise of a job among others.

    Args:
        line: the others.
        own: when the job is done, behind the first i of them.
        theirs: when number i of them, from 1 on, is done, if the job goes ahead of it.
        wanted: a time.
    """
    i = len(line)
    while i > 0 and line[i - 1].promise > wanted and theirs[i] <= line[i - 1].promise:
        i -= 1
    promise = max(wanted, own[i], line[i - 1].promise if i > 0 else -inf)
    while i < len(line) and promise >= line[i].promise:
        i += 1
        promise = max(promise, own[i])
    return promise
