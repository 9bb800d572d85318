"""config.json and scheduler_config.json of the diffusers library → our configs.

Missing fields take diffusers' defaults. Like diffusers, this ignores unknown fields, with a warning.
"""

import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from model.checkpoints.config import RecommendedConfig, UNet2DModelConfig
from model.checkpoints.errors import CheckpointError, listed, shown
from model.checkpoints.files import invalid
from model.grids import GridError
from model.nets.autoencoder import AutoencoderConfig
from model.nets.unet2d import UNet2DConfig
from model.samplers import SAMPLERS, sample_table
from model.schedule import Schedule

log = logging.getLogger(__name__)

# Fields about training, and of old versions. None changes a result.
_IGNORED = {"dropout", "tensor_format", "timestep_values", "timesteps"} | {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
# Fields of UNet2DConfig that UNet2DModel lacks.
_OURS = {"num_attention_heads", "time_proj_dim"}
_OTHER_BLOCKS = {
    "Skip": "belongs to NCSN++: its FIR filters are not supported",
    "AttnSkip": "belongs to NCSN++: its FIR filters are not supported",
    "CrossAttn": "attends to text, and that is not supported",
    "SimpleCrossAttn": "attends to text, and that is not supported",
    "K": "belongs to the latent upscaler, and that is not supported",
    "KCrossAttn": "belongs to the latent upscaler, and that is not supported",
}

# Schedulers with a schedule of betas, and their defaults where these differ from Schedule's.
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
# Fields that only samplers of other schedulers read.
_OF_OTHER_SAMPLERS = {
    "algorithm_type", "corrector_order", "disable_corrector", "eta", "euler_at_final", "flow_shift",
    "lambda_min_clipped", "lower_order_final", "noise_sampler_seed", "predict_x0",
    "predictor_order", "shift_terminal", "skip_prk_steps", "solver_order", "solver_p", "tau_func",
    "time_shift_type", "use_beta_sigmas", "use_dynamic_shifting", "use_lu_lambdas",
}  # fmt: skip
# Schedulers whose own sampler we recommend. For others we recommend DDIM with 50 steps; DDPM's own needs all steps.
_RECOMMENDED = {"DPMSolverMultistepScheduler": 25}


class Scheduler(NamedTuple):
    """What we take from a scheduler's config: the noise schedule, and a sampler with its number of steps."""

    schedule: Schedule
    sampler: str
    num_inference_steps: int


DEFAULT_SCHEDULER = Scheduler(Schedule(), "ddim", 50)  # for checkpoints without a scheduler's config


def read_scheduler(path: Path, values: dict[str, Any]) -> Scheduler:
    """Read a scheduler_config.json of any class with a schedule of betas.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    kind = values.get("_class_name", "DDPMScheduler")
    if not isinstance(kind, str) or kind not in _SCHEDULERS:
        raise CheckpointError(
            path,
            f"_class_name is {shown(kind)}, and must be a scheduler whose noise is a schedule of betas, "
            "as DDPMScheduler and DDIMScheduler are",
        )
    if values.get("use_flow_sigmas"):
        raise CheckpointError(path, "use_flow_sigmas is true, and must be false: flow matching is not supported")
    timestep_type = values.get("timestep_type", "discrete")
    if timestep_type != "discrete":
        raise CheckpointError(path, f"timestep_type is {shown(timestep_type)}, and must be discrete")
    silently = _OF_OTHER_SAMPLERS | {"use_flow_sigmas", "timestep_type", "predict_epsilon"}
    fields = {**_SCHEDULERS[kind], **known_fields(path, values, Schedule, silently)}

    if values.get("predict_epsilon") is False and fields.get("prediction_type") in (None, "epsilon"):
        fields["prediction_type"] = "sample"  # diffusers 0.8 to 0.12 wrote predict_epsilon; later ones ignore it
    for field in _unread(fields):
        fields.pop(field, None)
    if fields.get("variance_type", "") is None:
        del fields["variance_type"]
    elif fields.get("variance_type") == "learned":
        if kind.startswith("DDPM"):
            raise CheckpointError(
                path,
                "variance_type is learned, and must be learned_range: "
                "diffusers takes the network's raw output for a variance, and that may be negative",
            )
        # Other schedulers ignore the variance. The value only says that out_channels may be twice in_channels.
        del fields["variance_type"]
        if kind.startswith("DPMSolver"):
            fields["variance_type"] = "learned_range"
    try:
        schedule = Schedule.model_validate(fields)
    except ValidationError as error:
        raise invalid(path, error) from error
    steps = _RECOMMENDED.get(kind)
    return Scheduler(schedule, "ddim", 50) if steps is None else Scheduler(schedule, dpmpp_2m_of(values), steps)


def dpmpp_2m_of(values: dict[str, Any]) -> str:
    """The sampler of a DPMSolverMultistepScheduler's config: with noise at each step, or without."""
    return "dpmpp_2m_sde" if values.get("algorithm_type") == "sde-dpmsolver++" else "dpmpp_2m"


def known_fields(
    path: Path,
    values: dict[str, Any],
    model: type[BaseModel],
    silently: Collection[str] = (),
    lacks: Collection[str] = (),
) -> dict[str, Any]:
    """The fields of a config that a class of ours has. null counts as false for a boolean, as in diffusers.

    Args:
        silently: fields to ignore without a warning.
        lacks: fields of our class that diffusers does not have.
    """
    known = {
        key: False if value is None and model.model_fields[key].annotation in (bool, bool | None) else value
        for key, value in values.items()
        if key in model.model_fields and key not in lacks
    }
    unknown = sorted(key for key in values.keys() - known.keys() - _IGNORED - set(silently) if key[:1] != "_")
    if unknown:
        log.warning("%s: unknown fields are ignored: %s", path, listed(unknown, most=10))
    return known


def _unread(fields: dict[str, Any]) -> set[str]:
    """Fields that other fields make meaningless."""
    unread = set()
    if fields.get("clip_sample") is True:
        # This is the default. If set, clip_sample would also bound x_0 in DPM-Solver++, which diffusers never does.
        unread |= {"clip_sample"}
    if fields.get("solver_type") != "heun":
        unread |= {"solver_type"}  # those of UniPC and DEIS mean midpoint to DPM-Solver++
    if fields.get("clip_sample") is False:
        unread |= {"clip_sample_range"}
    if not fields.get("thresholding"):
        unread |= {"dynamic_thresholding_ratio", "sample_max_value"}
    if fields.get("trained_betas") is not None:
        unread |= {"beta_schedule", "beta_start", "beta_end"}
    elif fields.get("beta_schedule") in ("squaredcos_cap_v2", "laplace", "exp"):
        unread |= {"beta_start", "beta_end"}
    return unread


def read_unet(
    path: Path, values: dict[str, Any], scheduler: Scheduler, autoencoder: AutoencoderConfig | None = None
) -> UNet2DModelConfig:
    """Read the config.json of a UNet2DModel.

    Args:
        autoencoder: the VAE, if the network denoises latents. sample_size is then the latents' size.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    kind = values.get("_class_name")
    if kind == "UNet2DConditionModel":
        raise CheckpointError(
            path,
            f"_class_name is {kind}, which draws for prompts: it is served as a part of its pipeline, "
            "with model_index.json",
        )
    if kind != "UNet2DModel":
        raise CheckpointError(path, f"_class_name is {shown(kind)}, and must be UNet2DModel")
    height, width = read_size(path, values.get("sample_size"), "images'" if autoencoder is None else "latents'")
    values = known_fields(path, values, UNet2DConfig, {"sample_size"}, lacks=_OURS)
    for name in ("down_block_types", "up_block_types"):
        if isinstance(values.get(name), list):
            values[name] = [_block_type(path, name, kind) for kind in values[name]]
    if isinstance(values.get("act_fn"), str):
        values["act_fn"] = values["act_fn"].lower()
    if isinstance(values.get("mid_block_type"), str):
        values["mid_block_type"] = "UNetMidBlock2D"  # diffusers has no other, and ignores the name
    factor = 1 if autoencoder is None else autoencoder.factor
    latent = {} if autoencoder is None else {"autoencoder": autoencoder}  # `convert` writes only fields that are set
    try:
        network = UNet2DConfig.model_validate(values)
        schedule = _with_variance_of(network, scheduler.schedule)
        return UNet2DModelConfig(
            architecture="unet_2d",
            network=network,
            num_classes=_num_classes(network, schedule),
            image_size=(height * factor, width * factor),
            schedule=schedule,
            recommended=recommended(scheduler, first_timestep=network.first_timestep),
            **latent,
        )
    except ValidationError as error:
        raise invalid(path, error) from error


def read_size(path: Path, size: object, whose: str) -> tuple[int, int]:
    """Height and width from a sample_size.

    Args:
        whose: size it is, for the message.

    Raises:
        CheckpointError: if it is not a size.
    """
    match size:
        case int() if type(size) is int:
            return size, size
        case [int() as height, int() as width] if type(height) is type(width) is int:
            return height, width
    raise CheckpointError(path, f"sample_size is {shown(size)}, and must be the {whose} size or [height, width]")


def _block_type(path: Path, name: str, kind: object) -> object:
    """The current name of a block type.

    Raises:
        CheckpointError: for a block type of diffusers that we do not support.
    """
    if not isinstance(kind, str):
        return kind
    kind = kind.removeprefix("UNetRes")
    family = re.sub(r"(Down|Up)Block2D$", "", kind)
    if family in _OTHER_BLOCKS:
        raise CheckpointError(path, f"{name} has {kind}, which {_OTHER_BLOCKS[family]}")
    return kind


def _num_classes(network: UNet2DConfig, schedule: Schedule) -> int | None:
    match network.class_embed_type:
        case "identity":  # takes vectors, not labels
            return None
        case "timestep":  # encodes labels like timesteps
            return network.num_class_embeds or network.num_train_timesteps or schedule.num_train_timesteps
        case None:
            return network.num_class_embeds


def _with_variance_of(network: UNet2DConfig, schedule: Schedule) -> Schedule:
    """If the scheduler's config does not set variance_type, out_channels twice in_channels mean learned_range."""
    if network.out_channels != 2 * network.in_channels or "variance_type" in schedule.model_fields_set:
        return schedule
    return schedule.with_fields(variance_type="learned_range")


def recommended(scheduler: Scheduler, first_timestep: int) -> RecommendedConfig:
    """The scheduler's sampler with its number of steps, or the next smaller number that works, or another sampler."""
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
