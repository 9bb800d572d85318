"""What /openapi.json says: the routes that read their bodies themselves, with the limits of what is served.

A request that is valid by this document is answered, but for what `_REFUSED` says no schema can tell.
"""

import base64
from typing import Any

import numpy as np
from pydantic import BaseModel
from starlette.responses import Response

from model.samplers import SAMPLERS
from service.config import Settings
from service.http.codecs import encode_png
from service.plan.fields import DenoiseRequest, NoiseRequest, SampleRequest
from service.plan.served import Served

Schema = dict[str, Any]

_MAX_NAMES = 100  # classes that the document lists; /info names all
_REFUSED = """Invalid input; the document names each field. Beyond the schema, these are refused:
a `guidance_scale` of more than 1 without a `class_label`; a list of labels that is not as long as `num_images`;
a `seed` of which `seed + num_images` is more than 2^53; a `preview_every` beyond the steps;
an `eta` for a `sampler` that takes none; steps that repeat a timestep of the `sampler`, or more than `timestep`;
`additive` noise at a `timestep` of pure noise; an `image` that is none, or not of the model's size;
and a `timeout_s` that is too short for this work even on an idle server."""
_PROBLEMS = {
    401: "An API key is needed",
    406: "No answer of an accepted media type",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body's media type or Content-Encoding is not read",
    422: _REFUSED,
    429: "The client holds its share of a full queue, or of the room for bodies; Retry-After says when to ask again",
    500: "This request's own computation failed",
    503: "Not now; Retry-After says when",
    504: "Not done within timeout_s",
}

_STRING, _NUMBER, _OBJECT = {"type": "string"}, {"type": "number"}, {"type": "object"}
_COUNT = {"type": "integer", "minimum": 1}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


# To most readers of schemas the encoding alone is but a remark.
_BLANKS = r"[ \t\r\n]*"
_BASE64_SENT = {
    "type": "string",
    "contentEncoding": "base64",
    "pattern": r"^(data:(image/png|application/x-npy|application/octet-stream)?;base64,)?"
    rf"{_BLANKS}(([A-Za-z0-9+/]{_BLANKS}){{4}})*"
    rf"(([A-Za-z0-9+/]{_BLANKS}){{2}}(={_BLANKS}){{2}}|([A-Za-z0-9+/]{_BLANKS}){{3}}={_BLANKS})?$",
}
_BASE64 = {
    "type": "string",
    "contentEncoding": "base64",
    "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
}
_EVENT = _object(
    event={"type": "string", "enum": ["queued", "progress", "preview", "image", "done", "error"]},
    data={"type": "string", "contentMediaType": "application/json"},
)
_FIELD_ERROR = _object(loc=_array({"anyOf": [_STRING, {"type": "integer"}]}), msg=_STRING)
_PROBLEM = _object(type=_STRING, title=_STRING, status={"type": "integer", "minimum": 400}, detail=_STRING)
_PROBLEM["properties"]["errors"] = _array(_FIELD_ERROR)
_SHAPE = {**_array(_COUNT), "minItems": 3, "maxItems": 3}
_SECONDS = {"type": "object", "additionalProperties": _NUMBER}
_INFO = _object(
    version=_STRING,
    model=_object(name=_STRING, digest=_STRING, architecture=_STRING, num_parameters=_COUNT),
    prediction_type=_STRING,
    num_train_timesteps=_COUNT,
    image_shape=_SHAPE,
    latent_shape=_or_null(_SHAPE),
    first_stage=_or_null(_object(kind=_STRING, factor=_COUNT, scaling_factor=_NUMBER, num_parameters=_COUNT)),
    preview=_or_null({"type": "string", "enum": ["linear"]}),
    out_channels=_COUNT,
    num_classes=_or_null(_COUNT),
    class_names=_or_null(_array(_STRING)),
    samplers=_array(_STRING),
    num_inference_steps=_or_null(_array(_COUNT)),
    recommended=_object(sampler=_STRING, num_inference_steps=_COUNT, guidance_scale=_NUMBER),
    limits=_object(max_images=_COUNT, max_batch=_COUNT, max_queue=_COUNT, max_body=_COUNT, timeout_s=_NUMBER),
    device=_STRING,
    backend=_STRING,
    precision=_STRING,
    fingerprint=_STRING,
    fingerprint_parts=_OBJECT,
    reproducible={"type": "boolean"},
    seconds_per_step=_SECONDS,
    seconds_per_decode=_or_null(_SECONDS),
)


