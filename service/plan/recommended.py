"""The setting RECOMMENDED: the defaults of requests, in the place of those that the files of the weights tell.

Weights for few steps cannot be told from their files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from model.description import ModelDescription
from service.errors import Invalid
from service.plan import steps
from service.plan.fields import Sample
from service.plan.guidance import is_guidable
from service.plan.shared_fields import MAX_GUIDANCE

EXAMPLE = "sampler=euler,steps=4,guidance=0"

_FEW = 8  # steps
_TIMESTEPS = re.compile(r"\d{1,6}(/\d{1,6})*", re.ASCII)
_COUNT = re.compile(r"[1-9]\d{0,5}", re.ASCII)
_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?", re.ASCII)


class Wanted(NamedTuple):
    """The recommendation of an operator. None for what the files of the weights tell."""

    sampler: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    timesteps: tuple[int, ...] | None = None


# The names of the setting: those of the fields, and two short ones.
_FIELDS: Mapping[str, str] = {
    **dict(zip(Wanted._fields, Wanted._fields, strict=True)),
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}


def parse(text: str) -> Wanted:
    """Read the setting.

    Raises:
        ValueError: says what is wrong.
    """
    found: dict[str, Any] = {}
    for part in map(str.strip, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name in _FIELDS and value):
            raise ValueError(f"must be like {EXAMPLE}, and has {part[:40]!r}")
        field = _FIELDS[name]
        if field in found:
            raise ValueError(f"must name {name} once")
        found[field] = _read(name, field, value)
    if {"num_inference_steps", "timesteps"} <= found.keys():
        raise ValueError("must name steps or timesteps, and not both")
    return Wanted(**found)


def applied(model: ModelDescription, wanted: Wanted) -> ModelDescription:
    """The model with these recommendations.

    Raises:
        ValueError: the model cannot draw so. The message says why.
    """
    given = {name: value for name, value in wanted._asdict().items() if value is not None}
    if wanted.timesteps is not None:
        _check_known(wanted.timesteps, model)
        given["num_inference_steps"] = len(wanted.timesteps)
    recommended = replace(model.recommended, **given)
    if recommended.guidance_scale > 1 and not is_guidable(model):
        raise ValueError(
            f"guidance must be at most 1, because this model knows none; it is {recommended.guidance_scale:g}"
        )
    request = Sample(
        sampler=recommended.sampler,
        num_inference_steps=recommended.num_inference_steps if recommended.timesteps is None else None,
        timesteps=recommended.timesteps,
    )
    try:
        steps.of_sample(request, model)
    except Invalid as error:
        raise ValueError(str(error)) from None
    return replace(model, recommended=recommended)


def doubt(model: ModelDescription, wanted: Wanted | None) -> str | None:
    """A sentence if the weights may be for few steps, and what is recommended is not for such; else None.

    Args:
        model: with the recommendations in force.
        wanted: the setting. What it names leaves no doubt.
    """
    wanted = wanted or Wanted()
    return _doubt_of_steps(model, wanted) if model.embeds_guidance else _doubt_of_guidance(model, wanted)


def _doubt_of_steps(model: ModelDescription, wanted: Wanted) -> str | None:
    sampler, steps = model.recommended.sampler, model.recommended.num_inference_steps
    named = wanted.num_inference_steps is not None or wanted.timesteps is not None
    if named or steps <= _FEW:
        return None
    few = wanted._replace(sampler="lcm", num_inference_steps=4)
    return (
        f"{model.name}: its network has guidance embedded, as weights for few steps have (LCM), and requests get "
        f"{steps} steps of {sampler}: set {_written(few)}, or what the weights' page says; "
        f"{_written(wanted._replace(num_inference_steps=steps))} keeps the steps"
    )


def _doubt_of_guidance(model: ModelDescription, wanted: Wanted) -> str | None:
    schedule, recommended = model.schedule, model.recommended
    if model.text is None or recommended.guidance_scale <= 1 or wanted.guidance_scale is not None:
        return None
    if recommended.sampler == "lcm":
        sign = "its sampler is lcm"
    elif schedule.timestep_spacing == "trailing" and not schedule.rescale_betas_zero_snr:
        sign = "its scheduler has timestep_spacing trailing"
    else:
        return None
    none = wanted._replace(guidance_scale=0.0)
    if wanted.num_inference_steps is None and wanted.timesteps is None:
        none = none._replace(num_inference_steps=4)
    same = wanted._replace(guidance_scale=recommended.guidance_scale)
    return (
        f"{model.name}: {sign}, a sign of weights for few steps (turbo, Lightning, LCM), and requests get guidance "
        f"{recommended.guidance_scale:g}: set {_written(none)}, or what the weights' page says; "
        f"{_written(same)} keeps the guidance"
    )


def _written(wanted: Wanted) -> str:
    """The setting, with all that the operator has named already."""
    named = {
        "sampler": wanted.sampler,
        "steps": wanted.num_inference_steps,
        "timesteps": None if wanted.timesteps is None else "/".join(map(str, wanted.timesteps)),
        "guidance": None if wanted.guidance_scale is None else f"{wanted.guidance_scale:g}",
    }
    return "STEPWISE_RECOMMENDED=" + ",".join(f"{name}={value}" for name, value in named.items() if value is not None)


def _check_known(timesteps: Sequence[int], model: ModelDescription) -> None:
    first, last = model.first_timestep, model.schedule.num_train_timesteps - 1
    for timestep in timesteps:
        if not first <= timestep <= last:
            raise ValueError(f"timesteps must be {first} to {last}, and have {timestep}")


def _read(name: str, field: str, value: str) -> str | int | float | tuple[int, ...]:
    match field:
        case "timesteps":
            if not _TIMESTEPS.fullmatch(value):
                raise ValueError(f"{name} must be integers with slashes between, as 999/749, and is {value[:40]!r}")
            return tuple(map(int, value.split("/")))
        case "num_inference_steps":
            if not _COUNT.fullmatch(value):
                raise ValueError(f"{name} must be an integer from 1 on, and is {value[:40]!r}")
            return int(value)
        case "guidance_scale":
            if not _NUMBER.fullmatch(value) or float(value) > MAX_GUIDANCE:
                raise ValueError(f"{name} must be a number from 0 to {MAX_GUIDANCE}, and is {value[:40]!r}")
            return float(value)
    return value
