"""Connections: those that are slow, too large or not HTTP are closed, at no cost to others."""

import json
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from http import HTTPStatus

import pytest

from service.http import connections, middleware
from service.http.framing import MAX_HEAD
from tests.local import FakeServer, serving_fake
from tests.servers import PATIENCE, Json

HEAD = b"POST /sample HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving_fake() as running:
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, server: FakeServer) -> FakeServer:
    """A server with the shortest time limits."""
    monkeypatch.setattr(connections, "HEAD_PATIENCE_S", 0.05)
    monkeypatch.setattr(middleware, "BODY_PATIENCE_S", 0.05)
    return server


def everything(connection: socket.socket) -> bytes:
    """All bytes until the connection is closed."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def refusal(answer: bytes, status: int) -> str:
    """The detail of a problem document, which must be the last thing on the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    assert first.decode() == f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"
    headers = dict(line.lower().split(b": ", 1) for line in lines)
    assert re.fullmatch(rb"[0-9a-f]{32}", headers[b"x-request-id"])
    assert headers[b"content-security-policy"] == b"default-src 'none'; frame-ancestors 'none'"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"connection"] == b"close"
    assert int(headers[b"content-length"]) == len(body)
    document: Json = json.loads(body)
    assert document["status"] == status
    detail: str = document["detail"]
    return detail


def says(server: FakeServer, sent: bytes) -> bytes:
    with socket.create_connection(server.address, PATIENCE) as connection:
        connection.sendall(sent)
        return everything(connection)


def is_well(server: FakeServer) -> bool:
    """Whether the server answers fast clients. On a busy machine this takes several tries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connections, "HEAD_PATIENCE_S", PATIENCE)
        patch.setattr(middleware, "BODY_PATIENCE_S", PATIENCE)
        return server.client.post("/sample", json={}).status_code == 200


def test_a_connection_on_which_nothing_comes_is_closed(impatient: FakeServer) -> None:
    assert says(impatient, b"") == b""
    assert is_well(impatient)


@pytest.mark.parametrize("begun", [b"P", b"POST /sample HT", HEAD, HEAD + b"X-A"])
def test_a_head_that_does_not_come_is_refused(impatient: FakeServer, begun: bytes) -> None:
    answer = says(impatient, begun)
    assert "headers were not all here within 0.05 s" in refusal(answer, 408)
    assert is_well(impatient)


def test_nor_does_the_next_head_of_a_connection(impatient: FakeServer) -> None:
    answer = says(impatient, b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\nGET /info HTTP/1.1\r\n")
    live, _, late = answer.partition(b'{"status":"live"}')
    assert live.startswith(b"HTTP/1.1 200")
    assert "headers" in refusal(late, 408)


def test_a_head_that_is_slow_waits_for_the_answer_before_it(impatient: FakeServer) -> None:
    """Bytes that the client sends after its request do not interrupt the answer."""
    impatient.runner.hold()
    with socket.create_connection(impatient.address, PATIENCE) as connection:
        connection.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}GET /info HT")
        impatient.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)
        impatient.runner.let_go()
        answer = everything(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"\x89PNG" in answer
    assert b"HTTP/1.1 408" in answer.partition(b"IEND")[2]


@pytest.mark.parametrize("body", [b"", b'{"seed": '])
def test_a_body_that_does_not_come_is_refused(impatient: FakeServer, body: bytes) -> None:
    answer = says(impatient, HEAD + b"Content-Length: 100\r\n\r\n" + body)
    assert refusal(answer, 408) == "the whole body was not here within 0.05 s"
    assert is_well(impatient)


def test_a_request_that_is_all_here_may_wait(impatient: FakeServer) -> None:
    """A complete request may wait for its answer without limit."""
    impatient.runner.hold()
    with ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(impatient.address, PATIENCE))
        connection.sendall(HEAD + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
        impatient.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)
        assert says(impatient, b"") == b""  # waits until the time is over
        impatient.runner.let_go()
        assert everything(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "endless",
    [
        b"GET /" + b"a" * (5 * MAX_HEAD),
        b"GET /info HTTP/1.1\r\nX-A: " + b"a" * (5 * MAX_HEAD),
        b"GET /info HTTP/1.1\r\n" + b"X-A: a\r\n" * MAX_HEAD,
    ],
)
def test_a_head_without_end_is_refused(server: FakeServer, endless: bytes) -> None:
    assert refusal(says(server, endless), 431) == f"the address and the headers must be at most {MAX_HEAD} bytes"
    assert is_well(server)


def test_a_head_that_is_just_too_large_is_told_so(server: FakeServer) -> None:
    with socket.create_connection(server.address, PATIENCE) as connection:
        connection.sendall(b"GET /info HTTP/1.1\r\nX-A: ")
        connection.sendall(b"a" * MAX_HEAD)
        assert "at most 65536 bytes" in refusal(everything(connection), 431)


def test_a_large_body_is_no_large_head(server: FakeServer) -> None:
    body = b"{}".ljust(10 * MAX_HEAD)
    assert server.client.post("/sample", content=body).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n", b"hello\r\n\r\n", HEAD + b"A\r\n\r\n"],
)
def test_what_is_no_http_is_told_so(server: FakeServer, sent: bytes) -> None:
    assert "this is no HTTP request" in refusal(says(server, sent), 400)
    assert is_well(server)


def test_idle_connections_are_closed_after_the_time_that_is_set() -> None:
    with serving_fake(keep_alive=0.05) as server:
        answer = says(server, b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b'{"status":"live"}')


def test_the_time_for_idle_connections_is_none_for_heads() -> None:
    """A head that has begun has a limit of its own."""
    with serving_fake(keep_alive=0.05) as brief, socket.create_connection(brief.address, PATIENCE) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\nGET /health/live HTTP/1.1\r\nHost: ")
        while not (came := connection.recv(65536)).endswith(b'{"status":"live"}'):
            pass
        assert says(brief, b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n")  # lasts until the idle limit has passed
        connection.sendall(b"test\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 "), came


def test_a_server_that_drains_says_so_and_closes(server: FakeServer) -> None:
    """Idle connections close at once, the others after their answer."""
    live = b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n"
    stream = HEAD + b"Accept: text/event-stream\r\nContent-Length: 2\r\n\r\n{}"
    with ExitStack() as stack:
        idle, half, busy, watching, silent = (
            stack.enter_context(socket.create_connection(server.address, PATIENCE)) for _ in range(5)
        )
        for connection in (idle, half):
            connection.sendall(live)
            assert connection.recv(65536).endswith(b'{"status":"live"}')
        half.sendall(live[:20])
        server.runner.hold()
        busy.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
        server.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)
        watching.sendall(stream)
        assert watching.recv(65536).startswith(b"HTTP/1.1 200 ")

        server.signal(signal.SIGTERM)
        assert everything(idle) == b""
        half.sendall(live[20:])
        silent.sendall(live)
        for connection in (half, silent):
            answer = everything(connection)
            assert b"\r\nconnection: close\r\n" in answer.lower()
            assert answer.endswith(b'{"status":"live"}')
        refused = says(server, HEAD + b"Content-Length: 2\r\n\r\n{}" + live)
        assert "shut" in refusal(refused, 503) or "drain" in refusal(refused, 503)

        server.runner.let_go()
        answer = everything(busy)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answer.lower()
        assert b"event: done" in everything(watching)
    server.wait()
