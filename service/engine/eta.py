"""Estimates when a job will be done, from the jobs ahead and the jobs that are likely to overtake. Pure Python.

`outlook` quickly copies the state behind an estimate, under the queue's lock. `Outlook.eta` computes the estimate
without a lock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.engine.arrivals import Arrivals
from service.engine.costs import Costs
from service.engine.jobs import Job, Rest
from service.engine.scheduler import Scheduler, pace_limit

_LOOKED_AT = 32  # jobs ahead, and as many behind; only the sum of the jobs before these counts
_NOTHING = 1e-6  # forward rows
_MOST = 0.9  # the largest share of time that overtaking jobs are assumed to take


@dataclass(slots=True)
class _Group:
    """Rows of a job that step together, and the number of their forward rows left.

    Attributes:
        job: the job's index in the line.
    """

    job: int
    rows: int
    at_once: int
    left: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """The state behind a job's estimate, at one time.

    Attributes:
        place: of the job in `line`; None if the job has no steps left.
        line: the jobs around it, those with the least work first.
        ahead: forward rows of the jobs before `line`.
        decoding: rows that have taken their steps and are not decoded yet.
        busy_s: seconds until the end of the present pass.
        at_most_s: seconds until the job's promise.
        few: whether the queue is so short that short jobs keep their pace.
        costs: of passes. They may change while an estimate reads them. The estimate then mixes two states.
        rate: a function from a size to the forward rows a second that arrive in smaller jobs.
    """

    place: int | None
    line: list[Rest]
    ahead: int
    decoding: int
    busy_s: float
    at_most_s: float
    few: bool
    costs: Costs
    rate: Callable[[float], float]

    def eta(self) -> float:
        """The expected seconds until the job is done.

        The estimate simulates the coming passes, the least work first, from the end of one group to the next. New
        jobs with less work overtake, and lengthen each stretch. At a load r of such jobs, a stretch takes 1/(1 − r)
        times as long (L. E. Schrage and L. W. Miller, "The queue M/G/1 with the shortest remaining processing time
        discipline", 1966).
        """
        # Decoding takes time from passes, and passes take time from decoding.
        seconds = self.busy_s + self._decode_s(self.decoding)
        if self.place is not None:
            seconds += self._lengthened(self.ahead * self.costs.seconds_per_row, self.line[self.place].left)
            seconds += self._play(self.place)
        return max(0.0, min(seconds, self.at_most_s))

    def _play(self, place: int) -> float:
        """The seconds until the job's last group has taken its steps, with the decoding of groups that end by then."""
        line = self.line
        left: list[float] = [job.left for job in line]
        its_groups, its_work = len(line[place].groups), left[place]
        groups: list[_Group] = []  # may run in the next pass, in the order of the queue
        behind = (  # lazy: most estimates end before the last group
            _Group(index, *group) for index, job in enumerate(line) for group in job.groups
        )
        seconds = 0.0
        while its_groups:
            rows = self._pass(groups, left, behind)
            passes = min(group.left / n for group, n in zip(groups, rows, strict=False))
            of_it = sum(n for group, n in zip(groups, rows, strict=False) if group.job == place)
            seconds += self._lengthened(passes * self.costs.seconds(sum(rows)), its_work - passes * of_it / 2)
            its_work -= passes * of_it
            for group, n in zip(groups, rows, strict=False):
                group.left -= passes * n
                left[group.job] -= passes * n
            ended = [group for group in groups if group.left <= _NOTHING]
            seconds += self._decode_s(sum(group.rows for group in ended if line[group.job].is_decoded))
            its_groups -= sum(group.job == place for group in ended)
            groups = [group for group in groups if group.left > _NOTHING]
        return seconds

    def _lengthened(self, seconds: float, work: float) -> float:
        """The seconds with the expected overtaking of a job with so much work."""
        return seconds / (1 - min(_MOST, self.rate(work) * self.costs.seconds_per_row))

    def _decode_s(self, rows: int) -> float:
        """The expected seconds to decode `rows` rows that wait together."""
        decoding = self.costs.decoding
        return 0.0 if decoding is None else decoding.rounds(rows) * decoding.speed

    def _pass(self, groups: list[_Group], left: list[float], behind: Iterator[_Group]) -> list[int]:
        """The forward rows of each group in a pass. While the pass has room, more groups join from `behind`."""
        rows: list[int] = []
        total, limit = 0, self.costs.width
        while True:
            if len(rows) == len(groups):
                if (following := next(behind, None)) is None:
                    break
                groups.append(following)
            group = groups[len(rows)]
            if total and self.few:
                limit = pace_limit(self.costs, limit, total, left[groups[0].job], left[group.job])
            if total >= limit:
                break
            rows.append(min(limit - total, group.at_once))
            total += rows[-1]
        return rows


def outlook(job: Job, scheduler: Scheduler, arrivals: Arrivals, now: float, promise: float) -> Outlook:
    """The state behind the estimate of a job. The job is in the queue, or about to enter with this promise."""
    by_work = scheduler.by_work
    place = scheduler.ahead_of(job)
    first = max(0, place - _LOOKED_AT)
    is_in_line = place < len(by_work) and by_work[place] is job
    behind = by_work[place + is_in_line : place + 1 + _LOOKED_AT]
    own = [job] if job.left else []
    around = [*by_work[first:place], *own, *behind]
    return Outlook(
        place - first if own else None,
        [other.rest for other in around],
        sum(other.left for other in by_work[:first]),
        scheduler.decoding,
        max(0.0, scheduler.busy_until - now),
        promise - now,
        scheduler.keeps_pace,
        scheduler.costs,
        arrivals.rates(now),
    )
