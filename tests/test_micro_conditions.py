"""Sizes and crops that SDXL is told: which numbers rows get, what recipes have, and how a request may say them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model.rows import Group
from service.errors import Invalid
from service.plan.fields import DenoiseRequest
from service.plan.plan import Plan, plan_denoise
from service.plan.served import Served
from stepwise import Client, read_recipe
from stepwise.cli import exits
from tests.local import FakeServer
from tests.programs import done, refused, stepwise
from tests.servers import Json, problem, read_parameters, write_npy
from tests.test_responses import SERVED, planned
from tests.texts import LCM, LCM_XL, TEXT, XL, like_lcm_xl, like_xl, serving_text, tokenize_twice

NAMES = ("original_size", "target_size", "crops_coords_top_left")
NEGATIVE = tuple(f"negative_{name}" for name in NAMES)
SIZES = replace(XL, groups=(Group(4, 4), Group(6, 8)))
ALL: Json = {
    "original_size": [10, 11],
    "crops_coords_top_left": [1, 2],
    "target_size": [20, 21],
    "negative_original_size": [30, 31],
    "negative_crops_coords_top_left": [3, 4],
    "negative_target_size": [40, 41],
}
OWN = (10, 11, 1, 2, 20, 21)
OTHER = (30, 31, 3, 4, 40, 41)
IMAGE = np.zeros((1, 6, 8), np.float32)


def told(served: Served = XL, **fields: Any) -> list[tuple[int, ...] | None]:
    """The time_ids of the branches of a request's only row."""
    [row] = planned(served, **fields).rows
    return [branch.time_ids for branch in row.branches]


@pytest.mark.parametrize(
    ("served", "fields", "ids"),
    [
        (XL, {}, [(4, 4, 0, 0, 4, 4)] * 2),
        (XL, {"guidance_scale": 1}, [(4, 4, 0, 0, 4, 4)]),
        (SIZES, {"width": 8}, [(6, 8, 0, 0, 6, 8)] * 2),  # height first
        (SIZES, {"width": 8, "original_size": (9, 7)}, [(9, 7, 0, 0, 6, 8)] * 2),
        (XL, ALL, [OWN, OTHER]),
        (XL, {**ALL, "guidance_scale": 0}, [OWN]),
        # each negative one defaults to the positive one
        (XL, {name: ALL[name] for name in NAMES}, [OWN, OWN]),
        (XL, {name: ALL[name] for name in (*NAMES, "negative_original_size")}, [OWN, (30, 31, 1, 2, 20, 21)]),
        (XL, {"negative_crops_coords_top_left": [3, 4]}, [(4, 4, 0, 0, 4, 4), (4, 4, 3, 4, 4, 4)]),
        (LCM_XL, {name: ALL[name] for name in NAMES}, [OWN]),
        (TEXT, {}, [None, None]),
        (LCM, {}, [None]),
    ],
    ids=lambda value: value.model.architecture if isinstance(value, Served) else str(value),
)
def test_what_a_row_is_told(served: Served, fields: dict[str, Any], ids: list[tuple[int, ...] | None]) -> None:
    assert told(served, **fields) == ids


def test_every_image_of_a_request_is_told_the_same() -> None:
    rows = planned(XL, **ALL, num_images=3, prompt=["a", "b", "c"]).rows
    assert [[branch.time_ids for branch in row.branches] for row in rows] == [[OWN, OTHER]] * 3


def denoised(served: Served, **fields: Any) -> Plan:
    return plan_denoise(DenoiseRequest(500, **{"seed": 7, **fields}), IMAGE, served, 300)


def test_denoising_is_told_the_size_of_its_image() -> None:
    """A remote U-Net asks for `model_output`."""
    for output in ("x0", "model_output"):
        [row] = denoised(SIZES, output=output).rows
        assert [branch.time_ids for branch in row.branches] == [(6, 8, 0, 0, 6, 8)]
    plan = denoised(SIZES, guidance_scale=2, **ALL)
    assert [branch.time_ids for branch in plan.rows[0].branches] == [OWN, OTHER]
    assert {name: plan.recipes[0][name] for name in ALL} == ALL


