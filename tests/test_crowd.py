"""A hundred calls at once through all three APIs: the same bytes as alone, every promise kept, nobody refused."""

import base64
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.local import FakeServer, serving_fake
from tests.pipelines import write_pipeline
from tests.servers import Json, Reachable, ServerProcess, serving, side_by_side
from tests.texts import serving_text

pytestmark = pytest.mark.slow

CALLS = 100
AT_ONCE = 100

Prompts = tuple[str, ...]
DIGITS: Prompts = tuple(map(str, range(10)))
WORDS: Prompts = ("a fox in the snow", "a (fox:1.2) in the rain", "", "snow " * 100)

Images = list[bytes]
Call = Callable[[Reachable], Images]


def events(server: Reachable, path: str, body: Json, accept: str) -> Iterator[Json]:
    """The data of each event."""
    with server.client.stream("POST", path, json=body, headers={"Accept": accept}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                said = json.loads(line.removeprefix("data: "))
                assert "error" not in said, said
                yield said


def posted(server: Reachable, path: str, body: Json) -> Json:
    answer = server.client.post(path, json=body, headers={"Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    said: Json = answer.json()
    return said


def decoded(images: list[str]) -> Images:
    return [base64.b64decode(image, validate=True) for image in images]


def a_sample(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Call:
    told = {"prompt": prompt} if is_text else {"class_label": prompt}
    body = {**told, "seed": seed, "num_inference_steps": steps, "num_images": number}
    return lambda server: decoded([image["b64_json"] for image in posted(server, "/sample", body)["images"]])


def a_streamed_sample(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Call:
    told = {"prompt": prompt} if is_text else {"class_label": prompt}
    body = {**told, "seed": seed, "num_inference_steps": steps, "num_images": number, "preview_every": 2}

    def call(server: Reachable) -> Images:
        told = events(server, "/sample", body, "text/event-stream")
        images = {one["index"]: one["b64_json"] for one in told if "seed" in one and "b64_json" in one}
        return decoded([images[index] for index in range(number)])

    return call


def a_generation(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Call:
    body = {"model": "gpt-image-1", "prompt": prompt, "seed": seed, "steps": steps, "n": number, "size": "1024x1024"}
    return lambda server: decoded([one["b64_json"] for one in posted(server, "/v1/images/generations", body)["data"]])


def a_streamed_generation(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Call:
    body = {"prompt": prompt, "seed": seed, "steps": steps, "n": number, "stream": True, "partial_images": 2}

    def call(server: Reachable) -> Images:
        told = events(server, "/v1/images/generations", body, "application/json")
        images = {one["seed"]: one["b64_json"] for one in told if one["type"] == "image_generation.completed"}
        return decoded([images[seed + i] for i in range(number)])

    return call


def a_txt2img(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Call:
    body = {"prompt": prompt, "seed": seed, "steps": steps, "batch_size": 1, "n_iter": number, "cfg_scale": 3.5}
    body["sampler_name"] = ("Euler a", "DPM++ 2M", "DDIM")[seed % 3]
    return lambda server: decoded(posted(server, "/sdapi/v1/txt2img", body)["images"])


KINDS = (a_sample, a_streamed_sample, a_generation, a_streamed_generation, a_txt2img)


def a_crowd(prompts: Prompts, is_text: bool) -> list[Call]:
    rng = random.Random(0)
    return [
        KINDS[i % len(KINDS)](rng.choice(prompts), 10 * i, rng.randint(2, 9), rng.choice((1, 1, 2, 3)), is_text)
        for i in range(CALLS)
    ]


def together(server: Reachable, crowd: list[Call]) -> list[Images]:
    """What the calls draw at once, in random order."""
    places = list(range(len(crowd)))
    random.Random(1).shuffle(places)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        drawn = dict(zip(places, pool.map(lambda i: crowd[i](server), places), strict=True))
    return [drawn[i] for i in range(len(crowd))]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """Servers of the digits and of a tiny Stable Diffusion."""
    text: Path = write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")
    with side_by_side(serving(WEIGHTS="digits"), serving(WEIGHTS=text, SIZES="64x64,96x64")) as servers:
        yield dict(zip(("digits", "text"), servers, strict=True))


@pytest.mark.parametrize("weights", ["digits", "text"])
def test_a_hundred_mixed_calls_draw_the_bytes_that_each_draws_alone(
    weights: str, both: dict[str, ServerProcess]
) -> None:
    server, is_text = both[weights], weights == "text"
    crowd = a_crowd(WORDS if is_text else DIGITS, is_text)
    alone = [call(server) for call in crowd]
    assert len({image for images in alone for image in images}) == sum(map(len, alone))
    accepted, rows, passes = (
        server.metric(f"stepwise_{name}") for name in ("accepted_total", "batch_rows_sum", "batch_rows_count")
    )
    assert together(server, crowd) == alone
    server.wait_until_idle()
    assert server.metric("stepwise_accepted_total") == accepted + CALLS
    more_rows = server.metric("stepwise_batch_rows_sum") - rows
    assert more_rows / (server.metric("stepwise_batch_rows_count") - passes) > 1.5  # they did run together


@pytest.mark.parametrize("is_text", [False, True], ids=["classes", "text"])
def test_a_hundred_mixed_calls_keep_every_promise(is_text: bool) -> None:
    """On the clock of a fake runner, so a slow machine breaks none."""
    prompts = WORDS if is_text else ("zero", "one", "two")
    with serving_text() if is_text else serving_fake() as server:
        assert isinstance(server, FakeServer)
        drawn = together(server, a_crowd(prompts, is_text))
        assert all(drawn)
        server.wait_until_idle()
        outcomes = {name: server.metric("stepwise_promises_total", outcome=name) for name in ("kept", "missed")}
    assert outcomes == {"kept": CALLS, "missed": 0}
