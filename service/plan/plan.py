"""Plans a valid request for this model: fills in defaults, checks rules between fields, builds rows.

Pure functions. service/http/models.py has checked the limits of each field. A plan's `recipes` say how to make each
image again. Two requests for the same bytes have the same `canonical` form.
"""

import hashlib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from model.description import ModelDescription
from model.grids import GridError
from model.rows import Condition, Image, Row
from model.samplers import SAMPLERS, denoise_table, sample_table
from model.schedule import Schedule
from service.errors import Invalid
from service.plan.fields import MAX_SEED, DenoiseRequest, Drawing, Label, NoiseRequest, SampleRequest, deciding
from service.plan.served import Served

Parameters = dict[str, object]

# No noisy image of any timestep has larger values. The limit keeps the network's arithmetic finite.
_MAX_NOISY_VALUE = 1e4

_DISTILLED = "which these weights were distilled for"


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A request, ready for the engine.

    Attributes:
        rows: one for each image.
        seeds: one for each image.
        parameters: the request with its defaults filled in.
        recipes: for each image, all that is needed to make the image again.
        canonical: all that decides the bytes of the whole answer.
        timeout_s: seconds from now.
        preview_every: steps; 0 for no previews.
    """

    rows: list[Row]
    seeds: list[int]
    parameters: Parameters
    recipes: list[Parameters]
    canonical: Parameters
    timeout_s: float
    preview_every: int = 0


def plan_sample(request: SampleRequest, served: Served, timeout: float) -> Plan:
    """Plan POST /sample.

    Args:
        timeout: the most seconds for one request.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    model = served.model
    n = request.num_images
    seed = _seed(request.seed, n)
    sampler = _sampler(request, model)
    grid = _grid(request, model)
    try:
        table = sample_table(model.schedule, sampler, grid, request.eta)
    except GridError as error:
        raise Invalid.field("num_inference_steps", str(error)) from None
    if table.timesteps[-1] < model.first_timestep:
        raise Invalid.field(
            "num_inference_steps",
            f"{grid} steps of {sampler} end at timestep {table.timesteps[-1]}, "
            f"and this network knows those from {model.first_timestep} on",
        )
    _check_range("preview_every", request.preview_every, 0, len(table), ", the steps")

    labels = _labels(request.class_label, n, model)
    if model.needs_label:
        labels = [_class_of(seed + i, model) if label is None else label for i, label in enumerate(labels)]
    if request.guidance_scale is None:
        guidance_scale = model.recommended.guidance_scale
    else:
        _check_guidance(request.guidance_scale, labels, model)
        guidance_scale = float(request.guidance_scale)
    scales = [1.0 if label is None else guidance_scale for label in labels]
    rows = [
        Row(table, seed + i, model.group, branches=_branches(label, scale), guidance_scale=scale)
        for i, (label, scale) in enumerate(zip(labels, scales, strict=True))
    ]

    timeout_s = timeout if request.timeout_s is None else request.timeout_s
    one_label = isinstance(request.class_label, int | str | None) and len(set(labels)) == 1
    filled: Parameters = {
        **vars(request),
        "seed": seed,
        "sampler": sampler,
        "num_inference_steps": grid if isinstance(grid, int) else None,
        "eta": abs(float(request.eta)),
        "class_label": labels[0] if one_label else labels,
        "guidance_scale": float(request.guidance_scale or max(scales)),
        "timeout_s": timeout_s,
    }
    of_rows = [
        {"seed": row.seed, "class_label": row.branches[0].label, "guidance_scale": row.guidance_scale} for row in rows
    ]
    return Plan(
        rows=rows,
        seeds=[row.seed for row in rows],
        parameters=_kept(SampleRequest, filled, "image", "answer", "neither"),
        recipes=[{**_kept(SampleRequest, {**filled, **own}, "image"), **_model_of(served)} for own in of_rows],
        canonical={**_kept(SampleRequest, {**filled, "class_label": labels}, "image", "answer"), **_model_of(served)},
        timeout_s=timeout_s,
        preview_every=request.preview_every,
    )


