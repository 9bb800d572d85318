"""Networks that are told guidance_scale, as LCM's are: one forward row a step, and nothing to compare with."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.description import Recommended
from service.errors import Invalid
from service.plan.fields import DenoiseRequest
from service.plan.plan import Plan, plan_denoise
from service.plan.recommended import Wanted, applied
from service.plan.served import Served
from stepwise import Client, read_recipe
from tests.local import FakeServer
from tests.programs import done, stepwise
from tests.servers import Json, invalid
from tests.test_responses import planned
from tests.texts import LCM, LCM_XL, TEXT, XL, like_lcm, serving_text, text_of

NO_SECOND = "this network has guidance embedded, and makes no second prediction to compare with"
NOISY = np.zeros((1, 1, 2), np.float32)


def denoised(served: Served = LCM, **fields: Any) -> Plan:
    return plan_denoise(DenoiseRequest(500, **{"seed": 7, **fields}), np.zeros((1, 4, 4), np.float32), served, 300)


@pytest.mark.parametrize(
    ("scale", "w"), [(None, 7.5), (0, 0.0), (0.5, 0.0), (1, 0.0), (1.5, 0.5), (8.5, 7.5), (30, 29.0)]
)
def test_the_network_is_told_the_scale_less_one(scale: float | None, w: float) -> None:
    for served in (LCM, replace(LCM_XL, model=replace(LCM_XL.model, recommended=LCM.model.recommended))):
        rows = planned(served, prompt=["a", "b"], num_images=2, guidance_scale=scale).rows
        assert [[one.w for one in row.branches] for row in rows] == [[w], [w]]
        assert [row.forwards for row in rows] == [(1, 1, 1, 1)] * 2


def test_others_are_told_nothing_of_it() -> None:
    for served in (TEXT, XL):
        [row] = planned(served, guidance_scale=8.5).rows
        assert [one.w for one in row.branches] == [None, None]


def test_a_row_has_its_prompt_alone() -> None:
    [row] = planned(LCM, prompt="a", clip_skip=1).rows
    assert row.branches == (replace(text_of("a", 1), w=7.5),)


def test_denoising_is_told_it_too() -> None:
    """One and less is no guidance, as in every model, and `guidance_scale` defaults to 1."""
    asked: list[tuple[dict[str, Any], float]] = [({}, 0.0), ({"guidance_scale": 3}, 2.0)]
    for fields, w in asked:
        for output in ("x0", "model_output"):
            [row] = denoised(**fields, output=output).rows
            assert [one.w for one in row.branches] == [w]
    assert denoised(guidance_scale=3).recipes[0]["guidance_scale"] == 3.0


@pytest.mark.parametrize("draw", [planned, denoised], ids=["sample", "denoise"])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"negative_prompt": "β"}, f"negative_prompt: must be null: {NO_SECOND}"),
        ({"negative_prompt": ""}, f"negative_prompt: must be null: {NO_SECOND}"),
        ({"guidance_rescale": 0.5}, f"guidance_rescale: must be 0: {NO_SECOND}; it is 0.5"),
        ({"guidance_interval": [0, 0.5]}, f"guidance_interval: must be [0, 1]: {NO_SECOND}; it is [0.0, 0.5]"),
        ({"guidance_interval": [0.5, 0]}, "guidance_interval: must not fall, and is 0.5 to 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [None, 1, 5])
def test_what_needs_a_second_prediction_is_refused(
    draw: Any, fields: dict[str, Any], said: str, scale: float | None
) -> None:
    with pytest.raises(Invalid) as refused:
        draw(LCM, **fields, guidance_scale=scale)
    assert str(refused.value) == said


def test_a_list_of_negative_prompts_is_refused() -> None:
    for negatives in (["a", None], [None, None]):
        with pytest.raises(Invalid, match="negative_prompt: must be null: "):
            planned(LCM, negative_prompt=negatives, num_images=2)


def test_what_changes_nothing_is_taken() -> None:
    fields: Json = {"negative_prompt": None, "guidance_rescale": 0, "guidance_interval": [0, 1]}
    assert planned(LCM, **fields).canonical == planned(LCM).canonical
    assert planned(LCM, **fields).warnings == ()


def test_a_recipe_has_the_scale_as_asked_and_1_for_all_that_is_none() -> None:
    assert planned(LCM).recipes[0]["guidance_scale"] == 8.5
    assert planned(LCM, guidance_scale=1.5).canonical["guidance_scale"] == 1.5
    none = [planned(LCM, guidance_scale=scale) for scale in (0, 0.5, 1.0)]
    assert [plan.canonical["guidance_scale"] for plan in none] == [1.0] * 3
    assert [plan.parameters["guidance_scale"] for plan in none] == [0, 0.5, 1.0]


def test_an_operator_may_recommend_a_scale() -> None:
    model = applied(LCM.model, Wanted(guidance_scale=2.0))
    assert model.recommended == Recommended("ddim", 4, guidance_scale=2.0)


# Over HTTP


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving_text(like=like_lcm) as running:
        yield running


def test_an_image_costs_one_forward_row_a_step(server: FakeServer) -> None:
    server.runner.passes.clear()
    assert server.client.post("/sample", json={"seed": 7, "prompt": "a", "guidance_scale": 5}).status_code == 200
    assert server.runner.passes == [[(7, 0)]] * 4


def test_a_refusal_names_the_field(server: FakeServer) -> None:
    post, get = server.client.post, server.client.get
    for answer in (post("/sample", json={"negative_prompt": "β"}), get("/sample?negative_prompt=")):
        assert invalid(answer, "negative_prompt") == f"must be null: {NO_SECOND}"
        assert "β" not in answer.text


def test_the_document_has_what_the_model_can_use(server: FakeServer) -> None:
    paths: Json = server.client.get("/openapi.json").json()["paths"]
    for path in ("/sample", "/denoise"):
        fields = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert fields["negative_prompt"]["anyOf"] == fields["guidance_interval"]["anyOf"] == [{"type": "null"}]
        assert fields["guidance_rescale"]["maximum"] == 0
        assert fields["guidance_scale"]["anyOf"][0]["maximum"] == 30
    assert not {"negative_prompt", "guidance_interval"} & {one["name"] for one in paths["/sample"]["get"]["parameters"]}


def test_info_says_that_it_is_told(server: FakeServer) -> None:
    assert server.client.get("/info").json()["embedded_fields"] == ["guidance_scale"]


def test_clients_draw_with_it_and_verify(server: FakeServer, tmp_path: Path) -> None:
    with Client(server.url, patience_s=0) as client:
        png = client.sample(prompt="a fox", seed=7, guidance_scale=3).images[0].png
        clean = client.denoise(NOISY, 5, prompt="a fox", guidance_scale=2).images[0].png
    assert (read_recipe(png)["guidance_scale"], read_recipe(clean)["guidance_scale"]) == (3.0, 2.0)
    done(stepwise(server, tmp_path, "sample", "a fox", "-s", "7", "-g", "3", "-o", "fox.png"))
    assert (tmp_path / "fox.png").read_bytes() == png
    assert done(stepwise(server, tmp_path, "verify", "fox.png")) == "fox.png: the same bytes\n"
