"""A checkpoint of any family, as found, before a tensor is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.checkpoints.config import ModelConfig
from model.checkpoints.tensors import Naming


@dataclass(frozen=True, slots=True)
class Part:
    """The files of one network of a checkpoint.

    Attributes:
        config_path: the file of its config, for messages.
        weights: the files that together hold the tensors.
        naming: their names for the network's parameters.
    """

    config_path: Path
    weights: Sequence[Path]
    naming: Naming


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that was found.

    Attributes:
        name: the model's name.
        root: the folder that must contain all files.
        config: the networks, the schedule, the labels and the recommended settings.
        network: the U-Net's files.
        autoencoder: the VAE's files, if the config has one.
        text_encoders: the files of each text encoder of the config.
        tokenizers: the folder of each text encoder's tokenizer.
        safety_checker: "not run" if the checkpoint has one.
    """

    name: str
    root: Path
    config: ModelConfig
    network: Part
    autoencoder: Part | None = None
    text_encoders: tuple[Part, ...] = ()
    tokenizers: tuple[Path, ...] = ()
    safety_checker: Literal["none", "not run"] = "none"
