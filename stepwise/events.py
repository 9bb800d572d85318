"""Parses the JSON of a stream's events. httpx-sse parses the stream itself."""

import base64
import json
from typing import Any, NotRequired, TypedDict

from httpx_sse import ServerSentEvent

from stepwise.results import Done, Event, Image, ImageDone, Preview, Progress, Queued
from stepwise.shapes import checked


class _Queued(TypedDict):
    position: int
    eta_s: float
    promise_s: float
    warnings: NotRequired[list[str]]


class _Progress(TypedDict):
    step: int
    steps: int
    eta_s: float
    images_done: NotRequired[int]
    images: NotRequired[int]
    fraction: NotRequired[float]


class _Preview(TypedDict):
    index: int
    step: int
    b64_json: str


class _Image(TypedDict):
    index: int
    seed: int
    b64_json: str


class _Done(TypedDict):
    parameters: dict[str, Any]
    timings: dict[str, float]


_SHAPES = {"queued": _Queued, "progress": _Progress, "preview": _Preview, "image": _Image, "done": _Done}


def read_event(sent: ServerSentEvent) -> Event | None:
    """The event; None for a kind that this client does not know.

    Raises:
        KeyError, TypeError, ValueError: the data is not as in docs/api.md.
    """
    if sent.event not in _SHAPES:
        return None
    data: dict[str, Any] = checked(json.loads(sent.data), _SHAPES[sent.event])
    match sent.event:
        case "queued":
            return Queued(data["position"], data["eta_s"], data["promise_s"], tuple(data.get("warnings", ())))
        case "progress":
            share = data["step"] / max(1, data["steps"])
            more = data.get("images_done"), data.get("images"), data.get("fraction", share)
            return Progress(data["step"], data["steps"], data["eta_s"], *more)
        case "preview":
            return Preview(data["index"], data["step"], _png(data), data.get("decoder"))
        case "image":
            return ImageDone(data["index"], Image(data["seed"], _png(data)))
        case _:
            return Done(data["parameters"], data["timings"])


def _png(data: dict[str, Any]) -> bytes:
    return base64.b64decode(data["b64_json"], validate=True)
