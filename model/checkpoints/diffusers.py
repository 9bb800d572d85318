"""Checkpoints of the diffusers library: UNet2DModel and a scheduler.

This module finds pipelines, nested (unet/, scheduler/) or flat, a U-Net's folder alone, and the checkpoint-N folders of
train_unconditional.py. A VAE (vqvae/ or vae/) is used if model_index.json names it. A class name in a config selects
code of ours; it never imports anything.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoints.diffusers_autoencoder import read_autoencoder
from model.checkpoints.diffusers_config import DEFAULT_SCHEDULER, read_scheduler, read_unet
from model.checkpoints.errors import CheckpointError, listed, shown
from model.checkpoints.files import read_json
from model.checkpoints.source import Part, Source
from model.checkpoints.tensors import Naming, Stored

log = logging.getLogger(__name__)

MODEL_INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER_CONFIG = "scheduler_config.json"

_UNETS = ("unet", "unet_ema")
_VAES = ("vqvae", "vae")
# Libraries of classes that diffusers' parts have, or are wrapped in by torch.compile or parallel training.
_LIBRARIES = ("diffusers", "torch", "accelerate", "deepspeed")
_TRAINING_CHECKPOINT = re.compile(r"checkpoint-\d+")
_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?(?P<suffix>\.safetensors|\.bin)"
    r"|diffusion_pytorch_model(?P<index_suffix>\.safetensors|\.bin)\.index(\.(?P<index_variant>\w+))?\.json"
)
_FORMATS = (".safetensors", ".bin")  # in order of preference


def find(path: Path) -> Source | None:
    """The diffusers checkpoint at a path, which is its folder or a file of it; None if it is not one.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    layout = _layout(path)
    if layout is None:
        return None
    root, config_path = layout.root, layout.unet / CONFIG
    if layout.scheduler is None:
        log.warning("%s has no %s: using DDPMScheduler's defaults", layout.name, SCHEDULER_CONFIG)
        scheduler = DEFAULT_SCHEDULER
    else:
        scheduler = read_scheduler(layout.scheduler, _config(layout, layout.scheduler, "scheduler"))
    vae = None
    if layout.vae is not None:
        vae_path = layout.vae / CONFIG
        vae = read_autoencoder(vae_path, _config(layout, vae_path, layout.vae.name))
    config = read_unet(config_path, _config(layout, config_path, "unet"), scheduler, vae)
    if layout.unused:
        log.warning("%s: not used: %s", layout.name, listed(layout.unused, most=10))
    return Source(
        name=layout.name,
        root=root,
        config=config,
        network=_part(layout, layout.unet),
        autoencoder=None if layout.vae is None else _part(layout, layout.vae),
    )


def _config(layout: "_Layout", path: Path, part: str) -> dict[str, Any]:
    """The config of a pipeline's part. If it does not name its class, model_index.json does."""
    return {**layout.classes.get(part, {}), **read_json(path, layout.root)}


class _Layout(NamedTuple):
    """The paths of a checkpoint's parts.

    Attributes:
        root: the outermost folder.
        pipeline: the folder of all parts: the root, or a checkpoint-N in it.
        unet: the U-Net's folder.
        vae: the VAE's folder, if any.
        scheduler: the scheduler's config, if any.
        classes: {"_class_name": …} for each part in model_index.json whose class is diffusers' own, by the part's name.
        named: the file of weights that the user named, if any.
    """

    root: Path
    pipeline: Path
    unet: Path
    vae: Path | None
    scheduler: Path | None
    classes: dict[str, dict[str, Any]]
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
        patterns = ("*config.json", "*lora*.safetensors")
        found = {file for name in patterns for place in (name, f"*/{name}") for file in self.pipeline.glob(place)}
        return sorted(file.relative_to(self.pipeline) for file in found - used)


def _layout(path: Path) -> _Layout | None:
    folder = (path if path.is_dir() else path.parent).absolute()
    if folder.name in _VAES and (folder.parent / MODEL_INDEX).is_file():
        folder = folder.parent  # a VAE alone is not a checkpoint
    pipeline = folder.parent if folder.name in _UNETS else folder
    root = pipeline.parent if _TRAINING_CHECKPOINT.fullmatch(pipeline.name) else pipeline
    has_index = (pipeline / MODEL_INDEX).is_file()
    # The pipeline of a training checkpoint tells whether the U-Net denoises images or latents.
    index = next((place / MODEL_INDEX for place in (pipeline, root) if (place / MODEL_INDEX).is_file()), None)
    classes = {} if index is None else _classes(index, root)
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
    return _Layout(
        root=root,
        pipeline=pipeline,
        unet=unet,
        vae=_vae(pipeline, root, index, classes),
        scheduler=next((file for file in schedulers if file.is_file()), None),
        classes=classes,
        named=path.absolute() if path.is_file() and (path.suffix in _FORMATS or ".index." in path.name) else None,
    )


def _holds_unet(folder: Path) -> bool:
    return any((folder / name / CONFIG).is_file() for name in _UNETS)


