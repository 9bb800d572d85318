"""A peer that differs in nothing but its scheduler: Stepwise, but rows join no batch that has begun.

    STEPWISE_WEIGHTS=FOLDER STEPWISE_PORT=9101 python -m bench.peers.batches_server

When a batch has ended, all that waits, up to the widest pass, is the next one. That is batching by request, and kinder
than what is common: rows with different numbers of steps share a batch, and those that are done leave it.
"""

from typing import Any

import service.__main__ as stepwise
from service.engine import Engine
from service.scheduler import Scheduler


class Batches(Scheduler[Any]):
    def next_batch(self) -> list[tuple[Any, int]]:
        begun = [task for task in self._line if task.started]
        if not begun:
            return super().next_batch()
        due = [
            (task, branch)
            for task in begun
            for branch in range(task.forwards_per_step - task._due, task.forwards_per_step)
        ]
        return due[: self.max_batch]


class BatchEngine(Engine):
    def __init__(self, runner: Any, *rest: Any) -> None:
        super().__init__(runner, *rest)
        self._scheduler = Batches(runner.widths[-1])


if __name__ == "__main__":
    setattr(stepwise, "Engine", BatchEngine)  # noqa: B010
    stepwise.main()