# Headers. A client may rely on those that are required.


def _header(description: str, schema: Schema, required: bool = True) -> Schema:
    return {"description": description, "schema": schema, "required": required}


_ID = {"X-Request-ID": _header("the request's own, where it is a sane one", {**_STRING, "minLength": 1})}
_CACHE = {"Cache-Control": _header("how long the answer may be kept", _STRING)}
_SEED = {"X-Seed": _header("of the first image", {"type": "integer", "minimum": 0})}
_CLIPPED = {"X-Clipped": _header("a PNG's share of clipped values", {**_NUMBER, "minimum": 0}, required=False)}
_RETRY = {"Retry-After": _header("seconds", _COUNT)}
_VARY = {"Vary": _header("the answer depends on Accept", _STRING)}


def _timing(served: Served) -> Schema:
    stages = "denoising, decoding latents and encoding" if served.model.vae else "denoising and encoding"
    return {"Server-Timing": _header(f"milliseconds in the queue, {stages}", _STRING, required=False)}


def _etag(required: bool) -> Schema:
    return {"ETag": _header("the same for the same bytes", _STRING, required)}


def _problem(status: int) -> Schema:
    headers = {**_ID, **_CACHE}
    if status == 401:
        headers["WWW-Authenticate"] = _header("Bearer", _STRING)
    if status in (429, 503):
        headers |= _RETRY
    content = {"application/problem+json": {"schema": _PROBLEM}}
    return {"description": _PROBLEMS[status], "headers": headers, "content": content}


def _responses(content: Schema, headers: Schema, *without: int) -> dict[int | str, Schema]:
    problems: dict[int | str, Schema] = {status: _problem(status) for status in _PROBLEMS if status not in without}
    done = {"description": "The images", "headers": {**_ID, **_CACHE, **_SEED, **headers}, "content": content}
    return {200: done, **problems}


# What may be asked for.


def _label(served: Served) -> list[Schema]:
    """The schemas of a class: its index, or its name."""
    classes, names = served.model.num_classes, served.model.class_names
    if classes is None:
        return []
    text: Schema = {"type": "string", "minLength": 1}
    if classes <= _MAX_NAMES:
        text = {"type": "string", "enum": list(dict.fromkeys([*names, *map(str, range(classes))]))}
    return [{"type": "integer", "minimum": 0, "maximum": classes - 1}, text]


def _schema(request: type[BaseModel], served: Served, settings: Settings) -> Schema:
    """What a request may hold, within the limits of this model and these settings."""
    schema = request.model_json_schema()
    fields: dict[str, Schema] = schema["properties"]
    model = served.model
    last = model.schedule.num_train_timesteps - 1
    if "timestep" in fields:
        fields["timestep"] |= {"minimum": model.first_timestep if request is DenoiseRequest else 0, "maximum": last}
    if request is NoiseRequest:
        return schema

    samplers = [model.distilled.sampler] if model.distilled else list(SAMPLERS)
    fields["sampler"] = {**fields["sampler"], "anyOf": [{"type": "string", "enum": samplers}, {"type": "null"}]}
    if not any(SAMPLERS[sampler].takes_eta for sampler in samplers):
        fields["eta"]["maximum"] = 0
    fields["timeout_s"]["maximum"] = settings.timeout
    if model.num_classes is None or model.needs_label:
        fields["guidance_scale"]["maximum"] = 1

    steps: Schema = {"minimum": 1, "maximum": last + 1 if request is SampleRequest else max(1, last)}
    if model.distilled:
        steps["enum"] = [*model.distilled.num_inference_steps, *([None] if request is SampleRequest else [])]
    fields["num_inference_steps"] |= steps

    label, null = _label(served), [{"type": "null"}]
    if request is DenoiseRequest:
        if model.needs_label:
            schema["required"] = ["class_label", *schema["required"]]
            del fields["class_label"]["default"]
        fields["class_label"]["anyOf"] = label if model.needs_label else label + null
    else:
        labels = {**_array({"anyOf": label + null}), "minItems": 1, "maxItems": settings.max_images}
        fields["class_label"]["anyOf"] = [*label, *null, labels]
        fields["num_images"]["maximum"] = settings.max_images
        fields["preview_every"]["maximum"] = last + 1
    return schema


