"""Servers on loopback, of which one runs at a time."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

from bench.load import at_once

ROOT = Path(__file__).parent.parent
FIRST_PORT = 9100  # others follow

Start = tuple[str, str, Mapping[str, str]]  # of a server: its name, module and environment


class Server:
    """A server on loopback, which runs only while it is awake."""

    def __init__(self, name: str, module: str, port: int, environment: Mapping[str, str]) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            cwd=ROOT,
            env={**os.environ, "PORT": str(port), "STEPWISE_PORT": str(port), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(600):
            if self._process.poll() is not None:
                assert self._process.stderr
                raise RuntimeError(f"{self.name} ended: {self._process.stderr.read().decode()[-2000:]}")
            try:
                if httpx.get(f"{self.url}/health", trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{self.name} does not answer")

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
        self._process.wait()


@contextmanager
def running(*servers: Start) -> Iterator[list[Server]]:
    """Servers, warmed up one after the other and frozen."""
    with ExitStack() as stack:
        started = []
        for i, (name, module, environment) in enumerate(servers):
            server = Server(name, module, FIRST_PORT + i, environment)
            stack.callback(server.close)
            server.wait()
            for _ in range(2):
                at_once(server.url, 8, [4], seed=0)  # digits-4step takes no more
            with server.awake():
                started.append(server)
        yield started
