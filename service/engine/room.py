"""What jobs in line have room for: the pieces of other jobs that may be under way before them. Pure Python."""

from collections.abc import Iterable, Sequence
from math import inf

from service.engine.bounds import Bounds
from service.engine.costs import Machine
from service.engine.jobs import Job
from service.engine.outstanding import Busy
from service.engine.stage_work import Blocks


def enter(job: Job, line: Sequence[Job], place: int, machine: Machine) -> None:
    """Update the other jobs' `free_by`, `blocks` and `done_by` when a job enters at the place of its promise."""
    bounds, own, behind = Bounds(machine), job.own_blocks, job.behind
    is_behind = max(behind) > -inf
    for i, other in enumerate(line):
        blocks, pieces = other.blocks, own
        if i >= place:
            if other.waits:
                other.free_by += bounds.encode * job.encode_s
            if other.done_by > -inf:
                other.done_by += staged_ahead(job, other, bounds)
        elif is_behind:  # these pieces go after the other job
            waits = (other.promise <= until for until in behind)
            pieces = Blocks(*(0.0 if wait else piece for wait, piece in zip(waits, own, strict=True)))
        if pieces.exceed(blocks):
            other.blocks = other.blocked(pieces, i < place)
            other.free_by += bounds.unit * (other.blocks.a_pass - blocks.a_pass)
            other.done_by += longer(bounds, blocks, other.blocks)


def staged_ahead(job: Job, other: Job, bounds: Bounds) -> float:
    """The seconds that a job takes from another one behind it in the stages after passes."""
    seconds = 0.0
    if other.unchecked:
        seconds += bounds.check * job.check_s
    if other.unanswered:
        seconds += bounds.answer * job.answer_s
    if job.undecoded and other.undecoded:
        seconds += job.undecoded * bounds.images[job.costs].image
    return seconds


def follow(jobs: Iterable[Job], before: Blocks, now: Blocks, machine: Machine) -> None:
    """Weigh jobs anew after costs have changed. Pieces that may block them may cost more, too.

    Args:
        before, now: the machine's largest pieces.
    """
    bounds = Bounds(machine)
    for job in jobs:
        job.weigh()
        blocks = job.blocks.followed(before, now).at_least(job.a_check_s, job.piece_s)
        job.free_by += bounds.unit * (blocks.a_pass - job.blocks.a_pass)
        job.done_by += longer(bounds, job.blocks, blocks)
        job.blocks = blocks


def note_orphan(jobs: Iterable[Job], busy: Busy) -> None:
    """Note on all jobs the check, and the piece of an answer, that are under way though their jobs have left."""
    check, answer = busy.orphan_s("check"), busy.orphan_s("answer")
    if check or answer:
        for job in jobs:
            job.blocks = job.blocks.at_least(check, answer)


def longer(bounds: Bounds, before: Blocks, now: Blocks) -> float:
    """The seconds that a job's bound becomes longer when its blocks change."""
    return (
        bounds.unit * (now.a_pass - before.a_pass)
        + bounds.decode * (now.decode - before.decode)
        + bounds.check * (now.check - before.check)
        + bounds.answer * (now.answer - before.answer)
    )
