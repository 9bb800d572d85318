"""The fields of txt2img, which img2img has, too: what is read of a request, and what is ignored.

AUTOMATIC1111's programs send many fields that are none of ours, and null for absent ones. Both are tolerated. What
would change a picture and has no effect here is listed.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from service.errors import Invalid
from service.http.models import shown
from service.plan.shared_fields import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED

CLIP_SKIP = "CLIP_stop_at_last_layers"
MAX_SIDE = 2**14  # pixels
_MOST_IGNORED = 32  # names
_MAX_NAME = 200  # characters

# AUTOMATIC1111's defaults of all fields, in its order. Answers repeat them.
DEFAULTS: Mapping[str, object] = {
    "prompt": "",
    "negative_prompt": "",
    "styles": None,
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": None,
    "scheduler": None,
    "batch_size": 1,
    "n_iter": 1,
    "steps": 50,
    "cfg_scale": 7.0,
    "width": 512,
    "height": 512,
    "restore_faces": None,
    "tiling": None,
    "do_not_save_samples": False,
    "do_not_save_grid": False,
    "eta": None,
    "denoising_strength": None,
    "s_min_uncond": None,
    "s_churn": None,
    "s_tmax": None,
    "s_tmin": None,
    "s_noise": None,
    "override_settings": None,
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": None,
    "refiner_switch_at": None,
    "disable_extra_networks": False,
    "firstpass_image": None,
    "comments": None,
    "enable_hr": False,
    "firstphase_width": 0,
    "firstphase_height": 0,
    "hr_scale": 2.0,
    "hr_upscaler": None,
    "hr_second_pass_steps": 0,
    "hr_resize_x": 0,
    "hr_resize_y": 0,
    "hr_checkpoint_name": None,
    "hr_sampler_name": None,
    "hr_scheduler": None,
    "hr_prompt": "",
    "hr_negative_prompt": "",
    "force_task_id": None,
    "sampler_index": "Euler",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
    "infotext": None,
}

# Fields without effect here that would change a picture, and the values, beside null, by which they do not.
NOTHING: Mapping[str, tuple[object, ...]] = {
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None", "none"),
    "firstpass_image": ("",),
    "enable_hr": (False,),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "script_name": ("", "None"),
    "infotext": ("",),
}
_NO_VAE = ("", "Automatic", "None")


def whole(value: object) -> object:
    """A whole number that JSON writes with a fraction of zero."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, Field(max_length=MAX_PROMPT)] | None
Name = Annotated[str, Field(max_length=_MAX_NAME)] | None
Count = Annotated[int, Field(ge=1, le=MAX_SEED), BeforeValidator(whole)] | None
Layers = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(whole)] | None
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), BeforeValidator(whole)] | None
Side = Annotated[int, Field(ge=1, le=MAX_SIDE), BeforeValidator(whole)] | None
Scale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] | None
Share = Annotated[float, Field(ge=0, le=1)] | None


class Settings(BaseModel):
    """What is read of `override_settings`."""

    model_config = ConfigDict(strict=True, frozen=True)

    CLIP_stop_at_last_layers: Layers = None


class Txt2Img(BaseModel):
    """What is read of a request. Null is absent.

    Attributes:
        defaults: AUTOMATIC1111's, of all fields.
    """

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    defaults: ClassVar[Mapping[str, object]] = DEFAULTS

    prompt: Text = Field(None, repr=False)
    negative_prompt: Text = Field(None, repr=False)
    seed: Seed = None
    sampler_name: Name = None
    sampler_index: Name = None
    scheduler: Name = None
    steps: Count = None
    cfg_scale: Scale = None
    eta: Share = None
    width: Side = None
    height: Side = None
    batch_size: Count = None
    n_iter: Count = None
    override_settings: Settings | None = None
    send_images: bool | None = None
    force_task_id: Name = None

    @property
    def sampler(self) -> str | None:
        """The sampler's name. `sampler_index` is the older field."""
        return self.sampler_name or self.sampler_index or None

    @property
    def clip_stop(self) -> int | None:
        """At which of the last layers the text encoder stops: 1 is the last."""
        return None if self.override_settings is None else self.override_settings.CLIP_stop_at_last_layers

    @property
    def echo(self) -> dict[str, object]:
        """The request with AUTOMATIC1111's defaults. What is ignored has its default, too."""
        sent = self.model_dump(exclude_none=True)
        return {name: sent.get(name, default) for name, default in self.defaults.items()}


Asked = TypeVar("Asked", bound=Txt2Img)


def read(
    values: Mapping[str, object], model: str, kind: type[Asked], nothing: Mapping[str, tuple[object, ...]] = NOTHING
) -> tuple[Asked, tuple[str, ...]]:
    """Read the values of a body. Returns the request, and the names of what is ignored.

    Args:
        model: the name of the model that is served.
        nothing: as NOTHING.

    Raises:
        Invalid: names each wrong field.
    """
    try:
        asked = kind.model_validate({name: values[name] for name in kind.model_fields if name in values})
    except ValidationError as error:
        raise Invalid([{"loc": list(one["loc"]), "msg": _complaint(one)} for one in error.errors()]) from None
    return asked, tuple(_ignored(values, model, nothing))


def _complaint(error: Any) -> str:
    expected = error["msg"].replace("Input should be", "must be").replace("String should have", "must have")
    is_prompt = error["loc"][0] in ("prompt", "negative_prompt")  # messages show no prompt
    return expected if is_prompt else f"{expected}, and is {shown(error['input'])}"


def _ignored(values: Mapping[str, object], model: str, nothing: Mapping[str, tuple[object, ...]]) -> list[str]:
    names = [name for name, without_effect in nothing.items() if values.get(name) not in (None, *without_effect)]
    names += [f"alwayson_scripts.{name}" for name in _names(values.get("alwayson_scripts"))]
    settings = values.get("override_settings")
    names += [f"override_settings.{name}" for name in _names(settings) if not _is_in_force(name, settings, model)]
    return names if len(names) <= _MOST_IGNORED else [*names[:_MOST_IGNORED], f"{len(names) - _MOST_IGNORED} more"]


def _names(value: object) -> Iterator[str]:
    yield from (name[:_MAX_NAME] for name in value) if isinstance(value, dict) else ()


def _is_in_force(name: str, settings: Any, model: str) -> bool:
    value = settings.get(name)
    if value is None or name == CLIP_SKIP:
        return True
    return (name == "sd_model_checkpoint" and value == model) or (name == "sd_vae" and value in _NO_VAE)
