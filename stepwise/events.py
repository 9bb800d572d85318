"""text/event-stream → events. Bytes come in pieces of any size.

The format is that of https://html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import base64
import codecs
import json
import re
from typing import Any, NamedTuple, TypedDict

from stepwise.results import Done, Event, Image, ImageDone, Preview, Progress, Queued
from stepwise.shapes import checked

_LINE_END = re.compile("\r\n|\n|\r")


class Message(NamedTuple):
    """An event as it came: its name and its data."""

    name: str
    data: str


class Parser:
    """Takes the bytes of a stream as they come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._line: list[str] = []  # pieces of the line that has not ended
        self._ends_in_cr = False  # the last piece; a line feed that follows ends no other line
        self._name = ""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> list[Message]:
        """What this piece completes."""
        text = self._decoder.decode(piece)
        if not text:
            return []
        begin = 1 if self._ends_in_cr and text[0] == "\n" else 0
        self._ends_in_cr = text[-1] == "\r"
        *ended, rest = _LINE_END.split(text[begin:])
        messages = []
        for end in ended:
            line = "".join([*self._line, end])
            self._line.clear()
            if line:
                self._take(line)
            elif (message := self._finish()) is not None:
                messages.append(message)
        self._line.append(rest)
        return messages

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        match field:
            case "event":
                self._name = value.removeprefix(" ")
            case "data":
                self._data.append(value.removeprefix(" "))
            case _:  # a comment, whose name is empty; or a field of EventSource's own
                pass

    def _finish(self) -> Message | None:
        name, data = self._name or "message", self._data
        self._name, self._data = "", []
        return Message(name, "\n".join(data)) if data else None


class _Queued(TypedDict):
    position: int
    eta_s: float
    promise_s: float


class _Progress(TypedDict):
    step: int
    steps: int
    eta_s: float


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


def read_event(message: Message) -> Event | None:
    """The event that a message is; None of a kind that is not known here.

    Raises:
        KeyError, TypeError, ValueError: where it is not what docs/api.md says.
    """
    if message.name not in _SHAPES:
        return None
    data: dict[str, Any] = checked(json.loads(message.data), _SHAPES[message.name])
    match message.name:
        case "queued":
            return Queued(data["position"], data["eta_s"], data["promise_s"])
        case "progress":
            return Progress(data["step"], data["steps"], data["eta_s"])
        case "preview":
            return Preview(data["index"], data["step"], _png(data), data.get("decoder"))
        case "image":
            return ImageDone(data["index"], Image(data["seed"], _png(data)))
        case _:
            return Done(data["parameters"], data["timings"])


def _png(data: dict[str, Any]) -> bytes:
    return base64.b64decode(data["b64_json"], validate=True)
