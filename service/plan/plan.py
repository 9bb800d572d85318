"""Plans a valid request for this model: fills in defaults, checks rules between fields, builds rows.

Pure functions. service/http/models.py has checked the limits of each field. A plan's `recipes` say how to make each
image again. Two requests for the same bytes have the same `canonical` form.
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from model.lines import Column
from model.rows import Group, Image, Moments, Row, Source
from model.samplers import StepTable
from model.schedule import Schedule
from service.errors import Invalid
from service.plan import pictures, sizes, steps
from service.plan.conditions import asked_of, recipe_of
from service.plan.entries import deciding
from service.plan.fields import DenoiseRequest, NoiseRequest, SampleRequest
from service.plan.labels import class_of, label_of, labels_of
from service.plan.pictures import Picture, beginning_of
from service.plan.served import Served
from service.plan.shared_fields import MAX_SEED
from service.plan.texts import HASHES as TEXT_HASHES

Parameters = dict[str, object]

# No noisy image of any timestep has larger values. The limit keeps the network's arithmetic finite.
_MAX_NOISY_VALUE = 1e4

_HASHES = (*TEXT_HASHES, *pictures.HASHES)
_NO_STEPS = StepTable(np.empty(0), np.empty((0, len(Column))))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A request, ready for the engine.

    Attributes:
        rows: one for each image; a draft of them, without their source, as long as there are images to encode.
        seeds: one for each image.
        group: the size of all images.
        parameters: the request with its defaults filled in.
        recipes: for each image, all that is needed to make the image again.
        canonical: all that decides the bytes of the whole answer.
        timeout_s: seconds from now.
        preview_every: steps; 0 for no previews.
        drawn_prompts: the prompt and the negative prompt of an image without the syntax in them, where there is some.
        warnings: sentences on what the client may not expect, in ASCII, and without any text of a prompt.
        to_encode: images that the VAE must encode before the rows can begin.
        source: makes the rows' source of what the encoder makes of these.
    """

    rows: list[Row]
    seeds: list[int]
    group: Group
    parameters: Parameters = field(repr=False)  # a repr has no prompt, because an error or a log may show it
    recipes: list[Parameters] = field(repr=False)
    canonical: Parameters = field(repr=False)
    timeout_s: float
    preview_every: int = 0
    drawn_prompts: tuple[tuple[str, str | None], ...] = field(default=(), repr=False)
    warnings: tuple[str, ...] = ()
    to_encode: Sequence[Image] = ()
    source: Callable[[Sequence[Moments]], Source] | None = None

    def begun(self, encoded: Sequence[Moments] = ()) -> list[Row]:
        """The rows, with their source.

        Args:
            encoded: of `to_encode`.
        """
        source = None if self.source is None else self.source(encoded)
        return [replace(row, source=source) for row in self.rows]


