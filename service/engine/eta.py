"""When a job is expected to be done: what is ahead of it, and what is likely to overtake it. Pure Python.

`outlook` copies what an estimate depends on, and is quick: whoever holds the line's lock may call it. `Outlook.eta`
computes the estimate, and needs no lock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from service.engine.arrivals import Arrivals
from service.engine.costs import Costs
from service.engine.jobs import Job
from service.engine.scheduler import Scheduler, pace_limit

_LOOKED_AT = 32  # jobs ahead, and as many behind; of those before them only the sum counts
_NOTHING = 1e-6  # forward rows
_MOST = 0.9  # of the time that overtaking is believed to take


class _Job(NamedTuple):
    """What an estimate depends on of a job: the forward rows left, whether it is decoded, and its groups."""

    left: int
    is_decoded: bool
    groups: list[tuple[int, int, int]]


@dataclass(slots=True)
class _Ahead:
    """A job while an estimate plays its passes through."""

    left: float
    is_decoded: bool


@dataclass(slots=True)
class _Group:
    """Rows of a job that step together, and how many of their forward rows are left."""

    job: _Ahead
    rows: int
    at_once: int
    left: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an estimate for a job depends on, at one time.

    Attributes:
        place: of the job in `line`; None where it has no steps left.
        line: the jobs around it, those with the least left first.
        ahead: forward rows of the jobs before those.
        busy_s: seconds until the present pass has ended.
        at_most_s: seconds until the job's promise.
        few: whether so few jobs are in line that a short one keeps its pace.
        costs: of passes. They are read, and may change meanwhile: the estimate then mixes two states.
        rate: the forward rows a second that arrive in jobs smaller than a size.
    """

    place: int | None
    line: list[_Job]
    ahead: int
    decoding: int
    busy_s: float
    at_most_s: float
    few: bool
    costs: Costs
    rate: Callable[[float], float]

    def eta(self) -> float:
        """The expected seconds until the job is done.

        The passes to come are played through, from one group's end to the next, the least work first. Each stretch is
        longer by what arrives meanwhile and goes ahead: with a load r of jobs that have less work, it takes 1/(1 − r)
        of the time (L. E. Schrage and L. W. Miller, "The queue M/G/1 with the shortest remaining processing time
        discipline", 1966).
        """
        # Decoding takes time from passes, and passes take time from decoding.
        seconds = self.busy_s + self._decode_s(self.decoding)
        if self.place is not None:
            seconds += self._lengthened(self.ahead * self.costs.seconds_per_row, self.line[self.place].left)
            seconds += self._play(self.place)
        return max(0.0, min(seconds, self.at_most_s))

    def _play(self, place: int) -> float:
        """The seconds until the last group of a job has no steps left, and what ended before it is decoded."""
        line = [_Ahead(job.left, job.is_decoded) for job in self.line]
        job, its_groups, its_work = line[place], len(self.line[place].groups), line[place].left
        groups: list[_Group] = []  # those that may run in the next pass, in the order of the line
        behind = (  # each is made when it is asked for: most estimates end before the last
            _Group(ahead, rows, at_once, left)
            for ahead, entry in zip(line, self.line, strict=True)
            for rows, at_once, left in entry.groups
        )
        seconds = 0.0
        while its_groups:
            rows = self._pass(groups, behind)
            passes = min(group.left / n for group, n in zip(groups, rows, strict=False))
            of_it = sum(n for group, n in zip(groups, rows, strict=False) if group.job is job)
            seconds += self._lengthened(passes * self.costs.seconds(sum(rows)), its_work - passes * of_it / 2)
            its_work -= passes * of_it
            for group, n in zip(groups, rows, strict=False):
                group.left -= passes * n
                group.job.left -= passes * n
            ended = [group for group in groups if group.left <= _NOTHING]
            seconds += self._decode_s(sum(group.rows for group in ended if group.job.is_decoded))
            its_groups -= sum(group.job is job for group in ended)
            groups = [group for group in groups if group.left > _NOTHING]
        return seconds

    def _lengthened(self, seconds: float, work: float) -> float:
        """By what is expected to go ahead of a job with so much work."""
        return seconds / (1 - min(_MOST, self.rate(work) * self.costs.seconds_per_row))

    def _decode_s(self, rows: int) -> float:
        """The expected seconds to decode so many rows that wait together."""
        decoding = self.costs.decoding
        return 0.0 if decoding is None else decoding.rounds(rows) * decoding.speed

    def _pass(self, groups: list[_Group], behind: Iterator[_Group]) -> list[int]:
        """The forward rows of a pass, by the first groups in line. More groups come from behind as there is room."""
        rows: list[int] = []
        total, limit = 0, self.costs.width
        while True:
            if len(rows) == len(groups):
                if (following := next(behind, None)) is None:
                    break
                groups.append(following)
            group = groups[len(rows)]
            if total and self.few:
                limit = pace_limit(self.costs, limit, total, groups[0].job.left, group.job.left)
            if total >= limit:
                break
            rows.append(min(limit - total, group.at_once))
            total += rows[-1]
        return rows


def outlook(job: Job, scheduler: Scheduler, arrivals: Arrivals, now: float, promise: float) -> Outlook:
    """What an estimate depends on, for a job with a promise that is in line, or is to come into it."""
    by_work = scheduler.by_work
    place = scheduler.ahead_of(job)
    first = max(0, place - _LOOKED_AT)
    is_in_line = place < len(by_work) and by_work[place] is job
    behind = by_work[place + is_in_line : place + 1 + _LOOKED_AT]
    own = [job] if job.left else []
    around = [*by_work[first:place], *own, *behind]
    return Outlook(
        place - first if own else None,
        [_Job(other.left, bool(other.undecoded), other.groups) for other in around],
        sum(other.left for other in by_work[:first]),
        scheduler.decoding,
        max(0.0, scheduler.busy_until - now),
        promise - now,
        scheduler.keeps_pace,
        scheduler.costs,
        arrivals.rates(now),
    )
