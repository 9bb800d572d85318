"""The Python client, against the running server and against a server that fails in every way.

Tests of behaviour run twice: with Client, and with AsyncClient on its own event loop.
"""

import asyncio
import base64
import contextlib
import functools
import inspect
import io
import json
import pickle
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import httpx
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo

import service.errors
import service.http.problems
import stepwise
from model.samplers import SAMPLERS
from service.http.png import encode_png
from stepwise import (
    AsyncClient,
    Client,
    Done,
    Event,
    ImageDone,
    Invalid,
    Preview,
    Progress,
    Queued,
    TooManyRequests,
    Unavailable,
    Unreachable,
    read_recipe,
)
from stepwise.client import Clock
from tests.latents import LatentServer
from tests.local import FakeServer, serving_fake
from tests.servers import PATIENCE, ROOT, Json, ServerProcess, read_parameters, read_png, write_npy
from tests.test_denoise import GREY
from tests.test_noise import read_png16

EVENTS = {"content-type": "text/event-stream; charset=utf-8"}


class FakeClock(Clock):
    """A clock that advances only while a test's client waits.

    Attributes:
        waits: the seconds of each wait, in order.
        late_s: extra seconds of each wait.
    """

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.late_s = 0.0

    def now(self) -> float:
        return 1000.0 + sum(wait + self.late_s for wait in self.waits)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def wait(self, seconds: float) -> None:
        self.waits.append(seconds)


