"""The choice of backend, precision and width."""

import gc
import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from model.backends import conversion, footprint, openvino
from model.backends.backend import Backend, Precision
from model.backends.choose import Choice, Kind, choose, default_width
from model.backends.cuda import CudaPrecision
from model.backends.network import Shapes, decoder, denoiser
from model.backends.openvino import OpenVINOBackend
from model.backends.torch_cpu import TorchCPUBackend
from model.conditions import Conditions
from model.description import TextDescription
from model.nets.clip import CLIPText, CLIPTextConfig, CLIPTextWithProjectionConfig
from model.rows import Condition
from model.text import choose_text_encoder
from model.vae import choose_vae
from tests.autoencoders import latent_description, random_images, small_autoencoder
from tests.trajectories import CPU, description_of, inputs_of, small_network, small_text_network

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
    make = choose(denoiser(small_network(), DESCRIPTION), CPU, precision, threads, max_batch, cache_dir)
    return make(SHAPE)


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


class LooksAtItsPlace(nn.Module):
    """A row's output depends on the row's place in the pass."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x + torch.arange(len(x), device=x.device)[:, None, None, None]


@pytest.mark.usefixtures("without_openvino")
def test_on_torch_rows_run_alone_where_their_bits_depend_on_their_place(caplog: pytest.LogCaptureFixture) -> None:
    """torch's kernels for small odd sizes of latents do that."""
    network = replace(denoiser(small_network(), DESCRIPTION), module=LooksAtItsPlace())
    backend = choose(network, CPU, "float32", 1, 4, None)(SHAPE)
    assert list(backend.widths) == [1]
    assert backend.reproducible
    assert warnings(caplog)[1:] == ["passes of 4 rows have other bits than those of one, so each row runs alone"]


def test_torch_computes_bfloat16_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO would compute in float32 without saying so."""
    monkeypatch.setattr(openvino, "computes_bfloat16", lambda: False)
    backend = chosen("bfloat16")
    assert isinstance(backend, TorchCPUBackend)
    assert backend.fingerprint["precision"] == "bfloat16"
    assert warnings(caplog) == ["this processor has no instructions for bfloat16, so torch computes it, slowly"]


CAPABILITIES = [(8, 0), (7, 5), (9, 0), (6, 1), (7, 0)]  # of GPUs, by index
GPUS = [torch.device("cuda", index) for index in range(len(CAPABILITIES))]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[CudaPrecision]:
    """The precisions of backends on GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CAPABILITIES[device.index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)  # the current GPU's
    built: list[CudaPrecision] = []

    class Built(TorchCPUBackend):
        """Replaces CudaBackend on a machine without a GPU."""

        def __init__(
            self,
            network: nn.Module,
            shapes: Shapes,
            device: torch.device,
            precision: CudaPrecision,
            max_batch: int,
        ) -> None:
            super().__init__(network, shapes, "float32", max_batch)
            built.append(precision)

    monkeypatch.setattr("model.backends.choose.CudaBackend", Built)
    return built


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("auto", ["bfloat16", "float32", "bfloat16", "float32", "float32"]),
        ("bfloat16", ["bfloat16"] * 5),
        ("float32", ["float32"] * 5),
    ],
)
def test_each_gpu_decides_of_its_own_bfloat16(
    precision: Choice, expected: list[CudaPrecision], built: list[CudaPrecision]
) -> None:
    """An old GPU beside new ones: the first GPU's capability was used for all."""
    for device in GPUS:
        choose(denoiser(small_network(), DESCRIPTION), device, precision, threads=1, max_batch=1, cache_dir=None)(SHAPE)
    assert built == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("auto", ["bfloat16", "float16", "bfloat16", "float32", "float16"]),
        ("bfloat16", ["bfloat16"] * 5),
        ("float32", ["float32"] * 5),
    ],
)
def test_a_network_with_text_is_float16_where_a_gpu_has_no_bfloat16(
    precision: Choice, expected: list[CudaPrecision], built: list[CudaPrecision]
) -> None:
    for device in GPUS:
        network = small_text_network()
        declared = denoiser(network, description_of(network, (4, 8, 8)))
        choose(declared, device, precision, threads=1, max_batch=1, cache_dir=None)((4, 8, 8))
    assert built == expected


