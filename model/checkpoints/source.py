"""What every family of checkpoints is brought to, before a tensor is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.checkpoints.config import ModelConfig
from model.checkpoints.tensors import Naming


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that was found.

    Attributes:
        name: of the model.
        root: the folder that no file of it may leave.
        config_path: what `config` was read from, for messages.
        config: the network, its schedule, its labels and its recommended settings.
        weights: the files that hold the tensors between them.
        naming: how they name the network's parameters.
    """

    name: str
    root: Path
    config_path: Path
    config: ModelConfig
    weights: Sequence[Path]
    naming: Naming