class Blocking:
    """An AsyncClient with its own event loop, with the interface of Client."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._run = runner.run

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            called = method(*args, **kwargs)
            return self._run(called) if inspect.iscoroutine(called) else self._iterate(called)

        return call

    def _iterate(self, events: Any) -> Iterator[Event]:
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            self._run(events.aclose())


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


@contextmanager
def blocking(*args: Any, **kwargs: Any) -> Iterator[Client]:
    with asyncio.Runner() as runner:
        client = AsyncClient(*args, **kwargs)
        yield cast(Client, Blocking(client, runner))
        runner.run(client.aclose())


Make = Callable[..., AbstractContextManager[Client]]  # takes the arguments of Client


@pytest.fixture(params=["Client", "AsyncClient"])
def make(request: pytest.FixtureRequest) -> Make:
    return Client if request.param == "Client" else blocking


@pytest.fixture
def client(make: Make, server: ServerProcess) -> Iterator[Client]:
    """A client of the server of `grey`."""
    with make(server.url) as client:
        yield client


def images_of(events: list[Event]) -> dict[int, bytes]:
    """The PNGs by seed. Each arrives once."""
    images = [event.image for event in events if isinstance(event, ImageDone)]
    assert len({image.seed for image in images}) == len(images)
    return {image.seed: image.png for image in images}


# The package


def test_all_that_is_public_is_exported() -> None:
    public = {name for name, value in vars(stepwise).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert set(stepwise.__all__) == public
    assert len(set(stepwise.__all__)) == len(stepwise.__all__)
    errors = {
        name
        for name, value in vars(stepwise.errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert errors <= public
    assert {kind.__name__ for kind in get_args(Event)} <= public


def test_importing_it_brings_httpx_and_numpy_and_nothing_else() -> None:
    code = "import sys, httpx, httpx_sse, numpy; before = set(sys.modules); import stepwise; "
    code += "print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    table = {"service", *(f"service.plan{name}" for name in ("", ".entries", ".fields", ".shared_fields"))}
    assert {name for name in loaded if name.startswith("service")} == table
    ours = {"stepwise", "service", "numpy"}
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names <= ours
    assert "stepwise.unet" not in done.stdout.split()
    assert "stepwise.cli" not in done.stdout.split()


def methods_of(kind: type) -> dict[str, inspect.Signature]:
    members = inspect.getmembers(kind, inspect.isfunction)
    return {name: inspect.signature(method) for name, method in members if name[0] != "_"}


def test_both_clients_have_the_same_methods() -> None:
    ours, theirs = methods_of(Client), methods_of(AsyncClient)
    assert ours.keys() - {"close"} == theirs.keys() - {"aclose"}
    assert {
        "info",
        "sample",
        "sample_array",
        "sample_picture",
        "stream",
        "denoise",
        "stream_denoise",
        "denoise_array",
        "noise",
        "noise_array",
    } < ours.keys()
    for name in ours.keys() - {"close"}:
        assert ours[name].parameters == theirs[name].parameters
        assert getattr(Client, name).__doc__ == getattr(AsyncClient, name).__doc__
        is_stream = name.startswith("stream")
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name)) is not is_stream
        ours_gives, theirs_gives = ours[name].return_annotation, theirs[name].return_annotation
        assert (get_args(ours_gives) if is_stream else ours_gives) == (
            get_args(theirs_gives) if is_stream else theirs_gives
        )
    names = [list(inspect.signature(kind).parameters) for kind in (Client, AsyncClient)]
    assert names[0] == names[1]


# Answers as values


def test_info(client: Client, server: ServerProcess) -> None:
    info = client.info()
    assert info == server.client.get("/info").json() | {"seconds_per_step": info["seconds_per_step"]}
    assert info.keys() == stepwise.Info.__annotations__.keys()
    for name in ("model", "recommended", "limits"):
        assert info[name].keys() == stepwise.Info.__annotations__[name].__annotations__.keys()


def test_sample_is_the_servers_answer(client: Client, server: ServerProcess) -> None:
    drawn = client.sample(num_images=3, seed=7, sampler="ddim", num_inference_steps=6, eta=0.5, class_label="dog")
    body = {"num_images": 3, "seed": 7, "sampler": "ddim", "num_inference_steps": 6, "eta": 0.5, "class_label": "dog"}
    answer = server.client.post("/sample", json=body, headers={"accept": "application/json"}).json()
    assert [(image.seed, image.png) for image in drawn.images] == [
        (image["seed"], base64.b64decode(image["b64_json"])) for image in answer["images"]
    ]
    assert drawn.parameters == answer["parameters"]
    assert drawn.model == answer["model"]
    assert drawn.timings.keys() == answer["timings"].keys()


def test_a_sample_of_nothing_in_particular(client: Client) -> None:
    [image] = client.sample().images
    assert read_recipe(image.png)["seed"] == image.seed
    assert client.sample(seed=image.seed).images == (image,)


def test_labels_keep_their_types(client: Client) -> None:
    """In `grey`, the class "7" has the index 2. No class has the index 7."""
    drawn = client.sample(num_images=4, class_label=["7", 0, None, "dog"])
    assert [read_recipe(image.png)["class_label"] for image in drawn.images] == [2, 0, None, 1]
    with pytest.raises(Invalid, match="class_label"):
        client.sample(class_label=7)
    assert client.sample(num_images=2, seed=1, class_label=("cat", 1)).parameters["class_label"] == [0, 1]


def test_numbers_may_be_numpys(client: Client) -> None:
    seed = np.random.default_rng(0).integers(2**32)
    assert client.sample(seed=cast(int, seed)).images[0].seed == int(seed)


def test_an_image_is_shown_and_saved(client: Client, tmp_path: Path) -> None:
    [image] = client.sample(seed=3).images
    np.testing.assert_array_equal(np.asarray(image.pil()), read_png(image.png))
    image.save(tmp_path / "three.png")
    assert (tmp_path / "three.png").read_bytes() == image.png
    assert "png" not in repr(image)


def test_a_stream_tells_of_a_request_from_the_queue_to_its_end(client: Client) -> None:
    wanted: dict[str, Any] = {"seed": 7, "num_images": 3, "num_inference_steps": 6, "class_label": "dog"}
    first, *between, last = client.stream(**wanted, preview_every=2)
    drawn = client.sample(**wanted)
    assert isinstance(first, Queued)
    assert 0 < first.eta_s <= first.promise_s
    assert isinstance(last, Done)
    assert last.parameters == {**drawn.parameters, "preview_every": 2}
    assert last.timings.keys() == drawn.timings.keys()
    assert images_of(between) == {image.seed: image.png for image in drawn.images}
    for event in between:
        match event:
            case Progress(step=step, steps=steps, eta_s=eta_s):
                assert 0 <= step <= steps == 6
                assert eta_s >= 0
            case Preview(index=index, step=step, png=png, decoder=decoder):
                assert step in (2, 4, 6)
                assert index in range(3)
                assert read_png(png).shape == (16, 16)
                assert decoder is None
            case ImageDone(index=index, image=image):
                assert image.seed == 7 + index
            case _:
                raise AssertionError(event)


def test_a_rough_preview_says_so(make: Make, latents: LatentServer) -> None:
    latents.runner.hold()
    with make(latents.url) as client, closing(client.stream(num_inference_steps=4, preview_every=1)) as events:
        come = [next(events)]
        latents.runner.next_pass()
        latents.runner.let_go()
        come += events
    previews = [event for event in come if isinstance(event, Preview)]
    assert previews
    assert {preview.decoder for preview in previews} == {"linear"}


def test_denoise_takes_bytes_arrays_and_paths(client: Client, tmp_path: Path) -> None:
    noisy = client.noise_array(GREY, 400, seed=1)
    path = tmp_path / "noisy.npy"
    path.write_bytes(write_npy(noisy.array))
    wanted: dict[str, Any] = {"num_inference_steps": 4, "class_label": "dog", "seed": 2}
    answers = [client.denoise(image, 400, **wanted) for image in (noisy.array, path.read_bytes(), path)]
    answers.append(client.denoise(noisy.array.astype(np.float64), 400, **wanted))
    [image] = answers[0].images
    assert read_recipe(image.png)["timestep"] == 400
    assert all(answer.images == (image,) for answer in answers)
    assert images_of(list(client.stream_denoise(path, 400, **wanted))) == {2: image.png}


def test_images_come_as_arrays_too(client: Client) -> None:
    drawn = client.sample_array(seed=7, num_images=2, class_label="dog")
    assert (drawn.array.shape, drawn.seed) == ((2, *GREY.shape), 7)
    assert drawn.array.dtype == np.float32
    for seed, array in zip((7, 8), drawn.array, strict=True):
        alone = client.sample_array(seed=seed, class_label="dog")
        assert alone.seed == seed
        np.testing.assert_array_equal(alone.array, array)
        png = client.sample(seed=seed, class_label="dog").images[0].png
        assert np.abs(read_png(png) / 127.5 - 1 - array[0].clip(-1, 1)).max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(("kind", "expected"), [("webp", "WEBP"), ("jpeg", "JPEG")])
def test_a_picture_is_a_sheet_of_all_images(
    client: Client, tmp_path: Path, kind: Literal["webp", "jpeg"], expected: str
) -> None:
    picture = client.sample_picture(kind=kind, seed=7, num_images=3)
    assert picture.seed == 7
    picture.save(tmp_path / "sheet")
    with PIL.Image.open(tmp_path / "sheet") as sheet:
        assert (sheet.format, sheet.size) == (expected, (32, 32))


def test_the_arrays_of_a_step(client: Client) -> None:
    x0 = client.denoise_array(GREY, 400, class_label=1)
    assert x0.dtype == np.float32
    assert x0.shape == GREY.shape
    previous, output = (
        client.denoise_array(GREY, 400, class_label=1, output=what) for what in ("previous", "model_output")
    )
    np.testing.assert_array_equal(previous, x0)  # equal, because there is one step
    assert (output != x0).any()
    png = client.denoise(GREY, 400, class_label=1).images[0].png
    assert np.abs(read_png(png) / 127.5 - 1 - x0[0]).max() <= 1 / 255 + 1e-6


def test_what_is_uploaded_is_read_as_told(client: Client) -> None:
    x = client.noise(GREY.clip(-1, 1), 300, seed=5, value_range=4, scaling="additive")
    exact = client.noise_array(GREY.clip(-1, 1), 300, seed=5, scaling="additive")
    assert x.seed == exact.seed == 5
    assert 0 <= x.clipped < 1e-3
    assert x.clipped == np.mean(np.abs(exact.array) > 4)
    assert np.abs(read_png16(x.png) * 4 - exact.array.clip(-4, 4)).max() < 1e-4
    one, other = (
        client.denoise_array(image, 300, value_range=4, scaling="additive", class_label=0)
        for image in (x.png, exact.array.clip(-4, 4))
    )
    assert np.abs(one - other).max() < 1e-3


def test_noise_of_a_seed_of_its_own(client: Client, tmp_path: Path) -> None:
    noisy = client.noise(client.sample(seed=1).images[0].png, 100)
    noisy.save(tmp_path / "noisy.png")
    assert (tmp_path / "noisy.png").read_bytes() == noisy.png
    assert client.noise(client.sample(seed=1).images[0].png, 100, seed=noisy.seed) == noisy


def test_an_array_of_pixels_is_refused_here(client: Client) -> None:
    with pytest.raises(TypeError, match="must be an array of floats in the model's own scale, and is of uint8"):
        client.denoise(np.zeros((1, 16, 16), np.uint8), 400)


# Refusals and failures


def test_an_invalid_field_is_named(client: Client) -> None:
    with pytest.raises(Invalid) as refusal:
        client.sample(num_images=10**6)
    error = refusal.value
    [field] = error.errors
    assert field["loc"] == ["num_images"]
    assert str(error) == error.detail == error.problem["detail"] == f"num_images: {field['msg']}"
    assert error.status == error.problem["status"] == 422
    assert error.title == error.problem["title"]
    assert error.request_id
    assert error.retry_after is None


def test_all_invalid_fields_are_named(client: Client) -> None:
    with pytest.raises(Invalid) as refusal:
        client.sample(seed=-1, eta=2)
    assert [field["loc"] for field in refusal.value.errors] == [["seed"], ["eta"]]
    assert all(field["msg"] in str(refusal.value) for field in refusal.value.errors)


def test_a_stream_that_is_refused_raises_as_soon_as_it_is_read(client: Client) -> None:
    with pytest.raises(Invalid, match=f"sampler: must be one of {', '.join(SAMPLERS)}, and is 'magic'"):
        next(iter(client.stream(sampler="magic")))


def test_keys(make: Make, strict_server: ServerProcess) -> None:
    for key in ("alpha", "beta-ü", "beta-ü\n"):
        with make(strict_server.url, api_key=key) as client:
            assert client.sample(seed=1).images[0].seed == 1
    with make(strict_server.url) as client, pytest.raises(stepwise.Unauthorized) as refusal:
        client.sample()
    assert refusal.value.status == 401


def test_a_computation_that_fails(make: Make, strict_server: ServerProcess) -> None:
    with make(strict_server.url, api_key="alpha") as client:
        with pytest.raises(stepwise.ServerFailed, match="not finite") as plain:
            client.sample(class_label="dog")
        with pytest.raises(stepwise.ServerFailed, match="not finite") as streamed:
            list(client.stream(class_label="dog"))
    assert streamed.value.problem == plain.value.problem
    line = strict_server.wait_for_line(lambda line: line.get("request_id") == streamed.value.request_id)
    assert line["path"] == "/under/sample"


def test_a_deadline_that_passes(make: Make) -> None:
    with serving_fake(timeout=10_000) as local, make(local.url) as client:
        local.runner.hold()
        events = client.stream(timeout_s=6)
        next(events)
        local.runner.next_pass()
        local.runner.clock.now += 10
        local.runner.let_go()
        with pytest.raises(stepwise.DeadlinePassed, match="not done within 6 s"):
            list(events)


@pytest.mark.parametrize("kind", [*service.http.problems.STATUS, service.errors.Draining])
def test_each_error_of_the_service_is_one_of_the_clients(make: Make, kind: type[service.errors.ServiceError]) -> None:
    message = "so it is"
    error = kind.field("eta", message) if issubclass(kind, service.errors.Invalid) else kind(message)
    answer = service.http.problems.answer(error)
    script = Script(httpx.Response(answer.status_code, headers=dict(answer.headers), content=bytes(answer.body)))
    with script.client(make, patience_s=0) as client, pytest.raises(stepwise.ApiError) as raised:
        client.sample()
    expected = {
        401: stepwise.Unauthorized,
        422: stepwise.Invalid,
        429: stepwise.TooManyRequests,
        500: stepwise.ServerFailed,
        501: stepwise.ServerFailed,
        503: stepwise.Unavailable,
        504: stepwise.DeadlinePassed,
    }.get(answer.status_code, stepwise.BadRequest)
    assert type(raised.value) is expected
    assert raised.value.status == answer.status_code
    assert raised.value.problem == json.loads(bytes(answer.body))
    assert raised.value.retry_after == (1.0 if answer.status_code in (429, 503) else None)
    assert message in str(raised.value)


def test_what_is_no_problem_document_is_told_in_short(make: Make) -> None:
    page = "<html>\n <h1>Not\tFound</h1>" + "x" * 1000
    script = Script(httpx.Response(404, text=page), httpx.Response(418))
    with script.client(make) as client:
        with pytest.raises(stepwise.BadRequest) as raised:
            client.info()
        assert str(raised.value).startswith("the answer is 404 Not Found: <html> <h1>Not Found</h1>xxx")
        assert len(str(raised.value)) < 250
        assert raised.value.title == "Not Found"
        with pytest.raises(stepwise.BadRequest, match=r"^the answer is 418 "):
            client.info()


def test_field_errors_that_the_detail_leaves_out_are_told() -> None:
    errors = [{"loc": ["eta"], "msg": "must be 0"}, {"loc": ["class_label", 1], "msg": "is no label"}]
    error = stepwise.errors.from_problem(422, {"detail": "two fields are wrong", "errors": errors})
    assert str(error) == "two fields are wrong; eta: must be 0; class_label.1: is no label"
    assert error.errors == errors


@pytest.mark.parametrize("errors", [None, 7, "eta", [7], [{"loc": "eta"}], [{"loc": 1, "msg": 2}]])
def test_what_others_call_errors_is_passed_over(errors: object) -> None:
    error = stepwise.errors.from_problem(422, {"detail": "no", "errors": errors})
    assert error.errors == []
    assert str(error) == "no"


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "<html>", "headers": {"content-type": "text/html"}},
        {"text": "{", "headers": {"content-type": "application/json"}},
        {"json": []},
        {"json": {"hello": "world"}},
        {"content": b""},
    ],
)
def test_what_is_no_stepwise_server_is_told(make: Make, answer: Any) -> None:
    script = Script(*[httpx.Response(200, **answer) for _ in range(3)])
    with script.client(make) as client:
        for ask in (client.info, client.sample, lambda: list(client.stream())):
            with pytest.raises(Unreachable, match=r"^http://fake is no Stepwise server: "):
                ask()
    assert script.clock.waits == []


@pytest.mark.parametrize(
    "text",
    [
        "event: image\ndata: {\n\n",
        "event: image\ndata: []\n\n",
        'event: done\ndata: {"timings": {}}\n\n',
        "event: error\ndata: 7\n\n",
    ],
)
def test_a_stream_of_something_else_is_told(make: Make, text: str) -> None:
    with (
        Script(streamed(text)).client(make) as client,
        pytest.raises(Unreachable, match=r"^http://fake is no Stepwise server: "),
    ):
        list(client.stream())


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1:8000", "", "ftp://localhost", "http://", "http://a:b"])
def test_what_is_no_url_is_told(make: Make, url: str) -> None:
    with pytest.raises(Unreachable, match="URL"), make(url):
        pass


# Retries


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body in pieces, which may break off.

    Attributes:
        closed: whether the client has closed it.
    """

    def __init__(self, *pieces: bytes, breaks: bool = False) -> None:
        self._pieces = pieces
        self._breaks = breaks
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._pieces
        if self._breaks:
            raise httpx.ReadError("the cable is cut")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


