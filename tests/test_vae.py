"""The VAE on its backends: outputs equal torch's, an image's bits do not depend on others, and previews."""

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.backends.backend import Backend, Precision
from model.backends.conversion import at_size, convert
from model.backends.network import Network, decoder, encoder
from model.backends.openvino import OpenVINOBackend, computes_bfloat16
from model.backends.torch_cpu import TorchCPUBackend
from model.nets.autoencoder import Autoencoder, AutoencoderConfig
from model.nets.layers import Attention
from model.rows import Image
from model.vae import VAE, Preview, fitted
from tests.autoencoders import Kind, latent_description, random_images, small_autoencoder
from tests.networks import fill
from tests.properties import examples

IMAGE = (3, 12, 16)
WIDTH = 5
COUNT = 7  # different latents
BOUND: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 0.03}  # largest error, relative to the largest value

Library = Literal["openvino", "torch"]
_NO_BFLOAT16 = pytest.mark.skipif(not computes_bfloat16(), reason="no instructions for bfloat16")
LIBRARIES = [
    pytest.param("openvino", "float32", id="openvino-float32"),
    pytest.param("openvino", "bfloat16", id="openvino-bfloat16", marks=_NO_BFLOAT16),
    pytest.param("torch", "float32", id="torch-float32"),
    pytest.param("torch", "bfloat16", id="torch-bfloat16"),
]


def enough_memory() -> float:
    return math.inf


def no_memory() -> float:
    """Memory only for passes of one row."""
    return 0.0


def backend_of(
    network: Network,
    library: Library,
    precision: Precision,
    width: int,
    threads: int = 1,
    free_memory: Callable[[], float] = enough_memory,
) -> Backend:
    if library == "torch":
        return TorchCPUBackend(network.module, network.inputs, precision, width)
    return OpenVINOBackend(
        at_size(convert(network), network.inputs), network.inputs, precision, threads, width, free_memory
    )


class Case(NamedTuple):
    """A VAE, its decoder's backend, and the autoencoder as torch runs it."""

    vae: VAE
    decodes: Backend
    autoencoder: Autoencoder
    precision: Precision

    @property
    def latents(self) -> list[Image]:
        return random_images(COUNT, latent_description(self.autoencoder, IMAGE).sample_shape)


def case_of(
    autoencoder: Autoencoder,
    library: Library,
    precision: Precision,
    threads: int = 1,
    free_memory: Callable[[], float] = enough_memory,
) -> Case:
    its_own, model = copy.deepcopy(autoencoder), latent_description(autoencoder, IMAGE)
    decodes = backend_of(decoder(its_own, model), library, precision, WIDTH, threads, free_memory)
    encodes = backend_of(encoder(its_own, model), library, precision, 1, threads)
    return Case(VAE(its_own.unscaled, decodes, encodes, IMAGE), decodes, autoencoder, precision)


@pytest.fixture(scope="module", params=get_args(Kind))
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@pytest.fixture(scope="module")
def case(kind: Kind, library: Library, precision: Precision) -> Case:
    return case_of(small_autoencoder(kind), library, precision)


@pytest.fixture(scope="module")
def alone(case: Case) -> list[Image]:
    """Each image, decoded alone."""
    images = [case.vae.decode([latents])[0] for latents in case.latents]
    assert all(np.abs(images[i] - images[k]).max() > 1e-3 for i in range(COUNT) for k in range(i))
    return images


on_each = pytest.mark.parametrize(("library", "precision"), LIBRARIES, scope="module")


# Outputs.


def error(found: Image, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    return float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())


def check_error(found: float, precision: Precision) -> None:
    assert found <= BOUND[precision]
    if precision == "bfloat16":
        assert found > 1e-4  # bfloat16 was used


@on_each
def test_decodes_what_torch_decodes(case: Case) -> None:
    latents = case.latents[:WIDTH]
    with torch.inference_mode():
        expected = case.autoencoder.decode(torch.tensor(np.stack(latents)))
    images = case.vae.decode(latents)
    check_error(max(error(image, one) for image, one in zip(images, expected, strict=True)), case.precision)


@on_each
def test_encodes_what_torch_encodes(case: Case) -> None:
    [image] = random_images(1, IMAGE)
    with torch.inference_mode():
        [expected] = case.autoencoder.encode(torch.tensor(image)[None])
    check_error(error(case.vae.encode(image).mean, expected), case.precision)


