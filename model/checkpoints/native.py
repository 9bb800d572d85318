"""Stepwise's own weights: a folder with config.json and model.safetensors."""

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from safetensors import SafetensorError
from safetensors.torch import load_file

from model.checkpoints.errors import CheckpointError
from model.description import ModelDescription, Recommended
from model.samplers import SAMPLERS, GridError, sample_table
from model.schedule import Schedule
from model.unet import DiffusionUNet

CONFIG = "config.json"
WEIGHTS = "model.safetensors"

_MAX_CONFIG_BYTES = 16 * 2**20  # trained_betas can be long
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class RecommendedConfig(BaseModel):
    model_config = _STRICT

    sampler: str = "ddim"
    num_inference_steps: int | None = Field(None, ge=1, description="None: 50, or all where there are fewer")
    guidance_scale: float = Field(1.0, ge=1, le=20)


class NativeConfig(BaseModel):
    """config.json of native weights. Every extra is off unless named, which leaves the bare skeleton."""

    model_config = _STRICT

    architecture: Literal["diffusion_unet"]
    in_channels: int = Field(ge=1, le=1024)
    model_channels: int = Field(ge=2, le=4096)
    channel_multipliers: tuple[int, ...] = Field(min_length=1, max_length=10, strict=False)
    norm_groups: int | None = Field(None, ge=1)
    attention_levels: tuple[int, ...] = Field((), strict=False)
    middle_attention: bool = False
    input_skip: bool = False
    num_classes: int | None = Field(None, ge=1, le=100_000)
    class_names: tuple[str, ...] = Field((), strict=False)
    image_size: tuple[int, int] = Field(strict=False)
    schedule: Schedule
    recommended: RecommendedConfig = RecommendedConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if max(self.channel_multipliers) > 64:
            raise ValueError(f"channel_multipliers must be at most 64, and one is {max(self.channel_multipliers)}")
        if min(self.image_size) < 1 or max(self.image_size) > 8192:
            raise ValueError(f"image_size must be from 1 to 8192, and is {list(self.image_size)}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, and num_classes is {self.num_classes}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names names a class twice")
        recommended = self.recommended_settings
        if recommended.sampler not in SAMPLERS:
            raise ValueError(f"recommended.sampler must be one of {', '.join(SAMPLERS)}, and is {recommended.sampler}")
        if recommended.num_inference_steps > self.schedule.num_train_timesteps:
            raise ValueError(
                f"recommended.num_inference_steps is {recommended.num_inference_steps}, "
                f"and schedule.num_train_timesteps only {self.schedule.num_train_timesteps}"
            )
        try:
            sample_table(self.schedule, recommended.sampler, recommended.num_inference_steps)
        except GridError as error:
            raise ValueError(f"recommended.num_inference_steps: {error}") from None
        return self

    @property
    def recommended_settings(self) -> Recommended:
        steps = self.recommended.num_inference_steps or min(50, self.schedule.num_train_timesteps)
        return Recommended(self.recommended.sampler, steps, self.recommended.guidance_scale)


def is_native(path: Path) -> bool:
    """Whether the folder looks like native weights."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read_config(folder: Path) -> NativeConfig:
    """Read and check config.json.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    path = folder / CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(path, f"is larger than {_MAX_CONFIG_BYTES} bytes")
        return NativeConfig.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        raise CheckpointError(path, "; ".join(map(_sentence, error.errors()))) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error


def build(config: NativeConfig) -> DiffusionUNet:
    """Make the network, on torch's default device, with fresh weights.

    Raises:
        ValueError: for sizes that cannot be built.
    """
    network = DiffusionUNet(
        config.in_channels,
        config.model_channels,
        config.channel_multipliers,
        norm_groups=config.norm_groups,
        attention_levels=config.attention_levels,
        middle_attention=config.middle_attention,
        num_classes=config.num_classes,
        input_skip=config.input_skip,
    )
    network.check_size(*config.image_size)
    return network


def load(folder: Path) -> tuple[DiffusionUNet, ModelDescription]:
    """Load native weights: strictly, on the CPU, in float32.

    Raises:
        CheckpointError: naming the file, the key or field, and what was expected.
    """
    config = read_config(folder)
    try:
        with torch.device("meta"):
            network = build(config)
    except ValueError as error:
        raise CheckpointError(folder / CONFIG, str(error)) from error
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    _check_tensors(path, tensors, network.state_dict())
    # Copies, for what load_file returns is the file itself, which may be written over while the network is in use.
    copies = {key: tensor.to(torch.float32, copy=True) for key, tensor in tensors.items()}
    network.load_state_dict(copies, strict=True, assign=True)
    network.requires_grad_(False).eval()
    return network, ModelDescription(
        name=folder.resolve().name,
        digest=_digest(folder),
        architecture=config.architecture,
        image_shape=(config.in_channels, *config.image_size),
        num_classes=config.num_classes,
        class_names=config.class_names,
        num_parameters=sum(p.numel() for p in network.parameters()),
        schedule=config.schedule,
        recommended=config.recommended_settings,
    )


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for key, tensor in expected.items():
        if key not in tensors:
            raise CheckpointError(path, f"lacks the key {key}, {list(tensor.shape)}")
        if tensors[key].shape != tensor.shape:
            raise CheckpointError(path, f"{key} is {list(tensors[key].shape)}, and should be {list(tensor.shape)}")
        if not tensors[key].is_floating_point():
            raise CheckpointError(path, f"{key} is {tensors[key].dtype}, and should be floating point")
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise CheckpointError(path, f"has the key {unknown[0]}, which the network of {CONFIG} does not")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _sentence(error: ErrorDetails) -> str:
    field = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"{field}: there is no such field"
        case "missing":
            return f"{field}: is required"
        case "value_error":  # the validators' own sentences
            message = error["msg"].removeprefix("Value error, ")
        case _:
            message = f"{error['msg'].replace('Input should be', 'must be')}, and is {str(error['input'])[:80]}"
    return f"{field}: {message}" if field else message