@pytest.mark.parametrize("name", [*NAMES, *NEGATIVE])
@pytest.mark.parametrize("served", [SERVED, TEXT, LCM], ids=["classes", "text", "lcm"])
def test_a_model_that_is_told_no_sizes_takes_none(served: Served, name: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(served, **{name: (4, 4)})
    assert str(refused.value) == f"{name}: must be null: this model is told no sizes; it is [4, 4]"
    assert planned(served, **{name: None}).canonical == planned(served).canonical
    assert name not in planned(served).parameters


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_model_without_a_second_prediction_takes_no_negative_sizes(name: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(LCM_XL, **{name: [4, 4]})
    why = "this network has guidance embedded, and makes no second prediction to compare with"
    assert str(refused.value) == f"{name}: must be null: {why}; it is [4, 4]"
    assert not {*NEGATIVE} & planned(LCM_XL).parameters.keys()


def test_parameters_have_all_of_them() -> None:
    asked = {name: planned(SIZES, width=8, original_size=[9, 7]).parameters[name] for name in (*NAMES, *NEGATIVE)}
    own = {"original_size": [9, 7], "target_size": [6, 8], "crops_coords_top_left": [0, 0]}
    assert asked == own | {f"negative_{name}": pair for name, pair in own.items()}


@pytest.mark.parametrize(
    ("fields", "recipe"),
    [
        ({}, {}),
        ({"original_size": [4, 4], "target_size": [4, 4], "crops_coords_top_left": [0, 0]}, {}),
        ({"width": 8, "original_size": [4, 4], "target_size": [6, 8]}, {"original_size": [4, 4]}),
        ({"negative_original_size": [4, 4]}, {}),
        ({"original_size": [9, 7], "negative_original_size": [9, 7]}, {"original_size": [9, 7]}),
        ({"original_size": [9, 7], "negative_original_size": [4, 4]},) * 2,
        (ALL, ALL),
        ({**ALL, "guidance_scale": 1}, {name: ALL[name] for name in NAMES}),
    ],
    ids=str,
)
def test_a_recipe_has_what_has_an_effect(fields: Json, recipe: Json) -> None:
    plan = planned(SIZES, **fields)
    for document in (plan.canonical, plan.recipes[0]):
        assert {name: document[name] for name in document.keys() & ALL.keys()} == recipe


def test_negative_sizes_without_guidance_have_a_warning() -> None:
    said = "negative sizes and crops have no effect: guidance_scale is at most 1, which is no guidance"
    assert planned(XL, negative_target_size=[4, 4], guidance_scale=1).warnings == (said,)
    assert planned(XL, negative_target_size=[4, 4], guidance_scale=2).warnings == ()
    assert planned(XL, target_size=[4, 4], guidance_scale=1).warnings == ()


# How a request may say them.


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving_text(tokenize_twice, like=like_xl) as running:
        yield running


def recipe_of(answer: httpx.Response) -> Json:
    assert answer.status_code == 200, answer.text
    return read_parameters(answer.content)


def test_json_queries_and_forms_say_them(server: FakeServer) -> None:
    client = server.client
    query = {name: ",".join(map(str, pair)) for name, pair in ALL.items()}
    answers = [
        client.post("/sample", json={"seed": 7, **ALL}),
        client.get("/sample", params={"seed": 7, **query}),
        client.get("/sample", params={"seed": 7, **ALL}),  # each twice
    ]
    assert len({answer.content for answer in answers}) == 1
    assert {name: recipe_of(answers[0])[name] for name in ALL} == ALL
    files = {"image": write_npy(np.zeros((1, 1, 2), np.float32))}
    form = {"timestep": "5", "seed": "7", "guidance_scale": "3", **query}
    recipe = recipe_of(client.post("/denoise", data=form, files=files))
    assert {name: recipe[name] for name in ALL} == ALL


def test_each_of_them_is_in_the_etag(server: FakeServer) -> None:
    queries = [{}, *({name: "5,6"} for name in ALL)]
    tags = [server.client.head("/sample", params={"seed": 7, **query}).headers["etag"] for query in queries]
    assert len(set(tags)) == 1 + len(ALL)
    defaults = {"original_size": "1,2", "negative_crops_coords_top_left": "0,0"}  # (height, width) of the image
    assert server.client.head("/sample", params={"seed": 7, **defaults}).headers["etag"] == tags[0]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("original_size", [4], ": must be a list of 2 integers from 1 to 16384, and is [4]"),
        ("original_size", 4, ": must be a list of 2 integers from 1 to 16384, and is 4"),
        ("negative_target_size", [1, 2, 3], ": must be a list of 2 integers from 1 to 16384, and is [1, 2, 3]"),
        ("crops_coords_top_left", [4.5, 0], ".0: must be an integer from 0 to 16384, and is 4.5"),
        ("target_size", [0, 4], ".0: must be 1 to 16384, and is 0"),
        ("target_size", [4, 16385], ".1: must be 1 to 16384, and is 16385"),
        ("negative_crops_coords_top_left", [0, -1], ".1: must be 0 to 16384, and is -1"),
        ("crops_coords_top_left", [True, 0], ".0: must be an integer from 0 to 16384, and is true"),
    ],
    ids=str,
)
def test_what_is_no_size_is_refused_in_words(server: FakeServer, field: str, value: object, said: str) -> None:
    answer = server.client.post("/sample", json={field: value})
    assert problem(answer, 422)["detail"] == f"{field}{said}"


