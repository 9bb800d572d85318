"""What /openapi.json and /v1/models say of OpenAI's API, made from what is said of /sample."""

from typing import Any

from starlette.responses import Response

from service.http import openapi
from service.http.base64_files import PHOTO
from service.http.models import RequestModel
from service.http.openai.fields import ALIASES, FORMATS, MOST_PARTIAL_IMAGES, OWN, RESPONSE_FORMATS
from service.http.openapi_bodies import FILE, base64_of, example_image
from service.http.parsing import FORM
from service.http.responses import EVENTS, JSON
from service.http.schemas import Schema, without_null
from service.plan.fields import SampleRequest
from service.plan.served import Served
from service.plan.shared_fields import MAX_PROMPT

_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}
_NULL = {"type": "null"}
_PROMPT = {"type": "string", "maxLength": MAX_PROMPT}  # JSON Schema counts characters, and the service counts bytes
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _STRING,
                "type": _STRING,
                "param": {"anyOf": [_STRING, _NULL]},
                "code": {"anyOf": [_STRING, _NULL]},
            },
        }
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by", "schema"],
    "properties": {
        "id": _STRING,
        "object": {"const": "model"},
        "created": _INTEGER,
        "owned_by": _STRING,
        "schema": {"type": "object"},
    },
}
_USAGE = {
    "type": "object",
    "required": ["input_tokens", "input_tokens_details", "output_tokens", "total_tokens"],
    "properties": dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _INTEGER),
}
_IMAGES = {
    "type": "object",
    "required": ["created", "data", "output_format", "size", "usage", "warnings"],
    "properties": {
        "created": _INTEGER,
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["seed"],
                "properties": {"b64_json": _STRING, "url": _STRING, "seed": _INTEGER},
            },
        },
        "output_format": {"enum": ["png", "webp", "jpeg"]},
        "size": _STRING,
        "usage": _USAGE,
        "warnings": {"type": "array", "items": _STRING},
    },
}
_EVENT = {"type": "object", "required": ["data"], "properties": {"event": _STRING, "data": _STRING}}
_IGNORED = {
    "X-Ignored-Fields": {"description": "fields without effect, with commas", "schema": _STRING, "required": False}
}
_EDITED = {
    "image": f"{PHOTO.what}, which is drawn anew. Also `image[]`.",
    "mask": f"{PHOTO.what}: what is transparent in it is drawn anew. One without transparent parts is refused. "
    "Default: what is transparent in the image, or all of it.",
}
_MODERATED = "A check of the operator refuses the prompt or an image; code is moderation_blocked"


def body(request: RequestModel[SampleRequest], served: Served) -> Schema:
    """The schema of a body. It names no alias, and no field that is ignored."""
    own: dict[str, Schema] = request.schema["properties"]
    others = {name: own[name] for name in OWN if name not in ("height", "width", "num_images")}
    most = own["num_images"]["maximum"]
    texts: Schema = {"anyOf": [_PROMPT, {"type": "array", "items": _PROMPT, "minItems": 1, "maxItems": most}]}
    described: dict[str, Schema] = {
        **others,
        "prompt": {**texts, "description": _meaning_of_prompts(served)},
        "n": own["num_images"],
        "size": {
            "type": "string",
            "pattern": "^([1-9][0-9]{0,4}x[1-9][0-9]{0,4}|auto|)$",
            "description": "WIDTHxHEIGHT, or auto. The nearest served aspect is drawn. Also `width` and `height`.",
        },
        "response_format": {
            "enum": list(RESPONSE_FORMATS),
            "default": "b64_json",
            "description": "url: an address that draws the image again, or a data: URL.",
        },
        "output_format": {"enum": list(FORMATS), "default": "png"},
        "output_compression": {
            "type": "integer",
            "minimum": 0,
            "maximum": 100,
            "description": "Quality of a WebP or JPEG; no effect on a PNG.",
        },
        "stream": {"type": "boolean", "default": False, "description": "Answer as text/event-stream."},
        "partial_images": {
            "type": "integer",
            "minimum": 0,
            "maximum": MOST_PARTIAL_IMAGES,
            "description": "In a stream, the most previews of each image.",
        },
    }
    if served.model.text is None:
        described["negative_prompt"] = {**texts, "description": "No effect: this model has no text."}
    for alias, name in ALIASES.items():
        if name in described:
            said = f"{described[name].get('description', '')} Also `{alias}`."
            described[name] = {**described[name], "description": said}
    properties = {name: _or_null(one) for name, one in described.items()}
    properties["model"] = {"description": "No effect: one model is served."}
    if served.model.text is not None:
        properties["prompt"] = described["prompt"]
    return {"type": "object", "required": _required(served), "properties": properties, "additionalProperties": True}


