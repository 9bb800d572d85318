"""The table of request fields: each field's name, type, default, limits, readers and help, once.

Each request is a dataclass. Each annotation with an Entry is a line of the table. These follow from the table:

- the checks of JSON, queries and forms, and /openapi.json: service/http/models.py
- recipes and ETags: service/plan/plan.py
- the client's arguments: stepwise/requests.py
- the command line's options: stepwise/cli/options.py
- the page's controls, by way of /openapi.json

The client imports this module, so the module needs only the standard library.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

MAX_IMAGES = 4096  # the most images that a setting can allow in one request
MAX_SEED = 2**53 - 1  # the largest integer that every JSON parser keeps exactly

Label = int | str | None
Scaling = Literal["variance_preserving", "additive"]
Output = Literal["x0", "model_output", "previous"]

# A number, or the name of a limit. A named limit depends on the model or on a setting: service/plan/limits.py.
Limit = float | str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The properties of a field beside its name, type and default.

    Attributes:
        help: the meaning of the field, for every reader.
        ge: the least value; for a list, the least value of a member.
        gt: an exclusive lower bound.
        le: the greatest value, for a list of a member.
        decides: whether the field changes the bytes of each image, the bytes of the whole answer, or neither. Recipes
            keep fields of the first kind. ETags depend on fields of the first two kinds.
        refused: values within the limits that are refused all the same.
        is_optional: recipes and other documents leave the field out if it is null.
        flags: of the command line; by default the field's name.
    """

    help: str
    ge: Limit | None = None
    gt: Limit | None = None
    le: Limit | None = None
    decides: Literal["image", "answer", "neither"] = "image"
    refused: str = ""
    is_optional: bool = False
    flags: tuple[str, ...] = ()


Seed = Annotated[
    int | None,
    Entry(
        help="Seed of the noise. The server draws one if none is given.",
        ge=0,
        le=MAX_SEED,
        refused="more than 2^53 − `num_images`",
        flags=("--seed", "-s"),
    ),
]
ScalingOfNoise = Annotated[
    Scaling,
    Entry(
        help="variance_preserving: the noisy image is √ᾱ·x_0 + √(1−ᾱ)·noise. "
        "additive: it is x_0 + σ·noise, as camera noise is.",
        refused="`additive` at a `timestep` of pure noise",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The fields that /sample and /denoise share."""

    seed: Seed = None
    sampler: Annotated[
        str | None, Entry(help="Sampler by name, as GET /info lists them. Default: what the weights recommend.")
    ] = None
    eta: Annotated[
        float,
        Entry(
            help="Noise in DDIM's steps. Other samplers take 0 alone.",
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
            refused="a number that would repeat a timestep of the `sampler`; in /denoise more than `timestep`",
            flags=("--num-inference-steps", "--steps"),
        ),
    ] = None
    timesteps: Annotated[
        Sequence[int] | None,
        Entry(
            help="The timesteps themselves, each below the one before, in the place of num_inference_steps.",
            ge="first_timestep",
            le="last_timestep",
            refused="a list that does not fall, or beside `num_inference_steps`, or for distilled weights",
            is_optional=True,
        ),
    ] = None
    class_label: Annotated[
        Label | Sequence[Label],
        Entry(
            help="Class by name or index, or none. Several: one for each image.",
            refused="a list that is not as long as `num_images`",
            flags=("--class-label", "-c"),
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Entry(
            help="Classifier-free guidance: 1 is off, more needs a class label. Default: what the weights recommend.",
            ge=1,
            le=20,
            refused="more than 1 without a `class_label`",
            flags=("--guidance-scale", "-g"),
        ),
    ] = None


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
            flags=("--num-inference-steps", "--steps"),
        ),
    ] = 1
    class_label: Annotated[Label, Entry(help="Class by name or index, or none.", flags=("--class-label", "-c"))] = None
    guidance_scale: Annotated[
        float | None,
        Entry(
            help="Classifier-free guidance: 1 is off, more needs a class label. Default: 1.",
            ge=1,
            le=20,
            flags=("--guidance-scale", "-g"),
        ),
    ] = None


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


# Reading the table.


class Field(NamedTuple):
    """A line of the table.

    Attributes:
        annotation: the field's type, without the entry.
        default: MISSING for a required field.
    """

    name: str
    annotation: Any
    default: Any
    entry: Entry

    @property
    def help(self) -> str:
        """The entry's help, the limits that every model shares, and the default."""
        low, high = self.entry.ge, self.entry.le
        limits = f" {low:g} to {high:g}." if isinstance(low, int | float) and isinstance(high, int | float) else ""
        default = "" if self.is_required or self.default is None else f" Default: {self.default}."
        return self.entry.help + (limits if high != MAX_SEED else "") + default

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def is_nullable(self) -> bool:
        return type(None) in get_args(self.annotation)

    @property
    def is_list(self) -> bool:
        """Whether the field may hold a list."""
        return any(get_origin(kind) is Sequence for kind in get_args(self.annotation))

    @property
    def is_only_list(self) -> bool:
        """Whether the field holds only a list or null."""
        return all(kind is type(None) or get_origin(kind) is Sequence for kind in get_args(self.annotation) or [None])

    @property
    def kinds(self) -> frozenset[type]:
        """The types of the field's values, or of its list's members: int, float and str."""
        return frozenset(_kinds(self.annotation))


def table(request: type) -> Mapping[str, Field]:
    """The fields of a request by name."""
    hints = get_type_hints(request, include_extras=True)
    rows = {}
    for one in fields(request):
        kind, entry = get_args(hints[one.name])
        rows[one.name] = Field(one.name, kind, one.default, entry)
    return rows


@cache
def deciding(request: type, *what: str) -> Sequence[Field]:
    """The fields that decide the bytes of an `image`, of an `answer`, or of `neither`."""
    return [row for row in table(request).values() if row.entry.decides in what]


def _kinds(annotation: Any) -> Iterator[type]:
    if get_origin(annotation) is Literal:
        yield str
    elif arguments := get_args(annotation):
        for argument in arguments:
            yield from _kinds(argument)
    elif annotation is not type(None):
        yield annotation
