"""Published weights against diffusers' stored outputs, for everyone who has the weights.

    STEPWISE_REFERENCE_WEIGHTS=DIR make test

DIR has the folders of the repositories (ddpm-cifar10-32, …), or is the `hub` folder of huggingface_hub's cache. The
outputs are those of diffusers' scripts/generate_logits.py: seed 0, timestep 10, the first 30 values. For latent
diffusion they are the U-Net's, so the VAE is not tested.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from model.checkpoints.load import load

FOLDER = os.environ.get("STEPWISE_REFERENCE_WEIGHTS")
LOGITS: dict[str, list[float]] = json.loads(Path(__file__).with_name("reference_logits.json").read_text())


def found(name: str) -> Path | None:
    owner, repository = name.split("/")
    places = [repository, name, f"models--{owner}--{repository}/snapshots/*"]
    folders = [folder for place in places for folder in Path(FOLDER or "").glob(place) if folder.is_dir()]
    return folders[0] if folders else None


@pytest.mark.skipif(FOLDER is None, reason="STEPWISE_REFERENCE_WEIGHTS names no folder")
def test_there_are_some() -> None:
    assert [name for name in LOGITS if found(name)], f"{FOLDER} holds none of {', '.join(LOGITS)}"


@pytest.mark.skipif(FOLDER is None, reason="STEPWISE_REFERENCE_WEIGHTS names no folder")
@pytest.mark.parametrize("name", LOGITS)
def test_outputs_are_those_that_diffusers_holds(name: str) -> None:
    folder = found(name)
    if folder is None:
        pytest.skip(f"{name} is not there")
    checkpoint = load(folder, allow_pickle=True)
    torch.manual_seed(0)
    noise = torch.randn(1, *checkpoint.description.sample_shape)
    with torch.inference_mode():
        out = checkpoint.network(noise, torch.tensor([10]))
    torch.testing.assert_close(out[0, 0, 0, :30], torch.tensor(LOGITS[name]), rtol=0, atol=1e-3)
