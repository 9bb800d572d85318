"""Where a request ends: the client, the server and HAProxy agree."""

import json
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise, product
from threading import Thread
from typing import NamedTuple

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ServiceError
from service.http.framing import CHUNK_BYTES, FREE_CHUNKS, MAX_HEAD, MAX_HEADERS, Framing
from service.http.problems import STATUS
from tests.balancers import balancing
from tests.local import FakeServer, serving_fake
from tests.servers import PATIENCE, Reachable, needs

HIDDEN = b"GET /sample?seed=666 HTTP/1.1\r\nHost: x\r\n\r\n"  # inside a body this is not a request
LAST = b"GET /sample?seed=9 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
OFFERS = {
    "no offer": b"",
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
    "websocket": b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "TLS": b"Connection: upgrade\r\nUpgrade: TLS/1.0, h2c\r\n",
    "upgrade alone": b"Upgrade: h2c\r\n",
}
METHODS = [b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"PRI", b"get"]


def length(body: bytes) -> bytes:
    return b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


def chunks(body: bytes, size: int = 5, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    written = b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    return b"Transfer-Encoding: chunked\r\n\r\n%b0%b\r\n%b\r\n" % (written, extension, trailers)


def head(method: bytes = b"POST", target: bytes = b"/sample", more: bytes = b"", version: bytes = b"1.1") -> bytes:
    """A head without its framing and its end."""
    kind = b"Content-Type: application/json\r\n"
    return b"%b %b HTTP/%b\r\nHost: x\r\n%b%b" % (method, target, version, kind, more)


DRAW = b'{"seed": 7}'
FRAMINGS: dict[str, Callable[[bytes], bytes]] = {
    "a length": length,
    "chunks": chunks,
    "one chunk": lambda body: chunks(body, 2**20),
    "chunks of a byte": lambda body: chunks(body, 1),
    "extensions": lambda body: chunks(body, 5, b';name="value"'),
    "trailers": lambda body: chunks(body, 5, b"", b"X-Trailer: GET /metrics HTTP/1.1\r\n"),
    "the same length twice": lambda body: b"Content-Length: %d\r\n%b" % (len(body), length(body)),
}

# Sent bytes and their answers: the drawn seed, or a status. LAST is sent after each.
PLAIN: dict[str, tuple[bytes, list[int]]] = {
    **{
        f"{framing}, {offer}": (
            head(more=OFFERS[offer]) + FRAMINGS[framing](DRAW) + head(more=OFFERS[offer]) + FRAMINGS[framing](HIDDEN),
            [7, 422],
        )
        for framing, offer in product(FRAMINGS, OFFERS)
    },
    **{
        f"{offer}, no body": (head(b"GET", b"/sample?seed=7", more) + b"\r\n" + head(more=more) + b"\r\n", [7, 200])
        for offer, more in OFFERS.items()
    },
    "a length of none": (head() + length(b""), [200]),
    "GET with a body": (head(b"GET", b"/sample?seed=7") + length(HIDDEN), [7]),
    "a proxy's target": (head(b"GET", b"http://x/sample?seed=7") + b"\r\n", [7]),
    "empty lines between": (head(b"GET", b"/sample?seed=7") + b"\r\n\r\n\r\n", [7]),
    "two and two in one": (2 * (head() + length(DRAW) + head() + chunks(DRAW)), [7, 7, 7, 7]),
    "no reserve of the client's": (head(more=b"Expect: 100-continue\r\n") + length(DRAW), [7]),
}

# Sent bytes and their answers, after which the server reads no further. LAST is sent after each, and never read.
FINAL: dict[str, tuple[bytes, list[int]]] = {
    "HTTP/1.0": (head(version=b"1.0") + length(DRAW), [7]),
    "HTTP/1.0, kept alive": (head(version=b"1.0", more=b"Connection: keep-alive\r\n") + length(DRAW), [7]),
    "closed by the client": (head(more=b"Connection: close\r\n") + chunks(DRAW), [7]),
}


def broken_head(more: bytes) -> bytes:
    return head(more=more) + length(DRAW)


def broken_chunks(body: bytes) -> bytes:
    return head() + b"Transfer-Encoding: chunked\r\n\r\n" + body


BROKEN: dict[str, bytes] = {
    **{
        f"a chunk's size {size[:20]!r}": broken_chunks(size + b"\r\n" + DRAW + b"\r\n0\r\n\r\n")
        for size in (b"ZZ", b"-5", b"+b", b"0xb", b"b ", b" b", b"", b"b\x00", b"%x" % (2**64 - 1), b"0" * 40 + b"b")
    },
    "a chunk without its end": broken_chunks(b"b\r\n" + DRAW + b"0\r\n\r\n"),
    "a chunk that is longer": broken_chunks(b"5\r\n" + DRAW + b"\r\n0\r\n\r\n"),
    "a chunk's LF alone": broken_chunks(b"b\n" + DRAW + b"\n0\n\n"),
    "a chunk's CR in an extension": broken_chunks(b"b;\rx\r\n" + DRAW + b"\r\n0\r\n\r\n"),
    "an extension without end": broken_chunks(b"b;" + 5000 * b"x"),
    "trailers that are folded": broken_chunks(b"b\r\n" + DRAW + b"\r\n0\r\nA: b\r\n c\r\n\r\n"),
    "trailers that are none": broken_chunks(b"b\r\n" + DRAW + b"\r\n0\r\n" + LAST),
    **{
        f"Transfer-Encoding: {coding!r}": head() + b"Transfer-Encoding: %b\r\n\r\nb\r\n%b\r\n0\r\n\r\n" % (coding, DRAW)
        for coding in (b"gzip", b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked", b"", b"\x0bchunked")
    },
    "a coding twice": broken_chunks(b"")[:-2] + chunks(DRAW),
    "a coding and a length": head() + b"Content-Length: 4\r\n" + chunks(DRAW),
    "a length and a coding": head() + b"Transfer-Encoding: chunked\r\n" + length(b"0\r\n\r\n"),
    "chunks in HTTP/1.0": head(version=b"1.0") + chunks(DRAW),
    **{
        f"Content-Length: {told!r}": head() + b"Content-Length: %b\r\n\r\n%b" % (told, DRAW)
        for told in (b"-11", b"+11", b"0xb", b"1 1", b"11, 12", b"", b"1e1", b"1_1", b"9" * 30, "١".encode())
    },
    "two lengths": head() + b"Content-Length: 4\r\n" + length(DRAW),
    "a folded header": broken_head(b"X-A: a\r\n b\r\n"),
    "a folded coding": head() + b"Transfer-Encoding:\r\n chunked\r\n\r\nb\r\n" + DRAW + b"\r\n0\r\n\r\n",
    "LF alone": head().replace(b"\r\n", b"\n") + b"\n",
    "LF alone in one header": broken_head(b"X-A: a\nX-B: b\r\n"),
    "an empty line of LF alone": b"\n" + broken_head(b""),
    "empty lines of both kinds": b"\r\n\r\n\n\r\n" + broken_head(b""),
    "empty lines of CR": b"\r\r\n" + broken_head(b""),
    "CR alone": broken_head(b"X-A: a\rX-B: b\r\n"),
    **{f"{c!r} in a value": broken_head(b"X-A: a%bb\r\n" % c) for c in (b"\x00", b"\x01", b"\x0b", b"\x1f", b"\x7f")},
    "a blank before the colon": broken_head(b"X-A : a\r\n"),
    "a blank before a name": b"POST /sample HTTP/1.1\r\n Host: x\r\n\r\n",
    "a header without a colon": broken_head(b"X-A\r\n"),
    "a header without a name": broken_head(b": a\r\n"),
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "two Hosts": broken_head(b"Host: y\r\n"),
    "a Host that is none": b"GET /health HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "two words for a Host": b"GET /health HTTP/1.1\r\nHost: x y\r\n\r\n",
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n",
    "a host for a target": head(b"GET", b"x:80") + b"\r\n",
    "another scheme": head(b"GET", b"ftp://x/health") + b"\r\n",
    "a target with a fragment": head(b"GET", b"/health#a") + b"\r\n",
    "a target without a slash": head(b"GET", b"health") + b"\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: x\r\n\r\n",
    "two blanks": b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tab": b"GET\t/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/1.2": head(version=b"1.2") + length(DRAW),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/1.1": head().replace(b"HTTP", b"http") + length(DRAW),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
}

TOO_LARGE: dict[str, tuple[bytes, int]] = {
    **{
        f"a head of {size} bytes": (broken_head(b"X-A: " + b"a" * (size - 70) + b"\r\n"), 431)
        for size in (66_000, 70_000, 120_000, 300_000)
    },
    "a query of 66 kB": (head(b"GET", b"/sample?seed=" + b"7" * 66_000) + b"\r\n", 431),
    "a head without end": (head() + b"X-A: a\r\n" * 20_000, 431),
    "too many headers": (broken_head(b"X:\r\n" * MAX_HEADERS), 431),
    "trailers without end": (broken_chunks(b"b\r\n" + DRAW + b"\r\n0\r\n" + b"X-A: a\r\n" * 20_000), 431),
    "too many trailers": (broken_chunks(b"b\r\n" + DRAW + b"\r\n0\r\n" + b"X:\r\n" * 1000 + b"\r\n"), 431),
    "too many chunks": (head() + chunks(DRAW.ljust(2 * FREE_CHUNKS), 1), 413),
}


class Read(NamedTuple):
    """A request as the server reads it."""

    method: bytes
    target: bytes
    body: bytes


def read(pieces: Sequence[bytes]) -> tuple[list[Read], int | None]:
    """The requests that the server reads, each answered at once, and the status of its refusal."""
    framing = Framing()
    found: list[Read] = []
    with_status: int | None = None
    try:
        for piece in pieces:
            framing.receive_data(piece)
            while (event := framing.next_event()) not in (h11.NEED_DATA, h11.PAUSED) or framing.their_state is h11.DONE:
                if isinstance(event, h11.Request):
                    request, body = event, b""
                elif isinstance(event, h11.Data):
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    found.append(Read(request.method, request.target, body))
                    framing.send(h11.Response(status_code=204, headers=[]))
                    framing.send(h11.EndOfMessage())
                    if framing.is_over:
                        return found, None
                    framing.start_next_cycle()
    except ServiceError as error:
        with_status = STATUS[type(error)]
    return found, with_status


def split(sent: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = sorted({0, len(sent), *(cut % (len(sent) + 1) for cut in cuts)})
    return [sent[begin:end] for begin, end in pairwise(places)]


bodies = st.one_of(st.binary(max_size=80), st.just(HIDDEN), st.just(b"0\r\n\r\n" + HIDDEN))


@st.composite
def messages(draw: st.DrawFn) -> tuple[bytes, Read]:
    """The bytes of a client's request, and its meaning."""
    method = draw(st.sampled_from(METHODS))
    body = draw(bodies)
    offer = draw(st.sampled_from(sorted(OFFERS.values())))
    framing = FRAMINGS[draw(st.sampled_from(sorted(FRAMINGS)))]
    empty_lines = b"\r\n" * draw(st.integers(0, 3))
    return empty_lines + head(method, b"/sample?a=b", offer) + framing(body), Read(method, b"/sample?a=b", body)


@given(st.lists(messages(), min_size=1, max_size=3), st.lists(st.integers(0, 2**20), max_size=6))
def test_however_it_is_split_what_is_read_is_what_is_meant(sent: list[tuple[bytes, Read]], cuts: list[int]) -> None:
    pieces = split(b"".join(raw for raw, _ in sent), cuts)
    assert read(pieces) == ([meant for _, meant in sent], None)


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_refused_however_it_is_split(sent: bytes) -> None:
    """No request is read after the broken part, even where other servers would see one."""
    before = head() + length(DRAW)
    meant = [Read(b"POST", b"/sample", DRAW)]
    for after in (b"", HIDDEN, 3 * LAST):
        assert read([before + sent + after]) == (meant, 400)
    assert read([bytes([byte]) for byte in before + sent + LAST]) == (meant, 400)


@pytest.mark.parametrize(("sent", "status"), TOO_LARGE.values(), ids=TOO_LARGE)
@pytest.mark.parametrize("size", [2**20, 4096, 61])
def test_what_is_too_large_is_refused_however_it_is_split(sent: bytes, status: int, size: int) -> None:
    before = head() + length(b" " * 100_000)
    whole = before + sent + LAST
    requests, refused = read([whole[i : i + size] for i in range(0, len(whole), size)])
    assert ([request.body for request in requests], refused) == ([b" " * 100_000], status)


@pytest.mark.parametrize("size", [2**20, 4096, 61])
def test_a_head_of_the_greatest_size_is_read(size: int) -> None:
    """The size counts from the head's own start, after the body before it."""
    large = head(b"GET", more=b"X-A: ")
    large += b"a" * (MAX_HEAD - len(large) - 4) + b"\r\n\r\n"
    whole = head() + length(b" " * 100_000) + large + head() + chunks(b" " * 100_000, CHUNK_BYTES) + large
    requests, refused = read([whole[i : i + size] for i in range(0, len(whole), size)])
    assert refused is None
    assert [len(request.body) for request in requests] == [100_000, 0, 100_000, 0]
    many = head(b"GET", more=b"X:\r\n" * (MAX_HEADERS - 2)) + b"\r\n"
    assert read([many]) == ([Read(b"GET", b"/sample", b"")], None)


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        (b"http://y/sample?seed=7", b"/sample?seed=7"),
        (b"HTTPS://y:8000/", b"/"),
        (b"http://[::1]:80", b"/"),
        (b"http://y?a=b", b"/?a=b"),
    ],
)
def test_a_proxys_target_is_a_path_and_a_host(target: bytes, meant: bytes) -> None:
    framing = Framing()
    framing.receive_data(head(b"GET", target) + b"\r\n")
    request = framing.next_event()
    assert request.target == meant
    assert [value for name, value in request.headers if name == b"host"] != [b"x"]


@pytest.fixture(scope="module")
def served() -> Iterator[FakeServer]:
    with serving_fake() as running:
        yield running


@pytest.fixture
def server(served: FakeServer) -> FakeServer:
    return served


@pytest.fixture(scope="module")
def balancer(served: FakeServer) -> Iterator[Reachable]:
    """HAProxy in front of the server."""
    host, port = served.address
    with balancing([host], port) as running:
        running.wait_until(up=1)
        yield running


class Answer(NamedTuple):
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def meaning(self) -> int:
        """The drawn seed if there is one, otherwise the status."""
        seed = int(self.headers.get(b"x-seed", b"0"))
        return seed if 0 < seed < 1000 else self.status


def exchanged(server: Reachable, pieces: Sequence[bytes]) -> bytes:
    """All bytes until the connection is closed. Waits until the server has read each piece before it sends the next."""
    with socket.create_connection(server.address, PATIENCE) as connection:
        for piece in pieces:
            with suppress(ConnectionError):  # the server may have stopped reading
                connection.sendall(piece)
            if piece is not pieces[-1]:
                assert server.client.get("/health/live").status_code == 200
        return b"".join(iter(lambda: connection.recv(65536), b""))


def answers(came: bytes) -> list[Answer]:
    """The answers, which must be complete, with nothing after them."""
    found = []
    while came:
        top, blank, came = came.partition(b"\r\n\r\n")
        assert blank, top
        first, *lines = top.split(b"\r\n")
        version, status, *_ = first.split(b" ")
        assert version == b"HTTP/1.1"
        headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
        if status == b"100":
            continue
        size = int(headers[b"content-length"])
        assert len(came) >= size
        found.append(Answer(int(status), headers, came[:size]))
        came = came[size:]
    return found


def refused(answer: Answer, status: int) -> str:
    """The detail of a refusal that closes the connection."""
    document = json.loads(answer.body)
    assert (answer.status, document["status"]) == (status, status)
    assert answer.headers[b"content-type"] == b"application/problem+json"
    assert answer.headers[b"cache-control"] == b"no-store"
    assert answer.headers[b"connection"].lower() == b"close"
    detail: str = document["detail"]
    return detail


@pytest.mark.parametrize(("sent", "meant"), PLAIN.values(), ids=PLAIN)
def test_what_is_plain_is_answered(server: FakeServer, sent: bytes, meant: list[int]) -> None:
    assert [answer.meaning for answer in answers(exchanged(server, [sent + LAST]))] == [*meant, 9]


@pytest.mark.parametrize(("sent", "meant"), FINAL.values(), ids=FINAL)
def test_a_last_request_is_answered_and_nothing_after_it(server: FakeServer, sent: bytes, meant: list[int]) -> None:
    came = answers(exchanged(server, [sent + LAST]))
    assert [answer.meaning for answer in came] == meant
    assert came[-1].headers[b"connection"] == b"close"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("framing", ["a length", "chunks"])
def test_a_body_behind_an_offer_is_a_body_for_every_method(server: FakeServer, method: bytes, framing: str) -> None:
    sent = head(method, more=OFFERS["h2c"]) + FRAMINGS[framing](HIDDEN)
    came = exchanged(server, [sent + LAST])
    if method == b"HEAD":
        top, _, came = came.partition(b"\r\n\r\n")
        assert top.startswith(b"HTTP/1.1 ")
    assert [answer.meaning for answer in answers(came)][-1] == 9
    assert came.count(b"x-seed: 666") == 0


def test_a_body_behind_an_offer_may_come_in_pieces(server: FakeServer) -> None:
    """Split at any byte."""
    whole = head(more=OFFERS["h2c"]) + length(HIDDEN)
    places = range(1, len(whole), 3)
    with socket.create_connection(server.address, PATIENCE) as connection:
        for place in places:
            connection.sendall(whole[:place])
            assert server.client.get("/health/live").status_code == 200  # so the piece has been read
            connection.sendall(whole[place:])
        connection.sendall(LAST)
        came = answers(b"".join(iter(lambda: connection.recv(65536), b"")))
    assert [answer.meaning for answer in came] == [*[422] * len(places), 9]


@pytest.mark.parametrize("sent", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told_so_after_the_answer_before_it(server: FakeServer, sent: bytes) -> None:
    first, last = answers(exchanged(server, [head() + length(DRAW) + sent + LAST]))
    assert first.meaning == 7
    assert refused(last, 400)


@pytest.mark.parametrize(("sent", "status"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_is_told_so_after_the_answer_before_it(server: FakeServer, sent: bytes, status: int) -> None:
    """However much follows, the connection is closed and not reset."""
    first, last = answers(exchanged(server, [head() + length(DRAW.ljust(80_000)) + sent + 20_000 * LAST]))
    assert first.meaning == 7
    assert "at most" in refused(last, status) or "more than" in refused(last, status)


def test_a_body_that_breaks_under_way_is_told_so(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    """The app waits for the body meanwhile. One line is logged."""
    with caplog.at_level("INFO", "service.access"):
        [answer] = answers(exchanged(server, [broken_chunks(b"5\r\n"), DRAW[:5], b"b\r\n" + LAST]))
    assert "chunk" in refused(answer, 400)
    lines = [record for record in caplog.records if record.getMessage() != "GET /health/live"]
    assert [vars(line)["fields"]["status"] for line in lines] == [400]


def test_a_body_that_breaks_after_its_answer_ends_the_connection(server: FakeServer) -> None:
    with socket.create_connection(server.address, PATIENCE) as connection:
        connection.sendall(head(b"POST", b"/nowhere") + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc")
        came = connection.recv(65536)
        connection.sendall(b"defg\r\n" + LAST)
        came += b"".join(iter(lambda: connection.recv(65536), b""))
    assert [answer.status for answer in answers(came)] == [404]


def test_a_client_may_wait_to_be_asked_for_its_body(server: FakeServer) -> None:
    with socket.create_connection(server.address, PATIENCE) as connection:
        for framing in (length, chunks):
            whole = head(more=b"Expect: 100-continue\r\n") + framing(DRAW)
            end = whole.index(b"\r\n\r\n") + 4
            connection.sendall(whole[:end])
            assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
            connection.sendall(whole[end:])
            [answer] = answers(connection.recv(65536))
            assert answer.meaning == 7


def test_a_client_that_closes_its_side_is_answered_nothing(server: FakeServer) -> None:
    assert server.engine.wait_idle(PATIENCE)  # requests of other tests have ended
    server.runner.hold()
    left = server.metric("stepwise_cancelled_total", reason="disconnect")
    with socket.create_connection(server.address, PATIENCE) as connection:
        connection.sendall(head() + length(DRAW))
        server.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(65536) == b""
    server.wait_for_metric("stepwise_cancelled_total", lambda n: n >= left + 1, reason="disconnect")
    server.runner.let_go()  # not before: the request could end first


def test_events_come_without_chunks_to_http_1_0(server: FakeServer) -> None:
    accept = b"Accept: text/event-stream\r\n"
    came = exchanged(server, [head(version=b"1.0", more=accept) + length(DRAW)])
    top, _, events = came.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in top.lower()
    assert events.startswith(b"event: queued\ndata: {")
    assert b"\n\nevent: done\ndata: {" in events
    assert events.endswith(b"}\n\n")


@pytest.mark.slow
@needs("haproxy")
@pytest.mark.parametrize(("sent", "meant"), [*PLAIN.values(), *FINAL.values()], ids=[*PLAIN, *FINAL])
def test_the_balancer_reads_what_is_plain_as_the_server_does(
    balancer: Reachable, sent: bytes, meant: list[int]
) -> None:
    came = [answer.meaning for answer in answers(exchanged(balancer, [sent + LAST]))]
    assert came in ([*meant, 9], meant)


@pytest.mark.slow
@needs("haproxy")
@pytest.mark.parametrize(
    "sent",
    [*BROKEN.values(), *(sent for sent, _ in TOO_LARGE.values())],
    ids=[*BROKEN, *TOO_LARGE],
)
def test_the_balancer_and_the_server_read_the_same_requests(
    balancer: Reachable, server: FakeServer, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    """Each request that the server reads has an id from HAProxy. Bytes that HAProxy took for a body would have none."""
    with caplog.at_level("INFO", "service.access"):
        came = answers(exchanged(balancer, [head() + length(DRAW) + sent + LAST]))
        assert server.client.get("/health/live").status_code == 200  # so everything answered is logged
    lines = [vars(record)["fields"] for record in caplog.records if not record.getMessage().startswith("GET /health/")]
    read_by_server = [line["request_id"] for line in lines if "method" in line]
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", one) for one in read_by_server)
    told = [answer.headers[b"x-request-id"].decode() for answer in came if b"x-request-id" in answer.headers]
    assert told == [line["request_id"] for line in lines]
    assert came[0].meaning == 7
    assert 666 not in [answer.meaning for answer in came]


@pytest.mark.slow
@needs("haproxy")
def test_the_balancer_says_what_a_client_that_closes_its_side_gets(balancer: Reachable, server: FakeServer) -> None:
    server.runner.hold()
    with socket.create_connection(balancer.address, PATIENCE) as connection:
        connection.sendall(head() + length(DRAW))
        server.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)
        connection.shutdown(socket.SHUT_WR)
        came = answers(b"".join(iter(lambda: connection.recv(65536), b"")))
    server.runner.let_go()
    [answer] = came
    assert "closed its side" in refused(answer, 400)


class Headers(BaseHTTPRequestHandler):
    """A server that answers with the names of the headers it received."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = "\n".join(self.headers.keys()).lower().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@needs("haproxy")
def test_the_balancer_passes_no_offer_on() -> None:
    with ExitStack() as stack:
        origin = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Headers))
        origin.daemon_threads = True
        thread = Thread(target=origin.serve_forever)
        thread.start()
        stack.callback(thread.join)
        stack.callback(origin.shutdown)
        balancer = stack.enter_context(balancing(["127.0.0.1"], origin.server_port))
        balancer.wait_until(up=1)
        for offer in OFFERS.values():
            [answer] = answers(exchanged(balancer, [head(b"GET", more=offer + b"Connection: close\r\n") + b"\r\n"]))
            assert b"x-request-id" in answer.body.split()
            assert not {b"connection", b"upgrade", b"http2-settings"} & set(answer.body.split())
