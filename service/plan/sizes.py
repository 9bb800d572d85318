"""Which sizes are usual, and which of the served ones a request is for. Messages write a size as WIDTHxHEIGHT."""

import math
from collections.abc import Sequence

from model.description import ModelDescription
from model.rows import Group, Image
from service.errors import Invalid
from service.plan.fields import SampleRequest
from service.plan.pictures import Picture
from service.plan.served import Served

_UNIT = 64  # pixels; sides are multiples of it
_ASPECTS = (5 / 4, 16 / 9)  # from and to, of images that are no squares


def usual(model: ModelDescription) -> tuple[Group, ...]:
    """The size that the weights were trained for, and for models with text its usual aspects.

    These are buckets of SDXL's training (Podell et al. 2023, arXiv:2307.01952, appendix I): for each shorter side the
    longest other one with no more pixels. Networks for 512x512 are often given 2:3, too.
    """
    native = model.group
    side = native.height // _UNIT
    if model.text is None or _UNIT % model.factor or native != (side * _UNIT, side * _UNIT):
        return (native,)
    wide = [(short, side * side // short) for short in range(side - 1, 0, -1)]
    sides = [(short, long) for short, long in wide if _ASPECTS[0] <= long / short <= _ASPECTS[1]]
    if side == 512 // _UNIT:
        sides.append((side, side * 3 // 2))
    both = [aspect for short, long in sides for aspect in ((short, long), (long, short))]
    return native, *(Group(_UNIT * height, _UNIT * width) for height, width in both)


def asked(request: SampleRequest, groups: Sequence[Group], aspect: Group | None = None) -> Group:
    """The served size with the request's height and width; the first size if the request names neither.

    If the request names one of the two, it gets the only served size that has it.

    Args:
        aspect: the size of an image. A request that names neither then gets the size that is nearest to this one.

    Raises:
        Invalid: no served size has them, or several sizes have the one that is given.
    """
    height, width = request.height, request.width
    if height is None and width is None:
        return groups[0] if aspect is None else nearest(*aspect, groups)
    fitting = [group for group in groups if height in (None, group.height) and width in (None, group.width)]
    if len(fitting) == 1:
        return fitting[0]
    if height is not None and width is not None:
        raise Invalid.field("height", f"must be, with width, {listed(groups)}, and is {Group(height, width)}")
    name, other = ("width", "height") if height is None else ("height", "width")
    why = f"must, without {other}, belong to exactly one of {listed(groups)}"
    if len(groups) == 1:
        why = f"must be that of {listed(groups)}"
    raise Invalid.field(name, f"{why}, and is {width if height is None else height}")


def of_picture(request: SampleRequest, picture: Picture, served: Served) -> Group:
    """The size of a request with an image, which has a served size by now.

    Raises:
        Invalid: the image has no served size, or another than the request's height and width.
    """
    group = picture.group
    if group not in served.groups:
        raise Invalid.field("image", f"must become {listed(served.groups)}, and is {group}")
    if request.height is not None or request.width is not None:
        asked(request, [group])
    return group


def nearest(height: int, width: int, groups: Sequence[Group]) -> Group:
    """The served size with the nearest aspect; among equal aspects the one with the nearest number of pixels."""

    def distance(group: Group) -> tuple[float, float]:
        aspect = abs(math.log(group.width / group.height) - math.log(width / height))
        return round(aspect, 9), abs(math.log(group.height * group.width) - math.log(height * width))

    return min(groups, key=distance)


def drawn_for(wanted: Group, groups: Sequence[Group]) -> tuple[Group, tuple[str, ...]]:
    """The nearest served size, and a sentence if it is not the wanted one."""
    group = nearest(*wanted, groups)
    said = () if group == wanted else (f"{wanted} is not served: {group} is drawn, the served size nearest in aspect",)
    return group, said


def of_upload(array: Image, served: Served) -> Group:
    """The served size of an uploaded image, or, in latent diffusion, of its latents, [C, H, W].

    Raises:
        Invalid: no served size has this one.
    """
    sizes = [Group(*served.model.sample_shape_of(group)[1:]) for group in served.groups]
    came = Group(*array.shape[1:])
    if came in sizes:
        return served.groups[sizes.index(came)]
    what = "" if served.model.vae is None else "latents of "
    raise Invalid.field("image", f"must be {what}{listed(sizes)}, and is {came}")


def listed(groups: Sequence[Group]) -> str:
    """The sizes, in words."""
    *others, last = map(str, groups)
    sizes = f"{', '.join(others)} or {last}" if others else last
    return f"{sizes} (width x height)"
