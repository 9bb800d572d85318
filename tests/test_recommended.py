"""STEPWISE_RECOMMENDED: read strictly, and checked against the model."""

import re
from dataclasses import replace
from typing import Any

import pytest

from model.description import Distilled, ModelDescription, Recommended
from service.build import StartError, recommend
from service.plan.recommended import Wanted, doubt, parse
from service.plan.served import fingerprint_parts
from tests.test_responses import MODEL, planned
from tests.texts import TEXT

TEXT_MODEL = TEXT.model
UNGUIDED = replace(MODEL, num_classes=None, no_label=None, class_names=(), recommended=Recommended())
STUDENT = replace(MODEL, recommended=Recommended("ddim", 4), distilled=Distilled("ddim", (1, 2, 4)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sampler=euler,steps=4,guidance=0", Wanted("euler", 4, 0.0)),
        ("num_inference_steps=4,guidance_scale=7.5", Wanted(None, 4, 7.5)),
        (" guidance = 30 , sampler=ddim ", Wanted("ddim", None, 30.0)),
        ("steps=1", Wanted(None, 1, None)),
        ("sampler=lcm,timesteps=999/749/499/249,guidance=0", Wanted("lcm", None, 0.0, (999, 749, 499, 249))),
        ("timesteps=0", Wanted(timesteps=(0,))),
    ],
)
def test_a_recommendation_is_read(text: str, wanted: Wanted) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("euler", "must be like sampler=euler,steps=4,guidance=0, and has 'euler'"),
        ("", "must be like sampler=euler,steps=4,guidance=0, and has ''"),
        ("steps=4,", "must be like sampler=euler,steps=4,guidance=0, and has ''"),
        ("eta=1", "must be like sampler=euler,steps=4,guidance=0, and has 'eta=1'"),
        ("sampler=", "must be like sampler=euler,steps=4,guidance=0, and has 'sampler='"),
        ("steps=4,num_inference_steps=5", "must name num_inference_steps once"),
        ("steps=4,timesteps=999", "must name steps or timesteps, and not both"),
        ("timesteps=999/", "timesteps must be integers with slashes between, as 999/749, and is '999/'"),
        ("timesteps=-1", "timesteps must be integers with slashes between, as 999/749, and is '-1'"),
        ("steps=0", "steps must be an integer from 1 on, and is '0'"),
        ("steps=4.0", "steps must be an integer from 1 on, and is '4.0'"),
        ("guidance=31", "guidance must be a number from 0 to 30, and is '31'"),
        ("guidance_scale=-1", "guidance_scale must be a number from 0 to 30, and is '-1'"),
        ("guidance=nan", "guidance must be a number from 0 to 30, and is 'nan'"),
    ],
)
def test_what_is_no_recommendation_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="must") as refused:
        parse(text)
    assert str(refused.value) == said


def test_a_recommendation_is_the_default_of_requests() -> None:
    model = recommend(parse("sampler=dpmpp_2m,steps=7"), TEXT_MODEL)
    assert model.recommended == Recommended("dpmpp_2m", 7, guidance_scale=3.0)  # the weights' own guidance
    plan = planned(replace(TEXT, model=model), prompt="a")
    assert (plan.parameters["sampler"], len(plan.rows[0].table)) == ("dpmpp_2m", 7)
    assert recommend(None, TEXT_MODEL) is TEXT_MODEL


LISTED = replace(TEXT, model=recommend(parse("sampler=lcm,timesteps=999/749/499/249"), TEXT_MODEL))


@pytest.mark.parametrize(
    ("fields", "drawn"),
    [
        ({}, ("lcm", [999, 749, 499, 249])),
        ({"sampler": "euler"}, ("euler", [999, 749, 499, 249])),
        ({"sampler": "euler_a"}, ("euler_a", 4)),  # takes no list
        ({"num_inference_steps": 4}, ("lcm", 4)),
        ({"timesteps": [999, 10]}, ("lcm", [999, 10])),
    ],
    ids=str,
)
def test_recommended_timesteps_are_for_requests_that_name_no_steps(
    fields: dict[str, Any], drawn: tuple[str, int | list[int]]
) -> None:
    plan = planned(LISTED, prompt="a", **fields)
    sampler, grid = drawn
    for told in (plan.parameters, *plan.recipes, plan.canonical):
        assert told["sampler"] == sampler
        assert told.get("timesteps") == (None if isinstance(grid, int) else grid)
        assert told["num_inference_steps"] == (grid if isinstance(grid, int) else None)
    [row] = plan.rows
    if isinstance(grid, int):
        assert len(row.table) == grid
    else:
        assert row.table.timesteps.tolist() == grid


def test_a_sampler_with_timesteps_of_its_own_takes_none_that_are_recommended() -> None:
    karras = replace(TEXT_MODEL, schedule=TEXT_MODEL.schedule.with_fields(use_karras_sigmas=True))
    model = recommend(parse("sampler=ddim,timesteps=999/499"), karras)
    plan = planned(replace(TEXT, model=model), prompt="a", sampler="euler")
    assert (plan.parameters["num_inference_steps"], len(plan.rows[0].table)) == (2, 2)


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        (TEXT_MODEL, "sampler=no_such", "sampler: must be one of ddim, "),
        (TEXT_MODEL, "steps=1001", "num_inference_steps: must be 1 to 1000, and is 1001"),
        (TEXT_MODEL, "timesteps=1000/500", "timesteps must be 0 to 999, and have 1000"),
        (TEXT_MODEL, "timesteps=500/500", "timesteps: must fall from each to the next, and 500 comes after 500"),
        (TEXT_MODEL, "sampler=pndm,timesteps=500", "timesteps: must be null with pndm; a list is for ddim, "),
        (STUDENT, "timesteps=500", "timesteps: must be null: num_inference_steps names the timesteps which these"),
        (STUDENT, "steps=3", "num_inference_steps: must be 1, 2 or 4, which these weights were distilled for, and is"),
        (STUDENT, "sampler=ddpm", "sampler: must be ddim, which these weights were distilled for, and is ddpm"),
        (UNGUIDED, "guidance=2", "guidance must be at most 1, because this model knows none; it is 2"),
    ],
)
def test_what_the_model_cannot_draw_ends_the_start(model: ModelDescription, text: str, said: str) -> None:
    with pytest.raises(StartError) as refused:
        recommend(parse(text), model)
    assert str(refused.value).startswith(f"STEPWISE_RECOMMENDED: for digits, {said}")
    assert "\n" not in str(refused.value)


