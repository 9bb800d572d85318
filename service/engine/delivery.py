"""Takes what one stage has made to the next stage, and to those who wait for it.

An uploaded image is encoded, rows are denoised, latents are decoded, the answer is encoded. A request skips the stages
that it does not need: a row without steps is never denoised, and rows that are images are not decoded.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from model.rows import VAE, Group, Image
from service.engine.health import DECODING, PASSES
from service.engine.progress import tell, tell_progress
from service.engine.requests import Request
from service.engine.scheduler import Scheduler
from service.engine.stage import Observer, Piece, Stage
from service.engine.tasks import Answer, Decode, Encode
from service.engine.waves import RowState
from service.engine.worker import Workplace
from service.errors import ComputationFailed, ServiceError

Made = tuple[Request, RowState, Image]


class Delivery:
    """The stages beside denoising, and the way between them.

    Args:
        vaes: by group; None where rows are images.
        at: what the engine's threads share.

    Attributes:
        stages: the stages in the order of a request's way.
    """

    def __init__(self, vaes: Mapping[Group, VAE] | None, at: Workplace[Observer]) -> None:
        self._queue = at.queue
        self._health = at.health
        self._clock = at.clock
        self._answer = Stage(Answer(at.clock, self._encoded, self._whole), at)
        self.stages: Sequence[Stage] = [self._answer]
        self._decode: Stage | None = None
        if vaes is not None:
            self._encode, self._decode = Stage(Encode(vaes, self._latents), at), Stage(Decode(vaes, self._decoded), at)
            self.stages = [self._encode, self._decode, self._answer]

    def enter(self, request: Request) -> None:
        """Send an accepted request to its first stage. The scheduler already knows rows with steps."""
        if request.upload is not None:
            self._encode.put([Piece.of_whole(request, request.upload.image)])
        else:
            self._skip_denoising(request)

    def stepped(self, made: Iterable[Made]) -> None:
        """Take on rows that have taken their last step. One call has all rows of a pass, so that they share batches."""
        latents, images = [], []
        for request, row, x in made:
            if self._is_decoded(request):
                request.stepped = self._clock()
                latents.append(Piece.of_row(request, row, x))
            elif (piece := self._made(request, row, x)) is not None:
                images.append(piece)
        if latents:
            assert self._decode is not None
            self._decode.put(latents)
        if images:
            self._answer.put(images)

    def _is_decoded(self, request: Request) -> bool:
        return self._decode is not None and request.rows[0].is_decoded

    def _skip_denoising(self, request: Request) -> None:
        """Take on the rows of a request that have no steps."""
        rows = zip(request.job.rows, request.rows, strict=True)
        self.stepped([(request, state, row.start) for state, row in rows if not state.steps and row.start is not None])

    # The stages' results

    def _latents(self, request: Request, latents: Image) -> None:
        """An upload is encoded."""
        if self._queue.of(request.job) is None:
            return
        if not np.isfinite(latents).all():
            self._queue.fail(request, ComputationFailed("the encoded image has values that are not finite"))
            return
        upload, request.upload = request.upload, None
        assert upload is not None
        try:
            request.rows, request.encoding = upload.then(latents)
        except ServiceError as error:
            self._queue.fail(request, error)
            return
        with self._queue.lock:
            self._scheduler.encoded(request.job)
            self._queue.changed.notify_all()
        tell_progress(self._queue, request, self._clock)
        self._skip_denoising(request)

    def _decoded(self, request: Request, row: RowState, image: Image) -> None:
        with self._queue.lock:
            self._scheduler.decoded(request.job)
        if (piece := self._made(request, row, image)) is not None:
            self._answer.put([piece])

    def _made(self, request: Request, row: RowState, image: Image) -> Piece | None:
        """An image is finished. Its values may be not finite. Returns the work to encode it, if that is work."""
        if self._queue.of(request.job) is None:  # another of its images failed
            return None
        finite = bool(np.isfinite(image).all())
        if row.steps:  # else a client may have sent anything
            for work in (PASSES, DECODING) if self._is_decoded(request) else (PASSES,):
                self._health.stages[work].image_ended(request.job.group, finite)
        if not finite:
            self._queue.fail(request, ComputationFailed("the image has values that are not finite"))
            return None
        row.image, request.made = image, self._clock()
        encoding = request.encoding
        if encoding is not None and encoding.values[0]:
            return Piece.of_row(request, row, image)
        self._encoded(request, row, b"", b"" if encoding is None else None)
        return None

    def _encoded(self, request: Request, row: RowState, encoded: bytes, body: bytes | None) -> None:
        """An image is encoded, and with the last one perhaps the body."""
        with self._queue.lock:
            if request.encoding is not None:
                self._scheduler.answered(request.job)
            request.encoded[row.index] = encoded
            is_last = len(request.encoded) == len(request.rows)
        if request.encoding is not None and request.encoding.values[0]:
            tell(self._queue, request, lambda watcher: watcher.image(row.index, encoded))
        if is_last and body is not None:
            self._whole(request, body)
            return
        tell_progress(self._queue, request, self._clock)
        if is_last:
            self._answer.put([Piece.of_whole(request)])

    def _whole(self, request: Request, body: bytes) -> None:
        """The body is encoded. Nothing is left to do."""
        if request.encoding is not None:
            with self._queue.lock:
                self._scheduler.answered(request.job)
        tell_progress(self._queue, request, self._clock)
        self._queue.finish(request, body)

    @property
    def _scheduler(self) -> Scheduler:
        assert self._queue.scheduler is not None
        return self._queue.scheduler
