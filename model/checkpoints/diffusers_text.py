"""The configs of a pipeline of text-to-image: its scheduler, U-Net and text encoders, in our terms.

Missing fields take the defaults of diffusers and transformers. Like these, this ignores unknown fields, with a warning.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.checkpoints.config import RecommendedConfig
from model.checkpoints.diffusers_config import (
    Scheduler,
    dpmpp_2m_of,
    known_fields,
    read_scheduler,
    read_size,
    recommended,
)
from model.checkpoints.diffusers_pipelines import TextPipeline
from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import invalid
from model.checkpoints.text_config import TextToImageConfig
from model.nets.autoencoder import AutoencoderConfig
from model.nets.clip import CLIPTextConfig, CLIPTextWithProjectionConfig
from model.nets.unet_condition_config import UNet2DConditionConfig
from model.samplers import departures

log = logging.getLogger(__name__)

# The sampler of each scheduler class. Others have none here, and the most exact one is recommended in their place.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
_IN_PLACE_OF_OTHERS = "dpmpp_2m"
_SERVED = "this version serves networks of text-to-image and of inpainting alone"
_OTHER_INPUTS = {
    5: "depth-to-image networks",
    7: "x4 upscalers",
    8: "InstructPix2Pix and x2 upscalers",
}
# Fields of UNet2DConditionModel that must have one value.
_FIXED: dict[str, tuple[object, str]] = {
    "num_attention_heads": (None, "diffusers refuses any other, and attention_head_dim has the number of heads"),
    "class_embed_type": (None, "the pipeline gives the network no class"),
    "num_class_embeds": (None, "the pipeline gives the network no class"),
    "attention_type": ("default", "GLIGEN is not supported"),
    "dual_cross_attention": (False, "Versatile Diffusion is not supported"),
    "cross_attention_norm": (None, "it belongs to IF, which is not supported"),
    "resnet_skip_time_act": (False, "it belongs to IF, which is not supported"),
    "resnet_out_scale_factor": (1.0, "it belongs to IF, which is not supported"),
    "class_embeddings_concat": (False, "it belongs to the upscaler of latents, which is not supported"),
}
_OTHER_BLOCKS = {
    "SimpleCrossAttn": "belongs to IF",
    "K": "belongs to the upscaler of latents",
    "KCrossAttn": "belongs to the upscaler of latents",
    "Attn": "would read attention_head_dim as a width, and CrossAttn blocks as a number",
    "Skip": "belongs to NCSN++",
    "AttnSkip": "belongs to NCSN++",
}
# Fields that change nothing in what is served.
_SILENT = {
    "sample_size", "upcast_attention", "mid_block_only_cross_attention", "addition_embed_type_num_heads", *_FIXED,
}  # fmt: skip
# Fields that mean something only beside addition_embed_type.
_OF_ADDITION = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
# Fields of a text encoder's config that change nothing here, unless its class has them.
_SILENT_OF_TEXT = {
    "architectures", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "gradient_checkpointing",
    "initializer_factor", "initializer_range", "model_type", "pad_token_id", "projection_dim", "torch_dtype",
    "transformers_version", "use_attention_mask",
}  # fmt: skip


def read_text_scheduler(path: Path, values: dict[str, Any], pipeline: TextPipeline) -> Scheduler:
    """Read a scheduler_config.json, and warn where images differ from the pipeline's.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    fields = {**values, **pipeline.sets}
    schedule = read_scheduler(path, fields).schedule
    kind, steps = str(values.get("_class_name")), pipeline.num_inference_steps
    sampler = dpmpp_2m_of(values) if kind == "DPMSolverMultistepScheduler" else _SAMPLERS.get(kind)
    if sampler is None:
        log.warning("%s: %s has no sampler here: %s is recommended in its place", path, kind, _IN_PLACE_OF_OTHERS)
        return Scheduler(schedule, _IN_PLACE_OF_OTHERS, steps)
    if sampler in ("lcm", "heun") and fields.get("clip_sample") is True:
        # read_scheduler passes over true, which is the default of other schedulers. That of these two is false.
        schedule = schedule.with_fields(clip_sample=True)
    for field in departures(sampler, schedule, fields):
        log.warning(
            "%s: %s is %s, which %s does not follow: images differ from the pipeline's",
            path, field, shown(values.get(field, "absent")), sampler,
        )  # fmt: skip
    scheduler = Scheduler(schedule, sampler, steps)
    other = recommended(scheduler, first_timestep=0).sampler
    if other != sampler:
        log.warning(
            "%s: %s takes no number of steps with this schedule: %s is recommended in its place", path, sampler, other
        )
    return scheduler


