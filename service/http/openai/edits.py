"""The body of an edit: the image, the mask, and what is asked for beside them."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from service.errors import Invalid, TooManyImages
from service.http.base64_files import PHOTO, from_base64
from service.http.models import RequestModel
from service.http.openai import fields
from service.http.openai.fields import ALIASES, OWN, READ, Asked, named_as_sent
from service.http.parsing import form_with_photos, is_form, json_with_files
from service.http.pictures import Attached, where_transparent
from service.http.pieces import Bytes
from service.plan.fields import SampleRequest
from service.plan.served import Served

FORM_IMAGES = ("image", "image[]")
JSON_IMAGES = ("image", "images")
MASK = "mask"

_MOST_FILES = 17  # of OpenAI's API: 16 images and a mask
_ADDRESS = "image_url"  # the member of an object that has a file
_INTEGERS = ("partial_images", "output_compression")
_INTEGER = re.compile(r"\d{1,9}", re.ASCII)
_BOOLEANS: dict[str, object] = {"true": True, "false": False}


class _Sent(NamedTuple):
    """What a body has.

    Attributes:
        values: as in JSON.
    """

    values: dict[str, object]
    images: list[Bytes]
    masks: list[Bytes]


def read_edit(
    content_type: str, body: Bytes, model: RequestModel[SampleRequest], served: Served, max_json: int
) -> tuple[Asked, Attached]:
    """Read a form or JSON.

    Args:
        max_json: bytes of JSON beside images.

    Raises:
        TooManyImages: there are several images.
        Invalid: there is no image, or as `fields.read`.
    """
    sent = _form(content_type, body, model) if body and is_form(content_type) else _json(body, max_json)
    if len(sent.images) > 1:
        raise TooManyImages.field("image", f"must be one image, and {len(sent.images)} came")
    if not sent.images:
        raise Invalid.field("image", f"is required: {PHOTO.what}, which is drawn anew")
    if len(sent.masks) > 1:
        raise Invalid.field(MASK, "is given twice")
    asked = fields.read(sent.values, model, served)
    [image], mask = sent.images, next(iter(sent.masks), None)
    return asked, Attached(asked.fields, image, mask, where_transparent, mask is None, ("image", MASK))


def _form(content_type: str, body: Bytes, model: RequestModel[SampleRequest]) -> _Sent:
    texts, files = form_with_photos(content_type, body, (*FORM_IMAGES, MASK), _MOST_FILES)
    images = [file for name, file in files if name != MASK]
    return _Sent(_values(texts, model), images, [file for name, file in files if name == MASK])


def _json(body: Bytes, max_json: int) -> _Sent:
    values, files = json_with_files(body, max_json, (*JSON_IMAGES, MASK))
    images = [_file(one, name) for name in JSON_IMAGES for one in _several(files.get(name))]
    return _Sent(values, images, [_file(one, MASK) for one in _several(files.get(MASK))])


def _several(value: object) -> list[object]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _file(sent: object, name: str) -> Bytes:
    """The file of base64, or of an object that has the file as its address."""
    return from_base64(sent.get(_ADDRESS) if isinstance(sent, dict) else sent, name, PHOTO)


def _values(texts: Iterable[tuple[str, str]], model: RequestModel[SampleRequest]) -> dict[str, object]:
    """The values of a form's fields. Lists may come as `NAME[]`. An empty text is no value, but for prompts."""
    given: dict[str, list[str]] = {}
    for name, text in texts:
        given.setdefault(name.removesuffix("[]"), []).append(text)
    return {
        name: _value(name, several, model)
        for name, several in given.items()
        if several != [""] or ALIASES.get(name, name) in ("prompt", "negative_prompt")
    }


def _value(name: str, texts: list[str], model: RequestModel[SampleRequest]) -> object:
    own = ALIASES.get(name, name)
    if own in OWN:
        with named_as_sent({own: name}):
            return model.value_of(own, texts)
    if name not in READ:
        return texts
    [text, *more] = texts
    if more:
        raise Invalid.field(name, "is given twice")
    if name == "stream":
        return _BOOLEANS.get(text.lower(), text)
    return int(text) if name in _INTEGERS and _INTEGER.fullmatch(text) else text