@on_each
def test_codes_are_found_in_float32(library: Library, precision: Precision) -> None:
    """100.2 is nearer to 101, and 99.8 to 99. In bfloat16 both are 100, and would become the same code.

    These values are in the codes' first channel, which the decoder ignores. It shows the second channel.
    """
    codes = torch.tensor([[99.0, -1.0], [101.0, 1.0]])
    autoencoder = small_autoencoder("vq", num_vq_embeddings=2, scaling_factor=1.0)
    assert autoencoder.quantize is not None
    assert autoencoder.post_quant_conv is not None
    autoencoder.quantize.embedding.weight.copy_(codes)
    autoencoder.post_quant_conv.weight[:, 0].zero_()

    nearest = torch.randint(2, (6, 8), generator=torch.Generator().manual_seed(0))
    latents = torch.stack([torch.tensor([99.8, 100.2])[nearest], torch.zeros(6, 8)])
    in_bfloat16 = (latents[0, ..., None].bfloat16() - codes[:, 0].bfloat16()).abs().argmin(dim=-1)
    assert set(nearest.flatten().tolist()) == {0, 1}
    assert in_bfloat16.eq(0).all()

    vae = case_of(autoencoder, library, precision).vae
    right, wrong = (codes[which].permute(2, 0, 1) for which in (nearest, in_bfloat16))
    image, expected, other = vae.decode([z.numpy() for z in (latents, right, wrong)])
    assert np.array_equal(image, expected)
    assert np.abs(image - other).max() > 0.1 * np.abs(image).max()


# Bits.


@on_each
@examples(25)
@given(which=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=WIDTH))
def test_latents_have_the_same_image_in_any_company_at_any_place(
    case: Case, alone: list[Image], which: list[int]
) -> None:
    assert case.vae.reproducible
    latents = case.latents
    images = case.vae.decode([latents[i] for i in which])
    assert all(np.array_equal(image, alone[i]) for image, i in zip(images, which, strict=True))


@pytest.mark.parametrize(("library", "precision"), LIBRARIES[:2], scope="module")
@pytest.mark.parametrize(
    ("threads", "free_memory", "sizes"),
    [(1, no_memory, [1]), (1, enough_memory, [1, 2, 4]), (2, enough_memory, [1, 2, 4])],
    ids=["no memory", "whole", "in halves"],
)
def test_latents_have_the_same_image_in_pieces_of_any_size(
    case: Case, alone: list[Image], threads: int, free_memory: Callable[[], float], sizes: list[int]
) -> None:
    other = case_of(case.autoencoder, "openvino", case.precision, threads, free_memory)
    assert isinstance(other.decodes, OpenVINOBackend)
    for count in range(1, WIDTH + 1):
        images = other.vae.decode(case.latents[:count])
        assert all(np.array_equal(*pair) for pair in zip(images, alone, strict=False))
        other.vae.decode(case.latents[:2])
    assert other.decodes.sizes == sizes


@on_each
def test_what_was_decoded_and_encoded_is_kept(case: Case) -> None:
    """Results stay the same when the backend overwrites its own memory."""
    one, another = case.latents[:2]
    [image] = case.vae.decode([one])
    latents = case.vae.encode(image).mean
    before = image.copy(), latents.copy()
    case.vae.encode(*case.vae.decode([another]))
    assert np.array_equal(image, before[0])
    assert np.array_equal(latents, before[1])


@on_each
def test_no_more_is_decoded_at_once_than_the_last_width(case: Case) -> None:
    assert case.vae.widths[-1] == WIDTH
    with pytest.raises(ValueError, match=f"{WIDTH + 1} rows do not fit a pass of {WIDTH}"):
        case.vae.decode(case.latents[: WIDTH + 1])


@on_each
def test_fingerprint_names_what_moves_bits(case: Case) -> None:
    parts = case.vae.fingerprint
    assert parts["decoder_precision"] == case.precision
    assert parts.get("decoder_width") == (None if isinstance(case.decodes, OpenVINOBackend) else WIDTH)
    assert parts == {f"decoder_{name}": value for name, value in case.decodes.fingerprint.items()}


# Attention in chunks.


@pytest.mark.parametrize("at_once", [1, 10, 48])
@pytest.mark.parametrize(("library", "precision"), LIBRARIES)
def test_attention_in_parts_is_attention(library: Library, precision: Precision, at_once: int) -> None:
    """Also if the last chunk is smaller. Rows do not affect each other."""
    shape = (8, 6, 8)
    whole, parts = Attention(8, 4, heads=2), Attention(8, 4, heads=2, at_once=at_once)
    fill(whole)
    parts.load_state_dict(whole.state_dict())
    x = torch.tensor(np.stack(random_images(3, shape)))
    with torch.inference_mode():
        expected = whole(x)
        assert (parts(x) - expected).abs().max() <= 1e-5 * expected.abs().max()

    network = Network("attention", parts.eval(), "0" * 64, {"x": shape}, 1.0)
    backend = backend_of(network, library, precision, width=3)
    out = backend.start({"x": x})().clone()
    check_error(max(error(row.numpy(), one) for row, one in zip(out, expected, strict=True)), precision)
    for i in range(3):
        assert torch.equal(backend.start({"x": x[i, None]})()[0], out[i])


