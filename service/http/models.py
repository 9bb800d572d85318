"""The table of fields as pydantic's models: values are checked, and described in JSON Schema, by one declaration.

A model is made for the weights that are served: the limits that depend on them are in it. Types are strict. Text of
queries and forms is turned into numbers and lists first.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic import Field as Constraints
from pydantic_core import ErrorDetails, PydanticCustomError

from model.description import ModelDescription
from model.samplers import SAMPLERS
from service.errors import FieldError, Invalid
from service.plan.fields import MAX_IMAGES, MAX_SEED, Denoise, Drawing, Field, Noise, Sample, table
from service.plan.limits import Limits, limits_of, resolved

Request = TypeVar("Request", bound=Drawing | Noise)
Schema = dict[str, Any]

MAX_FIELDS = 32  # of a form, and of JSON
_MAX_SHOWN = 80  # characters of a value in a message
_MAX_NAMES = 100  # classes that a schema lists; /info names all
_NULL: Schema = {"type": "null"}
_INTEGER = re.compile(r"[+-]?\d{1,20}", re.ASCII)
_KIND = re.compile("^an? [a-z]+ (from|of) ")
_BEYOND_A_LIMIT = ("greater_than", "greater_than_equal", "less_than_equal")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class RequestModel(Generic[Request]):
    """One request's fields, within the limits of what is served.

    Args:
        request: of the table.
        model: the weights.
        max_images: the most images in one request.
        timeout: the most seconds for one request.

    Attributes:
        schema: of JSON, as /openapi.json has it.
        text_schema: of queries and forms, where nothing says null but leaving the field out.
    """

    def __init__(self, request: type[Request], model: ModelDescription, max_images: int, timeout: float) -> None:
        limits = limits_of(model, max_images, timeout)
        self._request = request
        self._rows = table(request)
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        declared: dict[str, Any] = {name: (_type(row, limits), _default(row)) for name, row in self._rows.items()}
        self._model: type[BaseModel] = create_model(request.__name__, __config__=config, **declared)
        self.schema = _narrowed(self._model.model_json_schema(), request, model, limits)
        text = {name: schema for name, one in self.schema["properties"].items() if (schema := _without_null(one))}
        self.text_schema: Schema = {**self.schema, "properties": text}

    def validated(self, values: Mapping[str, object]) -> Request:
        """The request of these values.

        Raises:
            Invalid: naming each wrong field, its value and what it may be.
        """
        if len(values) > MAX_FIELDS:
            raise Invalid.field("body", f"has {len(values)} fields, and may have at most {MAX_FIELDS}")
        try:
            return self._request(**dict(self._model.model_validate(values)))
        except ValidationError as error:
            raise Invalid([self._complaint(one) for one in error.errors()]) from None

    def from_text(self, items: Iterable[tuple[str, str]]) -> Request:
        """The request of a query or a form. A field that may hold a list may be given several times.

        Raises:
            Invalid: as above, and for another field that is given twice.
        """
        values: dict[str, object] = {}
        for name, text in items:
            row = self._rows.get(name)
            value = text if row is None else _read(row, text)
            if name not in values:
                values[name] = value
            elif row is not None and row.is_list:
                values[name] = [*_as_list(values[name]), *_as_list(value)]
            else:
                raise Invalid.field(name, "is given twice")
        return self.validated(values)

    def _complaint(self, error: ErrorDetails) -> FieldError:
        loc = list(error["loc"])
        if error["type"] == "extra_forbidden":
            return {"loc": loc, "msg": "there is no such field"}
        if error["type"] == "missing":
            return {"loc": loc, "msg": "is required"}
        name, *member = loc or [""]  # a name that is no text has no place
        field = self.schema["properties"].get(name, {})
        words = _in_words(_members(field)[0] if member else field)
        if words and error["type"] in _BEYOND_A_LIMIT:
            words = _KIND.sub("", words)
        expected = f"must be {words}" if words else error["msg"].replace("Input should be", "must be")
        return {"loc": loc, "msg": f"{expected}, and is {shown(error['input'])}"}


def shown(value: object) -> str:
    """The beginning of a value as JSON; what follows, however much, is not even looked at."""
    pieces = json.JSONEncoder(default=str).iterencode(value)
    text = "".join(itertools.islice(pieces, _MAX_SHOWN + 1))
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


# From the table to pydantic.


def _default(row: Field) -> Any:
    return Constraints(... if row.is_required else row.default, description=row.entry.help)


def _type(row: Field, limits: Limits) -> Any:
    """What pydantic checks a field by."""
    kinds = row.kinds
    if kinds == {int, str}:
        check = _check_labels if row.is_list else _check_label
        return Annotated[row.annotation, BeforeValidator(check)]
    if str in kinds:
        return row.annotation
    [number] = kinds
    ge, gt, le = (resolved(limit, limits) for limit in (row.entry.ge, row.entry.gt, row.entry.le))
    kind: Any = Annotated[number, Constraints(ge=ge, gt=gt, le=le)]
    if number is int:
        kind = Annotated[kind, BeforeValidator(_whole)]
    if row.is_list:
        kind = Annotated[list[kind], Constraints(min_length=1)]
    return kind | None if row.is_nullable else kind


def _whole(value: object) -> object:
    """JSON has one kind of number: 3.0 is the integer 3."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_SEED else value


