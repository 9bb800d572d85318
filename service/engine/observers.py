"""Keeps an observer's errors away from the engine."""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Unfailing:
    """Passes calls on to an observer. If the observer raises, the error is logged, and the caller goes on.

    Args:
        observer: its methods return nothing.
    """

    def __init__(self, observer: object) -> None:
        self._observer = observer

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._observer, name)

        def tell(*args: Any) -> None:
            try:
                method(*args)
            except Exception:
                log.exception("an observer failed: %s", name)

        return tell
