"""Settings of all tests, and the servers that they share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from tests import properties  # noqa: F401  (the profiles)
from tests.latents import LatentServer, serving_latents
from tests.servers import PATIENCE, ServerProcess, serving, side_by_side, write_weights

# With such small networks, threads mostly wait for each other, on a busy machine for very long.
torch.set_num_threads(1)

settings.load_profile("quick")  # `make test-all` asks for the profile `full`

_SHARED = {
    "server": "servers",
    "rgb_server": "servers",
    "servers": "servers",
    "strict_server": "strict_server",
    "digits_and_text": "digits_and_text",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all tests that share servers in one worker, so that the servers start once. Other modules have their own."""
    for item in items:
        assert isinstance(item, pytest.Function)
        shared = [group for fixture, group in _SHARED.items() if fixture in item.fixturenames]
        group = shared[0] if shared else item.module.__name__.removeprefix("tests.")
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models.

    `grey` has classes, one of them named like a label. `rgb` has no classes. `poisoned` is `grey`, but its images of
    dogs are NaN.
    """
    folder = tmp_path_factory.mktemp("weights")
    small = {"model_channels": 8, "channel_multipliers": [1, 2], "norm_groups": 4}
    for name in ("grey", "poisoned"):
        write_weights(
            folder / name,
            in_channels=1,
            image_size=[16, 16],
            **small,
            num_classes=3,
            class_names=["cat", "dog", "7"],
            schedule={"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
            recommended={"sampler": "dpmpp_2m", "num_inference_steps": 4, "guidance_scale": 2.0},
        )
    tensors = load_file(folder / "poisoned" / "model.safetensors")
    tensors["label_embed.weight"][1] = torch.nan
    save_file(tensors, folder / "poisoned" / "model.safetensors")
    write_weights(
        folder / "rgb",
        in_channels=3,
        image_size=[8, 16],
        **small,
        schedule={"num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.3},
        recommended={"num_inference_steps": 5},
    )
    return folder


@pytest.fixture(scope="session")
def servers(weights: Path) -> Iterator[list[ServerProcess]]:
    """Servers of both models. No test's request may make them fail."""
    with side_by_side(
        serving(WEIGHTS=weights / "grey", MAX_BATCH=4), serving(WEIGHTS=weights / "rgb", MAX_BATCH=2)
    ) as running:
        yield running


@pytest.fixture(scope="session")
def server(servers: list[ServerProcess]) -> ServerProcess:
    """A server of `grey` with a small MAX_BATCH."""
    return servers[0]


@pytest.fixture(scope="session")
def rgb_server(servers: list[ServerProcess]) -> ServerProcess:
    """A server of `rgb` with a small MAX_BATCH."""
    return servers[1]


@pytest.fixture(scope="session")
def strict_server(weights: Path) -> Iterator[ServerProcess]:
    """A server of `poisoned` with keys and low limits, for a proxy that serves it at /under."""
    with side_by_side(
        serving(
            key="alpha",
            WEIGHTS=weights / "poisoned",
            API_KEYS="alpha, beta-ü",
            CORS_ORIGINS="https://a.example, https://b.example",
            MAX_BATCH=2,
            MAX_BODY=20_000,
            MAX_IMAGES=3,
            MAX_QUEUE=4,
            ROOT_PATH="/under/",
            TIMEOUT=250,
            NO_SUCH_SETTING=1,
        )
    ) as [server]:
        yield server


@pytest.fixture(scope="session")
def digits_and_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """Servers of the digits in the box and of a tiny Stable Diffusion of two sizes, for tests of other programs."""
    from tests.pipelines import write_pipeline  # diffusers takes seconds to import

    text: Path = write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")
    with side_by_side(serving(WEIGHTS="digits"), serving(WEIGHTS=text, SIZES="64x64,96x64")) as servers:
        yield dict(zip(("digits", "text"), servers, strict=True))


@pytest.fixture(scope="module")
def fake_latents() -> Iterator[LatentServer]:
    with serving_latents() as server:
        yield server


@pytest.fixture
def latents(fake_latents: LatentServer) -> Iterator[LatentServer]:
    """A server in this process whose passes and VAE a test can hold. At the end it must be idle."""
    fake_latents.vae.calls.clear()
    yield fake_latents
    fake_latents.vae.let_go()
    assert fake_latents.engine.wait_idle(PATIENCE)
