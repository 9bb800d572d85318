"""The commands that load a model themselves: --local, serve, convert. Also the transport of --local."""

import asyncio
import base64
import os
import pty
import re
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from typer.testing import CliRunner

from service.config import Settings
from stepwise import AsyncClient, Queued
from stepwise.cli import app, exits
from stepwise.cli.local import AppTransport, assemble
from tests.programs import done, process, refused, running, stepwise
from tests.servers import PATIENCE, Json, ServerProcess
from tests.test_cli import asked, files

# --local


@pytest.mark.slow
def test_without_a_server_the_bytes_are_the_same(server: ServerProcess, weights: Path, tmp_path: Path) -> None:
    """API keys are for servers; --local needs none."""
    here: Json = {"STEPWISE_WEIGHTS": str(weights / "grey"), "STEPWISE_MAX_BATCH": "4"}  # for the same fingerprint
    options = ["-n", "3", "-s", "5", "-c", "cat"]
    done(stepwise(None, tmp_path, "sample", "--local", *options, "-o", ".", **here, STEPWISE_API_KEYS="secret"))
    assert files(tmp_path) == {f"{seed}.png": asked(server, seed=seed, class_label="cat") for seed in (5, 6, 7)}
    done(stepwise(None, tmp_path, "noise", "--local", "5.png", "-t", "300", "-s", "1", **here))
    done(stepwise(None, tmp_path, "denoise", "--local", "5-noisy.png", "-t", "300", "-s", "1", "-o", "a.png", **here))
    done(stepwise(server, tmp_path, "denoise", "5-noisy.png", "-t", "300", "-s", "1", "-o", "a.png"))
    done(stepwise(None, tmp_path, "sample", "--local", "--image", "5.png", "--strength", "0.5", "-s", "1", **here))
    image = base64.b64encode((tmp_path / "5.png").read_bytes()).decode()
    assert files(tmp_path)["1.png"] == asked(server, seed=1, image=image, strength=0.5)
    verified = ["5.png", "6.png", "a.png", "--image", "5-noisy.png"]
    assert done(stepwise(None, tmp_path, "verify", "--local", *verified, **here)).count("the same bytes") == 3


@pytest.mark.slow
def test_weights_are_named(weights: Path, tmp_path: Path) -> None:
    printed = done(stepwise(None, tmp_path, "info", "--local", "--weights", str(weights / "rgb")))
    assert re.search(r"^model +rgb: ", printed)


def test_weights_that_are_nowhere(tmp_path: Path) -> None:
    line = refused(stepwise(None, tmp_path, "sample", "--local", "--weights", "nowhere"), exits.UNUSABLE)
    assert line.startswith("STEPWISE_WEIGHTS=nowhere is neither a file nor a folder; in the box: ")


