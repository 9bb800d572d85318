"""Which steps a request's rows take: the sampler, and the table of its steps."""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from model.description import ModelDescription
from model.grids import GridError
from model.samplers import SAMPLERS, StepTable, denoise_table, left_out, sample_table
from model.schedule import SigmaSchedule
from service.errors import Invalid
from service.plan.fields import DenoiseRequest, Drawing, Sample

_DISTILLED = "which these weights were distilled for"


class Steps(NamedTuple):
    """The steps of a request.

    Attributes:
        grid: the number of steps, or the timesteps themselves.
        sigma_schedule: None for that of the weights.
    """

    sampler: str
    eta: float
    grid: int | tuple[int, ...]
    table: StepTable
    sigma_schedule: SigmaSchedule | None = None


def of_sample(request: Sample, model: ModelDescription, strength: float | None = None) -> Steps:
    """The steps of POST /sample.

    Args:
        strength: the share of the steps that is taken, for rows that begin from an image; None for others.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    sampler = _sampler(request, model)
    eta = _eta(request, sampler)
    sigma_schedule = _sigma_schedule(request, sampler, model)
    grid = _grid(request, sampler, model)
    field = "num_inference_steps" if isinstance(grid, int) else "timesteps"
    try:
        begin = 0 if strength is None else _left_out(strength, sampler, grid, model)
        table = sample_table(model.schedule, sampler, grid, eta, sigma_schedule, begin)
    except GridError as error:
        raise Invalid.field(field, str(error)) from None
    if table.timesteps[-1] < model.first_timestep:
        raise Invalid.field(
            field,
            f"{grid} steps of {sampler} end at timestep {table.timesteps[-1]:g}, "
            f"and this network knows those from {model.first_timestep} on",
        )
    own = model.schedule.sigma_schedule
    return Steps(sampler, eta, grid, table, None if sigma_schedule == own else sigma_schedule)


def of_denoise(request: DenoiseRequest, model: ModelDescription) -> Steps:
    """The steps of POST /denoise.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    N, t = request.num_inference_steps, request.timestep
    _check_steps(N, max(1, t), f" at timestep {t}", model)
    sampler = _sampler(request, model)
    eta = _eta(request, sampler)
    table = denoise_table(model.schedule, sampler, t, 1 if request.output == "model_output" else N, eta)
    return Steps(sampler, eta, N, table.first(SAMPLERS[sampler].order) if request.output == "previous" else table)


def check_range(name: str, value: int, low: int, high: int, why: str = "") -> None:
    """Raise Invalid unless a field's value is within its limits."""
    if not low <= value <= high:
        raise Invalid.field(name, f"must be {low} to {high}{why}, and is {value}")


def _sampler(request: Drawing, model: ModelDescription) -> str:
    sampler = request.sampler or model.recommended.sampler
    if request.sampler == "" or sampler not in SAMPLERS:
        raise Invalid.field("sampler", f"must be one of {', '.join(SAMPLERS)}, and is {request.sampler!r}")
    if model.distilled is not None and sampler != model.distilled.sampler:
        raise Invalid.field("sampler", f"must be {model.distilled.sampler}, {_DISTILLED}, and is {sampler}")
    return sampler


def _eta(request: Drawing, sampler: str) -> float:
    if request.eta and not SAMPLERS[sampler].takes_eta:
        able = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise Invalid.field("eta", f"must be 0 with {sampler}, and is {request.eta:g}; it is for {able}")
    return abs(float(request.eta))  # -0.0 is 0.0


def _sigma_schedule(request: Sample, sampler: str, model: ModelDescription) -> SigmaSchedule | None:
    asked = request.sigma_schedule
    if asked is None:
        return None
    if model.distilled is not None:
        raise Invalid.field("sigma_schedule", f"must be null: num_inference_steps names the timesteps {_DISTILLED}")
    if asked not in SAMPLERS[sampler].sigma_schedules:
        able = ", ".join(name for name, other in SAMPLERS.items() if asked in other.sigma_schedules)
        raise Invalid.field("sigma_schedule", f"must be null with {sampler}, and is {asked}; it is for {able}")
    return asked


def _grid(request: Sample, sampler: str, model: ModelDescription) -> int | tuple[int, ...]:
    """The number of steps, or the timesteps themselves."""
    asked, timesteps = request.num_inference_steps, request.timesteps
    if asked is None and timesteps is None and request.sigma_schedule is None and _takes_recommended(sampler, model):
        timesteps = model.recommended.timesteps
    if timesteps is None:
        steps = model.recommended.num_inference_steps if asked is None else asked
        _check_steps(steps, model.schedule.num_train_timesteps, "", model)
        return steps
    if asked is not None:
        raise Invalid.field("timesteps", f"must not be given beside num_inference_steps, which is {asked}")
    if model.distilled is not None:
        raise Invalid.field("timesteps", f"must be null: num_inference_steps names the timesteps {_DISTILLED}")
    for before, after in pairwise(timesteps):
        if after >= before:
            raise Invalid.field("timesteps", f"must fall from each to the next, and {after} comes after {before}")
    return tuple(timesteps)


def _left_out(strength: float, sampler: str, grid: int | tuple[int, ...], model: ModelDescription) -> int:
    """How many of the first steps are left out."""
    begin, every = (left_out(model.schedule, sampler, grid, share) for share in (strength, 0.0))
    if begin == every:
        least = math.ceil(1000 / every) / 1000
        raise Invalid.field("strength", f"must be at least {least:g} to take one of {every} steps, and is {strength:g}")
    return begin


def _takes_recommended(sampler: str, model: ModelDescription) -> bool:
    """Whether there are recommended timesteps, and the sampler takes a list."""
    timesteps, through = model.recommended.timesteps, SAMPLERS[sampler].through
    if timesteps is None or through is None:
        return False
    try:
        through(model.schedule, np.array(timesteps, np.int64))
    except GridError:
        return False
    return True


def _check_steps(steps: int, most: int, why: str, model: ModelDescription) -> None:
    if model.distilled is not None and steps not in model.distilled.num_inference_steps:
        *others, last = map(str, model.distilled.num_inference_steps)
        counts = f"{', '.join(others)} or {last}" if others else last
        raise Invalid.field("num_inference_steps", f"must be {counts}, {_DISTILLED}, and is {steps}")
    check_range("num_inference_steps", steps, 1, most, why)
