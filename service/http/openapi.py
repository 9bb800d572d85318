"""The contents of /openapi.json for routes that read their bodies themselves, with the served model's limits.

The server accepts every request that is valid by this document, except the values that `_INVALID` lists. JSON Schema
cannot express those rules.
"""

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from service.http.models import RequestModel
from service.http.openapi_bodies import sample_body, upload_body
from service.http.responses import EVENTS, JSON, image_media, noise_media, sample_media
from service.http.schemas import Schema
from service.plan.entries import table
from service.plan.fields import DenoiseRequest, NoiseRequest, SampleRequest
from service.plan.served import Served

_REFUSED = {row.name: row.entry.refused for row in table(DenoiseRequest).values()} | {
    row.name: row.entry.refused for row in table(SampleRequest).values()
}
_INVALID = (
    "Invalid input; the document names each field. Beyond the schema, these values are refused:\n"
    + "".join(
        f"- `{name}`: {refused}\n"
        for name, refused in {
            **_REFUSED,
            "image": "a file that is no image; in /denoise and /noise, one whose size is not among the `sizes`",
            "mask_image": "a file that is no image; any without an `image`",
        }.items()
        if refused
    )
    + "Also what a check of the operator refuses; the document has the reason.\n"
)
_PROBLEMS = {
    401: "An API key is needed",
    406: "No answer of an accepted media type",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body's media type or Content-Encoding is not read",
    422: _INVALID,
    431: "The address and the headers are too large",
    429: "The client holds its share of a full queue, or of the room for bodies; Retry-After says when to ask again",
    500: "This request's own computation failed",
    503: "Not now; Retry-After says when",
    504: "Not done within timeout_s",
}

_STRING, _NUMBER, _OBJECT = {"type": "string"}, {"type": "number"}, {"type": "object"}
_COUNT = {"type": "integer", "minimum": 1}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def object_of(**properties: Schema) -> Schema:
    """An object that has all of these."""
    return {"type": "object", "required": list(properties), "properties": properties}


def _array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


# Most validators ignore contentEncoding, so a pattern describes base64 too.
_BASE64 = {
    "type": "string",
    "contentEncoding": "base64",
    "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
}
_EVENT = object_of(
    event={"type": "string", "enum": ["queued", "progress", "preview", "image", "done", "error"]},
    data={"type": "string", "contentMediaType": "application/json"},
)
_FIELD_ERROR = object_of(loc=_array({"anyOf": [_STRING, {"type": "integer"}]}), msg=_STRING)
_PROBLEM = object_of(type=_STRING, title=_STRING, status={"type": "integer", "minimum": 400}, detail=_STRING)
_PROBLEM["properties"]["errors"] = _array(_FIELD_ERROR)
_SHAPE = {**_array(_COUNT), "minItems": 3, "maxItems": 3}
_SECONDS = {"type": "object", "additionalProperties": _NUMBER}
_INFO = object_of(
    version=_STRING,
    model=object_of(name=_STRING, digest=_STRING, architecture=_STRING, num_parameters=_COUNT),
    prediction_type=_STRING,
    num_train_timesteps=_COUNT,
    image_shape=_SHAPE,
    latent_shape=_or_null(_SHAPE),
    sizes=_array(
        object_of(width=_COUNT, height=_COUNT, seconds_per_step=_SECONDS, seconds_per_decode=_or_null(_SECONDS)),
    ),
    first_stage=_or_null(object_of(kind=_STRING, factor=_COUNT, scaling_factor=_NUMBER, num_parameters=_COUNT)),
    preview=_or_null({"type": "string", "enum": ["linear"]}),
    text=_or_null(
        object_of(
            length=_COUNT,
            layers=_COUNT,
            num_parameters=_COUNT,
            encoders=_COUNT,
            force_zeros_for_empty_prompt={"type": "boolean"},
            max_prompt_bytes=_COUNT,
            max_prompt_tokens=_COUNT,
        )
    ),
    embedded_fields=_array(_STRING),
    safety_checker={"type": "string", "enum": ["none", "not run"]},
    inpaints={"type": "boolean"},
    out_channels=_COUNT,
    num_classes=_or_null(_COUNT),
    class_names=_or_null(_array(_STRING)),
    samplers=_array(_STRING),
    sigma_schedules={"type": "object", "additionalProperties": _array(_STRING)},
    num_inference_steps=_or_null(_array(_COUNT)),
    recommended=object_of(
        sampler=_STRING, num_inference_steps=_COUNT, guidance_scale=_NUMBER, timesteps=_or_null(_array(_COUNT))
    ),
    limits=object_of(max_images=_COUNT, max_batch=_COUNT, max_queue=_COUNT, max_body=_COUNT, timeout_s=_NUMBER),
    device=_STRING,
    backend=_STRING,
    precision=_STRING,
    fingerprint=_STRING,
    fingerprint_parts=_OBJECT,
    reproducible={"type": "boolean"},
    seconds_per_step=_SECONDS,
    seconds_per_decode=_or_null(_SECONDS),
)


