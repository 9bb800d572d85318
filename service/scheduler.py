"""Which rows run at the next tick. Pure Python: no torch, no asyncio, no clock.

First come, first served: each tick takes the forward rows that are due from the front of the line, up to the widest
pass. Rows join as soon as there is room and leave when they are done, between any two steps. A guided row takes two
forward rows a step, which may fall into different ticks.
"""

from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar


class Task:
    """One image in line, as the scheduler sees it.

    Attributes:
        steps_left: sampler steps still to take.
        forwards_per_step: forward rows of each step, 1 or 2.
    """

    __slots__ = ("_due", "forwards_per_step", "started", "steps_left")

    def __init__(self, steps: int, forwards_per_step: int) -> None:
        self.steps_left = steps
        self.forwards_per_step = forwards_per_step
        self.started = False
        self._due = forwards_per_step  # forward rows of the present step that have not run

    @property
    def forwards_left(self) -> int:
        return (self.steps_left - 1) * self.forwards_per_step + self._due


T = TypeVar("T", bound=Task)


class Scheduler(Generic[T]):
    """The line of tasks.

    Args:
        max_batch: the most forward rows of one tick. No more tasks than that are ever started and not finished.
    """

    def __init__(self, max_batch: int) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, and is {max_batch}")
        self.max_batch = max_batch
        self._line: dict[T, None] = {}  # in order of arrival
        self._running = 0
        self._outstanding = 0

    @property
    def running(self) -> int:
        """Tasks that have started."""
        return self._running

    @property
    def waiting(self) -> int:
        """Tasks that have not."""
        return len(self._line) - self._running

    @property
    def outstanding(self) -> int:
        """Forward rows still to run, over all tasks."""
        return self._outstanding

    def add(self, tasks: Iterable[T]) -> None:
        """Put tasks at the end of the line."""
        for task in tasks:
            self._line[task] = None
            self._outstanding += task.forwards_left

    def remove(self, tasks: Iterable[T]) -> None:
        """Take tasks out of the line, wherever they are; those that are not in it are ignored."""
        for task in tasks:
            if task in self._line:
                del self._line[task]
                self._running -= task.started
                self._outstanding -= task.forwards_left

    def next_batch(self) -> list[tuple[T, int]]:
        """Choose the forward rows of the next tick, as (task, branch), and start their tasks."""
        batch: list[tuple[T, int]] = []
        for task in self._line:
            first = task.forwards_per_step - task._due
            batch.extend((task, branch) for branch in range(first, task.forwards_per_step))
            if len(batch) >= self.max_batch:
                break
        del batch[self.max_batch :]
        for task, _ in batch:
            self._running += not task.started
            task.started = True
        return batch

    def advance(self, batch: Sequence[tuple[T, int]]) -> list[T]:
        """Count a tick's forward rows as done. Return the tasks that are finished, which have left the line."""
        finished = []
        for task, _ in batch:
            task._due -= 1
            self._outstanding -= 1
            if task._due == 0:
                task.steps_left -= 1
                task._due = task.forwards_per_step
                if task.steps_left == 0:
                    task._due = 0
                    finished.append(task)
        for task in finished:
            del self._line[task]
            self._running -= 1
        return finished
