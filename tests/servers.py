"""The real server in its own process, with small random weights."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save_file

from model.checkpoints.native import parse
from service import config
from service.config import PREFIX, Settings
from tests.networks import fill

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".pytest_cache" / "stepwise"  # converted models
PATIENCE = 30.0  # seconds; much longer than anything takes, so that a hang fails
START = 4 * PATIENCE  # for a start; several servers start at once, with seconds of work each
Json = dict[str, Any]
Float32 = NDArray[np.float32]
T = TypeVar("T")

_READY = re.compile(r"ready at (http://\S+), ")


def eventually(ask: Callable[[], T | None]) -> T:
    """Call `ask` until it returns a value, for at most PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while (answer := ask()) is None:
        assert time.monotonic() < deadline, "that never came"
        time.sleep(0.01)  # leaves this core to others
    return answer


def write_weights(folder: Path, **config: object) -> Path:
    """Write a folder of native weights with random values."""
    whole = {"architecture": "diffusion_unet", **config}
    network = parse(folder, whole).build()
    fill(network)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(whole))
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these settings in place of its own. Names are without STEPWISE_.

    The precision does not depend on the machine, unless a setting says so.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STEPWISE_")}
    ours = {"PORT": 0, "THREADS": 1, "PRECISION": "float32", "CACHE_DIR": CACHE}
    return inherited | {f"STEPWISE_{name}": str(value) for name, value in (ours | settings).items()}


def needs(program: str) -> pytest.MarkDecorator:
    """Skips a test if a program is not installed."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def settings_of(variables: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the program reads from an environment with only these."""
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert config.unknown() == []
    return config.read()


class Reachable(ABC):
    """Something that serves."""

    def __init__(self, key: str | None = None) -> None:
        self._key = key

    @property
    @abstractmethod
    def url(self) -> str: ...

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for a raw socket."""
        url = httpx.URL(self.url)
        assert url.port
        return url.host, url.port

    @cached_property
    def client(self) -> httpx.Client:
        return self.new_client()

    def new_client(self, key: str | None = None, source: str | None = None) -> httpx.Client:
        """A client, with the server's key if it has one, and from `address` if given."""
        key = key or self._key
        headers = {} if key is None else {b"Authorization": f"Bearer {key}".encode()}
        transport = httpx.HTTPTransport(local_address=source)
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False, transport=transport)

    def raw_request(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> socket.socket:
        """A connection that has sent exactly this."""
        if self._key is not None:
            headers = {"Authorization": f"Bearer {self._key}", **headers}
        lines = [f"{method} {path} HTTP/1.1", "Host: test", *(f"{name}: {value}" for name, value in headers.items())]
        connection = socket.create_connection(self.address, PATIENCE)
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body)
        return connection

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """The samples of /metrics, by name and labels."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.client.get("/metrics").text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        """A sample of /metrics; 0 if there is none yet."""
        return self.metrics().get((name, frozenset(labels.items())), 0.0)

    def wait_for_metric(self, name: str, wanted: Callable[[float], bool], **labels: str) -> None:
        """Read /metrics until a sample has the wanted value."""
        eventually(lambda: wanted(self.metric(name, **labels)) or None)

    def wait_until_idle(self) -> None:
        """Wait until no row runs or waits. After a health request, the engine's own probe may run for a moment."""
        for name in ("rows_running", "rows_waiting", "outstanding_row_steps"):
            self.wait_for_metric(f"stepwise_{name}", lambda rows: rows == 0)

    def hang_up(self) -> None:
        """Close the client, if there is one."""
        if "client" in vars(self):
            self.client.close()


