"""Recipes draw their images again, in each kind of model with text: one like SD, SDXL, LCM, and LCM-SDXL."""

import json
from typing import Any, NamedTuple, TypeVar

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.rows import Row
from service.plan.entries import table
from service.plan.fields import DenoiseRequest, Sample
from service.plan.plan import Plan, plan_denoise
from service.plan.served import Served
from tests.properties import examples
from tests.test_responses import planned
from tests.texts import FITS, LCM, LCM_XL, TEXT, XL, XL_WITHOUT_ZEROS

T = TypeVar("T")

SIZE = (4, 4)  # of images
IMAGE = np.zeros((1, *SIZE), np.float32)


class Asked(NamedTuple):
    """The fields of a valid request, and the model that it is for."""

    served: Served
    fields: dict[str, Any]


@st.composite
def asked(draw: st.DrawFn, most: int = 3) -> Asked:
    """Few values, so that two requests often mean the same."""
    served = draw(st.sampled_from((TEXT, XL, XL_WITHOUT_ZEROS, LCM, LCM_XL)))
    count = draw(st.integers(1, most))
    texts = st.text("αβ.", max_size=FITS + 1)

    def each_of(one: st.SearchStrategy[T]) -> st.SearchStrategy[T | list[T]]:
        return one | st.lists(one, min_size=count, max_size=count)

    fields: dict[str, Any] = {
        "num_images": count,
        "prompt": draw(st.none() | each_of(texts)),
        "clip_skip": draw(st.integers(0, 1)),
        "guidance_scale": draw(st.none() | st.sampled_from((0, 0.5, 1.0, 1.5, 30))),
    }
    if not served.model.embeds_guidance:
        fields |= {
            "negative_prompt": draw(each_of(st.none() | st.just("") | texts)),
            "guidance_rescale": draw(st.sampled_from((0.0, 0.7))),
            "guidance_interval": draw(st.sampled_from((None, [0, 1], [0.25, 0.5]))),
        }
    if served.model.embeds_sizes:
        sizes = st.none() | st.sampled_from(([4, 4], [8, 2]))
        crops = st.none() | st.sampled_from(([0, 0], [0, 3]))
        for prefix in ("",) if served.model.embeds_guidance else ("", "negative_"):
            fields |= {f"{prefix}{name}_size": draw(sizes) for name in ("original", "target")}
            fields[f"{prefix}crops_coords_top_left"] = draw(crops)
    return Asked(served, fields)


def again(recipe: dict[str, object]) -> dict[str, Any]:
    """The fields of a request that is a recipe."""
    return {name: value for name, value in json.loads(json.dumps(recipe)).items() if name in table(Sample)}


def drawn(row: Row) -> tuple[object, ...]:
    """All that decides a row's image, for rows that share steps and size."""
    how = (row.guidance_scale, row.guidance_rescale, row.guidance_interval) if len(row.branches) > 1 else ()
    return row.seed, row.branches, how


@examples(400)
@given(asked())
def test_a_recipe_draws_its_image_again(request: Asked) -> None:
    plan = planned(request.served, **request.fields)
    for row, recipe in zip(plan.rows, plan.recipes, strict=True):
        alone = planned(request.served, **again(recipe))
        assert [drawn(one) for one in alone.rows] == [drawn(row)]
        assert alone.recipes == [recipe]
    sheet = planned(request.served, **again(plan.canonical))
    assert sheet.canonical == plan.canonical
    assert [drawn(row) for row in sheet.rows] == [drawn(row) for row in plan.rows]


@examples(200)
@given(asked(most=1))
def test_what_a_client_is_told_of_its_request_draws_the_same(request: Asked) -> None:
    plan = planned(request.served, **request.fields)
    assert planned(request.served, **plan.parameters).canonical == plan.canonical


@examples(600)
@given(asked(most=2), asked(most=2))
def test_requests_have_one_canonical_form_exactly_where_they_draw_the_same_bytes(one: Asked, two: Asked) -> None:
    """A recipe is a part of the bytes."""

    def bytes_of(plan: Plan) -> object:
        return [(drawn(row), recipe) for row, recipe in zip(plan.rows, plan.recipes, strict=True)]

    plans = [planned(one.served, **fields) for fields in (one.fields, without_what_is_refused(two.fields, one))]
    assert (plans[0].canonical == plans[1].canonical) == (bytes_of(plans[0]) == bytes_of(plans[1]))


def without_what_is_refused(fields: dict[str, Any], like: Asked) -> dict[str, Any]:
    """The fields that the other request's model can use."""
    return {name: value for name, value in fields.items() if name in like.fields}


@examples(200)
@given(asked(most=1))
def test_the_recipe_of_a_denoised_image_draws_it_again(request: Asked) -> None:
    fields = {name: value for name, value in request.fields.items() if name != "num_images"}
    fields = {name: one_of(value) if "prompt" in name else value for name, value in fields.items()}
    plan = denoised(request.served, **fields)
    alone = denoised(request.served, **again(plan.recipes[0]))
    assert alone.recipes == plan.recipes
    assert [drawn(row) for row in alone.rows] == [drawn(row) for row in plan.rows]


def one_of(texts: Any) -> Any:
    return texts[0] if isinstance(texts, list) else texts


def denoised(served: Served, **fields: Any) -> Plan:
    return plan_denoise(DenoiseRequest(500, **{"seed": 7, **fields}), IMAGE, served, 300)
