"""A server as the U-Net of a local pipeline. test_diffusers_server.py tests DDPM's and DDIM's pipelines."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stepwise import Client, Invalid, Unreachable
from stepwise.unet import RemoteUNet
from tests.checkpoints import save_latent_pipeline
from tests.engines import PROBE
from tests.latents import LatentServer
from tests.local import serving_fake, serving_here
from tests.reference import LDMPipeline
from tests.servers import PATIENCE, ServerProcess
from tests.test_denoise import GREY, noisy
from tests.test_diffusers_server import assert_same, quiet, to_uint8


@pytest.fixture
def unet(server: ServerProcess) -> Iterator[RemoteUNet]:
    with RemoteUNet(server.url) as unet:
        yield unet


def rows(count: int) -> torch.Tensor:
    """[count, 1, 16, 16]"""
    return torch.from_numpy(np.stack([noisy((1, 16, 16), seed) for seed in range(count)]))


def test_each_row_has_its_own_timestep_and_label(unet: RemoteUNet, server: ServerProcess) -> None:
    x = rows(6)
    timesteps, labels = torch.tensor([0, 999, 500, 400, 400, 400]), torch.tensor([0, 1, 2, 0, 1, 2])
    predicted = unet(x, timesteps, labels).sample
    with Client(server.url) as client:
        for row, t, label, prediction in zip(x, timesteps, labels, predicted, strict=True):
            expected = client.denoise_array(row.numpy(), int(t), output="model_output", class_label=int(label))
            np.testing.assert_array_equal(prediction.numpy(), expected)


@pytest.mark.parametrize("timestep", [400, 400.0, torch.tensor(400), torch.tensor([400]), torch.tensor([400.0] * 3)])
def test_one_timestep_is_of_all_rows(unet: RemoteUNet, timestep: torch.Tensor | float) -> None:
    (plain,) = unet(rows(3), timestep, return_dict=False)
    assert torch.equal(plain, torch.cat([unet(row[None], 400).sample for row in rows(3)]))


def test_it_answers_in_the_type_of_the_sample_and_without_gradients(unet: RemoteUNet) -> None:
    x = torch.from_numpy(GREY)[None]
    for kind in (torch.float16, torch.float64):
        predicted = unet(x.to(kind).requires_grad_(), 400).sample
        assert predicted.dtype == kind
        assert not predicted.requires_grad
        np.testing.assert_allclose(predicted, unet(x, 400).sample, atol=2e-2)
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))


def test_the_config_is_the_models(
    unet: RemoteUNet, rgb_server: ServerProcess, latents: LatentServer, server: ServerProcess
) -> None:
    assert (unet.config.in_channels, unet.config.out_channels, unet.config.sample_size) == (1, 1, 16)
    assert unet.config.num_class_embeds == 3
    with RemoteUNet(rgb_server.url) as other:
        assert (other.config.in_channels, other.config.sample_size) == (3, (8, 16))
        assert other.config.num_class_embeds is None
    with RemoteUNet(latents.url) as other:
        assert (other.config.in_channels, other.config.sample_size) == (1, (1, 2))  # of latents


def test_rows_are_sent_side_by_side() -> None:
    """The test keeps the server busy until all rows have arrived; then they run in one pass."""
    with serving_fake() as local, RemoteUNet(local.url) as unet:
        local.runner.hold()
        local.engine.probe()
        assert local.runner.next_pass() == PROBE
        accepted = local.metric("stepwise_accepted_total")
        asking = threading.Thread(target=unet, args=(torch.zeros(4, 1, 1, 2), 9))
        asking.start()
        local.wait_for_metric("stepwise_accepted_total", lambda count: count >= accepted + 4)
        assert len(local.runner.next_pass()) == 4
        local.runner.let_go()
        asking.join(PATIENCE)


def test_what_the_server_refuses_is_raised(unet: RemoteUNet) -> None:
    with pytest.raises(Invalid, match="timestep: must be 0 to 999, and is 1000"):
        unet(rows(2), 1000)
    with pytest.raises(Invalid, match=r"image: must be an .npy of float32"):
        unet(rows(2)[..., 1:], 1)
    with pytest.raises(ValueError, match=r"^timesteps must be whole numbers, and are 1\.5$"):
        unet(rows(2), 1.5)


def test_a_client_that_was_given_stays_open(server: ServerProcess) -> None:
    with Client(server.url) as client:
        with RemoteUNet(client) as unet:
            assert unet(rows(1), 5).sample.shape == (1, 1, 16, 16)
        assert client.info()
    with pytest.raises(Unreachable):
        RemoteUNet("ftp://nowhere")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # diffusers
def test_a_pipeline_of_latent_diffusion(tmp_path: Path) -> None:
    save_latent_pipeline(tmp_path)
    call: dict[str, Any] = {"batch_size": 3, "num_inference_steps": 10, "output_type": "np"}
    local = quiet(LDMPipeline.from_pretrained(tmp_path))
    expected = local(generator=torch.Generator().manual_seed(7), **call).images
    with serving_here(weights=str(tmp_path), max_batch=4) as server, RemoteUNet(server.url) as unet:
        remote = quiet(LDMPipeline(local.vqvae, unet, local.scheduler))
        drawn = remote(generator=torch.Generator().manual_seed(7), **call).images
    assert_same(to_uint8(drawn), to_uint8(expected))
