"""What config.json and scheduler_config.json of the diffusers library say, in our terms.

Missing fields take diffusers' defaults. Fields that change nothing here are passed over, by name; others are refused.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from model.autoencoder import AutoencoderConfig
from model.checkpoints.config import RecommendedConfig, UNet2DModelConfig
from model.checkpoints.errors import CheckpointError
from model.checkpoints.files import invalid
from model.samplers import SAMPLERS, GridError, sample_table
from model.schedule import Schedule
from model.unet2d import UNet2DConfig

# Of training and of old versions; none of them changes what the network computes.
_IGNORED = {"dropout", "tensor_format", "timestep_values"} | {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
# Fields of UNet2DConfig that UNet2DModel lacks, and so would pass over.
_OURS = {"num_attention_heads", "time_proj_dim"}
_OTHER_BLOCKS = {
    "Skip": "belongs to NCSN++ and resamples by FIR filters, which is not supported",
    "AttnSkip": "belongs to NCSN++ and resamples by FIR filters, which is not supported",
    "CrossAttn": "attends to text, which is not supported",
    "SimpleCrossAttn": "attends to text, which is not supported",
    "K": "belongs to the latent upscaler, which is not supported",
    "KCrossAttn": "belongs to the latent upscaler, which is not supported",
}

# Schedulers whose noise schedule is one of betas, and the betas that they have where their config names none.
_STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDIMParallelScheduler": {},
    "DDIMInverseScheduler": {},
    "PNDMScheduler": {},
    "RePaintScheduler": {},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": _STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": _STABLE_DIFFUSION,
    "DPMSolverMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverSDEScheduler": _STABLE_DIFFUSION,
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "SASolverScheduler": {},
    "LCMScheduler": {**_STABLE_DIFFUSION, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_STABLE_DIFFUSION, "beta_schedule": "scaled_linear"},
}
# What only concerns samplers that are not run here.
_OF_OTHER_SAMPLERS = {
    "algorithm_type", "corrector_order", "disable_corrector", "eta", "euler_at_final", "final_sigmas_type",
    "flow_shift", "interpolation_type", "lambda_min_clipped", "lower_order_final", "noise_sampler_seed",
    "original_inference_steps", "predict_x0", "predictor_order", "shift_terminal", "sigma_max", "sigma_min",
    "skip_prk_steps", "solver_order", "solver_p", "solver_type", "tau_func", "time_shift_type", "timestep_scaling",
    "use_beta_sigmas", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas",
    "use_lu_lambdas",
}  # fmt: skip
# The samplers of these schedulers are run here. DDPM's own wants all of its steps; DDIM makes do with 50.
_RECOMMENDED = {"DPMSolverMultistepScheduler": ("dpmpp_2m", 25)}


class Scheduler(NamedTuple):
    """What a scheduler's config stands for: the noise schedule, and a sampler with its number of steps."""

    schedule: Schedule
    sampler: str
    num_inference_steps: int


# What is taken where there is no config.
DEFAULT_SCHEDULER = Scheduler(Schedule(), "ddim", 50)


