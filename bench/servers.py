"""Servers on loopback. Only one of them runs at a time."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from bench.load import at_once

ROOT = Path(__file__).parent.parent

Start = tuple[str, str, Mapping[str, str]]  # name, module and environment of a server


class Server:
    """A server process on a free port of loopback. It runs only while it is awake.

    Args:
        name: for output.
        arguments: Python's arguments.
        environment: settings on top of this process's.
        checkout: the tree with the code.
        log: the file for its log; without one, the log is lost.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        checkout: Path = ROOT,
        log: Path | None = None,
    ) -> None:
        self.name = name
        port = str(free_port())
        self.url = f"http://127.0.0.1:{port}"
        own = {"PORT": port, "STEPWISE_PORT": port, "PYTHONPATH": str(checkout)}
        with Path(os.devnull if log is None else log).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=checkout,
                env={**os.environ, **own, **environment},
                stdout=output,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, path: str = "/health", look_every: float = 0.2, patience: float = 120.0) -> None:
        """Wait until the server answers 200, for at most about `patience` seconds."""
        until = time.monotonic() + patience
        with httpx.Client(trust_env=False) as client:  # a new one for each look would take 14 ms of a core
            while time.monotonic() < until:
                if why := self.why_it_ended():
                    raise RuntimeError(f"{self.name} ended: {why}")
                try:
                    if client.get(self.url + path).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(look_every)
        raise RuntimeError(f"{self.name} does not answer")

    def why_it_ended(self, within: float = 0.0) -> str:
        """Why the process ended, or "" if it runs on for so many seconds."""
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            return ""
        assert self._process.stderr
        return ended(code, self._process.stderr.read().decode())

    @contextmanager
    def awake(self) -> Iterator[None]:
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGSTOP)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()  # waits for the end, and closes the pipe


def ended(code: int, errors: str) -> str:
    """Why a process ended, by its exit code and the end of its standard error."""
    if code == -signal.SIGKILL:
        return "the system ended it, which it does where memory is short"
    return errors.strip()[-2000:] or f"code {code}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def running(*starts: Start) -> Iterator[list[Server]]:
    """Servers, started and warmed up one after the other, and frozen."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(frozen(Server(name, ["-m", module], environment)))
            for name, module, environment in starts
        ]


@contextmanager
def frozen(server: Server) -> Iterator[Server]:
    """Wait for a server, warm it up and freeze it. Closes it at the end."""
    try:
        server.wait()
        for _ in range(2):
            at_once(server.url, 8, [4], seed=0)  # digits-4step takes at most four steps
        with server.awake():
            pass
        yield server
    finally:
        server.close()
