"""Pipelines of the diffusers library with random weights. Images cost as much as trained ones."""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

Architecture = dict[str, Any]  # arguments of diffusers' UNet2DModel

_GOOGLE: Architecture = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
TINY: Architecture = {
    "sample_size": 8,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
}
CONVOLUTIONS: Architecture = {  # cheap even where images are large
    **TINY,
    "sample_size": 64,
    "layers_per_block": 1,
    "block_out_channels": (4,),
    "add_attention": False,
}
SMALL: Architecture = {  # 4.4 M parameters, 2.0 GFLOP
    "sample_size": 32,
    "layers_per_block": 1,
    "block_out_channels": (64, 128, 128),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 64,
}
CIFAR10: Architecture = {  # google/ddpm-cifar10-32: 35.7 M parameters, 12.1 GFLOP
    **_GOOGLE,
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
CELEBAHQ: Architecture = {  # google/ddpm-*-256: 113.7 M parameters
    **_GOOGLE,
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}


def write(folder: Path, architecture: Architecture) -> None:
    """Save a pipeline with DDIM as its scheduler."""
    torch.manual_seed(0)
    Pipeline: Any = diffusers.DDIMPipeline
    Pipeline(diffusers.UNet2DModel(**architecture), diffusers.DDIMScheduler()).save_pretrained(folder)  # type: ignore[no-untyped-call]


def write_text(folder: Path) -> None:
    """Save a small Stable Diffusion of images of 128x128. U-Net and text encoder have 3.3 M parameters each."""
    torch.manual_seed(0)
    levels = 4
    unet = {
        "sample_size": 16,
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 256,
    }
    vae = {
        "block_out_channels": (32, 32, 64, 64),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
    }
    letters = tokenizer()
    text = {
        "vocab_size": len(letters),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**unet),  # type: ignore[no-untyped-call]
        "vae": diffusers.AutoencoderKL(**vae),  # type: ignore[no-untyped-call]
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        "tokenizer": letters,
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),  # type: ignore[no-untyped-call]
    }
    Pipeline: Any = diffusers.StableDiffusionPipeline
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    Pipeline(**parts, **absent).save_pretrained(folder)


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer with a vocabulary of letters: a token is a byte, and prompts are cut after 75 of them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # each byte has a letter, as in GPT-2
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    vocabulary = {token: n for n, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)
