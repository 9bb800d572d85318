"""config.json of native weights: one class for each architecture. Other families' configs are converted to it.

A class builds the network and describes it to the rest of the program.
"""

from abc import abstractmethod
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import nn

from model.checkpoints.errors import shown
from model.description import MAX_SIDE, Distilled, ModelDescription, Recommended, VAEDescription
from model.grids import GridError
from model.nets.autoencoder import AutoencoderConfig
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D, UNet2DConfig
from model.nets.unets import UNet
from model.samplers import SAMPLERS, sample_table
from model.schedule import Schedule

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


class RecommendedConfig(BaseModel):
    model_config = _STRICT

    sampler: str = "ddim"
    num_inference_steps: int | None = Field(None, ge=1, description="None: 50, but at most num_train_timesteps")
    guidance_scale: float = Field(1.0, ge=1, le=20)


class DistilledConfig(BaseModel):
    model_config = _STRICT

    sampler: str
    num_inference_steps: tuple[PositiveInt, ...] = Field(strict=False)


class ModelConfig(BaseModel):
    """The fields and checks of every architecture."""

    model_config = _STRICT

    architecture: str
    name: str | None = Field(None, description="of the model, also in recipes")
    num_classes: int | None = Field(None, ge=1, le=1_000_000)
    class_names: tuple[str, ...] = Field((), strict=False)
    image_size: tuple[int, int] = Field(strict=False)
    autoencoder: AutoencoderConfig | None = Field(None, description="the VAE; None: the network denoises images")
    schedule: Schedule
    recommended: RecommendedConfig = RecommendedConfig()
    distilled: DistilledConfig | None = Field(None, description="the only settings allowed; None: all")

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of what the network denoises."""

    @property
    def out_channels(self) -> int:
        """Channels of the network's prediction."""
        return self.channels

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network denoises: images or latents."""
        factor = 1 if self.autoencoder is None else self.autoencoder.factor
        return self.channels, self.image_size[0] // factor, self.image_size[1] // factor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels = self.channels if self.autoencoder is None else self.autoencoder.image_channels
        return channels, *self.image_size

    @property
    def no_label(self) -> int | None:
        """The label that means "no label"; None if the network was trained only with labels."""
        return self.num_classes

    @property
    def first_timestep(self) -> int:
        """The network's smallest valid timestep."""
        return 0

    @abstractmethod
    def build(self) -> UNet:
        """Make the network on torch's default device, with initial weights.

        Raises:
            ValueError: if the network cannot be built.
        """

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.image_size) < 1 or max(self.image_size) > MAX_SIDE:
            raise ValueError(f"image_size is {list(self.image_size)}, and must be from 1 to {MAX_SIDE}")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, and num_classes is {self.num_classes}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names names a class twice")
        self._check_autoencoder()
        self._check_variance()
        if self.num_classes is not None and self.no_label is None and self.recommended.guidance_scale > 1:
            raise ValueError(
                f"recommended.guidance_scale is {self.recommended.guidance_scale:g}, "
                "and must be 1 for a network trained only with labels"
            )
        recommended = self.recommended_settings
        self._check_steps("recommended", recommended.sampler, recommended.num_inference_steps)
        if self.distilled is not None:
            for steps in self.distilled.num_inference_steps:
                self._check_steps("distilled", self.distilled.sampler, steps)
            if recommended.sampler != self.distilled.sampler or (
                recommended.num_inference_steps not in self.distilled.num_inference_steps
            ):
                raise ValueError(
                    f"recommended is {recommended.sampler} with {recommended.num_inference_steps} steps, "
                    "and must be among what distilled allows"
                )
        return self

    def _check_steps(self, field: str, sampler: str, steps: int) -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"{field}.sampler is {shown(sampler)}, and must be one of {', '.join(SAMPLERS)}")
        if steps > self.schedule.num_train_timesteps:
            raise ValueError(
                f"{field}.num_inference_steps is {steps}, "
                f"and schedule.num_train_timesteps only {self.schedule.num_train_timesteps}"
            )
        try:
            table = sample_table(self.schedule, sampler, steps)
        except GridError as error:
            raise ValueError(f"{field}.num_inference_steps: {error}") from None
        if table.timesteps[-1] < self.first_timestep:
            raise ValueError(
                f"{field}.sampler: {sampler} ends at timestep {table.timesteps[-1]:g}, "
                "and the network takes its logarithm"
            )

    def _check_autoencoder(self) -> None:
        if self.autoencoder is None:
            return
        if self.autoencoder.channels != self.channels:
            raise ValueError(
                f"autoencoder has latents of {self.autoencoder.channels} channels, "
                f"and the network denoises {self.channels}"
            )
        factor = self.autoencoder.factor
        if any(side % factor for side in self.image_size):
            raise ValueError(
                f"image_size is {list(self.image_size)}, and must be a multiple of {factor}, the autoencoder's factor"
            )

    def _check_variance(self) -> None:
        learned = self.schedule.variance_type == "learned_range"
        if self.out_channels != self.channels * (2 if learned else 1):
            raise ValueError(
                f"out_channels is {self.out_channels}, in_channels {self.channels} and variance_type "
                f"{self.schedule.variance_type}: out_channels must be in_channels, or twice that with learned_range"
            )

    @property
    def recommended_settings(self) -> Recommended:
        steps = self.recommended.num_inference_steps or min(50, self.schedule.num_train_timesteps)
        return Recommended(self.recommended.sampler, steps, self.recommended.guidance_scale)

    def describe(self, network: UNet, autoencoder: nn.Module | None, digest: str, folder_name: str) -> ModelDescription:
        """The description of loaded weights for the rest of the program."""
        return ModelDescription(
            name=self.name or folder_name,
            digest=digest,
            architecture=self.architecture,
            image_shape=self.image_shape,
            sample_shape=self.sample_shape,
            factor=network.factor * (1 if self.autoencoder is None else self.autoencoder.factor),
            out_channels=self.out_channels,
            first_timestep=self.first_timestep,
            num_classes=self.num_classes,
            no_label=self.no_label,
            class_names=self.class_names,
            num_parameters=parameters(network),
            schedule=self.schedule,
            recommended=self.recommended_settings,
            distilled=Distilled(**self.distilled.model_dump()) if self.distilled else None,
            vae=self._vae(autoencoder),
            declared_name=self.name or None,
        )

    def _vae(self, autoencoder: nn.Module | None) -> VAEDescription | None:
        if self.autoencoder is None or autoencoder is None:
            return None
        known = self.autoencoder
        return VAEDescription(known.kind, known.factor, known.scaling_factor, parameters(autoencoder))


