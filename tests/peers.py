"""Other servers that a client may reach: one that sends given bytes, and a forward proxy."""

import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO
from urllib.parse import urlsplit

from tests.servers import PATIENCE, Reachable


class Peer(Reachable):
    """Serves each connection with a function on a thread.

    Attributes:
        asked: the first line of each request.
    """

    def __init__(self, serve: Callable[["Peer", socket.socket], None]) -> None:
        super().__init__()
        self.asked: list[str] = []
        peer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(PATIENCE)
                serve(peer, self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            block_on_close = False

        self.server = Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.server.server_address[:2])

    def read(self, file: BinaryIO) -> tuple[list[bytes], bytes]:
        """Read a request: the lines of its head, and its body."""
        head = list(iter(lambda: file.readline().rstrip(b"\r\n"), b""))
        if not head:
            return [], b""
        self.asked.append(head[0].decode())
        lengths = [line.partition(b":")[2] for line in head if line.lower().startswith(b"content-length:")]
        return head, file.read(int(lengths[0])) if lengths else b""


@contextmanager
def _serving(peer: Peer) -> Iterator[Peer]:
    thread = threading.Thread(target=peer.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield peer
    finally:
        peer.server.shutdown()
        thread.join(PATIENCE)
        peer.server.server_close()


@contextmanager
def saying(*answers: bytes) -> Iterator[Peer]:
    """A server that sends these answers in turn, then repeats the last. It closes each connection."""

    def serve(peer: Peer, connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            peer.read(file)
        connection.sendall(answers[min(len(peer.asked), len(answers)) - 1])

    with _serving(Peer(serve)) as peer:
        yield peer


@contextmanager
def forwarding(server: Reachable) -> Iterator[Peer]:
    """A forward proxy that sends every request to this server."""

    def serve(peer: Peer, connection: socket.socket) -> None:
        with connection.makefile("rb") as file:
            head, body = peer.read(file)
        if not head:
            return
        method, url, version = head[0].decode().split()
        if method == "CONNECT":
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            return
        asked = f"{method} {urlsplit(url).path} {version}".encode()
        with socket.create_connection(server.address, PATIENCE) as way:
            way.sendall(b"\r\n".join([asked, b"Connection: close", *head[1:], b"", body]))
            while piece := way.recv(65536):
                connection.sendall(piece)

    with _serving(Peer(serve)) as peer:
        yield peer


def answer(body: bytes, content_type: str = "application/json", status: str = "200 OK", more: str = "") -> bytes:
    """The bytes of an HTTP/1.1 answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body
