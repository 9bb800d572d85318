"""Any checkpoint → network and description: find, read the configs, build on the meta device, load strictly.

A family of checkpoints is a module with `find(path)`, which reads only the configs. All families share the rest.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import nn
from torch.overrides import TorchFunctionMode

from model.checkpoints import diffusers, native
from model.checkpoints.config import ModelConfig, parameters
from model.checkpoints.errors import CheckpointError
from model.checkpoints.source import Part, Source
from model.checkpoints.tensors import load_strictly
from model.checkpoints.text_config import TextToImageConfig
from model.checkpoints.tokenizer import Tokenizer, TwoTokenizers
from model.checkpoints.tokenizer_files import read_tokenizers
from model.description import ModelDescription, TextDescription
from model.nets.autoencoder import Autoencoder
from model.nets.clip import CLIPText
from model.nets.precision import widen_outside
from model.nets.unet_condition_config import UNet2DConditionConfig
from model.nets.unets import UNet
from model.schedule import Schedule

FAMILIES = (diffusers.find, native.find)
_SINGLE = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")  # files that hold weights alone

_AT_ONCE = 2**15  # values that are hashed at once: so few that torch widens them in this thread

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Loaded weights: the networks on the CPU, their config, and their description.

    Parameters have the precision of the files: see model.nets.precision.

    Attributes:
        text_encoders: one or two if the network draws for prompts. The tokenizer is for all of them.
    """

    network: UNet
    autoencoder: Autoencoder | None
    config: ModelConfig
    description: ModelDescription
    text_encoders: tuple[CLIPText, ...] = ()
    tokenizer: Tokenizer | TwoTokenizers | None = None


def find(path: Path) -> Source:
    """The checkpoint at a path.

    Raises:
        CheckpointError: if there is none, or if its configs cannot be used.
    """
    if not path.exists():
        raise CheckpointError(path, "there is no such file or folder")
    for find_family in FAMILIES:
        source = find_family(path)
        if source is not None:
            return source
    what = f"{native.CONFIG} and {native.WEIGHTS}, or a folder of the diffusers library"
    if path.is_file() and path.suffix in _SINGLE:
        raise CheckpointError(
            path, f"has no config beside it, and weights in a single file are not served: name {what}"
        )
    raise CheckpointError(path, f"is not a checkpoint, and must be {what}")


def load(path: Path, allow_pickle: bool = False) -> Checkpoint:
    """Load a checkpoint strictly.

    Raises:
        CheckpointError: naming the file, the key or field, and what was expected.
    """
    source = find(path)
    network = _built(source.config.build, source.network, source.root, allow_pickle)
    autoencoder = _autoencoder_of(source, allow_pickle)
    text_encoders, tokenizer = _text_of(source, allow_pickle)
    networks = [part for part in (network, autoencoder, *text_encoders) if part is not None]
    digest = _digest(source.config, networks, tokenizer)
    description = source.config.describe(network, autoencoder, digest, source.name)
    if isinstance(source.config, TextToImageConfig) and tokenizer is not None:
        text = TextDescription(
            length=tokenizer.length,
            layers=min(one.num_hidden_layers for one in source.config.texts),
            num_parameters=sum(map(parameters, text_encoders)),
            encoders=len(text_encoders),
            force_zeros_for_empty_prompt=source.config.force_zeros_for_empty_prompt,
        )
        description = replace(description, text=text, safety_checker=source.safety_checker)
    return Checkpoint(network, autoencoder, source.config, description, text_encoders, tokenizer)


def load_autoencoder(path: Path, allow_pickle: bool = False) -> Autoencoder:
    """Load only the VAE of a checkpoint. The U-Net's weights may be missing.

    Raises:
        CheckpointError: also if the checkpoint has no VAE.
    """
    autoencoder = _autoencoder_of(find(path), allow_pickle)
    if autoencoder is None:
        raise CheckpointError(path, "has no autoencoder")
    return autoencoder


def _autoencoder_of(source: Source, allow_pickle: bool) -> Autoencoder | None:
    if source.config.autoencoder is None or source.autoencoder is None:
        return None
    return _built(partial(Autoencoder, source.config.autoencoder), source.autoencoder, source.root, allow_pickle)


def _text_of(source: Source, allow_pickle: bool) -> tuple[tuple[CLIPText, ...], Tokenizer | TwoTokenizers | None]:
    """The text encoders, and the tokenizer for all of them."""
    if not isinstance(source.config, TextToImageConfig):
        return (), None
    texts = source.config.texts
    tokenizer = read_tokenizers(source.tokenizers, source.root, texts)
    return tuple(
        _built(partial(CLIPText, text), part, source.root, allow_pickle)
        for text, part in zip(texts, source.text_encoders, strict=True)
    ), tokenizer


