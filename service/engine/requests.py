"""A request on its way through the engine, its watcher and its observers."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from model.rows import Image, Moments, Row
from service.engine.contexts import Prompts
from service.engine.eta import Outlook
from service.engine.jobs import Job
from service.errors import Draining, Failed, Loading

Clock = Callable[[], float]


class Finished(NamedTuple):
    """The result of a request's Future.

    Attributes:
        images: [C, H, W] each.
        queue_s: seconds until the first step, with the encoding of texts and uploads; without steps, until the next
            stage.
        denoise_s: seconds from the first step to the last; 0 without steps.
        decode_s: seconds from the last step to the last image; 0 without decoding.
        encode_s: seconds that the encoding of the answer took, for all images and the whole.
        body: the answer, ready to send; empty without an encoding, and for event streams.
    """

    images: list[Image]
    queue_s: float
    denoise_s: float
    decode_s: float = 0.0
    encode_s: float = 0.0
    body: bytes = b""


class Encoding(Protocol):
    """Encodes the answer to one request. The engine calls an encoding in its last stage, one call at a time."""

    @property
    def values(self) -> tuple[int, int]:
        """How many values (pixels x channels) one call of `image` encodes, and the call of `whole`. 0 costs nothing."""

    def image(self, index: int, image: Image) -> bytes:
        """Encode image `index`, [C, H, W], as soon as it is finished. May return b"", if only `whole` encodes."""

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        """Encode the body of the answer, once all images are finished. `encoded` has the results of `image`."""


class Upload(NamedTuple):
    """Uploaded images, which the VAE must encode before their request can run.

    Attributes:
        images: [C, H, W] each; at least one.
        then: maps their latents to the request's rows and encoding, which replace the submitted draft. There are as
            many rows, of the draft's group, and with its tables and texts. May raise a ServiceError.
    """

    images: Sequence[Image]
    then: Callable[[Sequence[Moments]], tuple[Sequence[Row], Encoding | None]]


class Progress(NamedTuple):
    """How far a request is.

    Attributes:
        step, steps: steps that the slowest row has taken, and its steps in all.
        eta_s: expected seconds until the whole answer is ready.
        images_done, images: the number of images that are encoded, and of all images.
        fraction: the share of the work of all stages that is done. Never falls, and is 1 only if all is done.
    """

    step: int
    steps: int
    eta_s: float
    images_done: int
    images: int
    fraction: float


class Accepted(NamedTuple):
    """A request in the queue.

    Attributes:
        future: of the images. Its exception is always a ServiceError. A cancelled Future takes the request out.
        position: how many jobs go first, as things stand.
        eta_s: the expected seconds until the request is done.
        promise_s: the seconds by which the request will be done, whatever arrives later.
    """

    future: Future[Finished]
    position: int
    eta_s: float
    promise_s: float


class Watcher(Protocol):
    """Follows a request. The engine's threads call a watcher, and a call must not block them."""

    @property
    def preview_every(self) -> int:
        """Steps from one preview of a row to the next; 0 for no previews."""

    def progress(self, progress: Progress) -> None:
        """The request has made progress."""

    def preview(self, index: int, step: int, x0: Image) -> None:
        """The expected result of row `index`."""

    def image(self, index: int, encoded: bytes) -> None:
        """Image `index` is finished and encoded. Not called if the request has no encoding."""


class Observer(Protocol):
    """Hears of the fate of requests."""

    def request_accepted(self) -> None: ...
    def request_refused(self, reason: str) -> None: ...
    def request_started(self, queue_s: float) -> None: ...
    def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None: ...
    def request_cancelled(self, reason: str) -> None: ...


@dataclass(eq=False)
class Request:
    """A request inside the engine.

    Attributes:
        rows: one for each image. `job` knows the progress of each.
        submitted, deadline: times.
        client: None for the engine's own probe. Observers do not hear of the probe.
        encoding: of the answer; None if the images themselves are wanted.
        upload: still to be encoded; None without an upload, and afterwards.
        prompts: the texts of its rows.
        outlook: the state behind the estimate at acceptance; None for the probe.
        estimated: the time of the newest estimate, and the expected seconds from then on.
        started: when the first row started.
        latents: of the uploaded images that are encoded, by index.
        taken: the steps of the slowest row in passes that have ended.
        stepped: when the last row took its last step, if rows are decoded.
        made: when the last image was finished.
        encoded: the finished images' encodings, by index.
        encode_s: seconds that encodings of the answer took so far.
        telling: held while the watcher is told of progress, so that progress never falls.
    """

    rows: Sequence[Row]
    job: Job
    submitted: float
    deadline: float
    client: str | None = None
    watcher: Watcher | None = None
    encoding: Encoding | None = None
    upload: Upload | None = None
    prompts: Prompts = field(default_factory=lambda: Prompts({}, ()))
    outlook: Outlook | None = None
    future: Future[Finished] = field(default_factory=Future)
    estimated: tuple[float, float] | None = None
    started: float | None = None
    latents: dict[int, Moments] = field(default_factory=dict)
    taken: int = 0
    stepped: float | None = None
    made: float | None = None
    encoded: dict[int, bytes] = field(default_factory=dict)
    encode_s: float = 0.0
    telling: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def eta_s(self) -> float:
        """The expected seconds at acceptance. The first read computes them."""
        return 0.0 if self.outlook is None else self.outlook.eta()


def loading() -> Loading:
    return Loading("the model is being loaded", retry_after=2)


def draining() -> Draining:
    return Draining("the server is shutting down", retry_after=1)


def dead() -> Failed:
    return Failed("the engine has stopped", retry_after=30)


def stuck() -> Failed:
    return Failed("the model does not return", retry_after=30)
