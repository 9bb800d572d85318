"""By when a job will be done, whatever comes later. Pure Python.

Two plans take the jobs in the order of their promises, and each bounds how long every one of them takes:

- alone: one job after the other, each in groups of rows that fill a pass. Job k is done after the `seconds` of the jobs
  up to k.
- together: passes are filled, up to the width w. Let R be the forward rows that the jobs up to k have left, and S the
  steps of job k. In a pass that lacks a due row of job k, all w rows are of the jobs up to k. There are at most
  (R − S)/w such passes. Each other pass advances job k by a step, so there are at most S of those. Job k takes at most
  R/w + S·(1 − 1/w) passes (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).

Latents are decoded beside the passes, in batches of up to w rows, the earliest promise first. Rows of job k that have
taken their steps may have to wait for a batch that has begun. Each later batch is full of rows of the jobs up to k, but
for the one with the last row of job k. If these jobs have I rows left to decode, that is at most I/w + 2 − 1/w
batches. A batch beside passes has half of the machine. Both bounds are longer by that. A job whose rows have all taken
their steps waits for nothing else, whatever passes run.

A plan whose bounds, with a margin, keep all promises keeps them as long as it is followed. Nothing that runs instead,
and no job that leaves, makes a bound longer. So the time that a plan has to spare can be spent freely.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from math import inf
from typing import NamedTuple

from service.engine.costs import Costs
from service.engine.jobs import Job

MARGIN = 0.25  # passes may take so much longer than expected, and all promises are kept
PATIENCE = 2.0  # a promise is so many times what the work ahead and its own take in full passes
SHARED = 2.0  # times what decoding takes alone, while passes run beside it
SHORTEST = 0.25  # seconds; a shorter promise would hang on the whims of the operating system
_ROUNDING = 1e-9  # seconds


class Spare(NamedTuple):
    """The seconds that each plan can lose and still keep all promises. Negative where it may not keep them."""

    alone: float
    together: float


class Bounds:
    """The plans' bounds in seconds, for one state of the costs, margin included."""

    def __init__(self, costs: Costs) -> None:
        self.unit = costs.speed * (1 + MARGIN)
        self._full = costs.ceilings[costs.width] * self.unit
        self.row = self._full / costs.width
        self.step = self._full - self.row
        self.image = self.batches = 0.0  # of decoding: what each row adds, and what batches that are not full add
        if costs.decoding is not None:
            decoding = costs.decoding
            full = decoding.ceilings[decoding.width] * SHARED * decoding.speed * (1 + MARGIN)
            self.image = full / decoding.width
            self.batches = 2 * full - self.image

    def alone(self, seconds: float) -> float:
        """The bound for a job: `seconds` is what it and the jobs ahead of it take at speed 1."""
        return self.unit * seconds

    def together(self, rows: int, steps: int) -> float:
        """The bound for a job with `steps` left: it and the jobs ahead of it have `rows` forward rows left."""
        return self.row * rows + self.step * steps

    def decoded(self, job: Job, images: int) -> float:
        """The seconds from a job's last step to its last image: `images` are its own and those ahead of it."""
        return self.image * images + self.batches if job.undecoded else 0.0


def spare(line: Sequence[Job], costs: Costs, start: float) -> Spare:
    """What the plans have to spare. `line` is in the order of promises, and its first pass begins at `start`.

    A job whose rows have all taken their steps loses nothing, whatever runs.
    """
    bounds = Bounds(costs)
    unit, row, step, decodes = bounds.unit, bounds.row, bounds.step, costs.decoding is not None
    alone = together = inf
    seconds, rows, images = 0.0, 0, 0
    for job in line:  # a thousand of them, at every tick
        seconds += job.seconds
        rows += job.left
        promise = job.promise
        if decodes and job.undecoded:
            images += job.undecoded
            promise = promise - bounds.image * images - bounds.batches if job.left else inf
        if promise - unit * seconds < alone:
            alone = promise - unit * seconds
        if promise - row * rows - step * job.steps < together:
            together = promise - row * rows - step * job.steps
    return Spare(alone - start, together - start)


def patient(job: Job, rows_ahead: int, costs: Costs, images_ahead: int = 0) -> float:
    """The seconds of a patient promise: a multiple of what the work ahead and the job's own take in full passes."""
    bounds = Bounds(costs)
    in_full_passes = bounds.together(rows_ahead + job.left, job.steps)
    in_full_passes += bounds.decoded(job, images_ahead + job.undecoded)
    return max(SHORTEST, PATIENCE * in_full_passes / (1 + MARGIN))


def seconds_alone(job: Job, costs: Costs) -> float:
    """The earliest promise, in seconds, on an idle server."""
    return earliest(job, [], costs, 0.0, 0.0)


def earliest(job: Job, line: Sequence[Job], costs: Costs, start: float, wanted: float) -> float:
    """The earliest promise that is not before `wanted`, and under which some plan keeps this and every other promise.

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

    def decoded(stepped: list[float], jobs: Iterable[Job]) -> list[float]:
        """Completion times, given the times of the last steps: the decode bound for all rows ahead is added."""
        if costs.decoding is None:
            return stepped
        images = accumulate((other.undecoded for other in line), initial=job.undecoded)
        return [
            (time if one.left else start) + bounds.decoded(one, n)
            for time, one, n in zip(stepped, jobs, images, strict=False)
        ]

    left = spare(line, costs, start)
    enough = min(-_ROUNDING, max(left))  # where neither plan keeps all promises, follow the one that comes closer
    promises = []
    if left.alone >= enough:
        stepped = [start + bounds.alone(s) for s in seconds]
        promises.append(_place(line, decoded(stepped, repeat(job)), decoded(stepped, [job, *line]), wanted))
    if left.together >= enough:
        own = [start + bounds.together(r, job.steps) for r in rows]
        theirs = [start + bounds.together(r, s) for r, s in zip(rows, steps, strict=True)]
        promises.append(_place(line, decoded(own, repeat(job)), decoded(theirs, [job, *line]), wanted))
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