# Labels are checked ahead of their unions, whose own errors would come once for each of the members.


def _is_label(value: object) -> bool:
    return value is None or (isinstance(value, int | str) and not isinstance(value, bool))


def _check_label(value: object) -> object:
    value = _whole(value)
    if not _is_label(value):
        raise PydanticCustomError("label", "must be an integer, a name or null")
    return value


def _check_labels(value: object) -> object:
    value = [_whole(label) for label in value] if isinstance(value, list) else _whole(value)
    labels = _as_list(value)
    if len(labels) > MAX_IMAGES:
        raise PydanticCustomError("labels", "must be one label, or a list with one for each image")
    if not all(_is_label(label) for label in labels):
        raise PydanticCustomError("labels", "must be an integer, a name, null, or a list of these")
    return value


# From text to values.


def _read(row: Field, text: str) -> object:
    """The value of text. Numbers of a list may also have commas between them."""
    if str in row.kinds:
        return text
    return [_number(one.strip()) for one in text.split(",")] if row.is_list else _number(text)


def _number(text: str) -> int | float | str:
    """The number that decimal text stands for; other text as it is."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if len(text) < 64 and _NUMBER.fullmatch(text) else text


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


# JSON Schema.


def _narrowed(schema: Schema, request: type, model: ModelDescription, limits: Limits) -> Schema:
    """The schema with what this model cannot take left out. The plan says why it refuses such a value."""
    fields: dict[str, Schema] = schema["properties"]
    if issubclass(request, Noise):
        return schema
    samplers = [model.distilled.sampler] if model.distilled else list(SAMPLERS)
    fields["sampler"]["anyOf"] = [{"type": "string", "enum": samplers}, _NULL]
    if not any(SAMPLERS[sampler].takes_eta for sampler in samplers):
        fields["eta"]["maximum"] = 0
    if model.num_classes is None or model.needs_label:
        fields["guidance_scale"]["anyOf"][0]["maximum"] = 1
    if model.distilled:
        nothing = [None] if issubclass(request, Sample) else []
        fields["num_inference_steps"]["enum"] = [*model.distilled.num_inference_steps, *nothing]

    label = _label(model)
    if issubclass(request, Denoise):
        if model.needs_label:
            schema["required"] = ["class_label", *schema["required"]]
            del fields["class_label"]["default"]
        fields["class_label"]["anyOf"] = label if model.needs_label else [*label, _NULL]
    else:
        several = {"type": "array", "items": {"anyOf": [*label, _NULL]}, "minItems": 1}
        fields["class_label"]["anyOf"] = [*label, _NULL, {**several, "maxItems": limits["max_images"]}]
    return schema


def _label(model: ModelDescription) -> list[Schema]:
    """The schemas of a class: its index, or its name."""
    classes, names = model.num_classes, model.class_names
    if classes is None:
        return []
    text: Schema = {"type": "string", "minLength": 1}
    if classes <= _MAX_NAMES:
        text = {"type": "string", "enum": list(dict.fromkeys([*names, *map(str, range(classes))]))}
    return [{"type": "integer", "minimum": 0, "maximum": classes - 1}, text]


def _in_words(field: Schema) -> str | None:
    """What a field must be that holds numbers; None for another field."""
    kinds = [field, *field.get("anyOf", []), *_members(field)]
    types = {kind["type"] for kind in kinds if "type" in kind} - {"array", "null"}
    if not types or not types <= {"integer", "number"}:
        return None
    limits = {name: value for kind in kinds for name, value in kind.items()}
    if "enum" in limits:
        return f"one of {', '.join(str(value) for value in limits['enum'] if value is not None)}"
    if "exclusiveMinimum" in limits:
        return f"a number of more than {limits['exclusiveMinimum']:g} and at most {limits['maximum']:g}"
    low, high = limits["minimum"], limits["maximum"]
    number = "integer" if types == {"integer"} else "number"
    if _members(field):
        return f"a list of {number}s from {low} to {high}"
    return f"{low}" if low == high else f"{'an' if number == 'integer' else 'a'} {number} from {low} to {high}"


def _members(field: Schema) -> list[Schema]:
    """What the members of a list may be; empty for a field that holds none."""
    return [kind["items"] for kind in (field, *field.get("anyOf", [])) if "items" in kind]


def _without_null(schema: Schema) -> Schema | None:
    """What text can say; None for nothing at all."""
    if "anyOf" in schema:
        kinds = [kind for one in schema["anyOf"] if (kind := _without_null(one))]
        return {**_bare(schema), "anyOf": kinds} if kinds else None
    if schema.get("type") == "array":
        items = _without_null(schema["items"])
        return {**schema, "items": items} if items else None
    return None if schema.get("type") == "null" else _bare(schema)


def _bare(schema: Schema) -> Schema:
    bare = {key: value for key, value in schema.items() if (key, value) != ("default", None)}
    return bare | {"enum": [value for value in schema["enum"] if value is not None]} if "enum" in schema else bare
