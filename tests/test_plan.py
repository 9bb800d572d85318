"""Refusals: one sentence with only the necessary words."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import schedule
from model.description import Distilled, Recommended
from model.rows import Condition, Group, Image
from model.samplers import SAMPLERS
from service.errors import Invalid
from service.plan.fields import DenoiseRequest, NoiseRequest, SigmaSchedule
from service.plan.plan import Plan, plan_denoise, plan_noise
from service.plan.served import Served
from service.plan.shared_fields import Scaling
from tests.test_responses import LATENT, MODEL, SERVED, planned


@pytest.mark.parametrize(
    ("class_names", "said"),
    [
        (("zero", "one", "two"), "must be 0 to 2, or one of zero, one, two, and is 12"),
        (("0", "2", "1"), "must be 0 to 2, or one of 0, 2, 1, and is 12"),
        (("0", "1", "2"), "must be 0 to 2, and is 12"),
        ((), "must be 0 to 2, and is 12"),
    ],
)
def test_class_names_are_told_where_they_are_more_than_the_numbers(class_names: tuple[str, ...], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(replace(SERVED, model=replace(MODEL, class_names=class_names)), class_label=12)
    assert str(refused.value) == f"class_label: {said}"


STUDENT = replace(
    SERVED,
    model=replace(MODEL, recommended=Recommended("ddim", 4), distilled=Distilled("ddim", (1, 2, 4))),
)


WHICH = "which these weights were distilled for"


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_distilled_weights_take_the_steps_that_they_were_distilled_for(steps: int) -> None:
    assert len(planned(STUDENT, num_inference_steps=steps).rows[0].table) == steps


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"num_inference_steps": 50},
            "num_inference_steps: must be 1, 2 or 4, which these weights were distilled for, and is 50",
        ),
        (
            {"num_inference_steps": 3},
            "num_inference_steps: must be 1, 2 or 4, which these weights were distilled for, and is 3",
        ),
        ({"sampler": "ddpm"}, "sampler: must be ddim, which these weights were distilled for, and is ddpm"),
        (
            {"timesteps": [999]},
            f"timesteps: must be null: num_inference_steps names the timesteps {WHICH}",
        ),
        (
            {"sigma_schedule": "karras"},
            f"sigma_schedule: must be null: num_inference_steps names the timesteps {WHICH}",
        ),
        (
            {"sampler": "magic"},
            f"sampler: must be one of {', '.join(SAMPLERS)}, and is 'magic'",
        ),
    ],
)
def test_distilled_weights_refuse_all_else(fields: dict[str, object], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(STUDENT, **fields)
    assert str(refused.value) == said


def test_distilled_weights_denoise_in_few_steps() -> None:
    image = np.zeros((1, 4, 4), np.float32)

    def denoised(steps: int) -> int:
        request = DenoiseRequest(500, num_inference_steps=steps)
        return len(plan_denoise(request, image, STUDENT, 300).rows[0].table)

    assert denoised(4) == 4
    with pytest.raises(Invalid, match="must be 1, 2 or 4, which these weights were distilled for, and is 20"):
        denoised(20)


def test_of_one_number_of_steps_one_is_named() -> None:
    model = replace(STUDENT.model, distilled=Distilled("ddim", (4,)))
    with pytest.raises(Invalid, match="must be 4, which these weights were distilled for, and is 2"):
        planned(replace(STUDENT, model=model), num_inference_steps=2)


def test_an_eta_of_minus_zero_is_zero() -> None:
    """In the lines, too: −0.0 · noise has another sign than 0.0 · noise."""
    plans = [planned(SERVED, sampler="ddim", eta=eta) for eta in (-0.0, 0.0)]
    request = partial(DenoiseRequest, 500, seed=7, sampler="ddim", num_inference_steps=3)
    image = np.zeros(MODEL.image_shape, np.float32)
    noisy = [plan_denoise(request(eta=eta), image, SERVED, 300) for eta in (-0.0, 0.0)]
    for minus, plus in (plans, noisy):
        assert minus.canonical == plus.canonical
        assert minus.rows[0].table.lines.tobytes() == plus.rows[0].table.lines.tobytes()


# Latents.


@pytest.mark.parametrize(
    ("fields", "latent", "is_decoded"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"num_inference_steps": 3}, True, False),
        ({"output": "previous"}, False, False),
        ({"output": "model_output"}, False, False),
    ],
)
def test_only_an_image_that_is_wanted_is_decoded(fields: dict[str, Any], latent: bool, is_decoded: bool) -> None:
    request = DenoiseRequest(500, **fields)
    [row] = plan_denoise(request, np.zeros(LATENT.model.sample_shape, np.float32), LATENT, 300, latent).rows
    assert row.is_decoded is is_decoded


def test_what_is_drawn_is_decoded() -> None:
    assert [row.is_decoded for row in planned(LATENT, num_images=2).rows] == [True, True]


@pytest.mark.parametrize("scaling", get_args(Scaling))
def test_noise_is_added_to_latents(scaling: Scaling) -> None:
    drawn: list[tuple[int, tuple[int, int, int]]] = []

    def first_draw(seed: int, shape: tuple[int, int, int]) -> Image:
        drawn.append((seed, shape))
        return np.full(shape, 3, np.float32)

    latents = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    request = NoiseRequest(500, seed=7, scaling=scaling)
    plan = plan_noise(request, latents, replace(LATENT, first_draw=first_draw), 300)
    [row], [seed] = plan.rows, plan.seeds
    assert row.start is not None
    assert (len(row.table), row.is_decoded) == (0, True)
    noisy = row.start
    alpha_bar = LATENT.model.schedule.alphas_cumprod[500]
    expected = np.sqrt(alpha_bar) * latents + np.sqrt(1 - alpha_bar) * 3
    np.testing.assert_allclose(noisy * (np.sqrt(alpha_bar) if scaling == "additive" else 1), expected, rtol=1e-6)
    assert seed == 7
    assert drawn == [(7, (2, 2, 2))]


# Sizes.

SIZES = replace(SERVED, groups=(Group(4, 4), Group(6, 4), Group(6, 8)))
ONLY_OTHERS = replace(SERVED, groups=(Group(8, 8), Group(4, 4)))
LATENT_SIZES = replace(LATENT, groups=(Group(4, 4), Group(6, 8)))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Group(4, 4)),
        ({"height": 6, "width": 8}, Group(6, 8)),
        ({"width": 8}, Group(6, 8)),
        ({"height": 4}, Group(4, 4)),
        ({"height": None, "width": None}, Group(4, 4)),
    ],
    ids=str,
)
def test_a_request_has_a_served_size(fields: dict[str, Any], expected: Group) -> None:
    plan = planned(SIZES, num_images=2, **fields)
    assert plan.group == expected
    assert [row.group for row in plan.rows] == [expected, expected]
    assert {name: plan.parameters[name] for name in ("height", "width")} == expected._asdict()


LIST = "4x4, 4x6 or 8x6 (width x height)"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"height": 4, "width": 8}, f"height: must be, with width, {LIST}, and is 8x4"),
        ({"height": 5}, f"height: must, without width, belong to exactly one of {LIST}, and is 5"),
        ({"height": 6}, f"height: must, without width, belong to exactly one of {LIST}, and is 6"),
        ({"width": 4}, f"width: must, without height, belong to exactly one of {LIST}, and is 4"),
        ({"width": -1}, f"width: must, without height, belong to exactly one of {LIST}, and is -1"),
    ],
    ids=str,
)
def test_a_size_that_is_not_served_is_refused_with_the_list(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(SIZES, **fields)
    assert str(refused.value) == said


def test_where_one_size_is_served_the_sentence_is_short() -> None:
    with pytest.raises(Invalid) as refused:
        planned(replace(SERVED, groups=(Group(32, 32),)), height=31)
    assert str(refused.value) == "height: must be that of 32x32 (width x height), and is 31"


@given(
    st.lists(st.builds(Group, st.integers(1, 3), st.integers(1, 3)), min_size=1, unique=True),
    st.none() | st.integers(1, 3),
    st.none() | st.integers(1, 3),
)
def test_a_size_is_completed_exactly_where_it_is_the_only_one(
    groups: list[Group], height: int | None, width: int | None
) -> None:
    fitting = [group for group in groups if height in (None, group.height) and width in (None, group.width)]
    served = replace(SERVED, groups=tuple(groups))
    if height is None and width is None:
        assert planned(served).group == groups[0]
    elif len(fitting) == 1:
        assert planned(served, height=height, width=width).group == fitting[0]
    else:
        with pytest.raises(Invalid, match=rf"(height|width): must.* {groups[0]}"):
            planned(served, height=height, width=width)


def test_recipes_leave_out_the_size_that_the_weights_were_made_for() -> None:
    """So they keep their form, and mean one size on every server of these weights."""
    for served in (SIZES, ONLY_OTHERS):
        native = planned(served, height=4, width=4)
        assert not {"height", "width"} & {*native.canonical, *native.recipes[0]}
    assert planned(SERVED).canonical == planned(SIZES).canonical == planned(SIZES, height=4, width=4).canonical
    plan = planned(SIZES, width=8)
    assert plan.canonical == {**planned(SIZES).canonical, "height": 6, "width": 8}
    assert plan.recipes[0] == {**planned(SIZES).recipes[0], "height": 6, "width": 8}
    default = planned(ONLY_OTHERS)
    assert (default.recipes[0]["height"], default.canonical["width"]) == (8, 8)


def test_an_uploaded_image_picks_its_size() -> None:
    for served, shape, group in (
        (SIZES, (1, 6, 8), Group(6, 8)),
        (SIZES, (1, 6, 4), Group(6, 4)),
        (LATENT_SIZES, (2, 2, 2), Group(4, 4)),
        (LATENT_SIZES, (2, 3, 4), Group(6, 8)),
    ):
        image = np.zeros(shape, np.float32)
        plan = plan_denoise(DenoiseRequest(500), image, served, 300)
        assert (plan.group, plan.rows[0].group) == (group, group)
        assert not {"height", "width"} & plan.recipes[0].keys()
        noisy = plan_noise(NoiseRequest(500), image, served, 300)
        assert noisy.rows[0].start is not None
        assert (noisy.rows[0].start.shape, noisy.group, noisy.rows[0].group) == (shape, group, group)


def test_images_of_the_same_values_and_of_other_sizes_have_other_canonical_forms() -> None:
    """Their hashes are the same."""
    served = replace(SERVED, groups=(Group(4, 8), Group(8, 4), Group(2, 16)))
    images = [np.zeros((1, *group), np.float32) for group in served.groups]
    one, *others = (plan_denoise(DenoiseRequest(500, seed=7), image, served, 300) for image in images)
    for other in others:
        assert other.recipes[0]["image_sha256"] == one.recipes[0]["image_sha256"]
        assert other.canonical != one.canonical


@pytest.mark.parametrize(
    ("served", "shape", "said"),
    [
        (SIZES, (1, 4, 6), f"image: must be {LIST}, and is 6x4"),
        (SERVED, (1, 6, 8), "image: must be 4x4 (width x height), and is 8x6"),
        (LATENT_SIZES, (2, 4, 4), "image: must be latents of 2x2 or 4x3 (width x height), and is 4x4"),
    ],
)
def test_an_uploaded_image_of_another_size_is_refused_with_the_list(
    served: Served, shape: tuple[int, int, int], said: str
) -> None:
    image = np.zeros(shape, np.float32)
    for plan in (
        partial(plan_denoise, DenoiseRequest(500), image, served, 300),
        partial(plan_noise, NoiseRequest(500), image, served, 300),
    ):
        with pytest.raises(Invalid) as refused:
            plan()
        assert str(refused.value) == said


# Sigma schedules.


def test_the_table_has_the_sigma_schedules_of_the_samplers() -> None:
    """The table of fields needs no NumPy, and so it names them itself."""
    assert get_args(SigmaSchedule) == get_args(schedule.SigmaSchedule)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sigma_schedule", get_args(SigmaSchedule))
def test_a_sigma_schedule_is_for_the_samplers_that_know_it(sampler: str, sigma_schedule: SigmaSchedule) -> None:
    fields = {"sampler": sampler, "num_inference_steps": 5, "seed": 7}
    if sigma_schedule in SAMPLERS[sampler].sigma_schedules:
        plain, plan = planned(**fields), planned(**fields, sigma_schedule=sigma_schedule)
        assert plan.recipes[0]["sigma_schedule"] == plan.canonical["sigma_schedule"] == sigma_schedule
        assert "sigma_schedule" not in plain.recipes[0] | plain.canonical
        assert (plan.rows[0].table.lines != plain.rows[0].table.lines).any()
        return
    with pytest.raises(Invalid) as refused:
        planned(**fields, sigma_schedule=sigma_schedule)
    able = ", ".join(name for name, one in SAMPLERS.items() if sigma_schedule in one.sigma_schedules)
    said = f"must be null with {sampler}, and is {sigma_schedule}; it is for {able}"
    assert str(refused.value) == f"sigma_schedule: {said}"


def test_the_weights_own_sigma_schedule_is_in_no_recipe() -> None:
    karras = replace(SERVED, model=replace(MODEL, schedule=MODEL.schedule.with_fields(use_karras_sigmas=True)))
    plans = [planned(karras, sampler="euler", seed=7, sigma_schedule=asked) for asked in (None, "karras")]
    assert plans[0].canonical == plans[1].canonical
    assert planned(karras, sampler="euler", seed=7, sigma_schedule="exponential").canonical != plans[0].canonical


def test_a_sigma_schedule_has_timesteps_of_its_own() -> None:
    with pytest.raises(Invalid) as refused:
        planned(sampler="euler", timesteps=[900, 500], sigma_schedule="karras")
    said = "must be null with sigma_schedule=karras, which has timesteps of its own"
    assert str(refused.value) == f"timesteps: {said}"
    recommended = replace(MODEL.recommended, timesteps=(900, 500), num_inference_steps=2)
    served = replace(SERVED, model=replace(MODEL, recommended=recommended))
    [row] = planned(served, sampler="euler", sigma_schedule="karras").rows
    assert (len(row.table), row.table.timesteps[0]) == (2, 999)


def test_an_eta_is_for_the_samplers_that_take_it() -> None:
    with pytest.raises(Invalid, match=r"^eta: must be 0 with heun, and is 0\.5; it is for ddim, tcd$"):
        planned(sampler="heun", eta=0.5)
    assert planned(sampler="tcd", eta=0.5).rows[0].table.steps[0].is_noisy


# Guidance in a part of the steps.


def guided(interval: Sequence[float] | None, **fields: Any) -> Plan:
    return planned(**{"class_label": 1, "num_inference_steps": 5, **fields}, guidance_interval=interval)


@pytest.mark.parametrize(
    ("interval", "forwards"),
    [
        (None, (2, 2, 2, 2, 2)),
        ([0, 1], (2, 2, 2, 2, 2)),
        ([0.2, 0.8], (1, 2, 2, 2, 1)),
        ([0.21, 0.6], (1, 1, 2, 1, 1)),
        ([0, 0.01], (2, 1, 1, 1, 1)),
        ([0.5, 0.5], (1, 1, 1, 1, 1)),
        ([1, 1], (1, 1, 1, 1, 1)),
    ],
)
def test_guidance_is_on_in_an_interval_of_the_steps(interval: list[float] | None, forwards: tuple[int, ...]) -> None:
    [row] = guided(interval).rows
    assert row.forwards == forwards
    request = DenoiseRequest(900, num_inference_steps=5, class_label=1, guidance_scale=3, guidance_interval=interval)
    assert plan_denoise(request, np.zeros((1, 4, 4), np.float32), SERVED, 300).rows[0].forwards == forwards


def test_a_guided_row_has_a_branch_with_its_label_and_one_without() -> None:
    labelled, bare, off = planned(num_images=3, class_label=[2, None, 0], guidance_interval=[0, 0.5]).rows
    assert labelled.branches == (Condition(2), Condition(None))
    assert (bare.branches, bare.guidance_interval) == ((Condition(None),), (0.0, 1.0))
    assert off.branches == (Condition(0), Condition(None))
    [off] = planned(class_label=2, guidance_scale=1, guidance_interval=[0, 0.5]).rows
    assert (off.branches, off.guidance_interval) == ((Condition(2),), (0.0, 1.0))


def test_only_the_recipes_of_guided_images_have_an_interval() -> None:
    plan = planned(num_images=2, class_label=[2, None], guidance_interval=[0.25, 1])
    assert plan.recipes[0]["guidance_interval"] == plan.canonical["guidance_interval"] == [0.25, 1.0]
    assert "guidance_interval" not in plan.recipes[1]
    assert plan.parameters["guidance_interval"] == [0.25, 1.0]


@pytest.mark.parametrize(
    "fields",
    [{"guidance_interval": [0, 1.0]}, {"guidance_interval": [-0.0, 1]}, {"guidance_scale": 1.0}],
    ids=str,
)
def test_an_interval_that_changes_nothing_is_in_no_recipe(fields: dict[str, Any]) -> None:
    """So such requests share the ETags of those without it, and recipes keep their form."""
    plain = planned(class_label=1, **({"guidance_scale": 1} if "guidance_scale" in fields else {}))
    plan = planned(class_label=1, **{"guidance_interval": [0.2, 0.8], **fields})
    assert plan.canonical == plain.canonical
    assert plan.recipes == plain.recipes
    assert json.dumps(plan.recipes[0]) == json.dumps(plain.recipes[0])


UNLABELLED = replace(SERVED, model=replace(MODEL, num_classes=None, no_label=None, class_names=()))
LABELS_ONLY = replace(SERVED, model=replace(MODEL, no_label=None, recommended=Recommended()))


@pytest.mark.parametrize(
    ("served", "interval", "said"),
    [
        (SERVED, [0.8, 0.2], "must not fall, and is 0.8 to 0.2"),
        (UNLABELLED, [0.2, 0.8], "must be [0, 1]: this model knows no guidance; it is [0.2, 0.8]"),
        (LABELS_ONLY, [0, 0.5], "must be [0, 1]: this model knows no guidance; it is [0.0, 0.5]"),
    ],
)
def test_an_interval_that_means_nothing_is_refused(served: Served, interval: list[float], said: str) -> None:
    with pytest.raises(Invalid) as refused:
        planned(served, guidance_interval=interval)
    assert str(refused.value) == f"guidance_interval: {said}"
    assert planned(served, guidance_interval=[0, 1]).canonical == planned(served).canonical
    with pytest.raises(Invalid):
        plan_denoise(
            DenoiseRequest(500, class_label=1 if served is LABELS_ONLY else None, guidance_interval=interval),
            np.zeros((1, 4, 4), np.float32),
            served,
            300,
        )
