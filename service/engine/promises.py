"""Promises: the time by which a job will be done, whatever arrives later. Pure Python.

A promise is one that a plan keeps, by the bounds of bounds.py.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from math import inf

from service.engine.bounds import MARGIN, ROUNDING, Bounds, Look, look
from service.engine.costs import Machine
from service.engine.jobs import Job
from service.engine.outstanding import Busy, Outstanding
from service.engine.stage_work import Blocks

PATIENCE = 2.0  # times the seconds of the job and the work ahead in full passes
_LAST_DIGIT = 1e-12  # seconds; the order in which a sum is added up may make this difference
_NO_ROOM = Blocks()
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
                seconds += n * (decode.image if theirs is own else bounds.images[theirs].single)
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

    Infinite if a piece of the job's work is so large that it breaks another promise, whatever the job's place in line
    is. Sets the job's `free_by` and `blocks`, which belong to the promise.

    Args:
        job: not in the queue yet.
        line: the jobs with promises, in the order of promises.
        machine: what work costs.
        start: when the next pass can begin.
        wanted: a time.
        busy: what the stages have under way.
        now: the time; `start` if not given.
        room: for pieces of later jobs. A later job whose pieces are no larger cannot break this promise by them.
    """
    bounds = Bounds(machine)
    seen = look(line, bounds, start, job.costs)
    now, busy = start if now is None else now, Busy() if busy is None else busy
    new = _New(job, line, bounds, seen, start, now, busy, room)
    enough = min(-ROUNDING, max(seen.spare))  # if neither plan keeps all promises, follow the closer one
    plans = [plan for plan, left in enumerate(seen.spare) if left >= enough]
    promise, place = min(new.place(plan, wanted) for plan in plans)
    job.free_by, job.blocks = new.free_by(place), new.blocks(place)
    return promise


def enter(job: Job, line: Sequence[Job], place: int, machine: Machine) -> None:
    """Update the other jobs' `free_by` and `blocks` when a job enters at the place in line of its promise."""
    bounds, own = Bounds(machine), job.own_blocks
    for i, other in enumerate(line):
        blocks = other.blocks
        if other.encoding and i >= place:
            other.free_by += bounds.encode * job.encode_s
        if own.exceed(blocks):
            other.blocks = other.blocked(own, i < place)
            other.free_by += bounds.unit * (other.blocks.a_pass - blocks.a_pass)