class ServerProcess(Reachable):
    """A server that starts or runs.

    Args:
        key: that its clients send.
        settings: names are those of API.md.
        program: the module that is run.
        python: the interpreter, and its options.

    Attributes:
        lines: its log so far.
        errors: its standard error, once it has ended.
    """

    def __init__(
        self,
        key: str | None,
        settings: dict[str, object],
        program: str = "service",
        python: Sequence[str] = (sys.executable,),
    ) -> None:
        super().__init__(key)
        self.lines: list[Json] = []
        self.errors = ""
        self._more = threading.Condition()
        self.process = subprocess.Popen(
            [*python, "-m", program],
            cwd=ROOT,
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._readers = [threading.Thread(target=read) for read in (self._read_log, self._read_errors)]
        for reader in self._readers:
            reader.start()

    @cached_property
    def url(self) -> str:
        line = self.wait_for_line(lambda line: _READY.match(line["message"]) is not None, START)
        ready = _READY.match(line["message"])
        assert ready
        return ready[1]

    def wait_for_line(self, wanted: Callable[[Json], bool], patience: float = PATIENCE) -> Json:
        """Wait for the first wanted line of the log."""
        with self._more:
            self._more.wait_for(lambda: any(map(wanted, self.lines)) or not self._readers[0].is_alive(), patience)
            found = next(filter(wanted, self.lines), None)
        assert found, f"not in the log: {self.lines[-3:]}; {self.errors}"
        return found

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end, and return the exit code."""
        code = self.process.wait(PATIENCE)
        for reader in self._readers:
            reader.join(PATIENCE)
        return code

    def _read_log(self) -> None:
        assert self.process.stdout
        with self.process.stdout as stdout:
            for text in stdout:
                with self._more:
                    self.lines.append(json.loads(text))
                    self._more.notify_all()
        with self._more:
            self._more.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr
        with self.process.stderr as stderr:
            self.errors = stderr.read()


@contextmanager
def serving(
    key: str | None = None,
    program: str = "service",
    python: Sequence[str] = (sys.executable,),
    **settings: object,
) -> Iterator[ServerProcess]:
    """Start a server; at the end send it SIGTERM, unless it has ended. Its exit code must be 0.

    Yields at once, so that several can start in parallel. `url` and `client` wait until it is ready.
    """
    server = ServerProcess(key, settings, program, python)
    try:
        yield server
        if server.process.poll() is None:
            server.terminate()
        code = server.wait()
        assert code == 0, server.errors
        assert "Traceback" not in server.errors
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.wait()
        server.hang_up()


@contextmanager
def side_by_side(*servers: AbstractContextManager[ServerProcess]) -> Iterator[list[ServerProcess]]:
    """Servers that start together and end together. None may log an error."""
    with ExitStack() as stack:
        running = [stack.enter_context(server) for server in servers]
        yield running
        for server in running:
            if server.process.poll() is None:
                server.terminate()
    for server in running:
        assert [line for line in server.lines if line["level"] == "error"] == []


def problem(response: httpx.Response, status: int) -> Json:
    """A problem document, after checks that hold for all of them."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: Json = response.json()
    assert document.keys() - {"errors"} == {"type", "title", "status", "detail"}
    assert document["status"] == status
    assert isinstance(document["type"], str)
    assert document["title"]
    assert document["detail"]
    assert response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"
    assert str(ROOT) not in response.text
    assert "Traceback" not in response.text
    if "errors" in document:
        assert status == 422
        for error in document["errors"]:
            assert error.keys() == {"loc", "msg"}
            assert error["msg"] in document["detail"]
    return document


def invalid(response: httpx.Response, field: str) -> str:
    """The message of a 422 answer that names exactly this field."""
    [error] = problem(response, 422)["errors"]
    assert error["loc"] == [field]
    message: str = error["msg"]
    return message


def read_png(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an 8-bit PNG: [H, W], or [H, W, 3]."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as png:
        pixels: NDArray[np.uint8] = np.asarray(png)
    assert pixels.dtype == np.uint8
    return pixels


def read_parameters(data: bytes) -> Json:
    """The text chunk `parameters` of a PNG."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as png:
        parameters: Json = json.loads(png.info["parameters"])
    return parameters


def read_npy(data: bytes) -> Float32:
    """An .npy file's array."""
    array: Float32 = np.load(io.BytesIO(data), allow_pickle=False)
    assert array.dtype == np.float32
    return array


def write_npy(array: NDArray[Any]) -> bytes:
    """An array as an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
