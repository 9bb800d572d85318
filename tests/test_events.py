"""text/event-stream: its contents. Slow readers and readers that leave cost others nothing."""

import asyncio
import base64
import functools
import itertools
import json
import re
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from typing import Any, NamedTuple

import numpy as np
import pytest
from starlette.types import Message

from model.rows import Image
from service.engine.requests import Accepted, Finished, Progress
from service.errors import ComputationFailed
from service.http import app
from service.http.events import EventStream, Mailbox
from service.http.png import encode_png, to_uint8
from service.http.sample_events import SampleEvents
from service.plan.fields import SampleRequest
from service.plan.plan import plan_sample
from service.plan.served import Served
from tests.latents import LatentServer, decoded, rough, serving_latents
from tests.local import SERVED, FakeServer, no_complaints, serving_fake
from tests.servers import (
    PATIENCE,
    Json,
    Reachable,
    ServerProcess,
    invalid,
    problem,
    read_parameters,
    read_png,
    write_npy,
)
from tests.test_denoise import GREY

EVENTS = {"Accept": "text/event-stream"}
JSON = {"Accept": "application/json"}
KEYS = {
    "queued": {"position", "eta_s", "promise_s", "warnings"},
    "progress": {"step", "steps", "eta_s", "images_done", "images", "fraction"},
    "preview": {"index", "step", "b64_json"},
    "image": {"index", "seed", "b64_json"},
    "done": {"parameters", "timings"},
}


MANY = 400  # images; more than all buffers of a connection hold


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    """A server without a health check, so the engine runs no probe between a test's passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_EVERY", PATIENCE)
        with serving_fake(max_queue=4, max_images=MANY, timeout=10_000) as server:
            yield server


@pytest.fixture
def local(fake: FakeServer) -> Iterator[FakeServer]:
    """A server in this process, whose passes a test can hold. At the end it must be idle."""
    yield fake
    fake.runner.let_go()
    fake.runner.breaking, fake.runner.poisoned = set(), set()
    assert fake.engine.wait_idle(PATIENCE)


class Event(NamedTuple):
    name: str
    data: Json


def parsed(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream, as they arrive, without comments."""
    fields: list[tuple[str, str]] = []
    for line in lines:
        if line:
            name, colon, value = line.partition(":")
            assert colon
            fields += [(name, value.removeprefix(" "))] if name else []
        elif fields:
            assert [name for name, _ in fields] == ["event", "data"]
            yield Event(fields[0][1], json.loads(fields[1][1]))
            fields = []
    assert not fields  # the last event is complete


@contextmanager
def watching(server: Reachable, body: Json, path: str = "/sample") -> Iterator[Iterator[Event]]:
    """The events of a request on its own connection, which closes at the end."""
    with server.new_client() as client, client.stream("POST", path, json=body, headers=EVENTS) as response:
        assert response.status_code == 200, response.read()
        yield parsed(response.iter_lines())


def watched(server: Reachable, body: Json, path: str = "/sample") -> list[Event]:
    """All events of a request."""
    with watching(server, body, path) as events:
        return list(events)


def told(events: list[Event], steps: int) -> dict[str, list[Json]]:
    """The data of a request's events by event name. Checks everything that holds for each finished request."""
    assert [events[0].name, events[-1].name] == ["queued", "done"]
    data: dict[str, list[Json]] = {name: [] for name in KEYS}
    for event in events:
        assert event.data.keys() == KEYS[event.name]
        data[event.name].append(event.data)
    assert len(data["queued"]) == len(data["done"]) == 1
    [queued] = data["queued"]
    assert queued["position"] >= 0
    assert 0 < queued["eta_s"] <= queued["promise_s"]

    taken = [progress["step"] for progress in data["progress"]]
    assert taken == sorted(taken)
    assert taken[-1] == steps
    assert all(progress["steps"] == steps and progress["eta_s"] >= 0 for progress in data["progress"])
    fractions = [progress["fraction"] for progress in data["progress"]]
    assert fractions == sorted(fractions)
    done = [progress["images_done"] for progress in data["progress"]]
    assert done == sorted(done)
    assert {progress["images"] for progress in data["progress"]} == {len(data["image"])}
    last_told = data["progress"][-1]
    assert (last_told["eta_s"], last_told["images_done"], last_told["fraction"]) == (0, len(data["image"]), 1)

    indices = [image["index"] for image in data["image"]]
    assert sorted(indices) == list(range(len(indices)))
    last = dict.fromkeys(indices, 0)
    for event in events:
        if event.name == "image":
            last[event.data["index"]] = steps + 1  # no preview follows the image
        if event.name == "preview":
            assert last[event.data["index"]] < event.data["step"] <= steps
            last[event.data["index"]] = event.data["step"]
    assert all(seconds >= 0 for seconds in data["done"][0]["timings"].values())
    return data


