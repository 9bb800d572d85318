"""Requests as they come in: JSON, queries and forms → the models of schemas.py."""

import base64
import binascii
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import FieldError, Invalid, UnsupportedMedia

Model = TypeVar("Model", bound=BaseModel)

_INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
_MAX_FIELDS = 32
_MAX_VALUES = 2**16  # of JSON: `[],[],[],…` takes 25 times its length in memory, and time in which nobody is served
_MAX_SHOWN = 80  # characters of a value in a message


async def read_json(request: Request, model: type[Model]) -> Model:
    """Read a JSON body. An empty body is `{}`."""
    return validated(model, await _json_object(request))


async def read_upload(request: Request, model: type[Model]) -> tuple[Model, bytes]:
    """Read an image and the fields beside it: a form with a file part, or JSON with base64."""
    match _media_type(request):
        case "multipart/form-data":
            return await _read_form(request, model)
        case "application/json" | "":
            values = await _json_object(request)
            if "image" not in values:
                raise Invalid.field("image", "is required: a PNG or .npy file, in base64")
            image_text = values.pop("image")
            return validated(model, values), _from_base64(image_text)
        case other:
            raise UnsupportedMedia(f"the body must be multipart/form-data or application/json, and is {other}")


async def _read_form(request: Request, model: type[Model]) -> tuple[Model, bytes]:
    _, options = parse_options_header(request.headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() not in _CHARSETS:  # Python knows some that raise, or take very long
        raise UnsupportedMedia(f"a form must be in UTF-8, and says {_shown(options[b'charset'].decode('latin-1'))}")
    boundary = options.get(b"boundary")
    end = b"--%b--" % boundary if boundary else b""
    if end not in await request.body():  # the parser takes a form that is cut short, without its last field
        raise Invalid.field("body", f"is not a readable form: it lacks its end, {end.decode('latin-1')}")
    try:
        async with request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=2**16) as form:
            image = await _file_part(form)
            fields = [(key, value) for key, value in form.multi_items() if isinstance(value, str)]
    except HTTPException as error:  # starlette's own, of a broken form
        raise Invalid.field("body", f"is not a readable form: {error.detail}") from None
    return read_text(fields, model), image


def validated(model: type[Model], values: Mapping[str, object]) -> Model:
    """Check values against a model, strictly.

    Raises:
        Invalid: naming each field, its value and what it may be.
    """
    if len(values) > _MAX_FIELDS:
        raise Invalid.field("body", f"has {len(values)} fields, and may have at most {_MAX_FIELDS}")
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise Invalid([_field_error(model, e) for e in error.errors()]) from None


def read_text(items: Iterable[tuple[str, str]], model: type[Model]) -> Model:
    """Read the fields of a query or a form. A class_label that is given several times is a list."""
    values: dict[str, object] = {}
    for key, text in items:
        field = model.model_fields.get(key)
        value = _number(text) if field is not None and key != "class_label" and key != "sampler" else text
        if key not in values:
            values[key] = value
        elif key == "class_label":
            known = values[key]
            values[key] = [*known, value] if isinstance(known, list) else [known, value]
        else:
            raise Invalid.field(key, "is given twice")
    return validated(model, values)


def _number(text: str) -> int | float | str:
    """The number that decimal text stands for; other text as it is."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if len(text) < 64 and _NUMBER.fullmatch(text) else text


async def _json_object(request: Request) -> dict[str, object]:
    if (media_type := _media_type(request)) not in ("application/json", ""):
        raise UnsupportedMedia(f"the body must be application/json, and is {media_type}")
    body = await request.body()
    if sum(map(body.count, (b"[", b"{", b","))) > _MAX_VALUES:
        raise Invalid.field("body", f"has more than {_MAX_VALUES} values")
    try:
        values = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise Invalid.field("body", f"is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise Invalid.field("body", "must be a JSON object")
    return values


async def _file_part(form: FormData) -> bytes:
    parts = form.getlist("image")
    if len(parts) > 1:
        raise Invalid.field("image", "is given twice")
    if parts and isinstance(parts[0], UploadFile):
        return await parts[0].read()
    names = [key for key, value in form.multi_items() if isinstance(value, UploadFile)]
    found = f"; the form has the file part {names[0]!r}" if names else "; the form has no file part"
    raise Invalid.field("image", f"is required, as a file part{found}")


def _from_base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise Invalid.field("image", "must be a string: a PNG or .npy file, in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Invalid.field("image", f"is not valid base64: {error}") from None


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _field_error(model: type[BaseModel], error: ErrorDetails) -> FieldError:
    loc = list(error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return {"loc": loc, "msg": "there is no such field"}
        case "missing":
            return {"loc": loc, "msg": "is required"}
        case "greater_than_equal" | "less_than_equal":
            expected = _bounds(model.model_fields[str(loc[0])])
        case _:
            expected = error["msg"].replace("Input should be", "must be")
    return {"loc": loc, "msg": f"{expected}, and is {_shown(error['input'])}"}


def _shown(value: object) -> str:
    """The beginning of a value as JSON; what follows, however much, is not even looked at."""
    pieces = json.JSONEncoder(default=str).iterencode(value)
    text = "".join(itertools.islice(pieces, _MAX_SHOWN + 1))
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _bounds(field: FieldInfo) -> str:
    """The range that a field's value must lie in."""
    [low] = [bound.ge for bound in field.metadata if isinstance(bound, Ge)]
    [high] = [bound.le for bound in field.metadata if isinstance(bound, Le)]
    return f"must be {low} to {high}"
