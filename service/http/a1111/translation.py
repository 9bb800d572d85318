"""A request → the fields of /sample, and what is told about the way from one to the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from model.description import ModelDescription
from model.rows import Group
from model.samplers import SAMPLERS
from service.errors import Invalid
from service.http.a1111 import samplers
from service.http.a1111.fields import Txt2Img
from service.http.a1111.options import CLIP_SKIP
from service.plan import sizes
from service.plan.guidance import is_guidable
from service.plan.labels import named_in
from service.plan.served import Served

_ALWAYS_NOISY = ("euler_a", "dpmpp_2m_sde")  # eta's default for these is 1 in AUTOMATIC1111's, all of the noise

# Our fields → its own, for errors.
_NAMES = {
    "class_label": "prompt",
    "image": "init_images",
    "mask_image": "mask",
    "strength": "denoising_strength",
    "clip_skip": f"override_settings.{CLIP_SKIP}",
    "guidance_scale": "cfg_scale",
    "num_images": "batch_size",
    "num_inference_steps": "steps",
    "sampler": "sampler_name",
    "sigma_schedule": "scheduler",
}


@dataclass
class Translated:
    """What a request asks for.

    Attributes:
        values: of the fields of /sample.
        scheduler: its label.
        ignored: names of fields that were sent and have no effect with this model.
        warnings: sentences in ASCII, without a prompt.
    """

    values: dict[str, Any] = field(default_factory=dict, repr=False)
    scheduler: str = samplers.AUTOMATIC
    ignored: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def translated(asked: Txt2Img, served: Served, max_images: int) -> Translated:
    """The fields of /sample.

    Raises:
        Invalid: names the field, its value and its limits.
        UnknownSampler: there is no such sampler.
    """
    model = served.model
    chosen = samplers.chosen(asked.sampler, asked.scheduler, model)
    told = Translated(scheduler=chosen.label, warnings=[*chosen.warnings])
    count = (asked.batch_size or 1) * (asked.n_iter or 1)
    if count > max_images:
        raise Invalid.field("batch_size", f"must make, times n_iter, at most {max_images} images, and makes {count}")
    group = _size(asked, served, told)
    told.values = {
        "num_images": count,
        "seed": None if asked.seed == -1 else asked.seed,
        "sampler": chosen.sampler,
        "num_inference_steps": _steps(asked, model, told),
    }
    if group is not None:
        told.values |= {"height": group.height, "width": group.width}
    if chosen.sigma_schedule is not None:
        told.values["sigma_schedule"] = chosen.sigma_schedule
    _tell_eta(asked, chosen.sampler or model.recommended.sampler, told)
    _tell_prompts(asked, model, told)
    return told


@contextmanager
def its_names() -> Iterator[None]:
    """Errors about our fields name its own."""
    try:
        yield
    except Invalid as error:
        raise Invalid(
            [{"loc": [_NAMES.get(str(part), part) for part in one["loc"]], "msg": one["msg"]} for one in error.errors]
        ) from None


def _size(asked: Txt2Img, served: Served, told: Translated) -> Group | None:
    if asked.height is None and asked.width is None:
        return None
    default = served.groups[0]
    wanted = Group(asked.height or default.height, asked.width or default.width)
    group, said = sizes.drawn_for(wanted, served.groups)
    told.warnings.extend(said)
    return group


def _steps(asked: Txt2Img, model: ModelDescription, told: Translated) -> int | None:
    """The number of steps. Distilled weights take the nearest that they know: programs send a number of their own."""
    if asked.steps is None or model.distilled is None or asked.steps in model.distilled.num_inference_steps:
        return asked.steps
    wanted = asked.steps
    steps = min(model.distilled.num_inference_steps, key=lambda known: (abs(known - wanted), known))
    told.warnings.append(
        f"these weights were distilled and do not draw in {wanted} steps; this is the nearest, {steps}"
    )
    return steps


def _tell_eta(asked: Txt2Img, sampler: str, told: Translated) -> None:
    if asked.eta is None:
        return
    if SAMPLERS[sampler].takes_eta:
        told.values["eta"] = asked.eta
    elif sampler in _ALWAYS_NOISY and asked.eta != 1:
        told.ignored.append("eta")


def _tell_prompts(asked: Txt2Img, model: ModelDescription, told: Translated) -> None:
    """What the image shows: a prompt, or the class that it names; and guidance."""
    prompt, negative = asked.prompt or "", asked.negative_prompt or ""
    scale = asked.cfg_scale
    if model.text is not None:
        told.values |= {"prompt": prompt, "emphasis": "original", "guidance_scale": scale}
        _tell_clip_skip(asked, model, told)
        if negative and model.embeds_guidance:
            told.ignored.append("negative_prompt")
        elif negative:
            told.values["negative_prompt"] = negative
        return
    label = None if model.num_classes is None else named_in(prompt, model)
    told.values["class_label"] = label
    if prompt.strip() and model.num_classes is None:
        told.ignored.append("prompt")
    if negative.strip():
        told.ignored.append("negative_prompt")
    if scale is not None and scale > 1 and (label is None or not is_guidable(model)):
        told.ignored.append("cfg_scale")
    else:
        told.values["guidance_scale"] = scale
    if (asked.clip_stop or 1) > 1:
        told.ignored.append(f"override_settings.{CLIP_SKIP}")


def _tell_clip_skip(asked: Txt2Img, model: ModelDescription, told: Translated) -> None:
    """1 is the last layer. SDXL stops at the last but one, whatever the setting says, as in AUTOMATIC1111's."""
    assert model.text is not None
    stop = asked.clip_stop or 1
    if stop > 1 and model.text.encoders > 1:
        told.ignored.append(f"override_settings.{CLIP_SKIP}")
    elif stop > model.text.layers:
        raise Invalid.field(
            f"override_settings.{CLIP_SKIP}", f"must be 1 to {model.text.layers}, the encoder's layers, and is {stop}"
        )
    elif stop > 1:
        told.values["clip_skip"] = stop - 1