# Headers. A client may rely on required headers.


def _header(description: str, schema: Schema, required: bool = True) -> Schema:
    return {"description": description, "schema": schema, "required": required}


_ID = {"X-Request-ID": _header("the request's own, where it is a sane one", {**_STRING, "minLength": 1})}
_CACHE = {"Cache-Control": _header("how long the answer may be kept", _STRING)}
_SEED = {"X-Seed": _header("of the first image", {"type": "integer", "minimum": 0})}
_WARNINGS = {"X-Warnings": _header("what the client may not expect, in sentences", _STRING, required=False)}
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
        headers["WWW-Authenticate"] = _header("Bearer, and for people at a browser Basic", _STRING)
    if status in (429, 503):
        headers |= _RETRY
    content = {"application/problem+json": {"schema": _PROBLEM}}
    return {"description": _PROBLEMS[status], "headers": headers, "content": content}


def _responses(content: Schema, headers: Schema) -> dict[int | str, Schema]:
    problems: dict[int | str, Schema] = {status: _problem(status) for status in _PROBLEMS}
    done = {"description": "The images", "headers": {**_ID, **_CACHE, **_SEED, **headers}, "content": content}
    return {200: done, **problems}


# The routes.


def _query_parameters(request: RequestModel[Any]) -> list[Schema]:
    return [
        {"name": name, "in": "query", "schema": field, "description": field["description"]}
        for name, field in request.text_schema["properties"].items()
    ]


def _images(served: Served) -> Schema:
    """The content of a JSON answer with images."""
    stages = ("queue_s", "denoise_s", *(["decode_s"] if served.model.vae else []), "encode_s")
    image = object_of(
        seed={"type": "integer", "minimum": 0},
        b64_json={**_BASE64, "contentMediaType": "image/png"},
    )
    return {
        "schema": object_of(
            images=_array(image),
            parameters=_OBJECT,
            model=object_of(name=_STRING, digest=_STRING, fingerprint=_STRING),
            warnings=_array(_STRING),
            timings=object_of(**dict.fromkeys(stages, _NUMBER)),
        )
    }


def _content(served: Served, media_types: Sequence[str]) -> Schema:
    """The content of an answer, by its media types."""
    described = {JSON: _images(served), EVENTS: {"schema": _EVENT}}
    return {media_type: described.get(media_type, _BINARY) for media_type in media_types}


def sample(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    return {
        "operation_id": "sample",
        "response_class": Response,
        "summary": "Generate images",
        "responses": _responses(_content(served, sample_media(served)), {**_timing(served), **_WARNINGS, **_VARY}),
        "openapi_extra": {"requestBody": sample_body(request, served)},
    }


def sample_by_query(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    model = {
        "name": "model",
        "in": "query",
        "schema": {"type": "string", "enum": [served.fingerprint]},
        "description": "the fingerprint that must answer; the image may then be kept for a year",
    }
    headers = {**_timing(served), **_WARNINGS, **_VARY, **_etag(required=False)}
    responses = _responses(_content(served, sample_media(served)), headers)
    responses[304] = {
        "description": "If-None-Match names the image's ETag",
        "headers": {**_ID, **_CACHE, **_VARY, **_etag(required=True)},
    }
    return {
        "operation_id": "sample_by_query",
        "response_class": Response,
        "summary": "Generate images, by address: with a seed, a cacheable pure function",
        "responses": responses,
        "openapi_extra": {"parameters": [*_query_parameters(request), model]},
    }


def denoise(request: RequestModel[DenoiseRequest], served: Served) -> dict[str, Any]:
    content = _content(served, image_media(served))
    steps = min(served.model.distilled.num_inference_steps) if served.model.distilled else 1
    return {
        "operation_id": "denoise",
        "response_class": Response,
        "summary": "Denoise an image from a timestep",
        "responses": _responses(content, {**_timing(served), **_WARNINGS, **_VARY}),
        "openapi_extra": {"requestBody": upload_body(request, served, steps)},
    }


def noise(request: RequestModel[NoiseRequest], served: Served) -> dict[str, Any]:
    content = _content(served, noise_media(served))
    return {
        "operation_id": "noise",
        "response_class": Response,
        "summary": "Add noise to a clean image: the forward process",
        "responses": _responses(content, {**_CLIPPED, **_timing(served), **_VARY}),
        "openapi_extra": {"requestBody": upload_body(request, served, steps=1)},
    }


def _health(operation_id: str, summary: str, statuses: list[str], other: str, headers: Schema) -> dict[str, Any]:
    def content(*among: str) -> Schema:
        return {"application/json": {"schema": object_of(status={"type": "string", "enum": list(among)})}}

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
