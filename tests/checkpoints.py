"""Small checkpoints written by the diffusers library, and helpers to check the errors of bad ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, load
from tests.networks import fill
from tests.reference import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel

Json = dict[str, Any]

# Values for any field of a config.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

STEM = "diffusion_pytorch_model"
SIZES: Json = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
VAE_SIZES: Json = {
    "block_out_channels": (8, 12),
    "norm_num_groups": 4,
    "latent_channels": 3,
    "scaling_factor": 0.7,
}


def small_unet(seed: int = 0, gain: float = 0.5, **changes: object) -> Any:
    """A network of diffusers with random weights that float16 represents exactly."""
    network = UNet2DModel(**{**SIZES, **changes})
    fill(network, seed, gain)
    _round(network)
    return network


def small_autoencoder(kind: Any = VQModel, seed: int = 1, **changes: object) -> Any:
    """A VQModel or an AutoencoderKL with random weights that float16 represents exactly."""
    fields = {**VAE_SIZES, **({"num_vq_embeddings": 32} if kind is VQModel else {}), **changes}
    levels = len(fields["block_out_channels"])
    network = kind(
        **fields, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels
    )
    fill(network, seed)
    _round(network)
    return network


def _round(network: Any) -> None:
    for parameter in network.parameters():
        parameter.copy_(parameter.half())


def save_pipeline(folder: Path, network: Any = None, scheduler: Any = None) -> Path:
    """Write the files of DDPMPipeline.save_pretrained: model_index.json, unet/ and scheduler/."""
    pipeline = DDPMPipeline(network or small_unet(), scheduler or DDPMScheduler())
    pipeline.save_pretrained(folder)
    return folder


def save_latent_pipeline(folder: Path, autoencoder: Any = None, network: Any = None, scheduler: Any = None) -> Path:
    """Write the files of LDMPipeline.save_pretrained, which also has vqvae/."""
    autoencoder = autoencoder or small_autoencoder()
    channels = autoencoder.config.get("vq_embed_dim") or autoencoder.config.latent_channels
    network = network or small_unet(in_channels=channels, out_channels=channels)
    scheduler = scheduler or DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    LDMPipeline(autoencoder, network, scheduler).save_pretrained(folder)
    return folder


def edit(path: Path, changes: Json, without: str = "") -> None:
    """Change fields of a JSON file, and remove one."""
    values = {**json.loads(path.read_text()), **changes}
    values.pop(without, None)
    path.write_text(json.dumps(values))


def refusal(path: Path, folder: Path | None = None, allow_pickle: bool = False) -> str:
    """The error of loading, without the folder. Checks that the message is one short line without repetition."""
    with pytest.raises(CheckpointError) as error:
        load(path, allow_pickle)
    check_line(error.value)
    sentences = str(error.value).split("; ")
    assert len(sentences) == len(set(sentences))
    return without_folder(error.value, folder or path)


def without_folder(error: CheckpointError, folder: Path) -> str:
    """A message without the folder that its path begins with. Of a long path, the message has only the end."""
    line = str(error).removeprefix("…")
    starts = [str(folder)[n:] for n in range(len(str(folder)))] if str(error).startswith("…") else [str(folder)]
    start = next(start for start in starts if line.startswith((f"{start}/", f"{start}: ")))
    return line[len(start) :].removeprefix("/").removeprefix(": ")


def check_line(error: CheckpointError) -> None:
    """A message is one line of less than 300 characters."""
    [line] = str(error).splitlines()
    assert len(line) < 300


def same_values(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints have bit-equal parameters."""
    first, second = _values(one), _values(other)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    autoencoder = {} if checkpoint.autoencoder is None else checkpoint.autoencoder.state_dict()
    return {**checkpoint.network.state_dict(), **{f"autoencoder.{key}": autoencoder[key] for key in autoencoder}}