def images(data: Mapping[str, list[Json]]) -> dict[int, bytes]:
    """The PNGs of a stream, by seed."""
    return {image["seed"]: base64.b64decode(image["b64_json"], validate=True) for image in data["image"]}


def answered(server: Reachable, body: Json, path: str = "/sample") -> Json:
    """The JSON answer to the same request."""
    answer = server.client.post(path, json=body, headers=JSON)
    assert answer.status_code == 200, answer.text
    document: Json = answer.json()
    return document


def images_of(document: Json) -> dict[int, bytes]:
    return {image["seed"]: base64.b64decode(image["b64_json"]) for image in document["images"]}


# Contents of a stream


def test_a_request_is_told_of_from_the_queue_to_its_end(server: ServerProcess) -> None:
    body = {"seed": 7, "num_images": 3, "num_inference_steps": 6, "class_label": "dog", "preview_every": 2}
    data = told(watched(server, body), steps=6)
    plain = answered(server, body)
    assert images(data) == images_of(plain)
    assert [data["image"][i]["seed"] - data["image"][i]["index"] for i in range(3)] == [7] * 3
    [done] = data["done"]
    assert done["parameters"] == plain["parameters"]
    assert done["timings"].keys() == plain["timings"].keys()
    assert all(preview["step"] in (2, 4, 6) for preview in data["preview"])
    for preview in data["preview"]:
        assert read_png(base64.b64decode(preview["b64_json"])).shape == (16, 16)


@pytest.mark.parametrize("preview_every", [0, 1, 3])
def test_previews_come_as_often_as_asked(local: FakeServer, preview_every: int) -> None:
    local.runner.hold()
    with watching(local, {"num_images": 2, "num_inference_steps": 7, "preview_every": preview_every}) as events:
        come = [next(events)]
        local.runner.next_pass()
        for step in range(1, 8):  # pass by pass, so that the reader misses none
            (local.runner.next_pass if step < 7 else local.runner.let_go)()
            previews = 2 if preview_every and step % preview_every == 0 else 0
            come += itertools.islice(events, 1 + previews)
        data = told([*come, *events], steps=7)
    steps = [progress["step"] for progress in data["progress"]]
    assert steps[:7] == [1, 2, 3, 4, 5, 6, 7]
    assert set(steps[7:]) <= {7}  # as images are encoded
    assert [(preview["index"], preview["step"]) for preview in data["preview"]] == [
        (index, step) for step in range(1, 8) if preview_every and step % preview_every == 0 for index in (0, 1)
    ]


def test_progress_is_that_of_the_slowest_image(local: FakeServer) -> None:
    """Six rows, of which four fit into a pass."""
    local.runner.hold()
    with watching(local, {"num_images": 6, "num_inference_steps": 2}) as events:
        come = [next(events)]

        def wait_for(name: str) -> None:
            come.append(next(events))
            while come[-1].name != name:
                come.append(next(events))

        local.runner.next_pass()
        for _ in range(2):
            local.runner.next_pass()
            wait_for("progress")
        wait_for("image")  # each image comes as soon as it is done; the third pass is held
        for end in (local.runner.next_pass, local.runner.let_go):
            end()
            wait_for("progress")
        data = told([*come, *events], steps=2)
    steps = [progress["step"] for progress in data["progress"]]
    assert list(dict.fromkeys(steps)) == [0, 1, 2]
    assert steps.count(0) >= 2


