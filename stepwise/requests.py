"""Each call of the API once, as a value. This module sends nothing.

A call's arguments are the fields of its request: service/plan/fields.py. A Call also knows how to read its answer. All
streams have the same events, so a call for a stream is only a Request.
"""

import base64
import functools
import inspect
import io
import json
import operator
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Generic, Literal, ParamSpec, TypeVar, cast

import httpx
import numpy as np
from numpy.typing import NDArray

from service.plan import fields
from service.plan.entries import Entry, Field, table
from stepwise import answers
from stepwise.results import Drawn, DrawnArray, Float32, Info, Noisy, NoisyArray, Picture

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

PNG, JSON, NPY, EVENTS = "image/png", "application/json", "application/x-npy", "text/event-stream"

Fields = Mapping[str, object]
Upload = bytes | NDArray[np.floating] | os.PathLike[str]
File = bytes | str | os.PathLike[str] | BinaryIO  # by its bytes, its path, or open

_FILES = ("image", "mask_image")  # the arguments that are files

# Seconds without a byte, after which a connection counts as dead.
_SILENCE_S = 60.0  # beyond the time of the work; a stream has a comment every 10 s
_LONG_S = 3600.0  # for a request whose time the server limits
_LONGEST_S = 86400.0


@dataclass(frozen=True)
class Request:
    """A request, ready to send.

    Attributes:
        accept: the media type of the answer.
        fields: the JSON of the body; None for no body.
        silence_s: the most seconds without a byte of the answer.
    """

    method: Literal["GET", "POST"]
    path: str
    accept: str
    fields: Fields | None = None
    silence_s: float = _SILENCE_S

    @property
    def headers(self) -> dict[str, str]:
        return {"Accept": self.accept} | ({} if self.fields is None else {"Content-Type": JSON})

    @property
    def content(self) -> bytes | None:
        if self.fields is None:
            return None
        return json.dumps(self.fields, default=operator.index).encode()  # for NumPy's integers

    def with_seed(self, seed: int) -> "Request":
        return replace(self, fields={**(self.fields or {}), "seed": seed})


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and the parser of its answer.

    Attributes:
        read: parses the headers and the body of an answer in the requested media type. Raises errors of any kind if
            they are not as in docs/api.md.
    """

    request: Request
    read: Callable[[httpx.Headers, bytes], T]


# The arguments of calls: the table of fields, and the images beside them.


@dataclass(frozen=True, kw_only=True)
class _Files:
    image: Annotated[
        File | None,
        Entry(help="A PNG, JPEG or WebP file that is drawn anew, by its bytes, its path, or open for reading bytes."),
    ] = None
    mask_image: Annotated[
        File | None,
        Entry(help="The same beside image: what is white in it is drawn anew, and the rest is kept."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Sample(fields.Sample, _Files):
    pass


@dataclass(frozen=True, kw_only=True)
class _SampleRequest(fields.SampleRequest, _Files):
    pass


@dataclass(frozen=True, kw_only=True)
class _Image:
    image: Annotated[
        Upload,
        Entry(
            help="A PNG or .npy file, by its bytes or its path; or floats [C, H, W] in the model's own scale. "
            "Where the model denoises latents, floats are latents."
        ),
    ] = field(kw_only=False)


@dataclass(frozen=True, kw_only=True)
class _Picture(_Sample):
    kind: Annotated[Literal["webp", "jpeg"], Entry(help="The format of the file: webp or jpeg.")] = "webp"


@dataclass(frozen=True, kw_only=True)
class _Denoise(fields.Denoise, _Image):
    pass


@dataclass(frozen=True, kw_only=True)
class _DenoiseArray(fields.DenoiseRequest, _Image):
    pass


@dataclass(frozen=True, kw_only=True)
class _Noise(fields.Noise, _Image):
    pass


@dataclass(frozen=True, kw_only=True)
class _NoisePng(fields.NoiseRequest, _Image):
    pass


def asked(request: Callable[P, object]) -> Callable[[Callable[[Fields], R]], Callable[P, R]]:
    """Give a call the fields of a request as its arguments. `make` gets the fields that are not None."""
    rows = table(cast(type, request))
    signature = inspect.signature(request)
    parameters = [one.replace(annotation=rows[name].annotation) for name, one in signature.parameters.items()]
    arguments = "\n".join(_argument(row) for row in rows.values())

    def decorate(make: Callable[[Fields], R]) -> Callable[P, R]:
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            return make({name: _sent(name, value) for name, value in given.items() if value is not None})

        functools.update_wrapper(call, make)
        answer = inspect.signature(make).return_annotation
        call.__signature__ = signature.replace(parameters=parameters, return_annotation=answer)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(make)}\n\nArgs:\n{arguments}"
        return call

    return decorate


def _argument(row: Field) -> str:
    return textwrap.fill(f"{row.name}: {row.help}", 120, initial_indent=" " * 4, subsequent_indent=" " * 8)


def _sent(name: str, value: Any) -> object:
    """The JSON value of an argument."""
    if name in _FILES:
        return _upload(value)
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _upload(image: Upload | File) -> str:
    """The file of an image, in base64. It is read once, so that a call can be sent again."""
    if isinstance(image, np.ndarray):
        if not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"image must be an array of floats in the model's own scale, and is of {image.dtype}")
        np.save(file := io.BytesIO(), image.astype(np.float32), allow_pickle=False)
        content = file.getvalue()
    elif isinstance(image, bytes):
        content = image
    else:
        content = Path(image).read_bytes() if isinstance(image, str | os.PathLike) else image.read()
    return base64.b64encode(content).decode()


def _silence(given: Fields) -> float:
    """The most seconds without a byte. A plain answer sends none before it is done."""
    timeout_s = given.get("timeout_s")
    return _SILENCE_S + max(0.0, min(_LONGEST_S, timeout_s)) if isinstance(timeout_s, int | float) else _LONG_S


# The calls.


def info() -> Call[Info]:
    """The model, what computes it, and what a request may ask for: GET /info."""
    return Call(Request("GET", "info", JSON), answers.read_info)


@asked(_Sample)
def sample(given: Fields) -> Call[Drawn]:
    """Draw images: POST /sample."""
    return Call(Request("POST", "sample", JSON, given, _silence(given)), answers.read_drawn)


@asked(_Sample)
def sample_array(given: Fields) -> Call[DrawnArray]:
    """Draw images to an exact array, not quantised: POST /sample.

    Models whose images are neither grey nor RGB answer only in this way. Latent models answer latents.
    """
    return Call(Request("POST", "sample", NPY, given, _silence(given)), answers.read_drawn_array)


@asked(_Picture)
def sample_picture(given: Fields) -> Call[Picture]:
    """Draw images to one WebP or JPEG, several on a contact sheet: POST /sample."""
    sent = {name: value for name, value in given.items() if name != "kind"}
    media_type = f"image/{given.get('kind', 'webp')}"
    return Call(Request("POST", "sample", media_type, sent, _silence(sent)), answers.read_picture)


@asked(_SampleRequest)
def stream(given: Fields) -> Request:
    """Draw images, and tell what happens meanwhile: POST /sample.

    A stream that breaks is asked for again with its seed, and goes on. Queued and Progress may then come again, but no
    image does. Leaving the iteration closes the connection, and the server stops the work.
    """
    return Request("POST", "sample", EVENTS, given)


@asked(_Denoise)
def denoise(given: Fields) -> Call[Drawn]:
    """Denoise an image: POST /denoise."""
    return Call(Request("POST", "denoise", JSON, given, _silence(given)), answers.read_drawn)


@asked(_Denoise)
def stream_denoise(given: Fields) -> Request:
    """Denoise an image, and tell what happens meanwhile: POST /denoise. There are no previews.

    A stream that breaks is asked for again, as by `stream`.
    """
    return Request("POST", "denoise", EVENTS, given)


@asked(_DenoiseArray)
def denoise_array(given: Fields) -> Call[Float32]:
    """Denoise an image to an array, float32 [C, H, W], exact: POST /denoise.

    A model_output has `out_channels` channels. Models of latents answer latents.
    """
    return Call(Request("POST", "denoise", NPY, given, _silence(given)), lambda _, body: answers.read_npy(body))


@asked(_NoisePng)
def noise(given: Fields) -> Call[Noisy]:
    """Add noise to a clean image, for a PNG: POST /noise. The values of a clean PNG stand for −1 … 1."""
    return Call(Request("POST", "noise", PNG, given, _LONG_S), answers.read_noisy)


@asked(_Noise)
def noise_array(given: Fields) -> Call[NoisyArray]:
    """Add noise to a clean image, for an exact array: POST /noise. The values of a clean PNG stand for −1 … 1."""
    return Call(Request("POST", "noise", NPY, given, _LONG_S), answers.read_noisy_array)