def read_condition_unet(
    path: Path,
    values: dict[str, Any],
    pipeline: TextPipeline,
    scheduler: Scheduler,
    autoencoder: AutoencoderConfig,
    texts: Sequence[CLIPTextConfig],
    force_zeros_for_empty_prompt: bool = False,
) -> TextToImageConfig:
    """Read the config.json of a UNet2DConditionModel.

    Args:
        texts: the pipeline's text encoders, one or two.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    kind = values.get("_class_name")
    if kind != "UNet2DConditionModel":
        raise CheckpointError(path, f"_class_name is {shown(kind)}, and must be UNet2DConditionModel")
    _check_supported(path, values, pipeline)
    height, width = read_size(path, _sample_size(values, pipeline), "latents'")
    fields = known_fields(path, values, UNet2DConditionConfig, _SILENT, lacks={*_FIXED})
    if isinstance(fields.get("act_fn"), str):
        fields["act_fn"] = fields["act_fn"].lower()
    if fields.get("addition_embed_type") is None:
        fields = {name: value for name, value in fields.items() if name not in _OF_ADDITION}
    try:
        suggested = recommended(scheduler, first_timestep=0)
        return TextToImageConfig(
            network=UNet2DConditionConfig.model_validate(fields),
            text=texts[0],
            text_2=next((text for text in texts[1:] if isinstance(text, CLIPTextWithProjectionConfig)), None),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            autoencoder=autoencoder,
            image_size=(height * autoencoder.factor, width * autoencoder.factor),
            schedule=scheduler.schedule,
            recommended=RecommendedConfig(
                sampler=suggested.sampler,
                num_inference_steps=suggested.num_inference_steps,
                guidance_scale=pipeline.guidance_scale,
            ),
        )
    except ValidationError as error:
        raise invalid(path, error) from error


def _check_supported(path: Path, values: dict[str, Any], pipeline: TextPipeline) -> None:
    """Refuse networks of other tasks and pipelines, fields that must have one value, and other blocks."""
    channels = values.get("in_channels", 4)
    if type(channels) is int and channels in _OTHER_INPUTS:
        theirs = _OTHER_INPUTS[channels]
        raise CheckpointError(path, f"in_channels is {channels}, which {theirs} have: {_SERVED}")
    for field, (wanted, why) in _FIXED.items():
        value = values.get(field, wanted)
        if value != wanted and not (value is None and wanted is False):
            raise CheckpointError(
                path, f"{field} is {shown(value)}, and must be {'null' if wanted is None else wanted}: {why}"
            )
    added = values.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise CheckpointError(
            path,
            f"addition_embed_type is {shown(added)}, and must be null or text_time: others are IF's and Kandinsky's",
        )
    if pipeline.embeds_guidance and values.get("time_cond_proj_dim") is None:
        raise CheckpointError(
            path, f"time_cond_proj_dim is null, and must be a number: a {pipeline.name} tells the network the guidance"
        )
    for field in ("down_block_types", "up_block_types"):
        for block in values[field] if isinstance(values.get(field), list) else ():
            if (family := re.sub(r"(Down|Up)Block2D$", "", str(block))) in _OTHER_BLOCKS:
                raise CheckpointError(
                    path, f"{field} has {block}, which {_OTHER_BLOCKS[family]}, and that is not supported"
                )
    if values.get("mid_block_type") == "UNetMidBlock2DSimpleCrossAttn":
        raise CheckpointError(path, "mid_block_type is UNetMidBlock2DSimpleCrossAttn, which belongs to IF")


def _sample_size(values: dict[str, Any], pipeline: TextPipeline) -> object:
    """The size of latents. Files from before diffusers 0.9 say 32 or so, and some pipelines take 64 instead."""
    size = values.get("sample_size")
    if not pipeline.corrects_old_sizes:
        return size
    version = re.match(r"(\d+)\.(\d+)", str(values.get("_diffusers_version")))
    is_old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    return 64 if is_old and type(size) is int and size < 64 else size


def read_text_encoder(path: Path, values: dict[str, Any], kind: type[CLIPTextConfig]) -> CLIPTextConfig:
    """Read the config.json of a CLIPTextModel, or of a CLIPTextModelWithProjection.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    model_type = values.get("model_type", "clip_text_model")
    if model_type != "clip_text_model":
        raise CheckpointError(path, f"model_type is {shown(model_type)}, and must be clip_text_model")
    if values.get("use_attention_mask"):
        raise CheckpointError(path, "use_attention_mask is true, and must be false: the U-Net attends to padding")
    fields = known_fields(path, values, kind, _SILENT_OF_TEXT)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(path, error) from error