def test_the_place_in_line_and_the_times_are_told(local: FakeServer) -> None:
    local.runner.hold()
    with watching(local, {"num_inference_steps": 10}) as first, watching(local, {"num_inference_steps": 20}) as second:
        assert next(first).data["position"] == 0
        queued = next(second).data
        assert queued["position"] == 1
        assert queued["eta_s"] >= 20
        local.runner.let_go()
        told([Event("queued", queued), *second], steps=20)


def test_a_browsers_event_source_is_answered(server: ServerProcess) -> None:
    """An EventSource can only send GET."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-cache", "Sec-Fetch-Mode": "cors"}
    answer = server.client.get("/sample?seed=7&num_images=2&class_label=1&class_label=2", headers=headers)
    assert answer.status_code == 200
    data = told(list(parsed(answer.text.splitlines())), steps=4)
    assert images(data) == images_of(answered(server, {"seed": 7, "num_images": 2, "class_label": [1, 2]}))
    assert answer.headers["cache-control"] == "no-store, no-transform"
    assert "etag" not in answer.headers


@pytest.mark.parametrize("steps", [1, 4])
def test_denoise_is_told_of(server: ServerProcess, steps: int) -> None:
    body = {"image": base64.b64encode(write_npy(GREY)).decode(), "timestep": 400, "num_inference_steps": steps}
    body |= {"seed": 3, "class_label": "cat"}
    data = told(watched(server, body, "/denoise"), steps)
    plain = answered(server, body, "/denoise")
    assert images(data) == images_of(plain)
    assert data["done"][0]["parameters"] == plain["parameters"]
    assert data["preview"] == []


def test_an_uploaded_image_is_told_of(rgb_server: ServerProcess) -> None:
    image = write_npy(np.zeros((3, 8, 16), np.float32))
    answer = rgb_server.client.post("/denoise", files={"image": image}, data={"timestep": "9"}, headers=EVENTS)
    [png] = images(told(list(parsed(answer.text.splitlines())), steps=1)).values()
    assert read_png(png).shape == (8, 16, 3)
    assert read_parameters(png)["timestep"] == 9


def test_the_headers_keep_it_from_being_held_back_or_kept(strict_server: ServerProcess) -> None:
    asked = {**EVENTS, "Origin": "https://a.example", "X-Request-ID": "a-stream"}
    with strict_server.client.stream("POST", "/sample", json={"seed": 7}, headers=asked) as response:
        headers = response.headers
        events = list(parsed(response.iter_lines()))
    told(events, steps=4)
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store, no-transform"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-seed"] == "7"
    assert headers["x-request-id"] == "a-stream"
    assert headers["access-control-allow-origin"] == "https://a.example"
    assert {"accept", "origin"} <= {name.strip().lower() for name in headers["vary"].split(",")}
    assert "content-length" not in headers
    line = strict_server.wait_for_line(lambda line: line.get("request_id") == "a-stream")
    assert (line["path"], line["status"]) == ("/under/sample", 200)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("text/event-stream", "text/event-stream"),
        ("text/*", "text/event-stream"),
        ("text/event-stream, */*;q=0.1", "text/event-stream"),
        ("text/event-stream, application/json", "application/json"),  # the earlier offer
        ("text/event-stream;q=0.9, image/png", "image/png"),
        ("*/*", "image/png"),
    ],
)
def test_events_are_for_who_asks_for_them(server: ServerProcess, accept: str, media_type: str) -> None:
    answer = server.client.get("/sample?seed=1", headers={"Accept": accept})
    assert answer.headers["content-type"].split(";")[0] == media_type
    head = server.client.head("/sample?seed=1", headers={"Accept": accept})
    assert head.headers["content-type"] == answer.headers["content-type"]


def test_many_streams_at_once_say_what_each_says_alone(server: ServerProcess) -> None:
    bodies: list[Json] = [
        {"seed": i, "num_images": 1 + i % 3, "num_inference_steps": 1 + i % 5, "class_label": i % 3, "preview_every": 1}
        for i in range(24)
    ]
    alone = [images_of(answered(server, body)) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        crowd = list(pool.map(lambda body: watched(server, body), bodies))
    for body, events, expected in zip(bodies, crowd, alone, strict=True):
        assert images(told(events, body["num_inference_steps"])) == expected


# Latent diffusion


@pytest.fixture(scope="module")
def latents() -> Iterator[LatentServer]:
    with serving_latents() as server:
        yield server


def shown(image: Json) -> list[Any]:
    """The pixels of a preview or image."""
    pixels: list[Any] = read_png(base64.b64decode(image["b64_json"], validate=True)).tolist()
    return pixels


def of_latents(make: Callable[[Image], Image], seed: int, steps: int) -> list[Any]:
    """The pixels made from FakeRunner's latents."""
    pixels: list[Any] = to_uint8(make(np.array([[[seed, steps]]], np.float32))).tolist()
    return pixels


