"""Weights in half precision stay so, from the file to the device, and draw what they draw in float32."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.backends import footprint
from model.backends.backend import Precision
from model.backends.conversion import WEIGHTS, Converted, activations, at_size, convert, converted
from model.backends.network import Network, decoder, denoiser, encoder, text_encoder
from model.backends.openvino import OpenVINOBackend, computes_bfloat16
from model.backends.torch_cpu import TorchCPUBackend
from model.checkpoints.load import load
from model.description import ModelDescription, TextDescription
from model.nets.clip import CLIPText, CLIPTextConfig
from model.nets.precision import narrow, widen_outside
from tests.autoencoders import latent_description, small_autoencoder
from tests.checkpoints import save_pipeline
from tests.networks import fill
from tests.pipelines import write_pipeline
from tests.trajectories import description_of, small_network, small_text_network

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
HALVES = [torch.float16, torch.bfloat16]
in_half = pytest.mark.parametrize("half", HALVES, ids=["float16", "bfloat16"])
in_each_precision = pytest.mark.parametrize(
    "precision",
    [
        "float32",
        pytest.param(
            "bfloat16", marks=pytest.mark.skipif(not computes_bfloat16(), reason="no instructions for bfloat16")
        ),
    ],
)


# Files.


def rewrite(file: Path, dtype: torch.dtype, *kept: str) -> None:
    """Change the dtype of a file's tensors, but for some keys."""
    save_file({key: values if key in kept else values.to(dtype) for key, values in load_file(file).items()}, file)


