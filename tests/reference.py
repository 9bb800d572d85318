"""diffusers, which parity is tested against. Most of it is untyped, so here it is Any."""

from typing import Any

import diffusers

DDIMPipeline: Any = diffusers.DDIMPipeline
DDIMScheduler: Any = diffusers.DDIMScheduler
DDPMPipeline: Any = diffusers.DDPMPipeline
DDPMScheduler: Any = diffusers.DDPMScheduler
DPMSolverMultistepScheduler: Any = diffusers.DPMSolverMultistepScheduler
UNet2DModel: Any = diffusers.UNet2DModel