def plan_sample(
    request: SampleRequest, served: Served, timeout: float, latent: bool = False, picture: Picture | None = None
) -> Plan:
    """Plan POST /sample.

    Args:
        timeout: the most seconds for one request.
        latent: the answer is latents, if the model denoises latents.
        picture: what is drawn anew, in a part or as a whole; None draws from noise alone.

    Raises:
        Invalid: names the field, its value and its limits.
    """
    model = served.model
    n = request.num_images
    seed = _seed(request.seed, n)
    beginning = beginning_of(request, picture, served, latent)
    sampler, eta, grid, table, sigma_schedule = steps.of_sample(request, model, beginning.strength)
    steps.check_range("preview_every", request.preview_every, 0, len(table), ", the steps that events count")
    labels = labels_of(request.class_label, n, model)
    if model.needs_label:
        labels = [class_of(seed + i, model) if label is None else label for i, label in enumerate(labels)]
    group = sizes.asked(request, served.groups) if picture is None else sizes.of_picture(request, picture, served)
    num_steps = grid if isinstance(grid, int) else len(grid)
    told, fields, warnings = asked_of(request, labels, num_steps, model.recommended.guidance_scale, group, served)
    rows = [
        Row(table, seed + i, group, latent=latent, finish=beginning.finish, **one.of_row) for i, one in enumerate(told)
    ]

    timeout_s = timeout if request.timeout_s is None else request.timeout_s
    one_label = isinstance(request.class_label, int | str | None) and len(set(labels)) == 1
    filled: Parameters = {
        **vars(request),
        **fields,
        **beginning.fields,
        "seed": seed,
        "sampler": sampler,
        "num_inference_steps": grid if isinstance(grid, int) else None,
        "timesteps": None if isinstance(grid, int) else [*grid],
        "eta": eta,
        "sigma_schedule": sigma_schedule,
        "class_label": labels[0] if one_label else labels,
        "height": group.height,
        "width": group.width,
        "timeout_s": timeout_s,
    }
    # From an image, the size depends on the image where the request names none.
    kept = {**filled, **beginning.recipe, **(_size_of(group, served) if picture is None else {})}
    own = [{**kept, "seed": row.seed, **recipe_of([one], served)} for row, one in zip(rows, told, strict=True)]
    of_all = {**kept, **recipe_of(told, served), "class_label": labels}
    plan = Plan(
        rows=rows,
        seeds=[row.seed for row in rows],
        group=group,
        parameters=_kept(SampleRequest, filled, "image", "answer", "neither"),
        recipes=[_recipe(SampleRequest, values, served, "image") for values in own],
        canonical=_recipe(SampleRequest, of_all, served, "image", "answer"),
        timeout_s=timeout_s,
        preview_every=request.preview_every,
        drawn_prompts=tuple(one.words.drawn for one in told if one.words and one.words.drawn),
        warnings=warnings,
        to_encode=beginning.to_encode,
        source=beginning.source,
    )
    return plan if beginning.to_encode else replace(plan, rows=plan.begun())


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
    schedule = model.schedule
    if model.inpaints:
        raise Invalid.field("image", f"cannot be denoised: {pictures.INPAINTS}")
    if served.checks_images and request.output != "x0":
        raise Invalid.field(
            "output", f"must be x0: this server checks images before it sends them; it is {request.output}"
        )
    _check_additive(request, schedule)
    sampler, eta, _, table, _ = steps.of_denoise(request, model)
    seed = _seed(request.seed)
    label = label_of(request.class_label, model)
    if label is None and model.needs_label:
        raise Invalid.field("class_label", "is required: this model was trained with labels only")
    group = sizes.of_upload(image, served)
    [told], fields, warnings = asked_of(request, [label], len(table), 1.0, group, served)

    if request.scaling == "additive":
        image = image * np.float32(math.sqrt(schedule.alphas_cumprod[request.timestep]))
    if not (np.abs(image) <= _MAX_NOISY_VALUE).all():
        raise Invalid.field("image", f"must have values of at most {_MAX_NOISY_VALUE:g} in the model's own scale")

    row = Row(
        table,
        seed,
        group,
        start=image,
        model_output=request.output == "model_output",
        latent=latent or request.output == "previous",
        **told.of_row,
    )
    timeout_s = timeout if request.timeout_s is None else request.timeout_s
    filled: Parameters = {
        **vars(request),
        **fields,
        "seed": seed,
        "sampler": sampler,
        "eta": eta,
        "class_label": label,
        "timeout_s": timeout_s,
    }
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    own = {**filled, **recipe_of([told], served)}
    recipe = {**_recipe(DenoiseRequest, own, served, "image"), "image_sha256": digest}
    return Plan(
        rows=[row],
        seeds=[seed],
        group=group,
        parameters=_kept(DenoiseRequest, filled, "image", "answer", "neither"),
        recipes=[recipe],
        canonical={**recipe, **_size_of(group, served)},
        timeout_s=timeout_s,
        warnings=warnings,
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


def _recipe(request: type, values: Parameters, served: Served, *what: str) -> Parameters:
    """The fields and hashes that decide the bytes of `what`, and what draws them."""
    hashes = {name: values[name] for name in _HASHES if values.get(name) is not None}
    return {**_kept(request, values, *what), **hashes, **_model_of(served)}


def _kept(request: type, values: Parameters, *what: str) -> Parameters:
    """The values of the fields that decide the bytes of `what`."""
    rows = deciding(request, *what)
    return {row.name: values[row.name] for row in rows if values[row.name] is not None or not row.entry.is_optional}


def _size_of(group: Group, served: Served) -> Parameters:
    """The size of an image, as a recipe has it: null for the size that the weights were trained for."""
    is_native = group == served.model.group
    return {"height": None, "width": None} if is_native else {"height": group.height, "width": group.width}


def _model_of(served: Served) -> Parameters:
    return {"model": served.model.recipe_name, "fingerprint": served.fingerprint}


def _seed(seed: int | None, num_images: int = 1) -> int:
    if seed is None:
        return secrets.randbelow(2**32)
    steps.check_range("seed", seed, 0, MAX_SEED + 1 - num_images, f" for {num_images} images")
    return seed


def _check_additive(request: DenoiseRequest | NoiseRequest, schedule: Schedule) -> None:
    if request.scaling == "additive" and schedule.alphas_cumprod[request.timestep] == 0:
        raise Invalid.field("timestep", f"{request.timestep} is pure noise, which no additive noise level reaches")