class Script:
    """A server at http://fake that gives a list of answers, one a request.

    Attributes:
        asked: the fields of each request.
        silences: the client's read timeout for each request, in seconds.
        clock: the client's.
    """

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = list(answers)
        self.asked: list[Json] = []
        self.silences: list[float] = []
        self.clock = FakeClock()

    def client(self, make: Make, **arguments: Any) -> AbstractContextManager[Client]:
        return make("http://fake", transport=httpx.MockTransport(self._answer), _clock=self.clock, **arguments)

    @property
    def is_over(self) -> bool:
        return not self._answers

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(json.loads(request.content or b"{}"))
        self.silences.append(request.extensions["timeout"]["read"])
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def streamed(*texts: str | bytes, breaks: bool = False, headers: Mapping[str, str] | None = None) -> httpx.Response:
    pieces = [text.encode() if isinstance(text, str) else text for text in texts]
    return httpx.Response(200, headers={**EVENTS, **(headers or {})}, stream=Pieces(*pieces, breaks=breaks))


def refused(status: int, retry_after: str | None = None) -> httpx.Response:
    document = {"type": "about:blank", "title": "No", "status": status, "detail": f"this is {status}"}
    headers = {"content-type": "application/problem+json"} | (
        {} if retry_after is None else {"retry-after": retry_after}
    )
    return httpx.Response(status, headers=headers, content=json.dumps(document).encode())