def numbers(request: type[BaseModel], served: Served, settings: Settings) -> dict[str, str]:
    """What each field that holds a number must be, in words."""
    fields: dict[str, Schema] = _schema(request, served, settings)["properties"]
    return {name: words for name, field in fields.items() if (words := _number_in_words(field))}


def _number_in_words(field: Schema) -> str | None:
    """The range of a field that holds a number; None of another."""
    members: list[Schema] = [*field.get("anyOf", []), field]
    kinds = {kind["type"] for kind in members if "type" in kind} - {"null"}
    if not kinds or not kinds <= {"integer", "number"}:
        return None
    limits = {name: value for member in members for name, value in member.items()}
    if "enum" in limits:
        return f"one of {', '.join(str(value) for value in limits['enum'] if value is not None)}"
    if "exclusiveMinimum" in limits:
        return f"a number of more than {limits['exclusiveMinimum']:g} and at most {limits['maximum']:g}"
    kind = "an integer" if kinds == {"integer"} else "a number"
    return f"{kind} from {limits['minimum']} to {limits['maximum']}"


def _without_null(schema: Schema) -> Schema | None:
    """What text in a query or a form can say, where null is said by leaving the field out; None for nothing at all."""
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


def _text_fields(schema: Schema) -> dict[str, Schema]:
    fields = {name: _without_null(field) for name, field in schema["properties"].items()}
    return {name: field for name, field in fields.items() if field}


def _query_parameters(schema: Schema) -> list[Schema]:
    return [
        {"name": name, "in": "query", "schema": field, "description": field["description"]}
        for name, field in _text_fields(schema).items()
    ]


def _upload(schema: Schema, served: Served, steps: int) -> Schema:
    files = "a PNG or .npy file of the model's image_shape"
    if served.model.vae:
        files = "a PNG of the model's image_shape, which is encoded, or an .npy of latents, of its latent_shape"
    file = {"type": "string", "format": "binary", "description": files}
    text = {**_BASE64_SENT, "description": "the same file in base64, perhaps as a data: URL"}
    required = ["image", *schema["required"]]
    by_form = {**schema, "properties": {"image": file, **_text_fields(schema)}, "required": required}
    by_json = {**schema, "properties": {"image": text, **schema["properties"]}, "required": required}
    example = {
        "image": base64.b64encode(encode_png(np.zeros(served.model.image_shape, np.float32), {})).decode(),
        "timestep": served.model.schedule.num_train_timesteps // 2,
    }
    if "num_inference_steps" in schema["properties"]:
        example["num_inference_steps"] = steps
    if "class_label" in required:
        example["class_label"] = 0
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": by_form},
            "application/json": {"schema": by_json, "example": example},
        },
    }


# The routes.


def _images(served: Served) -> Schema:
    """An answer in JSON."""
    stages = ("queue_s", "denoise_s", *(["decode_s"] if served.model.vae else []), "encode_s")
    image = _object(
        seed={"type": "integer", "minimum": 0},
        b64_json={**_BASE64, "contentMediaType": "image/png"},
    )
    return {
        "schema": _object(
            images=_array(image),
            parameters=_OBJECT,
            model=_object(name=_STRING, digest=_STRING, fingerprint=_STRING),
            timings=_object(**dict.fromkeys(stages, _NUMBER)),
        )
    }


def _sample_content(served: Served) -> Schema:
    return {
        "image/png": _BINARY,
        "application/json": _images(served),
        "application/zip": _BINARY,
        "text/event-stream": {"schema": _EVENT},
    }


