"""The stage that decodes latents into images, in batches; and where rows go that have taken their steps."""

from collections.abc import Iterable, Mapping, Sequence

from model.rows import VAE, Group, Image
from service.engine.answer import Made
from service.engine.check import Inspection
from service.engine.costs import Machine
from service.engine.health import DECODING
from service.engine.queue import Queue
from service.engine.requests import Clock, Request
from service.engine.stage import Cost, Name, Piece, Stage


class Decode:
    """Decodes a batch of latents. Implements service.engine.stage.Task.

    Args:
        vaes: by group.
        inspection: gets the images.
        queue: the requests.
    """

    name: Name = "decode"
    doing = DECODING

    def __init__(self, vaes: Mapping[Group, VAE], inspection: Inspection, queue: Queue) -> None:
        self._vaes = vaes
        self._inspection = inspection
        self._queue = queue

    def cost(self, machine: Machine, batch: Sequence[Piece]) -> Cost:
        return machine.decode[batch[0].request.job.group]

    def most(self, machine: Machine, group: Group) -> int:
        return machine.decode[group].width

    def amount(self, batch: Sequence[Piece]) -> int:
        return len(batch)

    def known(self, piece: Piece) -> None:
        return None

    def run(self, batch: Sequence[Piece]) -> Sequence[Image]:
        latents = [piece.given for piece in batch if piece.given is not None]
        return self._vaes[batch[0].request.job.group].decode(latents)

    def tests_model(self, batch: Sequence[Piece], worked: bool) -> bool:
        return worked or any(piece.row is not None and piece.row.steps for piece in batch)

    def failed(self, piece: Piece) -> str:
        return "an image of this request could not be decoded"

    def done(self, piece: Piece, result: Image) -> Iterable[Piece]:
        assert piece.row is not None
        assert self._queue.scheduler is not None
        with self._queue.lock:
            self._queue.scheduler.decoded(piece.request.job)
        self._inspection.take([(piece.request, piece.row, result)])
        return ()


class Stepped:
    """Hands on the rows that have taken their steps: latents to the decoder, finished images to their inspection.

    Args:
        decode: the stage; None where rows are images.
        inspection: gets finished images.
        clock: seconds, never falling.
    """

    def __init__(self, decode: Stage | None, inspection: Inspection, clock: Clock) -> None:
        self._decode = decode
        self._inspection = inspection
        self._clock = clock

    def take(self, made: Iterable[Made]) -> None:
        """Hand rows on. One call has all rows of a pass, so that they share batches."""
        latents, images = [], []
        for request, row, x in made:
            if request.job.stages.decoded:
                request.stepped = self._clock()
                latents.append(Piece.of_row(request, row, x))
            else:
                images.append((request, row, x))
        if latents:
            assert self._decode is not None
            self._decode.put(latents)
        self._inspection.take(images)

    def skip(self, request: Request) -> None:
        """Hand on the rows of a request that have no steps."""
        rows = zip(request.job.rows, request.rows, strict=True)
        self.take([(request, state, row.start) for state, row in rows if not state.steps and row.start is not None])
