"""The stage that encodes uploaded images into latents, one at a time, before the rows of their requests may run."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from model.rows import VAE, Group, Image
from service.engine.costs import Machine
from service.engine.decode import Stepped
from service.engine.health import ENCODING
from service.engine.progress import tell_progress
from service.engine.queue import Queue
from service.engine.requests import Clock
from service.engine.stage import Cost, Name, Piece
from service.errors import ComputationFailed, ServiceError

log = logging.getLogger(__name__)


class Encode:
    """Encodes an uploaded image. Implements service.engine.stage.Task.

    Args:
        vaes: by group.
        stepped: gets the rows without steps.
        queue: the requests.
        clock: seconds, never falling.
    """

    name: Name = "encode"
    doing = ENCODING
    failed = "the image of this request could not be encoded"

    def __init__(self, vaes: Mapping[Group, VAE], stepped: Stepped, queue: Queue, clock: Clock) -> None:
        self._vaes = vaes
        self._stepped = stepped
        self._queue = queue
        self._clock = clock

    def cost(self, machine: Machine, group: Group) -> Cost:
        return machine.encode[group]

    def most(self, machine: Machine, group: Group) -> int:
        return 1

    def amount(self, batch: Sequence[Piece]) -> int:
        return len(batch)

    def run(self, batch: Sequence[Piece]) -> Sequence[Image]:
        [piece] = batch
        assert piece.given is not None
        return [self._vaes[piece.request.job.group].encode(piece.given)]

    def tests_model(self, batch: Sequence[Piece]) -> bool:
        return False

    def done(self, piece: Piece, result: Image) -> Iterable[Piece]:
        request, queue = piece.request, self._queue
        if queue.of(request.job) is None or request.upload is None:
            return ()
        if not np.isfinite(result).all():
            queue.fail(request, ComputationFailed("the encoded image has values that are not finite"))
            return ()
        try:
            request.rows, request.encoding = request.upload.then(result)
        except ServiceError as error:
            queue.fail(request, error)
            return ()
        except Exception:
            log.exception("the rows of a request could not be made of its latents")
            queue.fail(request, ComputationFailed(self.failed))
            return ()
        request.upload = None
        assert queue.scheduler is not None
        with queue.lock:
            queue.scheduler.encoded(request.job)
            queue.changed.notify_all()
        tell_progress(queue, request, self._clock)
        self._stepped.skip(request)
        return ()