def test_previews_are_rough_and_images_are_decoded(latents: LatentServer) -> None:
    latents.runner.hold()
    with watching(latents, {"seed": 5, "num_images": 2, "num_inference_steps": 4, "preview_every": 2}) as events:
        come = [next(events)]
        latents.runner.next_pass()
        for step in range(1, 5):  # pass by pass, so that the reader misses none
            (latents.runner.next_pass if step < 4 else latents.runner.let_go)()
            come += itertools.islice(events, 1 if step % 2 else 3)
        come += events
    previews = [event.data for event in come if event.name == "preview"]
    assert [(preview["index"], preview["step"]) for preview in previews] == [(0, 2), (1, 2), (0, 4), (1, 4)]
    for preview in previews:
        assert preview.keys() == {"index", "step", "decoder", "b64_json"}
        assert preview["decoder"] == "linear"
        assert shown(preview) == of_latents(rough, 5 + preview["index"], -preview["step"])  # FakeRunner's estimate
    for image in (event.data for event in come if event.name == "image"):
        assert shown(image) == of_latents(decoded, image["seed"], 4)
    assert come[-1].name == "done"
    timings = come[-1].data["timings"]
    assert timings.keys() == {"queue_s", "denoise_s", "decode_s", "encode_s"}
    assert timings["decode_s"] > 0


def test_denoise_tells_of_a_decoded_image(latents: LatentServer) -> None:
    body = {"image": base64.b64encode(write_npy(np.zeros((1, 1, 2), np.float32))).decode(), "timestep": 9, "seed": 3}
    events = watched(latents, body, "/denoise")
    [image] = [event.data for event in events if event.name == "image"]
    assert shown(image) == of_latents(decoded, 3, 1)


# Refusals before acceptance are ordinary errors


def test_what_is_refused_is_an_ordinary_error(server: ServerProcess, strict_server: ServerProcess) -> None:
    post = server.client.post
    invalid(post("/sample", json={"seed": -1}, headers=EVENTS), "seed")
    invalid(post("/sample", json={"preview_every": 5}, headers=EVENTS), "preview_every")
    assert "idle server" in invalid(post("/sample", json={"timeout_s": 1e-6}, headers=EVENTS), "timeout_s")
    invalid(server.client.get("/sample?steps=1", headers=EVENTS), "steps")
    form: Any = {"files": {"image": write_npy(GREY)}, "headers": EVENTS}
    invalid(post("/denoise", data={"timestep": "1000"}, **form), "timestep")
    for output in ("model_output", "previous"):
        problem(post("/denoise", data={"timestep": "5", "output": output}, **form), 406)
    problem(post("/noise", data={"timestep": "5"}, **form), 406)
    problem(post("/sample", content=b"{}", headers={**EVENTS, "Content-Type": "text/plain"}), 415)
    problem(strict_server.client.get("/sample", headers={**EVENTS, "Authorization": "Bearer gamma"}), 401)
    problem(strict_server.client.post("/sample", content=bytes(20_001), headers=EVENTS), 413)


