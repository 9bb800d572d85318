"""The description of loaded weights that the rest of the program uses. This module does not import torch."""

from dataclasses import dataclass
from typing import Literal

from model.rows import Group
from model.schedule import Schedule

MAX_SIDE = 8192  # pixels


@dataclass(frozen=True, slots=True)
class Recommended:
    """The settings that the weights' authors recommend: the defaults of a request.

    Attributes:
        timesteps: those of a request that names no number of steps, if its sampler takes a list. Others take
            num_inference_steps, which is then the length of the list.
    """

    sampler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    timesteps: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Distilled:
    """The only settings that distilled weights allow: one sampler and these numbers of steps."""

    sampler: str
    num_inference_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class VAEDescription:
    """The VAE of latent diffusion.

    Attributes:
        kind: kl or vq.
        factor: image height divided by latent height; the same for widths.
        scaling_factor: the U-Net sees latents multiplied by this.
        num_parameters: of encoder and decoder together.
    """

    kind: str
    factor: int
    scaling_factor: float
    num_parameters: int


@dataclass(frozen=True, slots=True)
class TextDescription:
    """The text encoders of a text-to-image model: one, or two.

    Attributes:
        length: tokens of a context.
        layers: of the encoder with fewer. `clip_skip` is less than this.
        num_parameters: of all encoders together.
        encoders: how many.
        force_zeros_for_empty_prompt: whether a negative prompt of null means zeros in the place of the empty text.
    """

    length: int
    layers: int
    num_parameters: int
    encoders: int = 1
    force_zeros_for_empty_prompt: bool = False


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Loaded weights, without the network.

    Attributes:
        name: for people: declared_name, or the folder's name.
        digest: SHA-256 over the config and the values of the weights, hexadecimal; the same for every file format.
        architecture: the network's name in the config.
        image_shape: (channels, height, width) of images, at the size that the weights were trained for.
        sample_shape: the same of what the U-Net denoises: images or latents.
        factor: height and width of images must be multiples of this.
        out_channels: of the U-Net's prediction: those of sample_shape, or twice as many with a learned variance.
        first_timestep: the U-Net's smallest valid timestep.
        num_classes: labels are 0 … num_classes − 1; None for a model without classes.
        no_label: the label that means "no label"; None if the U-Net was trained only with labels.
        class_names: one for each class, or empty.
        num_parameters: of the U-Net.
        distilled: the settings that the weights allow; None allows all.
        vae: the VAE; None if the U-Net denoises images.
        text: the text encoder; None for a model without prompts.
        safety_checker: "not run" if the checkpoint has one, else "none".
        embeds_sizes: whether the U-Net is told sizes and the crop (model.rows.Condition.time_ids), as SDXL's is.
        embeds_guidance: whether the U-Net is told guidance_scale (model.rows.Condition.w), as LCM's is. Such a network
            never takes a second forward row.
        inpaints: whether the U-Net also takes a mask and the latents of the masked image, as those of 9 channels do.
            Such a network draws nothing else (model.rows.Source).
        declared_name: the model's name in the weights' config; None if it has none.
    """

    name: str
    digest: str
    architecture: str
    image_shape: tuple[int, int, int]
    sample_shape: tuple[int, int, int]
    factor: int
    out_channels: int
    first_timestep: int
    num_classes: int | None
    no_label: int | None
    class_names: tuple[str, ...]
    num_parameters: int
    schedule: Schedule
    recommended: Recommended
    distilled: Distilled | None = None
    vae: VAEDescription | None = None
    text: TextDescription | None = None
    safety_checker: Literal["none", "not run"] = "none"
    embeds_sizes: bool = False
    embeds_guidance: bool = False
    inpaints: bool = False
    declared_name: str | None = None

    @property
    def recipe_name(self) -> str:
        """The model's name in recipes. Recipes are part of an image's bytes, so this does not depend on the folder."""
        return self.declared_name or f"{self.architecture}-{self.digest[:8]}"

    @property
    def group(self) -> Group:
        """The group of images of the size that the weights were trained for."""
        return Group(*self.image_shape[1:])

    def image_shape_of(self, group: Group) -> tuple[int, int, int]:
        """(channels, height, width) of a group's images."""
        return self.image_shape[0], group.height, group.width

    def sample_shape_of(self, group: Group) -> tuple[int, int, int]:
        """(channels, height, width) of what the U-Net denoises for a group: images or latents."""
        factor = 1 if self.vae is None else self.vae.factor
        return self.sample_shape[0], group.height // factor, group.width // factor

    def input_shape_of(self, group: Group) -> tuple[int, int, int]:
        """(channels, height, width) of what the U-Net is given in place of x: with what is beside x, if it inpaints."""
        channels, *size = self.sample_shape_of(group)
        return (2 * channels + 1 if self.inpaints else channels), size[0], size[1]

    def check_size(self, group: Group) -> None:
        """Raise ValueError unless the networks can draw images of this group."""
        for name, side in (("height", group.height), ("width", group.width)):
            if not 0 < side <= MAX_SIDE or side % self.factor:
                raise ValueError(
                    f"{name} must be a multiple of {self.factor}, from {self.factor} to "
                    f"{MAX_SIDE // self.factor * self.factor}, and is {side}"
                )

    @property
    def needs_label(self) -> bool:
        """Whether every request needs a label, because the U-Net was trained only with labels."""
        return self.num_classes is not None and self.no_label is None
