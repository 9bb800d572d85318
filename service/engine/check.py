"""The stage that checks finished images, one at a time; and what is found out about each finished image."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from model.rows import Group, Image
from service.engine.answer import Images, Made
from service.engine.costs import Machine
from service.engine.health import CHECKING, DECODING, PASSES, Health
from service.engine.queue import Queue
from service.engine.requests import Clock, Request
from service.engine.stage import Cost, Name, Piece, Stage
from service.engine.waves import RowState
from service.errors import ComputationFailed, Refused, ServiceError

log = logging.getLogger(__name__)

# [C, H, W] → why the image is refused; None if it passes. A ServiceError answers the request, too.
CheckImage = Callable[[Image], str | None]


class Check:
    """Checks an image. Implements service.engine.stage.Task.

    Args:
        check: the operator's.
        images: gets the images that pass.
        queue: the requests.
    """

    name: Name = "check"
    doing = CHECKING

    def __init__(self, check: CheckImage, images: Images, queue: Queue) -> None:
        self._check = check
        self._images = images
        self._queue = queue

    def cost(self, machine: Machine, batch: Sequence[Piece]) -> Cost:
        return machine.check[batch[0].request.job.group]

    def most(self, machine: Machine, group: Group) -> int:
        return 1

    def amount(self, batch: Sequence[Piece]) -> int:
        return len(batch)

    def known(self, piece: Piece) -> None:
        return None

    def run(self, batch: Sequence[Piece]) -> Sequence[ServiceError | None]:
        """The error that answers the request; None if the image passes."""
        [piece] = batch
        assert piece.given is not None
        try:
            reason = self._check(piece.given)
        except ServiceError as error:
            return [error]
        return [None if reason is None else Refused(reason)]

    def tests_model(self, batch: Sequence[Piece], worked: bool) -> bool:
        return False

    def failed(self, piece: Piece) -> str:
        return "an image of this request could not be checked"

    def done(self, piece: Piece, result: ServiceError | None) -> Iterable[Piece]:
        request = piece.request
        if result is not None:
            self._queue.fail(request, result)
            return ()
        assert piece.row is not None
        assert piece.given is not None
        assert self._queue.scheduler is not None
        with self._queue.lock:
            self._queue.scheduler.checked(request.job)
        self._images.take([(request, piece.row, piece.given)])
        return ()


class Inspection:
    """Looks at finished images: their values must be finite, rows may finish them, and the check must let them pass.

    Args:
        check: the stage; None without a check.
        images: gets the images.
        queue: the requests.
        health: hears of each image.
        clock: seconds, never falling.
    """

    def __init__(self, check: Stage | None, images: Images, queue: Queue, health: Health, clock: Clock) -> None:
        self._check = check
        self._images = images
        self._queue = queue
        self._health = health
        self._clock = clock

    def take(self, made: Iterable[Made]) -> None:
        """Look at finished images, all of a pass or a batch in one call. Their values may not be finite."""
        good = [one for each in made if self._is_good(each) for one in self._finished(*each)]
        to_check = [Piece.of_row(*one) for one in good if one[0].job.stages.checked]
        if to_check:
            assert self._check is not None
            self._check.put(to_check)
        self._images.take([one for one in good if not one[0].job.stages.checked])

    def _is_good(self, made: Made) -> bool:
        """Whether an image is finite. If not, its request fails. False, too, if the request has left."""
        request, row, image = made
        if self._queue.of(request.job) is None:  # another of its images failed
            return False
        finite = bool(np.isfinite(image).all())
        if row.steps:  # without steps, the values are a client's, and say nothing of the model
            for work in (PASSES, DECODING) if request.job.stages.decoded else (PASSES,):
                self._health.stages[work].made(request.job.group, finite)
        if not finite:
            self._queue.fail(request, ComputationFailed("the image has values that are not finite"))
            return False
        request.made = self._clock()
        return True

    def _finished(self, request: Request, row: RowState, image: Image) -> Iterator[Made]:
        """The image as its row finishes it; nothing if that fails, as then its request does."""
        finish = request.rows[row.index].finish
        try:
            finished = image if finish is None else finish(image)
        except Exception:
            log.exception("an image could not be finished")
            self._queue.fail(request, ComputationFailed("an image of this request could not be finished"))
        else:
            yield request, row, finished