DRAWN: Json = {
    "images": [{"seed": 5, "b64_json": base64.b64encode(b"a PNG").decode()}],
    "parameters": {"seed": 5},
    "timings": {"queue_s": 0.5},
    "model": {"name": "fake"},
}


def drawn() -> httpx.Response:
    return httpx.Response(200, json=DRAWN)


def test_what_is_not_now_is_asked_again_when_told(make: Make) -> None:
    script = Script(refused(503, "7"), refused(429, "3"), refused(502, "1"), drawn())
    with script.client(make) as client:
        [image] = client.sample(seed=5).images
    assert image.png == b"a PNG"
    assert script.clock.waits == [7, 3, 1]
    assert script.asked == [{"seed": 5}] * 4


def test_pauses_grow_where_nothing_is_told(make: Make) -> None:
    script = Script(*[refused(503, when) for when in (None, "0", "Fri, 31 Dec 1999 23:59:59 GMT", "-1", "x")], drawn())
    with script.client(make) as client:
        client.sample()
    for n, wait in enumerate(script.clock.waits):
        assert 0.125 * 2**n <= wait <= 0.25 * 2**n
    assert len(script.clock.waits) == 5


def test_pauses_do_not_grow_without_end(make: Make) -> None:
    script = Script(*[refused(503)] * 12, drawn())
    with script.client(make) as client:
        client.sample()
    assert max(script.clock.waits) <= 8


