"""How the program ends, whatever the server answers and wherever the program writes: one line and a documented code.

`verify` ends with 1 for an image that differs. Nothing else ends with 1.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import httpx
import numpy as np
import pytest

import stepwise as package
from service.http.png import encode_png
from stepwise.cli import exits
from tests.local import serving_fake
from tests.peers import answer, saying
from tests.programs import done, process, refused, running, stepwise, surroundings
from tests.servers import PATIENCE, Json, ServerProcess, read_parameters, write_npy
from tests.test_cli import asked

COMMANDS = [["info"], ["info", "--json"], ["sample", "-s", "1"], ["verify", "a.png"]]
COMMANDS += [["noise", "a.png", "-t", "1"], ["denoise", "a.png", "-t", "1"]]
COMMANDS += [[*COMMANDS[-1], "-o", "b.npy"], [*COMMANDS[-2], "-o", "b.npy"]]

PROBLEM = "application/problem+json"
DEEP = b"[" * 100_000
FOREIGN = {  # not Stepwise servers: the exit code is that of an unreachable server
    "no HTTP": b"220 ready\r\n\r\n",
    "binary": bytes(range(256)),
    "HTML": answer(b"<html>hello</html>", "text/html"),
    "no type": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "nothing": b"HTTP/1.1 204 No Content\r\n\r\n",
    "truncated JSON": answer(b'{"fingerprint": "a'),
    "other JSON": answer(b'{"fingerprint": "abc", "images": [], "model": {}}'),
    "deep JSON": answer(DEEP),
    "no gzip": answer(b"{}", more="Content-Encoding: gzip\r\n"),
}
EVENTS = {
    "text": b"x",
    "a list": b"[]",
    "nesting": DEEP,
    "a number": b"7",
    "a done without images": b'{"parameters": {}, "timings": {}}',
}
for name, data in EVENTS.items():
    FOREIGN[f"{name} as an event"] = answer(b"event: done\ndata: " + data + b"\n\n", "text/event-stream")
ARRAYS = {
    "nothing": b"",
    "text": b"text",
    "a zip": b"PK\3\4" + b"\0" * 30,
    "a head": b"\x93NUMPY\1\0\x10\0{'descr': ((((((",
    "integers": write_npy(np.zeros((1, 2, 2), np.int64)),
}
for name, data in ARRAYS.items():
    FOREIGN[f"{name} as an array"] = answer(data, "application/x-npy", more="X-Seed: 1\r\n")
FOREIGN["no PNG"] = answer(b"x", "image/png", more="X-Seed: 1\r\nX-Clipped: 0\r\n")

REFUSALS = {
    "a redirect": (
        answer(b"", "text/html", "307 Temporary Redirect", "Location: https://a.example/\r\n"),
        exits.UNUSABLE,
    ),
    "a broken redirect": (answer(b"", "text/html", "302 Found", "Location: http://a:no/\r\n"), exits.UNREACHABLE),
    "401": (answer(b"<h1>no</h1>", "text/html", "401 Unauthorized"), exits.REFUSED),
    "404": (answer(b"\x1b[2J\nno\n\n", "text/plain", "404 Not Found"), exits.UNUSABLE),
    "407": (answer(b"", "text/plain", "407 Proxy Authentication Required"), exits.UNUSABLE),
    "413": (answer(b"large", "text/plain", "413 Content Too Large"), exits.UNUSABLE),
    "422 of nonsense": (answer(b"[7]", PROBLEM, "422 Unprocessable Content"), exits.UNUSABLE),
    "429": (answer(b"", "text/html", "429 Too Many Requests"), exits.REFUSED),
    "500": (answer(DEEP, PROBLEM, "500 Internal Server Error"), exits.REFUSED),
    "503": (answer(b"<html>", "text/html", "503 Service Unavailable"), exits.REFUSED),
    "503 in lines": (answer(b'{"detail": "a\\nb\\u001b[2J"}', PROBLEM, "503 Service Unavailable"), exits.REFUSED),
    "a lost connection": (b"", exits.UNREACHABLE),
    "no HTTP either": (b"SSH-2.0-OpenSSH_9.6\r\n", exits.UNREACHABLE),
    "a cut answer": (answer(b"{}")[:-1], exits.UNREACHABLE),
    "broken chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", exits.UNREACHABLE),
}


def told(ended: subprocess.CompletedProcess[bytes], code: int) -> str:
    line = refused(ended, code)
    assert line.isprintable()
    return line


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_stepwise_server_is_told_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((1, 2, 2), np.float32), {}))
    with saying(FOREIGN[name]) as peer:
        for number, command in enumerate(COMMANDS, start=1):
            line = told(stepwise(peer, tmp_path, *command), exits.UNREACHABLE)
            assert line.startswith((f"{peer.url} is no Stepwise server: ", "of 1 images the server sent"))
            assert len(line) < 400
            assert len(peer.asked) == number
        with package.Client(peer.url) as client:
            for ask in (client.info, client.sample):
                with pytest.raises(package.Unreachable):
                    ask()
        assert len(peer.asked) == len(COMMANDS) + 2


@pytest.mark.parametrize("name", REFUSALS)
def test_what_refuses_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((1, 2, 2), np.float32), {}))
    content, code = REFUSALS[name]
    with saying(content) as peer:
        for command in COMMANDS:
            told(stepwise(peer, tmp_path, *command, "--patience", "0"), code)
        with package.Client(peer.url, patience_s=0) as client, pytest.raises(package.StepwiseError) as raised:
            client.info()
    assert exits.code_of(raised.value) == code
    assert len(peer.asked) == len(COMMANDS) + 1


def image(seed: object, png: bytes = b"x", **more: object) -> Json:
    return {"seed": seed, "b64_json": base64.b64encode(png).decode(), **more}


def events(*images: Json) -> bytes:
    lines = [f"event: image\ndata: {json.dumps(one)}\n\n" for one in images]
    last = json.dumps({"parameters": {}, "timings": {}})
    return answer("".join([*lines, f"event: done\ndata: {last}\n\n"]).encode(), "text/event-stream")


@pytest.mark.parametrize(
    "images",
    [
        [image("../../1", index=0)],
        [image(True, index=0)],
        [image(1, index="0")],
        [image(1, index=[])],
        [image(1, index=1)],
        [image(1, index=0), image(2, index=1)],
        [{"seed": 1, "index": 0, "b64_json": "ü"}],
        [{"seed": 1, "index": 0, "b64_json": 7}],
    ],
)
def test_images_of_another_kind_are_no_files(tmp_path: Path, images: list[Json]) -> None:
    (tmp_path / "here").mkdir()
    with saying(events(*images)) as peer:
        told(stepwise(peer, tmp_path / "here", "sample", "-s", "1"), exits.UNREACHABLE)
    assert list(tmp_path.rglob("*.png")) == []


def test_a_sheet_of_what_are_no_images(tmp_path: Path) -> None:
    with saying(events(image(1, index=0), image(2, index=1))) as peer:
        line = told(stepwise(peer, tmp_path, "sample", "-n", "2", "--sheet", "-o", "a.png"), exits.UNREACHABLE)
    assert line.startswith("the server sends no images of Stepwise: this is no PNG")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("png", [b"", b"text", encode_png(np.zeros((1, 2, 2), np.float32), {})[:40]])
def test_a_server_that_draws_no_images_makes_no_difference(
    server: ServerProcess, tmp_path: Path, png: bytes, count: int
) -> None:
    """The exit code says that this is no image server, not that the image differs."""
    (tmp_path / "a.png").write_bytes(asked(server, seed=1, num_images=count))
    here = server.client.get("/info").content
    drawn: Json = {"images": [image(1, png)] * count, "parameters": {"guidance_scale": 1}, "timings": {}, "model": {}}
    with saying(answer(here), answer(json.dumps(drawn).encode())) as peer:
        told(stepwise(peer, tmp_path, "verify", "a.png"), exits.UNREACHABLE)
    assert len(peer.asked) == 2


# Contents of files.


def chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def with_recipe(png: bytes, text: bytes) -> bytes:
    """A PNG with another recipe."""
    head, rest = png[:33], png[33:]
    return head + chunk(b"tEXt", b"parameters\0" + text) + rest


def broken(png: bytes) -> dict[str, bytes]:
    """PNGs that cannot be compared."""
    recipe = json.dumps(read_parameters(png) | {"eta": 1, "sampler": "ddim"}).encode()  # so the bytes differ
    other = with_recipe(png, recipe)
    deep = recipe[:-1] + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}"
    size = (60_000).to_bytes(4, "big")
    bomb = (
        other[:16]
        + size
        + size
        + other[24:29]
        + zlib.crc32(other[12:16] + size + size + other[24:29]).to_bytes(4, "big")
    )
    return {
        "empty": b"",
        "magic": png[:8],
        "cut": other[:-60],
        "no image": other[:33] + chunk(b"tEXt", b"parameters\0" + recipe),
        "bomb": bomb,
        "depth": with_recipe(png, b'{"seed": ' + DEEP + b"}"),
        "depth that can be read": with_recipe(png, deep.replace(b'"eta": 1', b'"eta": ' + b"[" * 300 + b"]" * 300)),
        "a list": with_recipe(png, b"[]"),
        "numbers": with_recipe(png, re.sub(b'"seed": 1', b'"seed": ' + b"9" * 5000, recipe)),
        "types": with_recipe(png, recipe.replace(b'"sampler": "ddim"', b'"sampler": {"a": [null]}')),
        "not a number": with_recipe(png, recipe.replace(b'"eta": 1', b'"eta": NaN')),
        "surrogates": with_recipe(png, recipe.replace(b'"ddim"', b'"\\ud800"')),
        "many": with_recipe(png, recipe[:-1] + b', "num_images": 1000000}'),
        "a noisy image": with_recipe(png, recipe[:-1] + b', "image_sha256": 7, "timestep": {}, "scaling": []}'),
    }


def test_no_file_ends_verify_as_if_it_differed(server: ServerProcess, tmp_path: Path) -> None:
    """Each file alone gives its line, and so do all together."""
    contents = broken(asked(server, seed=1))
    (tmp_path / "folder.png").mkdir()
    for name, content in contents.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    names = [f"{name}.png" for name in [*contents, "folder", "missing"]]
    noisy = ["--image", "empty.png"]
    for name in names:
        assert told(stepwise(server, tmp_path, "verify", name, *noisy), exits.UNUSABLE).startswith(f"{name}: ")
    for more in [], ["--json"]:
        ended = stepwise(server, tmp_path, "verify", *names, *noisy, *more)
        assert ended.returncode == exits.UNUSABLE
        assert len(ended.stderr.splitlines()) == len(names)


def test_a_recipe_cannot_speak_for_verify(server: ServerProcess, tmp_path: Path) -> None:
    """Text from a file stays on the line of that file."""
    png = asked(server, seed=1)
    recipe = read_parameters(png) | {"model": "x\nb.png: the same bytes\n\x1b[2J\ud800"}
    (tmp_path / "a.png").write_bytes(with_recipe(png, json.dumps(recipe).encode()))
    ended = stepwise(server, tmp_path, "verify", "a.png")
    assert (ended.returncode, ended.stderr) == (exits.DIFFERENT, b"")
    [line] = ended.stdout.decode().splitlines()
    assert line.startswith(r"a.png: different: it is of model x b.png: the same bytes \x1b[2J\ud800, and here is ")


def test_names_that_are_no_text(server: ServerProcess, tmp_path: Path) -> None:
    """Also characters that an encoding lacks."""
    png = asked(server, seed=1)
    for name in ("\udcff.png", "ü.png"):
        (tmp_path / name).write_bytes(png)
    assert done(stepwise(server, tmp_path, "verify", "\udcff.png")) == "\\udcff.png: the same bytes\n"
    ended = process(server, tmp_path, "verify", "ü.png", PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stdout) == (0, b"\\xfc.png: the same bytes\n")


@pytest.mark.parametrize("key", ["a\nb", "a\x00b".replace("\x00", "\x7f"), " ", "\udcff"])
def test_a_key_that_cannot_be_sent_is_not_told(server: ServerProcess, tmp_path: Path, key: str) -> None:
    line = told(stepwise(server, tmp_path, "info", STEPWISE_API_KEY=key), exits.UNUSABLE)
    assert "the API key cannot be sent" in line


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://a:99999",
        "http://a:0",
        "http://xn--",
        "http://\udcff",
        "http://a\x7fb",
        "http://ü..x",
        "//",
    ],
)
def test_urls_that_are_none(tmp_path: Path, url: str) -> None:
    assert told(stepwise(None, tmp_path, "verify", "a.png", "--url", url), exits.UNUSABLE).startswith("--url ")


@pytest.mark.parametrize("url", ["http://a..b", "http://" + "a" * 70, "http://127.0.0.1:9"])
def test_hosts_that_are_not_there(tmp_path: Path, url: str) -> None:
    line = told(stepwise(None, tmp_path, "verify", "a.png", "--url", url), exits.UNREACHABLE)
    assert line.startswith((f"no connection to {url}: ", f"nothing can be sent to {url}: "))
    with package.Client(url) as client, pytest.raises(package.Unreachable):
        client.info()


def test_tls_that_fails_is_told_at_once(server: ServerProcess, tmp_path: Path) -> None:
    url = server.url.replace("http:", "https:")
    told(stepwise(None, tmp_path, "info", "--url", url), exits.UNREACHABLE)


def test_a_time_that_is_over_before_it_begins(server: ServerProcess, tmp_path: Path) -> None:
    line = told(stepwise(server, tmp_path, "sample", "--timeout", "-100"), exits.UNUSABLE)
    assert line.startswith("timeout_s: ")


def test_clients_raise_their_own_errors_when_they_are_closed(server: ServerProcess) -> None:
    client = package.Client(server.url)
    client.close()
    with pytest.raises(package.Unreachable, match="closed"):
        client.info()


class Failing(httpx.BaseTransport):
    """A transport on which a library below httpx raises its own error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        raise self.error


