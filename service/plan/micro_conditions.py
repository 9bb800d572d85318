"""What SDXL is told of sizes and of a crop: Podell et al. 2023, arXiv:2307.01952, section 2.2, "micro-conditioning".

Sizes are (height, width) and crops (top, left), in pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

from model.description import ModelDescription
from model.rows import Group
from service.errors import Invalid
from service.plan.fields import Denoise, Sample
from service.plan.guidance import EMBEDDED

Pair = tuple[int, int]


class MicroConditions(NamedTuple):
    """What a branch of a row is told. The names are those of the request."""

    original_size: Pair
    crops_coords_top_left: Pair
    target_size: Pair

    @property
    def time_ids(self) -> tuple[int, ...]:
        """As model.rows.Condition has them."""
        return (*self.original_size, *self.crops_coords_top_left, *self.target_size)


OWN = MicroConditions._fields
NEGATIVE = tuple(f"negative_{name}" for name in OWN)


class ToldSizes(NamedTuple):
    """What the images of a request are told.

    Attributes:
        own: for the prompt.
        negative: for the negative prompt; None if the network makes no prediction for it.
        default: for the prompt, if a request gives nothing.
    """

    own: MicroConditions
    negative: MicroConditions | None
    default: MicroConditions

    @property
    def fields(self) -> dict[str, object]:
        """The fields of a request, with their defaults filled in."""
        negative = dict.fromkeys(NEGATIVE) if self.negative is None else _listed(NEGATIVE, self.negative)
        return {**_listed(OWN, self.own), **negative}

    def recipe(self, is_guided: bool) -> dict[str, object]:
        """The fields, as a recipe has them: null for what is the default or has no effect."""
        negative = self.negative if is_guided and self.negative is not None else self.own
        return {**_listed(OWN, self.own, self.default), **_listed(NEGATIVE, negative, self.own)}


NOTHING: dict[str, object] = dict.fromkeys((*OWN, *NEGATIVE))  # the fields for a network that is told no sizes


def of_image(group: Group) -> MicroConditions:
    """The default of images of a size."""
    size = group.height, group.width
    return MicroConditions(size, (0, 0), size)


def told_of(request: Sample | Denoise, group: Group, model: ModelDescription) -> ToldSizes | None:
    """What a request's images of a size are told; None for a network that is told no sizes.

    Raises:
        Invalid: the network is not told what the request gives.
    """
    if not model.embeds_sizes:
        _check_none(request, (*OWN, *NEGATIVE), "this model is told no sizes")
        return None
    default = of_image(group)
    own = _given(request, OWN, default)
    if model.embeds_guidance:
        _check_none(request, NEGATIVE, EMBEDDED)
        return ToldSizes(own, None, default)
    return ToldSizes(own, _given(request, NEGATIVE, own), default)


def is_negative_given(request: Sample | Denoise) -> bool:
    """Whether a request gives negative sizes, or a negative crop."""
    return any(getattr(request, name) is not None for name in NEGATIVE)


def _given(request: Sample | Denoise, names: Sequence[str], default: MicroConditions) -> MicroConditions:
    given = (getattr(request, name) for name in names)
    return MicroConditions(*(own if pair is None else tuple(pair) for pair, own in zip(given, default, strict=True)))


def _check_none(request: Sample | Denoise, names: Sequence[str], why: str) -> None:
    for name in names:
        pair = getattr(request, name)
        if pair is not None:
            raise Invalid.field(name, f"must be null: {why}; it is {list(pair)}")


def _listed(
    names: Sequence[str], told: MicroConditions, default: MicroConditions | None = None
) -> dict[str, list[int] | None]:
    """The pairs by name, null for those of the default."""
    others = default or (None,) * len(told)
    return {name: None if pair == other else list(pair) for name, pair, other in zip(names, told, others, strict=True)}