def test_what_cannot_be_taken_now_is_an_ordinary_error(local: FakeServer) -> None:
    """The queue has four places."""
    local.runner.hold()
    urgent = {"num_inference_steps": 20, "timeout_s": 26}  # it takes 20 s
    with ExitStack() as stack:
        taken = [stack.enter_context(watching(local, urgent))]
        late = local.client.post("/sample", json=urgent, headers=EVENTS)
        taken += [stack.enter_context(watching(local, {})) for _ in range(3)]
        full = local.client.post("/sample", json={}, headers=EVENTS)
        other = stack.enter_context(local.new_client(source="127.0.0.2"))
        assert stack.enter_context(other.stream("POST", "/sample", json={}, headers=EVENTS)).status_code == 200
        share = local.client.post("/sample", json={}, headers=EVENTS)
    for refused, status in ((late, 503), (full, 503), (share, 429)):
        problem(refused, status)
        assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
    assert "within 26 s now" in late.json()["detail"]


# A failure midway is the last event


def failed(events: list[Event], status: int) -> str:
    """The detail of the error that ends a stream."""
    assert events[0].name == "queued"
    assert {event.name for event in events[1:-1]} <= {"progress", "preview", "image"}
    name, document = events[-1]
    assert name == "error"
    assert document.keys() == {"type", "title", "status", "detail"}
    assert document["status"] == status
    assert document["title"]
    detail: str = document["detail"]
    return detail


def test_values_that_are_not_finite_are_an_error_event(strict_server: ServerProcess) -> None:
    body = {"seed": 1, "num_images": 2, "class_label": ["cat", "dog"]}
    events = watched(strict_server, body)
    plain = strict_server.client.post("/sample", json=body)
    assert failed(events, 500) == problem(plain, 500)["detail"]
    assert "not finite" in plain.json()["detail"]
    assert events[-1].data == plain.json()


def test_an_estimate_that_is_not_finite_is_no_preview(local: FakeServer) -> None:
    local.runner.poisoned = {8}
    events = watched(local, {"seed": 7, "num_images": 2, "preview_every": 1})
    assert "not finite" in failed(events, 500)
    assert {event.data["index"] for event in events if event.name == "preview"} == {0}


def test_a_pass_that_raises_is_an_error_event(local: FakeServer) -> None:
    local.runner.breaking = {7}
    with watching(local, {"seed": 1, "num_inference_steps": 9}) as others:
        assert "forward pass" in failed(watched(local, {"seed": 7}), 500)
        told(list(others), steps=9)


def test_a_deadline_that_passes_midway_is_an_error_event(local: FakeServer) -> None:
    missed = local.metric("stepwise_promises_total", outcome="missed")
    local.runner.hold()
    with watching(local, {"timeout_s": 6}) as events:
        come = [next(events)]
        local.runner.next_pass()
        local.runner.next_pass()
        come.append(next(events))
        local.runner.clock.now += 10
        local.runner.let_go()
        come += events
    assert failed(come, 504) == "not done within 6 s"
    assert come[1].data["step"] == 1
    assert local.metric("stepwise_promises_total", outcome="missed") == missed + 1


def test_a_server_that_leaves_says_so() -> None:
    with serving_fake() as local:
        local.runner.hold()
        with watching(local, {}) as events:
            come = [next(events)]
            local.runner.next_pass()
            closing = threading.Thread(target=local.engine.close)
            closing.start()
            local.runner.let_go()
            come += events
            closing.join(PATIENCE)
        assert "shutting down" in failed(come, 503)


# Slow readers, and readers that leave


