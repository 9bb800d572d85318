"""diffusers, the reference for parity tests. Most of it is untyped, so everything here is Any."""

from functools import partial
from typing import Any

import diffusers
from diffusers import training_utils
from diffusers.guiders import guider_utils

AutoencoderKL: Any = diffusers.AutoencoderKL
DDIMPipeline: Any = diffusers.DDIMPipeline
DDIMScheduler: Any = diffusers.DDIMScheduler
DDPMPipeline: Any = diffusers.DDPMPipeline
DDPMScheduler: Any = diffusers.DDPMScheduler
DiffusionPipeline: Any = diffusers.DiffusionPipeline
DPMSolverMultistepScheduler: Any = diffusers.DPMSolverMultistepScheduler
EulerAncestralDiscreteScheduler: Any = diffusers.EulerAncestralDiscreteScheduler
EulerDiscreteScheduler: Any = diffusers.EulerDiscreteScheduler
HeunDiscreteScheduler: Any = diffusers.HeunDiscreteScheduler
LCMScheduler: Any = diffusers.LCMScheduler
PNDMScheduler: Any = diffusers.PNDMScheduler
TCDScheduler: Any = diffusers.TCDScheduler
UniPCMultistepScheduler: Any = diffusers.UniPCMultistepScheduler
EMAModel: Any = training_utils.EMAModel
LDMPipeline: Any = diffusers.LDMPipeline
UNet2DConditionModel: Any = diffusers.UNet2DConditionModel
UNet2DModel: Any = diffusers.UNet2DModel
VQModel: Any = diffusers.VQModel
get_guidance_scale_embedding: Any = partial(diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding, None)
rescale_noise_cfg: Any = guider_utils.rescale_noise_cfg


def scheduler_class(name: str) -> Any:
    """A scheduler's class by name."""
    return getattr(diffusers, name)


def pipeline_class(name: str) -> Any:
    """A pipeline's class by name."""
    return getattr(diffusers, name)
