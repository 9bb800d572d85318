"""Whose turn it is: pieces of a job that wait for jobs ahead. Pure Python.

A piece cannot be interrupted. A job ahead may have no room for a large piece of a later one. Then the piece waits until
the job ahead has no work left where the piece would be in its way. Other pieces go on meanwhile. Jobs wait only for
jobs with earlier promises, so the first in line never waits.
"""

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Literal

from service.engine.jobs import Job

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


def released(by_promise: Iterable[Job]) -> list[Job]:
    """The jobs whose passes have waited and need not wait any longer."""
    found: list[Job] = []
    first = inf  # the promise of the first job whose rows may not run yet
    for job in by_promise:
        is_released = -inf < job.behind.a_pass < first
        if is_released:
            found.append(job)
        if first == inf and job.left and (job.encoding or (job.waits and not is_released)):
            first = job.promise
    return found