@pytest.mark.parametrize(("status", "error"), [(429, TooManyRequests), (503, Unavailable)])
def test_patience_ends(make: Make, status: int, error: type[stepwise.ApiError]) -> None:
    script = Script(*[refused(status, "4")] * 3)
    with script.client(make, patience_s=10) as client, pytest.raises(error, match=rf"^this is {status}$") as raised:
        client.sample()
    assert script.clock.waits == [4, 4]  # a third wait would exceed the limit
    assert raised.value.retry_after == 4


def test_time_that_goes_by_while_it_asks_counts(make: Make) -> None:
    script = Script(refused(503, "4"), refused(503, "4"))
    script.clock.late_s = 5
    with script.client(make, patience_s=10) as client, pytest.raises(Unavailable):
        client.sample()
    assert script.clock.waits == [4]


@pytest.mark.parametrize("status", [502, 503, 429, None])
def test_without_patience_nothing_is_asked_again(make: Make, status: int | None) -> None:
    script = Script(httpx.ReadError("gone") if status is None else refused(status, "1"))
    with script.client(make, patience_s=0) as client, pytest.raises(stepwise.StepwiseError):
        client.sample()
    assert script.clock.waits == []


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422, 500, 504])
def test_what_would_fail_again_is_not_asked_again(make: Make, status: int) -> None:
    script = Script(refused(status, "1"))
    with script.client(make) as client, pytest.raises(stepwise.ApiError) as raised:
        client.sample()
    assert raised.value.status == status
    assert script.clock.waits == []


