"""Plans a valid request for this model: fills in defaults, checks rules between fields, builds rows.

Pure functions. service/http/models.py has checked the limits of each field. A plan's `recipes` say how to make each
image again. Two requests for the same bytes have the same `canonical` form.
"""

import hashlib
import math
import secrets
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from model.description import ModelDescription
from model.grids import GridError
from model.lines import Column
from model.rows import Group, Image, Row
from model.samplers import SAMPLERS, StepTable, denoise_table, sample_table
from model.schedule import Schedule
from service.errors import Invalid
from service.plan import sizes
from service.plan.conditions import ALL_STEPS, branches, check_guidance, class_of, interval_of, label_of, labels_of
from service.plan.entries import deciding
from service.plan.fields import MAX_SEED, DenoiseRequest, Drawing, NoiseRequest, SampleRequest
from service.plan.served import Served

Parameters = dict[str, object]

# No noisy image of any timestep has larger values. The limit keeps the network's arithmetic finite.
_MAX_NOISY_VALUE = 1e4

_NO_STEPS = StepTable(np.empty(0), np.empty((0, len(Column))))

_DISTILLED = "which these weights were distilled for"


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A request, ready for the engine.

    Attributes:
        rows: one for each image.
        seeds: one for each image.
        group: the size of all images.
        parameters: the request with its defaults filled in.
        recipes: for each image, all that is needed to make the image again.
        canonical: all that decides the bytes of the whole answer.
        timeout_s: seconds from now.
        preview_every: steps; 0 for no previews.
    """

    rows: list[Row]
    seeds: list[int]
    group: Group
    parameters: Parameters
    recipes: list[Parameters]
    canonical: Parameters
    timeout_s: float
    preview_every: int = 0


def plan_sample(request: SampleRequest, served: Served, timeout: float, latent: bool = False) -> Plan:
    """Plan POST /sample.

    Args:
        timeout: the most seconds for one request.
        latent: the answer is latents, if the model denoises latents.

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
        raise Invalid.field("num_inference_steps" if isinstance(grid, int) else "timesteps", str(error)) from None
    if table.timesteps[-1] < model.first_timestep:
        raise Invalid.field(
            "num_inference_steps",
            f"{grid} steps of {sampler} end at timestep {table.timesteps[-1]:g}, "
            f"and this network knows those from {model.first_timestep} on",
        )
    _check_range("preview_every", request.preview_every, 0, len(table), ", the steps")

    labels = labels_of(request.class_label, n, model)
    if model.needs_label:
        labels = [class_of(seed + i, model) if label is None else label for i, label in enumerate(labels)]
    if request.guidance_scale is None:
        guidance_scale = model.recommended.guidance_scale
    else:
        check_guidance(request.guidance_scale, labels, model)
        guidance_scale = float(request.guidance_scale)
    scales = [1.0 if label is None else guidance_scale for label in labels]
    interval = interval_of(request, model)
    group = sizes.asked(request, served.groups)
    rows = [
        Row(
            table,
            seed + i,
            group,
            branches=branches(label, scale),
            guidance_scale=scale,
            guidance_interval=interval if scale > 1 else ALL_STEPS,
            latent=latent,
        )
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
        "guidance_interval": list(interval),
        "height": group.height,
        "width": group.width,
        "timeout_s": timeout_s,
    }
    kept = {**filled, **_size_of(group, served)}
    of_rows = [
        {"seed": row.seed, "class_label": label, "guidance_scale": row.guidance_scale, **_interval_of(row)}
        for row, label in zip(rows, labels, strict=True)
    ]
    of_all = {"class_label": labels, **_interval_of(*rows)}
    return Plan(
        rows=rows,
        seeds=[row.seed for row in rows],
        group=group,
        parameters=_kept(SampleRequest, filled, "image", "answer", "neither"),
        recipes=[{**_kept(SampleRequest, {**kept, **own}, "image"), **_model_of(served)} for own in of_rows],
        canonical={**_kept(SampleRequest, {**kept, **of_all}, "image", "answer"), **_model_of(served)},
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
    label = label_of(request.class_label, model)
    if label is None and model.needs_label:
        raise Invalid.field("class_label", "is required: this model was trained with labels only")
    scale = 1.0 if request.guidance_scale is None else float(request.guidance_scale)
    check_guidance(scale, [label], model)
    interval = interval_of(request, model)
    group = sizes.of_upload(image, served)

    if request.scaling == "additive":
        image = image * np.float32(math.sqrt(schedule.alphas_cumprod[t]))
    if not (np.abs(image) <= _MAX_NOISY_VALUE).all():
        raise Invalid.field("image", f"must have values of at most {_MAX_NOISY_VALUE:g} in the model's own scale")

    wants_output = request.output == "model_output"
    table = denoise_table(schedule, sampler, t, 1 if wants_output else N, request.eta)
    if request.output == "previous":
        table = table.first()

    row = Row(
        table,
        seed,
        group,
        start=image,
        branches=branches(label, scale),
        guidance_scale=scale,
        guidance_interval=interval if scale > 1 else ALL_STEPS,
        model_output=wants_output,
        latent=latent or request.output == "previous",
    )
    timeout_s = timeout if request.timeout_s is None else request.timeout_s
    filled: Parameters = {
        **vars(request),
        "seed": seed,
        "sampler": sampler,
        "eta": abs(float(request.eta)),
        "class_label": label,
        "guidance_scale": scale,
        "guidance_interval": list(interval),
        "timeout_s": timeout_s,
    }
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    kept = _kept(DenoiseRequest, {**filled, **_interval_of(row)}, "image")
    recipe = {**kept, "image_sha256": digest, **_model_of(served)}
    return Plan(
        rows=[row],
        seeds=[seed],
        group=group,
        parameters=_kept(DenoiseRequest, filled, "image", "answer", "neither"),
        recipes=[recipe],
        canonical=recipe,
        timeout_s=timeout_s,
    )


def plan_noise(request: NoiseRequest, image: Image, served: Served, timeout: float, latent: bool = False) -> Plan:
    """Plan POST /noise, the forward process: a row without steps, which starts as the noisy image or noisy latents.

    Args:
        image: as for `plan_denoise`.
        timeout: the most seconds for one request.
        latent: the answer is latents, if the model denoises latents.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    schedule = served.model.schedule
    group = sizes.of_upload(image, served)
    _check_additive(request, schedule)
    seed = _seed(request.seed)
    alpha_bar = schedule.alphas_cumprod[request.timestep]
    noise = served.first_draw(seed, served.model.sample_shape_of(group))
    signal, sigma = (
        (math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        if request.scaling == "variance_preserving"
        else (1.0, math.sqrt((1 - alpha_bar) / alpha_bar))
    )
    noisy = np.float32(signal) * image + np.float32(sigma) * noise
    return Plan(
        rows=[Row(_NO_STEPS, seed, group, start=noisy, latent=latent)],
        seeds=[seed],
        group=group,
        parameters={},
        recipes=[{}],
        canonical={},
        timeout_s=timeout,
    )


def _kept(request: type, values: Parameters, *what: str) -> Parameters:
    """The values of the fields that decide the bytes of `what`."""
    rows = deciding(request, *what)
    return {row.name: values[row.name] for row in rows if values[row.name] is not None or not row.entry.is_optional}


def _size_of(group: Group, served: Served) -> Parameters:
    """The size of an image, as a recipe has it: null for the size that the weights were trained for."""
    is_native = group == served.model.group
    return {"height": None, "width": None} if is_native else {"height": group.height, "width": group.width}


def _interval_of(*rows: Row) -> Parameters:
    """The guidance interval of rows, as a recipe has it: null if each row is guided in all of its steps or in none."""
    intervals = [row.guidance_interval for row in rows if row.guidance_interval != ALL_STEPS]
    return {"guidance_interval": list(intervals[0]) if intervals else None}


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
