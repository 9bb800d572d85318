"""The last stage: encodes finished images and whole answers, and answers requests."""

from collections.abc import Iterable, Sequence

from model.rows import Group, Image
from service.engine.costs import Machine
from service.engine.progress import tell, tell_progress
from service.engine.queue import Queue
from service.engine.requests import Clock, Request
from service.engine.stage import Cost, Name, Piece, Stage
from service.engine.waves import RowState

Made = tuple[Request, RowState, Image]


class Answer:
    """Encodes one image, or one whole answer, at a time. Implements service.engine.stage.Task.

    Args:
        queue: the requests.
        clock: seconds, never falling.
    """

    name: Name = "answer"
    doing = "encoding an answer"

    def __init__(self, queue: Queue, clock: Clock) -> None:
        self._queue = queue
        self._clock = clock

    def cost(self, machine: Machine, batch: Sequence[Piece]) -> Cost:
        return machine.answer

    def most(self, machine: Machine, group: Group) -> int:
        return 1

    def amount(self, batch: Sequence[Piece]) -> int:
        [piece] = batch
        assert piece.request.encoding is not None
        of_image, of_whole = piece.request.encoding.values
        return of_whole if piece.row is None else of_image

    def known(self, piece: Piece) -> None:
        return None

    def run(self, batch: Sequence[Piece]) -> Sequence[tuple[bytes, bytes | None]]:
        """The encoding of an image, with the body too if the image is the last one and the body costs nothing.

        For work on the whole request: no encoding of an image, and the body.
        """
        [piece] = batch
        began, request = self._clock(), piece.request
        encoding, images = request.encoding, [row.image for row in request.job.rows if row.image is not None]
        assert encoding is not None
        image, body = b"", None
        if piece.given is not None:
            image = encoding.image(piece.index, piece.given)
        encoded = {**request.encoded, piece.index: image}
        is_body = piece.row is None or not encoding.values[1]
        if is_body and len(images) == len(request.rows) <= len(encoded):
            body = encoding.whole(images, [encoded[index] for index in range(len(images))])
        request.encode_s += self._clock() - began
        return [(image, body)]

    def tests_model(self, batch: Sequence[Piece], worked: bool) -> bool:
        return False

    def failed(self, piece: Piece) -> str:
        return "the answer to this request could not be encoded"

    def done(self, piece: Piece, result: tuple[bytes, bytes | None]) -> Iterable[Piece]:
        request, row, (image, body) = piece.request, piece.row, result
        is_last = row is not None and self.note(request, row, image)
        if row is not None:
            tell(self._queue, request, lambda watcher: watcher.image(row.index, image))
        if body is not None:
            self.finish(request, body)
            return
        tell_progress(self._queue, request, self._clock)
        if is_last:
            yield Piece.of_whole(request)

    def note(self, request: Request, row: RowState, encoded: bytes) -> bool:
        """Note that an image is encoded. Returns whether it is the last one of its request."""
        with self._queue.lock:
            self._answered(request)
            request.encoded[row.index] = encoded
            return len(request.encoded) == len(request.rows)

    def finish(self, request: Request, body: bytes) -> None:
        """Answer a request whose body is encoded."""
        with self._queue.lock:
            self._answered(request)
        tell_progress(self._queue, request, self._clock)
        self._queue.finish(request, body)

    def _answered(self, request: Request) -> None:
        if request.encoding is not None:
            assert self._queue.scheduler is not None
            self._queue.scheduler.answered(request.job)


class Images:
    """Gives finished images to their requests, and to the stage that encodes answers.

    Args:
        answer: the task of that stage.
        stage: that stage.
        queue: the requests.
        clock: seconds, never falling.
    """

    def __init__(self, answer: Answer, stage: Stage, queue: Queue, clock: Clock) -> None:
        self._answer = answer
        self._stage = stage
        self._queue = queue
        self._clock = clock

    def take(self, made: Iterable[Made]) -> None:
        """Hand finished images on, all of a pass or a batch in one call."""
        pieces = [piece for one in made for piece in self._take(*one)]
        if pieces:
            self._stage.put(pieces)

    def _take(self, request: Request, row: RowState, image: Image) -> Iterable[Piece]:
        """Hand an image on. Gives its work for the stage."""
        if self._queue.of(request.job) is None:  # another of its images failed
            return
        row.image = image
        encoding = request.encoding
        if encoding is not None and encoding.values[0]:
            yield Piece.of_row(request, row, image)
            return
        is_last = self._answer.note(request, row, b"")
        if not is_last:
            tell_progress(self._queue, request, self._clock)
        elif encoding is None:
            self._answer.finish(request, b"")
        else:
            yield Piece.of_whole(request)