def slow_reader(server: FakeServer, body: Json) -> socket.socket:
    """A connection that has sent a request, with small receive buffers."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect(server.address)
    content = json.dumps(body).encode()
    head = "POST /sample HTTP/1.1\r\nHost: test\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_slow_reader_holds_up_nobody_and_loses_no_image(local: FakeServer) -> None:
    drawn = local.metric("stepwise_images_total")
    with slow_reader(local, {"seed": 5, "num_images": MANY, "num_inference_steps": 2, "preview_every": 1}) as reader:
        local.wait_for_metric("stepwise_images_total", lambda images: images >= drawn + MANY)
        assert local.client.post("/sample", json={}).status_code == 200
        told(watched(local, {}), steps=4)
        with HTTPResponse(reader) as answer:
            answer.begin()
            data = told(list(parsed(answer.read().decode().splitlines())), steps=2)
    assert images(data).keys() == set(range(5, 5 + MANY))
    assert len(data["progress"]) < MANY / 4  # newer progress replaces older progress


def test_a_slow_reader_gets_all_events_of_a_server_that_shuts_down() -> None:
    body = {"seed": 5, "num_images": MANY, "num_inference_steps": 1}
    with serving_fake(max_images=MANY, timeout=10_000, drain_timeout=PATIENCE) as server, at_sigterm(server.signal):
        with slow_reader(server, body) as reader:
            server.wait_for_metric("stepwise_images_total", lambda images: images == MANY)
            signal.raise_signal(signal.SIGTERM)
            server.wait_until_deaf()  # the engine has stopped, and only this answer keeps the server alive
            with HTTPResponse(reader) as answer:
                answer.begin()
                data = told(list(parsed(answer.read().decode().splitlines())), steps=1)
        server.wait()
    assert images(data).keys() == set(range(5, 5 + MANY))


@contextmanager
def at_sigterm(handler: Callable[[signal.Signals], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda number, _: handler(signal.Signals(number)))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_reader_that_leaves_while_it_holds_back_the_server_costs_nothing_more(local: FakeServer) -> None:
    left = local.metric("stepwise_cancelled_total", reason="disconnect")
    local.runner.hold()
    with slow_reader(local, {"num_images": MANY, "num_inference_steps": 1}):
        for _ in range(MANY // 5):
            local.runner.next_pass()
    assert local.engine.wait_idle(PATIENCE)
    assert local.metric("stepwise_cancelled_total", reason="disconnect") == left + 1


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system cannot tell")
def test_a_reader_that_never_reads_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.__main__.CLIENT_PATIENCE_S", 0.5)
    with serving_fake(max_images=MANY) as server:
        server.runner.hold()
        with slow_reader(server, {"num_images": MANY, "num_inference_steps": 1}):
            for _ in range(MANY // 5):
                server.runner.next_pass()
            server.wait_for_metric("stepwise_cancelled_total", lambda count: count == 1, reason="disconnect")
            assert server.engine.wait_idle(PATIENCE)


def test_a_reader_that_leaves_midway_costs_nothing_more(server: ServerProcess) -> None:
    left = server.metric("stepwise_cancelled_total", reason="disconnect")
    drawn = server.metric("stepwise_images_total")
    long = {"sampler": "ddpm", "num_inference_steps": 1000, "num_images": 16, "preview_every": 1}
    with watching(server, long) as events:
        while next(events).name != "preview":
            pass
    server.wait_for_metric("stepwise_cancelled_total", lambda count: count >= left + 1, reason="disconnect")
    samples = server.metrics()
    for name in ("stepwise_rows_running", "stepwise_rows_waiting", "stepwise_outstanding_row_steps"):
        assert samples[name, frozenset()] == 0
    assert samples["stepwise_images_total", frozenset()] == drawn


def test_a_reader_that_leaves_while_it_waits_costs_nothing_at_all(local: FakeServer) -> None:
    left = local.metric("stepwise_cancelled_total", reason="disconnect")
    local.runner.hold()
    with watching(local, {"seed": 1, "num_images": 4, "num_inference_steps": 2}) as first:
        come = [next(first)]
        local.runner.next_pass()
        with watching(local, {"seed": 10_000, "num_images": 4, "num_inference_steps": 4}) as second:
            assert next(second).data["position"] == 1
        local.wait_for_metric("stepwise_rows_waiting", lambda rows: rows == 0)
        assert local.metric("stepwise_outstanding_row_steps") == 4
        local.runner.let_go()
        told([*come, *first], steps=2)
    assert local.metric("stepwise_cancelled_total", reason="disconnect") == left + 1
    assert 10_000 not in local.runner.admitted


# The mailbox, and a stream on a connection that the test controls


class Connection:
    """An ASGI connection. Records the sent messages, and blocks on request."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.may_send = asyncio.Event()
        self.may_send.set()
        self.left = asyncio.Event()
        self.is_broken = False

    async def send(self, message: Message) -> None:
        await self.may_send.wait()
        if self.is_broken:
            raise OSError("broken pipe")
        self.sent.append(message)

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def sends(self, text: str) -> None:
        """Wait until this text was sent."""
        while text not in self.text:
            await asyncio.sleep(0)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def events(self) -> list[Event]:
        return list(parsed(self.text.splitlines()))

    @property
    def is_complete(self) -> bool:
        return [message.get("more_body", False) for message in self.sent[1:]] == [True] * (len(self.sent) - 2) + [False]