def plan_denoise(request: DenoiseRequest, image: Image, served: Served, timeout: float, latent: bool = False) -> Plan:
    """Plan POST /denoise.

    Args:
        image: float32 [C, H, W] in the model's own scale; latents if the model denoises latents.
        timeout: the most seconds for one request.
        latent: the answer is latents, too.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    model = served.model
    schedule, t = model.schedule, request.timestep
    _check_additive(request, schedule)
    N = request.num_inference_steps
    _check_steps(N, max(1, t), f" at timestep {t}", model)
    seed = _seed(request.seed)
    sampler = _sampler(request, model)
    label = _label(request.class_label, model)
    if label is None and model.needs_label:
        raise Invalid.field("class_label", "is required: this model was trained with labels only")
    scale = 1.0 if request.guidance_scale is None else float(request.guidance_scale)
    _check_guidance(scale, [label], model)

    if request.scaling == "additive":
        image = image * np.float32(math.sqrt(schedule.alphas_cumprod[t]))
    if not (np.abs(image) <= _MAX_NOISY_VALUE).all():
        raise Invalid.field("image", f"must have values of at most {_MAX_NOISY_VALUE:g} in the model's own scale")

    wants_output = request.output == "model_output"
    table = denoise_table(schedule, sampler, t, 1 if wants_output else N, request.eta)
    if request.output == "previous":
        table = table.first()

    timeout_s = timeout if request.timeout_s is None else request.timeout_s
    filled: Parameters = {
        **vars(request),
        "seed": seed,
        "sampler": sampler,
        "eta": abs(float(request.eta)),
        "class_label": label,
        "guidance_scale": scale,
        "timeout_s": timeout_s,
    }
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    recipe = {**_kept(DenoiseRequest, filled, "image"), "image_sha256": digest, **_model_of(served)}
    row = Row(
        table,
        seed,
        model.group,
        start=image,
        branches=_branches(label, scale),
        guidance_scale=scale,
        model_output=wants_output,
        latent=latent or request.output == "previous",
    )
    return Plan(
        rows=[row],
        seeds=[seed],
        parameters=_kept(DenoiseRequest, filled, "image", "answer", "neither"),
        recipes=[recipe],
        canonical=recipe,
        timeout_s=timeout_s,
    )


def noised(request: NoiseRequest, image: Image, served: Served) -> tuple[Image, int]:
    """The forward process: the noisy image or noisy latents, float32 [C, H, W], and the seed of the noise.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    schedule = served.model.schedule
    _check_additive(request, schedule)
    seed = _seed(request.seed)
    alpha_bar = schedule.alphas_cumprod[request.timestep]
    noise = served.first_draw(seed, served.model.sample_shape)
    signal, sigma = (
        (math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        if request.scaling == "variance_preserving"
        else (1.0, math.sqrt((1 - alpha_bar) / alpha_bar))
    )
    return np.float32(signal) * image + np.float32(sigma) * noise, seed


def _kept(request: type, values: Parameters, *what: str) -> Parameters:
    """The values of the fields that decide the bytes of `what`."""
    rows = deciding(request, *what)
    return {row.name: values[row.name] for row in rows if values[row.name] is not None or not row.entry.is_optional}


def _model_of(served: Served) -> Parameters:
    return {"model": served.model.recipe_name, "fingerprint": served.fingerprint}


def _seed(seed: int | None, num_images: int = 1) -> int:
    if seed is None:
        return secrets.randbelow(2**32)
    _check_range("seed", seed, 0, MAX_SEED + 1 - num_images, f" for {num_images} images")
    return seed


def _sampler(request: Drawing, model: ModelDescription) -> str:
    sampler = request.sampler or model.recommended.sampler
    if request.sampler == "" or sampler not in SAMPLERS:
        raise Invalid.field("sampler", f"must be one of {', '.join(SAMPLERS)}, and is {request.sampler!r}")
    if model.distilled is not None and sampler != model.distilled.sampler:
        raise Invalid.field("sampler", f"must be {model.distilled.sampler}, {_DISTILLED}, and is {sampler}")
    if request.eta and not SAMPLERS[sampler].takes_eta:
        raise Invalid.field("eta", f"must be 0 with {sampler}, and is {request.eta:g}; it is for ddim")
    return sampler


def _grid(request: SampleRequest, model: ModelDescription) -> int | tuple[int, ...]:
    """The number of steps, or the timesteps themselves."""
    asked, timesteps = request.num_inference_steps, request.timesteps
    if timesteps is None:
        steps = model.recommended.num_inference_steps if asked is None else asked
        _check_steps(steps, model.schedule.num_train_timesteps, "", model)
        return steps
    if asked is not None:
        raise Invalid.field("timesteps", f"must not be given beside num_inference_steps, which is {asked}")
    if model.distilled is not None:
        raise Invalid.field("timesteps", f"must be null: num_inference_steps names the timesteps {_DISTILLED}")
    for before, after in pairwise(timesteps):
        if after >= before:
            raise Invalid.field("timesteps", f"must fall from each to the next, and {after} comes after {before}")
    return tuple(timesteps)


def _check_steps(steps: int, most: int, why: str, model: ModelDescription) -> None:
    if model.distilled is not None and steps not in model.distilled.num_inference_steps:
        *others, last = map(str, model.distilled.num_inference_steps)
        counts = f"{', '.join(others)} or {last}" if others else last
        raise Invalid.field("num_inference_steps", f"must be {counts}, {_DISTILLED}, and is {steps}")
    _check_range("num_inference_steps", steps, 1, most, why)


def _check_additive(request: DenoiseRequest | NoiseRequest, schedule: Schedule) -> None:
    if request.scaling == "additive" and schedule.alphas_cumprod[request.timestep] == 0:
        raise Invalid.field("timestep", f"{request.timestep} is pure noise, which no additive noise level reaches")


def _check_range(name: str, value: int, low: int, high: int, why: str = "") -> None:
    if not low <= value <= high:
        raise Invalid.field(name, f"must be {low} to {high}{why}, and is {value}")


def _labels(label: Label | Sequence[Label], num_images: int, model: ModelDescription) -> list[int | None]:
    """The class of each image, by index."""
    if isinstance(label, int | str | None):
        return [_label(label, model)] * num_images
    if len(label) != num_images:
        raise Invalid.field("class_label", f"must be one label, or {num_images} in a list, and is {len(label)}")
    return [_label(one, model) for one in label]


def _label(label: Label, model: ModelDescription) -> int | None:
    if label is None:
        return None
    if model.num_classes is None:
        raise Invalid.field("class_label", f"must be null: this model has no classes, and the label is {label!r}")
    if label in model.class_names:
        return model.class_names.index(str(label))
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10:
        label = int(label)
    if isinstance(label, int) and 0 <= label < model.num_classes:
        return label
    named = model.class_names != tuple(map(str, range(model.num_classes)))  # bare numbers add nothing
    names = f", or one of {', '.join(model.class_names[:20])}" if model.class_names and named else ""
    more = ", …" if len(model.class_names) > 20 else ""
    raise Invalid.field("class_label", f"must be 0 to {model.num_classes - 1}{names}{more}, and is {label!r}")


def _class_of(seed: int, model: ModelDescription) -> int:
    """A class chosen by the seed, for an image without a class and a network that needs one."""
    assert model.num_classes is not None
    digest = hashlib.sha256(f"class of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % model.num_classes


def _branches(label: int | None, guidance_scale: float) -> tuple[Condition, ...]:
    """The conditions of an image: its own, and with guidance "no label"."""
    own = Condition(label)
    return (own,) if guidance_scale == 1 else (own, Condition())


def _check_guidance(scale: float, labels: list[int | None], model: ModelDescription) -> None:
    if scale > 1 and model.needs_label:
        raise Invalid.field("guidance_scale", f"must be 1: this model was trained with labels only; it is {scale:g}")
    if scale > 1 and all(label is None for label in labels):
        raise Invalid.field("guidance_scale", f"must be 1 without a class_label, and is {scale:g}")
