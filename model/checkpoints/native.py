"""Stepwise's own format: a folder with config.json, model.safetensors and, for latent diffusion,
autoencoder.safetensors."""

import json
import logging
import tempfile
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from model.checkpoints.config import ARCHITECTURES, ModelConfig
from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import invalid, read_json
from model.checkpoints.source import Part, Source
from model.checkpoints.tensors import Naming

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
AUTOENCODER = "autoencoder.safetensors"


def find(path: Path) -> Source | None:
    """The native weights at a path, which is their folder or a file of it; None if there are none.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    folder = path.parent if path.name in (CONFIG, WEIGHTS, AUTOENCODER) else path
    config_path = folder / CONFIG
    if not config_path.is_file() and not (folder / WEIGHTS).is_file():
        return None
    config = read_config(folder)
    name = folder.resolve().name
    if config.autoencoder is None and (folder / AUTOENCODER).is_file():
        log.warning("%s: %s is not used: %s has no autoencoder", name, AUTOENCODER, CONFIG)
    return Source(
        name=name,
        root=folder,
        config=config,
        network=Part(config_path, [folder / WEIGHTS], Naming()),
        autoencoder=Part(config_path, [folder / AUTOENCODER], Naming()) if config.autoencoder else None,
    )


def read_config(folder: Path) -> ModelConfig:
    """Read and check config.json.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    path = folder / CONFIG
    return parse(path, read_json(path, folder))


def parse(path: Path, values: dict[str, object]) -> ModelConfig:
    """Check the values of a config.json.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    if "architecture" not in values:
        raise CheckpointError(path, "architecture: is required")
    architecture = values["architecture"]
    kind = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if kind is None:
        raise CheckpointError(
            path, f"architecture is {shown(architecture)}, and must be one of {', '.join(ARCHITECTURES)}"
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(path, error) from error


def save(network: nn.Module, autoencoder: nn.Module | None, config: ModelConfig, folder: Path) -> None:
    """Write native weights, whole or not at all.

    Raises:
        FileExistsError: if the folder exists and is not empty.
        OSError: if it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists, and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        whole = Path(work) / folder.name
        whole.mkdir()
        (whole / CONFIG).write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True), indent=2) + "\n")
        for name, module in ((WEIGHTS, network), (AUTOENCODER, autoencoder)):
            try:
                if module is not None:
                    save_file(module.state_dict(), whole / name)
            except SafetensorError as error:
                raise OSError(f"{folder / name} cannot be written: {error}") from error
        whole.replace(folder)
