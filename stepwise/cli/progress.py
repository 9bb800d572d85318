"""Progress bars for a waiting person. They appear on standard error, if it is a terminal."""

import sys
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing, contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from stepwise import Done, Event, Image, ImageDone, Queued, Unreachable
from stepwise import Progress as Taken
from stepwise.cli.exits import say


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show what the person waits for, while the block runs."""
    with _bar() as bar:
        bar.add_task(what, total=None, more="")
        yield


async def drawn(events: AsyncGenerator[Event, None], count: int) -> tuple[list[Image], Done]:
    """Show how a request goes, and say its warnings. Returns its `count` images in order, and its last event.

    Raises:
        Unreachable: other images came, or the last event is missing.
    """
    images: dict[int, Image] = {}
    said: set[str] = set()
    async with aclosing(events):  # an early end here ends the server's work
        with _bar() as bar:
            task = bar.add_task("waiting for the server", total=None, more="")
            async for event in events:
                match event:
                    case Queued(position, eta_s, warnings=warnings):
                        warn([warning for warning in warnings if warning not in said])
                        said.update(warnings)  # a stream that breaks begins again
                        what = f"in line, {position} before" if position else "drawing"
                        bar.update(task, description=what, more=f"{duration(eta_s)} left")
                    case Taken(eta_s=eta_s, fraction=fraction):
                        more = f"{how_far(event)}, {duration(eta_s)} left"
                        bar.update(task, description="drawing", completed=fraction, total=1, more=more)
                    case ImageDone(index, image):
                        images[index] = image
                    case Done():
                        if sorted(images) != list(range(count)):
                            raise Unreachable(f"of {count} images the server sent those of the indices {list(images)}")
                        return [images[index] for index in range(count)], event
    raise Unreachable("the server's events ended without the last")


def warn(warnings: Iterable[str]) -> None:
    """Print the server's warnings."""
    for warning in warnings:
        say(f"warning: {warning}")


def how_far(taken: Taken) -> str:
    """The images that are done, or, of one image, the steps."""
    if taken.images_done is None or taken.images is None or taken.images < 2:
        return f"step {taken.step} of {taken.steps}"
    return f"{taken.images_done} of {taken.images} images"


@contextmanager
def counting(what: str, total: int) -> Iterator["Count"]:
    """Show how many of `total` are done."""
    with _bar() as bar:
        yield Count(bar, what, total)


class Count:
    """A bar that shows how many of `total` are done."""

    def __init__(self, bar: Progress, what: str, total: int) -> None:
        self._bar = bar
        self._total = total
        self._done = 0
        self._task = bar.add_task(what, total=total, more=f"0 of {total}")

    def one_more(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done, more=f"{self._done} of {self._total}")


def duration(seconds: float) -> str:
    """A duration for a person: 0.8 s, 12 s, 3 min 5 s."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[more]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
