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
class ModelDescription:
    """Loaded weights, without the network.

    Attributes:
        name: of the folder that they came from.
        digest: SHA-256 over the config and the weights file, in hexadecimal.
        architecture: the network's name in the config.
        image_shape: (channels, height, width).
        num_classes: labels 0 … num_classes − 1; None for a model without classes.
        class_names: one for each class, or empty.
        num_parameters: of the network.
    """

    name: str
    digest: str
    architecture: str
    image_shape: tuple[int, int, int]
    num_classes: int | None
    class_names: tuple[str, ...]
    num_parameters: int
    schedule: Schedule
    recommended: Recommended
