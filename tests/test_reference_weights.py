"""Published weights against diffusers, for everyone who has the weights.

    STEPWISE_REFERENCE_WEIGHTS=DIR make test

DIR has the folders of the repositories (ddpm-cifar10-32, …), or is the `hub` folder of huggingface_hub's cache.

The stored outputs are those of diffusers' scripts/generate_logits.py: seed 0, timestep 10, the first 30 values. For
latent diffusion they are the U-Net's, so the VAE is not tested. Stable Diffusion draws an image with its own pipeline
and with the server, one after the other: 8 GB of memory and some minutes.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoints.load import load
from tests.pipelines import draw, load_pipeline
from tests.servers import read_png, serving
from tests.test_diffusers_server import to_uint8

FOLDER = os.environ.get("STEPWISE_REFERENCE_WEIGHTS")
LOGITS: dict[str, list[float]] = json.loads(Path(__file__).with_name("reference_logits.json").read_text())
STABLE_DIFFUSION = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1")
PATIENCE = 1800.0  # seconds


def found(name: str) -> Path | None:
    owner, repository = name.split("/")
    places = [repository, name, f"models--{owner}--{repository}/snapshots/*"]
    folders = [folder for place in places for folder in Path(FOLDER or "").glob(place) if folder.is_dir()]
    return folders[0] if folders else None


@pytest.mark.skipif(FOLDER is None, reason="STEPWISE_REFERENCE_WEIGHTS names no folder")
def test_there_are_some() -> None:
    names = (*LOGITS, *STABLE_DIFFUSION)
    assert [name for name in names if found(name)], f"{FOLDER} holds none of {', '.join(names)}"


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


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="STEPWISE_REFERENCE_WEIGHTS names no folder")
@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_stable_diffusion_draws_the_image_of_its_pipeline(name: str) -> None:
    """At its own scheduler, size and guidance, with few steps."""
    folder = found(name)
    if folder is None:
        pytest.skip(f"{name} is not there")
    prompt, steps = "a photograph of an astronaut riding a horse", 8
    expected = to_uint8(draw(load_pipeline(folder), prompt, seed=7, num_inference_steps=steps, guidance_scale=7.5))
    body = {"prompt": prompt, "seed": 7, "num_inference_steps": steps, "guidance_scale": 7.5}
    with serving(WEIGHTS=folder, TIMEOUT=PATIENCE, ALLOW_PICKLE=1) as server:
        ours = read_png(server.client.post("/sample", json=body, timeout=PATIENCE).raise_for_status().content)
    beyond = np.abs(ours.astype(int) - expected.astype(int)) > 1
    assert beyond.mean() <= 0.001