def read_scheduler(path: Path, values: dict[str, Any]) -> Scheduler:
    """Read a scheduler_config.json of any class whose noise schedule is one of betas.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    kind = values.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or kind not in _SCHEDULERS:
        raise CheckpointError(path, f"_class_name: must be one of {', '.join(_SCHEDULERS)}, and is {kind}")
    if values.get("use_flow_sigmas"):
        raise CheckpointError(path, "use_flow_sigmas: must be false: flow matching is not supported")
    if values.get("timestep_type", "discrete") != "discrete":
        raise CheckpointError(path, "timestep_type: must be discrete: continuous noise levels are not supported")
    passed_over = _IGNORED | _OF_OTHER_SAMPLERS | {"use_flow_sigmas", "timestep_type", "predict_epsilon"}
    fields = {**_SCHEDULERS[kind], **{k: v for k, v in values.items() if k[:1] != "_" and k not in passed_over}}

    if values.get("predict_epsilon") is False and fields.get("prediction_type") in (None, "epsilon"):
        fields["prediction_type"] = "sample"  # of diffusers 0.8 to 0.12; later ones carry it along unread
    if fields.get("clip_sample") is True:
        # The default. Named, it would bound x_0 in DPM-Solver++, too, which diffusers never does.
        del fields["clip_sample"]
    if fields.get("variance_type", "") is None:
        del fields["variance_type"]
    elif fields.get("variance_type") == "learned":
        if not kind.startswith("DPMSolver"):
            raise CheckpointError(
                path,
                "variance_type: learned is not supported: diffusers takes the network's raw output for a variance, "
                "and that may be negative; learned_range is",
            )
        fields["variance_type"] = "learned_range"  # all that it says there is that there are twice the channels
    try:
        schedule = Schedule.model_validate(fields)
    except ValidationError as error:
        raise invalid(path, error) from error
    return Scheduler(schedule, *_RECOMMENDED.get(kind, ("ddim", 50)))


def read_unet(
    path: Path, values: dict[str, Any], scheduler: Scheduler, autoencoder: AutoencoderConfig | None = None
) -> UNet2DModelConfig:
    """Read the config.json of a UNet2DModel.

    Args:
        autoencoder: the first stage, where the network denoises latents; sample_size is then that of these.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    if values.get("_class_name") != "UNet2DModel":
        raise CheckpointError(path, f"_class_name: must be UNet2DModel, and is {values.get('_class_name')}")
    values = {key: value for key, value in values.items() if key[:1] != "_" and key not in _IGNORED}
    size = values.pop("sample_size", None)
    if type(size) is int:
        size = [size, size]
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        whose = "images'" if autoencoder is None else "latents'"
        raise CheckpointError(path, f"sample_size: must be the {whose} size or [height, width], and is {size}")
    for name in _OURS & values.keys():
        raise CheckpointError(path, f"{name}: there is no such field")
    for name in ("down_block_types", "up_block_types"):
        if isinstance(values.get(name), list):
            values[name] = [_block_type(path, name, kind) for kind in values[name]]
    if isinstance(values.get("act_fn"), str):
        values["act_fn"] = values["act_fn"].lower()
    factor = 1 if autoencoder is None else autoencoder.factor
    latent = {} if autoencoder is None else {"autoencoder": autoencoder}  # unset, it is not written on conversion
    try:
        network = UNet2DConfig.model_validate(values)
        schedule = _with_variance_of(network, scheduler.schedule)
        return UNet2DModelConfig(
            architecture="unet_2d",
            network=network,
            num_classes=_num_classes(network, schedule),
            image_size=(size[0] * factor, size[1] * factor),
            schedule=schedule,
            recommended=_recommended(scheduler, first_timestep=network.first_timestep),
            **latent,
        )
    except ValidationError as error:
        raise invalid(path, error) from error


def _block_type(path: Path, name: str, kind: object) -> object:
    """A block type's present name.

    Raises:
        CheckpointError: for one that is known and not supported.
    """
    if not isinstance(kind, str):
        return kind
    kind = kind.removeprefix("UNetRes")
    family = re.sub(r"(Down|Up)Block2D$", "", kind)
    if family in _OTHER_BLOCKS:
        raise CheckpointError(path, f"{name}: {kind} {_OTHER_BLOCKS[family]}")
    return kind


def _num_classes(network: UNet2DConfig, schedule: Schedule) -> int | None:
    match network.class_embed_type:
        case "identity":  # takes vectors, not labels
            return None
        case "timestep":  # takes labels as it takes timesteps
            return network.num_class_embeds or network.num_train_timesteps or schedule.num_train_timesteps
        case None:
            return network.num_class_embeds


def _with_variance_of(network: UNet2DConfig, schedule: Schedule) -> Schedule:
    """Where the scheduler's config is silent, twice the channels mean the one variance that has them."""
    if network.out_channels != 2 * network.in_channels or "variance_type" in schedule.model_fields_set:
        return schedule
    return Schedule.model_validate({**schedule.model_dump(exclude_unset=True), "variance_type": "learned_range"})


def _recommended(scheduler: Scheduler, first_timestep: int) -> RecommendedConfig:
    """The scheduler's sampler, with its number of steps or the next smaller that fits; another one if none does."""
    most = min(scheduler.num_inference_steps, scheduler.schedule.num_train_timesteps)
    for sampler in dict.fromkeys([scheduler.sampler, "dpmpp_2m", *SAMPLERS]):
        for steps in range(most, 0, -1):
            try:
                table = sample_table(scheduler.schedule, sampler, steps)
            except GridError:
                continue
            if table.timesteps[-1] >= first_timestep:
                return RecommendedConfig(sampler=sampler, num_inference_steps=steps)
    return RecommendedConfig()
