"""What clients may send: every field, its type and its limits, once.

Limits that depend on the model or on a setting are checked in planning.py, at both ends. Types are strict; text from
queries and forms is turned into numbers first (reading.py).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

MAX_IMAGES = 4096  # that a setting can allow in one request
MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps

# What the documentation says of fields whose limits planning.py checks.
_FROM_0: JsonDict = {"minimum": 0}
_FROM_1: JsonDict = {"minimum": 1}


def _whole(value: object) -> object:
    """JSON has but one kind of number: 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_SEED else value


# Checked ahead of the unions, whose own errors would come once for each of their members.
def _is_label(value: object) -> bool:
    return value is None or (isinstance(value, int | str) and not isinstance(value, bool))


def _check_label(value: object) -> object:
    value = _whole(value)
    if not _is_label(value):
        raise PydanticCustomError("label", "must be an integer, a name or null")
    return value


def _check_labels(value: object) -> object:
    value = [_whole(label) for label in value] if isinstance(value, list) else _whole(value)
    labels = value if isinstance(value, list) else [value]
    if len(labels) > MAX_IMAGES:
        raise PydanticCustomError("labels", "must be one label, or a list with one for each image")
    if not all(_is_label(label) for label in labels):
        raise PydanticCustomError("labels", "must be an integer, a name, null, or a list of these")
    return value


Label = Annotated[int | str | None, BeforeValidator(_check_label)]
Labels = Annotated[int | str | list[int | str | None] | None, BeforeValidator(_check_labels)]


class Strict(BaseModel):
    """Unknown fields and other types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    _integers = field_validator(
        "seed", "timestep", "num_images", "num_inference_steps", "preview_every", mode="before", check_fields=False
    )(_whole)


class Request(Strict):
    """The fields that /sample and /denoise share."""

    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of the noise; drawn by the server if null")
    sampler: str | None = Field(None, description="a name from /info; null is the weights' recommendation")
    eta: float = Field(0.0, ge=0, le=1, description="noise of DDIM's steps; 0 for other samplers")
    guidance_scale: float | None = Field(
        None, ge=1, le=20, description="classifier-free guidance; 1 is off and needs no label"
    )
    timeout_s: float | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0},
        description="give up after so many seconds; at most TIMEOUT, the default",
    )


class SampleRequest(Request):
    """POST /sample: images to generate."""

    num_images: int = Field(
        1, json_schema_extra=_FROM_1, description="image i is the image of seed + i; at most MAX_IMAGES"
    )
    num_inference_steps: int | None = Field(
        None,
        json_schema_extra=_FROM_1,
        description="at most the model's num_train_timesteps; null is the weights' recommendation",
    )
    class_label: Labels = Field(None, description="a class by index or name, null for none, or a list: one an image")
    preview_every: int = Field(
        0, json_schema_extra=_FROM_0, description="with text/event-stream: a preview each so many steps"
    )


class DenoiseRequest(Request):
    """POST /denoise: a noisy image and a timestep. The image itself comes beside these fields."""

    timestep: int = Field(
        json_schema_extra=_FROM_0, description="how noisy the image is: below the model's num_train_timesteps"
    )
    value_range: float = Field(1.0, ge=1, le=16, description="a PNG's values 0…max stand for -r…r")
    scaling: Literal["variance_preserving", "additive"] = Field(
        "variance_preserving", description="additive: the image is x_0 + sigma_t·noise, and is scaled first"
    )
    num_inference_steps: int = Field(1, json_schema_extra=_FROM_1, description="at most max(1, timestep)")
    output: Literal["x0", "model_output", "previous"] = Field(
        "x0", description="the clean image; what the network predicts; or x after the first step"
    )
    class_label: Label = Field(None, description="a class by index or name, null for none")


class NoiseRequest(Strict):
    """POST /noise: a clean image and a timestep. The image itself comes beside these fields."""

    timestep: int = Field(
        json_schema_extra=_FROM_0, description="how noisy the image becomes: below the model's num_train_timesteps"
    )
    value_range: float = Field(
        1.0, ge=1, le=16, description="the answer's values 0…max stand for -r…r; a clean PNG's for -1…1"
    )
    scaling: Literal["variance_preserving", "additive"] = Field(
        "variance_preserving", description="additive: x_0 + sigma_t·noise"
    )
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="of the noise; drawn by the server if null")
