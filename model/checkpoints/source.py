"""What every family of checkpoints is brought to, before a tensor is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.checkpoints.config import ModelConfig
from model.checkpoints.tensors import Naming


@dataclass(frozen=True, slots=True)
class Part:
    """The files of one network of a checkpoint.

    Attributes:
        config_path: what its config was read from, for messages.
        weights: the files that hold the tensors between them.
        naming: how they name the network's parameters.
    """

    config_path: Path
    weights: Sequence[Path]
    naming: Naming


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that was found.

    Attributes:
        name: of the model.
        root: the folder that no file of it may leave.
        config: the networks, the schedule, the labels and the recommended settings.
        network: what denoises.
        autoencoder: the first stage of latent diffusion, where the config has one.
    """

    name: str
    root: Path
    config: ModelConfig
    network: Part
    autoencoder: Part | None = None
