"""What /openapi.json says of AUTOMATIC1111's API, made from what is said of /sample."""

from typing import Any

from starlette.responses import Response

from service.http import openapi
from service.http.a1111 import samplers
from service.http.a1111.fields import Txt2Img
from service.http.a1111.img2img import IMAGES, MASK, STRENGTH, Img2Img
from service.http.base64_files import PHOTO
from service.http.models import RequestModel
from service.http.openapi_bodies import base64_of, example_image
from service.http.responses import JSON
from service.http.schemas import Schema
from service.plan.fields import SampleRequest
from service.plan.served import Served

_STRING, _NUMBER, _INTEGER, _BOOLEAN = ({"type": kind} for kind in ("string", "number", "integer", "boolean"))
_NULL = {"type": "null"}
_OBJECT = {"type": "object"}
_STATE = openapi.object_of(
    skipped=_BOOLEAN,
    interrupted=_BOOLEAN,
    stopping_generation=_BOOLEAN,
    job=_STRING,
    job_count=_INTEGER,
    job_timestamp=_STRING,
    job_no=_INTEGER,
    sampling_step=_INTEGER,
    sampling_steps=_INTEGER,
)
_PROGRESS = openapi.object_of(
    progress={"type": "number", "minimum": 0, "maximum": 1},
    eta_relative=_NUMBER,
    state=_STATE,
    current_image={"anyOf": [_STRING, _NULL]},
    textinfo=_NULL,
)
_IMAGES = openapi.object_of(
    images={"type": "array", "items": _STRING},
    parameters=_OBJECT,
    info={**_STRING, "contentMediaType": "application/json"},
)
_NAMED = {"type": "array", "items": openapi.object_of(name=_STRING)}

_GETS: dict[str, tuple[str, Schema]] = {
    "progress": ("How far the caller's oldest request is, or the one that `id_task` names", _PROGRESS),
    "options": ("The options in force that programs read", _OBJECT),
    "sd-models": (
        "The model, in a list",
        {"type": "array", "items": openapi.object_of(title=_STRING, model_name=_STRING, hash=_STRING)},
    ),
    "samplers": ("The samplers", _NAMED),
    "schedulers": ("The schedulers", _NAMED),
    "embeddings": ("Empty: this server has none", openapi.object_of(loaded=_OBJECT, skipped=_OBJECT)),
}
_EMPTY = ("Empty: this server has none", {"type": "array", "maxItems": 0})
_TASK = {
    "name": "id_task",
    "in": "query",
    "schema": _STRING,
    "description": "The `force_task_id` of a request. By default the caller's oldest.",
}
_SKIP = {"name": "skip_current_image", "in": "query", "schema": _STRING, "description": "true: no preview."}
_OF_BODIES = (408, 413, 415, 422, 429, 431, 503)  # errors of routes that read a body


def get(name: str) -> dict[str, Any]:
    """A route that tells something."""
    summary, schema = _GETS.get(name, _EMPTY)
    parameters = [_TASK, _SKIP] if name == "progress" else []
    return _route(name.replace("-", "_"), summary, schema, parameters=parameters)


def interrupt() -> dict[str, Any]:
    summary = "Stop the caller's oldest request, or the one that `id_task` names"
    return _route("interrupt", summary, _OBJECT, parameters=[_TASK])


