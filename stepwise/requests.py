"""What can be asked for: each call of the API once, as a value. Nothing here sends anything.

A Call says how its answer is read; what is watched is a Request alone, for events are read alike.
"""

import base64
import io
import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray

from stepwise import answers
from stepwise.results import Drawn, Float32, Info, Noisy, NoisyArray

T = TypeVar("T")

PNG, JSON, NPY, EVENTS = "image/png", "application/json", "application/x-npy", "text/event-stream"

Label = int | str | None
Upload = bytes | NDArray[np.floating] | os.PathLike[str]
Scaling = Literal["variance_preserving", "additive"]
Output = Literal["x0", "model_output", "previous"]

# Seconds without a byte, after which a connection is taken for dead.
_SILENCE_S = 60.0  # beyond what may take time; a stream has a comment each 10 s
_LONG_S = 3600.0  # of a request whose time the server limits
_LONGEST_S = 86400.0


@dataclass(frozen=True)
class Request:
    """What is sent.

    Attributes:
        accept: the media type of the answer.
        fields: the JSON of the body; None for none.
        silence_s: how long nothing may come.
    """

    method: Literal["GET", "POST"]
    path: str
    accept: str
    fields: Mapping[str, object] | None = None
    silence_s: float = _SILENCE_S

    @property
    def headers(self) -> dict[str, str]:
        return {"Accept": self.accept} | ({} if self.fields is None else {"Content-Type": JSON})

    @property
    def content(self) -> bytes | None:
        if self.fields is None:
            return None
        return json.dumps(self.fields, default=operator.index).encode()  # NumPy has integers of its own

    def with_seed(self, seed: int) -> "Request":
        return replace(self, fields={**(self.fields or {}), "seed": seed})


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and what its answer means.

    Attributes:
        read: reads the headers and the body of an answer of the media type that was asked for. Raises whatever
            reading raises where they are not what docs/api.md says.
    """

    request: Request
    read: Callable[[httpx.Headers, bytes], T]


def info() -> Call[Info]:
    """The model, what computes it, and what a request may ask for: GET /info."""
    return Call(Request("GET", "info", JSON), answers.read_info)


def sample(
    *,
    num_images: int = 1,
    seed: int | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    class_label: Label | Sequence[Label] = None,
    guidance_scale: float | None = None,
    timeout_s: float | None = None,
) -> Call[Drawn]:
    """Draw images: POST /sample.

    Args:
        num_images: image i is the image of seed + i.
        seed: drawn by the server if None.
        sampler: ddim, ddpm or dpmpp_2m; the weights' recommendation if None.
        num_inference_steps: likewise.
        eta: 0 to 1, noise in DDIM's steps.
        class_label: an index, a name, None for none, or one of these an image.
        guidance_scale: 1 to 20; 1 is off.
        timeout_s: have the server give up after so many seconds, waiting included.
    """
    fields = _fields(
        num_images=num_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        eta=eta,
        class_label=_labels(class_label),
        guidance_scale=guidance_scale,
        timeout_s=timeout_s,
    )
    return Call(Request("POST", "sample", JSON, fields, _silence(timeout_s)), answers.read_drawn)


def stream(
    *,
    num_images: int = 1,
    seed: int | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    eta: float | None = None,
    class_label: Label | Sequence[Label] = None,
    guidance_scale: float | None = None,
    timeout_s: float | None = None,
    preview_every: int = 0,
) -> Request:
    """Draw images, and tell what happens while they are drawn: POST /sample.

    A stream that breaks is asked for again by its seed, and goes on: Queued and Progress come anew, and no image is
    given twice. Leaving the iteration closes the connection, and the server works no more.

    Args:
        preview_every: a preview each so many steps; 0 for none. All others are those of `sample`.
    """
    fields = _fields(
        num_images=num_images,
        seed=seed,
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        eta=eta,
        class_label=_labels(class_label),
        guidance_scale=guidance_scale,
        timeout_s=timeout_s,
        preview_every=preview_every,
    )
    return Request("POST", "sample", EVENTS, fields)


def denoise(
    image: Upload,
    timestep: int,
    *,
    value_range: float | None = None,
    scaling: Scaling | None = None,
    num_inference_steps: int | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    seed: int | None = None,
    class_label: Label = None,
    guidance_scale: float | None = None,
    timeout_s: float | None = None,
) -> Call[Drawn]:
    """Denoise an image: POST /denoise.

    Args:
        image: a PNG or .npy file, by its bytes or its path, or an array of floats [C, H, W] in the model's own scale,
            which of latent diffusion is latents.
        timestep: how noisy it is.
        value_range: 1 to 16: a PNG's values stand for −r … r.
        scaling: variance_preserving, or additive: x_0 + σ·ε, as camera noise is.
        num_inference_steps: 1 if None, which is one evaluation of the network.
        seed: of the noise of the steps.
        class_label: an index, a name, or None for none.
        guidance_scale: 1 if None.
    """
    fields = _fields(
        image=_upload(image),
        timestep=timestep,
        value_range=value_range,
        scaling=scaling,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
        eta=eta,
        seed=seed,
        class_label=class_label,
        guidance_scale=guidance_scale,
        timeout_s=timeout_s,
    )
    return Call(Request("POST", "denoise", JSON, fields, _silence(timeout_s)), answers.read_drawn)


def stream_denoise(
    image: Upload,
    timestep: int,
    *,
    value_range: float | None = None,
    scaling: Scaling | None = None,
    num_inference_steps: int | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    seed: int | None = None,
    class_label: Label = None,
    guidance_scale: float | None = None,
    timeout_s: float | None = None,
) -> Request:
    """Denoise an image, and tell what happens meanwhile: POST /denoise. There are no previews.

    A stream that breaks is asked for again, as by `stream`. All arguments are those of `denoise`.
    """
    call = denoise(
        image,
        timestep,
        value_range=value_range,
        scaling=scaling,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
        eta=eta,
        seed=seed,
        class_label=class_label,
        guidance_scale=guidance_scale,
        timeout_s=timeout_s,
    )
    return replace(call.request, accept=EVENTS, silence_s=_SILENCE_S)


def denoise_array(
    image: Upload,
    timestep: int,
    *,
    output: Output = "x0",
    value_range: float | None = None,
    scaling: Scaling | None = None,
    num_inference_steps: int | None = None,
    sampler: str | None = None,
    eta: float | None = None,
    seed: int | None = None,
    class_label: Label = None,
    guidance_scale: float | None = None,
    timeout_s: float | None = None,
) -> Call[Float32]:
    """Denoise an image to an array, float32 [C, H, W], exact: POST /denoise.

    Args:
        output: x0; model_output, what the network predicts, with `out_channels` channels; previous, x after the first
            step. Of latent diffusion all of them are latents. All other arguments are those of `denoise`.
    """
    call = denoise(
        image,
        timestep,
        value_range=value_range,
        scaling=scaling,
        num_inference_steps=num_inference_steps,
        sampler=sampler,
        eta=eta,
        seed=seed,
        class_label=class_label,
        guidance_scale=guidance_scale,
        timeout_s=timeout_s,
    )
    fields = {**(call.request.fields or {}), "output": output}
    return Call(replace(call.request, accept=NPY, fields=fields), lambda _, body: answers.read_npy(body))


def noise(
    image: Upload,
    timestep: int,
    *,
    scaling: Scaling | None = None,
    seed: int | None = None,
    value_range: float | None = None,
) -> Call[Noisy]:
    """Add noise to a clean image, for a PNG: POST /noise.

    Args:
        image: as of `denoise`; a PNG's values stand for −1 … 1.
        timestep: how noisy it becomes.
        scaling: as of `denoise`.
        seed: of the noise; drawn by the server if None.
        value_range: 1 to 16, of the answer: what is beyond is clipped.
    """
    fields = _fields(image=_upload(image), timestep=timestep, scaling=scaling, seed=seed, value_range=value_range)
    return Call(Request("POST", "noise", PNG, fields, _LONG_S), answers.read_noisy)


def noise_array(
    image: Upload, timestep: int, *, scaling: Scaling | None = None, seed: int | None = None
) -> Call[NoisyArray]:
    """Add noise to a clean image, for an exact array: POST /noise. All arguments are those of `noise`."""
    fields = _fields(image=_upload(image), timestep=timestep, scaling=scaling, seed=seed)
    return Call(Request("POST", "noise", NPY, fields, _LONG_S), answers.read_noisy_array)


def _fields(**values: object) -> dict[str, object]:
    """Those that say something."""
    return {name: value for name, value in values.items() if value is not None}


def _labels(label: Label | Sequence[Label]) -> Label | list[Label]:
    return list(label) if isinstance(label, Sequence) and not isinstance(label, str) else label


def _silence(timeout_s: float | None) -> float:
    """A plain answer is silent until it is there."""
    return _LONG_S if timeout_s is None else _SILENCE_S + max(0.0, min(_LONGEST_S, timeout_s))


def _upload(image: Upload) -> str:
    if isinstance(image, np.ndarray):
        if not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"image must be an array of floats in the model's own scale, and is of {image.dtype}")
        np.save(file := io.BytesIO(), image.astype(np.float32), allow_pickle=False)
        content = file.getvalue()
    else:
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
    return base64.b64encode(content).decode()