def test_a_lost_connection_is_asked_again(make: Make) -> None:
    body = json.dumps(DRAWN).encode()
    cut = httpx.Response(200, headers={"content-type": "application/json"}, stream=Pieces(body[:9], breaks=True))
    script = Script(httpx.RemoteProtocolError("no answer"), httpx.ReadTimeout("silence"), cut, drawn())
    with script.client(make) as client:
        assert client.sample().images[0].png == b"a PNG"
    assert len(script.clock.waits) == 3
    assert cut.is_closed


def test_a_lost_connection_that_does_not_come_back(make: Make) -> None:
    script = Script(drawn(), *[httpx.ConnectError("refused")] * 50)
    with script.client(make, patience_s=30) as client:
        client.sample()
        with pytest.raises(Unreachable, match=r"^no connection to http://fake: refused$"):
            client.sample()
    assert 20 < sum(script.clock.waits) <= 30
    script = Script(httpx.ReadError(""))
    with (
        script.client(make, patience_s=0) as client,
        pytest.raises(Unreachable, match=r"^the connection to http://fake was lost: ReadError$") as raised,
    ):
        client.sample()
    assert isinstance(raised.value.__cause__, httpx.ReadError)


def test_a_server_that_was_never_there_is_not_waited_for(make: Make, unused_url: str) -> None:
    clock = FakeClock()
    with make(unused_url, _clock=clock) as client:
        with pytest.raises(Unreachable, match=rf"^no connection to {unused_url}: "):
            client.info()
        with pytest.raises(Unreachable, match=rf"^no connection to {unused_url}: "):
            list(client.stream())
    assert clock.waits == []


def test_a_dead_connection_is_found_in_time(make: Make) -> None:
    script = Script(drawn(), drawn(), streamed(QUEUED, DONE), streamed(QUEUED, DONE))
    with script.client(make) as client:
        client.sample()
        client.sample(timeout_s=5)
        list(client.stream(timeout_s=5))
        list(client.stream_denoise(GREY, 5))
    assert script.silences == [3600, 65, 60, 60]


