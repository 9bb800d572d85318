"""img2img: its fields beside those of txt2img, its image and its mask."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple

from PIL import ImageOps
from PIL.Image import Image as PillowImage
from pydantic import BeforeValidator, Field

from service.errors import Invalid
from service.http.a1111 import fields
from service.http.a1111.fields import DEFAULTS, NOTHING, Txt2Img, whole
from service.http.base64_files import PHOTO, from_base64
from service.http.parsing import json_with_files
from service.http.photos import Photo
from service.http.pictures import Attached
from service.http.pieces import Bytes
from service.plan.fields import SampleRequest

IMAGES, MASK = "init_images", "mask"
STRENGTH = 0.75
_STRETCH, _CROP = 0, 1  # resize_mode

_OF_TXT2IMG = ("enable_hr", "firstpass_image", "firstphase_", "hr_")  # how names begin that img2img does not have
_DEFAULTS: Mapping[str, object] = {
    **{name: default for name, default in DEFAULTS.items() if not name.startswith(_OF_TXT2IMG)},
    "denoising_strength": STRENGTH,
    IMAGES: None,
    MASK: None,
    "resize_mode": _STRETCH,
    "image_cfg_scale": None,
    "mask_blur": None,
    "mask_blur_x": 4,
    "mask_blur_y": 4,
    "mask_round": True,
    "inpainting_fill": 0,
    "inpaint_full_res": True,
    "inpaint_full_res_padding": 0,
    "inpainting_mask_invert": 0,
    "initial_noise_multiplier": None,
    "latent_mask": None,
    "include_init_images": False,
}

# As fields.NOTHING: always, and where there is a mask.
_NOTHING: Mapping[str, tuple[object, ...]] = {
    **NOTHING,
    "resize_mode": (_STRETCH, _CROP),
    "image_cfg_scale": (),
    "initial_noise_multiplier": (1,),
    "latent_mask": ("",),
    "include_init_images": (False,),
}
_NOTHING_IN_A_MASK: Mapping[str, tuple[object, ...]] = {
    "mask_blur": (0,),
    "mask_blur_x": (0,),
    "mask_blur_y": (0,),
    "mask_round": (True,),
    "inpainting_fill": (1,),
    "inpaint_full_res": (False,),
}


def _flag(value: object) -> object:
    """0 and 1 are false and true."""
    return bool(value) if value in (0, 1) else value


class Img2Img(Txt2Img):
    """What is read of a request beside its images."""

    defaults: ClassVar[Mapping[str, object]] = _DEFAULTS

    denoising_strength: Annotated[float, Field(gt=0, le=1)] | None = None
    resize_mode: Annotated[int, Field(ge=0, le=3), BeforeValidator(whole)] | None = None
    inpainting_mask_invert: Annotated[bool, BeforeValidator(_flag)] | None = None


class Files(NamedTuple):
    """The files of a request.

    Attributes:
        is_inverted: what is black in the mask is drawn anew.
    """

    image: Bytes
    mask: Bytes | None
    is_inverted: bool

    def attached(self, fields: SampleRequest) -> Attached:
        part = _not_where_white if self.is_inverted else _where_white
        return Attached(fields, self.image, self.mask, part, names=(IMAGES, MASK))


def read(body: Bytes, max_json: int, model: str) -> tuple[Img2Img, tuple[str, ...], Files]:
    """Read a JSON body. Returns the request, the names of what is ignored, and the files.

    Args:
        max_json: bytes beside images.
        model: the name of the model that is served.

    Raises:
        Invalid: names each wrong field.
    """
    values, sent = json_with_files(body, max_json, (IMAGES, MASK))
    images = sent.get(IMAGES, [])
    if not isinstance(images, list) or len(images) != 1:
        came = f"has {len(images)}" if isinstance(images, list) else "is no list"
        raise Invalid.field(IMAGES, f"must be a list of one image, and {came}")
    mask = from_base64(sent[MASK], MASK, PHOTO) if sent.get(MASK) else None
    nothing = _NOTHING if mask is None else {**_NOTHING, **_NOTHING_IN_A_MASK}
    asked, ignored = fields.read(values, model, Img2Img, nothing)
    image = from_base64(images[0], IMAGES, PHOTO)
    return asked, ignored, Files(image, mask, bool(asked.inpainting_mask_invert))


def beginning(asked: Img2Img, files: Files) -> dict[str, Any]:
    """The fields of /sample about the image. What a mask keeps comes back exactly, as in AUTOMATIC1111's."""
    return {
        "strength": STRENGTH if asked.denoising_strength is None else asked.denoising_strength,
        "fit": "crop" if asked.resize_mode == _CROP else "stretch",
        "paste_original": files.mask is not None,
    }


def _where_white(mask: Photo) -> PillowImage:
    """The part that is drawn anew: what is white, or, where the mask has transparent parts, what is opaque."""
    return mask.pixels if mask.alpha is None else mask.alpha


def _not_where_white(mask: Photo) -> PillowImage:
    return ImageOps.invert(_where_white(mask))
