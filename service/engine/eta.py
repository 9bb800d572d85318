"""Estimates when a job will be done, from the jobs ahead and the jobs that are likely to overtake. Pure Python.

`outlook` quickly copies the state behind an estimate, under the queue's lock. `Outlook.eta` computes the estimate
without a lock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf

from service.engine.arrivals import Arrivals
from service.engine.choosing import pace_limit
from service.engine.costs import Costs
from service.engine.jobs import Job, Rest
from service.engine.scheduler import Scheduler
from service.engine.turns import waits_for

_LOOKED_AT = 32  # jobs ahead, and as many behind; only the sum of the jobs before these counts
_NOTHING = 1e-6  # forward rows
_MOST = 0.9  # the largest share of time that overtaking jobs are assumed to take


@dataclass(slots=True)
class _Wave:
    """Rows of a job that step together, and the number of their forward rows left.

    Attributes:
        job: the job's index in the line.
        costs: of its passes.
    """

    job: int
    costs: Costs
    rows: int
    at_once: int
    left: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """The state behind a job's estimate, at one time.

    Attributes:
        place: of the job in `line`; None if the job has no steps left.
        line: the jobs around it, those with the least work first.
        ahead_s: seconds of passes of the jobs before `line`, at speed 1.
        before_s: seconds until its rows can run or be decoded, if they wait: to encode all texts and uploads.
        decode_s: seconds to decode the rows that have taken their steps.
        checking_s: seconds to check the finished images that wait for that, of all jobs.
        check_s: seconds to check the job's images that are not finished yet.
        ready_s: seconds to encode the finished images that wait for the answer's stage, of all jobs.
        answer_s: seconds of the pieces of the job's answer that are not ready yet.
        busy_s: seconds until the end of the present pass.
        at_most_s: seconds until the job's promise.
        few: whether the queue is so short that short jobs keep their pace.
        costs: of the job's passes. They may change while an estimate reads them. The estimate then mixes two states.
        rate: a function from a size to the seconds of work a second that arrive in smaller jobs.
        behind: the outlook of the last job ahead for which pieces of this one wait at a stage, without its own waits;
            None if they need not wait.
        then_s: seconds of the job's stages after that wait.
    """

    place: int | None
    line: list[Rest]
    ahead_s: float
    before_s: float
    decode_s: float
    checking_s: float
    check_s: float
    ready_s: float
    answer_s: float
    busy_s: float
    at_most_s: float
    few: bool
    costs: Costs
    rate: Callable[[float], float]
    behind: "Outlook | None" = None
    then_s: float = 0.0

    def eta(self) -> float:
        """The expected seconds until the job is done.

        The estimate simulates the coming passes, the least work first, from the end of one wave to the next. New
        jobs with less work overtake, and lengthen each stretch. At a load r of such jobs, a stretch takes 1/(1 − r)
        times as long (L. E. Schrage and L. W. Miller, "The queue M/G/1 with the shortest remaining processing time
        discipline", 1966).
        """
        # Decoding takes time from passes, and passes take time from decoding.
        seconds = self.busy_s + self.decode_s + self.before_s
        if self.place is None:
            seconds += self.checking_s + self.check_s + self.ready_s + self.answer_s
        else:
            work = self.line[self.place].left * self.costs.row
            seconds += self._lengthened(self.ahead_s * self.costs.speed, work)
            seconds = self._play(self.place, seconds)
        if self.behind is not None:
            seconds = max(seconds, self.behind.eta() + self.then_s)
        return max(0.0, min(seconds, self.at_most_s))

    def _play(self, place: int, seconds: float) -> float:
        """The seconds until the job is done, if passes begin at `seconds`, with the stages of waves that end before."""
        line = self.line
        left: list[float] = [job.left for job in line]
        waves_left = [len(job.waves) for job in line]
        its_work, row = left[place] * self.costs.row, self.costs.row
        waves: list[_Wave] = []  # may run in the next pass, in the order of the queue
        behind = (  # lazy: most estimates end before the last wave
            _Wave(index, job.costs, *wave) for index, job in enumerate(line) for wave in job.waves
        )
        checked, answered = self.checking_s, self.ready_s
        while waves_left[place]:
            chosen = self._pass(waves, left, behind)
            costs = chosen[0][0].costs
            passes = min(wave.left / n for wave, n in chosen)
            of_it = row * sum(n for wave, n in chosen if wave.job == place)
            taken = passes * costs.seconds(sum(n for _, n in chosen))
            seconds += self._lengthened(taken, its_work - passes * of_it / 2)
            its_work -= passes * of_it
            for wave, n in chosen:
                wave.left -= passes * n
                left[wave.job] -= passes * n
            ended = [wave for wave, _ in chosen if wave.left <= _NOTHING]
            waves = [wave for wave in waves if wave.left > _NOTHING]
            decoded = [(line[wave.job].decode, wave.rows) for wave in ended if line[wave.job].decode is not None]
            seconds += _decode_s(decoded[0][0], sum(rows for _, rows in decoded)) if decoded else 0.0
            for wave in ended:
                job = line[wave.job]
                waves_left[wave.job] -= 1
                if job.check is None:
                    answered = max(answered, seconds) + wave.rows * job.image_s
                else:  # the pieces of the answer follow each other, or each waits for the check of its image
                    check_s = job.check.seconds(1)
                    first = max(checked, seconds) + check_s
                    checked = first + (wave.rows - 1) * check_s
                    answered = max(max(answered, first) + wave.rows * job.image_s, checked + job.image_s)
                answered += 0.0 if waves_left[wave.job] else job.whole_s
                if wave.job == place and not waves_left[place]:
                    return max(seconds, answered)
        return seconds

    def _lengthened(self, seconds: float, work: float) -> float:
        """The seconds with the expected overtaking of a job with so much work."""
        return seconds / (1 - min(_MOST, self.rate(work) * self.costs.speed))

    def _pass(self, waves: list[_Wave], left: list[float], behind: Iterator[_Wave]) -> list[tuple[_Wave, int]]:
        """The waves of a pass with their forward rows. While the pass has room, more waves join from `behind`."""
        chosen: list[tuple[_Wave, int]] = []
        total = looked = 0
        while True:
            if looked == len(waves):
                if (following := next(behind, None)) is None:
                    break
                waves.append(following)
            wave = waves[looked]
            looked += 1
            if not chosen:
                first, costs, limit = wave.job, wave.costs, wave.costs.width
            elif wave.costs is not costs:
                continue
            elif self.few:
                limit = pace_limit(costs, limit, total, left[first], left[wave.job])
            if total >= limit:
                break
            chosen.append((wave, min(limit - total, wave.at_once)))
            total += chosen[-1][1]
        return chosen


def _decode_s(decode: Costs | None, rows: int) -> float:
    """The expected seconds to decode rows that wait together."""
    return 0.0 if decode is None else decode.rounds(rows) * decode.speed


def outlook(job: Job, scheduler: Scheduler, arrivals: Arrivals, now: float, promise: float) -> Outlook:
    """The state behind the estimate of a job. The job is in the queue, or about to enter with this promise."""
    own, ahead = _outlook(job, scheduler, arrivals, now, promise), waits_for(scheduler.by_promise, job)
    if ahead is None:
        return own
    behind, machine = _outlook(ahead, scheduler, arrivals, now, ahead.promise), scheduler.machine
    then_s = job.answer_s
    if job.unchecked and max(job.behind.decode, job.behind.check) > -inf:
        then_s += job.unchecked * machine.check[job.group].seconds(1)
    if job.undecoded and job.behind.decode > -inf:
        then_s += _decode_s(machine.decode[job.group], job.undecoded)
    return replace(own, behind=behind, then_s=then_s)


def _outlook(job: Job, scheduler: Scheduler, arrivals: Arrivals, now: float, promise: float) -> Outlook:
    """The same without the waits at stages for jobs ahead."""
    by_work, work, machine = scheduler.by_work, scheduler.work, scheduler.machine
    place = scheduler.ahead_of(job)
    first = max(0, place - _LOOKED_AT)
    is_in_line = place < len(by_work) and by_work[place] is job
    behind = by_work[place + is_in_line : place + 1 + _LOOKED_AT]
    own = [job] if job.left else []
    around = [*by_work[first:place], *own, *behind]
    is_new = job.number == inf
    before_s = 0.0
    if job.waits:
        uploads, texts = work.uploads.copy(), work.texts
        if is_new:
            uploads[job.group] += job.uploads
            texts += job.texts
        before_s = sum(n * machine.encode[group].seconds(1) for group, n in uploads.items() if n)
        before_s += 0.0 if machine.text is None else texts * machine.text.seconds(1)
    decoding = work.decoding.copy()
    if job.undecoded and not job.left and (is_new or job.encoding):  # its rows have no steps, and do not wait yet
        decoding[job.group] += job.undecoded
    checking = 0 if is_new else job.checking
    pieces, values = (0, 0) if is_new else job.ready
    return Outlook(
        place - first if own else None,
        [other.rest for other in around],
        sum(other.work for other in by_work[:first]),
        before_s,
        sum(_decode_s(machine.decode[group], n) for group, n in decoding.items() if n),
        sum(n * machine.check[group].seconds(1) for group, n in work.checking.items() if n),
        (job.unchecked - checking) * machine.check[job.group].seconds(1) if job.unchecked else 0.0,
        machine.answer.seconds(work.ready_values, work.ready_pieces),
        max(0.0, job.answer_s - machine.answer.seconds(values, pieces)) if job.unanswered else 0.0,
        max(0.0, scheduler.busy_until - now),
        promise - now,
        scheduler.keeps_pace,
        job.costs,
        arrivals.rates(now),
    )
