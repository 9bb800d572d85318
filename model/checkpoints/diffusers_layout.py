"""Where the parts of a checkpoint of diffusers are: folders, configs, and the file that the user named."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoints.diffusers_files import FORMATS
from model.checkpoints.diffusers_index import (
    MODEL_INDEX,
    TEXT_ENCODERS,
    TOKENIZERS,
    VAES,
    Index,
    read_index,
    without_flax,
)
from model.checkpoints.errors import CheckpointError, listed
from model.checkpoints.files import read_json

CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"

_UNETS = ("unet", "unet_ema")
_BESIDE_UNET = (*VAES, *TEXT_ENCODERS, *TOKENIZERS)  # folders that are no checkpoint alone
_TRAINING_CHECKPOINT = re.compile(r"checkpoint-\d+")


class Layout(NamedTuple):
    """The paths of a checkpoint's parts.

    Attributes:
        root: the outermost folder.
        pipeline: the folder of all parts: the root, or a checkpoint-N in it.
        unet: the U-Net's folder.
        vae: the VAE's folder, if any.
        text_encoders, tokenizers: folders, one or two of each if the pipeline is one of text-to-image.
        scheduler: the scheduler's config, if any.
        model_index: model_index.json, if any.
        named: the file of weights that the user named, if any.
    """

    root: Path
    pipeline: Path
    unet: Path
    vae: Path | None
    text_encoders: tuple[Path, ...]
    tokenizers: tuple[Path, ...]
    scheduler: Path | None
    model_index: Index | None
    named: Path | None

    @property
    def name(self) -> str:
        """The repository's name in huggingface_hub's cache, or the folder's name."""
        place = (self.unet.parent if self.unet.name in _UNETS else self.unet).resolve()
        for folder in (place, *place.parents):
            if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
                return "/".join(folder.parent.parent.name.split("--")[1:])
        return f"{place.parent.name}/{place.name}" if _TRAINING_CHECKPOINT.fullmatch(place.name) else place.name

    @property
    def unused(self) -> list[Path]:
        """Other parts' configs and LoRA weights in the pipeline's folder, relative to it."""
        used = {self.unet / CONFIG, self.scheduler, *([self.vae / CONFIG] if self.vae else [])}
        silent = () if self.model_index is None else (*self.model_index.classes, *self.model_index.passed_over)
        for name in silent if self.tokenizers else ():
            used |= set((self.pipeline / name).glob("*config.json"))
        patterns = ("*config.json", "*lora*.safetensors")
        found = {file for name in patterns for place in (name, f"*/{name}") for file in self.pipeline.glob(place)}
        return sorted(file.relative_to(self.pipeline) for file in found - used)

    def named_for(self, folder: Path) -> Path | None:
        """The file that the user named, if it is for the part in this folder.

        A named file in the folder of the VAE or of a text encoder is theirs; any other is the U-Net's.
        """
        beside = self.named is not None and self.named.parent in (self.vae, *self.text_encoders)
        owner = self.named.parent if self.named is not None and beside else self.unet
        return self.named if folder == owner else None

    def config(self, path: Path, part: str, index_first: bool = False) -> dict[str, Any]:
        """The config of a part. If it does not name its class, model_index.json does.

        Args:
            index_first: whether model_index.json's class goes before that of the config, as in diffusers.

        Raises:
            CheckpointError: if the file is not a JSON object, or says that the weights are quantized.
        """
        classes = {} if self.model_index is None else self.model_index.classes.get(part, {})
        values = {**classes, **read_json(path, self.root), **(classes if index_first else {})}
        if values.get("quantization_config") is not None:
            raise CheckpointError(path, "has a quantization_config, and quantized weights are not supported")
        if "_class_name" in values:
            values["_class_name"] = without_flax(values["_class_name"])
        return values


