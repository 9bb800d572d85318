"""What the rest of the program knows of loaded weights. Nothing here needs torch."""

from dataclasses import dataclass

from model.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Recommended:
    """The settings that the weights' authors recommend, used where a request names none."""

    sampler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Distilled:
    """All that distilled weights can be asked for: one sampler, and these numbers of steps."""

    sampler: str
    num_inference_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FirstStageDescription:
    """What makes latents of images and images of latents.

    Attributes:
        kind: kl or vq.
        factor: how much smaller latents are than images, each way.
        scaling_factor: what latents are multiplied with for the network that denoises them.
        num_parameters: of both ways together.
    """

    kind: str
    factor: int
    scaling_factor: float
    num_parameters: int


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Loaded weights, without the network.

    Attributes:
        name: of the model, for people: the declared one, else its folder's.
        digest: SHA-256 over the config and the values of the weights, in hexadecimal; the same for every file format.
        architecture: the network's name in the config.
        image_shape: (channels, height, width) of the images.
        sample_shape: (channels, height, width) of what the network denoises: the images, or their latents.
        out_channels: of what the network predicts: the image's, or twice as many with a learned variance.
        first_timestep: the least that the network can be asked at.
        num_classes: labels 0 … num_classes − 1; None for a model without classes.
        no_label: what the network is told of images without a label; None where it was trained with labels only.
        class_names: one for each class, or empty.
        num_parameters: of the network that denoises.
        distilled: what the weights were distilled for; None where any sampler and number of steps will do.
        first_stage: of latent diffusion; None where the network denoises images.
        declared_name: what the weights' own config calls the model; None where it does not say.
    """

    name: str
    digest: str
    architecture: str
    image_shape: tuple[int, int, int]
    sample_shape: tuple[int, int, int]
    out_channels: int
    first_timestep: int
    num_classes: int | None
    no_label: int | None
    class_names: tuple[str, ...]
    num_parameters: int
    schedule: Schedule
    recommended: Recommended
    distilled: Distilled | None = None
    first_stage: FirstStageDescription | None = None
    declared_name: str | None = None

    @property
    def recipe_name(self) -> str:
        """The model's name in recipes: the same wherever the weights lie, for it is in the bytes of images."""
        return self.declared_name or f"{self.architecture}-{self.digest[:8]}"

    @property
    def needs_label(self) -> bool:
        """Whether the network was trained with labels only, so that it has no image without one."""
        return self.num_classes is not None and self.no_label is None