def a_step(step: int, steps: int, eta_s: float) -> Progress:
    """Progress of three images, which are done with their last step."""
    return Progress(step, steps, eta_s, 3 * (step == steps), 3, step / steps)


class Streaming(NamedTuple):
    """A stream of three images that the test drives, and the engine's references to it."""

    connection: Connection
    mailbox: Mailbox
    future: Future[Finished]
    response: asyncio.Task[None]

    @classmethod
    def begin(cls, heartbeat_s: float = PATIENCE, served: Served = SERVED) -> "Streaming":
        plan = plan_sample(SampleRequest(seed=7, num_images=3, preview_every=1), SERVED, timeout=300)
        mailbox = Mailbox(plan.preview_every, asyncio.get_running_loop())
        future: Future[Finished] = Future()
        stream = EventStream(Accepted(future, 2, 3.0, 4.0), mailbox, SampleEvents(plan, served), {}, heartbeat_s)
        connection = Connection()
        task = asyncio.ensure_future(stream({"type": "http", "method": "POST"}, connection.receive, connection.send))
        return cls(connection, mailbox, future, task)

    def draw(self, *indices: int) -> None:
        for index in indices:
            self.mailbox.image(index, PNG)


IMAGE = np.zeros((1, 1, 2), np.float32)
PNG = encode_png(IMAGE, {})
FINISHED = Finished([IMAGE] * 3, queue_s=0.25, denoise_s=1.5)


