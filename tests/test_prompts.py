"""Prompts over HTTP: how they are sent, what their answers say, and who never hears of them."""

import base64
import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import numpy as np
import pytest

from model.rows import Prompt, Tokens
from service.http import drawing
from service.http.logs import JsonLines
from service.http.parsing import MAX_PLAIN_JSON
from service.plan.shared_fields import MAX_PROMPT
from tests.local import MODEL, FakeServer, serving_fake
from tests.servers import Json, invalid, problem, read_parameters, write_npy
from tests.texts import FITS, LENGTH, like_xl, serving_text, tokenize, tokenize_twice

JSON, ZIP, EVENTS = "application/json", "application/zip", "text/event-stream"
IMAGE = write_npy(np.zeros(MODEL.image_shape, np.float32))
CUT = "the prompt has 8 tokens, and 6 fit: the last 2 were cut"
LONG = "é" * (MAX_PROMPT // 2)  # the longest prompt


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving_text(max_images=64) as serving:
        yield serving


def sample(server: FakeServer, body: Json, accept: str = JSON) -> httpx.Response:
    answer = server.client.post("/sample", json=body, headers={"Accept": accept})
    assert answer.status_code == 200, answer.text
    return answer


# How prompts are sent.


def test_json_and_queries_are_one_request(server: FakeServer) -> None:
    body: Json = {"seed": 1, "num_images": 2, "prompt": ["a, b", ""], "negative_prompt": "", "clip_skip": 1}
    query = "seed=1&num_images=2&prompt=a,+b&prompt=&negative_prompt=&clip_skip=1"
    assert server.client.get(f"/sample?{query}").content == sample(server, body, "image/png").content
    for prompt in ("a, b", ["a, b"]):
        parameters = sample(server, {"seed": 1, "prompt": prompt}).json()["parameters"]
        assert parameters["prompt"] == prompt
        assert "negative_prompt" not in parameters
    assert sample(server, {"prompt": "", "negative_prompt": None}).json()["parameters"]["prompt"] == ""


def test_an_image_of_a_list_has_the_bytes_of_its_own_request(server: FakeServer) -> None:
    body: Json = {"prompt": ["ab", "ü\u0000\n\U0001f98a"], "negative_prompt": [None, "c"], "guidance_rescale": 0.5}
    answer = sample(server, {**body, "seed": 3, "num_images": 2}).json()
    for image, i in zip(answer["images"], (0, 1), strict=True):
        png = base64.b64decode(image["b64_json"])
        recipe = read_parameters(png)
        assert recipe["prompt"] == body["prompt"][i]
        del recipe["model"], recipe["fingerprint"]
        assert sample(server, recipe, "image/png").content == png


def test_a_form_has_prompts_too(server: FakeServer) -> None:
    fields = {"timestep": "5", "prompt": "abcdefgh", "negative_prompt": "", "guidance_scale": "2", "clip_skip": "1"}
    answer = server.client.post("/denoise", data=fields, files={"image": IMAGE}, headers={"Accept": JSON})
    assert answer.json()["warnings"] == [CUT]
    assert answer.headers["x-warnings"] == CUT
    recipe = read_parameters(base64.b64decode(answer.json()["images"][0]["b64_json"]))
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["clip_skip"]) == ("abcdefgh", "", 1)
    twice = {"timestep": "5", "prompt": ["a", "b"]}
    answer = server.client.post("/denoise", data=twice, files={"image": IMAGE})
    assert invalid(answer, "prompt") == "is given twice"


