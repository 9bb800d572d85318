"""Promises: the time by which a job will be done, whatever arrives later. Pure Python.

Two plans run the jobs in the order of their promises. Each plan bounds the completion time of every job:

- alone: one job after the other, each in groups of rows that fill a pass. Job k is done after the `seconds` of the jobs
  up to k.
- together: passes are filled, up to the width w. Let R be the forward rows that the jobs up to k have left, and S the
  steps of job k. In a pass that lacks a due row of job k, all w rows belong to the jobs up to k. There are at most
  (R − S)/w such passes. Each other pass advances job k by a step, so there are at most S other passes. Job k takes at
  most R/w + S·(1 − 1/w) passes (R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969).

Latents are decoded beside the passes, in batches of up to w rows, the earliest promise first. Rows of job k that have
taken their steps may wait for a batch that has begun. Later batches are full of rows of the jobs up to k, except the
batch with the last row of job k. If these jobs have I rows left to decode, decoding takes at most I/w + 2 − 1/w
batches. A batch beside passes gets half of the machine. Both plans add these seconds to their bounds. Once all rows of
a job have taken their steps, the job waits only for decoding, whatever passes run.

If the bounds of a plan keep all promises with a margin, the promises hold as long as the plan is followed. Passes
outside the plan make no bound longer, and neither do jobs that leave. So the scheduler may spend a plan's spare time
freely.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from math import inf
from typing import NamedTuple

from service.engine.costs import Costs
from service.engine.jobs import Job

MARGIN = 0.25  # passes may take longer than expected by this share, and all promises hold
PATIENCE = 2.0  # times the seconds of the job and the work ahead in full passes
SHARED = 2.0  # times the seconds of decoding alone, while passes run beside decoding
SHORTEST = 0.25  # seconds; the operating system's delays could break a shorter promise
_ROUNDING = 1e-9  # seconds


class Spare(NamedTuple):
    """The seconds that each plan can lose and still keep all promises. Negative if the plan may break one."""

    alone: float
    together: float


class Bounds:
    """The plans' bounds in seconds, for one state of the costs, margin included."""

    def __init__(self, costs: Costs) -> None:
        self.unit = costs.speed * (1 + MARGIN)
        self._full = costs.ceilings[costs.width] * self.unit
        self.row = self._full / costs.width
        self.step = self._full - self.row
        self.image = self.batches = 0.0  # of decoding: seconds for each row, and for batches that are not full
        if costs.decoding is not None:
            decoding = costs.decoding
            full = decoding.ceilings[decoding.width] * SHARED * decoding.speed * (1 + MARGIN)
            self.image = full / decoding.width
            self.batches = 2 * full - self.image

    def alone(self, seconds: float) -> float:
        """The bound for a job. `seconds` is the time of the job and the jobs ahead at speed 1."""
        return self.unit * seconds

    def together(self, rows: int, steps: int) -> float:
        """The bound for a job with `steps` left. The job and the jobs ahead have `rows` forward rows left."""
        return self.row * rows + self.step * steps

    def decoded(self, job: Job, images: int) -> float:
        """The seconds from a job's last step to its last image. `images` counts the job's own and those ahead."""
        return self.image * images + self.batches if job.undecoded else 0.0


def spare(line: Sequence[Job], costs: Costs, start: float) -> Spare:
    """The spare seconds of the plans. `line` is in the order of promises, and its first pass begins at `start`.

    A job whose rows have all taken their steps loses nothing, whatever passes run.
    """
    bounds = Bounds(costs)
    unit, row, step, decodes = bounds.unit, bounds.row, bounds.step, costs.decoding is not None
    alone = together = inf
    seconds, rows, images = 0.0, 0, 0
    for job in line:  # up to a thousand jobs, before each pass
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
    """The seconds of a patient promise: a multiple of the time of the job and the work ahead in full passes."""
    bounds = Bounds(costs)
    in_full_passes = bounds.together(rows_ahead + job.left, job.steps)
    in_full_passes += bounds.decoded(job, images_ahead + job.undecoded)
    return max(SHORTEST, PATIENCE * in_full_passes / (1 + MARGIN))


def seconds_alone(job: Job, costs: Costs) -> float:
    """The seconds of the earliest promise on an idle server."""
    return earliest(job, [], costs, 0.0, 0.0)


def earliest(job: Job, line: Sequence[Job], costs: Costs, start: float, wanted: float) -> float:
    """The earliest promise, at or after `wanted`, with which some plan keeps this and every other promise.

    Args:
        job: not in the queue yet.
        line: the jobs with promises, in the order of promises.
        costs: of passes.
        start: when the next pass can begin.
        wanted: a time.
    """
    bounds = Bounds(costs)
    seconds = list(accumulate((other.seconds for other in line), initial=job.seconds))
    rows = list(accumulate((other.left for other in line), initial=job.left))
    steps = [0, *(other.steps for other in line)]

    def decoded(stepped: list[float], jobs: Iterable[Job]) -> list[float]:
        """Completion times, from the times of the last steps: adds the decode bound for all rows ahead."""
        if costs.decoding is None:
            return stepped
        images = accumulate((other.undecoded for other in line), initial=job.undecoded)
        return [
            (time if one.left else start) + bounds.decoded(one, n)
            for time, one, n in zip(stepped, jobs, images, strict=False)
        ]

    left = spare(line, costs, start)
    enough = min(-_ROUNDING, max(left))  # if neither plan keeps all promises, follow the closer one
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
        line: the other jobs.
        own: own[i] is when the job is done, behind the first i other jobs.
        theirs: theirs[i], from 1 on, is when other job number i is done, if the job goes ahead of it.
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
