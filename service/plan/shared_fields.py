"""Lines of the table of fields that several requests share. The table itself is service/plan/fields.py.

The client imports this module, so the module needs only the standard library.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from service.plan.entries import Entry

MAX_SEED = 2**53 - 1  # the largest integer that every JSON parser keeps exactly
MAX_PROMPT = 2**13  # bytes in UTF-8
MAX_GUIDANCE = 30
_MAX_PIXELS = 2**14  # of a side

Label = int | str | None
Scaling = Literal["variance_preserving", "additive"]

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
ClipSkip = Annotated[
    int,
    Entry(
        help="How many of the text encoder's last layers are left out for the prompt. Where others say clip skip 2, "
        "this is 1.",
        ge=0,
        le="most_clip_skip",
        refused="more than 0 for a model without text",
        is_optional=True,
    ),
]
Emphasis = Annotated[
    Literal["none", "original"],
    Entry(
        help="Whether brackets in prompts are weights. none: they are drawn as they are written. original: they are "
        "read as AUTOMATIC1111 reads them: (word:1.2), (word), [word].",
        refused="any but `none` for a model without text",
        is_optional=True,
    ),
]
GuidanceRescale = Annotated[
    float,
    Entry(
        help="Takes back the contrast that guidance adds: 0 nothing of it, 1 all of it. It helps where images get too "
        "bright or too dark.",
        ge=0,
        le=1,
        refused="more than 0 for a model without guidance, or that has guidance embedded",
        is_optional=True,
    ),
]
GuidanceInterval = Annotated[
    Sequence[float] | None,
    Entry(
        help="From and to, as shares of the steps: step i of N has guidance if from ≤ i/N < to, counted from 0. "
        "The other steps take half of the work. Default: all steps.",
        ge=0,
        le=1,
        length=2,
        refused="a list that falls; any but [0, 1] for a model without guidance, or that has guidance embedded",
        is_optional=True,
    ),
]


def _pixels(meaning: str, least: int, refused: str = "any for a model that is told no sizes") -> Entry:
    """Two numbers of pixels that the network is told."""
    return Entry(help=meaning, ge=least, le=_MAX_PIXELS, length=2, refused=refused, is_optional=True)


_NEGATIVE = "any for a model that is told no sizes, or that has guidance embedded"

OriginalSize = Annotated[
    Sequence[int] | None,
    _pixels(
        "Height and width, for models that are told sizes: of the picture from which the image seems to be scaled. "
        "Default: the image's.",
        1,
    ),
]
TargetSize = Annotated[
    Sequence[int] | None,
    _pixels("Height and width, for models that are told sizes: those that are wanted. Default: the image's.", 1),
]
CropsCoordsTopLeft = Annotated[
    Sequence[int] | None,
    _pixels(
        "Top and left, for models that are told sizes: how much seems to be cropped away there. Default: 0, 0, which "
        "puts things in the middle.",
        0,
    ),
]
NegativeOriginalSize = Annotated[
    Sequence[int] | None,
    _pixels("As original_size, for what guidance leads away from. Default: original_size.", 1, _NEGATIVE),
]
NegativeTargetSize = Annotated[
    Sequence[int] | None,
    _pixels("As target_size, for what guidance leads away from. Default: target_size.", 1, _NEGATIVE),
]
NegativeCropsCoordsTopLeft = Annotated[
    Sequence[int] | None,
    _pixels("As crops_coords_top_left, for what guidance leads away from. Default: the same.", 0, _NEGATIVE),
]
