"""The table of request fields: each field's name, type, default, limits, readers and help, once.

Each request is a dataclass. Each annotation with an Entry is a line of the table. These follow from the table:

- the checks of JSON, queries and forms, and /openapi.json: service/http/models.py
- recipes and ETags: service/plan/plan.py
- the client's arguments: stepwise/requests.py
- the command line's options: stepwise/cli/options.py
- the page's controls, by way of /openapi.json

The client imports this module, so the module needs only the standard library.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from service.plan.entries import Entry
from service.plan.shared_fields import (
    MAX_GUIDANCE,
    MAX_PROMPT,
    ClipSkip,
    CropsCoordsTopLeft,
    Emphasis,
    GuidanceInterval,
    GuidanceRescale,
    Label,
    NegativeCropsCoordsTopLeft,
    NegativeOriginalSize,
    NegativeTargetSize,
    OriginalSize,
    ScalingOfNoise,
    Seed,
    TargetSize,
)

MAX_IMAGES = 4096  # the most images that a setting can allow in one request

SigmaSchedule = Literal["karras", "exponential", "normal"]
Output = Literal["x0", "model_output", "previous"]
Fit = Literal["stretch", "crop"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The fields that /sample and /denoise share.

    The repr of a request has no prompt, because an error or a log may show it.
    """

    seed: Seed = None
    sampler: Annotated[
        str | None, Entry(help="Sampler by name, as GET /info lists them. Default: what the weights recommend.")
    ] = None
    eta: Annotated[
        float,
        Entry(
            help="Noise in the steps of ddim, and γ of tcd. Other samplers take 0 alone.",
            ge=0,
            le=1,
            refused="more than 0 for another `sampler`",
        ),
    ] = 0.0
    timeout_s: Annotated[
        float | None,
        Entry(
            help="Seconds after which the server gives up, waiting included. Default: the server's limit.",
            gt=0,
            le="timeout",
            decides="neither",
            refused="too short for this work even on an idle server",
            flags=("--timeout",),
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Sample(Drawing):
    """POST and GET /sample: images to generate."""

    prompt: Annotated[
        str | Sequence[str] | None,
        Entry(
            help="What is drawn, in words, for models with text. Several: one for each image.",
            max_bytes=MAX_PROMPT,
            refused=f"more than {MAX_PROMPT} bytes in UTF-8; a list that is not as long as `num_images`; "
            "any for a model without text",
            is_optional=True,
            flags=("--prompt", "-p"),
        ),
    ] = field(default=None, repr=False)
    negative_prompt: Annotated[
        str | Sequence[str | None] | None,
        Entry(
            help="What guidance leads away from, in words. Several: one for each image. Default: the empty text, or "
            "for models such as SDXL no text at all.",
            max_bytes=MAX_PROMPT,
            refused="as `prompt`; any for a model that has guidance embedded",
            is_optional=True,
            flags=("--negative", "--negative-prompt"),
        ),
    ] = field(default=None, repr=False)
    emphasis: Emphasis = "none"
    clip_skip: ClipSkip = 0
    num_images: Annotated[
        int,
        Entry(
            help="How many images. Image i is the image of seed + i.",
            ge=1,
            le="max_images",
            decides="answer",
            flags=("--num-images", "-n"),
        ),
    ] = 1
    num_inference_steps: Annotated[
        int | None,
        Entry(
            help="How many steps. Default: what the weights recommend.",
            ge=1,
            le="most_steps",
            refused="a number that does not fit the `sampler`; in /denoise more than `timestep`",
            flags=("--steps", "--num-inference-steps"),
        ),
    ] = None
    timesteps: Annotated[
        Sequence[int] | None,
        Entry(
            help="The timesteps themselves, each below the one before, in the place of num_inference_steps.",
            ge="first_timestep",
            le="last_timestep",
            refused="a list that does not fall, or beside `num_inference_steps`, or for distilled weights, "
            "or with a `sampler` that takes none",
            is_optional=True,
        ),
    ] = None
    sigma_schedule: Annotated[
        SigmaSchedule | None,
        Entry(
            help="How the noise falls from step to step. Default: as the weights' scheduler says.",
            refused="any with a `sampler` whose scheduler knows none, beside `timesteps`, or for distilled weights",
            is_optional=True,
        ),
    ] = None
    class_label: Annotated[
        Label | Sequence[Label],
        Entry(
            help="Class by name or index, or none. Several: one for each image.",
            refused="a list that is not as long as `num_images`; any but null for a model without classes",
            flags=("--class-label", "-c"),
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Entry(
            help="Classifier-free guidance: 1 and less is off. A model of classes needs a label for more. "
            "Default: what the weights recommend.",
            ge=0,
            le=MAX_GUIDANCE,
            refused="more than 1 without a `class_label`, except for models with text",
            flags=("--guidance-scale", "-g"),
        ),
    ] = None
    guidance_rescale: GuidanceRescale = 0.0
    guidance_interval: GuidanceInterval = None
    height: Annotated[
        int | None,
        Entry(
            help="Pixels. With `width`, one of the sizes that GET /info lists. Default: the first of them.",
            refused="a value that makes, with `width`, none of the `sizes`",
            is_optional=True,
        ),
    ] = None
    width: Annotated[
        int | None,
        Entry(
            help="Pixels. With `height`, one of the sizes that GET /info lists.",
            refused="a value that makes, with `height`, none of the `sizes`",
            is_optional=True,
        ),
    ] = None
    original_size: OriginalSize = None
    target_size: TargetSize = None
    crops_coords_top_left: CropsCoordsTopLeft = None
    negative_original_size: NegativeOriginalSize = None
    negative_target_size: NegativeTargetSize = None
    negative_crops_coords_top_left: NegativeCropsCoordsTopLeft = None
    strength: Annotated[
        float | None,
        Entry(
            help="How far an image is drawn anew: the share of the steps that is taken, the last ones. Default: 0.8, "
            "with a mask 1.",
            gt=0,
            le=1,
            refused="any without an image; one with no step left",
            is_optional=True,
        ),
    ] = None
    fit: Annotated[
        Fit,
        Entry(
            help="How an image of another size, and its mask, becomes one of `height` and `width`: stretch, or crop "
            "from the middle.",
            refused="crop without an image",
            is_optional=True,
        ),
    ] = "stretch"
    paste_original: Annotated[
        bool,
        Entry(
            help="Whether what is black in the mask comes back exactly as it is in the fitted image. A seam of 8 "
            "pixels inside of the mask blends both.",
            refused="true without a mask, or where latents are answered",
            is_optional=True,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class SampleRequest(Sample):
    """All fields of /sample, with those for event streams."""

    preview_every: Annotated[
        int,
        Entry(
            help="In an event stream, a preview each so many steps; 0 is none.",
            ge=0,
            le="most_steps",
            decides="neither",
            refused="more than the steps",
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Denoise(Drawing):
    """POST /denoise: a noisy image and a timestep. The request carries the image beside these fields."""

    timestep: Annotated[
        int,
        Entry(
            help="How noisy the image is: 0 is almost clean, the last timestep almost noise.",
            ge="first_timestep",
            le="last_timestep",
            flags=("--timestep", "-t"),
        ),
    ] = field(kw_only=False)
    value_range: Annotated[
        float, Entry(help="r: the values 0 … max of a PNG stand for −r … r.", ge=1, le=16, decides="neither")
    ] = 1.0
    scaling: ScalingOfNoise = "variance_preserving"
    num_inference_steps: Annotated[
        int,
        Entry(
            help="How many steps, at most max(1, timestep). One step is the model's estimate from one evaluation.",
            ge=1,
            le="longest_walk",
            flags=("--steps", "--num-inference-steps"),
        ),
    ] = 1
    prompt: Annotated[
        str | None,
        Entry(
            help="What the image shows, in words, for models with text.",
            max_bytes=MAX_PROMPT,
            is_optional=True,
            flags=("--prompt", "-p"),
        ),
    ] = field(default=None, repr=False)
    negative_prompt: Annotated[
        str | None,
        Entry(
            help="What guidance leads away from, in words. Default: the empty text, or for models such as SDXL no text "
            "at all.",
            max_bytes=MAX_PROMPT,
            is_optional=True,
            flags=("--negative", "--negative-prompt"),
        ),
    ] = field(default=None, repr=False)
    clip_skip: ClipSkip = 0
    class_label: Annotated[Label, Entry(help="Class by name or index, or none.", flags=("--class-label", "-c"))] = None
    guidance_scale: Annotated[
        float | None,
        Entry(
            help="Classifier-free guidance: 1 and less is off. A model of classes needs a label for more. Default: 1.",
            ge=0,
            le=MAX_GUIDANCE,
            flags=("--guidance-scale", "-g"),
        ),
    ] = None
    guidance_rescale: GuidanceRescale = 0.0
    guidance_interval: GuidanceInterval = None
    original_size: OriginalSize = None
    target_size: TargetSize = None
    crops_coords_top_left: CropsCoordsTopLeft = None
    negative_original_size: NegativeOriginalSize = None
    negative_target_size: NegativeTargetSize = None
    negative_crops_coords_top_left: NegativeCropsCoordsTopLeft = None


@dataclass(frozen=True, kw_only=True)
class DenoiseRequest(Denoise):
    """All fields of /denoise, with the kind of the answer."""

    output: Annotated[
        Output,
        Entry(
            help="x0: the clean image. As .npy, model_output: what the network predicts; previous: x after one step."
        ),
    ] = "x0"


@dataclass(frozen=True, kw_only=True)
class Noise:
    """POST /noise: a clean image and a timestep. The request carries the image beside these fields."""

    timestep: Annotated[
        int,
        Entry(
            help="How noisy the image becomes: 0 is almost clean, the last timestep almost noise.",
            ge=0,
            le="last_timestep",
            flags=("--timestep", "-t"),
        ),
    ] = field(kw_only=False)
    scaling: ScalingOfNoise = "variance_preserving"
    seed: Seed = None


@dataclass(frozen=True, kw_only=True)
class NoiseRequest(Noise):
    """All fields of /noise, with those for PNGs."""

    value_range: Annotated[
        float,
        Entry(help="r: the values 0 … max of the noisy PNG stand for −r … r. Values beyond are clipped.", ge=1, le=16),
    ] = 1.0