TRAILING = replace(TEXT_MODEL, schedule=TEXT_MODEL.schedule.with_fields(timestep_spacing="trailing"))


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "ddim", "dpmpp_2m"])
def test_trailing_spacing_with_guidance_is_doubted(sampler: str) -> None:
    model = replace(TRAILING, recommended=Recommended(sampler, 50, guidance_scale=7.5))
    sentence = doubt(model, None)
    assert sentence is not None
    assert sentence.startswith("digits: its scheduler has timestep_spacing trailing, a sign of weights for few steps")
    for setting in ("steps=4,guidance=0", "guidance=7.5"):
        assert f"STEPWISE_RECOMMENDED={setting}" in sentence
        wanted = parse(setting)
        assert doubt(recommend(wanted, model), wanted) is None


def test_many_steps_of_a_network_with_guidance_embedded_are_doubted() -> None:
    model = replace(TEXT_MODEL, embeds_guidance=True, recommended=Recommended("euler", 50, guidance_scale=5))
    sentence = doubt(model, None)
    assert sentence is not None
    assert "and requests get 50 steps of euler: set STEPWISE_RECOMMENDED=sampler=lcm,steps=4" in sentence
    for setting in ("sampler=ddim,steps=4", "steps=50", "timesteps=999/499"):
        wanted = parse(setting)
        assert doubt(recommend(wanted, replace(model, recommended=Recommended("ddim", 50))), wanted) is None
    assert doubt(replace(model, recommended=Recommended("lcm", 4, guidance_scale=8.5)), None) is None


def test_lcms_sampler_with_guidance_is_doubted() -> None:
    model = replace(TEXT_MODEL, recommended=Recommended("lcm", 50, guidance_scale=7.5))
    assert "digits: its sampler is lcm, a sign of weights for few steps" in (doubt(model, None) or "")
    few = replace(model.recommended, num_inference_steps=4)
    assert doubt(replace(model, embeds_guidance=True, recommended=few), None) is None  # w is no second prediction


@pytest.mark.parametrize(
    ("setting", "advised"),
    [
        ("steps=20", ["steps=20,guidance=0", "steps=20,guidance=7.5"]),
        ("sampler=lcm", ["sampler=lcm,steps=4,guidance=0", "sampler=lcm,guidance=7.5"]),
        (
            "sampler=lcm,timesteps=999/749",
            ["sampler=lcm,timesteps=999/749,guidance=0", "sampler=lcm,timesteps=999/749,guidance=7.5"],
        ),
    ],
)
def test_advice_keeps_what_the_operator_has_set(setting: str, advised: list[str]) -> None:
    model = replace(TRAILING, recommended=Recommended("euler", 50, guidance_scale=7.5))
    assert advice(model, setting) == advised


def test_advice_for_guidance_that_is_embedded_keeps_it_too() -> None:
    model = replace(TEXT_MODEL, embeds_guidance=True, recommended=Recommended("euler", 50, guidance_scale=5))
    assert advice(model, "guidance=3") == ["sampler=lcm,steps=4,guidance=3", "steps=50,guidance=3"]


def advice(model: ModelDescription, setting: str) -> list[str]:
    """The settings that a doubt names. Each of them ends the doubt."""
    wanted = parse(setting)
    named = re.findall(r"STEPWISE_RECOMMENDED=([^ ]*[^ ,])", doubt(recommend(wanted, model), wanted) or "")
    for one in named:
        assert doubt(recommend(parse(one), model), parse(one)) is None
    return named


@pytest.mark.parametrize(
    "model",
    [
        TEXT_MODEL,
        replace(TRAILING, recommended=Recommended("euler", 4, guidance_scale=1.0)),
        replace(TRAILING, text=None),
        replace(TRAILING, schedule=TRAILING.schedule.with_fields(rescale_betas_zero_snr=True)),  # such have it, too
    ],
    ids=["leading", "no guidance", "no text", "zero SNR"],
)
def test_others_are_not_doubted(model: ModelDescription) -> None:
    assert doubt(model, None) is None


def test_settings_that_change_answers_are_in_the_fingerprint() -> None:
    """A request that names no sampler gets the recommended one; recipes have prompts, or their hashes."""

    def parts(model: ModelDescription, recommended: Recommended | None, prompts: bool) -> dict[str, str | int]:
        return fingerprint_parts(model, model.group, {}, {}, "", recommended, prompts)

    plain = parts(TEXT_MODEL, None, prompts=True)
    assert parts(TEXT_MODEL, Recommended("ddim", 2, 0.0), prompts=True) == {**plain, "recommended": "ddim 2 0.0"}
    listed = Recommended("lcm", 2, 0.0, (999, 499))
    assert parts(TEXT_MODEL, listed, prompts=True) == {**plain, "recommended": "lcm 2 0.0 (999, 499)"}
    assert parts(TEXT_MODEL, None, prompts=False) == {**plain, "recipe_prompts": 0}
    assert parts(MODEL, None, prompts=False) == parts(MODEL, None, prompts=True)
