"""Refusals: one sentence with only the necessary words."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest

from model.description import Distilled, Recommended
from model.rows import Image
from service.errors import Invalid
from service.plan.fields import DenoiseRequest, NoiseRequest, Scaling
from service.plan.plan import noised, plan_denoise
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
            "timesteps: must be null: num_inference_steps names the timesteps which these weights were distilled for",
        ),
        ({"sampler": "euler"}, "sampler: must be one of ddim, ddpm, dpmpp_2m, and is 'euler'"),
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
    noisy, seed = noised(request, latents, replace(LATENT, first_draw=first_draw))
    alpha_bar = LATENT.model.schedule.alphas_cumprod[500]
    expected = np.sqrt(alpha_bar) * latents + np.sqrt(1 - alpha_bar) * 3
    np.testing.assert_allclose(noisy * (np.sqrt(alpha_bar) if scaling == "additive" else 1), expected, rtol=1e-6)
    assert seed == 7
    assert drawn == [(7, (2, 2, 2))]
