"""Request bodies on their way in: how many bytes each client holds, and for how long.

Each connection holds FREE bytes without taking room. The HTTP server buffers about as many for each connection anyway.
So small bodies never wait. A larger body takes room first. Without free room, the body waits unread.
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
_RETRY_S = 5.0  # about the seconds that a large body takes


@dataclass(eq=False)
class _Waiter:
    client: str
    size: int
    granted: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Room:
    """The bytes of all large bodies. Bodies without room wait in order of arrival.

    While other clients wait, a client that holds its share gets no more. A client that holds less may use the spare
    room. So no client can lock out the others. All calls come from one event loop.

    Args:
        total: bytes.
        spare: more bytes, for clients that hold less than their share.
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
            first: go ahead of the bodies that hold nothing yet. Only a body that is read to its end gives room back.

        Raises:
            ShareTaken: the client holds its share, and other clients wait.
            QueueFull: no room became free within `patience_s`.
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
        """Let in the bodies that fit, and refuse clients that hold their share while other clients wait."""
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
        """Let in the bodies that fit, in order of arrival. Clients below `share` may use the spare room."""
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
    """The body of one request. Its bytes count from their arrival until `let_go`.

    Args:
        scope: of the request.
        receive: gives the body.
        room: for all bodies.
        client: the sender of the body.
        max_bytes: the most bytes of this body.
        patience_s: seconds for the whole body, without the wait for room.
        wait_s: seconds of waiting for room.

    Attributes:
        client: as above.
        is_too_large: whether the declared length is too large.
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
        self._taken = 0  # bytes of the room
        self._count = 0  # bytes that have arrived
        self._data = bytearray()
        self.is_too_large = self._declared is not None and self._declared > max_bytes
        self._is_unread = True

    @staticmethod
    def of(request: Request) -> "Body":
        """The body of a request that came through the middleware."""
        body: Body = request.scope[IN_SCOPE]
        return body

    async def is_empty(self) -> bool:
        """Whether the body has no bytes."""
        if self._declared is None:
            while self._is_unread and not self._data:
                await self._read_on()
            return not self._data
        return self._declared == 0

    async def read(self) -> bytearray:
        """The whole body. The caller owns its bytes, and calls `let_go` once they are gone.

        Raises:
            BodyTooLarge, TooSlow, ShareTaken, QueueFull: as early as possible.
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
        """The next message: a piece of the body, or a message after the body."""
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
        """Give the room back. The bytes are gone."""
        self._data = bytearray()
        if self._taken:
            self._room.give_back(self.client, self._taken)
            self._taken = 0
