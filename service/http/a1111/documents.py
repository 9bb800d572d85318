"""What /openapi.json says of the routes of AUTOMATIC1111's API."""

from typing import Any

from starlette.responses import Response

_SUMMARIES = {
    "txt2img": "Generate images",
    "img2img": "Not built: answers 501",
    "interrupt": "Stop the caller's request: it answers with the images that are done",
    "options": "The options that are in force",
    "progress": "How far the caller's request is",
    "sd-models": "The model",
    "samplers": "The samplers",
    "schedulers": "The schedulers",
}


def post(name: str) -> dict[str, Any]:
    return {"operation_id": f"a1111_post_{name}", "summary": _SUMMARIES[name], "response_class": Response}


def get(name: str) -> dict[str, Any]:
    summary = _SUMMARIES.get(name, "Empty: this server has none")
    return {"operation_id": f"a1111_{name.replace('-', '_')}", "summary": summary, "response_class": Response}
