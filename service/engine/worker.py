"""What the engine's threads have in common: how each begins, ends and dies."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from service.engine.health import Health
from service.engine.queue import Queue
from service.engine.requests import Clock
from service.errors import ComputationFailed

log = logging.getLogger(__name__)

ObserverT = TypeVar("ObserverT", covariant=True)


class Workplace(NamedTuple, Generic[ObserverT]):
    """What the threads share.

    Attributes:
        queue: the requests. Its lock guards what the threads share.
        health: hears how each thread gets on.
        observer: hears of passes and batches.
        clock: seconds, never falling.
    """

    queue: Queue
    health: Health
    observer: ObserverT
    clock: Clock


class Worker(ABC):
    """One of the engine's threads.

    Args:
        name: of the thread, in logs.
        work: of the thread, in messages about calls that do not return.
        at: what the threads share.
        first: what the thread does before its first work.

    Attributes:
        thread: not started yet.
        stage_health: hears of the thread's calls.
    """

    def __init__(self, name: str, work: str, at: Workplace[object], first: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._first = first
        self._queue = at.queue
        self._health = at.health
        self._clock = at.clock
        self.stage_health = at.health.new_stage(work)
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)

    @abstractmethod
    def _work(self) -> bool:
        """Wait for work, and do it. False when the thread must stop."""

    def _main(self) -> None:
        try:
            self._first()
            while self._work():
                pass
        except Exception as error:
            if self._queue.scheduler is None:
                why = str(error) if isinstance(error, ComputationFailed) else " ".join(repr(error).split())
                self._health.give_up(f"the model could not be warmed up: {why}")
            else:
                log.exception("%s died", self._name)
                self._health.give_up(f"{self._name} has died")
        finally:
            self.stage_health.rest()
            self._health.end()
