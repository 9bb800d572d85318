"""A hundred calls at once through all three APIs: the same bytes as alone, every promise kept, nobody refused."""

import base64
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.engines import FakeRunner
from tests.local import serving_fake
from tests.servers import PATIENCE, START, Json, Reachable, ServerProcess
from tests.test_pictures import RGB, file
from tests.texts import serving_text

pytestmark = pytest.mark.slow

CALLS = 100
AT_ONCE = 100

Prompts = tuple[str, ...]
DIGITS: Prompts = tuple(map(str, range(10)))
WORDS: Prompts = ("a fox in the snow", "a (fox:1.2) in the rain", "", "snow " * 100)

PHOTO = file(RGB.resize((64, 64)))
HALF = Image.new("L", (64, 64))
HALF.paste(255, (32, 0, 64, 64))
WHITE = file(HALF)  # the right half is white
CUT = RGB.resize((64, 64))
CUT.putalpha(ImageOps.invert(HALF))
CLEAR = file(CUT)  # the right half is transparent

Images = list[bytes]
Draw = Callable[[Reachable], Images]
Kind = Callable[[str, int, int, int, bool], Draw]


class Call(NamedTuple):
    """A call for the images of `seeds`."""

    seeds: range
    draw: Draw


def events(server: Reachable, path: str, body: Json, accept: str) -> Iterator[Json]:
    """The data of each event."""
    with server.client.stream("POST", path, json=body, headers={"Accept": accept}, timeout=START) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                said = json.loads(line.removeprefix("data: "))
                assert "error" not in said, said
                yield said


def posted(server: Reachable, path: str, body: Json) -> Json:
    answer = server.client.post(path, json=body, headers={"Accept": "application/json"}, timeout=START)
    assert answer.status_code == 200, answer.text
    said: Json = answer.json()
    return said


def decoded(images: list[str]) -> Images:
    return [base64.b64decode(image, validate=True) for image in images]


