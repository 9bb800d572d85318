"""OpenAI's Images API: fields, answers, streams, and errors of every layer.

The official clients, and what each program sends, are tests/test_clients.py's.
"""

import base64
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from model.rows import Group
from service.errors import (
    Draining,
    Invalid,
    NotBuilt,
    QueueFull,
    Refused,
    ServiceError,
    TooLate,
    TooManyImages,
    TooSlow,
)
from service.http.events import Event, News
from service.http.formats import encode_lossy
from service.http.models import RequestModel
from service.http.openai import fields as openai_fields
from service.http.openai.errors import told
from service.http.openai.events import ImageEvents
from service.http.openai.fields import Asked, read
from service.http.openai.links import link
from service.http.problems import answer
from service.plan.fields import SampleRequest
from service.plan.plan import plan_sample
from service.plan.served import Served
from tests import local, texts
from tests.local import FakeServer, serving_fake, serving_here
from tests.pipelines import write_pipeline
from tests.properties import examples
from tests.servers import Json, Reachable, ServerProcess, read_parameters
from tests.test_responses import SERVED
from tests.test_text_clients import CHECK
from tests.texts import serving_text

CHECKS = "checks_of_openai"
GENERATIONS = "/v1/images/generations"
TIMES = r"queue;dur=[\d.]+, denoise;dur=[\d.]+, encode;dur=[\d.]+"
# Classes zero, one and two; and sizes in several aspects.
CLASSES = replace(SERVED, groups=(Group(4, 4), Group(4, 8), Group(8, 4)))
WORDLESS = replace(SERVED, model=replace(SERVED.model, num_classes=None, no_label=None, class_names=()))


def asked(served: Served = CLASSES, /, **values: object) -> Asked:
    return read(values, RequestModel(SampleRequest, served, 8, 300.0), served)


def refused(served: Served = CLASSES, /, **values: object) -> Json:
    """The only error."""
    with pytest.raises(Invalid) as error:
        asked(served, **values)
    [one] = error.value.errors
    return {"param": one["loc"][0], "msg": one["msg"]}


def post(server: Reachable, **values: object) -> httpx.Response:
    return server.client.post(GENERATIONS, json=values)


def drawn(server: Reachable, **values: object) -> Json:
    answered = post(server, **values)
    assert answered.status_code == 200, answered.text
    document: Json = answered.json()
    return document


def images(document: Json) -> list[bytes]:
    return [base64.b64decode(one["b64_json"], validate=True) for one in document["data"]]


