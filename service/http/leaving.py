"""Clients that leave before their answer. Starlette itself goes on working for them."""

import asyncio
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def unless_client_leaves(receive: Receive, work: asyncio.Future[T]) -> T:
    """Wait for the work. If the client closes the connection first, cancel the work.

    Raises:
        ClientDisconnect: the client has closed the connection.
    """
    left = asyncio.ensure_future(_disconnected(receive))
    try:
        either: set[asyncio.Future[Any]] = {work, left}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return await work
    finally:
        left.cancel()
        work.cancel()  # no effect on finished work


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
