"""The body of a request to OpenAI's Images API → what it asks of this server, and what is ignored.

What only decorates a request is ignored and listed, never refused. What changes a picture is honoured, or told, or
refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from model.description import ModelDescription
from model.rows import Group
from service.errors import Invalid
from service.http.models import RequestModel, shown
from service.http.problems import one_line
from service.http.responses import JPEG, PNG, WEBP
from service.plan import sizes
from service.plan.entries import table
from service.plan.fields import SampleRequest
from service.plan.labels import named_in
from service.plan.served import Served

# Ours, by the other names that programs use.
ALIASES = {
    "n": "num_images",
    "step": "num_inference_steps",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "rng_seed": "seed",
}
OWN = {name: row for name, row in table(SampleRequest).items() if name != "preview_every"}
FORMATS = {"png": PNG, "webp": WEBP, "jpeg": JPEG, "jpg": JPEG}
RESPONSE_FORMATS = ("b64_json", "url")
_ANSWERED_BY_URL = "dall-e"  # OpenAI's models of these names answer addresses unless asked otherwise
MOST_PARTIAL_IMAGES = 3
READ = ("model", "size", "response_format", "output_format", "output_compression", "stream", "partial_images")

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_LONGEST_SIDE = 99_999
_MOST_NAME, _MOST_IGNORED = 64, 512  # characters in the header
_NOT_PLAIN = re.compile(r"[^!-+\x2d-~]")  # what a name in a list of names must not have

T = TypeVar("T")


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    Attributes:
        fields: those of /sample.
        media_type: of each image.
        quality: of a WebP or JPEG, 0 to 100; None for the usual one.
        by_url: each image is answered as an address.
        partial_images: how many are sent of each image while it is drawn; None if the answer is no stream.
        ignored: the names of fields without effect.
        warnings: sentences, for the plan's.
        sent_as: for each of our fields that came, its name in the request.
    """

    fields: SampleRequest
    media_type: str
    quality: int | None
    by_url: bool
    partial_images: int | None
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    sent_as: Mapping[str, str]


def read(values: Mapping[str, object], model: RequestModel[SampleRequest], served: Served) -> Asked:
    """Read the fields of a request to draw.

    Args:
        values: of the body. Null is the same as no value.

    Raises:
        Invalid: names the field as the client does, its value and its limits.
    """
    given = {name: value for name, value in values.items() if value is not None}
    ignored = [name for name in given if name not in ALIASES and name not in OWN and name not in READ]
    if given.get("model") not in (None, served.model.name, served.model.recipe_name):
        ignored.append("model")
    media_type = FORMATS[_choice(given, "output_format", tuple(FORMATS), "png")]
    quality = _integer(given, "output_compression", 100)
    if quality is not None and media_type == PNG:
        ignored.append("output_compression")
    partial_images = _integer(given, "partial_images", MOST_PARTIAL_IMAGES)
    is_streamed = _boolean(given, "stream")
    if partial_images is not None and not is_streamed:
        ignored.append("partial_images")
    usual = "url" if str(given.get("model")).startswith(_ANSWERED_BY_URL) else "b64_json"
    by_url = _choice(given, "response_format", RESPONSE_FORMATS, usual) == "url"
    if by_url and is_streamed and "response_format" in given:
        ignored.append("response_format")

    own, sent_as = _own(given)
    with named_as_sent(sent_as):
        fields = model.validated(own)
    fields, warnings = _sized(fields, given, served.groups)
    fields, unused = _told(fields, served.model)
    if fields.class_label is not None and "class_label" not in own:
        sent_as["class_label"] = "prompt"
    without_effect = {*ignored, *unused}
    return Asked(
        fields=fields,
        media_type=media_type,
        quality=quality if media_type != PNG else None,
        by_url=by_url and not is_streamed,
        partial_images=(partial_images or 0) if is_streamed else None,
        ignored=tuple(name for name in given if name in without_effect),
        warnings=warnings,
        sent_as=sent_as,
    )


