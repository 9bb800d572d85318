"""Noise schedules against diffusers', and the errors of bad ones."""

import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from model.schedule import Float64, Schedule, cosine_betas
from tests.reference import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    scheduler_class,
)

SCHEDULES: list[dict[str, Any]] = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "linear", "beta_start": 0.002, "beta_end": 0.01},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"beta_schedule": "sigmoid", "beta_start": 1e-5, "beta_end": 0.03},
    {"beta_schedule": "laplace"},
]
# diffusers' DDIM lacks these; other schedulers have them.
DDPM_ONLY = ("sigmoid", "laplace")
LENGTHS = [2, 50, 1000, 4000]


def float64(tensor: Any) -> Float64:
    array: Float64 = tensor.double().numpy()
    return array


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("fields", SCHEDULES, ids=str)
def test_schedule_is_that_of_diffusers(fields: dict[str, Any], T: int) -> None:
    schedule = Schedule(num_train_timesteps=T, **fields)
    theirs = [DDPMScheduler(num_train_timesteps=T, **fields)]
    if fields["beta_schedule"] not in DDPM_ONLY:
        theirs.append(DDIMScheduler(num_train_timesteps=T, **fields))
    for scheduler in theirs:
        np.testing.assert_allclose(schedule.betas, float64(scheduler.betas), rtol=1e-6, atol=3e-8)
        expected = float64(scheduler.alphas_cumprod)
        np.testing.assert_allclose(schedule.alphas_cumprod[:-1], expected[:-1], rtol=1e-5)
        # In float32, 1 − β has few digits if β is near 1, such as the last of squaredcos_cap_v2.
        np.testing.assert_allclose(schedule.alphas_cumprod[-1], expected[-1], rtol=3e-5)


