"""Small checkpoints as the diffusers library writes them, and the words that bad ones are refused in, for tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, load
from tests.networks import fill
from tests.reference import DDPMPipeline, DDPMScheduler, UNet2DModel

Json = dict[str, Any]

STEM = "diffusion_pytorch_model"
SIZES: Json = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def small_unet(seed: int = 0, gain: float = 0.5, **changes: object) -> Any:
    """A network of diffusers with random weights, all of which float16 holds exactly."""
    network = UNet2DModel(**{**SIZES, **changes})
    fill(network, seed, gain)
    for parameter in network.parameters():
        parameter.copy_(parameter.half())
    return network


def save_pipeline(folder: Path, network: Any = None, scheduler: Any = None) -> Path:
    """What DDPMPipeline.save_pretrained leaves: model_index.json, unet/ and scheduler/."""
    pipeline = DDPMPipeline(network or small_unet(), scheduler or DDPMScheduler())
    pipeline.save_pretrained(folder)
    return folder


def edit(path: Path, changes: Json, without: str = "") -> None:
    """Change fields of a JSON file, and leave one out."""
    values = {**json.loads(path.read_text()), **changes}
    values.pop(without, None)
    path.write_text(json.dumps(values))


def refusal(path: Path, folder: Path | None = None, allow_pickle: bool = False) -> str:
    """The one line that loading is refused with, without the folder."""
    folder = folder or path
    with pytest.raises(CheckpointError) as error:
        load(path, allow_pickle)
    [line] = str(error.value).splitlines()
    assert line.startswith((f"{folder}/", f"{folder}: "))
    return line[len(f"{folder}/") :].removeprefix(" ")


def same_values(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two networks have the same parameters to the bit."""
    first, second = one.network.state_dict(), other.network.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