@pytest.mark.parametrize(
    "error", [UnicodeError("idna"), OverflowError(), ExceptionGroup("some", [OSError(5, "no")]), RuntimeError("closed")]
)
def test_errors_of_other_libraries_are_the_clients(error: Exception) -> None:
    with package.Client("http://fake", transport=Failing(error)) as client:
        with pytest.raises(package.Unreachable, match=r"^nothing can be sent to http://fake: ") as raised:
            client.info()
        assert raised.value.__cause__
        assert raised.value.__cause__.__cause__ is error
        with pytest.raises(TypeError):  # an unsendable value raises Python's own error
            client.sample(seed=cast(int, object()))


FULL = "stepwise: standard output: No space left on device\n"

# The process: closed or full streams, and the program's own faults.


def ending(folder: Path, server: ServerProcess, line: str) -> tuple[int, str]:
    """The exit code and the standard error of a bash line that runs the program."""
    command = [sys.executable, "-m", "stepwise"]
    script = f'stepwise() {{ {" ".join(command)} "$@"; }}\n{line}'
    env = surroundings(server, PYTHONUNBUFFERED="")
    ended = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, capture_output=True, timeout=PATIENCE, check=False
    )
    return ended.returncode, ended.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("stepwise verify a.png > /dev/full", exits.UNUSABLE, FULL),
        (
            "stepwise sample -o - > /dev/full",
            exits.UNUSABLE,
            FULL,
        ),
        ("stepwise info > /dev/full", exits.UNUSABLE, "stepwise: [Errno 28] No space left on device\n"),
        ("stepwise verify a.png >&-", exits.UNUSABLE, "stepwise: standard output is closed\n"),
        ("stepwise verify b.png 2>&-", exits.UNUSABLE, ""),
        ("stepwise verify b.png 2> /dev/full", exits.UNUSABLE, ""),
        ("stepwise verify --no-such 2> /dev/full", exits.UNUSABLE, ""),
        ("stepwise verify - <&-", exits.UNUSABLE, "stepwise: -: this is no PNG\n"),
    ],
)
def test_streams_that_cannot_be_used(server: ServerProcess, tmp_path: Path, line: str, code: int, said: str) -> None:
    (tmp_path / "a.png").write_bytes(asked(server, seed=1))
    assert ending(tmp_path, server, line) == (code, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["verify", "a.png"], ["verify", "a.png", "--json"], ["info"], ["verify", "--help"]]
)
def test_readers_that_have_left(server: ServerProcess, tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "a.png").write_bytes(asked(server, seed=1))
    with closed_pipe() as pipe, running(server, tmp_path, *arguments, stdout=pipe) as program:
        assert program.stderr
        assert program.stderr.read() == b""
    assert program.returncode == exits.READER_LEFT