def generations(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    example = {**_example(served), "n": 1, "size": "auto"}
    content = {JSON: {"schema": body(request, served), "example": example}}
    return {
        "operation_id": "openai_generations",
        "summary": "Generate images, as OpenAI's Images API",
        **_drawing(request, served, {"required": bool(_required(served)), "content": content}),
    }


def edits(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    drawn = body(request, served)
    required = ["image", *drawn["required"]]
    by_json = {name: {**base64_of(PHOTO), "description": f"{what}, in base64"} for name, what in _EDITED.items()}
    by_json["mask"] = _or_null(by_json["mask"])
    by_form = {name: {**FILE, "description": what} for name, what in _EDITED.items()}
    as_text = {name: text for name, one in drawn["properties"].items() if (text := without_null(one))}
    as_text["model"] = {**as_text["model"], **_STRING}
    example = {**_example(served), "image": example_image(served)}
    content = {
        FORM: {"schema": {**drawn, "required": required, "properties": {**as_text, **by_form}}},
        JSON: {
            "schema": {**drawn, "required": required, "properties": {**drawn["properties"], **by_json}},
            "example": example,
        },
    }
    documentation = _drawing(request, served, {"required": True, "content": content})
    documentation["responses"][400]["description"] = f"There are several images, or: {_MODERATED}"
    return {"operation_id": "openai_edits", "summary": "Draw an image anew, or a part of it", **documentation}


def _drawing(request: RequestModel[SampleRequest], served: Served, sent: Schema) -> dict[str, Any]:
    as_sample = openapi.sample(request, served)["responses"]
    done = as_sample[200]
    headers = {name: header for name, header in done["headers"].items() if name != "Vary"}
    responses = {
        200: {
            **done,
            "headers": {**headers, **_IGNORED},
            "content": {JSON: {"schema": _IMAGES}, EVENTS: {"schema": _EVENT}},
        },
        400: _error({**as_sample[422], "description": _MODERATED}),
        **{status: _error(one) for status, one in as_sample.items() if status not in (200, 406)},
    }
    return {"response_class": Response, "responses": responses, "openapi_extra": {"requestBody": sent}}


def _example(served: Served) -> dict[str, Any]:
    if served.model.text is not None:
        return {"prompt": "a fox in the snow"}
    return {"prompt": served.model.class_names[0] if served.model.class_names else ""}


def models() -> dict[str, Any]:
    listed = {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
    }
    return _facts("openai_models", "The model that is served, in a list", listed)


def model(name: str) -> dict[str, Any]:
    documentation = _facts("openai_model", "The model that is served, and the fields of its requests", _MODEL)
    locked = documentation["responses"][401]
    headers = {name: header for name, header in locked["headers"].items() if name != "WWW-Authenticate"}
    documentation["responses"][404] = {**locked, "headers": headers, "description": "Another model"}
    named = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": [name]}}
    return {**documentation, "openapi_extra": {"parameters": [named]}}


def _facts(operation_id: str, summary: str, schema: Schema) -> dict[str, Any]:
    as_info = openapi.INFO["responses"]
    return {
        "operation_id": operation_id,
        "response_class": Response,
        "summary": summary,
        "responses": {
            200: {**as_info[200], "description": summary, "content": {JSON: {"schema": schema}}},
            401: _error(as_info[401]),
        },
    }


def _error(answer: Schema) -> Schema:
    return {**answer, "content": {JSON: {"schema": _ERROR}}}


def _or_null(schema: Schema) -> Schema:
    if "anyOf" in schema:
        others = [one for one in schema["anyOf"] if one != _NULL]
        return {**schema, "anyOf": [*others, _NULL]}
    kind = {name: value for name, value in schema.items() if name not in ("description", "default", "title")}
    rest = {name: value for name, value in schema.items() if name in ("description", "default", "title")}
    return {**rest, "anyOf": [kind, _NULL]}


def _required(served: Served) -> list[str]:
    return [] if served.model.text is None else ["prompt"]


def _meaning_of_prompts(served: Served) -> str:
    if served.model.text is not None:
        return "What is drawn, in words. Several: one for each image."
    if served.model.num_classes is not None:
        return "Names the class that is drawn. Empty: none. Several: one for each image."
    return "No effect: this model draws without words."
