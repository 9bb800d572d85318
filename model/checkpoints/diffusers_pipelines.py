"""The pipelines of text-to-image that are served: what each class decides beside the configs of its parts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

_ONE_ENCODER = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_TWO_ENCODERS = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")


class TextPipeline(NamedTuple):
    """A class of pipelines, as diffusers has it.

    Attributes:
        name: of the class.
        parts: that model_index.json must name.
        num_inference_steps, guidance_scale: the pipeline's defaults.
        sets: fields of the scheduler's config that the pipeline's constructor sets, whatever the file says.
        corrects_old_sizes: whether the pipeline takes 64 for a smaller sample_size in files from before diffusers 0.9.
        embeds_sizes: whether the pipeline tells the U-Net sizes and the pooled text.
        embeds_guidance: whether the U-Net must take guidance_scale.
    """

    name: str
    parts: tuple[str, ...] = _ONE_ENCODER
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    sets: Mapping[str, Any] = {}
    corrects_old_sizes: bool = False
    embeds_sizes: bool = False
    embeds_guidance: bool = False


_SD = TextPipeline("StableDiffusionPipeline", sets={"steps_offset": 1, "clip_sample": False}, corrects_old_sizes=True)
_XL = TextPipeline("StableDiffusionXLPipeline", _TWO_ENCODERS, guidance_scale=5.0, embeds_sizes=True)
_INPAINT = _SD._replace(name="StableDiffusionInpaintPipeline", sets={"steps_offset": 1, "skip_prk_steps": True})
_XL_INPAINT = _XL._replace(name="StableDiffusionXLInpaintPipeline", guidance_scale=7.5)
_LCM = TextPipeline("LatentConsistencyModelPipeline", num_inference_steps=4, guidance_scale=8.5, embeds_guidance=True)

# By name. Pipelines of other tasks have the parts of text-to-image, and what each of them draws depends on the network.
TEXT_PIPELINES = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _INPAINT,
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLImg2ImgPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL_INPAINT,
    "LatentConsistencyModelPipeline": _LCM,
    "LatentConsistencyModelImg2ImgPipeline": _LCM,
}