@pytest.fixture
def unused_url() -> Iterator[str]:
    """An address at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# Interrupted streams


def said(name: str, **data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


QUEUED = said("queued", position=0, eta_s=1.0, promise_s=2.0)
DONE = said("done", parameters={"seed": 7}, timings={"queue_s": 0.5})


def an_image(index: int, seed: int = 7) -> str:
    png = base64.b64encode(b"PNG %d" % (seed + index)).decode()
    return said("image", index=index, seed=seed + index, b64_json=png)


def a_preview(index: int, step: int) -> str:
    return said("preview", index=index, step=step, b64_json=base64.b64encode(b"rough").decode())


def a_step(step: int, **more: float) -> str:
    return said("progress", step=step, steps=9, eta_s=1.0, **more)


def test_a_stream_that_breaks_is_asked_for_again_by_its_seed(make: Make) -> None:
    cut = streamed(QUEUED, a_step(1), a_preview(1, 1), an_image(1), breaks=True, headers={"x-seed": "7"})
    whole = streamed(QUEUED, a_step(1), a_preview(0, 1), a_preview(1, 1), an_image(0), an_image(1), DONE)
    script = Script(cut, whole)
    with script.client(make) as client:
        events = list(client.stream(num_images=2, preview_every=1))
    assert [type(event) for event in events] == [
        *(Queued, Progress, Preview, ImageDone),
        *(Queued, Progress, Preview, ImageDone, Done),  # of image 0
    ]
    assert images_of(events) == {7: b"PNG 7", 8: b"PNG 8"}
    assert script.asked == [
        {"num_images": 2, "preview_every": 1},
        {"num_images": 2, "preview_every": 1, "seed": 7},
    ]
    assert cut.is_closed
    assert whole.is_closed
    assert len(script.clock.waits) == 1


def test_a_stream_that_ends_too_soon_has_broken(make: Make) -> None:
    script = Script(streamed(QUEUED, ": heartbeat\n\n"), streamed(), streamed(QUEUED, an_image(0), DONE))
    with script.client(make) as client:
        assert images_of(list(client.stream(seed=7))) == {7: b"PNG 7"}
    assert len(script.clock.waits) == 2


def test_a_server_that_leaves_amid_a_stream_is_asked_again_and_may_be_slow_to_come_back(make: Make) -> None:
    leaving = said("error", type="about:blank", title="Unavailable", status=503, detail="shutting down")
    whole = streamed(QUEUED, an_image(0), DONE)
    script = Script(streamed(QUEUED, leaving), httpx.ConnectError("refused"), refused(503, "2"), whole)
    with script.client(make) as client:
        assert images_of(list(client.stream(seed=7))) == {7: b"PNG 7"}
    assert script.clock.waits[2:] == [2]


def test_an_error_event_is_raised_after_what_came_before(make: Make) -> None:
    problem = {"type": "about:blank", "title": "Internal Server Error", "status": 500, "detail": "a pass failed"}
    script = Script(streamed(QUEUED, an_image(0), said("error", **problem), headers={"x-request-id": "abc"}))
    come: list[Event] = []
    with script.client(make) as client, pytest.raises(stepwise.ServerFailed, match=r"^a pass failed$") as raised:
        come += client.stream(seed=7)
    assert raised.value.problem == problem
    assert raised.value.request_id == "abc"
    assert script.clock.waits == []


def test_events_of_other_kinds_are_passed_over(make: Make) -> None:
    script = Script(streamed(said("mood", is_good=True), "data: 1\n\n", QUEUED, DONE, an_image(0)))
    with script.client(make) as client:
        assert [type(event) for event in client.stream()] == [Queued, Done]


def test_progress_tells_of_all_work_where_the_server_does(make: Make) -> None:
    more = {"images_done": 28, "images": 40, "fraction": 0.75}
    script = Script(streamed(QUEUED, a_step(3), a_step(0, **more), a_step(0, fraction=1), an_image(0), DONE))
    with script.client(make) as client:
        progress = [event for event in client.stream() if isinstance(event, Progress)]
    assert progress == [
        Progress(3, 9, 1.0, None, None, fraction=1 / 3),
        Progress(0, 9, 1.0, 28, 40, fraction=0.75),
        Progress(0, 9, 1.0, None, None, fraction=1.0),
    ]


@pytest.mark.parametrize("wrong", [{"fraction": "all"}, {"images": 1.5}, {"images_done": None}], ids=str)
def test_progress_of_another_shape_is_told(make: Make, wrong: Json) -> None:
    with (
        Script(streamed(QUEUED, a_step(1, **wrong))).client(make) as client,
        pytest.raises(Unreachable, match=r"^http://fake is no Stepwise server: "),
    ):
        list(client.stream(seed=7))


def test_a_stream_has_patience_anew_as_any_of_its_work_is_done(make: Make) -> None:
    shares = [share / 10 for share in range(1, 10)]
    script = Script(
        *[streamed(QUEUED, a_step(0, fraction=share), breaks=True) for share in shares],
        streamed(QUEUED, an_image(0), DONE),
    )
    script.clock.late_s = 5
    with script.client(make, patience_s=8) as client:
        assert len(images_of(list(client.stream(seed=7)))) == 1


def test_a_stream_has_patience_anew_when_it_comes_further(make: Make) -> None:
    script = Script(
        *[streamed(QUEUED, *map(a_step, range(1, step + 1)), breaks=True) for step in range(1, 9)],
        *[streamed(QUEUED, an_image(0), an_image(i), breaks=True) for i in range(1, 9)],
        streamed(QUEUED, *map(an_image, range(9)), DONE),
    )
    script.clock.late_s = 5
    with script.client(make, patience_s=8) as client:
        assert len(images_of(list(client.stream(seed=7, num_images=9)))) == 9
    assert len(script.clock.waits) == 16


def test_a_stream_that_never_comes_further_is_given_up(make: Make) -> None:
    script = Script(*[streamed(QUEUED, a_step(1), breaks=True) for _ in range(50)])
    with (
        script.client(make, patience_s=60) as client,
        pytest.raises(Unreachable, match=r"^the connection to http://fake was lost: the cable is cut$"),
    ):
        list(client.stream(seed=7))
    assert sum(script.clock.waits) <= 60
    script = Script(streamed(QUEUED))
    with (
        script.client(make, patience_s=0) as client,
        pytest.raises(Unreachable, match=r"^the connection to http://fake was lost: the stream ended before "),
    ):
        list(client.stream())


class Faulty(httpx.BaseTransport):
    """The transport to a real server. Each response but the last is cut after a number of bytes."""

    def __init__(self, *cuts: int) -> None:
        self._cuts = list(cuts)
        self._way = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._way.handle_request(request)
        if self._cuts:
            body = response.read()[: self._cuts.pop(0)]
            return httpx.Response(200, headers=response.headers, stream=Pieces(body, breaks=True))
        return response

    def close(self) -> None:
        self._way.close()


def test_a_stream_of_the_real_server_goes_on_with_the_same_bytes(server: ServerProcess) -> None:
    wanted: dict[str, Any] = {"num_images": 5, "class_label": "cat", "preview_every": 2}
    with Client(server.url, transport=Faulty(2500, 100, 4000), _clock=FakeClock()) as client:
        events = list(client.stream(**wanted))
        seed = events[-1].parameters["seed"] if isinstance(events[-1], Done) else None
        expected = client.sample(num_images=5, class_label="cat", seed=seed)
    assert sum(isinstance(event, Queued) for event in events) == 4
    assert images_of(events) == {image.seed: image.png for image in expected.images}


@pytest.fixture(scope="module")
def recorded(server: ServerProcess) -> bytes:
    """The stream of a real request."""
    body = {"seed": 7, "num_images": 4, "preview_every": 1}
    answer = server.client.post("/sample", json=body, headers={"accept": "text/event-stream"})
    assert answer.status_code == 200
    return answer.content


@given(st.data())
def test_wherever_streams_break_each_image_comes_once(recorded: bytes, data: st.DataObject) -> None:
    ends = recorded.index(b"event: done")
    cuts = data.draw(st.lists(st.integers(0, ends), max_size=4))
    script = Script(*(streamed(recorded[:cut], breaks=True) for cut in cuts), streamed(recorded))
    with script.client(Client) as client:
        events = list(client.stream(seed=7))
    assert script.is_over
    assert images_of(events) == images_of(events_of(recorded))
    assert isinstance(events[-1], Done)
    assert sum(isinstance(event, Done) for event in events) == 1


# Leaving


def test_leaving_early_cancels_the_work(make: Make) -> None:
    with serving_fake() as local, make(local.url) as client:
        local.runner.hold()
        events = client.stream(num_inference_steps=9)
        assert isinstance(next(events), Queued)
        local.runner.next_pass()
        events.close()
        local.wait_for_metric("stepwise_cancelled_total", lambda count: count == 1, reason="disconnect")
        local.runner.let_go()
        assert local.engine.wait_idle(PATIENCE)
        assert client.sample().images  # on a new connection


def test_an_iteration_that_is_broken_off_cancels_the_work() -> None:
    with serving_fake() as local, Client(local.url) as client:
        local.runner.hold()
        for event in client.stream(num_inference_steps=9):
            assert isinstance(event, Queued)
            break
        local.wait_for_metric("stepwise_cancelled_total", lambda count: count == 1, reason="disconnect")


def test_a_task_that_is_cancelled_cancels_the_work() -> None:
    async def cancel(local: FakeServer) -> None:
        async with AsyncClient(local.url) as client:
            sampling = asyncio.ensure_future(client.sample(num_inference_steps=9))
            await asyncio.to_thread(local.wait_for_metric, "stepwise_accepted_total", lambda count: count == 1)
            sampling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sampling
            await asyncio.to_thread(
                local.wait_for_metric, "stepwise_cancelled_total", lambda count: count == 1, reason="disconnect"
            )

    with serving_fake() as local:
        local.runner.hold()
        asyncio.run(cancel(local))


def test_many_calls_of_one_client_at_once(server: ServerProcess) -> None:
    async def draw() -> list[bytes]:
        async with AsyncClient(server.url) as client:
            drawn = await asyncio.gather(*(client.sample(seed=seed) for seed in range(120)))
        return [answer.images[0].png for answer in drawn]

    pngs = asyncio.run(draw())
    assert [read_recipe(png)["seed"] for png in pngs] == list(range(120))
    with Client(server.url) as client:
        assert client.sample(seed=100).images[0].png == pngs[100]


# Parts of streams and PNGs


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    ends = sorted({min(cut, len(stream)) for cut in cuts} | {len(stream)})
    return [stream[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def events_of(*pieces: bytes) -> list[Event]:
    with Script(streamed(*pieces)).client(Client) as client:
        return list(client.stream())


@given(st.sampled_from([b"\n", b"\r\n", b"\r"]), st.lists(st.integers(0, 10_000)))
def test_any_pieces_of_a_stream_give_the_same_events(recorded: bytes, end: bytes, cuts: list[int]) -> None:
    stream = recorded.replace(b"\n", end)
    assert events_of(*pieces_of(stream, cuts)) == events_of(recorded)


def test_a_stream_that_comes_byte_by_byte_gives_the_same_events(recorded: bytes) -> None:
    assert events_of(*(bytes([byte]) for byte in recorded)) == events_of(recorded)


@given(
    st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    st.dictionaries(
        st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()), max_size=5
    ),
    st.integers(0, 300),
)
def test_the_recipe_of_any_png(shape: tuple[int, int, int], recipe: Json, end: int) -> None:
    png = encode_png(np.zeros(shape, np.float32), recipe)
    assert read_recipe(png) == read_parameters(png) == recipe
    if end < len(png):
        with contextlib.suppress(ValueError):
            assert read_recipe(png[:end]) == recipe


def test_a_png_without_a_recipe() -> None:
    picture = PIL.Image.new("L", (2, 2))
    info = PngInfo()
    info.add_text("parameters", "steps: 20")
    for text in (None, info):
        picture.save(file := io.BytesIO(), "PNG", pnginfo=text)
        with pytest.raises(ValueError, match=r"^this PNG has no recipe: "):
            read_recipe(file.getvalue())
    for data in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + b"\xff" * 20):
        with pytest.raises(ValueError, match=r"^this "):
            read_recipe(data)


def test_errors_can_be_sent_to_other_processes() -> None:
    error = stepwise.errors.from_problem(429, {"detail": "full"}, "abc", 2.0)
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is TooManyRequests
    assert (copied.problem, copied.request_id, copied.retry_after) == (error.problem, "abc", 2.0)
