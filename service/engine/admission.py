"""Admission: a request gets a promise and an estimate, or a refusal with a reason. Pure Python."""

from dataclasses import dataclass
from math import inf

from service.engine.arrivals import Arrivals
from service.engine.costs import Machine
from service.engine.eta import Outlook, outlook
from service.engine.fairness import Places
from service.engine.jobs import Job
from service.engine.promises import earliest, patient, seconds_alone
from service.engine.scheduler import Scheduler
from service.engine.stage_work import largest_pieces
from service.errors import Draining, Failed, Invalid, Loading, QueueFull, ServiceError, ShareTaken, TooLate

REFUSALS: dict[type[ServiceError], str] = {
    Invalid: "impossible",
    TooLate: "late",
    ShareTaken: "share",
    QueueFull: "full",
    Loading: "loading",
    Draining: "draining",
    Failed: "failed",
}


@dataclass(frozen=True, slots=True)
class Line:
    """The state that decides an admission.

    Attributes:
        scheduler: the jobs in the queue, and what work costs.
        places: how many places each client holds.
        arrivals: the jobs accepted lately.
    """

    scheduler: Scheduler
    places: Places
    arrivals: Arrivals


@dataclass(frozen=True, slots=True)
class Admission:
    """The terms of an accepted job.

    Attributes:
        promise: the time by which the job will be done, whatever arrives later.
        position: how many jobs go first, as things stand.
        outlook: the state from which the job's estimate is computed.
    """

    promise: float
    position: int
    outlook: Outlook


def admit(job: Job, client: str, line: Line, now: float, timeout_s: float) -> Admission:
    """Accept or refuse a job that is not in the queue yet. The state does not change.

    Args:
        client: of the request.
        now: the time.
        timeout_s: the seconds that the job may take.

    Raises:
        Invalid: the job takes longer than `timeout_s` even without other jobs.
        ShareTaken, QueueFull: no place is free for the client.
        TooLate: the job takes longer than `timeout_s` now.
    """
    check_place(client, line)
    check_possible(job, line.scheduler.machine, timeout_s)
    latest = now + timeout_s
    promise = earliest_promise(job, line.scheduler, now, latest)
    if promise > latest:
        message = f"this cannot be done within {timeout_s:g} s now, but within {promise - now:.3g} s"
        raise TooLate(message, promise - latest)
    ahead = outlook(job, line.scheduler, line.arrivals, now, promise)
    return Admission(promise, line.scheduler.ahead_of(job), ahead)


def check_place(client: str, line: Line) -> None:
    """Refuse a client that gets no place.

    Raises:
        ShareTaken, QueueFull: with the rough seconds until a place is free.
    """
    refusal = line.places.refusal(client)
    a_place_s = line.scheduler.backlog_s / max(1, line.places.taken)
    if refusal == "share":
        raise ShareTaken("the queue is full, and you hold your share of its places", a_place_s)
    if refusal == "full":
        raise QueueFull(f"all {line.places.taken} places of the queue are taken", a_place_s)


def check_possible(job: Job, machine: Machine, timeout_s: float) -> None:
    """Refuse a job that takes too long even alone.

    Raises:
        Invalid: the machine's best speed so far is too slow.
        TooLate: the machine's best speed so far is fast enough, and its present speed is not.
    """
    alone_s = seconds_alone(job, machine)
    if alone_s <= timeout_s:
        return
    best = machine.best
    at_best_s = seconds_alone(job.on(best), best)
    if at_best_s > timeout_s:
        needed = f"must be at least {at_best_s:.3g} for this, even on an idle server, and is {timeout_s:g}"
        raise Invalid.field("timeout_s", needed)
    message = f"this cannot be done within {timeout_s:g} s now, but within {alone_s:.3g} s"
    raise TooLate(f"{message}: the machine is slower than it was", alone_s - timeout_s, even_alone=True)


def earliest_promise(job: Job, scheduler: Scheduler, now: float, latest: float) -> float:
    """The job's promise: the patient time, but not after `latest`; a later time if the other promises require it.

    A job never gets an earlier promise than a job of the same size that came before. If there is time until `latest`,
    the promise has room for the largest pieces of jobs that come later, so that these need not wait.
    """
    others = scheduler.by_promise
    size = job.size
    equals = [other.promise for other in others if other.size == size and other.kind == job.kind]
    promised = (promise for promise in equals if promise < inf)  # the engine's probe has no promise
    wanted = min(latest, max([now + patient(job, scheduler.work, scheduler.machine), *promised]))
    start = max(now, scheduler.busy_until)
    line = job, others, scheduler.machine, start, wanted, scheduler.busy, now
    promise = earliest(*line, largest_pieces(scheduler.machine))
    return promise if promise <= latest else earliest(*line)