def test_the_document_has_them_where_the_model_takes_them(server: FakeServer) -> None:
    def described(server: FakeServer, path: str) -> Json:
        content: Json = server.client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
        properties: Json = content["application/json"]["schema"]["properties"]
        return {name: properties[name]["anyOf"] for name in ALL}

    def pair(least: int) -> Json:
        members = {"type": "integer", "minimum": least, "maximum": 2**14}
        return {"type": "array", "items": members, "minItems": 2, "maxItems": 2}

    null = {"type": "null"}
    expected = {name: [pair("size" in name), null] for name in ALL}
    for path in ("/sample", "/denoise"):
        assert described(server, path) == expected
    with serving_text() as plain, serving_text(like=like_lcm_xl) as lcm:
        assert described(plain, "/sample") == {name: [null] for name in ALL}
        parameters = plain.client.get("/openapi.json").json()["paths"]["/sample"]["get"]["parameters"]
        assert not {one["name"] for one in parameters} & ALL.keys()
        assert described(lcm, "/sample") == expected | {name: [null] for name in NEGATIVE}


def test_a_client_says_them_as_tuples(server: FakeServer) -> None:
    pairs: dict[str, Any] = {name: tuple(pair) for name, pair in ALL.items()}
    with Client(server.url, patience_s=0) as client:
        drawn = client.sample(seed=7, **pairs)
        clean = client.denoise(np.zeros((1, 1, 2), np.float32), 5, guidance_scale=3, **pairs)
    for recipe in (read_recipe(drawn.images[0].png), read_recipe(clean.images[0].png)):
        assert {name: recipe[name] for name in ALL} == ALL
    assert {name: drawn.parameters[name] for name in ALL} == ALL


def test_the_command_line_says_them_and_verifies(server: FakeServer, tmp_path: Path) -> None:
    options = [f"--{name.replace('_', '-')}={a},{b}" for name, (a, b) in ALL.items()]
    done(stepwise(server, tmp_path, "sample", "a fox", "-s", "7", *options, "-o", "fox.png"))
    expected = server.client.post("/sample", json={"seed": 7, "prompt": "a fox", **ALL})
    assert (tmp_path / "fox.png").read_bytes() == expected.content
    done(stepwise(server, tmp_path, "sample", "a fox", "-s", "7", "-n", "2", "--sheet", *options, "-o", "two.png"))
    two = server.client.post("/sample", json={"seed": 7, "prompt": "a fox", "num_images": 2, **ALL})
    assert (tmp_path / "two.png").read_bytes() == two.content
    printed = done(stepwise(server, tmp_path, "verify", "fox.png", "two.png"))
    assert printed == "fox.png: the same bytes\ntwo.png: the same bytes\n"
    info = " ".join(done(stepwise(server, tmp_path, "info")).split())
    assert "text encoder 2 encoders, at least 4 layers, 9 parameters" in info
    assert "is told original_size, crops_coords_top_left, target_size" in info
    line = refused(stepwise(server, tmp_path, "sample", "a fox", "--original-size", "a"), exits.UNUSABLE)
    assert line == "--original-size a: must be numbers with commas between them"
