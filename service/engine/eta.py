"""When a job is expected to be done: what is ahead of it, and what is likely to overtake it. Pure Python."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from service.engine.arrivals import Arrivals
from service.engine.costs import Costs
from service.engine.jobs import Job
from service.engine.scheduler import Scheduler

_LOOKED_AT = 32  # jobs ahead, and as many behind; of those before them only the sum counts
_NOTHING = 1e-6  # forward rows
_MOST = 0.9  # of the time that overtaking is believed to take


def eta(job: Job, scheduler: Scheduler, arrivals: Arrivals, now: float) -> float:
    """The expected seconds until a job in line is done.

    The passes to come are played through, from one group's end to the next, the least work first. Each stage is longer
    by what arrives meanwhile and goes ahead: with a load r of jobs that have less work, it takes 1/(1 - r) of the time
    (L. E. Schrage and L. W. Miller, "The queue M/G/1 with the shortest remaining processing time discipline", 1966).
    """
    costs, line = scheduler.costs, scheduler.by_work
    rate = arrivals.rates(now)

    def lengthened(seconds: float, work: float) -> float:
        """By what is expected to go ahead of a job with so much work."""
        return seconds / (1 - min(_MOST, rate(work) * costs.seconds_per_row))

    # Whatever is decoded takes its time from passes, or passes take theirs from it.
    seconds = max(0.0, scheduler.busy_until - now) + _decode_s(scheduler.decoding, costs)
    place = scheduler.ahead_of(job)
    if place > _LOOKED_AT:
        work = sum(other.left for other in line[: place - _LOOKED_AT])
        seconds += lengthened(work * costs.seconds_per_row, job.left)
    groups: list[_Group] = []  # those that may run in the next pass, in the order of the line
    behind = _groups(line[max(0, place - _LOOKED_AT) : place + 1 + _LOOKED_AT])
    its_groups = len(job.groups) if job in line[place : place + 1] else 0  # one that has left waits for no pass
    its_work = float(job.left)
    while its_groups:
        rows = _pass(groups, behind, scheduler)
        passes = min(group.left / n for group, n in zip(groups, rows, strict=False))
        of_it = sum(n for group, n in zip(groups, rows, strict=False) if group.job.job is job)
        seconds += lengthened(passes * costs.seconds(sum(rows)), its_work - passes * of_it / 2)
        its_work -= passes * of_it
        for group, n in zip(groups, rows, strict=False):
            group.left -= passes * n
            group.job.left -= passes * n
        ended = [group for group in groups if group.left <= _NOTHING]
        seconds += _decode_s(sum(group.images for group in ended if group.job.job.undecoded), costs)
        its_groups -= sum(group.job.job is job for group in ended)
        groups = [group for group in groups if group.left > _NOTHING]
    return max(0.0, min(seconds, job.promise - now))


@dataclass(slots=True)
class _Ahead:
    """A job, and the forward rows that it has left."""

    job: Job
    left: float


@dataclass(slots=True)
class _Group:
    """Images of a job that step together, and how many of their forward rows are left."""

    job: _Ahead
    images: int
    at_once: int
    left: float


def _decode_s(images: int, costs: Costs) -> float:
    """The expected seconds to decode so many images that wait together."""
    return 0.0 if costs.decoding is None else costs.decoding.rounds(images) * costs.decoding.speed


def _groups(line: Iterable[Job]) -> Iterator[_Group]:
    """Those of the jobs in line, each made when it is asked for: most forecasts end before the last."""
    for job in line:
        ahead = _Ahead(job, float(job.left))
        for images, at_once, left in job.groups:
            yield _Group(ahead, images, at_once, float(left))


def _pass(groups: list[_Group], behind: Iterator[_Group], scheduler: Scheduler) -> list[int]:
    """The forward rows of a pass, of the first groups in line. More groups come from behind as there is room."""
    rows: list[int] = []
    total, limit = 0, scheduler.costs.width
    while True:
        if len(rows) == len(groups):
            if (following := next(behind, None)) is None:
                break
            groups.append(following)
        group = groups[len(rows)]
        if total:
            limit = scheduler.limit(limit, total, groups[0].job.left, group.job.left)
        if total >= limit:
            break
        rows.append(min(limit - total, group.at_once))
        total += rows[-1]
    return rows
