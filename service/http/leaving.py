"""Clients that close the connection before they have their answer. Starlette goes on working for them."""

import asyncio
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def unless_client_leaves(receive: Receive, work: asyncio.Future[T]) -> T | None:
    """Wait for some work. Cancel the work and return None if the client closes the connection first."""
    left = asyncio.ensure_future(_disconnected(receive))
    try:
        either: set[asyncio.Future[Any]] = {work, left}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        left.cancel()
        work.cancel()  # no effect on work that is done


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