@pytest.mark.slow
@pytest.mark.parametrize(("option", "code"), [("b.png", exits.UNUSABLE), ("--no", exits.READER_LEFT)])
def test_readers_of_errors_that_have_left(server: ServerProcess, tmp_path: Path, option: str, code: int) -> None:
    with closed_pipe() as pipe, running(server, tmp_path, "verify", option, stderr=pipe) as program:
        assert program.stdout
        assert program.stdout.read() == b""
    assert program.returncode == code


@contextmanager
def closed_pipe() -> Iterator[IO[bytes]]:
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "wb") as pipe:
        yield pipe


def test_a_difference_ends_the_process_with_1(server: ServerProcess, tmp_path: Path) -> None:
    png = asked(server, seed=1)
    (tmp_path / "a.png").write_bytes(with_recipe(png, json.dumps(read_parameters(png) | {"seed": 2}).encode()))
    ended = process(server, tmp_path, "verify", "a.png")
    assert (ended.returncode, ended.stderr) == (exits.DIFFERENT, b"")


def test_a_fault_of_its_own_is_no_difference(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program prints the traceback, and then the error in the last line."""
    monkeypatch.setattr(sys.modules["stepwise.cli.verify"], "read_recipe", lambda _: 1 / 0)
    (tmp_path / "a.png").write_bytes(b"")
    ended = stepwise(server, tmp_path, "verify", "a.png")
    assert (ended.returncode, ended.stdout) == (exits.FAULTY, b"")
    assert ended.stderr.decode().startswith("Traceback ")
    assert ended.stderr.decode().splitlines()[-1] == "stepwise: a fault of its own, ZeroDivisionError: division by zero"


def test_ctrl_c_while_files_are_compared(tmp_path: Path) -> None:
    """Ctrl-C comes before the server has answered."""
    with serving_fake() as local:
        local.runner.hold()
        png = encode_png(np.zeros((1, 1, 2), np.float32), RECIPE)
        (tmp_path / "a.png").write_bytes(png)
        with running(local, tmp_path, "verify", "a.png") as program:
            local.wait_for_metric("stepwise_accepted_total", lambda count: count == 1)
            program.send_signal(signal.SIGINT)
            out, errors = program.communicate(timeout=PATIENCE)
    assert (program.returncode, out, errors) == (exits.INTERRUPTED, b"", b"stepwise: interrupted\n")


RECIPE: Json = {"model": "fake", "seed": 1, "sampler": "ddim", "num_inference_steps": 4, "eta": 0}
RECIPE |= {"class_label": None, "guidance_scale": 1}