@contextmanager
def named_as_sent(sent_as: Mapping[str, str]) -> Iterator[None]:
    """Inside, errors name fields as the client does."""
    try:
        yield
    except Invalid as error:
        errors = error.errors
        for one in errors:
            one["loc"] = [sent_as.get(str(name), name) for name in one["loc"][:1]] + one["loc"][1:]
        raise type(error)(errors) from None


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that lists ignored fields, in printable ASCII."""
    if not names:
        return {}
    plain = (_NOT_PLAIN.sub("?", one_line(name, _MOST_NAME)) or "?" for name in names)
    listed = ", ".join(plain)
    return {"X-Ignored-Fields": listed if len(listed) <= _MOST_IGNORED else f"{listed[:_MOST_IGNORED]}..."}


def _own(given: Mapping[str, object]) -> tuple[dict[str, object], dict[str, str]]:
    """The values of our fields, and the names by which they came."""
    own: dict[str, object] = {}
    sent_as: dict[str, str] = {}
    for sent, value in given.items():
        name = ALIASES.get(sent, sent)
        if name not in OWN:
            continue
        if name in own and own[name] != value:
            first = f"{sent_as[name]}, which is {shown(own[name])}"
            raise Invalid.field(sent, f"must be the same as {first}, and is {shown(value)}")
        own[name] = value
        sent_as.setdefault(name, sent)
    return own, sent_as


def _sized(
    fields: SampleRequest, given: Mapping[str, object], groups: Sequence[Group]
) -> tuple[SampleRequest, tuple[str, ...]]:
    """The fields with the served size that is nearest in aspect to the one asked for, and a sentence if they differ."""
    wanted = _size(given.get("size"))
    by_sides = fields.height, fields.width
    if wanted is not None and any(side not in (None, own) for side, own in zip(by_sides, wanted, strict=True)):
        sides = ", ".join(f"{name} {side}" for name, side in zip(Group._fields, by_sides, strict=True) if side)
        raise Invalid.field("size", f"must agree with {sides}, and is {wanted}")
    if fields.height is not None and fields.width is not None:
        wanted = Group(fields.height, fields.width)
        for name, side in zip(Group._fields, wanted, strict=True):
            if not 1 <= side <= _LONGEST_SIDE:
                raise Invalid.field(name, f"must be from 1 to {_LONGEST_SIDE}, and is {shown(side)}")
    if wanted is None:
        return fields, ()
    group, said = sizes.drawn_for(wanted, groups)
    return replace(fields, height=group.height, width=group.width), said


def _size(size: object) -> Group | None:
    if size in (None, "", "auto"):
        return None
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise Invalid.field("size", f"must be WIDTHxHEIGHT, such as 512x512, or auto, and is {shown(size)}")
    return Group(height=int(found[2]), width=int(found[1]))


def _told(fields: SampleRequest, model: ModelDescription) -> tuple[SampleRequest, list[str]]:
    """The fields with what this model can be told, and the names of those that it cannot use.

    Models without text are told the class that the prompt names.
    """
    if model.text is not None:
        if fields.prompt is None:
            raise Invalid.field("prompt", "is required: it says what to draw")
        if model.embeds_guidance and fields.negative_prompt == "":
            fields = replace(fields, negative_prompt=None)
        return fields, []
    prompt, unused = fields.prompt, []
    if model.num_classes is not None and fields.class_label is None:
        with named_as_sent({"class_label": "prompt"}):
            if isinstance(prompt, str | None):
                fields = replace(fields, class_label=named_in(prompt or "", model))
            else:
                fields = replace(fields, class_label=[named_in(one, model) for one in prompt])
    elif prompt:
        unused.append("prompt")
    if fields.negative_prompt:
        unused.append("negative_prompt")
    return replace(fields, prompt=None, negative_prompt=None), unused


def _choice(given: Mapping[str, object], name: str, choices: Sequence[str], default: str) -> str:
    value = given.get(name, default)
    if value in choices:
        return str(value)
    *others, last = choices
    raise Invalid.field(name, f"must be {', '.join(others)} or {last}, and is {shown(value)}")


def _integer(given: Mapping[str, object], name: str, most: int) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and value in range(most + 1):
        return int(value)
    raise Invalid.field(name, f"must be an integer from 0 to {most}, and is {shown(value)}")


def _boolean(given: Mapping[str, object], name: str) -> bool:
    value = given.get(name, False)
    if isinstance(value, bool):
        return value
    raise Invalid.field(name, f"must be true or false, and is {shown(value)}")
