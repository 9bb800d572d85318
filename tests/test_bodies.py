"""Request bodies take bounded memory, whoever sends them and however slowly. Small bodies never wait."""

import asyncio
import base64
import gc
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import QueueFull, ShareTaken
from service.http import middleware
from service.http.bodies import FREE, Room
from tests.local import FakeServer, serving_fake
from tests.servers import PATIENCE, ServerProcess, problem, serving, write_npy

LARGE = 4 * FREE  # the largest body of these servers; there is room for four and a spare one
IMAGE = base64.b64encode(write_npy(np.zeros((1, 1, 2), np.float32))).decode()


# The room


class Crowd:
    """Clients that take room, wait for room and give it back."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.waiting: list[tuple[str, int, asyncio.Task[None]]] = []
        self.holding: list[tuple[str, int]] = []
        self.refused: list[str] = []

    async def come(self, client: str, size: int) -> None:
        self.waiting.append((client, size, asyncio.create_task(self.room.take(client, size, PATIENCE))))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)
        for one in list(self.waiting):
            client, size, task = one
            if task.done():
                self.waiting.remove(one)
                if task.exception() is None:
                    self.holding.append((client, size))
                else:
                    assert isinstance(task.exception(), ShareTaken)
                    self.refused.append(client)

    async def leave(self, which: int) -> None:
        self.room.give_back(*self.holding.pop(which))
        await self.settle()

    async def hang_up(self, which: int) -> None:
        _, _, task = self.waiting.pop(which)
        task.cancel()
        await self.settle()

    def held(self, client: str | None = None) -> int:
        return sum(size for one, size in self.holding if client in (None, one))


MOVES = st.tuples(
    st.sampled_from(["come", "come", "come", "leave", "hang up"]), st.sampled_from("abc"), st.integers(1, 4)
)


@given(st.lists(MOVES, max_size=60))
def test_whatever_clients_do_the_room_is_bounded_and_used(moves: list[tuple[str, str, int]]) -> None:
    async def play() -> None:
        crowd = Crowd(Room(12, spare=4))
        for kind, client, size in moves:
            if kind == "come":
                await crowd.come(client, size)
            elif kind == "leave" and crowd.holding:
                await crowd.leave(size % len(crowd.holding))
            elif kind == "hang up" and crowd.waiting:
                await crowd.hang_up(size % len(crowd.waiting))
            assert crowd.room.held == crowd.held() <= 16
            clients = {one for one, *_ in [*crowd.holding, *crowd.waiting]}
            if crowd.waiting:
                assert crowd.held() + crowd.waiting[0][1] > 12  # the first in line waits only because room is short
            for one, size, _ in crowd.waiting:
                if crowd.held(one) < 12 / len(clients) and len(clients) > 1:
                    assert crowd.held() + size > 16
            if len({one for one, *_ in crowd.waiting}) > 1:  # only clients below their share wait
                assert all(crowd.held(one) < 12 / len(clients) for one, *_ in crowd.waiting)
        while crowd.holding or crowd.waiting:
            await (crowd.leave(0) if crowd.holding else crowd.hang_up(0))
        assert crowd.room.held == 0

    asyncio.run(play())


def test_room_is_given_in_order_of_arrival() -> None:
    async def play() -> None:
        crowd = Crowd(Room(4, spare=0))
        for size in (4, 3, 2, 1):
            await crowd.come("a", size)
        await crowd.leave(0)
        assert [size for _, size in crowd.holding] == [3]  # the last would fit, but waits behind the third
        await crowd.leave(0)
        assert [size for _, size in crowd.holding] == [2, 1]
        await crowd.leave(0)
        await crowd.leave(0)

    asyncio.run(play())


def test_who_holds_a_share_is_refused_while_others_wait() -> None:
    async def play() -> None:
        crowd = Crowd(Room(4, spare=1))
        for client in "aaaaaa":
            await crowd.come(client, 1)
        assert len(crowd.holding) == 4
        assert crowd.refused == []  # a lone client may wait
        await crowd.come("b", 1)
        assert crowd.holding[-1] == ("b", 1)  # from the spare room
        await crowd.come("b", 1)
        assert crowd.refused == ["a", "a"]
        await crowd.come("a", 1)
        assert crowd.refused == ["a", "a", "a"]
        await crowd.leave(0)
        assert crowd.held("b") == 2

    asyncio.run(play())


def test_who_waits_too_long_is_refused() -> None:
    async def play() -> None:
        room = Room(4, spare=1)
        await room.take("a", 4, PATIENCE)
        with pytest.raises(QueueFull, match="no room for this body within 0 s"):
            await room.take("a", 1, 0.0)
        room.give_back("a", 4)
        await room.take("a", 4, 0.0)

    asyncio.run(play())


# Over HTTP. When a server begins to read a body, it sends 100 to a client that waits for 100.


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving_fake(max_body=LARGE) as running:
        yield running


def body(size: int = LARGE) -> bytes:
    return json.dumps({"image": IMAGE, "timestep": 9, "num_inference_steps": 1}).encode().ljust(size)


class Sender:
    """A client that sends a body in pieces."""

    def __init__(self, server: FakeServer, size: int = LARGE, source: str = "127.0.0.1", chunked: bool = False) -> None:
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
        self.connection = socket.create_connection(server.address, PATIENCE, (source, 0))
        head = f"POST /denoise HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n"
        self.connection.sendall(f"{head}Connection: close\r\nExpect: 100-continue\r\n\r\n".encode())

    def status(self) -> int:
        """The status of the server's next answer."""
        with self.connection.makefile("rb", buffering=0) as answer:
            status = int(answer.readline().split()[1])
            while answer.readline().strip():
                pass
        return status

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def reading(stack: ExitStack, server: FakeServer, count: int, **how: str) -> list[Sender]:
    """Clients whose bodies the server reads."""
    senders = [stack.enter_context(Sender(server, **how)) for _ in range(count)]  # type: ignore[arg-type]
    assert [sender.status() for sender in senders] == [100] * count
    return senders


