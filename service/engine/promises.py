"""Promises: the time by which a job will be done, whatever arrives later. Pure Python.

A promise is one that a plan keeps, by the bounds of bounds.py. No job is refused because a piece of its work is large.
Where a job ahead has no room for the piece, the piece waits for that job, and the promise counts the wait.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple

from service.engine.bounds import MARGIN, ROUNDING, Bounds, Look, look
from service.engine.costs import Machine
from service.engine.jobs import Job
from service.engine.outstanding import Busy, Outstanding
from service.engine.room import longer
from service.engine.stage_work import Behind, Blocks

PATIENCE = 2.0  # times the seconds of the job and the work ahead in full passes
_LAST_DIGIT = 1e-12  # seconds; the order in which a sum is added up may make this difference
_NO_ROOM = Blocks()
_NOBODY = (-1, -1, -1, -1)
SHORTEST = 0.25  # seconds; the operating system's delays could break a shorter promise


def patient(job: Job, ahead: Outstanding, machine: Machine) -> float:
    """The seconds of a patient promise: a multiple of the time of the job and the work ahead in full passes."""
    bounds = Bounds(machine)
    own = job.costs
    seconds = bounds.rows[own] * job.left + bounds.steps[own] * job.steps
    seconds += sum(bounds.rows[machine.passes[group]] * n for group, n in ahead.forwards.items())
    if job.undecoded:
        decode = bounds.images[own]
        seconds += decode.image * (job.undecoded - 1) + decode.full
        block = decode.full
        for group, n in ahead.images.items():
            theirs = machine.passes[group]
            if n:
                block = max(block, bounds.images[theirs].full)
                seconds += n * bounds.images[theirs].image
        seconds += block
    if job.unchecked:
        seconds += bounds.check * (job.check_s + ahead.check_s)
    if job.unanswered:
        seconds += bounds.answer * (job.answer_s + ahead.answer_s)
    if job.encoding:
        seconds += bounds.encode * (job.encode_s + ahead.encode_s)
    return max(SHORTEST, PATIENCE * seconds / (1 + MARGIN))


def seconds_alone(job: Job, machine: Machine) -> float:
    """The seconds of the earliest promise on an idle server."""
    return earliest(job, [], machine, 0.0, 0.0)


def earliest(
    job: Job,
    line: Sequence[Job],
    machine: Machine,
    start: float,
    wanted: float,
    busy: Busy | None = None,
    now: float | None = None,
    room: Blocks = _NO_ROOM,
) -> float:
    """The earliest promise, at or after `wanted`, with which some plan keeps this and every other promise.

    Sets the job's `free_by`, `blocks`, `behind` and `done_by`, which belong to the promise.

    Args:
        job: not in the queue yet.
        line: the jobs with promises, in the order of promises.
        machine: what work costs.
        start: when the next pass can begin.
        wanted: a time.
        busy: what the stages have under way.
        now: the time; `start` if not given.
        room: for pieces of later jobs. Pieces of a later job that are no larger need not wait for this job.
    """
    bounds = Bounds(machine)
    seen = look(line, bounds, start, job.costs)
    now, busy = start if now is None else now, Busy() if busy is None else busy
    new = _New(job, line, bounds, seen, start, now, busy, room)
    enough = min(-ROUNDING, max(seen.spare))  # if neither plan keeps all promises, follow the closer one
    plans = [plan for plan, left in enumerate(seen.spare) if left >= enough]
    promise, place, plan = min((*new.place(plan, wanted), plan) for plan in plans)
    new.settle(place, plan)
    return promise


class _Ahead(NamedTuple):
    """The jobs ahead that have no room for the pieces of a new job, in a plan.

    Attributes:
        last: for each place in line, the index of the last of these jobs, −1 without any: for the new job's passes, its
            decoding, its checks and its answer.
        done: for each job in line, the time by which this job and those ahead of it are done.
    """

    last: Sequence[tuple[int, ...]]
    done: list[float]


class _New:
    """A new job beside a line of others: what it is promised at each place, and what it takes from the others.

    A plan is an index: 0 is `alone`, 1 is `together`.
    """

    def __init__(
        self,
        job: Job,
        line: Sequence[Job],
        bounds: Bounds,
        seen: Look,
        start: float,
        now: float,
        busy: Busy,
        room: Blocks,
    ) -> None:
        self._job, self._line, self._bounds, self._seen = job, line, bounds, seen
        self._start, self._now, self._busy, self._room = start, now, busy, room
        self._rows, self._steps = bounds.filling(job)
        self._blocks = job.own_blocks
        self._alone = bounds.unit * job.seconds
        _, decode, check, answer = self._blocks
        self._larger = {  # the jobs that may have to wait longer, for a piece of this one or behind others
            i
            for i, other in enumerate(line)
            if other.waits
            or other.done_by > -inf
            or (blocks := other.blocks).answer < answer
            or blocks.check < check
            or blocks.decode < decode
        }
        self._may_wait = job.encoding or any(line[i].waits for i in self._larger)  # its rows
        self._sum_stages()
        self._largest = self._largest_batches()
        self._ahead = [self._without_room(plan) for plan in (0, 1)]

    def place(self, plan: int, wanted: float) -> tuple[float, int]:
        """The earliest promise at or after `wanted`, and the job's place in line."""
        job, line, own = self._job, self._line, self._job.costs
        left, most, larger = self._seen.left[plan], self._seen.most, self._larger
        passes, steps = (self._alone, 0.0) if plan == 0 else (self._rows, self._steps)
        encodes, checks = self._bounds.encode * job.encode_s, self._bounds.check * job.check_s
        answers = self._bounds.answer * job.answer_s
        decodes = job.undecoded * self._bounds.images[own].image if job.undecoded else 0.0
        may_wait = job.encoding or self._ahead[plan].last[-1][0] >= 0
        i = len(line)
        while i > 0:  # past up to a thousand jobs
            other = line[i - 1]
            if other.promise <= wanted:
                break
            takes = 0.0
            if other.left:
                takes = passes
                if steps and other.costs is not own:
                    takes += steps if may_wait else max(0.0, steps - most[i])
            if checks and other.unchecked:
                takes += checks
            if answers and other.unanswered:
                takes += answers
            if decodes and other.undecoded:
                takes += decodes
            if encodes and other.waits:
                takes += encodes
            has = left[i - 1]
            if i - 1 in larger:
                takes += self._longer(other, is_ahead=False)
                has = min(has, other.promise - other.done_by)
            if takes > has + _LAST_DIGIT:
                break
            i -= 1
        promise = max(wanted, self._bound(i, plan), line[i - 1].promise if i > 0 else -inf)
        while i < len(line) and promise >= line[i].promise:
            i += 1
            promise = max(promise, self._bound(i, plan))
        return promise, i

    def settle(self, place: int, plan: int) -> None:
        """Give the job what belongs to its promise."""
        job, line, last = self._job, self._line, self._ahead[plan].last[place]
        job.wait_behind(Behind(*(line[i].promise if i >= 0 else -inf for i in last)))
        job.free_by, job.blocks = self._free_by(place, plan), self._blocks_at(place)
        job.done_by = self._done_by(place, plan)

    def _free_by(self, place: int, plan: int) -> float:
        """The time by which the job's rows can run."""
        job, bounds = self._job, self._bounds
        until = place if job.encoding else self._ahead[plan].last[place][0] + 1  # whose texts and uploads go first
        if not job.encoding and not until:
            return self._start if job.left else self._now
        encode_s = self._encodes[until] + job.encode_s + self._busy.other_s("encode", self._line[:until])
        encoded = self._now + bounds.encode * encode_s
        return max(self._start, encoded + bounds.unit * self._largest[0]) if job.left else encoded

    def _blocks_at(self, place: int) -> Blocks:
        """What may be under way of others when the job gets to its stages."""
        a_pass, decode = self._largest
        # A piece like the job's own counts in any case. So later jobs with pieces no larger take nothing from this job.
        job, own, room = self._job, self._blocks, self._room
        check = max(own.check, room.check, self._check_pieces[place]) if job.unchecked else 0.0
        answer = max(own.answer, room.answer, self._answer_pieces[place]) if job.unanswered else 0.0
        return Blocks(a_pass, decode, check, answer)

    def _largest_batches(self) -> tuple[float, float]:
        """The seconds of the largest full pass of a group in line, and of the largest batch of decoding."""
        job, line, room = self._job, self._line, self._room
        a_pass, decode = self._blocks.a_pass, self._blocks.decode
        if job.left and self._may_wait:
            present = {other.costs for other in line if other.left}
            a_pass = max([a_pass, room.a_pass, *(costs.ceilings[costs.width] for costs in present)])
        if job.undecoded:
            others = {other.costs: other for other in line if other.undecoded}
            pieces = (one.own_blocks.decode for one in others.values())
            decode = max([decode, room.decode, self._busy.orphan_s("decode"), *pieces])
        return a_pass, decode

    def _bound(self, place: int, plan: int) -> float:
        """The time by which a plan is done with the job at a place in line."""
        job, seen = self._job, self._seen
        time = self._free_by(place, plan)
        if job.left and plan == 0:
            time += seen.alone[place] + self._alone
        elif job.left:
            time += seen.others[place] + self._rows + self._steps
        return max(time + self._stages(place), self._done_by(place, plan))

    def _done_by(self, place: int, plan: int) -> float:
        """The time by which the job is done if its pieces wait for jobs ahead; −∞ if they need not."""
        ahead = self._ahead[plan]
        _, *waits = ahead.last[place]
        times = (ahead.done[i] + self._stages(place, i + 1, n) for n, i in enumerate(waits) if i >= 0)
        return max(times, default=-inf)

    def _stages(self, place: int, since: int = 0, first: int = 0) -> float:
        """The bound of the stages after passes, from number `first` on, behind the jobs from `since` to `place`."""
        job, bounds, blocks = self._job, self._bounds, self._blocks_at(place)
        time = 0.0
        if job.undecoded and first == 0:
            images = bounds.images[job.costs]
            time += self._decode[place] - self._decode[since] + images.image * (job.undecoded - 1) + images.full
            time += bounds.decode * blocks.decode
        if job.unchecked and first <= 1:
            time += bounds.check * (self._checks[place] - self._checks[since] + job.check_s + blocks.check)
        if job.unanswered:
            time += bounds.answer * (self._answers[place] - self._answers[since] + job.answer_s + blocks.answer)
        return time

    def _sum_stages(self) -> None:
        """For each place: the bound of decoding for the jobs ahead, and the seconds of their other stages."""
        job, bounds, line = self._job, self._bounds, self._line
        if job.undecoded:
            image = {costs: images.image for costs, images in bounds.images.items()}
            self._decode = list(accumulate((other.undecoded * image[other.costs] for other in line), initial=0.0))
        if job.unchecked:
            self._checks = list(accumulate((other.check_s for other in line), initial=0.0))
            self._check_pieces = _largest([other.a_check_s for other in line], self._busy.orphan_s("check"))
        if job.unanswered:
            self._answers = list(accumulate((other.answer_s for other in line), initial=0.0))
            self._answer_pieces = _largest([other.piece_s for other in line], self._busy.orphan_s("answer"))
        if self._may_wait:
            self._encodes = list(accumulate((other.encode_s for other in line), initial=0.0))

    def _without_room(self, plan: int) -> _Ahead:
        """The jobs that have no room for pieces of this one, should it be behind them.

        A job that seems to be late may still be in time: what it has to spare counts from the end of the present pass,
        and counts a piece that is almost done as a whole one.
        """
        line, left = self._line, self._seen.left[plan]
        tight = {
            i
            for i in self._larger
            if self._longer(line[i], True) > max(0.0, min(left[i], line[i].promise - line[i].done_by))
        }
        if not tight:
            return _Ahead([_NOBODY] * (len(line) + 1), [])
        last: list[tuple[int, ...]] = [_NOBODY]
        done = [-inf]
        for i, other in enumerate(line):
            now = last[-1]
            if i in tight:
                grown = zip(other.blocked(self._blocks, True), other.blocks, now, strict=True)
                now = tuple(i if after > before else one for after, before, one in grown)
            last.append(now)
            done.append(max(done[-1], other.promise - min(0.0, left[i]), other.done_by))
        return _Ahead(last, done[1:])

    def _longer(self, other: Job, is_ahead: bool) -> float:
        """The seconds that another job's bound becomes longer by the work that this job may have under way."""
        if not self._blocks.exceed(other.blocks):
            return 0.0
        return longer(self._bounds, other.blocks, other.blocked(self._blocks, is_ahead))


def _largest(pieces: Sequence[float], orphan: float) -> list[float]:
    """For each place in line, the largest piece of the jobs from there on, and of one that has left."""
    return list(accumulate(reversed(pieces), max, initial=orphan))[::-1]