def error(response: httpx.Response, status: int) -> Json:
    """The error of an answer, after checks that hold for all of them."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert response.headers["cache-control"] == "no-store"
    document: Json = response.json()
    assert document.keys() == {"error"}
    found: Json = document["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert found["message"]
    return found


def events(response: httpx.Response) -> list[Json]:
    """The data of a stream's events. All streams but those that fail end with [DONE]."""
    found: list[Json] = []
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    for name, data in blocks[:-1]:
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    if len(blocks[-1]) == 1:
        assert blocks[-1] == ["data: [DONE]"]
    else:
        assert blocks[-1][0] == "event: error"
        found.append(json.loads(blocks[-1][1].removeprefix("data: ")))
    return found


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    """A server without a model, behind a proxy that serves it under /under. Its name is one of the hub."""
    served = replace(local.SERVED, model=replace(local.MODEL, name="owner/a name"))
    with serving_fake(served=served, root_path="/under/", forwarded_allow_ips="127.0.0.1") as server:
        yield server


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """A server of a text model like SDXL, with an operator's check. A token is a letter."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / f"{CHECKS}.py").write_text(CHECK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        with serving_text(like=texts.like_xl, tokenize=texts.tokenize_twice, check=f"{CHECKS}:check") as server:
            yield server


# Fields


@pytest.mark.parametrize("name", ["num_inference_steps", "steps", "step"])
def test_steps_have_several_names(name: str) -> None:
    assert asked(**{name: 7}).fields.num_inference_steps == 7
    assert refused(**{name: 5000}) == {"param": name, "msg": "must be 1 to 1000, and is 5000"}
    assert refused(**{name: "7"})["param"] == name


def test_names_of_one_field_must_agree() -> None:
    both = asked(seed=5, rng_seed=5, guidance_scale=2, cfg_scale=2.0, n=2, num_images=2)
    assert (both.fields.seed, both.fields.guidance_scale, both.fields.num_images) == (5, 2, 2)
    assert refused(steps=7, num_inference_steps=8) == {
        "param": "num_inference_steps",
        "msg": "must be the same as steps, which is 7, and is 8",
    }
    assert refused(n=1, num_images=2)["param"] == "num_images"


def test_null_is_the_same_as_no_value() -> None:
    names = [*openai_fields.OWN, *openai_fields.ALIASES, *openai_fields.FORMATS, "stream", "size", "user", "model"]
    assert asked(**dict.fromkeys(names)) == asked()


def test_our_other_fields_pass_through_and_are_checked() -> None:
    fields = asked(
        texts.XL,
        prompt="a fox",
        negative_prompt="an ox",
        clip_skip=1,
        guidance_rescale=0.5,
        guidance_interval=[0, 0.5],
        original_size=[64, 64],
        sampler="euler",
        timeout_s=9,
    ).fields
    assert (fields.clip_skip, fields.guidance_rescale, fields.sampler, fields.timeout_s) == (1, 0.5, "euler", 9)
    assert (fields.guidance_interval, fields.original_size) == ([0, 0.5], [64, 64])
    assert refused(n=9) == {"param": "n", "msg": "must be 1 to 8, and is 9"}


def test_what_only_decorates_is_listed_in_the_order_in_which_it_came() -> None:
    cosmetic = {"quality": "hd", "style": "vivid", "user": "u", "background": "auto", "moderation": "low", "x": [{}]}
    assert asked(**cosmetic, prompt="one", n=1).ignored == tuple(cosmetic)
    assert asked(model="gpt-image-2", preview_every=1).ignored == ("model", "preview_every")
    assert asked(model=SERVED.model.name).ignored == ()
    assert asked(output_compression=5, partial_images=1).ignored == ("output_compression", "partial_images")
    assert asked(output_compression=5, output_format="webp", partial_images=1, stream=True).ignored == ()
    assert asked(response_format="url", stream=True).ignored == ("response_format",)


@examples(50)
@given(st.lists(st.text("a, é\r\n☃-", max_size=70), max_size=20))
def test_the_header_of_ignored_fields_is_short_and_plain(names: list[str]) -> None:
    header = openai_fields.ignored_header(names)
    assert len(header) == bool(names)
    for listed in header.values():
        assert re.fullmatch(r"[!-~]([ -~]{0,520}[!-~])?", listed)  # what a header can hold
        assert listed.endswith("...") or listed.count(", ") == len(names) - 1


def test_an_ignored_field_is_listed_by_its_name() -> None:
    header = openai_fields.ignored_header(["style", "a, b", "", "é"])
    assert header == {"X-Ignored-Fields": "style, a??b, ?, ?"}


@pytest.mark.parametrize(
    ("sent", "size", "warned"),
    [
        ({}, None, False),
        ({"size": "auto"}, None, False),
        ({"size": ""}, None, False),
        ({"size": "8x4"}, (4, 8), False),
        ({"size": "1792x1024"}, (4, 8), True),
        ({"size": "1024x1024"}, (4, 4), True),
        ({"width": 4, "height": 8}, (8, 4), False),
        ({"width": 512, "height": 1024}, (8, 4), True),
        ({"size": "8x4", "width": 8, "height": 4}, (4, 8), False),
        ({"size": "8x4", "width": 8}, (4, 8), False),
    ],
)
def test_a_size_is_the_nearest_that_is_served(sent: Json, size: tuple[int, int] | None, warned: bool) -> None:
    found = asked(**sent)
    assert (found.fields.height, found.fields.width) == (size or (None, None))
    assert bool(found.warnings) is warned
    if warned:
        assert found.warnings[0].endswith(f"{Group(*size or ())} is drawn, the served size nearest in aspect")


@pytest.mark.parametrize(
    ("sent", "param", "msg"),
    [
        ({"size": "large"}, "size", 'must be WIDTHxHEIGHT, such as 512x512, or auto, and is "large"'),
        ({"size": "0x5"}, "size", 'must be WIDTHxHEIGHT, such as 512x512, or auto, and is "0x5"'),
        ({"size": 512}, "size", "must be WIDTHxHEIGHT, such as 512x512, or auto, and is 512"),
        ({"size": "8x4", "height": 8}, "size", "must agree with height 8, and is 8x4"),
        ({"height": 0, "width": 4}, "height", "must be from 1 to 99999, and is 0"),
        ({"height": 4, "width": 10**300}, "width", None),
        ({"output_format": "gif"}, "output_format", 'must be png, webp, jpeg or jpg, and is "gif"'),
        ({"response_format": "file"}, "response_format", 'must be b64_json or url, and is "file"'),
        ({"output_compression": 101}, "output_compression", "must be an integer from 0 to 100, and is 101"),
        ({"partial_images": 4, "stream": True}, "partial_images", "must be an integer from 0 to 3, and is 4"),
        ({"partial_images": True}, "partial_images", "must be an integer from 0 to 3, and is true"),
        ({"stream": "yes"}, "stream", 'must be true or false, and is "yes"'),
        ({"prompt": 5}, "prompt", "must be a string, null or a list of these, and is a number"),
        ({"prompt": "three"}, "prompt", "must name one class, and names none; the classes are zero, one, two"),
        ({"prompt": "3"}, "prompt", "must be 0 to 2, or one of zero, one, two, and is 3"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_name(sent: Json, param: str, msg: str | None) -> None:
    found = refused(**sent)
    assert found["param"] == param
    assert msg in (None, found["msg"])


def test_a_prompt_names_the_class_unless_a_label_does() -> None:
    assert asked(prompt="A photo of the ONE!").fields.class_label == 1
    assert asked(prompt="2", n=2).fields.class_label == 2
    assert asked(prompt=["zero", "two"], n=2).fields.class_label == [0, 2]
    assert asked(prompt="").fields.class_label is None
    labelled = asked(prompt="a fox", class_label="two", negative_prompt="an ox")
    assert (labelled.fields.class_label, labelled.fields.prompt) == ("two", None)
    assert labelled.ignored == ("prompt", "negative_prompt")


def test_models_without_words_ignore_them_and_say_so() -> None:
    found = asked(WORDLESS, prompt="a fox", negative_prompt="an ox")
    assert found.fields == SampleRequest()
    assert found.ignored == ("prompt", "negative_prompt")


def test_text_models_need_a_prompt() -> None:
    assert refused(texts.TEXT) == {"param": "prompt", "msg": "is required: it says what to draw"}
    assert asked(texts.TEXT, prompt="").fields.prompt == ""
    assert asked(texts.XL, prompt="", negative_prompt="").fields.negative_prompt == ""
    assert asked(texts.LCM, prompt="", negative_prompt="").fields.negative_prompt is None  # it could have no effect


# Answers, of tiny random weights


def test_an_answer_has_the_images_of_sample_and_their_seeds(server: ServerProcess) -> None:
    response = post(server, prompt="a dog", n=2, seed=7, quality="hd", size="1024x1536", model="gpt-image-2")
    document = response.json()
    assert document.keys() == {"created", "data", "output_format", "size", "usage", "warnings"}
    assert isinstance(document["created"], int)
    assert [one.keys() for one in document["data"]] == [{"b64_json", "seed"}] * 2
    assert [one["seed"] for one in document["data"]] == [7, 8]
    assert (document["output_format"], document["size"]) == ("png", "16x16")
    assert document["usage"] == {
        "input_tokens": 0,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
        "output_tokens": 0,
        "total_tokens": 0,
    }
    said = "1024x1536 is not served: 16x16 is drawn, the served size nearest in aspect"
    assert document["warnings"] == [said]
    assert response.headers["x-warnings"] == said
    assert response.headers["x-ignored-fields"] == "quality, model"
    assert response.headers["x-seed"] == "7"
    assert response.headers["cache-control"] == "no-store"
    assert re.fullmatch(TIMES, response.headers["server-timing"])
    for one, image in zip(document["data"], images(document), strict=True):
        again = server.client.post("/sample", json={"class_label": "dog", "seed": one["seed"]})
        assert again.content == image


def test_what_the_server_chose_can_be_drawn_again_by_the_seed_that_it_told(rgb_server: ServerProcess) -> None:
    document = drawn(rgb_server, prompt="anything", steps=3, sampler="euler")
    [image], [one] = images(document), document["data"]
    again = rgb_server.client.post("/sample", json={"seed": one["seed"], "num_inference_steps": 3, "sampler": "euler"})
    assert again.content == image
    assert images(drawn(rgb_server, seed=one["seed"], steps=3, sampler="euler")) == [image]


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_lossy_formats_are_those_of_sample_unless_a_quality_is_asked_for(server: ServerProcess, kind: str) -> None:
    [usual] = images(document := drawn(server, prompt="cat", seed=3, output_format=kind))
    assert document["output_format"] == kind
    fields = {"class_label": "cat", "seed": 3}
    assert usual == server.client.post("/sample", json=fields, headers={"Accept": f"image/{kind}"}).content
    [rough] = images(drawn(server, prompt="cat", seed=3, output_format=kind, output_compression=0))
    pictures = [np.asarray(PillowImage.open(io.BytesIO(data)), np.int16) for data in (usual, rough)]
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).max() > 20
    [url] = [
        one["url"] for one in drawn(server, prompt="cat", seed=3, output_format=kind, response_format="url")["data"]
    ]
    head, _, data = url.partition(",")
    assert head == f"data:image/{kind};base64"
    assert base64.b64decode(data, validate=True) == usual


@pytest.mark.parametrize("prompt", ["cat", "dog", "7", "2", ""])
def test_a_link_draws_the_same_bytes(server: ServerProcess, prompt: str) -> None:
    """The third class is called 7, and 2 is its index."""
    wanted = {"prompt": prompt, "seed": 2**53 - 3, "n": 2, "steps": 5, "sampler": "euler_a"}
    expected = images(drawn(server, **wanted))
    linked = drawn(server, **wanted, response_format="url")
    assert [one.keys() for one in linked["data"]] == [{"url", "seed"}] * 2
    for one, image in zip(linked["data"], expected, strict=True):
        assert one["url"].startswith(f"{server.url}/sample?")
        answered = httpx.get(one["url"], trust_env=False)
        assert answered.content == image
        assert answered.headers["content-type"] == "image/png"
        assert "immutable" in answered.headers["cache-control"]


def test_a_link_carries_all_that_decides_a_picture(text: FakeServer) -> None:
    wanted: Json = {
        "prompt": "añ & b?",
        "negative_prompt": "",
        "guidance_scale": 2.75,
        "guidance_rescale": 0.3,
        "guidance_interval": [0.1, 0.7],
        "crops_coords_top_left": [1, 2],
        "clip_skip": 1,
        "timesteps": [900, 500, 7],
        "sampler": "euler",
        "seed": 5,
    }
    [image] = images(drawn(text, **wanted))
    [one] = drawn(text, **wanted, response_format="url")["data"]
    assert httpx.get(one["url"], trust_env=False).content == image
    assert image == text.client.post("/sample", json=wanted).content
    [long] = drawn(text, prompt="é" * 2000, response_format="url", seed=5)["data"]
    assert long["url"].startswith("data:image/png;base64,")  # an address as long would be cut on its way


def test_a_link_is_none_where_bytes_move_or_prompts_are_secret() -> None:
    plan = plan_sample(SampleRequest(seed=1), SERVED, 300)
    address = link("http://host/", plan.recipes[0], plan.group, SERVED)
    assert address is not None
    assert urlsplit(address).path == "/sample"
    assert link("http://host/", plan.recipes[0], plan.group, replace(SERVED, reproducible=False)) is None
    secretive = replace(texts.TEXT, recipe_prompts=False)
    plan = plan_sample(SampleRequest(seed=1, prompt="secret"), secretive, 300)
    assert link("http://host/", plan.recipes[0], plan.group, secretive) is None


def test_a_link_has_the_address_that_the_client_knows(fake: FakeServer) -> None:
    headers = {"Host": "draw.example", "X-Forwarded-Proto": "https"}
    answered = fake.client.post(GENERATIONS, json={"response_format": "url"}, headers=headers)
    [one] = answered.json()["data"]
    assert one["url"].startswith("https://draw.example/under/sample?")


def test_no_link_carries_a_key(strict_server: ServerProcess) -> None:
    [one] = drawn(strict_server, prompt="cat", seed=1, response_format="url")["data"]
    image = strict_server.client.get("/sample?class_label=cat&seed=1").content
    assert one["url"] == f"data:image/png;base64,{base64.b64encode(image).decode()}"


def test_prompts_are_counted_as_the_tokenizer_counts_them(text: FakeServer) -> None:
    document = drawn(text, prompt="a fox", n=3)
    assert document["usage"]["input_tokens"] == document["usage"]["total_tokens"] == len("a fox")
    assert document["usage"]["input_tokens_details"] == {"image_tokens": 0, "text_tokens": len("a fox")}
    assert drawn(text, prompt=["ox", "fox", "ox"], n=3)["usage"]["input_tokens"] == 2 + 3
    cut = drawn(text, prompt="a fox in the snow")
    assert cut["usage"]["input_tokens"] == texts.FITS
    assert len(cut["warnings"]) == 1
    assert read_parameters(images(document)[1])["prompt"] == "a fox"


# Streams


def test_a_stream_ends_with_the_images(server: ServerProcess) -> None:
    wanted: Json = {"prompt": "dog", "seed": 7, "n": 2, "steps": 8}
    expected = images(drawn(server, **wanted))
    response = post(server, **wanted, stream=True, partial_images=3, user="u")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-ignored-fields"] == "user"
    told_events = events(response)
    partial = [one for one in told_events if one["type"] == "image_generation.partial_image"]
    completed = [one for one in told_events if one["type"] == "image_generation.completed"]
    assert len(partial) + len(completed) == len(told_events)
    assert {one["index"]: base64.b64decode(one["b64_json"]) for one in completed} == dict(enumerate(expected))
    assert {one["seed"] - one["index"] for one in (*partial, *completed)} == {7}
    shared = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format", "index", "seed"}
    assert all(one.keys() == shared | {"partial_image_index"} for one in partial)
    assert all(one.keys() == shared | {"usage"} for one in completed)


def data_of(event: Event | Callable[[], Event]) -> Json:
    data: Json = json.loads(str((event() if callable(event) else event).data))
    return data


def test_partial_images_are_spread_over_the_steps() -> None:
    plan = plan_sample(SampleRequest(seed=7, num_images=2, num_inference_steps=50), SERVED, 300)
    x0 = np.zeros((1, 4, 4), np.float32)
    for most, every, steps in ((0, 0, []), (1, 25, [25]), (2, 16, [16, 32]), (3, 12, [12, 24, 36])):
        told_of = ImageEvents("image_generation", plan, asked(output_format="webp", stream=True), SERVED, most)
        assert told_of.preview_every == every
        made: list[Json] = []
        for step in range(every, 51, every) if every else []:
            news = News(None, {0: (step, x0), 1: (step, np.full_like(x0, np.nan))}, {})
            made += [data_of(event) for event in told_of.news(news)]
        assert [one["partial_image_index"] for one in made] == list(range(len(steps)))
        assert all((one["index"], one["seed"], one["output_format"]) == (0, 7, "webp") for one in made)
        assert all(base64.b64decode(one["b64_json"]) == encode_lossy(x0, "WEBP") for one in made)
    few = plan_sample(SampleRequest(num_inference_steps=2), SERVED, 300)
    told_of = ImageEvents("image_edit", few, asked(stream=True), SERVED, 3)
    assert len(list(told_of.news(News(None, {0: (1, x0)}, {})))) == 1
    assert list(told_of.news(News(None, {0: (2, x0)}, {}))) == []  # the last step is the image itself


def test_each_completed_image_has_the_tokens_of_its_own_prompt(text: FakeServer) -> None:
    told_events = events(post(text, prompt=["ox", "fox"], n=2, stream=True))
    found = {one["index"]: one["usage"]["input_tokens"] for one in told_events}
    assert found == {0: 2, 1: 3}


def test_a_failure_in_a_stream_is_an_event(fake: FakeServer) -> None:
    fake.runner.poisoned = {5}
    [failed] = events(post(fake, prompt="one", seed=5, stream=True))
    assert failed["error"]["type"] == "server_error"
    assert "not finite" in failed["error"]["message"]
    assert error(post(fake, prompt="one", seed=5), 500)["message"] == failed["error"]["message"]


def test_a_client_that_leaves_a_stream_takes_its_work_out(fake: FakeServer) -> None:
    fake.runner.hold()
    body = {"prompt": "one", "stream": True}
    with fake.new_client() as client, client.stream("POST", GENERATIONS, json=body) as response:
        assert response.status_code == 200
    fake.wait_for_metric("stepwise_cancelled_total", lambda count: count == 1, reason="disconnect")
    fake.runner.let_go()


# Models


def test_the_model_is_listed_with_the_schema_of_its_requests(server: ServerProcess) -> None:
    listed = server.client.get("/v1/models").json()
    [model] = listed["data"]
    assert (listed["object"], model["object"], model["owned_by"]) == ("list", "model", "stepwise")
    assert isinstance(model["created"], int)
    name = server.client.get("/info").json()["model"]["name"]
    assert model["id"] == name
    assert server.client.get(f"/v1/models/{name}").json() == model
    described = server.client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]
    schema = described["requestBody"]["content"]["application/json"]["schema"]
    assert model["schema"]["properties"].keys() == schema["properties"].keys()
    for path in ("/v1/models", f"/v1/models/{name}"):
        head = server.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    unknown = error(server.client.get("/v1/models/gpt-image-2"), 404)
    assert (unknown["code"], unknown["param"]) == ("model_not_found", "model")


def test_a_name_may_have_a_slash(fake: FakeServer) -> None:
    for path in ("owner/a%20name", "owner%2Fa%20name"):
        assert fake.client.get(f"/v1/models/{path}").json()["id"] == "owner/a name"
    assert fake.metric("stepwise_requests_total", endpoint="/v1/models/{model}", code="200") == 2


# Errors


def test_errors_of_every_layer_have_openai_s_shape(server: ServerProcess, strict_server: ServerProcess) -> None:
    client = server.client
    assert error(client.get("/v1/nowhere"), 404)["code"] is None
    method = client.get(GENERATIONS)
    assert error(method, 405)["code"] == "method_not_supported"
    assert method.headers["allow"] == "POST"
    for name in ("", "/digits"):
        assert client.post(f"/v1/models{name}").headers["allow"] == "GET, HEAD"
    error(client.post(GENERATIONS, content=b"a,b", headers={"Content-Type": "text/csv"}), 415)
    error(client.post(GENERATIONS, content=b"{", headers={"Content-Encoding": "gzip"}), 415)
    broken = error(client.post(GENERATIONS, content=b"{"), 422)
    assert (broken["type"], broken["param"], broken["code"]) == ("invalid_request_error", None, None)
    wrong = post(server, prompt="cat", sampler="Euler a")
    assert error(wrong, 422)["param"] == "sampler"
    assert wrong.headers["x-should-retry"] == "false"
    assert error(post(server, prompt="cat", steps=999_999), 422) == {
        "message": "steps: must be 1 to 1000, and is 999999",
        "type": "invalid_request_error",
        "param": "steps",
        "code": "invalid_value",
    }
    assert error(post(server, prompt=["cat", "dog"], n=3), 422)["param"] == "prompt"
    with httpx.Client(base_url=strict_server.url, trust_env=False) as stranger:
        locked = stranger.post(GENERATIONS, json={})
        assert error(locked, 401)["code"] == "invalid_api_key"
        assert locked.headers.get_list("www-authenticate")[0] == "Bearer"
        assert locked.headers["x-should-retry"] == "false"
        answered = stranger.get("/v1/models", headers={"Authorization": "Bearer alpha", "Origin": "https://a.example"})
        exposed = answered.headers["access-control-expose-headers"].lower().split(", ")
        assert {"x-ignored-fields", "x-should-retry", "x-warnings"} <= set(exposed)
    error(strict_server.client.post(GENERATIONS, content=bytes(20_001)), 413)


@pytest.mark.parametrize(
    ("failure", "status", "kind", "code", "retry"),
    [
        (Refused("no"), 400, "image_generation_user_error", "moderation_blocked", "false"),
        (TooSlow("no"), 408, "invalid_request_error", None, None),
        (QueueFull("no", 7), 503, "server_error", None, None),
        (QueueFull("no", 5000), 503, "server_error", None, None),
        (Draining("no", 1), 503, "server_error", None, None),
        (TooLate("no", 5, even_alone=False), 503, "server_error", None, None),
        (TooLate("no", 5, even_alone=True), 503, "server_error", None, "false"),
        (TooManyImages.field("image", "no"), 400, "invalid_request_error", "invalid_value", "false"),
        (NotBuilt("no"), 501, "server_error", None, "false"),
        (Invalid.field("body", "no"), 422, "invalid_request_error", None, "false"),
    ],
    ids=str,
)
def test_clients_ask_again_where_it_can_help(
    failure: ServiceError, status: int, kind: str, code: str | None, retry: str | None
) -> None:
    response = answer(failure, GENERATIONS)
    assert response.status_code == status
    found = json.loads(bytes(response.body))["error"]
    assert (found["type"], found["code"]) == (kind, code)
    assert response.headers.get("x-should-retry") == retry
    wait = response.headers.get("retry-after")
    assert (wait is not None) is (status == 503)
    assert int(wait or 0) <= 120
    assert "x-should-retry" not in answer(failure, "/sample").headers


def test_work_that_takes_too_long_is_refused_by_its_limit(fake: FakeServer) -> None:
    for streamed in (False, True):
        refusal = post(fake, prompt="one", timeout_s=0.5, stream=streamed)
        assert error(refusal, 422)["param"] == "timeout_s"


def test_who_holds_its_share_hears_of_a_limit() -> None:
    found = told(429, "no")
    assert (found.document["error"]["code"], found.headers) == ("rate_limit_exceeded", {})


def test_what_the_operator_refuses_is_moderated(text: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert error(post(text, prompt="refused"), 400) == {
        "message": "the prompt is refused: not on this server",
        "type": "image_generation_user_error",
        "param": None,
        "code": "moderation_blocked",
    }
    error(post(text, prompt="refused", stream=True), 400)
    monkeypatch.setattr(sys.modules[CHECKS], "answer", "too red")
    assert error(post(text, prompt="a fox", response_format="url"), 400)["code"] == "moderation_blocked"
    [failed] = events(post(text, prompt="a fox", stream=True, partial_images=3))
    assert failed["error"]["code"] == "moderation_blocked"


@pytest.mark.slow
def test_models_whose_images_are_no_pictures_are_told_apart() -> None:
    served = replace(local.SERVED, model=replace(local.MODEL, image_shape=(2, 1, 2)))
    with serving_fake(served=served) as server:
        assert "npy" in error(post(server, prompt="one"), 501)["message"]


# A tiny Stable Diffusion


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_a_stable_diffusion_answers_streams_and_links(tmp_path: Path) -> None:
    write_pipeline(tmp_path / "sd", kind="sd1")
    with serving_here(weights=str(tmp_path / "sd"), max_batch=4) as server:
        wanted: Any = {"prompt": "the fox", "n": 2, "seed": 3, "steps": 6, "size": "1024x1024"}
        document = drawn(server, **wanted)
        assert document["size"] == "64x64"
        assert 2 <= document["usage"]["input_tokens"] <= 75
        expected = images(document)
        fields = {"prompt": "the fox", "num_inference_steps": 6}
        for seed, image in enumerate(expected, start=3):
            assert server.client.post("/sample", json={**fields, "seed": seed}).content == image
        for one, image in zip(drawn(server, **wanted, response_format="url")["data"], expected, strict=True):
            assert httpx.get(one["url"], trust_env=False, timeout=60).content == image
        told_events = events(post(server, **wanted, stream=True, partial_images=2))
        completed = [one for one in told_events if one["type"] == "image_generation.completed"]
        assert {one["seed"]: base64.b64decode(one["b64_json"]) for one in completed} == dict(enumerate(expected, 3))
