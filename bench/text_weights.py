"""Pipelines of the published sizes of Stable Diffusion 1.5 and SDXL base, with random weights in float16.

Each tensor is drawn and written after the other, so that no network is ever held. Each network is one file, as in the
published folders.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from bench.architectures import tokenizer

Config = Mapping[str, Any]  # arguments of a class of diffusers or transformers

_SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_VAE: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP: Config = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
_CLIP_L: Config = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_CLIP_G: Config = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


@dataclass(frozen=True)
class Architecture:
    """A pipeline of text to image.

    Attributes:
        title: for tables.
        pipeline, scheduler: classes of diffusers.
        unet, vae, scheduler_config: their arguments.
        texts: arguments of the text encoders. The second one has a projection.
        index: what model_index.json has besides its parts.
    """

    title: str
    pipeline: str
    unet: Config
    vae: Config
    texts: tuple[Config, ...]
    scheduler: str
    scheduler_config: Config
    index: Config


SD15 = Architecture(
    title="SD 1.5",
    pipeline="StableDiffusionPipeline",
    unet={"sample_size": 64, "cross_attention_dim": 768},  # the class's defaults were made for this network
    vae={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    texts=(_CLIP_L,),
    scheduler="PNDMScheduler",
    scheduler_config={**_SCHEDULE, "skip_prk_steps": True, "set_alpha_to_one": False},
    index={"feature_extractor": [None, None], "safety_checker": [None, None], "requires_safety_checker": False},
)
SDXL = Architecture(
    title="SDXL base",
    pipeline="StableDiffusionXLPipeline",
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    texts=(_CLIP_L, _CLIP_G),
    scheduler="EulerDiscreteScheduler",
    scheduler_config={**_SCHEDULE, "timestep_spacing": "leading", "use_karras_sigmas": False},
    index={"force_zeros_for_empty_prompt": True, "add_watermarker": None},
)


def networks(architecture: Architecture) -> dict[str, Any]:
    """The networks of a pipeline by their folders, on the meta device."""
    unet = {name: list(value) if isinstance(value, tuple) else value for name, value in architecture.unet.items()}
    UNet: Any = diffusers.UNet2DConditionModel
    VAE: Any = diffusers.AutoencoderKL
    with torch.device("meta"):
        return {
            "unet": UNet(**unet),
            "vae": VAE(**architecture.vae),
            **{_numbered("text_encoder", n): _clip(n, text) for n, text in enumerate(architecture.texts)},
        }


def write(folder: Path, architecture: Architecture, seed: int = 0) -> None:
    """Write a pipeline with random weights, exact in float16."""
    its_networks = networks(architecture)
    for n, (part, network) in enumerate(its_networks.items()):
        of_transformers = part.startswith("text_encoder")
        if of_transformers:
            network.config.dtype = "float16"
            network.config.architectures = [type(network).__name__]
            network.config.save_pretrained(folder / part)
        else:
            network.save_config(folder / part)
        name = "model.safetensors" if of_transformers else "diffusion_pytorch_model.safetensors"
        write_random(network, folder / part / name, torch.Generator().manual_seed(seed + n))
    scheduler: Any = getattr(diffusers, architecture.scheduler)
    scheduler(**architecture.scheduler_config).save_pretrained(folder / "scheduler")
    parts = {
        **{part: [_library(network), type(network).__name__] for part, network in its_networks.items()},
        "scheduler": ["diffusers", architecture.scheduler],
    }
    for n in range(len(architecture.texts)):
        part = _numbered("tokenizer", n)
        tokenizer("!" if n else "<|endoftext|>").save_pretrained(folder / part)
        parts[part] = ["transformers", "CLIPTokenizer"]
    index = {"_class_name": architecture.pipeline, "_diffusers_version": diffusers.__version__}
    (folder / "model_index.json").write_text(json.dumps({**index, **architecture.index, **parts}, indent=2))
    os.sync()  # else the disk is still busy with gigabytes while the first case is measured


def write_random(network: nn.Module, path: Path, rng: torch.Generator) -> None:
    """Write a safetensors file with random values for a network on the meta device, a tensor at a time.

    Values keep the scale of what passes through. The weights of norms are about 1.
    """
    embeddings = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Embedding)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    parameters = dict(network.named_parameters())
    for name, parameter in parameters.items():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "F16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=rng)
            if name in embeddings or parameter.ndim < 2:
                noise *= 0.02
            else:
                noise /= math.sqrt(parameter[0].numel())
            if name.endswith("weight") and parameter.ndim < 2:
                noise += 1
            file.write(noise.half().numpy().tobytes())


def published_bytes(folder: Path) -> int:
    """The bytes of U-Net and VAE in bfloat16 and of the text encoders in float32, for a folder in float16."""
    halves = sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
    return halves + sum(path.stat().st_size for path in folder.glob("text_encoder*/*.safetensors"))


def _clip(n: int, text: Config) -> Any:
    config = transformers.CLIPTextConfig(**text)
    return transformers.CLIPTextModelWithProjection(config) if n else transformers.CLIPTextModel(config)


def _numbered(part: str, n: int) -> str:
    return f"{part}_{n + 1}" if n else part


def _library(network: nn.Module) -> str:
    return type(network).__module__.split(".")[0]
