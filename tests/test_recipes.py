"""Recipes draw their images again, in each kind of model with text: one like SD, SDXL, LCM, and LCM-SDXL."""

import json
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.description import ModelDescription
from model.rows import Group
from service.plan.entries import table
from service.plan.fields import DenoiseRequest, Sample
from service.plan.plan import Plan, plan_denoise
from service.plan.recommended import Wanted, applied
from service.plan.served import Served
from tests.properties import examples
from tests.test_responses import planned
from tests.texts import FITS, LCM, LCM_XL, TEXT, XL, XL_WITHOUT_ZEROS, drawn

T = TypeVar("T")

IMAGE = np.zeros((1, 4, 4), np.float32)
SIZES = (Group(4, 4), Group(4, 8), Group(8, 4))
MODELS = [replace(served, groups=SIZES) for served in (TEXT, XL, XL_WITHOUT_ZEROS, LCM, LCM_XL)]
# With recommended timesteps, which are for samplers that take a list.
LISTED = replace(MODELS[1], model=applied(XL.model, Wanted("lcm", timesteps=(900, 500, 100))))
STEPS = {"sampler", "eta", "timesteps", "num_inference_steps"}  # depend on each other
SIDES = {"height", "width"}


class Asked(NamedTuple):
    """The fields of a valid request, and the model that it is for."""

    served: Served
    fields: dict[str, Any]


@st.composite
def asked(draw: st.DrawFn, most: int = 3) -> Asked:
    """Few values, so that two requests often mean the same."""
    served = draw(st.sampled_from((*MODELS, LISTED)))
    return Asked(served, draw(fields_for(served.model, draw(st.integers(1, most)))))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Asked, Asked]:
    """Two requests for one model, which differ in one field at most, or in fields that depend on each other."""
    served, count = draw(st.sampled_from((*MODELS, LISTED))), draw(st.integers(1, 2))
    one, other = (draw(fields_for(served.model, count)) for _ in range(2))
    name = draw(st.sampled_from([*one]))
    changed = next((together for together in (STEPS, SIDES) if name in together), {name})
    kept = {name: value for name, value in one.items() if name not in changed}
    return Asked(served, one), Asked(served, kept | {name: value for name, value in other.items() if name in changed})


@st.composite
def fields_for(draw: st.DrawFn, model: ModelDescription, count: int) -> dict[str, Any]:
    """The fields of a valid request for so many images."""
    texts = st.text("αβ.([", max_size=FITS + 1)

    def each_of(one: st.SearchStrategy[T]) -> st.SearchStrategy[T | list[T]]:
        return one | st.lists(one, min_size=count, max_size=count)

    sampler = draw(st.sampled_from((None, "ddim", "euler", "lcm", "pndm")))
    lists = () if sampler == "pndm" else ([900, 500, 100], [900])
    timesteps = draw(st.sampled_from((None, *lists)))
    side = draw(st.sampled_from((None, *SIZES)))
    fields: dict[str, Any] = {
        "sampler": sampler,
        "eta": draw(st.sampled_from((0, -0.0, 1))) if sampler == "ddim" else 0,
        "timesteps": timesteps,
        "num_inference_steps": draw(st.sampled_from((None, 2, 3))) if timesteps is None else None,
        "height": side and side.height,
        "width": side and side.width,
        "seed": draw(st.integers(0, 1)),
        "num_images": count,
        "prompt": draw(st.none() | each_of(texts)),
        "emphasis": draw(st.sampled_from(("none", "original"))),
        "clip_skip": draw(st.integers(0, 1)),
        "guidance_scale": draw(st.none() | st.sampled_from((0, 0.5, 1.0, 1.5, 30))),
    }
    if not model.embeds_guidance:
        fields |= {
            "negative_prompt": draw(each_of(st.none() | st.just("") | texts)),
            "guidance_rescale": draw(st.sampled_from((0.0, 0.7))),
            "guidance_interval": draw(st.sampled_from((None, [0, 1], [0.25, 0.5]))),
        }
    if model.embeds_sizes:
        sizes = st.none() | st.sampled_from(([4, 4], [4, 8]))
        crops = st.none() | st.sampled_from(([0, 0], [0, 3]))
        for prefix in ("",) if model.embeds_guidance else ("", "negative_"):
            fields |= {f"{prefix}{name}_size": draw(sizes) for name in ("original", "target")}
            fields[f"{prefix}crops_coords_top_left"] = draw(crops)
    return fields


def again(recipe: dict[str, object]) -> dict[str, Any]:
    """The fields of a request that is a recipe."""
    return {name: value for name, value in json.loads(json.dumps(recipe)).items() if name in table(Sample)}


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
@given(pairs())
def test_requests_have_one_canonical_form_exactly_where_they_draw_the_same_bytes(pair: tuple[Asked, Asked]) -> None:
    """A recipe is a part of the bytes."""

    def bytes_of(plan: Plan) -> object:
        return [(drawn(row), recipe) for row, recipe in zip(plan.rows, plan.recipes, strict=True)]

    one, other = (planned(request.served, **request.fields) for request in pair)
    assert (one.canonical == other.canonical) == (bytes_of(one) == bytes_of(other))


@examples(200)
@given(asked(most=1))
def test_the_recipe_of_a_denoised_image_draws_it_again(request: Asked) -> None:
    others = {"num_images", "timesteps", "height", "width", "emphasis"}
    fields = {name: value for name, value in request.fields.items() if name not in others and value is not None}
    fields = {name: one_of(value) if "prompt" in name else value for name, value in fields.items()}
    plan = denoised(request.served, **fields)
    alone = denoised(request.served, **again(plan.recipes[0]))
    assert alone.recipes == plan.recipes
    assert [drawn(row) for row in alone.rows] == [drawn(row) for row in plan.rows]


def one_of(texts: Any) -> Any:
    return texts[0] if isinstance(texts, list) else texts


def denoised(served: Served, **fields: Any) -> Plan:
    return plan_denoise(DenoiseRequest(500, **{"seed": 7, **fields}), IMAGE, served, 300)