def follow(jobs: Iterable[Job], before: Blocks, now: Blocks, machine: Machine) -> None:
    """Weigh jobs anew after costs have changed. Pieces that may block them may cost more, too.

    Args:
        before, now: the machine's largest pieces.
    """
    unit = Bounds(machine).unit
    for job in jobs:
        job.weigh()
        blocks = job.blocks.followed(before, now).at_least(job.a_check_s, job.piece_s)
        job.free_by += unit * (blocks.a_pass - job.blocks.a_pass)
        job.blocks = blocks


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
        self._sum_stages()
        _, decode, check, answer = self._blocks
        self._larger = {  # the jobs that may have to wait longer, for a piece of this one
            i
            for i, other in enumerate(line)
            if other.encoding
            or other.blocks.answer < answer
            or other.blocks.check < check
            or other.blocks.decode < decode
        }
        self._largest = self._largest_batches()

    def place(self, plan: int, wanted: float) -> tuple[float, int]:
        """The earliest promise at or after `wanted`, and the job's place in line."""
        job, line, own = self._job, self._line, self._job.costs
        left, most, larger = self._seen.left[plan], self._seen.most, self._larger
        passes, steps = (self._alone, 0.0) if plan == 0 else (self._rows, self._steps)
        encodes, checks = self._bounds.encode * job.encode_s, self._bounds.check * job.check_s
        answers = self._bounds.answer * job.answer_s
        i = len(line)
        while i > 0:  # past up to a thousand jobs
            other = line[i - 1]
            if other.promise <= wanted:
                break
            takes = 0.0
            if other.left:
                takes = passes
                if steps and other.costs is not own:
                    takes += steps if job.encoding else max(0.0, steps - most[i])
            if checks and other.unchecked:
                takes += checks
            if answers and other.unanswered:
                takes += answers
            if job.undecoded and other.undecoded:
                images = self._bounds.images[own]
                takes += job.undecoded * (images.image if other.costs is own else images.single)
            if encodes and other.encoding:
                takes += encodes
            if i - 1 in larger:
                takes += self._longer(other, is_ahead=False)
            if takes > left[i - 1] + _LAST_DIGIT:
                break
            i -= 1
        promise = max(wanted, self._bound(i, plan), line[i - 1].promise if i > 0 else -inf)
        while i < len(line) and promise >= line[i].promise:
            i += 1
            promise = max(promise, self._bound(i, plan))
        return (inf if self._holds_up(i, plan) else promise), i

    def free_by(self, place: int) -> float:
        """The time by which the job's rows can run."""
        job, bounds = self._job, self._bounds
        if not job.encoding:
            return self._start if job.left else self._now
        encode_s = self._encodes[place] + job.encode_s + self._busy.other_s("encode", self._line[:place])
        encoded = self._now + bounds.encode * encode_s
        return max(self._start, encoded + bounds.unit * self.blocks(place).a_pass) if job.left else encoded

    def blocks(self, place: int) -> Blocks:
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
        if job.encoding and job.left:
            present = {other.costs for other in line if other.left}
            a_pass = max([a_pass, room.a_pass, *(costs.ceilings[costs.width] for costs in present)])
        if job.undecoded:
            others = {other.costs: other for other in line if other.undecoded}
            pieces = (one.own_blocks.decode for one in others.values())
            decode = max([decode, room.decode, self._busy.orphan_s("decode"), *pieces])
        return a_pass, decode

    def _bound(self, place: int, plan: int) -> float:
        """The time by which a plan is done with the job at a place in line."""
        job, bounds, seen = self._job, self._bounds, self._seen
        time = self.free_by(place)
        if job.left and plan == 0:
            time += seen.alone[place] + self._alone
        elif job.left:
            time += seen.others[place] + self._rows + self._steps
        blocks = self.blocks(place)
        if job.undecoded:
            images = bounds.images[job.costs]
            time += self._decode[place] + images.image * (job.undecoded - 1) + images.full
            time += bounds.decode * blocks.decode
        if job.unchecked:
            time += bounds.check * (self._checks[place] + job.check_s + blocks.check)
        if job.unanswered:
            time += bounds.answer * (self._answers[place] + job.answer_s + blocks.answer)
        return time

    def _sum_stages(self) -> None:
        """For each place: the bound of decoding for the jobs ahead, and the seconds of their other stages."""
        job, bounds, line = self._job, self._bounds, self._line
        if job.undecoded:
            a_row = {costs: images.single for costs, images in bounds.images.items()}
            a_row[job.costs] = bounds.images[job.costs].image
            self._decode = list(accumulate((other.undecoded * a_row[other.costs] for other in line), initial=0.0))
        if job.unchecked:
            self._checks = list(accumulate((other.check_s for other in line), initial=0.0))
            self._check_pieces = _largest([other.a_check_s for other in line], self._busy.orphan_s("check"))
        if job.unanswered:
            self._answers = list(accumulate((other.answer_s for other in line), initial=0.0))
            self._answer_pieces = _largest([other.piece_s for other in line], self._busy.orphan_s("answer"))
        if job.encoding:
            self._encodes = list(accumulate((other.encode_s for other in line), initial=0.0))

    def _holds_up(self, place: int, plan: int) -> bool:
        """Whether a piece of the job may break the promise of a job ahead.

        A job that seems to be late may still be in time: what it has to spare counts from the end of the present pass,
        and counts a piece that is almost done as a whole one.
        """
        left = self._seen.left[plan]
        return any(self._longer(self._line[i], True) > max(0.0, left[i]) for i in self._larger if i < place)

    def _longer(self, other: Job, is_ahead: bool) -> float:
        """The seconds that another job's bound becomes longer by the work that this job may have under way."""
        blocks, bounds = other.blocks, self._bounds
        if not self._blocks.exceed(blocks):
            return 0.0
        a_pass, decode, check, answer = other.blocked(self._blocks, is_ahead)
        return (
            bounds.unit * (a_pass - blocks.a_pass)
            + bounds.decode * (decode - blocks.decode)
            + bounds.check * (check - blocks.check)
            + bounds.answer * (answer - blocks.answer)
        )


def _largest(pieces: Sequence[float], orphan: float) -> list[float]:
    """For each place in line, the largest piece of the jobs from there on, and of one that has left."""
    return list(accumulate(reversed(pieces), max, initial=orphan))[::-1]
