"""What each stage does: encodes an uploaded image, decodes latents, encodes an answer."""

from collections.abc import Callable, Mapping, Sequence

from model.rows import VAE, Group, Image
from service.engine.costs import Machine
from service.engine.health import DECODING, ENCODING
from service.engine.requests import Clock, Request
from service.engine.stage import Cost, Name, Piece
from service.engine.waves import RowState


class Encode:
    """Encodes uploaded images into latents, one at a time. Implements service.engine.stage.Task.

    Args:
        vaes: by group.
        take_on: takes the latents of a request's upload on.
    """

    name: Name = "encode"
    doing = ENCODING
    failed = "the image of this request could not be encoded"

    def __init__(self, vaes: Mapping[Group, VAE], take_on: Callable[[Request, Image], None]) -> None:
        self._vaes = vaes
        self._take_on = take_on

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

    def done(self, piece: Piece, result: Image) -> None:
        self._take_on(piece.request, result)


class Decode:
    """Decodes latents into images, in batches. Implements service.engine.stage.Task.

    Args:
        vaes: by group.
        take_on: takes the image of a row on.
    """

    name: Name = "decode"
    doing = DECODING
    failed = "an image of this request could not be decoded"

    def __init__(self, vaes: Mapping[Group, VAE], take_on: Callable[[Request, RowState, Image], None]) -> None:
        self._vaes = vaes
        self._take_on = take_on

    def cost(self, machine: Machine, group: Group) -> Cost:
        return machine.decode[group]

    def most(self, machine: Machine, group: Group) -> int:
        return machine.decode[group].width

    def amount(self, batch: Sequence[Piece]) -> int:
        return len(batch)

    def run(self, batch: Sequence[Piece]) -> Sequence[Image]:
        latents = [piece.given for piece in batch if piece.given is not None]
        return self._vaes[batch[0].request.job.group].decode(latents)

    def tests_model(self, batch: Sequence[Piece]) -> bool:
        return any(piece.row is not None and piece.row.steps for piece in batch)

    def done(self, piece: Piece, result: Image) -> None:
        assert piece.row is not None
        self._take_on(piece.request, piece.row, result)


class Answer:
    """Encodes the images of answers, and whole answers, one at a time. Implements service.engine.stage.Task.

    Args:
        clock: seconds, never falling.
        take_image: takes an encoded image on, and the body where that cost nothing.
        take_body: takes a body on.
    """

    name: Name = "answer"
    doing = "encoding an answer"
    failed = "the answer to this request could not be encoded"

    def __init__(
        self,
        clock: Clock,
        take_image: Callable[[Request, RowState, bytes, bytes | None], None],
        take_body: Callable[[Request, bytes], None],
    ) -> None:
        self._clock = clock
        self._take_image = take_image
        self._take_body = take_body

    def cost(self, machine: Machine, group: Group) -> Cost:
        return machine.answer

    def most(self, machine: Machine, group: Group) -> int:
        return 1

    def amount(self, batch: Sequence[Piece]) -> int:
        [piece] = batch
        assert piece.request.encoding is not None
        of_image, of_whole = piece.request.encoding.values
        return of_whole if piece.row is None else of_image

    def run(self, batch: Sequence[Piece]) -> Sequence[tuple[bytes, bytes | None]]:
        """An image, with the body if it is the last and the body costs nothing; or the body alone."""
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

    def tests_model(self, batch: Sequence[Piece]) -> bool:
        return False

    def done(self, piece: Piece, result: tuple[bytes, bytes | None]) -> None:
        image, body = result
        if piece.row is not None:
            self._take_image(piece.request, piece.row, image, body)
        elif body is not None:
            self._take_body(piece.request, body)
