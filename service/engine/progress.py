"""Tells watchers how far their requests are. Each of the engine's threads calls this for the rows that it works on."""

import logging
from collections.abc import Callable

from service.engine.arrivals import Arrivals
from service.engine.eta import Outlook, outlook
from service.engine.queue import Queue
from service.engine.requests import Clock, Progress, Request, Watcher
from service.engine.scheduler import Scheduler
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

_ESTIMATED_EVERY = 0.1  # the least seconds between two estimates of a watched request


def tell_progress(queue: Queue, request: Request, clock: Clock) -> None:
    """Tell a watcher how far its request is, with a new estimate if one is due, else with the last one's rest."""
    if request.watcher is None:
        return
    with request.telling:
        with queue.lock:
            if queue.scheduler is None or queue.of(request.job) is None:
                return
            job, now = request.job, clock()
            taken, steps = request.taken, job.rows[0].steps
            images, fraction = len(request.encoded), job.fraction
            ahead = _new_outlook(request, queue.scheduler, queue.arrivals, now)
        eta_s = _estimate(request, ahead, now) if fraction < 1 else 0.0
        progress = Progress(taken, steps, eta_s, images, len(request.rows), fraction)
        error = _told(request.watcher, lambda watcher: watcher.progress(progress))
    if error is not None:
        queue.fail(request, error)


def tell(queue: Queue, request: Request, news: Callable[[Watcher], None]) -> None:
    """Tell a request's watcher, if it has one. If the watcher raises, only this request fails."""
    if request.watcher is not None and (error := _told(request.watcher, news)) is not None:
        queue.fail(request, error)


def _told(watcher: Watcher, news: Callable[[Watcher], None]) -> ComputationFailed | None:
    try:
        news(watcher)
    except Exception:
        log.exception("a watcher failed")
        return ComputationFailed("this request could not be followed to its end")
    return None


def _new_outlook(request: Request, scheduler: Scheduler, arrivals: Arrivals, now: float) -> Outlook | None:
    """The state for a new estimate; None if no estimate is due."""
    is_new = request.estimated is not None and now - request.estimated[0] < _ESTIMATED_EVERY
    if is_new or request.job.fraction >= 1:
        return None
    return outlook(request.job, scheduler, arrivals, now, request.job.promise)


def _estimate(request: Request, ahead: Outlook | None, now: float) -> float:
    if ahead is not None:
        request.estimated = now, ahead.eta()
    assert request.estimated is not None
    at, seconds = request.estimated
    return max(0.0, seconds - (now - at))