def test_a_body_waits_unread_until_there_is_room(server: FakeServer) -> None:
    with ExitStack() as stack:
        first, *_ = reading(stack, server, 4)
        waiting = stack.enter_context(Sender(server))
        assert server.client.post("/sample", json={}).status_code == 200  # small bodies do not wait
        first.send(body())
        assert first.status() == 200
        assert waiting.status() == 100
        waiting.send(body())
        assert waiting.status() == 200


def test_another_client_finds_room(server: FakeServer) -> None:
    with ExitStack() as stack:
        reading(stack, server, 4)
        [other] = reading(stack, server, 1, source="127.0.0.2")
        other.send(body())
        assert other.status() == 200


def test_who_waits_for_room_too_long_is_told_when_to_come_again(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        first, *_ = reading(stack, server, 4)
        with monkeypatch.context() as patch:
            patch.setattr(middleware, "BODY_WAIT_S", 0.05)
            refused = server.client.post("/denoise", content=body(), headers={"Content-Type": "application/json"})
        assert "no room for this body" in problem(refused, 503)["detail"]
        assert int(refused.headers["retry-after"]) > 0
        first.send(body())
        assert first.status() == 200


def test_a_slow_body_holds_its_room_for_a_while_only(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        with monkeypatch.context() as patch:
            patch.setattr(middleware, "BODY_PATIENCE_S", 0.2)
            slow = [stack.enter_context(Sender(server)) for _ in range(4)]
            assert [sender.status() for sender in slow] == [100] * 4
        assert [sender.status() for sender in slow] == [408] * 4
        reading(stack, server, 4)


def test_a_client_that_leaves_gives_its_room_back(server: FakeServer) -> None:
    with ExitStack() as stack:
        with ExitStack() as leaving:
            reading(leaving, server, 4)
        reading(stack, server, 4)


def test_a_body_without_a_length_takes_room_as_it_comes(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        growing = stack.enter_context(Sender(server, chunked=True))
        assert growing.status() == 100
        growing.send(b"%x\r\n" % LARGE + body()[: FREE // 2])  # as much as it may hold without a reservation
        four = reading(stack, server, 4)
        monkeypatch.setattr(middleware, "BODY_WAIT_S", 0.05)
        late = stack.enter_context(Sender(server, chunked=True))
        late.send(b"%x\r\n" % LARGE + body() + b"\r\n0\r\n\r\n")
        assert [late.status(), late.status()] == [100, 503]
        four[0].send(body())
        assert four[0].status() == 200
        growing.send(body()[FREE // 2 :] + b"\r\n0\r\n\r\n")
        assert growing.status() == 200


def test_who_sends_on_after_a_413_holds_no_room(server: FakeServer) -> None:
    with ExitStack() as stack:
        for _ in range(8):
            endless = stack.enter_context(Sender(server, chunked=True))
            endless.send(b"%x\r\n" % (4 * LARGE) + bytes(LARGE + FREE))
            assert [endless.status(), endless.status()] == [100, 413]
        reading(stack, server, 4)


def large_bytes(least: int) -> set[int]:
    """The identities of all bytes of at least this length that an object of this process holds.

    tracemalloc would tell the memory, too. But it ends the process, now and then, where other threads run.
    """
    held = (one for holder in gc.get_objects() for one in gc.get_referents(holder))
    return {id(one) for one in held if type(one) in (bytes, bytearray) and len(one) >= least}


def test_requests_in_the_queue_hold_no_bodies() -> None:
    size = 2**20
    with serving_fake(max_body=size) as server, ExitStack() as stack:
        server.runner.hold()
        before = large_bytes(size // 2)
        for i in range(1, 9):  # twice as many as fit
            sender = stack.enter_context(Sender(server, size))
            assert sender.status() == 100
            sender.send(body(size))
            server.wait_for_metric("stepwise_accepted_total", lambda n, i=i: n >= i)  # type: ignore[misc]
        gc.collect()
        held = large_bytes(size // 2) - before
        assert len(held) < 4  # of eight bodies; one may be on its way
        server.runner.let_go()


def test_bodies_of_other_routes_are_not_read(server: FakeServer) -> None:
    headers = {"Content-Length": str(LARGE)}
    for path in ("/nowhere", "/info"):
        with server.raw_request("POST", path, headers) as connection:
            assert connection.recv(11) == b"HTTP/1.1 40"


# Memory of a real server


def resident(process: ServerProcess) -> int:
    """Resident memory in bytes."""
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("chunked", [False, True])
def test_forty_bodies_that_do_not_end_take_bounded_memory(weights: Path, chunked: bool) -> None:
    """16 MiB each, 640 MiB together."""
    size = 2**24
    with serving(WEIGHTS=weights / "grey", MAX_BATCH=1) as server, ExitStack() as stack:
        assert server.client.post("/sample", json={}).status_code == 200
        before = resident(server)
        length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(size)}
        senders = [
            stack.enter_context(server.raw_request("POST", "/denoise", {"Content-Type": "application/json", **length}))
            for _ in range(40)
        ]
        piece = bytes(2**16)
        for sender in senders:
            sender.settimeout(0.5)
            try:
                if chunked:
                    sender.sendall(b"%x\r\n" % size)
                for _ in range(size // len(piece) - 1):
                    sender.sendall(piece)
            except (TimeoutError, ConnectionError):  # the body waits unread, or has been refused
                pass
        assert server.client.post("/sample", json={}).status_code == 200
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=PATIENCE) as other:
            image = {"image": write_npy(np.zeros((1, 16, 16), np.float32)) + bytes(2**20)}
            assert other.post(f"{server.url}/denoise", files=image, data={"timestep": "5"}).status_code == 422
        assert resident(server) - before < 6 * size + 40 * 2**20  # with one copy, and the sockets' buffers