@pytest.mark.slow
def test_ctrl_c_ends_what_is_drawn_here(weights: Path, tmp_path: Path) -> None:
    terminal, written = pty.openpty()
    options = ["-n", "64", "--sampler", "ddim", "--steps", "1000", "--weights", str(weights / "grey")]
    with running(None, tmp_path, "sample", "--local", *options, stderr=written, TERM="xterm") as process:
        os.close(written)
        seen = ""
        while " of 64 images, " not in seen:
            seen += os.read(terminal, 65536).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        reader = threading.Thread(target=lambda: [None for _ in iter(lambda: _read(terminal), b"")])
        reader.start()
        process.wait(PATIENCE)
        reader.join(PATIENCE)
    os.close(terminal)
    assert process.returncode == exits.INTERRUPTED
    assert files(tmp_path) == {}


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def test_events_flow(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream begins before its images are drawn. The work ends when the reader leaves."""
    for name, value in {"PRECISION": "float32", "THREADS": "1", "MAX_BATCH": "2"}.items():
        monkeypatch.setenv(f"STEPWISE_{name}", value)
    monkeypatch.setenv("STEPWISE_WEIGHTS", "")  # so that monkeypatch restores the variable

    async def leave() -> tuple[object, str]:
        async with assemble(str(weights / "rgb")) as transport, AsyncClient(transport=transport) as client:
            events = client.stream(num_images=Settings().max_images, num_inference_steps=20)
            first = await anext(events)
            await events.aclose()
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
                return first, (await http.get("/metrics")).text

    first, metrics = asyncio.run(leave())
    assert isinstance(first, Queued)
    assert 'stepwise_cancelled_total{reason="disconnect"} 1.0' in metrics


# The transport of --local.

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def begin(send: Send, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-name", b"value")]})


def calling(app: App) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=AppTransport(app), base_url="http://here:81")


def test_a_request_is_what_the_app_sees() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        assert (scope["method"], scope["path"], scope["query_string"]) == ("POST", "/a b", b"c=d%20e")
        assert (scope["scheme"], scope["server"]) == ("http", ("here", 81))
        assert (b"x-sent", b"1") in scope["headers"]
        message = await receive()
        assert message == {"type": "http.request", "body": b"sent", "more_body": False}
        await begin(send, 201)
        await send({"type": "http.response.body", "body": b"one, ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})

    async def ask() -> httpx.Response:
        async with calling(app) as client:
            return await client.post("/a%20b?c=d%20e", content=b"sent", headers={"X-Sent": "1"})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["x-name"], answer.text) == (201, "value", "one, two")


def test_a_body_is_handed_on_as_it_comes() -> None:
    """The app continues only when its reader has the first piece."""
    read = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await begin(send)
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await read.wait()
        await send({"type": "http.response.body", "body": b"two", "more_body": True})
        await send({"type": "http.response.body"})

    async def ask() -> list[bytes]:
        pieces = []
        async with calling(app) as client, client.stream("GET", "/") as answer:
            async for piece in answer.aiter_raw():
                pieces.append(piece)
                read.set()
        return pieces

    assert asyncio.run(ask()) == [b"one", b"two"]


def test_an_app_waits_for_its_reader_and_is_told_when_they_leave() -> None:
    taken: list[int] = []
    ended: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await begin(send)
        for number in range(9):
            await send({"type": "http.response.body", "body": b"piece", "more_body": True})
            taken.append(number)
            if ended:
                return
            if number == 1:
                ended.append(await receive())

    async def ask() -> None:
        async with calling(app) as client, client.stream("GET", "/") as answer:
            pieces = answer.aiter_raw()
            await anext(pieces)
            await anext(pieces)

    asyncio.run(ask())
    assert ended == [{"type": "http.disconnect"}]
    assert taken == [0, 1, 2]  # later pieces are dropped


def test_a_client_that_is_cancelled_has_left() -> None:
    ended: list[object] = []
    asked_for = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        asked_for.set()
        ended.append(await receive())

    async def ask() -> None:
        async with calling(app) as client:
            asking = asyncio.ensure_future(client.get("/"))
            await asked_for.wait()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    asyncio.run(ask())
    assert ended == [{"type": "http.disconnect"}]


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_of_the_app_is_raised(begun: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begun:
            await begin(send)
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
        raise ZeroDivisionError

    async def ask() -> None:
        async with calling(app) as client:
            await client.get("/")

    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask())


def test_an_app_that_does_not_answer_is_an_error() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def ask() -> None:
        async with calling(app) as client:
            await client.get("/")

    with pytest.raises(RuntimeError, match="without an answer"):
        asyncio.run(ask())


# serve

SHOWN = re.compile(r"^stepwise: draw at (http://127\.0\.0\.1:\d+)/ ; the API is shown at \1/docs$")


@pytest.mark.slow
def test_serve(weights: Path, tmp_path: Path) -> None:
    """Options take precedence over the environment. The page's address is printed once the page can be opened."""
    options = ["--weights", str(weights / "rgb"), "--port", "0", "--precision", "float32"]
    with running(None, tmp_path, "serve", *options, STEPWISE_WEIGHTS="nowhere", STEPWISE_PORT="1") as process:
        assert process.stderr
        shown = SHOWN.match(process.stderr.readline().decode().rstrip())
        assert shown
        with httpx.Client(base_url=shown[1], trust_env=False, timeout=PATIENCE) as client:
            assert client.get("/", follow_redirects=True).status_code == 200
            assert client.get("/info").json()["model"]["name"] == "rgb"
        process.send_signal(signal.SIGTERM)
        log, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert errors == b""
    assert b"SIGTERM: draining" in log


@pytest.mark.slow
def test_what_cannot_be_served_is_told(tmp_path: Path) -> None:
    for option, said in ("--precision", "STEPWISE_PRECISION=no: "), ("--weights", "STEPWISE_WEIGHTS=no is neither"):
        assert refused(process(None, tmp_path, "serve", option, "no"), exits.UNUSABLE).startswith(said)


def test_help_lists_every_setting() -> None:
    ended = CliRunner().invoke(app, ["serve", "--help"])
    assert ended.exit_code == 0
    for name in Settings.model_fields:
        assert f"  STEPWISE_{name.upper()} " in ended.stdout


# convert


@pytest.mark.slow
def test_convert(weights: Path, tmp_path: Path) -> None:
    """test_diffusers_server.py and test_latent_server.py test the images."""
    printed = done(stepwise(None, tmp_path, "convert", str(weights / "grey"), "new"))
    first, second = printed.splitlines()
    assert re.fullmatch(r"new: [\d,]+ parameters, draws images of 16x16", first)
    assert second == "serve it: stepwise serve --weights new"
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors"}


def test_what_cannot_be_converted_is_told_in_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = str(weights / "grey")
    for arguments, said in (
        ([source, str(weights)], f"{weights} exists, and is not an empty folder"),
        ([source, str(tmp_path / "file" / "below")], f"{tmp_path}/file"),
        ([str(tmp_path), "new"], f"{tmp_path}: is not a checkpoint"),
        (["nowhere", "new"], "STEPWISE_WEIGHTS=nowhere is neither a file nor a folder"),
    ):
        ended = CliRunner().invoke(app, ["convert", *arguments])
        assert ended.exit_code == exits.UNUSABLE
        assert ended.stderr.startswith(f"stepwise: {said}")
        assert len(ended.stderr.splitlines()) == 1