@in_half
def test_parameters_stay_as_the_files_have_them(half: torch.dtype, tmp_path: Path) -> None:
    """But for what no backend runs. A checkpoint's networks may differ."""
    folder = write_pipeline(tmp_path / "pipeline")
    whole = load(folder)
    for part in ("unet", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            rewrite(file, half)
    checkpoint = load(folder)
    assert checkpoint.autoencoder is not None
    assert checkpoint.text_encoders
    outside = {"time_proj", "time_embedding", "class_embedding"}
    for key, values in checkpoint.network.named_parameters():
        assert values.dtype == (torch.float32 if key.split(".")[0] in outside else half)
        assert torch.equal(values.float(), whole.network.get_parameter(key).to(half).float())
    assert {values.dtype for values in checkpoint.autoencoder.parameters()} == {torch.float32}
    assert {values.dtype for values in checkpoint.text_encoders[0].encoder.parameters()} == {half}
    assert {values.dtype for values in checkpoint.text_encoders[0].final_layer_norm.parameters()} == {torch.float32}
    assert checkpoint.text_encoders[0].embeddings(torch.tensor([[1, 2]])).dtype == torch.float32


def test_a_parameter_of_several_tensors_has_the_precision_that_holds_them_all(tmp_path: Path) -> None:
    """Our attention's qkv is made of three tensors."""
    folder = save_pipeline(tmp_path / "pipeline")
    [to_q, *_] = (key for key in load_file(folder / UNET) if key.endswith("to_q.weight"))
    rewrite(folder / UNET, torch.float16, to_q)
    network = load(folder).network
    dtypes = {key: values.dtype for key, values in network.named_parameters() if ".qkv." in key}
    assert dtypes[to_q.replace("to_q", "qkv")] == torch.float32
    assert set(dtypes.values()) == {torch.float16, torch.float32}


@in_half
def test_the_digest_is_of_values_whatever_their_precision(half: torch.dtype, tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "pipeline")
    rewrite(folder / UNET, half)
    digest = load(folder).description.digest
    rewrite(folder / UNET, torch.float32)
    assert load(folder).description.digest == digest
    assert {values.dtype for values in load_file(folder / UNET).values()} == {torch.float32}


# OpenVINO's graphs.


def text_description() -> ModelDescription:
    description = description_of(small_text_network(), (4, 6, 8))
    assert isinstance(description.text, TextDescription)
    return description


def a_denoiser() -> Network:
    return denoiser(small_network(), description_of(small_network(), (3, 8, 8)))


def a_text_denoiser() -> Network:
    return denoiser(small_text_network(), text_description())


def an_encoder() -> Network:
    autoencoder = small_autoencoder("kl")
    return encoder(autoencoder, latent_description(autoencoder, (3, 4, 4)))


def a_decoder() -> Network:
    autoencoder = small_autoencoder("kl")
    return decoder(autoencoder, latent_description(autoencoder, (3, 4, 4)))


def a_text_encoder() -> Network:
    clip = CLIPText(
        CLIPTextConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    )
    fill(clip)
    return text_encoder(clip, text_description())


NETWORKS: list[Callable[[], Network]] = [a_denoiser, a_text_denoiser, an_encoder, a_decoder, a_text_encoder]
each_network = pytest.mark.parametrize(
    "build",
    [pytest.param(build, marks=pytest.mark.slow if build is a_text_denoiser else ()) for build in NETWORKS],
    ids=lambda build: build.__name__,
)


def halved(build: Callable[[], Network], half: torch.dtype) -> tuple[Network, Network]:
    """A network in half precision, and one with the same values in float32."""
    network, whole = build(), build()
    network.module.to(half)
    widen_outside(network.module)
    whole.module.load_state_dict(network.module.state_dict())
    assert {values.dtype for values in whole.module.parameters()} == {torch.float32}
    return network, whole


def backend_of(network: Network, made: Converted, precision: Precision) -> OpenVINOBackend:
    shapes = network.inputs
    return OpenVINOBackend(at_size(made.model, shapes), shapes, precision, 1, 2, lambda: 1e12, made.release)


def output(backend: OpenVINOBackend | TorchCPUBackend, network: Network, rows: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(5)
    inputs = {name: torch.randn((rows, *shape), generator=rng) for name, shape in network.inputs.items()}
    return backend.start(inputs)().clone()


def bytes_of_constants(made: Converted) -> dict[str, int]:
    """The bytes of a model's constants with fractions, by their type."""
    found: dict[str, int] = {}
    for node in made.model.get_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0).is_real():
            kind = node.get_output_element_type(0).get_type_name()
            found[kind] = found.get(kind, 0) + node.get_byte_size()
    return found


@in_half
@each_network
def test_constants_stay_half_and_are_widened_where_they_are_used(
    build: Callable[[], Network], half: torch.dtype, tmp_path: Path
) -> None:
    """In memory, in the cache, and where they are read from it."""
    network, whole = halved(build, half)
    kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[half]
    for made in (Converted(convert(network), lambda: None), converted(network, tmp_path)):
        held, as_float32 = bytes_of_constants(made), bytes_of_constants(Converted(convert(whole), lambda: None))
        assert as_float32.keys() == {"f32"}
        assert held.keys() <= {kind, "f32"}
        assert held.get("f32", 0) < 100  # numbers that are no parameters
        assert sum(held.values()) < 0.51 * as_float32["f32"] + 100
        constants = [node for node in made.model.get_ops() if node.get_type_name() == "Constant"]
        for node in constants:
            if node.get_output_element_type(0).get_type_name() == kind:
                [user] = {consumer.get_node().get_type_name() for consumer in node.output(0).get_target_inputs()}
                assert user == "Convert"
    [entry] = (tmp_path / "openvino").iterdir()
    assert (entry / WEIGHTS).stat().st_size < sum(held.values()) + 8000  # and indexes


@in_each_precision
@in_half
@each_network
def test_on_openvino_the_bits_are_those_of_float32_weights(
    build: Callable[[], Network], half: torch.dtype, precision: Precision, tmp_path: Path
) -> None:
    network, whole = halved(build, half)
    expected = output(backend_of(whole, Converted(convert(whole), lambda: None), precision), whole)
    assert expected.isfinite().all()
    assert expected.std() > 1e-3
    assert torch.equal(output(backend_of(network, converted(network, tmp_path), precision), network), expected)


@pytest.mark.slow
@in_half
def test_the_memory_that_is_asked_for_is_that_of_values_whatever_their_precision(half: torch.dtype) -> None:
    for build in NETWORKS:
        network, whole = halved(build, half)
        assert footprint.parameters(network.module) == sum(values.nbytes for values in whole.module.parameters())
        assert footprint.activations(network.module, network.inputs) == footprint.activations(
            whole.module, whole.inputs
        )
        made, of_whole = (at_size(convert(one), one.inputs) for one in (network, whole))
        assert activations(made) == pytest.approx(activations(of_whole), rel=0.1)


def test_files_of_either_precision_have_their_own_entries(tmp_path: Path) -> None:
    """The digests are equal."""
    network, whole = halved(a_denoiser, torch.float16)
    for one in (network, whole, network, whole):
        converted(one, tmp_path)
    assert len([*(tmp_path / "openvino").iterdir()]) == 2


def resident_of(file: Path) -> list[int]:
    """The resident bytes of each mapping of a file in this process."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    mappings = [part for part in parts if str(file) in part.partition("\n")[0]]
    return [1024 * int(re.findall(r"^Rss: +(\d+) kB$", part, re.MULTILINE)[0]) for part in mappings]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say")
def test_a_compiled_model_leaves_no_page_of_the_cache_resident(tmp_path: Path) -> None:
    network, _ = halved(a_text_denoiser, torch.float16)
    made = converted(network, tmp_path)
    [entry] = (tmp_path / "openvino").iterdir()
    backend = backend_of(network, made, "float32")
    assert resident_of(entry / WEIGHTS) == [0]
    backend.prepare()
    assert resident_of(entry / WEIGHTS) == [0]
    assert backend.sizes == [1, 2]  # what was released can be read again


# torch's autocast.


@in_half
@each_network
def test_narrowed_weights_have_the_bits_of_autocast_over_float32(
    build: Callable[[], Network], half: torch.dtype
) -> None:
    """To either precision that GPUs compute in, from either that files have."""
    network, whole = halved(build, half)
    rng = torch.Generator().manual_seed(5)
    inputs = [torch.randn((2, *shape), generator=rng) for shape in network.inputs.values()]
    for to in HALVES:
        narrowed = copy.deepcopy(network.module)
        narrow(narrowed, to)
        with torch.inference_mode(), torch.autocast("cpu", to):
            assert torch.equal(narrowed(*inputs), whole.module(*inputs))


@in_half
def test_linear_layers_and_convolutions_are_narrowed_and_nothing_else(half: torch.dtype) -> None:
    network, _ = halved(a_text_denoiser, half)
    narrow(network.module, torch.bfloat16)
    unet = cast(nn.Module, network.module.unet)
    for name, part in unet.named_modules():
        run = isinstance(part, nn.Linear | nn.Conv2d) and not name.startswith("time_embedding")
        for values in part.parameters(recurse=False):
            assert values.dtype == (torch.bfloat16 if run else torch.float32)
    narrow(network.module, torch.float32)
    assert {values.dtype for values in network.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@in_half
@each_network
def test_on_torch_the_bits_are_those_of_float32_weights(
    build: Callable[[], Network], half: torch.dtype, precision: Precision
) -> None:
    network, whole = halved(build, half)
    ours, theirs = (TorchCPUBackend(one.module, one.inputs, precision, 2) for one in (network, whole))
    assert torch.equal(output(ours, network), output(theirs, whole))
    assert sum(values.nbytes for values in network.module.parameters()) == sum(
        values.nbytes for values in whole.module.parameters()
    )