# diffusers' warning with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@pytest.mark.parametrize("T", LENGTHS)
def test_exponential_schedule_is_that_of_diffusers(T: int) -> None:
    theirs = scheduler_class("HeunDiscreteScheduler")(num_train_timesteps=T, beta_schedule="exp")
    schedule = Schedule(num_train_timesteps=T, beta_schedule="exp")
    # All β are equal here, so float32 rounds each 1 − β the same way.
    np.testing.assert_allclose(schedule.alphas_cumprod, float64(theirs.alphas_cumprod), rtol=1e-4)
    assert schedule.alphas_cumprod[-1] == pytest.approx(np.exp(-12))


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("fields", SCHEDULES, ids=str)
def test_zero_terminal_snr_is_that_of_diffusers(fields: dict[str, Any], T: int) -> None:
    schedule = Schedule(num_train_timesteps=T, rescale_betas_zero_snr=True, **fields)
    theirs = DDPMScheduler(num_train_timesteps=T, rescale_betas_zero_snr=True, **fields)
    np.testing.assert_allclose(schedule.alphas_cumprod, float64(theirs.alphas_cumprod), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("fields", SCHEDULES, ids=str)
def test_zero_terminal_snr_moves_the_last_to_0_and_keeps_the_first(fields: dict[str, Any], T: int) -> None:
    plain = Schedule(num_train_timesteps=T, **fields)
    rescaled = Schedule(num_train_timesteps=T, rescale_betas_zero_snr=True, **fields)
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0], rel=1e-12)
    # √ᾱ is shifted and scaled, so its differences keep their proportions.
    steps, steps_plain = np.diff(np.sqrt(rescaled.alphas_cumprod)), np.diff(np.sqrt(plain.alphas_cumprod))
    np.testing.assert_allclose(steps, steps_plain * (steps.sum() / steps_plain.sum()), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "fields", [fields for fields in SCHEDULES if fields["beta_schedule"] not in DDPM_ONLY], ids=str
)
def test_sigmas_are_those_of_diffusers(fields: dict[str, Any], zero_snr: bool) -> None:
    """Also the lowest, which hang on the rounding of ᾱ to float32. diffusers rounds more where it rescales betas."""
    theirs = EulerDiscreteScheduler(rescale_betas_zero_snr=zero_snr, **fields).sigmas.double().numpy()[-2::-1]
    ours = Schedule(rescale_betas_zero_snr=zero_snr, **fields).sigmas
    np.testing.assert_allclose(ours, theirs, rtol=3e-3 if zero_snr else 4e-6)
    if zero_snr:
        assert ours[-1] == pytest.approx(4096, rel=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_trained_betas(zero_snr: bool) -> None:
    betas = np.random.default_rng(0).uniform(1e-4, 0.03, 300).tolist()
    fields = {"trained_betas": betas, "num_train_timesteps": 300, "rescale_betas_zero_snr": zero_snr}
    schedule = Schedule.model_validate(json.loads(json.dumps(fields)))
    if not zero_snr:
        assert schedule.betas.tolist() == betas
    for scheduler in (DDPMScheduler(**fields), DDIMScheduler(**fields)):
        np.testing.assert_allclose(schedule.alphas_cumprod, float64(scheduler.alphas_cumprod), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fields", SCHEDULES, ids=str)
def test_alpha_bar_is_the_running_product(fields: dict[str, Any]) -> None:
    schedule = Schedule(num_train_timesteps=30, **fields)
    product = 1.0
    for beta, alpha_bar in zip(schedule.betas, schedule.alphas_cumprod, strict=True):
        product *= 1 - beta
        assert alpha_bar == pytest.approx(product, rel=1e-14)
    assert (np.diff(schedule.alphas_cumprod) < 0).all()


def test_cosine_betas_are_capped() -> None:
    """Only the last β is capped, because the paper's ᾱ is 0 there."""
    betas = cosine_betas(1000)
    assert betas[-1] == 0.999
    assert betas[-2] < 0.999
    alpha_bar = (
        np.cos((np.arange(1, 1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    )
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], alpha_bar, rtol=1e-9)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_defaults_are_those_of_diffusers(scheduler: Any) -> None:
    theirs = dict(scheduler().config)
    ours = {name: value for name, value in Schedule().model_dump().items() if name in theirs}
    assert ours.pop("timestep_spacing") is None  # each sampler's own default: test_samplers.py
    assert ours.pop("set_alpha_to_one", None) is None  # likewise: test_schedulers.py
    assert ours == {name: theirs[name] for name in ours}


def test_fields_of_lcm_alone_have_its_defaults() -> None:
    theirs, ours = LCMScheduler().config, Schedule()
    for field in ("original_inference_steps", "timestep_scaling"):
        assert getattr(ours, field) == theirs[field]


def test_every_field_is_one_of_diffusers() -> None:
    classes = DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
    assert Schedule.model_fields.keys() <= {name for scheduler in classes for name in scheduler().config}


@pytest.mark.parametrize(
    ("fields", "clips"),
    [
        ({}, False),
        ({"clip_sample": True}, True),
        ({"clip_sample": False}, False),
        ({"clip_sample_range": 2.0}, False),
    ],
)
def test_multistep_clips_only_where_the_config_says_so(fields: dict[str, Any], clips: bool) -> None:
    assert Schedule(**fields).clips_multistep is clips


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        ({"trained_betas": [0.1] * 3}, (), "trained_betas has 3 values, and num_train_timesteps is 1000"),
        ({"trained_betas": [], "num_train_timesteps": 2}, (), "trained_betas has 0 values"),
        ({"trained_betas": [1.0, 0.5], "num_train_timesteps": 2}, (), "trained_betas.0 is 1, and must lie"),
        ({"trained_betas": [0.5, 0.0], "num_train_timesteps": 2}, (), "trained_betas.1 is 0, and must lie"),
        ({"trained_betas": [float("nan"), 0.5], "num_train_timesteps": 2}, (), "trained_betas.0 is nan, and must lie"),
        ({"trained_betas": ["0.1", 0.5], "num_train_timesteps": 2}, ("trained_betas", 0), "valid number"),
        ({"trained_betas": 0.1}, ("trained_betas",), "valid tuple"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, (), "num_train_timesteps is 1, and"),
        ({"use_karras_sigmas": True, "num_train_timesteps": 1}, (), "must be at least 2 with use_karras_sigmas"),
        ({"use_exponential_sigmas": True, "num_train_timesteps": 1}, (), "at least 2 with use_exponential_sigmas"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, (), "and only one of them may be"),
        ({"sigma_min": 0.0}, ("sigma_min",), "greater than 0"),
        ({"interpolation_type": "cubic"}, ("interpolation_type",), "'linear' or 'log_linear'"),
        ({"beta_shedule": "linear"}, ("beta_shedule",), "not permitted"),
        ({"beta_schedule": "cosine"}, ("beta_schedule",), "'laplace' or 'exp'"),
        ({"prediction_type": "eps"}, ("prediction_type",), "'epsilon', 'v_prediction' or 'sample'"),
        ({"timestep_spacing": "even"}, ("timestep_spacing",), "'leading', 'trailing' or 'linspace'"),
        ({"variance_type": "learned"}, ("variance_type",), "'fixed_large_log' or 'learned_range'"),
        ({"num_train_timesteps": "1000"}, ("num_train_timesteps",), "valid integer"),
        ({"num_train_timesteps": 1000.0}, ("num_train_timesteps",), "valid integer"),
        ({"num_train_timesteps": True}, ("num_train_timesteps",), "valid integer"),
        ({"num_train_timesteps": 0}, ("num_train_timesteps",), "greater than or equal to 1"),
        ({"num_train_timesteps": 100_001}, ("num_train_timesteps",), "less than or equal to 100000"),
        ({"beta_start": "0.1"}, ("beta_start",), "valid number"),
        ({"beta_end": 1.0}, ("beta_end",), "less than 1"),
        ({"beta_end": float("nan")}, ("beta_end",), "less than 1"),
        ({"clip_sample": "true"}, ("clip_sample",), "valid boolean"),
        ({"clip_sample": 1}, ("clip_sample",), "valid boolean"),
        ({"clip_sample_range": 0.0}, ("clip_sample_range",), "greater than 0"),
        ({"dynamic_thresholding_ratio": 1.5}, ("dynamic_thresholding_ratio",), "less than or equal to 1"),
        ({"sample_max_value": 0.0}, ("sample_max_value",), "greater than 0"),
        ({"steps_offset": -1}, ("steps_offset",), "greater than or equal to 0"),
        ({"original_inference_steps": 0}, ("original_inference_steps",), "greater than or equal to 1"),
        ({"timestep_scaling": 0.0}, ("timestep_scaling",), "greater than 0"),
        ({"timestep_scaling": float("inf")}, ("timestep_scaling",), "less than or equal to 1000000"),
        ({"timestep_scaling": 1e300}, ("timestep_scaling",), "less than or equal to 1000000"),
    ],
)  # fmt: skip
def test_refused(fields: dict[str, Any], where: tuple[str | int, ...], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        Schedule.model_validate(fields)
    [error] = refusal.value.errors()
    assert error["loc"] == where
    assert message in error["msg"]


def test_schedules_are_equal_by_their_fields() -> None:
    one, same, other = Schedule(), Schedule(beta_start=0.0001), Schedule(beta_start=0.0002)
    for schedule in (one, same, other):
        assert len(schedule.alphas_cumprod) == 1000
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