def test_two_lists_of_the_longest_prompts_are_taken(server: FakeServer) -> None:
    """Escapes of JSON take three times as many bytes as their text."""
    texts = [chr(0xE0 + i) * (MAX_PROMPT // 2) for i in range(64)]
    body = json.dumps({"num_images": 64, "num_inference_steps": 1, "prompt": texts, "negative_prompt": texts})
    assert len(body) > 6 * MAX_PLAIN_JSON
    answer = server.client.post("/sample", content=body, headers={"Content-Type": JSON, "Accept": ZIP})
    assert answer.status_code == 200


def test_json_of_models_without_text_stays_short() -> None:
    with serving_fake() as plain:
        body = json.dumps({"class_label": "x" * MAX_PLAIN_JSON})
        answer = plain.client.post("/sample", content=body, headers={"Content-Type": JSON})
        assert f"may have at most {MAX_PLAIN_JSON}" in invalid(answer, "body")


def test_a_query_of_the_longest_prompts_is_taken(server: FakeServer) -> None:
    fields = {"seed": "1", "prompt": LONG, "negative_prompt": LONG}
    answer = server.client.get("/sample", params=fields)
    assert answer.content == sample(server, {**fields, "seed": 1}, "image/png").content
    query = "&".join([f"prompt={'a' * 3 * MAX_PROMPT}"] * 3)
    with server.raw_request("GET", f"/sample?{query}", {}) as longer:
        refused = longer.makefile("rb").read()
    assert refused.startswith(b"HTTP/1.1 431 ")
    assert b"at most 65536 bytes" in refused


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (LONG + "x", f"must have at most {MAX_PROMPT} bytes in UTF-8, and has {MAX_PROMPT + 1}"),
        ("a\ud800b", "must be Unicode, and has half of a character: a lone surrogate"),
        (5, "must be a string, null or a list of these, and is a number"),
        (True, "must be a string, null or a list of these, and is a boolean"),
        ({"text": "a"}, "must be a string, null or a list of these, and is an object"),
        ([], "must not be an empty list"),
        (["a", "b", "c"], "must be one text, or 1 in a list, and is 3"),
    ],
    ids=lambda value: str(value)[:10].encode("ascii", "replace").decode(),
)
def test_what_is_no_prompt_is_refused_in_words(server: FakeServer, prompt: object, said: str) -> None:
    for name in ("prompt", "negative_prompt"):
        assert invalid(server.client.post("/sample", content=json.dumps({name: prompt})), name) == said


def test_a_member_that_is_no_prompt_is_named(server: FakeServer) -> None:
    for name, member, said in (
        ("prompt", None, "must be a string, and is null"),
        ("prompt", LONG + "x", f"must have at most {MAX_PROMPT} bytes in UTF-8, and has {MAX_PROMPT + 1}"),
        ("negative_prompt", ["a"], "must be a string or null, and is a list"),
    ):
        answer = server.client.post("/sample", json={"num_images": 2, name: ["a", member]})
        assert problem(answer, 422)["errors"] == [{"loc": [name, 1], "msg": said}]


def test_a_query_that_is_not_in_utf_8_is_refused(server: FakeServer) -> None:
    """So no letter of a prompt is replaced in silence."""
    for query in ("prompt=caf%E9", "prompt=%ED%A0%80", "prompt=a%FF"):
        assert invalid(server.client.get(f"/sample?{query}"), "query") == "must be text in UTF-8"
    assert server.client.get("/sample?prompt=caf%C3%A9").status_code == 200


# What answers say.


