"""Observers that raise harm nobody."""

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Unfailing:
    """Tells an observer. Where that raises, the error is logged, and whoever told it goes on.

    Args:
        observer: has methods that return nothing.
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