def sample(served: Served, settings: Settings) -> dict[str, Any]:
    schema = _schema(SampleRequest, served, settings)
    body = {"content": {"application/json": {"schema": schema, "example": {"num_images": 1, "seed": 7}}}}
    return {
        "operation_id": "sample",
        "response_class": Response,
        "summary": "Generate images",
        "responses": _responses(_sample_content(served), {**_timing(served), **_VARY}),
        "openapi_extra": {"requestBody": body},
    }


def sample_by_query(served: Served, settings: Settings) -> dict[str, Any]:
    model = {
        "name": "model",
        "in": "query",
        "schema": {"type": "string", "enum": [served.fingerprint]},
        "description": "the fingerprint that must answer; the image may then be kept for a year",
    }
    headers = {**_timing(served), **_VARY, **_etag(required=False)}
    responses = _responses(_sample_content(served), headers)
    responses[304] = {
        "description": "If-None-Match names the image's ETag",
        "headers": {**_ID, **_CACHE, **_VARY, **_etag(required=True)},
    }
    return {
        "operation_id": "sample_by_query",
        "response_class": Response,
        "summary": "Generate images, by address: with a seed, a cacheable pure function",
        "responses": responses,
        "openapi_extra": {"parameters": [*_query_parameters(_schema(SampleRequest, served, settings)), model]},
    }


def denoise(served: Served, settings: Settings) -> dict[str, Any]:
    content = {
        "image/png": _BINARY,
        "application/json": _images(served),
        "application/x-npy": _BINARY,
        "text/event-stream": {"schema": _EVENT},
    }
    steps = min(served.model.distilled.num_inference_steps) if served.model.distilled else 1
    return {
        "operation_id": "denoise",
        "response_class": Response,
        "summary": "Denoise an image from a timestep",
        "responses": _responses(content, {**_timing(served), **_VARY}),
        "openapi_extra": {"requestBody": _upload(_schema(DenoiseRequest, served, settings), served, steps)},
    }


def noise(served: Served, settings: Settings) -> dict[str, Any]:
    content = {"image/png": _BINARY, "application/x-npy": _BINARY}
    never = [] if served.model.vae else [500, 504]  # where nothing has to be encoded or decoded
    return {
        "operation_id": "noise",
        "response_class": Response,
        "summary": "Add noise to a clean image: the forward process",
        "responses": _responses(content, {**_CLIPPED, **_VARY}, *never),
        "openapi_extra": {"requestBody": _upload(_schema(NoiseRequest, served, settings), served, steps=1)},
    }


def _health(operation_id: str, summary: str, statuses: list[str], other: str, headers: Schema) -> dict[str, Any]:
    def content(*among: str) -> Schema:
        return {"application/json": {"schema": _object(status={"type": "string", "enum": list(among)})}}

    well, *unwell = statuses
    responses: dict[int, Any] = {
        200: {"description": "Yes", "headers": {**_ID, **_CACHE}, "content": content(well)},
        503: {"description": other, "headers": {**_ID, **_CACHE, **headers}, "content": content(*unwell)},
    }
    return {"operation_id": operation_id, "summary": summary, "responses": responses, "response_class": Response}


def _facts(operation_id: str, summary: str, headers: Schema, content: Schema) -> dict[str, Any]:
    responses = {200: {"description": summary, "headers": {**_ID, **headers}, "content": content}, 401: _problem(401)}
    return {"operation_id": operation_id, "summary": summary, "responses": responses, "response_class": Response}


_NOT_READY = "No: status is loading, draining or failed"
_STATUSES = ["ready", "loading", "draining", "failed"]
LIVE = _health("live", "Whether the process can serve at all", ["live", "failed"], "No: only a new process can", {})
READY = _health("ready", "Whether a request would be served", _STATUSES, _NOT_READY, _RETRY)
HEALTH = _health("health", "The same as /health/ready", _STATUSES, _NOT_READY, _RETRY)
METRICS = _facts("metrics", "Prometheus text", {}, {"text/plain": {"schema": _STRING}})
INFO = _facts(
    "info",
    "The model, what computes it, and what a request may ask for",
    _CACHE,
    {"application/json": {"schema": _INFO}},
)
