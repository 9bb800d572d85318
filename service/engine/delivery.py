"""Delivers images and news to requests. Each of the engine's threads calls this for the rows that it computes."""

import logging
from collections.abc import Callable, Iterable

import numpy as np

from model.rows import Image
from service.engine.arrivals import Arrivals
from service.engine.eta import Outlook, outlook
from service.engine.queue import Queue
from service.engine.requests import Request, Watcher
from service.engine.scheduler import Scheduler
from service.engine.stage_health import StageHealth
from service.engine.waves import RowState
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

_ESTIMATED_EVERY = 0.1  # the least seconds between two estimates of a watched request


def deliver(queue: Queue, request: Request, row: RowState, image: Image, made_by: Iterable[StageHealth]) -> None:
    """Add a finished image to its request.

    Args:
        request: may have left, because another of its images failed.
        image: may have values that are not finite.
        made_by: the threads that made the image.
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
    """The state for a new estimate of a watched request; None if no estimate is due."""
    job = request.job
    is_new = request.estimated is not None and now - request.estimated[0] < _ESTIMATED_EVERY
    if is_new or not (job.left or job.undecoded):
        return None
    return outlook(job, scheduler, arrivals, now, job.promise)


def tell_progress(queue: Queue, request: Request, ahead: Outlook | None, now: float) -> None:
    """Tell a watcher the progress of its request, with a new estimate if one is due, else with the last one's rest."""
    job, steps, eta_s = request.job, request.job.rows[0].steps, 0.0
    if ahead is not None:
        request.estimated = now, ahead.eta()
    if request.estimated is not None and (job.left or job.undecoded):
        at, seconds = request.estimated
        eta_s = max(0.0, seconds - (now - at))
    tell(queue, request, lambda watcher: watcher.progress(steps - job.steps, steps, eta_s))


def tell(queue: Queue, request: Request, news: Callable[[Watcher], None]) -> None:
    """Tell a request's watcher, if it has one. If the watcher raises, only this request fails."""
    if request.watcher is None:
        return
    try:
        news(request.watcher)
    except Exception:
        log.exception("a watcher failed")
        queue.fail(request, ComputationFailed("this request could not be followed to its end"))