def on_a_loop(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Run a test on its own event loop. No task and no unseen error may be left."""

    async def run() -> None:
        await test()
        for _ in range(3):  # cancelled tasks end
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    @functools.wraps(test)
    def run_on_a_loop() -> None:
        with no_complaints():
            asyncio.run(run())

    return run_on_a_loop


@on_a_loop
async def test_news_that_nobody_took_give_way_to_newer_but_images_stay() -> None:
    mailbox = Mailbox(1, asyncio.get_running_loop())
    for step in (1, 2, 3):
        mailbox.progress(a_step(step, 4, 4.0 - step))
        mailbox.preview(0, step, IMAGE)
    mailbox.preview(1, 3, IMAGE)
    for index in range(1000):
        mailbox.image(index, PNG)
    await mailbox.wait()
    progress, previews, drawn = mailbox.take()
    assert progress == a_step(3, 4, 1.0)
    assert [(index, step) for index, (step, _) in previews.items()] == [(0, 3), (1, 3)]
    assert list(drawn) == list(range(1000))
    assert mailbox.take() == (None, {}, {})


def test_a_mailbox_whose_loop_is_over_holds_up_nobody() -> None:
    """An error here would end the engine."""

    async def make() -> Mailbox:
        return Mailbox(1, asyncio.get_running_loop())

    mailbox = asyncio.run(make())
    mailbox.progress(a_step(1, 2, 3.0))
    mailbox.preview(0, 1, IMAGE)
    mailbox.image(0, PNG)


@on_a_loop
async def test_what_happens_while_the_reader_holds_back_the_server_is_told_in_few_words() -> None:
    s = Streaming.begin()
    await s.connection.sends("queued")
    s.connection.may_send.clear()
    for step in range(1, 100):
        s.mailbox.progress(a_step(step, 100, 100.0 - step))
        s.mailbox.preview(0, step, IMAGE)
        await asyncio.sleep(0)
    s.draw(0, 1)
    s.mailbox.progress(a_step(100, 100, 0.0))
    s.draw(2)
    s.future.set_result(FINISHED)
    s.connection.may_send.set()
    await s.response
    data = told(s.connection.events, steps=100)
    assert len(data["progress"]) == 2  # the event that could not be sent, and the newest
    assert [preview["step"] for preview in data["preview"][1:]] == [99]
    assert [image["seed"] for image in data["image"]] == [7, 8, 9]
    assert data["queued"] == [{"position": 2, "eta_s": 3.0, "promise_s": 4.0, "warnings": []}]
    assert s.connection.is_complete


@on_a_loop
async def test_a_job_that_fails_before_anything_else_happens_is_told_of_at_once() -> None:
    s = Streaming.begin()
    await s.connection.sends("queued")
    s.future.set_exception(ComputationFailed("a pass failed"))
    await s.response
    assert failed(s.connection.events, 500) == "a pass failed"
    assert s.connection.is_complete


@on_a_loop
async def test_a_quiet_connection_is_kept_by_comments() -> None:
    s = Streaming.begin(heartbeat_s=0.001)
    await s.connection.sends(": heartbeat\n\n: heartbeat\n\n")
    s.mailbox.progress(a_step(1, 1, 0.0))
    await s.connection.sends("progress")
    before = len(s.connection.text)
    while ": heartbeat\n\n" not in s.connection.text[before:]:
        await asyncio.sleep(0)
    s.draw(0, 1, 2)
    s.future.set_result(FINISHED)
    await s.response
    told(s.connection.events, steps=1)
    assert s.connection.is_complete


class Leaving:
    """A fake of uvicorn's server with a SIGTERM handler, which sse-starlette looks for."""

    should_exit = True

    def handle_exit(self, number: int, _: object) -> None: ...


@on_a_loop
async def test_a_server_that_shuts_down_ends_no_stream() -> None:
    before = signal.signal(signal.SIGTERM, Leaving().handle_exit)
    try:
        s = Streaming.begin()
        await s.connection.sends("queued")
        for _ in range(10):  # sse-starlette looks at the server when a stream begins
            await asyncio.sleep(0)
        s.mailbox.progress(a_step(1, 1, 0.0))
        s.draw(0, 1, 2)
        s.future.set_result(FINISHED)
        await s.response
    finally:
        signal.signal(signal.SIGTERM, before)
    told(s.connection.events, steps=1)
    assert s.connection.is_complete


@on_a_loop
async def test_a_reader_that_leaves_cancels_the_job() -> None:
    s = Streaming.begin()
    await s.connection.sends("queued")
    s.connection.left.set()
    await s.response
    assert s.future.cancelled()


@on_a_loop
async def test_a_reader_that_leaves_while_it_holds_back_the_server_cancels_the_job() -> None:
    s = Streaming.begin()
    await s.connection.sends("queued")
    s.connection.may_send.clear()
    s.mailbox.progress(a_step(1, 2, 1.0))
    for _ in range(10):
        await asyncio.sleep(0)
    s.connection.left.set()
    await s.response
    assert s.future.cancelled()
    s.draw(0)  # the engine has not yet noticed


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_a_job_that_ends_as_its_reader_leaves_is_forgotten(ending: str) -> None:
    @on_a_loop
    async def run() -> None:
        for moments in range(8):  # between the two
            for reader_first in (True, False):
                s = Streaming.begin()
                await s.connection.sends("queued")
                s.connection.may_send.clear()
                s.draw(0)
                if reader_first:
                    s.connection.left.set()
                for _ in range(moments):
                    await asyncio.sleep(0)
                if not s.future.cancelled():
                    if ending == "done":
                        s.future.set_result(FINISHED)
                    else:
                        s.future.set_exception(ComputationFailed("a pass failed"))
                for _ in range(moments):
                    await asyncio.sleep(0)
                s.connection.left.set()
                await s.response

    run()


@on_a_loop
async def test_a_stream_that_the_server_gives_up_cancels_the_job() -> None:
    for moments in range(1, 9):
        s = Streaming.begin()
        if moments % 2:
            s.connection.may_send.clear()
        for _ in range(moments):
            await asyncio.sleep(0)
        s.response.cancel()
        with pytest.raises(asyncio.CancelledError):
            await s.response
        assert s.future.cancelled()


@on_a_loop
async def test_a_connection_that_raises_cancels_the_job() -> None:
    s = Streaming.begin()
    await s.connection.sends("queued")
    s.connection.is_broken = True
    s.mailbox.progress(a_step(1, 2, 1.0))
    with pytest.raises(OSError, match="broken"):
        await s.response
    assert s.future.cancelled()