def a_sample(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    told = {"prompt": prompt} if is_text else {"class_label": prompt}
    body = {**told, "seed": seed, "num_inference_steps": steps, "num_images": number}
    return lambda server: decoded([image["b64_json"] for image in posted(server, "/sample", body)["images"]])


def a_streamed_sample(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    told = {"prompt": prompt} if is_text else {"class_label": prompt}
    body = {**told, "seed": seed, "num_inference_steps": steps, "num_images": number, "preview_every": 2}

    def call(server: Reachable) -> Images:
        told = events(server, "/sample", body, "text/event-stream")
        images = {one["index"]: one["b64_json"] for one in told if "seed" in one and "b64_json" in one}
        return decoded([images[index] for index in range(number)])

    return call


def a_generation(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    body = {"model": "gpt-image-1", "prompt": prompt, "seed": seed, "steps": steps, "n": number, "size": "1024x1024"}
    return lambda server: decoded([one["b64_json"] for one in posted(server, "/v1/images/generations", body)["data"]])


def a_streamed_generation(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    body = {"prompt": prompt, "seed": seed, "steps": steps, "n": number, "stream": True, "partial_images": 2}

    def call(server: Reachable) -> Images:
        told = events(server, "/v1/images/generations", body, "application/json")
        images = {one["seed"]: one["b64_json"] for one in told if one["type"] == "image_generation.completed"}
        return decoded([images[seed + i] for i in range(number)])

    return call


def a_txt2img(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    body = {"prompt": prompt, "seed": seed, "steps": steps, "batch_size": 1, "n_iter": number, "cfg_scale": 3.5}
    body["sampler_name"] = ("Euler a", "DPM++ 2M", "DDIM")[seed % 3]
    return lambda server: decoded(posted(server, "/sdapi/v1/txt2img", body)["images"])


def an_edit(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    fields = {"prompt": prompt, "seed": seed, "steps": steps, "n": number, "strength": (1, 0.7)[seed % 20 // 10]}

    def call(server: Reachable) -> Images:
        files = {"image[]": PHOTO, **({"mask": CLEAR} if seed % 3 else {})}
        answer = server.client.post(
            "/v1/images/edits", files=files, data={k: str(v) for k, v in fields.items()}, timeout=START
        )
        assert answer.status_code == 200, answer.text
        return decoded([one["b64_json"] for one in answer.json()["data"]])

    return call


def a_streamed_edit(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    sent = base64.b64encode(PHOTO).decode()
    body = {"prompt": prompt, "seed": seed, "steps": steps, "n": number, "stream": True, "image": sent}

    def call(server: Reachable) -> Images:
        told = events(server, "/v1/images/edits", body, "application/json")
        images = {one["seed"]: one["b64_json"] for one in told if one["type"] == "image_edit.completed"}
        return decoded([images[seed + i] for i in range(number)])

    return call


def an_img2img(prompt: str, seed: int, steps: int, number: int, is_text: bool) -> Draw:
    sent = base64.b64encode(PHOTO).decode()
    body: Json = {"prompt": prompt, "seed": seed, "steps": steps, "batch_size": number, "init_images": [sent]}
    body["mask"] = base64.b64encode(WHITE).decode() if seed % 3 else None
    return lambda server: decoded(posted(server, "/sdapi/v1/img2img", body)["images"])


KINDS: tuple[Kind, ...] = (
    a_sample,
    a_streamed_sample,
    a_generation,
    a_streamed_generation,
    a_txt2img,
    an_edit,
    a_streamed_edit,
    an_img2img,
)


def a_crowd(prompts: Prompts, is_text: bool) -> list[Call]:
    rng = random.Random(0)
    crowd = []
    for i in range(CALLS):
        seeds = range(10 * i, 10 * i + rng.choice((1, 1, 2, 3)))
        draw = KINDS[i % len(KINDS)](rng.choice(prompts), seeds[0], rng.randint(2, 9), len(seeds), is_text)
        crowd.append(Call(seeds, draw))
    return crowd


def together(server: Reachable, crowd: list[Call]) -> list[Images]:
    """What the calls draw at once, in random order."""
    places = list(range(len(crowd)))
    random.Random(1).shuffle(places)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        drawn = dict(zip(places, pool.map(lambda i: crowd[i].draw(server), places), strict=True))
    return [drawn[i] for i in range(len(crowd))]


def measured(server: ServerProcess, draw: Callable[[], list[Images]]) -> tuple[list[Images], float]:
    """What is drawn, and how many forward rows its passes have on the average."""

    def rows_and_passes() -> list[float]:
        return [server.metric(f"stepwise_batch_rows_{name}") for name in ("sum", "count")]

    server.wait_until_idle()
    before = rows_and_passes()
    drawn = draw()
    server.wait_until_idle()
    rows, passes = np.subtract(rows_and_passes(), before)
    return drawn, rows / passes


@pytest.mark.parametrize("weights", ["digits", "text"])
def test_a_hundred_mixed_calls_draw_the_bytes_that_each_draws_alone(
    weights: str, digits_and_text: dict[str, ServerProcess]
) -> None:
    server, is_text = digits_and_text[weights], weights == "text"
    crowd = a_crowd(WORDS if is_text else DIGITS, is_text)
    alone, alone_in_a_pass = measured(server, lambda: [call.draw(server) for call in crowd])
    assert len({image for images in alone for image in images}) == sum(map(len, alone))
    accepted = server.metric("stepwise_accepted_total")
    drawn, together_in_a_pass = measured(server, lambda: together(server, crowd))
    assert drawn == alone
    assert server.metric("stepwise_accepted_total") == accepted + CALLS
    assert together_in_a_pass > alone_in_a_pass  # they did run together


@pytest.mark.parametrize("is_text", [False, True], ids=["classes", "text"])
def test_a_hundred_mixed_calls_keep_every_promise(is_text: bool) -> None:
    """On the clock of a fake runner, so a slow machine breaks none.

    A pass takes a quarter of a second of this clock and no time of the machine. So each pass waits for the answers
    whose images are ready: else the clock would run ahead of answers.
    """
    crowd = a_crowd(WORDS if is_text else ("zero", "one", "two"), is_text)
    answered = [threading.Event() for _ in crowd]

    def noticed(call: Call, event: threading.Event) -> Call:
        def draw(server: Reachable) -> Images:
            try:
                return call.draw(server)
            finally:
                event.set()

        return call._replace(draw=draw)

    runner = FakeRunner(dict.fromkeys((1, 2, 4, 8), 0.25))
    with serving_text(runner=runner) if is_text else serving_fake(runner) as server:

        def before(call: str) -> None:
            if call == "pass":
                ready = {*runner.admitted} - {state.row.seed for state in runner.rows.values()}
                for one, event in zip(crowd, answered, strict=True):
                    if ready.issuperset(one.seeds):
                        assert event.wait(PATIENCE)

        runner.during = before
        assert all(together(server, list(map(noticed, crowd, answered))))
        server.wait_until_idle()
        outcomes = {name: server.metric("stepwise_promises_total", outcome=name) for name in ("kept", "missed")}
    assert outcomes == {"kept": CALLS, "missed": 0}
