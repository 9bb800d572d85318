"""What /openapi.json says of the routes that read their bodies themselves."""

from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from service.schemas import DenoiseRequest, NoiseRequest, SampleRequest

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["loc", "msg"],
                "properties": {
                    "loc": {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}},
                    "msg": {"type": "string"},
                },
            },
        },
    },
}
_STRING, _NUMBER = {"type": "string"}, {"type": "number"}
_IMAGES_SCHEMA = {
    "type": "object",
    "required": ["images", "parameters", "model", "timings"],
    "properties": {
        "images": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["seed", "b64_json"],
                "properties": {"seed": {"type": "integer"}, "b64_json": _STRING},
            },
        },
        "parameters": {"type": "object"},
        "model": {
            "type": "object",
            "required": ["name", "digest", "fingerprint"],
            "properties": {"name": _STRING, "digest": _STRING, "fingerprint": _STRING},
        },
        "timings": {
            "type": "object",
            "required": ["queue_s", "denoise_s", "encode_s"],
            "properties": {"queue_s": _NUMBER, "denoise_s": _NUMBER, "encode_s": _NUMBER},
        },
    },
}
_PROBLEMS = {
    401: "An API key is needed",
    406: "No answer of an accepted media type",
    413: "The body is too large",
    415: "The body's media type is not read",
    422: "Invalid input; the document names each field",
    429: "The client holds its share of a full queue; Retry-After says when to ask again",
    500: "This request's own computation failed",
    503: "Not now; Retry-After says when",
    504: "Not done within timeout_s",
}


def _responses(content: dict[str, Any], *without: int) -> dict[int | str, dict[str, Any]]:
    problem_content = {"application/problem+json": {"schema": _PROBLEM_SCHEMA}}
    problems: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": problem_content}
        for status, text in _PROBLEMS.items()
        if status not in without
    }
    return {200: {"description": "The images", "content": content}, **problems}


def _inline(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template="#/components/schemas/{model}")


def _query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
        for name, schema in _inline(model)["properties"].items()
    ]


def _upload(model: type[BaseModel]) -> dict[str, Any]:
    def with_image(image: dict[str, Any]) -> dict[str, Any]:
        schema = _inline(model)
        return {
            **schema,
            "properties": {"image": image, **schema["properties"]},
            "required": ["image", *schema.get("required", [])],
        }

    file = {"type": "string", "format": "binary", "description": "a PNG or .npy file of the model's image_shape"}
    text = {"type": "string", "contentEncoding": "base64", "description": "the same file in base64"}
    return {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": with_image(file)},
            "application/json": {"schema": with_image(text)},
        },
    }


_SAMPLE_CONTENT = {
    "image/png": _BINARY,
    "application/json": {"schema": _IMAGES_SCHEMA},
    "application/zip": _BINARY,
    "text/event-stream": {"schema": _STRING},
}

SAMPLE: dict[str, Any] = {
    "operation_id": "sample",
    "response_class": Response,
    "summary": "Generate images",
    "responses": _responses(_SAMPLE_CONTENT),
    "openapi_extra": {"requestBody": {"content": {"application/json": {"schema": _inline(SampleRequest)}}}},
}
SAMPLE_BY_QUERY: dict[str, Any] = {
    "operation_id": "sample_by_query",
    "response_class": Response,
    "summary": "Generate images, by address: with a seed, a cacheable pure function",
    "responses": {
        **_responses(_SAMPLE_CONTENT, 413, 415),
        304: {"description": "If-None-Match names the image's ETag"},
    },
    "openapi_extra": {
        "parameters": [
            *_query_parameters(SampleRequest),
            {
                "name": "model",
                "in": "query",
                "schema": {"type": "string"},
                "description": "the fingerprint that must answer; the image may then be kept for a year",
            },
        ]
    },
}
DENOISE: dict[str, Any] = {
    "operation_id": "denoise",
    "response_class": Response,
    "summary": "Denoise an image from a timestep",
    "responses": _responses(
        {
            "image/png": _BINARY,
            "application/json": {"schema": _IMAGES_SCHEMA},
            "application/x-npy": _BINARY,
            "text/event-stream": {"schema": _STRING},
        }
    ),
    "openapi_extra": {"requestBody": _upload(DenoiseRequest)},
}
NOISE: dict[str, Any] = {
    "operation_id": "noise",
    "response_class": Response,
    "summary": "Add noise to a clean image: the forward process",
    "responses": _responses({"image/png": _BINARY, "application/x-npy": _BINARY}, 429, 500, 503, 504),
    "openapi_extra": {"requestBody": _upload(NoiseRequest)},
}


def _health(operation_id: str, summary: str, other: str | None) -> dict[str, Any]:
    status = {"application/json": {"schema": {"type": "object", "properties": {"status": _STRING}}}}
    responses: dict[int, Any] = {200: {"description": "Yes", "content": status}}
    if other is not None:
        responses[503] = {"description": other, "content": status}
    return {"operation_id": operation_id, "summary": summary, "responses": responses, "response_class": Response}


def _facts(operation_id: str, summary: str, content: dict[str, Any]) -> dict[str, Any]:
    problem = {"description": _PROBLEMS[401], "content": {"application/problem+json": {"schema": _PROBLEM_SCHEMA}}}
    responses = {200: {"description": summary, "content": content}, 401: problem}
    return {"operation_id": operation_id, "summary": summary, "responses": responses, "response_class": Response}


_NOT_READY = "No: status is loading, draining or failed"
LIVE = _health("live", "Whether the process can serve at all", "No: only a new process can")
READY = _health("ready", "Whether a request would be served", _NOT_READY)
HEALTH = _health("health", "The same as /health/ready", _NOT_READY)
METRICS = _facts("metrics", "Prometheus text", {"text/plain": {"schema": _STRING}})
INFO = _facts(
    "info",
    "The model, what computes it, and what a request may ask for",
    {"application/json": {"schema": {"type": "object"}}},
)
