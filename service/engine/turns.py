"""Whose turn it is: pieces of a job that wait for jobs ahead. Pure Python.

A piece cannot be interrupted. A job ahead may have no room for a large piece of a later one. Then the piece waits until
the job ahead has no work left where the piece would be in its way. Other pieces go on meanwhile. Jobs wait only for
jobs with earlier promises, so the first in line never waits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf
from typing import Literal

from service.engine.jobs import Job
from service.engine.outstanding import Outstanding

Stage = Literal["encode", "decode", "check", "answer"]

_LEFT: Mapping[Stage, Callable[[Job], int]] = {
    "decode": lambda job: job.undecoded,
    "check": lambda job: job.unchecked,
    "answer": lambda job: job.unanswered,
}
_BEHIND: Mapping[Stage, Callable[[Job], float]] = {
    "encode": lambda job: -inf,
    "decode": lambda job: job.behind.decode,
    "check": lambda job: job.behind.check,
    "answer": lambda job: job.behind.answer,
}


def must_wait(by_promise: Iterable[Job], stage: Stage, job: Job) -> bool:
    """Whether the pieces of a job must wait at a stage. The line is in the order of promises."""
    until = _BEHIND[stage](job)
    if until == -inf:
        return False
    left = _LEFT[stage]
    first = next((other for other in by_promise if left(other) or other is job), job)
    return first is not job and first.promise <= until


def waits_for(by_promise: Sequence[Job], job: Job) -> Job | None:
    """The last job ahead for which pieces of a job wait at a stage; None if they need not wait."""
    until = max(job.behind.decode, job.behind.check, job.behind.answer)
    if until == -inf:
        return None
    staged = (other for other in reversed(by_promise) if other.undecoded or other.unchecked or other.unanswered)
    return next((other for other in staged if other.promise <= until and other is not job), None)


def let_run(by_promise: Iterable[Job], work: Outstanding) -> bool:
    """Let the passes run that have waited for jobs ahead and need not any longer. Returns whether some still wait.

    Args:
        by_promise: all jobs, in the order of promises.
        work: counts them.
    """
    some_wait, first = False, inf  # the promise of the first job whose rows may not run yet
    for job in by_promise:
        if -inf < job.behind.a_pass < first:
            with work.changing(job):
                job.let_run()
        some_wait |= job.behind.a_pass > -inf
        if first == inf and job.left and job.waits:
            first = job.promise
    return some_wait