def _built(build: Callable[[], Network], part: Part, root: Path, allow_pickle: bool) -> Network:
    try:
        with torch.device("meta"), _NothingDrawn():
            network = build()
    except ValueError as error:
        raise CheckpointError(part.config_path, str(error)) from error
    load_strictly(network, part.weights, root, part.naming, part.config_path.name, allow_pickle)
    widen_outside(network)
    return network.requires_grad_(False).eval()


def convert(source: Path, target: Path, allow_pickle: bool = False) -> Checkpoint:
    """Write a checkpoint without text as native weights, which draw the same bytes. A declared name is kept.

    Raises:
        CheckpointError: if the source cannot be loaded, or draws for prompts.
        OSError: if the target cannot be written, or is not empty.
    """
    if isinstance(find(source).config, TextToImageConfig):
        raise CheckpointError(source, "draws for prompts, and is not converted: such a pipeline is served as it is")
    checkpoint = load(source, allow_pickle)
    native.save(checkpoint.network, checkpoint.autoencoder, checkpoint.config, target)
    return checkpoint


class _NothingDrawn(TorchFunctionMode):
    """Skips nn.init.normal_, which draws nothing on the meta device, but imports torch's compiler there (1.5 s)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def _digest(config: ModelConfig, networks: Sequence[nn.Module], tokenizer: Tokenizer | TwoTokenizers | None) -> str:
    """A hash of everything that decides an image, whatever the file format, and whatever the precision of its values.

    It is of values in float32. Those in half precision are widened in pieces that fit the processor's caches.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_settings(config), sort_keys=True).encode())
    for network in networks:
        for key, tensor in network.state_dict().items():
            digest.update(key.encode())
            for part in tensor.flatten().split(_AT_ONCE):
                digest.update(part.float().numpy().data)
    if tokenizer is not None:
        digest.update(tokenizer.digest.encode())
    return digest.hexdigest()


# Fields of Schedule that are younger than the first digests, which are in recipes.
_YOUNGER = (
    "interpolation_type", "use_karras_sigmas", "use_exponential_sigmas", "sigma_min", "sigma_max", "final_sigmas_type",
    "original_inference_steps", "timestep_scaling", "solver_type",
)  # fmt: skip

# Samplers that are younger than the first digests, each with what was recommended in its place before.
_YOUNGER_SAMPLERS = dict.fromkeys(("dpmpp_2m_sde", "heun", "tcd", "unipc"), "dpmpp_2m")
_YOUNGER_SAMPLERS_OF_TEXT = {**_YOUNGER_SAMPLERS, "lcm": "dpmpp_2m"}

_YOUNGER_OF_TEXT = ("text_2", "force_zeros_for_empty_prompt")  # of TextToImageConfig
_YOUNGER_OF_NETWORK = (  # of UNet2DConditionConfig
    "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "time_cond_proj_dim",
)  # fmt: skip


def _settings(config: ModelConfig) -> dict[str, Any]:
    """What the digest has of a config. A new field of ours leaves the digests of older weights as they were."""
    absent = {"autoencoder"} if config.autoencoder is None else set()
    settings = config.model_dump(mode="json", exclude={"name", "distilled"} | absent)
    schedule = settings["schedule"]
    _drop_defaults(schedule, Schedule, _YOUNGER)
    if isinstance(config, TextToImageConfig):
        _drop_defaults(settings, TextToImageConfig, _YOUNGER_OF_TEXT)
        _drop_defaults(settings["network"], UNet2DConditionConfig, _YOUNGER_OF_NETWORK)
    elif schedule["set_alpha_to_one"] is None:
        schedule["set_alpha_to_one"] = True  # the default of those days, and still that of all samplers but pndm
    younger = _YOUNGER_SAMPLERS_OF_TEXT if isinstance(config, TextToImageConfig) else _YOUNGER_SAMPLERS
    sampler = settings["recommended"]["sampler"]
    settings["recommended"]["sampler"] = younger.get(sampler, sampler)
    settings["clips_multistep"] = config.schedule.clips_multistep  # depends on which fields the config sets
    return settings


def _drop_defaults(settings: dict[str, Any], kind: type[BaseModel], fields: Sequence[str]) -> None:
    for field in fields:
        if settings[field] == kind.model_fields[field].default:
            del settings[field]
