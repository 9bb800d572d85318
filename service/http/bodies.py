"""Request bodies on their way in: how many of their bytes are held, by whom, and for how long.

A connection may hold FREE bytes without asking: the HTTP server buffers about as many for each connection anyway. So
small bodies never wait. A larger body takes room first. While there is no room, the body waits unread.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope

from service.errors import BodyTooLarge, QueueFull, ShareTaken, TooSlow

FREE = 2**16  # bytes
IN_SCOPE = "stepwise.body"  # the key of a request's Body
_GROWTH = 2**20  # bytes that a body without a declared length takes at once
_RETRY_S = 5.0  # about the time that a large body takes


@dataclass(eq=False)
class _Waiter:
    client: str
    size: int
    granted: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Room:
    """The bytes of all large bodies. Bodies that find no room wait in order of arrival.

    A client that holds its share gets no more while others wait. A client that holds less may use the spare room. So
    others are served, however much one client sends. All calls come from one event loop.

    Args:
        total: bytes.
        spare: bytes beside these, for clients that hold less than their share.
    """

    def __init__(self, total: int, spare: int) -> None:
        self._total = total
        self._spare = spare
        self._held: Counter[str] = Counter()
        self._line: list[_Waiter] = []

    @property
    def held(self) -> int:
        return self._held.total()

    async def take(self, client: str, size: int, patience_s: float, *, first: bool = False) -> None:
        """Wait for room.

        Args:
            first: go ahead of those who hold nothing yet, for only a body that is read gives room back.

        Raises:
            ShareTaken: the client holds its share, and others wait.
            QueueFull: there was no room within `patience_s`.
        """
        waiter = _Waiter(client, size)
        self._line.insert(0 if first else len(self._line), waiter)
        self._admit()
        try:
            await asyncio.wait({waiter.granted}, timeout=patience_s)
        except asyncio.CancelledError:
            if waiter.granted.done() and waiter.granted.result():
                self.give_back(client, size)
            raise
        finally:
            if waiter in self._line:
                self._line.remove(waiter)
                self._admit()
        if not waiter.granted.done():
            raise QueueFull(f"there was no room for this body within {patience_s:g} s", _RETRY_S)
        if not waiter.granted.result():
            raise ShareTaken("you hold your share of the room for bodies, and others wait", _RETRY_S)

    def give_back(self, client: str, size: int) -> None:
        self._held[client] -= size
        if not self._held[client]:
            del self._held[client]
        self._admit()

    def _admit(self) -> None:
        """Let in whoever there is room for, and refuse those who hold their share while others wait."""
        while True:
            clients = self._held.keys() | {waiter.client for waiter in self._line}
            share = self._total / max(1, len(clients))
            self._let_in(share if len(clients) > 1 else 0)
            waiting = {waiter.client for waiter in self._line}
            greedy = next((client for client in sorted(waiting) if self._held[client] >= share), None)
            if greedy is None or len(waiting) == 1:
                return
            for waiter in [waiter for waiter in self._line if waiter.client == greedy]:
                self._leave(waiter, granted=False)

    def _let_in(self, share: float) -> None:
        """Let in those that fit, in order of arrival. A client that holds less than `share` may use the spare room."""
        in_turn = True
        for waiter in list(self._line):
            free = self._total - self.held - waiter.size
            if (in_turn and free >= 0) or (self._held[waiter.client] < share and free + self._spare >= 0):
                self._held[waiter.client] += waiter.size
                self._leave(waiter, granted=True)
            else:
                in_turn = False

    def _leave(self, waiter: _Waiter, granted: bool) -> None:
        self._line.remove(waiter)
        waiter.granted.set_result(granted)


class Body:
    """The body of one request. Its bytes are counted from when they are read until `let_go`.

    Args:
        scope: of the request.
        receive: gives the body.
        room: for all bodies.
        client: who sends the body.
        max_bytes: of this body.
        patience_s: for the whole body, without the time that it waits for room.
        wait_s: for room.

    Attributes:
        client: as above.
        is_too_large: whether its declared length is.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        room: Room,
        client: str,
        max_bytes: int,
        patience_s: float,
        wait_s: float,
    ) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        self._declared = int(length) if length.isdigit() and b"transfer-encoding" not in headers else None
        self._receive = receive
        self._room = room
        self.client = client
        self._max_bytes = max_bytes
        self._patience_s = patience_s
        self._wait_s = wait_s
        self._deadline: float | None = None
        self._taken = 0  # of the room
        self._count = 0  # of the bytes that have come
        self._data = bytearray()
        self.is_too_large = self._declared is not None and self._declared > max_bytes
        self._is_unread = True

    @staticmethod
    def of(request: Request) -> "Body":
        """The body of a request that came through the middleware."""
        body: Body = request.scope[IN_SCOPE]
        return body

    async def is_empty(self) -> bool:
        """Whether not one byte comes."""
        if self._declared is None:
            while self._is_unread and not self._data:
                await self._read_on()
            return not self._data
        return self._declared == 0

    async def read(self) -> bytearray:
        """The whole body. Its bytes are the caller's from now on. The caller calls `let_go` once they are gone.

        Raises:
            BodyTooLarge, TooSlow, ShareTaken, QueueFull: as soon as that is known.
            ClientDisconnect: the client closed the connection.
        """
        while self._is_unread:
            await self._read_on()
        whole, self._data = self._data, bytearray()
        return whole

    async def discard(self) -> None:
        """Read the body to its end and keep nothing. Raises as `read` does."""
        await self.read()
        self.let_go()

    async def _read_on(self) -> None:
        message = await self.receive()
        if message["type"] == "http.disconnect":
            self._is_unread = False
            raise ClientDisconnect
        self._data += message.get("body", b"")

    async def receive(self) -> Message:
        """The next piece of the body, and what comes after it."""
        if not self._is_unread:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._patience_s
            if self._declared is not None and self._declared > FREE:
                await self._take(self._declared)
        message = await self._in_time(self._receive())
        self._count += len(message.get("body", b""))
        self._is_unread = message.get("more_body", False)
        if self._count > self._max_bytes:
            raise self.too_large()
        if self._count > max(FREE, self._taken):
            await self._take(min(self._count + _GROWTH, self._max_bytes) - self._taken)
        return message

    def too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body must be at most {self._max_bytes} bytes")

    async def _in_time(self, piece: Awaitable[Message]) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await piece
        except TimeoutError:
            raise TooSlow(f"the whole body was not here within {self._patience_s:g} s") from None

    async def _take(self, size: int) -> None:
        now: Callable[[], float] = asyncio.get_running_loop().time
        began = now()
        await self._room.take(self.client, size, self._wait_s, first=self._taken > 0)
        self._taken += size
        assert self._deadline is not None
        self._deadline += now() - began

    def let_go(self) -> None:
        """The bytes are gone: others may have the room."""
        self._data = bytearray()
        if self._taken:
            self._room.give_back(self.client, self._taken)
            self._taken = 0
