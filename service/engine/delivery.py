"""Images and news to those who wait for them. The engine's threads call this, each for requests of its own."""

import logging
from collections.abc import Callable, Iterable

import numpy as np

from model.rows import Image
from service.engine.arrivals import Arrivals
from service.engine.eta import Outlook, outlook
from service.engine.jobs import RowState
from service.engine.queue import Queue
from service.engine.requests import Request, Watcher
from service.engine.scheduler import Scheduler
from service.engine.stage_health import StageHealth
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

_ESTIMATED_EVERY = 0.1  # seconds from one estimate of a watched request to its next


def deliver(queue: Queue, request: Request, row: RowState, image: Image, made_by: Iterable[StageHealth]) -> None:
    """Put a finished image to the others of its request.

    Args:
        request: may have left, for another of its images failed.
        image: perhaps not finite.
        made_by: the threads that made it.
    """
    if queue.of(request.job) is None:
        return
    finite = bool(np.isfinite(image).all())
    for stage in made_by:
        stage.image_ended(finite)
    if not finite:
        queue.fail(request, ComputationFailed("the image has values that are not finite"))
        return
    row.image = image
    tell(queue, request, lambda watcher: watcher.image(row.index, image))
    queue.finish_if_done(request)


def new_outlook(request: Request, scheduler: Scheduler, arrivals: Arrivals, now: float) -> Outlook | None:
    """What a new estimate for a watched request depends on; None where none is due."""
    job = request.job
    is_new = request.estimated is not None and now - request.estimated[0] < _ESTIMATED_EVERY
    if is_new or not (job.left or job.undecoded):
        return None
    return outlook(job, scheduler, arrivals, now, job.promise)


def tell_progress(queue: Queue, request: Request, ahead: Outlook | None, now: float) -> None:
    """Tell a watcher how far its request is: by a new estimate where one is due, else by what is left of the last."""
    job, steps, eta_s = request.job, request.job.rows[0].steps, 0.0
    if ahead is not None:
        request.estimated = now, ahead.eta()
    if request.estimated is not None and (job.left or job.undecoded):
        at, seconds = request.estimated
        eta_s = max(0.0, seconds - (now - at))
    tell(queue, request, lambda watcher: watcher.progress(steps - job.steps, steps, eta_s))


def tell(queue: Queue, request: Request, news: Callable[[Watcher], None]) -> None:
    """Tell a request's watcher, if it has one. Where that raises, the request fails, and no other."""
    if request.watcher is None:
        return
    try:
        news(request.watcher)
    except Exception:
        log.exception("a watcher failed")
        queue.fail(request, ComputationFailed("this request could not be followed to its end"))