def find_layout(path: Path) -> Layout | None:
    """The layout of a checkpoint at a path, which is its folder or a file of it; None if it is not one of diffusers.

    Raises:
        CheckpointError: naming a part that is missing or not supported.
    """
    folder = (path if path.is_dir() else path.parent).absolute()
    if folder.name in _BESIDE_UNET and (folder.parent / MODEL_INDEX).is_file():
        folder = folder.parent  # a part alone is not a checkpoint
    pipeline = folder.parent if folder.name in _UNETS else folder
    root = pipeline.parent if _TRAINING_CHECKPOINT.fullmatch(pipeline.name) else pipeline
    has_index = (pipeline / MODEL_INDEX).is_file()
    # The pipeline of a training checkpoint tells whether the U-Net denoises images or latents.
    index_path = next((place / MODEL_INDEX for place in (pipeline, root) if (place / MODEL_INDEX).is_file()), None)
    index = None if index_path is None else read_index(index_path, root)
    unet = folder
    if folder == pipeline and (has_index or _holds_unet(folder)):
        # A training checkpoint also has unet_ema/, the moving average, which its pipeline would use.
        order = _UNETS if has_index else reversed(_UNETS)
        unet = next((folder / name for name in order if (folder / name / CONFIG).is_file()), folder)
        if not (unet / CONFIG).is_file():
            raise CheckpointError(pipeline / MODEL_INDEX, f"exists, but neither unet/{CONFIG} nor {CONFIG} does")
    elif not (folder / CONFIG).is_file():
        steps = sorted(child.name for child in folder.glob("checkpoint-*") if _holds_unet(child))
        if steps and path.is_dir():
            raise CheckpointError(path, f"is not a pipeline: name one of its folders {listed(steps, most=3)}")
        return None
    elif "_class_name" not in read_json(folder / CONFIG, root):
        return None

    names = (f"scheduler/{SCHEDULER_CONFIG}", SCHEDULER_CONFIG)
    schedulers = [place / name for place in (unet, pipeline, root) for name in names]
    scheduler = next((file for file in schedulers if file.is_file()), None)
    parts = () if index is None or index.text is None else index.text.parts
    if index is not None and parts and scheduler is None:
        raise CheckpointError(index.path, f"names scheduler, and there is no {names[0]}")
    layout = Layout(
        root=root,
        pipeline=pipeline,
        unet=unet,
        vae=_vae(pipeline, root, index),
        text_encoders=tuple(_part(index, name, CONFIG) for name in TEXT_ENCODERS if index and name in parts),
        tokenizers=tuple(_part(index, name, "") for name in TOKENIZERS if index and name in parts),
        scheduler=scheduler,
        model_index=index,
        named=path.absolute() if path.is_file() and (path.suffix in FORMATS or ".index." in path.name) else None,
    )
    if parts and layout.named is not None and layout.named.parent == pipeline != unet:
        raise CheckpointError(
            layout.named,
            "is not in the folder of a network, and weights in a single file are not served: name the folder",
        )
    return layout


def _holds_unet(folder: Path) -> bool:
    return any((folder / name / CONFIG).is_file() for name in _UNETS)


def _vae(pipeline: Path, root: Path, index: Index | None) -> Path | None:
    """The folder of a pipeline's VAE; None if its U-Net denoises images.

    Raises:
        CheckpointError: if the files leave that open.
    """
    if index is None:
        there = [place / name for place in (pipeline, root) for name in VAES]
        for folder in there:
            if (folder / CONFIG).is_file():
                raise CheckpointError(
                    folder, f"exists, but no {MODEL_INDEX} names it: add that file, or move this folder away"
                )
        return None
    match [name for name in index.classes if name in VAES]:
        case []:
            return None
        case [name]:
            return _part(index, name, CONFIG)
        case names:
            raise CheckpointError(index.path, f"names {' and '.join(names)}, and must name one of them")


def _part(index: Index, name: str, config: str) -> Path:
    """The folder of a part that model_index.json names.

    Args:
        config: the file that must be there; empty for none.
    """
    folder = index.path.parent / name
    if not (folder / config).exists():
        raise CheckpointError(index.path, f"names {name}, and there is no {name}/{config}")
    return folder