def _classes(index: Path, root: Path) -> dict[str, dict[str, Any]]:
    """The class of each part in model_index.json. The class of a wrapped part is unknown.

    Raises:
        CheckpointError: naming a part that is not supported.
    """
    classes: dict[str, dict[str, Any]] = {}
    for name, component in read_json(index, root).items():
        if name.startswith("_") or not isinstance(component, list) or component == [None, None]:
            continue
        if name not in ("unet", "scheduler", *_VAES):
            raise CheckpointError(
                index, f"has the part {shown(name)}, and the parts must be unet, scheduler and vqvae or vae"
            )
        if len(component) != 2 or not all(isinstance(text, str) for text in component):
            raise CheckpointError(index, f"{name} is {shown(component)}, and must be a library and a class")
        library, kind = component
        if library.partition(".")[0] not in _LIBRARIES:
            raise CheckpointError(
                index,
                f"{name} is {shown('.'.join(component))}, and must be a class of diffusers: other code is never run",
            )
        classes[name] = {"_class_name": kind} if library == "diffusers" else {}
    return classes


def _vae(pipeline: Path, root: Path, index: Path | None, classes: dict[str, dict[str, Any]]) -> Path | None:
    """The folder of a pipeline's VAE; None if its U-Net denoises images.

    Raises:
        CheckpointError: if the files leave that open.
    """
    if index is None:
        there = [place / name for place in (pipeline, root) for name in _VAES]
        for folder in there:
            if (folder / CONFIG).is_file():
                raise CheckpointError(
                    folder, f"exists, but no {MODEL_INDEX} names it: add that file, or move this folder away"
                )
        return None
    match [name for name in classes if name in _VAES]:
        case []:
            return None
        case [name]:
            if not (index.parent / name / CONFIG).is_file():
                raise CheckpointError(index, f"names {name}, and there is no {name}/{CONFIG}")
            return index.parent / name
        case names:
            raise CheckpointError(index, f"names {' and '.join(names)}, and must name one of them")


def _part(layout: _Layout, folder: Path) -> Part:
    return Part(folder / CONFIG, _weights(layout, folder), Naming(_stored, _canonical))


def _weights(layout: _Layout, folder: Path) -> Sequence[Path]:
    """The files of a network's tensors: the one that the user named, or the best in the folder.

    A named file in the VAE's folder is the VAE's; any other is the U-Net's.
    """
    named = layout.named
    is_for_it = (folder == layout.vae) == (named is not None and named.parent == layout.vae)
    file = named if named is not None and is_for_it else _best(folder, _variant(named))
    if file.suffix != ".json":
        return [file]
    weight_map = read_json(file, layout.root).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            file, f"weight_map is {shown(weight_map)}, and must be an object that names the file of each key"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in _FORMATS:
            raise CheckpointError(
                file, f"weight_map has {shown(repr(name))}, which is not the plain name of a .safetensors or .bin file"
            )
    return [file.parent / name for name in sorted(set(weight_map.values()))]


def _variant(file: Path | None) -> str:
    """The variant in the name of a weights file or index; empty for none."""
    match = _WEIGHTS.fullmatch(file.name) if file else None
    return (match["variant"] or match["index_variant"] or "") if match else ""


def _best(folder: Path, variant: str) -> Path:
    """The file of weights, or the index of its shards.

    safetensors is better than pickles. `variant` is better than no variant, and that is better than other variants
    (fp16, non_ema).
    """
    there: dict[tuple[str, str], list[Path]] = {}  # by suffix and variant; whole files first, then indexes
    for child in sorted(folder.iterdir(), key=lambda child: child.suffix == ".json"):
        if match := _WEIGHTS.fullmatch(child.name):
            suffix = match["suffix"] or match["index_suffix"]
            there.setdefault((suffix, _variant(child)), []).append(child)
    for suffix in _FORMATS:
        for wanted in (variant, ""):
            if files := there.get((suffix, wanted)):
                return files[0]
        variants = [children[0] for (other, _), children in sorted(there.items()) if other == suffix]
        if len(variants) == 1:
            return variants[0]
        if variants:
            names = listed([child.name for child in variants], most=2)
            raise CheckpointError(folder, f"holds the variants {names}: name one of these files")
    raise CheckpointError(folder, "holds no diffusion_pytorch_model.safetensors")


_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # added by parallel training and torch.compile
_OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_PRESENT = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # since diffusers 0.17


def _canonical(key: str) -> str | None:
    """The current name of a key; None for the second copy of the fourier frequencies in old files."""
    key = _PREFIXES.sub("", key)
    if match := _OLD_ATTENTION.fullmatch(key):
        return f"{match[1]}.{_PRESENT[match[2]]}.{match[3]}"
    return None if key == "time_proj.W" else key


_LAYERS = re.compile(r"(.*\.(?:resnets|downsamplers|upsamplers)\.\d+)\.(time_mlp|shortcut)\.(weight|bias)")
_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(norm|qkv|proj)\.(weight|bias)")


def _stored(key: str, shape: tuple[int, ...]) -> Sequence[Stored]:
    """diffusers' tensors for a parameter of UNet2D. Its linear layers are 1×1 convolutions here."""
    if match := _LAYERS.fullmatch(key):
        name = {"time_mlp": "time_emb_proj", "shortcut": "conv_shortcut"}[match[2]]
        return [Stored(f"{match[1]}.{name}.{match[3]}", shape)]
    if match := _ATTENTION.fullmatch(key):
        names = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}[match[2]]
        part = (shape[0] // len(names), *shape[1:2])
        return [Stored(f"{match[1]}.{name}.{match[3]}", part) for name in names]
    return [Stored(key, shape)]
