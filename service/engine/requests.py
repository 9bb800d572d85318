"""A request on its way through the engine, and who is told of it."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from model.rows import Image, Row
from service.engine.eta import Outlook
from service.engine.jobs import Job
from service.errors import Draining, Failed, Loading

Clock = Callable[[], float]


class Finished(NamedTuple):
    """What a request's Future gives.

    Attributes:
        images: [C, H, W] each.
        queue_s: seconds until the first step.
        denoise_s: seconds from the first step to the last.
        decode_s: seconds from the last step to the last image; 0 where nothing is decoded.
    """

    images: list[Image]
    queue_s: float
    denoise_s: float
    decode_s: float = 0.0


class Accepted(NamedTuple):
    """A request in line.

    Attributes:
        future: of its images. Its exception, if it has one, is a ServiceError. To cancel it takes the request out.
        position: the jobs that are to go first, as things stand.
        eta_s: the expected seconds until it is done.
        promise_s: the seconds until it will be done, whatever comes later.
    """

    future: Future[Finished]
    position: int
    eta_s: float
    promise_s: float


class Watcher(Protocol):
    """Follows a request, from the engine's threads, which it may not hold up."""

    @property
    def preview_every(self) -> int:
        """Steps from one preview of a row to its next; 0 for none."""

    def progress(self, step: int, steps: int, eta_s: float) -> None:
        """The slowest row has taken so many of its steps."""

    def preview(self, index: int, step: int, x0: Image) -> None:
        """What row `index` is expected to become."""

    def image(self, index: int, image: Image) -> None:
        """Row `index` is done."""


class Observer(Protocol):
    """Is told what becomes of requests."""

    def request_accepted(self) -> None: ...
    def request_refused(self, reason: str) -> None: ...
    def request_started(self, queue_s: float) -> None: ...
    def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None: ...
    def request_cancelled(self, reason: str) -> None: ...


@dataclass(eq=False)
class Request:
    """What the engine knows of a request.

    Attributes:
        rows: what is asked for. How far each is, `job` knows.
        submitted, deadline: times.
        client: who asks; None for the engine's own probe, which no observer is told of.
        outlook: what its estimate depended on when it was accepted; None for the probe.
        estimated: when its newest estimate was computed, and the expected seconds from then on.
        started: when its first row started.
        stepped: when the last of its rows that are decoded had taken its last step.
    """

    rows: Sequence[Row]
    job: Job
    submitted: float
    deadline: float
    client: str | None = None
    watcher: Watcher | None = None
    outlook: Outlook | None = None
    future: Future[Finished] = field(default_factory=Future)
    estimated: tuple[float, float] | None = None
    started: float | None = None
    stepped: float | None = None

    @cached_property
    def eta_s(self) -> float:
        """The seconds that it was expected to take when it was accepted. Whoever asks first computes them."""
        return 0.0 if self.outlook is None else self.outlook.eta()


def loading() -> Loading:
    return Loading("the model is being loaded", retry_after=2)


def draining() -> Draining:
    return Draining("the server is shutting down", retry_after=1)


def dead() -> Failed:
    return Failed("the engine has stopped", retry_after=30)


def stuck() -> Failed:
    return Failed("a forward pass does not return", retry_after=30)