def parameters(network: nn.Module) -> int:
    """The number of a network's parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


class DiffusionUNetConfig(ModelConfig):
    """model.nets.unet.DiffusionUNet. With the defaults, all extras are off: the bare skeleton."""

    architecture: Literal["diffusion_unet"] = "diffusion_unet"
    in_channels: int = Field(ge=1, le=1024)
    model_channels: int = Field(ge=2, le=4096)
    channel_multipliers: tuple[int, ...] = Field(min_length=1, max_length=10, strict=False)
    norm_groups: int | None = Field(None, ge=1)
    attention_levels: tuple[int, ...] = Field((), strict=False)
    middle_attention: bool = False
    input_skip: bool = False

    @model_validator(mode="after")
    def _check_multipliers(self) -> Self:
        if max(self.channel_multipliers) > 64:
            raise ValueError(f"channel_multipliers has {max(self.channel_multipliers)}, and must be at most 64")
        return self

    @property
    def channels(self) -> int:
        return self.in_channels

    def build(self) -> DiffusionUNet:
        network = DiffusionUNet(
            self.in_channels,
            self.model_channels,
            self.channel_multipliers,
            norm_groups=self.norm_groups,
            attention_levels=self.attention_levels,
            middle_attention=self.middle_attention,
            num_classes=self.num_classes,
            input_skip=self.input_skip,
        )
        network.check_size(*self.sample_shape[1:])
        return network


class UNet2DModelConfig(ModelConfig):
    """model.nets.unet2d.UNet2D.

    If num_classes is network.num_class_embeds − 1, the last embedding means "no label". If they are equal, the network
    was trained only with labels.
    """

    architecture: Literal["unet_2d"] = "unet_2d"
    network: UNet2DConfig

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        match self.network.class_embed_type, self.network.num_class_embeds:
            case ("timestep", _):
                if self.num_classes is None:
                    raise ValueError("num_classes is required where network.class_embed_type is timestep")
            case (None, int(embeds)):
                if self.num_classes not in (embeds, embeds - 1):
                    raise ValueError(
                        f"num_classes is {self.num_classes}, and network.num_class_embeds {embeds}: "
                        "num_classes must be the same, or one less where the last stands for no label"
                    )
            case _:
                if self.num_classes is not None:
                    raise ValueError(f"num_classes is {self.num_classes}, and the network has no classes")
        return self

    @model_validator(mode="after")
    def _check_timesteps(self) -> Self:
        timesteps = self.schedule.num_train_timesteps
        if timesteps <= self.first_timestep:
            raise ValueError(
                f"schedule.num_train_timesteps is {timesteps}, "
                "and must be at least 2 where the time embedding is fourier"
            )
        if self.network.time_embedding_type == "learned":
            most = self.network.num_train_timesteps
            labels = self.num_classes if self.network.class_embed_type == "timestep" else None
            for name, count in (("schedule.num_train_timesteps", timesteps), ("num_classes", labels)):
                if most is not None and count is not None and count > most:
                    raise ValueError(f"{name} is {count}, and the learned time embedding has only {most} timesteps")
        return self

    @property
    def channels(self) -> int:
        return self.network.in_channels

    @property
    def out_channels(self) -> int:
        return self.network.out_channels

    @property
    def no_label(self) -> int | None:
        embeds = self.network.num_class_embeds if self.network.class_embed_type is None else None
        return self.num_classes if embeds is not None and self.num_classes == embeds - 1 else None

    @property
    def first_timestep(self) -> int:
        return self.network.first_timestep

    def build(self) -> UNet2D:
        network = UNet2D(self.network)
        network.check_size(*self.sample_shape[1:])
        return network


ARCHITECTURES: dict[str, type[ModelConfig]] = {
    "diffusion_unet": DiffusionUNetConfig,
    "unet_2d": UNet2DModelConfig,
}
