"""When a job is expected to be done: what is ahead of it, and what is likely to overtake it. Pure Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.arrivals import Arrivals
from service.jobs import Job
from service.scheduler import Scheduler

_LOOKED_AT = 32  # jobs ahead, and as many behind; of those before them only the sum counts
_NOTHING = 1e-6  # forward rows
_MOST = 0.9  # of the time that overtaking is believed to take


def eta(job: Job, scheduler: Scheduler, arrivals: Arrivals, now: float) -> float:
    """The expected seconds until a job in line is done.

    The passes to come are played through, from one group's end to the next, the least work first. Each stage is longer
    by what arrives meanwhile and goes ahead: with a load r of jobs that have less work, it takes 1/(1 - r) of the time
    (L. E. Schrage and L. W. Miller, "The queue M/G/1 with the shortest remaining processing time discipline", 1966).
    """
    costs = scheduler.costs
    line = scheduler.by_work
    seconds = max(0.0, scheduler.busy_until - now)
    place = scheduler.ahead_of(job)
    if place > _LOOKED_AT:
        work = sum(other.left for other in line[: place - _LOOKED_AT]) * costs.seconds_per_row
        seconds += work / (1 - _overtaking(job.left, scheduler, arrivals, now))
    line = line[max(0, place - _LOOKED_AT) : place + 1 + _LOOKED_AT]
    left = {other: float(other.left) for other in line}
    groups = [_Group(other, at_once, float(rows)) for other in line for at_once, rows in other.groups]
    while any(group.job is job for group in groups):
        rows = _pass(groups, left, scheduler)
        passes = min(group.left / n for group, n in rows.items())
        halfway = left[job] - passes * sum(n for group, n in rows.items() if group.job is job) / 2
        stage = passes * costs.seconds(sum(rows.values()))
        seconds += stage / (1 - _overtaking(halfway, scheduler, arrivals, now))
        for group, n in rows.items():
            group.left -= passes * n
            left[group.job] -= passes * n
        groups = [group for group in rows if group.left > _NOTHING] + groups[len(rows) :]
    return max(0.0, min(seconds, job.promise - now))


@dataclass(eq=False, slots=True)
class _Group:
    """Images of a job that step together, and how many of their forward rows are left."""

    job: Job
    at_once: int
    left: float


def _pass(groups: Sequence[_Group], left: Mapping[Job, float], scheduler: Scheduler) -> dict[_Group, int]:
    """The forward rows of a pass, of groups in the order of the line, whose jobs have so much work left."""
    rows: dict[_Group, int] = {}
    total, limit = 0, scheduler.costs.width
    least = left[groups[0].job]
    for group in groups:
        if total:
            limit = scheduler.limit(limit, total, least, left[group.job])
        if total >= limit:
            break
        rows[group] = min(limit - total, group.at_once)
        total += rows[group]
    return rows


def _overtaking(work: float, scheduler: Scheduler, arrivals: Arrivals, now: float) -> float:
    """The share of the time that jobs which are yet to come, with less work, are expected to take."""
    return min(_MOST, arrivals.rate(work, now) * scheduler.costs.seconds_per_row)