# Large networks.


@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_autoencoder_without_values_takes_no_memory(kind: Kind) -> None:
    """A network is built on meta to check its shapes. This one would fill half a terabyte."""
    config = AutoencoderConfig(
        kind=kind,
        latent_channels=4,
        block_out_channels=(16384, 16384),
        layers_per_block=8,
        num_vq_embeddings=1_000_000 if kind == "vq" else None,
    )
    with torch.device("meta"):
        autoencoder = Autoencoder(config)
        image = torch.empty((2, 3, 64, 32))
        latents = autoencoder.encode(image)
        decoded = autoencoder.decode(latents)
    assert sum(parameter.nbytes for parameter in autoencoder.parameters()) > 2**39
    assert latents.shape == (2, 4, 32, 16)
    assert decoded.shape == image.shape
    assert all(tensor.is_meta for tensor in (latents, decoded, *autoencoder.state_dict().values()))


# Previews.


@on_each
def test_a_preview_is_an_image(case: Case) -> None:
    one, another = (case.vae.preview(latents) for latents in case.latents[:2])
    for image in (one, another):
        assert image.shape == IMAGE
        assert image.dtype == np.float32
        assert np.isfinite(image).all()
    assert np.abs(one - another).max() > 0.1


@on_each
def test_two_servers_have_the_same_previews(case: Case, library: Library) -> None:
    [latents] = case.latents[:1]
    other = case_of(case.autoencoder, library, case.precision)
    assert np.array_equal(other.vae.preview(latents), case.vae.preview(latents))


class Linear:
    """An encoder that averages blocks of pixels and mixes their channels."""

    def __init__(self, channels: int, image_channels: int, factor: int) -> None:
        rng = torch.Generator().manual_seed(0)
        self.mix = torch.randn((channels, image_channels), generator=rng)
        self.bias = torch.randn(channels, generator=rng)
        self.factor = factor

    def colours(self, image: Image) -> Tensor:
        """The mean of each block, [C, h, w]."""
        return F.avg_pool2d(torch.from_numpy(image), self.factor)

    def encode(self, image: Image) -> Image:
        latents = torch.einsum("cC,Chw->chw", self.mix, self.colours(image)) + self.bias[:, None, None]
        found: Image = latents.numpy()
        return found


@pytest.mark.parametrize(
    ("channels", "image_shape", "factor"),
    [(3, (3, 32, 32), 4), (4, (3, 16, 48), 8), (2, (1, 24, 16), 2), (1, (1, 160, 160), 2)],
    ids=["as many channels", "more, few places an image", "grey", "more places than are fitted"],
)
def test_of_a_linear_autoencoder_a_preview_is_exact(
    channels: int, image_shape: tuple[int, int, int], factor: int
) -> None:
    """The colours of all blocks, interpolated."""
    linear = Linear(channels, image_shape[0], factor)
    preview = fitted(linear.encode, image_shape)
    [image] = random_images(1, image_shape)
    expected = F.interpolate(linear.colours(image)[None], image_shape[1:], mode="bilinear")[0]
    assert error(preview.of(linear.encode(image)), expected) < 1e-3


@on_each
def test_vaes_of_two_sizes_have_the_same_previews(case: Case, library: Library) -> None:
    """A preview is fitted once, and makes images of any size."""
    small = (IMAGE[0], IMAGE[1] // 2, IMAGE[2] // 2)
    model = latent_description(case.autoencoder, small)
    decodes, encodes = (
        backend_of(half(copy.deepcopy(case.autoencoder), model), library, case.precision, 1)
        for half in (decoder, encoder)
    )
    other = VAE(case.autoencoder.unscaled, decodes, encodes, small, like=case.vae)
    [latents] = random_images(1, model.sample_shape)
    assert other.preview(latents).shape == small
    assert np.array_equal(other.preview(latents), case.vae.preview(latents))
    assert other.decode([latents])[0].shape == small


def test_a_fit_has_the_same_bits_each_time() -> None:
    shape, encode = (3, 32, 32), Linear(4, 3, 2).encode
    torch.manual_seed(1)
    one = fitted(encode, shape)
    torch.manual_seed(2)
    another = fitted(encode, shape)
    assert torch.equal(one.weight, another.weight)
    assert torch.equal(one.bias, another.bias)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_have_a_preview_of_one_colour(value: float) -> None:
    """NaN weights are reported by the engine's warm-up, so this must not raise. The preview is the mean colour."""
    latents = np.full((4, 8, 8), value, np.float32)
    preview: Preview = fitted(lambda image: latents, (3, 16, 16))
    assert preview.weight.eq(0).all()
    assert 0 < preview.bias.abs().max() < 0.5