def test_an_autoencoder_is_never_float16(built: list[CudaPrecision], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values can pass 65,504, the end of float16: images would be black."""
    monkeypatch.setattr("model.vae.own_stream", lambda device: nullcontext)
    autoencoder = small_autoencoder("kl")
    model = replace(latent_description(autoencoder, (3, 8, 8)), text=TextDescription(7, 4, 0))
    for device in GPUS:
        choose_vae(autoencoder, model, device, "auto", 1, None)(model.group, None)
    assert built == [each for each in ("bfloat16", "float32", "bfloat16", "float32", "float32") for _ in range(2)]


def test_a_text_encoder_is_float32_on_every_gpu(built: list[CudaPrecision]) -> None:
    small: dict[str, Any] = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    one, two = CLIPText(CLIPTextConfig(**small)), CLIPText(CLIPTextWithProjectionConfig(**small))
    model = replace(DESCRIPTION, text=TextDescription(7, 1, 0))
    for clips in ([one], [one, two]):
        built.clear()
        for device in GPUS:
            choose_text_encoder(clips, model, device, 1, None)
        assert built == ["float32"] * 5 * len(clips)


def test_the_memory_of_each_text_encoder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the first is there, the second may not fit."""
    small: dict[str, Any] = {"vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1}
    clips = CLIPText(CLIPTextConfig(**small)), CLIPText(CLIPTextWithProjectionConfig(**small))
    free = iter((2.0**30, 2.0**10))
    monkeypatch.setattr("model.backends.choose.available", lambda: next(free))
    model = replace(DESCRIPTION, text=TextDescription(7, 1, 0))
    with pytest.raises(MemoryError, match=r"its text encoder 2 needs .* GiB, and 0.0 GiB are left"):
        choose_text_encoder(clips, model, CPU, 1, None)


def test_converted_models_are_kept_in_the_cache(tmp_path: Path) -> None:
    chosen("float32", cache_dir=tmp_path)
    assert len(list((tmp_path / "openvino").iterdir())) == 1


def test_the_halves_of_an_autoencoder_are_chosen_and_cached_alike(tmp_path: Path) -> None:
    image_shape = (3, 8, 8)
    autoencoder = small_autoencoder("kl")
    model = latent_description(autoencoder, image_shape)
    vae = choose_vae(autoencoder, model, CPU, "float32", 1, tmp_path)(model.group, None)
    assert len(list((tmp_path / "openvino").iterdir())) == 2
    assert list(vae.widths) == list(range(1, 17))
    assert vae.reproducible
    [latents] = random_images(1, model.sample_shape)
    [image] = vae.decode([latents])
    assert image.shape == image_shape
    assert vae.encode(image).mean.shape == latents.shape


@pytest.mark.usefixtures("without_openvino")
def test_the_halves_of_an_autoencoder_are_torchs_without_openvino() -> None:
    autoencoder = small_autoencoder("vq")
    model = latent_description(autoencoder, (3, 8, 8))
    vae = choose_vae(autoencoder, model, CPU, "auto", 1, cache_dir=None)(model.group, None)
    assert list(vae.widths) == [1]


def test_sizes_are_compiled_when_passes_need_them() -> None:
    """With this machine's memory."""
    backend = chosen("float32", max_batch=2)
    assert isinstance(backend, OpenVINOBackend)
    assert backend.sizes == [1]
    numbers = torch.zeros(2, dtype=torch.int64)
    inputs = inputs_of(small_network(), torch.zeros((2, *SHAPE)), numbers, numbers)
    out = backend.start(inputs)().clone()
    assert backend.sizes == [1, 2]
    alone = backend.start({name: values[:1] for name, values in inputs.items()})()
    assert torch.equal(out[:1], alone)


def test_passes_of_large_networks_are_narrow_by_default() -> None:
    shapes = [(3, 4, 4), (3, 32, 32), (3, 32, 32), (3, 256, 256)]
    networks = [
        denoiser(small_network(), replace(DESCRIPTION, num_parameters=parameters))
        for parameters in (10_000, 4_000_000, 35_746_307, 35_746_307)
    ]

    def widths(kind: Kind) -> list[int]:
        return [default_width(network, shape, kind) for network, shape in zip(networks, shapes, strict=True)]

    assert widths("cuda") == [32, 32, 32, 3]
    assert widths("openvino") == [16, 8, 4, 1]
    assert widths("torch_cpu") == [8, 8, 1, 1]


@pytest.mark.parametrize(
    ("parameters", "side", "width"),
    [(859_520_964, 64, 2), (323_384_964, 64, 6), (865_910_724, 96, 2), (859_520_964, 32, 9), (2_567_463_684, 128, 2)],
    ids=["Stable Diffusion 1", "tiny-sd", "Stable Diffusion 2, 768x768", "Stable Diffusion 1, 256x256", "SDXL"],
)
def test_a_pass_of_stable_diffusion_has_few_rows(parameters: int, side: int, width: int) -> None:
    """32 rows of Stable Diffusion 1 are 26 TFLOP, and a lone image on a GPU would wait for all of them."""
    network = small_text_network()
    model = replace(description_of(network, (4, 8, 8)), num_parameters=parameters)
    kinds: tuple[Kind, ...] = ("cuda", "openvino", "torch_cpu")
    assert [default_width(denoiser(network, model), (4, side, side), kind) for kind in kinds] == [width, 1, 1]


def test_what_pads_decodes_few_images_at_once_by_default() -> None:
    """Images finish one by one, so most of a wide pass would be padding."""
    autoencoder = small_autoencoder("kl")
    half = decoder(autoencoder, latent_description(autoencoder, (3, 8, 8)))
    small, large = (half.inputs["x"][0], 4, 4), (half.inputs["x"][0], 1024, 1024)
    assert [default_width(half, shape, "cuda") for shape in (small, large)] == [4, 4]
    of_stable_diffusion = replace(half, work_per_value=49_490_199 * 8**2 / 4)
    assert default_width(of_stable_diffusion, (4, 64, 64), "cuda") == 1
    assert [default_width(half, shape, "torch_cpu") for shape in (small, large)] == [1, 1]
    assert [default_width(half, shape, "openvino") for shape in (small, large)] == [16, 1]


# Sizes.


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("library", ["openvino", "torch"])
def test_backends_of_several_sizes_compute_what_torch_computes(
    library: str, precision: Choice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if library == "torch":
        monkeypatch.setitem(sys.modules, "openvino", None)
    make = choose(denoiser(small_network(), DESCRIPTION), CPU, precision, 1, 2, tmp_path)
    backends = [make((3, height, width)) for height, width in ((4, 4), (8, 12), (20, 8))]
    for backend, (height, width) in zip(backends, ((4, 4), (8, 12), (20, 8)), strict=True):
        x = torch.randn((2, 3, height, width), generator=torch.Generator().manual_seed(0))
        t, labels = torch.tensor([3, 990]), torch.tensor([1, 5])
        with torch.inference_mode():
            expected = small_network()(x, t, labels)
        out = backend.start(inputs_of(small_network(), x, t, labels))()
        bound = 1e-5 if backend.fingerprint["precision"] == "float32" else 0.05
        assert (out - expected).abs().max() <= bound * expected.abs().max()
    assert len(list(tmp_path.glob("openvino/*"))) == (1 if library == "openvino" else 0)  # one conversion for all


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("library", ["openvino", "torch"])
def test_one_network_with_text_computes_any_size_of_latents(
    library: str, precision: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is converted at an even size. The way up must follow the odd sizes of the way down."""
    if library == "torch":
        monkeypatch.setitem(sys.modules, "openvino", None)
    network = small_text_network()
    make = choose(denoiser(network, description_of(network, (4, 8, 8))), CPU, precision, 1, 2, None)
    for size in ((9, 13), (5, 6)):
        x = torch.randn((2, 4, *size), generator=torch.Generator().manual_seed(0))
        given = inputs_of(small_text_network(), x, torch.tensor([3.0, 500.5]), torch.zeros(2))
        with torch.inference_mode():
            expected = small_text_network().denoise(**given)
        backend = make((4, *size))
        assert backend.reproducible
        alone = torch.cat(
            [backend.start({name: values[i, None] for name, values in given.items()})().clone() for i in range(2)]
        )
        bound = 1e-5 if backend.fingerprint["precision"] == "float32" else 0.05
        assert (alone - expected).abs().max() <= bound * expected.abs().max()
        width = backend.widths[-1]
        together = backend.start({name: values[:width] for name, values in given.items()})()
        assert torch.equal(together, alone[:width])


@pytest.mark.parametrize("library", ["openvino", "torch"])
def test_a_size_without_memory_for_it_is_refused_before_it_is_compiled(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "torch":
        monkeypatch.setitem(sys.modules, "openvino", None)
    make = choose(denoiser(small_network(), DESCRIPTION), CPU, "float32", 1, 1, None)
    monkeypatch.setattr("model.backends.choose.available", lambda: 2.0**29)
    make(SHAPE)
    with pytest.raises(MemoryError, match=r"its denoiser needs \d+\.\d GiB, and 0\.5 GiB are left"):
        make((3, 4096, 4096))


def test_the_weights_in_torch_are_freed_once_they_are_converted(tmp_path: Path) -> None:
    """Embeddings stay: they are computed outside the converted network."""
    unet = small_network()
    embedder, gone = unet.embedder, weakref.ref(unet.final_conv)
    make = choose(denoiser(unet, DESCRIPTION), CPU, "float32", 1, 1, tmp_path)
    del unet
    gc.collect()
    assert gone() is None
    backend = make(SHAPE)
    conditions = Conditions(embedder, backend, no_label=5)
    given, _ = conditions.inputs(
        torch.tensor(conditions.times([(7, None)])), torch.tensor(conditions.hold([Condition()]))
    )
    assert backend.start({"x": torch.zeros((1, *SHAPE)), **given})().isfinite().all()


@pytest.mark.parametrize("library", ["openvino", "torch"])
def test_the_needed_memory_grows_with_the_size(library: str) -> None:
    network = denoiser(small_network(), DESCRIPTION)

    def needed(side: int) -> int:
        shapes = network.at((3, side, side))
        if library == "torch":
            return footprint.activations(network.module, shapes)
        return conversion.activations(conversion.at_size(conversion.convert(network), shapes))

    small, large = needed(16), needed(64)
    assert small > 16 * 16 * 16 * 4  # the first convolution's output, at least
    assert small < 100 * 16 * 16 * 16 * 4
    assert 12 * small < large < 20 * small
    assert footprint.parameters(network.module) == sum(p.nbytes for p in small_network().parameters())
    assert not any(parameter.is_meta for parameter in network.module.parameters())  # they keep their values
