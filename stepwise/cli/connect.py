"""Makes a client from a command's options: for a server, or with --local for an app in this process."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from stepwise import AsyncClient, Unreachable
from stepwise.cli import progress
from stepwise.cli.exits import Unusable
from stepwise.cli.extras import server_for

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """The server, as a command's options say. `weights` needs `local`."""

    url: str
    patience_s: float
    local: bool
    weights: str | None


def run(server: Server, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    """Do a command's work with a client. Ctrl-C closes the connections, and the server stops its work.

    Raises:
        Unusable: the weights cannot be loaded, or are given without --local.
    """
    return _run_local(server, work) if server.local else _run_remote(server, work)


def _run_remote(server: Server, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    if server.weights is not None:
        raise Unusable(f"--weights {server.weights} is for --local; a server has its own")
    api_key = os.environ.get("STEPWISE_API_KEY") or None
    try:
        client = AsyncClient(server.url, api_key=api_key, patience_s=server.patience_s)
    except Unreachable as error:
        raise Unusable(f"--url {server.url}: {error}") from None

    async def connected() -> T:
        async with client:
            return await work(client)

    return asyncio.run(connected())


def _run_local(server: Server, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    with progress.waiting("loading the weights"):
        with server_for("--local"):
            from stepwise.cli.local import assemble

        opened = assemble(server.weights)  # before asyncio's loop, which would delay Ctrl-C

    async def connected() -> T:
        async with opened as transport, AsyncClient(transport=transport, patience_s=server.patience_s) as client:
            return await work(client)

    return asyncio.run(connected())