def events_of(answer: httpx.Response) -> list[tuple[str, Json]]:
    pairs = [block.split("\n") for block in answer.text.strip().split("\n\n") if block.startswith("event: ")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_what_was_cut_is_said_in_each_kind_of_answer(server: FakeServer) -> None:
    body = {"prompt": "x" * (FITS + 2), "seed": 1}
    answer = sample(server, body)
    assert answer.json()["warnings"] == [CUT]
    for accept in (JSON, ZIP, "image/png", "image/webp", "application/x-npy"):
        assert sample(server, body, accept).headers["x-warnings"] == CUT
    query = f"/sample?seed=1&prompt={body['prompt']}"
    assert server.client.get(query).headers["x-warnings"] == CUT
    assert server.client.head(query).headers["x-warnings"] == CUT
    stream = sample(server, body, EVENTS)
    assert stream.headers["x-warnings"] == CUT
    name, data = events_of(stream)[0]
    assert (name, data["warnings"]) == ("queued", [CUT])


def test_several_warnings_are_one_line_of_ascii(server: FakeServer) -> None:
    answer = sample(server, {"prompt": ["ä" * 7, "ö" * 8, "ü"], "negative_prompt": "ß" * 9, "num_images": 3})
    assert answer.headers["x-warnings"] == "; ".join(answer.json()["warnings"])
    assert len(answer.json()["warnings"]) == 3
    assert answer.headers["x-warnings"].isascii()


def test_without_anything_to_say_there_is_no_header(server: FakeServer) -> None:
    answer = sample(server, {"prompt": "abc"})
    assert answer.json()["warnings"] == []
    assert "x-warnings" not in answer.headers
    assert events_of(sample(server, {"prompt": "abc"}, EVENTS))[0][1]["warnings"] == []


def test_an_etag_is_of_the_prompt_and_hides_it(server: FakeServer) -> None:
    def tag(query: str) -> str:
        answer = server.client.get(f"/sample?seed=1&{query}")
        assert answer.status_code == 200
        return str(answer.headers["etag"])

    tags = [tag("prompt=cat"), tag("prompt=dog"), tag("prompt=cat&negative_prompt=dog"), tag("prompt=cat&clip_skip=1")]
    assert len(set(tags)) == 4
    assert tag("prompt=cat&num_images=1") == tags[0]
    assert tag("prompt=cat&guidance_scale=0") == tag("prompt=cat&guidance_scale=1&negative_prompt=dog")
    matching = {"If-None-Match": tags[0]}
    assert server.client.get("/sample?seed=1&prompt=cat", headers=matching).status_code == 304


def test_info_tells_of_the_encoder(server: FakeServer) -> None:
    info = server.client.get("/info").json()
    assert info["text"] == {
        "length": LENGTH,
        "layers": 4,
        "num_parameters": 9,
        "encoders": 1,
        "force_zeros_for_empty_prompt": False,
        "max_prompt_bytes": MAX_PROMPT,
        "max_prompt_tokens": FITS,
    }
    assert info["safety_checker"] == "none"
    assert info["embedded_fields"] == []
    assert info["recommended"]["guidance_scale"] == 3.0
    with serving_fake() as plain:
        assert plain.client.get("/info").json()["text"] is None
    with serving_text(tokenize_twice, like=like_xl) as xl:
        info = xl.client.get("/info").json()
        assert (info["text"]["encoders"], info["text"]["force_zeros_for_empty_prompt"]) == (2, True)
        assert info["embedded_fields"] == ["original_size", "crops_coords_top_left", "target_size"]


def test_the_document_has_what_the_model_can_use(server: FakeServer) -> None:
    def fields(server: FakeServer) -> Json:
        path: Json = server.client.get("/openapi.json").json()["paths"]["/sample"]["post"]["requestBody"]
        properties: Json = path["content"][JSON]["schema"]["properties"]
        return properties

    text: Json = {"type": "string", "maxLength": MAX_PROMPT}
    null = {"type": "null"}
    several = {"type": "array", "minItems": 1, "maxItems": 64}
    asked = fields(server)
    assert asked["prompt"]["anyOf"] == [text, {**several, "items": text}, null]
    assert asked["negative_prompt"]["anyOf"] == [text, {**several, "items": {"anyOf": [text, null]}}, null]
    assert asked["clip_skip"]["maximum"] == 3
    assert asked["guidance_scale"]["anyOf"][0]["maximum"] == 30
    assert asked["class_label"]["anyOf"] == [null, {**several, "items": {"anyOf": [null]}}]
    with serving_fake() as plain:
        asked = fields(plain)
        assert asked["prompt"]["anyOf"] == asked["negative_prompt"]["anyOf"] == [null]
        assert asked["clip_skip"]["maximum"] == 0


def test_recipes_have_hashes_where_the_operator_wants_no_prompts() -> None:
    with serving_text(recipe_prompts=False) as hiding:
        answer = sample(hiding, {"seed": 1, "prompt": "secret", "negative_prompt": "hidden"}).json()
        png = base64.b64decode(answer["images"][0]["b64_json"])
        recipe = read_parameters(png)
        assert recipe["prompt_sha256"] == hashlib.sha256(b"secret").hexdigest()
        assert recipe["negative_prompt_sha256"] == hashlib.sha256(b"hidden").hexdigest()
        assert answer["parameters"]["prompt"] == "secret"
        body = {"seed": 1, "prompt": ["secret", "secret2"], "num_images": 2}
        for kind in ("image/png", ZIP, "image/webp", "image/jpeg"):
            assert b"secret" not in sample(hiding, body, kind).content


# Who never hears of prompts.

MARK = "qzxjkvwpy"


class Everything(logging.Handler):
    """Keeps each line of each logger of the server."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JsonLines())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(("httpx", "httpcore")):  # the client of this test
            self.lines.append(self.format(record))


@contextmanager
def all_logs() -> Iterator[Everything]:
    root, handler = logging.getLogger(), Everything()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def refusals(server: FakeServer) -> Iterator[httpx.Response]:
    """Requests with a marked prompt, of each kind that the server refuses or fails."""
    post, marked = server.client.post, {"prompt": MARK}
    many = MARK * MAX_PROMPT
    for body in (
        {"prompt": many},
        {"prompt": [many], "negative_prompt": {MARK: MARK}},
        {"prompt": {MARK: [MARK]}},
        {"prompt": [MARK, 5], "num_images": 2},
        {"prompt": [MARK, MARK]},
        {"prompt": MARK + "\ud800"},
        {**marked, "seed": -1},
        {**marked, "clip_skip": 99},
        {**marked, "timeout_s": 1e-9},
        {**marked, "no_such_field": 1},
        {**marked, "seed": 13},  # its pass fails
    ):
        yield post("/sample", content=json.dumps(body), headers={"Content-Type": JSON})
    for text in (f'{{"prompt": "{MARK}"', f'{{"prompt": "{MARK}", "prompt": "{MARK}"}}', f'{{"prompt": "\t{MARK}"}}'):
        yield post("/sample", content=text, headers={"Content-Type": JSON})
    yield post("/sample", content=MARK, headers={"Content-Type": "text/plain"})
    yield server.client.get("/sample", params={"prompt": many[: 2**13 + 1]})
    yield server.client.get("/sample", params={"prompt": MARK, "seed": "x"})
    yield server.client.get("/sample", params=[("prompt", many[:16_000])] * 4, headers={"X-Long": "x" * 2000})
    yield server.client.get(f"/sample?prompt={MARK}%FF")
    yield server.client.get("/nowhere", params={"prompt": MARK})
    yield server.client.request("DELETE", "/sample", params={"prompt": MARK})
    yield post("/denoise", data={"prompt": MARK, "timestep": "x"}, files={"image": IMAGE})
    yield post("/denoise", data={"prompt": MARK, "timestep": "5"}, files={"image": b"no image"})
    yield post("/denoise", data={"prompt": many[: 2**17], "timestep": "5"}, files={"image": IMAGE})


def test_nobody_hears_of_a_prompt() -> None:
    with all_logs() as logs, serving_text() as server:
        server.runner.breaking = {13}
        answers = list(refusals(server))
        assert {answer.status_code for answer in answers} == {404, 405, 415, 422, 431, 500}
        for answer in answers:
            problem(answer, answer.status_code)
            assert MARK not in answer.text
            assert MARK not in str(answer.headers)
        for accept in (JSON, ZIP, EVENTS, "image/png"):
            answer = sample(server, {"prompt": MARK, "negative_prompt": MARK, "seed": 1}, accept)
            assert "were cut" in answer.headers["x-warnings"]
            assert MARK not in str(answer.headers)
        query = {"prompt": MARK, "seed": "1"}
        assert MARK not in str(server.client.get("/sample", params=query).headers)
        with server.raw_request("GET", f"/sample?prompt={MARK} {MARK}", {}) as broken:  # a space in a query
            assert broken.recv(12) == b"HTTP/1.1 400"
        for path in ("/metrics", "/info", "/health", "/openapi.json"):
            assert MARK not in server.client.get(path).text
    assert sum('"path": "/sample"' in line for line in logs.lines) > 10  # they were recorded
    assert [line for line in logs.lines if MARK in line] == []


# Where prompts become tokens.


def test_long_prompts_become_tokens_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes, and other requests, get the interpreter between two prompts."""
    seen: list[tuple[Prompt, int]] = []
    rests: list[int] = []

    def watched(prompt: Prompt) -> Tokens:
        seen.append((prompt, threading.get_ident()))
        return tokenize(prompt)

    monkeypatch.setattr(drawing, "rest", lambda: rests.append(len(seen)))
    with serving_text(watched) as server:
        sample(server, {"prompt": "short"})
        [*_, (_, loop)] = seen
        assert rests == []
        texts = [f"{i}{'a' * 1000}" for i in range(4)]
        fields: Json = {"prompt": texts, "num_images": 4}
        for by_query in (False, True):
            seen.clear()
            rests.clear()
            post, get = server.client.post, server.client.get
            answer = get("/sample", params=fields) if by_query else post("/sample", json=fields)
            assert answer.status_code == 200
            assert {prompt for prompt, _ in seen} == {*texts, ""}
            assert loop not in {thread for _, thread in seen}
            assert rests == list(range(5))  # before each
        seen.clear()
        server.client.post("/denoise", data={"timestep": "5", "prompt": "a"}, files={"image": IMAGE})
        assert [prompt for prompt, _ in seen] == ["a"]
        assert loop not in {thread for _, thread in seen}
