"""The stage that encodes what rows need before they may run: texts into contexts, and uploaded images into latents.

It works on one piece at a time. A text that was encoded lately costs nothing.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from model.rows import VAE, Context, Group, Moments, Text, TextEncoder
from service.engine.contexts import Contexts
from service.engine.costs import Machine
from service.engine.decode import Stepped
from service.engine.health import ENCODING, Health
from service.engine.progress import tell_progress
from service.engine.queue import Queue
from service.engine.requests import Clock
from service.engine.stage import Cost, Name, Piece
from service.errors import ComputationFailed, ServiceError

log = logging.getLogger(__name__)


class Observer(Protocol):
    """Hears of texts."""

    def text_encoded(self, seconds: float) -> None: ...
    def text_known(self) -> None: ...


class Encode:
    """Encodes a text, or an uploaded image. Implements service.engine.stage.Task.

    Args:
        text_encoder: None for a model without texts.
        vaes: by group; empty where rows are images.
        contexts: of texts that were encoded lately.
        stepped: gets the rows without steps.
        queue: the requests.
        health: hears of each context.
        observer: hears of each text.
        clock: seconds, never falling.
    """

    name: Name = "encode"
    doing = ENCODING

    def __init__(
        self,
        text_encoder: TextEncoder | None,
        vaes: Mapping[Group, VAE],
        contexts: Contexts,
        stepped: Stepped,
        queue: Queue,
        health: Health,
        observer: Observer,
        clock: Clock,
    ) -> None:
        self._text_encoder = text_encoder
        self._vaes = vaes
        self._contexts = contexts
        self._stepped = stepped
        self._queue = queue
        self._health = health
        self._observer = observer
        self._clock = clock

    def cost(self, machine: Machine, batch: Sequence[Piece]) -> Cost:
        [piece] = batch
        if piece.text is None:
            return machine.encode[piece.request.job.group]
        assert machine.text is not None
        return machine.text

    def most(self, machine: Machine, group: Group) -> int:
        return 1

    def amount(self, batch: Sequence[Piece]) -> int:
        return len(batch)

    def known(self, piece: Piece) -> Context | None:
        """The context of a text that another request has needed meanwhile. The engine's probe must find out itself."""
        if piece.text is None or piece.request.client is None:
            return None
        context = self._contexts.find(piece.text)
        if context is not None:
            self._observer.text_known()
        return context

    def run(self, batch: Sequence[Piece]) -> Sequence[Context | Moments]:
        [piece] = batch
        group = piece.request.job.group
        if piece.text is None:
            assert piece.given is not None
            return [self._vaes[group].encode(piece.given)]
        assert self._text_encoder is not None
        began = self._clock()
        context = self._text_encoder.encode(piece.text)
        self._observer.text_encoded(self._clock() - began)
        self._health.stages[ENCODING].made(group, context.is_finite)
        if context.is_finite:
            self._contexts.keep(piece.text, context)
        return [context]

    def tests_model(self, batch: Sequence[Piece], worked: bool) -> bool:
        return batch[0].text is not None

    def failed(self, piece: Piece) -> str:
        what = "image" if piece.text is None else "prompt"
        return f"the {what} of this request could not be encoded"

    def done(self, piece: Piece, result: Context | Moments) -> Iterable[Piece]:
        request, queue = piece.request, self._queue
        if queue.of(request.job) is None:
            return ()
        if not result.is_finite:
            queue.fail(request, ComputationFailed(f"{_encoded(piece.text)} has values that are not finite"))
            return ()
        try:
            self._give(piece, result)
        except ServiceError as error:
            queue.fail(request, error)
            return ()
        except Exception:
            log.exception("the rows of a request could not be made")
            queue.fail(request, ComputationFailed(self.failed(piece)))
            return ()
        self._note(piece)
        if not request.job.encoding:
            self._stepped.skip(request)
        return ()

    def _give(self, piece: Piece, result: Context | Moments) -> None:
        """Give a request latents or a context; with the last of these, give its rows what they need."""
        request = piece.request
        if isinstance(result, Context):
            assert piece.text is not None
            request.prompts.contexts[piece.text] = result
        elif request.upload is not None:
            request.latents[piece.index] = result
            if len(request.latents) == len(request.upload.images):
                latents = [request.latents[index] for index in range(len(request.upload.images))]
                request.rows, request.encoding = request.upload.then(latents)
                request.upload, request.latents = None, {}
        if request.job.texts + request.job.uploads == 1:
            request.rows = request.prompts.given_to(request.rows)

    def _note(self, piece: Piece) -> None:
        """Note that a piece is encoded. With the last piece, the rows of the request may run."""
        request, queue = piece.request, self._queue
        assert queue.scheduler is not None
        note = queue.scheduler.upload_encoded if piece.text is None else queue.scheduler.text_encoded
        with queue.lock:
            note(request.job)
            queue.changed.notify_all()
        tell_progress(queue, request, self._clock)


def _encoded(text: Text | None) -> str:
    """What has been encoded, in words."""
    if text is None:
        return "the encoded image"
    return "the encoded prompt, with its weights," if text.weights or text.weights_2 else "the encoded prompt"
