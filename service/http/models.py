"""Turns the table of fields into pydantic models. One declaration checks values and gives their JSON Schema.

Each model has the limits of the served weights. Types are strict. The text of queries and forms becomes numbers and
lists first.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic import Field as Constraints
from pydantic_core import ErrorDetails, PydanticCustomError

from service.errors import FieldError, Invalid
from service.http.schemas import Schema, narrowed, without_null
from service.plan.entries import Field, table
from service.plan.fields import Drawing, Noise
from service.plan.limits import Limits, limits_of, resolved
from service.plan.served import Served
from service.plan.shared_fields import MAX_SEED

Request = TypeVar("Request", bound=Drawing | Noise)
MAX_FIELDS = 64  # of a form, where a list may be several, and of JSON
MAX_SHOWN = 80  # characters of a value in a message
_INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_BEYOND_A_LIMIT = ("greater_than", "greater_than_equal", "less_than_equal")
_KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", dict: "an object"}
_PROMPT = "prompt"  # the kind of our errors about prompts, which show no value
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class RequestModel(Generic[Request]):
    """The fields of one kind of request, within the limits of the served model.

    Args:
        request: a dataclass of the table.
        served: the weights, and the sizes that are served.
        max_images: the most images in one request.
        timeout: the most seconds for one request.

    Attributes:
        schema: for JSON, as /openapi.json shows it.
        text_schema: for queries and forms. They express null by leaving the field out.
    """

    def __init__(self, request: type[Request], served: Served, max_images: int, timeout: float) -> None:
        limits = self._limits = limits_of(served.model, max_images, timeout)
        self._request = request
        self._rows = table(request)
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        declared: dict[str, Any] = {name: (_type(row, limits), _default(row)) for name, row in self._rows.items()}
        self._model: type[BaseModel] = create_model(request.__name__, __config__=config, **declared)
        self.schema = narrowed(self._model.model_json_schema(), request, served, limits)
        text = {name: schema for name, one in self.schema["properties"].items() if (schema := without_null(one))}
        self.text_schema: Schema = {**self.schema, "properties": text}

    def validated(self, values: Mapping[str, object]) -> Request:
        """The request with these values.

        Raises:
            Invalid: names each wrong field, its value and its limits.
        """
        if len(values) > MAX_FIELDS:
            raise Invalid.field("body", f"has {len(values)} fields, and may have at most {MAX_FIELDS}")
        try:
            return self._request(**dict(self._model.model_validate(values)))
        except ValidationError as error:
            raise Invalid([self._complaint(one) for one in error.errors()]) from None

    def from_text(self, items: Iterable[tuple[str, str]]) -> Request:
        """The request of a query or a form. A field that takes a list may appear several times.

        Raises:
            Invalid: as above, or any other field appears twice.
        """
        given: dict[str, list[str]] = {}
        for name, text in items:
            given.setdefault(name, []).append(text)
        return self.validated({name: self.value_of(name, texts) for name, texts in given.items()})

    def value_of(self, name: str, texts: list[str]) -> object:
        """The value of a field's texts in a query or a form. It may not be valid.

        Raises:
            Invalid: there are several texts, and the field takes no list.
        """
        row = self._rows.get(name)
        if len(texts) > 1 and not (row and row.is_list):
            raise Invalid.field(name, "is given twice")
        return texts[0] if row is None else _read(row, texts)

    def _complaint(self, error: ErrorDetails) -> FieldError:
        loc = list(error["loc"])
        if error["type"] == _PROMPT:
            return {"loc": [*loc, *error["ctx"]["place"]], "msg": error["msg"]}
        if error["type"] == "extra_forbidden":
            return {"loc": loc, "msg": "there is no such field"}
        if error["type"] == "missing":
            return {"loc": loc, "msg": "is required"}
        row = self._rows.get(str(loc[0])) if loc else None  # pydantic gives no place for a name that is no text
        if row is None or str in row.kinds:
            expected = error["msg"].replace("Input should be", "must be")
        elif error["type"] in _BEYOND_A_LIMIT:
            expected = f"must be {_range(row, self._limits)}"
        else:
            expected = f"must be {_noun(row, self._limits, is_member=len(loc) > 1)}"
        return {"loc": loc, "msg": f"{expected}, and is {shown(error['input'])}"}


def shown(value: object) -> str:
    """The beginning of a value as JSON. The rest, however long, is not encoded."""
    pieces = json.JSONEncoder(default=str).iterencode(value)
    text = "".join(itertools.islice(pieces, MAX_SHOWN + 1))
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


# From the table to pydantic.


def _default(row: Field) -> Any:
    return Constraints(... if row.is_required else row.default, description=row.entry.help)


def _type(row: Field, limits: Limits) -> Any:
    """The type by which pydantic checks a field."""
    kinds = row.kinds
    if row.entry.max_bytes is not None:
        return Annotated[row.annotation, BeforeValidator(partial(_check_prompts, row, row.entry.max_bytes))]
    if kinds == {int, str}:
        return Annotated[row.annotation, BeforeValidator(partial(_check_labels, is_list=row.is_list))]
    if str in kinds or bool in kinds:
        return row.annotation
    [number] = kinds
    kind: Any = Annotated[number, Constraints(**_bounds(row, limits))]
    if number is int:
        kind = Annotated[kind, BeforeValidator(_whole)]
    if row.is_list:
        length = row.entry.length
        kind = Annotated[list[kind], Constraints(min_length=length or 1, max_length=length, fail_fast=True)]
    return kind | None if row.is_nullable else kind


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_SEED else value


def _check_labels(value: object, is_list: bool) -> object:
    """Check labels before the union does. A union reports one error for each of its members."""
    labels = [_whole(label) for label in (value if is_list and isinstance(value, list) else [value])]
    if not all(label is None or (isinstance(label, int | str) and not isinstance(label, bool)) for label in labels):
        raise PydanticCustomError(
            "label",
            "must be an integer, a name{more}",
            {"more": ", null, or a list of these" if is_list else " or null"},
        )
    return labels if isinstance(value, list) else labels[0]


def _check_prompts(row: Field, max_bytes: int, value: object) -> object:
    """Check one prompt, or a list of them, before the union does."""
    if not (row.is_list and isinstance(value, list)):
        kinds = "a string, null or a list of these" if row.is_list else "a string or null"
        if value is not None:
            _check_prompt(value, max_bytes, kinds)
        return value
    if not value:
        raise _of_prompt("must not be an empty list")
    holds_null = _lists_null(row)
    for place, text in enumerate(value):
        if text is not None or not holds_null:
            _check_prompt(text, max_bytes, "a string or null" if holds_null else "a string", place)
    return value


def _check_prompt(text: object, max_bytes: int, kinds: str, *place: int) -> None:
    if not isinstance(text, str):
        raise _of_prompt(f"must be {kinds}, and is {_KINDS.get(type(text), 'a list')}", *place)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise _of_prompt("must be Unicode, and has half of a character: a lone surrogate", *place) from None
    if size > max_bytes:
        raise _of_prompt(f"must have at most {max_bytes} bytes in UTF-8, and has {size}", *place)


def _of_prompt(why: str, *place: int) -> PydanticCustomError:
    """An error without a word of the prompt."""
    return PydanticCustomError(_PROMPT, "{why}", {"why": why, "place": place})


def _lists_null(row: Field) -> bool:
    """Whether a list of the field may hold null."""
    lists = [kind for kind in get_args(row.annotation) if get_origin(kind) is Sequence]
    return any(type(None) in get_args(member) for kind in lists for member in get_args(kind))


# The limits of a number, in words.


def _bounds(row: Field, limits: Limits) -> dict[str, Any]:
    return {name: resolved(getattr(row.entry, name), limits) for name in ("ge", "gt", "le")}


def _range(row: Field, limits: Limits) -> str:
    bounds = _bounds(row, limits)
    if bounds["gt"] is not None:
        return f"more than {bounds['gt']:g} and at most {bounds['le']:g}"
    return f"{bounds['ge']} to {bounds['le']}"


def _noun(row: Field, limits: Limits, is_member: bool) -> str:
    if bool in row.kinds:
        return "true or false"
    noun = "integer" if int in row.kinds else "number"
    if row.is_list and not is_member:
        count = row.entry.length
        return f"a list of {f'{count} ' * (count is not None)}{noun}s from {_range(row, limits)}"
    article = "an" if noun == "integer" else "a"
    if row.entry.le is None:
        return f"{article} {noun}"
    return f"{article} {noun} {'from' if row.entry.gt is None else 'of'} {_range(row, limits)}"


# From text to values.


def _read(row: Field, texts: list[str]) -> object:
    """The value of a field's texts. Commas may separate the numbers of a list."""
    if str in row.kinds:
        return texts if len(texts) > 1 else texts[0]
    if bool in row.kinds:
        return {"true": True, "false": False}.get(texts[0].lower(), texts[0])
    if row.is_list:
        return [_number(one.strip()) for text in texts for one in text.split(",")]
    return _number(texts[0])


def _number(text: str) -> int | float | str:
    """The number of a decimal text, or else the text itself."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if len(text) < 64 and _NUMBER.fullmatch(text) else text