def set_options(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    names = {"type": "array", "items": _STRING}
    answer = {"anyOf": [openapi.object_of(ignored=names), _NULL]}
    summary = "Nothing can be set: null, or the names of what was to change"
    documentation = _route("set_options", summary, answer, requestBody={"content": {JSON: {"schema": _OBJECT}}})
    as_sample = openapi.sample(request, served)["responses"]
    documentation["responses"] |= {status: as_sample[status] for status in _OF_BODIES}
    return documentation


def txt2img(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    schema = _body(request, served, Txt2Img)
    return _drawing("txt2img", "Generate images, as AUTOMATIC1111's API", schema, _example(served), request, served)


def img2img(request: RequestModel[SampleRequest], served: Served) -> dict[str, Any]:
    schema = _body(request, served, Img2Img)
    file = base64_of(PHOTO)
    properties = {
        **schema["properties"],
        IMAGES: {
            "type": "array",
            "items": file,
            "minItems": 1,
            "maxItems": 1,
            "description": f"One image that is drawn anew: {PHOTO.what}, in base64.",
        },
        MASK: {
            "anyOf": [file, {"type": "string", "maxLength": 0}, _NULL],
            "description": f"{PHOTO.what}, in base64: what is white in it is drawn anew, and the rest is kept.",
        },
    }
    schema = {**schema, "required": [IMAGES], "properties": properties}
    example = {**_example(served), IMAGES: [example_image(served)], "denoising_strength": STRENGTH}
    return _drawing("img2img", "Draw an image anew, or a part of it", schema, example, request, served)


def _drawing(
    name: str,
    summary: str,
    schema: Schema,
    example: Schema,
    request: RequestModel[SampleRequest],
    served: Served,
) -> dict[str, Any]:
    as_sample = openapi.sample(request, served)["responses"]
    done = as_sample[200]
    headers = {name: header for name, header in done["headers"].items() if name != "Vary"}
    responses = {
        200: {**done, "headers": headers, "content": {JSON: {"schema": _IMAGES}}},
        404: {**as_sample[422], "description": "No sampler has this name; the sentence lists those that are served"},
        **{status: one for status, one in as_sample.items() if status not in (200, 406)},
    }
    return {
        "operation_id": f"a1111_{name}",
        "response_class": Response,
        "summary": summary,
        "responses": responses,
        "openapi_extra": {
            "requestBody": {
                "required": bool(schema.get("required")),
                "content": {JSON: {"schema": schema, "example": example}},
            }
        },
    }


def _example(served: Served) -> dict[str, Any]:
    if served.model.text is not None:
        return {"prompt": "a fox in the snow", "steps": 20, "seed": -1}
    return {"prompt": served.model.class_names[0] if served.model.class_names else "", "seed": -1}


def _body(request: RequestModel[SampleRequest], served: Served, kind: type[Txt2Img]) -> Schema:
    """The schema of a body, without images. It has no field that is ignored."""
    max_images = request.schema["properties"]["num_images"]["maximum"]
    schema = kind.model_json_schema()
    properties: dict[str, Schema] = schema["properties"]
    properties["override_settings"]["anyOf"] = [schema["$defs"]["Settings"], _NULL]
    for name in ("batch_size", "n_iter"):
        properties[name]["anyOf"][0]["maximum"] = max_images
    if served.model.distilled is None:
        properties["steps"]["anyOf"][0]["maximum"] = served.model.schedule.num_train_timesteps
    names = ", ".join(one.name for one in samplers.served_samplers(served.model))
    labels = ", ".join(one.label for one in samplers.served_schedulers(served.model))
    said = {
        "prompt": _meaning_of_prompts(served),
        "seed": "Image i is the image of seed + i. -1: the server draws one, and tells it in `info`.",
        "sampler_name": f"{names}, perhaps with a scheduler's name after it. Default: what the weights recommend.",
        "sampler_index": "The older name of `sampler_name`.",
        "scheduler": f"{labels}. Another one is told in `info`, and is not taken.",
        "steps": "Default: what the weights recommend.",
        "cfg_scale": "Default: what the weights recommend.",
        "eta": "Noise in DDIM's steps.",
        "width": "With `height`: the served size that is nearest is drawn.",
        "n_iter": "How often `batch_size` images are drawn.",
        "send_images": "false: the answer has no images.",
        "denoising_strength": f"How far the image is drawn anew: the share of the steps. Default: {STRENGTH}.",
        "resize_mode": "How the image gets the size. 0: stretched; 1: cropped from the middle; 2 and 3: as 0.",
        "inpainting_mask_invert": "1: what is black in the mask is drawn anew.",
        "force_task_id": "A name by which `progress` and `interrupt` know the request.",
    }
    described = {
        name: {**one, **({"description": said[name]} if name in said else {})} for name, one in properties.items()
    }
    return {"type": "object", "properties": described, "additionalProperties": True}


def _meaning_of_prompts(served: Served) -> str:
    if served.model.text is not None:
        return "What is drawn, in words, with (weights:1.2)."
    if served.model.num_classes is not None:
        return "Names the class that is drawn. Empty: none."
    return "No effect: this model draws without words."


def _route(name: str, summary: str, schema: Schema, **more: Any) -> dict[str, Any]:
    as_info = openapi.INFO["responses"]
    return {
        "operation_id": f"a1111_{name}",
        "response_class": Response,
        "summary": summary,
        "responses": {
            200: {**as_info[200], "description": summary, "content": {JSON: {"schema": schema}}},
            401: as_info[401],
        },
        "openapi_extra": {name: value for name, value in more.items() if value},
    }
