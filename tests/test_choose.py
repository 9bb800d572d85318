"""The choice of backend, precision and width."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from model.backends import openvino
from model.backends.backend import Backend, Precision
from model.backends.choose import choose, default_width
from model.backends.network import decoder, denoiser
from model.backends.openvino import OpenVINOBackend
from model.backends.torch_cpu import TorchCPUBackend
from model.vae import choose_vae
from tests.autoencoders import latent_description, random_images, small_autoencoder
from tests.trajectories import CPU, description_of, small_network

SHAPE = (3, 4, 4)
DESCRIPTION = description_of(small_network(), SHAPE)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore torch's threads, which `choose` changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chosen(
    precision: Precision | Literal["auto"], max_batch: int | None = 2, cache_dir: Path | None = None, threads: int = 1
) -> Backend:
    return choose(denoiser(small_network(), DESCRIPTION), CPU, precision, threads, max_batch, cache_dir)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.usefixtures("without_openvino")
def test_torch_computes_where_openvino_is_not_installed(
    precision: Precision | Literal["auto"], expected: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    backend = chosen(precision)
    assert isinstance(backend, TorchCPUBackend)
    assert backend.fingerprint["precision"] == expected
    assert list(backend.widths) == [2]
    [warning] = warnings(caplog)
    assert warning.startswith("OpenVINO is not installed, so torch computes, several times slower; ")
    assert warning.endswith(": in a checkout, pip install -e '.[cpu]'")


@pytest.mark.parametrize(
    ("native", "precision", "expected"),
    [
        (True, "auto", "bfloat16"),
        (True, "float32", "float32"),
        (True, "bfloat16", "bfloat16"),
        (False, "auto", "float32"),
        (False, "float32", "float32"),
    ],
)
def test_openvino_computes_on_the_cpu(
    native: bool,
    precision: Precision | Literal["auto"],
    expected: Precision,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(openvino, "computes_bfloat16", lambda: native)
    backend = chosen(precision, threads=2)
    assert isinstance(backend, OpenVINOBackend)
    assert backend.fingerprint["precision"] == expected
    assert backend.fingerprint["threads"] == 2
    assert list(backend.widths) == [1, 2]
    assert torch.get_num_threads() == 1
    assert warnings(caplog) == []


def test_torch_computes_bfloat16_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO would compute in float32 without saying so."""
    monkeypatch.setattr(openvino, "computes_bfloat16", lambda: False)
    backend = chosen("bfloat16")
    assert isinstance(backend, TorchCPUBackend)
    assert backend.fingerprint["precision"] == "bfloat16"
    assert warnings(caplog) == ["this processor has no instructions for bfloat16, so torch computes it, slowly"]


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("auto", ["bfloat16", "float32", "bfloat16"]), ("bfloat16", ["bfloat16"] * 3), ("float32", ["float32"] * 3)],
)
def test_each_gpu_decides_of_its_own_bfloat16(
    precision: Precision | Literal["auto"], expected: list[Precision], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old GPU beside new ones: the first GPU's capability was used for all."""
    capabilities = {0: (8, 0), 1: (7, 5), 2: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)  # the current GPU's
    built: list[tuple[int, Precision]] = []

    class Built(TorchCPUBackend):
        """Replaces CudaBackend on a machine without a GPU."""

        def __init__(
            self,
            network: nn.Module,
            sample_shape: tuple[int, int, int],
            device: torch.device,
            precision: Precision,
            max_batch: int,
        ) -> None:
            super().__init__(network, sample_shape, precision, max_batch)
            built.append((device.index, precision))

    monkeypatch.setattr("model.backends.choose.CudaBackend", Built)
    for index in capabilities:
        device = torch.device("cuda", index)
        choose(denoiser(small_network(), DESCRIPTION), device, precision, threads=1, max_batch=1, cache_dir=None)
    assert built == list(enumerate(expected))


def test_converted_models_are_kept_in_the_cache(tmp_path: Path) -> None:
    chosen("float32", cache_dir=tmp_path)
    assert len(list((tmp_path / "openvino").iterdir())) == 1


def test_the_halves_of_an_autoencoder_are_chosen_and_cached_alike(tmp_path: Path) -> None:
    image_shape = (3, 8, 8)
    autoencoder = small_autoencoder("kl")
    model = latent_description(autoencoder, image_shape)
    vae = choose_vae(autoencoder, model, CPU, "float32", 1, tmp_path)
    assert len(list((tmp_path / "openvino").iterdir())) == 2
    assert list(vae.widths) == list(range(1, 17))
    assert vae.reproducible
    [latents] = random_images(1, model.sample_shape)
    [image] = vae.decode([latents])
    assert image.shape == image_shape
    assert vae.encode(image).shape == latents.shape


@pytest.mark.usefixtures("without_openvino")
def test_the_halves_of_an_autoencoder_are_torchs_without_openvino() -> None:
    autoencoder = small_autoencoder("vq")
    model = latent_description(autoencoder, (3, 8, 8))
    vae = choose_vae(autoencoder, model, CPU, "auto", 1, cache_dir=None)
    assert list(vae.widths) == [1]


def test_sizes_are_compiled_when_passes_need_them() -> None:
    """With this machine's memory."""
    backend = chosen("float32", max_batch=2)
    assert isinstance(backend, OpenVINOBackend)
    assert backend.sizes == [1]
    x, numbers = torch.zeros((2, *SHAPE)), torch.zeros(2, dtype=torch.int64)
    out = backend.start(x, numbers, numbers)().clone()
    assert backend.sizes == [1, 2]
    alone = backend.start(x[:1], numbers[:1], numbers[:1])()
    assert torch.equal(out[:1], alone)


def test_passes_of_large_networks_are_narrow_by_default() -> None:
    small, middling, large, huge = (
        denoiser(small_network(), replace(DESCRIPTION, num_parameters=parameters, sample_shape=(3, side, side)))
        for parameters, side in ((10_000, 4), (4_000_000, 32), (35_746_307, 32), (35_746_307, 256))
    )
    assert [default_width(network, "cuda") for network in (small, large, huge)] == [32, 32, 32]
    assert [default_width(network, "openvino") for network in (small, middling, large, huge)] == [16, 8, 4, 1]
    assert [default_width(network, "torch_cpu") for network in (small, large, huge)] == [8, 1, 1]


def test_what_pads_decodes_few_images_at_once_by_default() -> None:
    """Images finish one by one, so most of a wide pass would be padding."""
    autoencoder = small_autoencoder("kl")
    small, large = (decoder(autoencoder, latent_description(autoencoder, (3, side, side))) for side in (8, 2048))
    assert [default_width(half, "cuda") for half in (small, large)] == [4, 4]
    assert [default_width(half, "torch_cpu") for half in (small, large)] == [1, 1]
    assert [default_width(half, "openvino") for half in (small, large)] == [16, 1]


@pytest.mark.usefixtures("without_openvino")
def test_the_default_width_is_that_of_the_backend_without_openvino() -> None:
    assert list(chosen("float32", max_batch=None).widths) == [8]


def test_the_default_width_is_that_of_the_backend() -> None:
    assert list(chosen("float32", max_batch=None).widths) == list(range(1, 17))
