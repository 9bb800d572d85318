"""Networks on OpenVINO: outputs equal torch's, and a row's bits do not depend on other rows."""

import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from random import Random
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor, nn

from model.backends import openvino
from model.backends.backend import Inputs, Precision
from model.backends.conversion import at_size, convert
from model.backends.network import denoiser
from model.backends.openvino import OpenVINOBackend, computes_bfloat16
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D, UNet2DConfig
from tests.networks import fill
from tests.servers import PATIENCE, ROOT, START

# pytest runs these tests with this module's fixture `alone`, so on OpenVINO.
from tests.test_runner import (  # noqa: F401
    SHAPE,
    WIDTH,
    Alone,
    test_a_slot_released_at_any_time_is_as_new,
    test_branches_of_a_guided_row_may_come_in_any_order,
    test_rows_of_a_crowd_have_their_own_bytes_at_every_step,
    test_twins_are_equal_and_other_seeds_are_not,
)
from tests.trajectories import Model, description_of, inputs_of, shapes_of, small_network, small_text_network

MAX_BATCH = 6


class Converted(NamedTuple):
    """A converted network, and the one that it was made from."""

    model: Any
    network: Model


def converted(network: Model, image_shape: tuple[int, int, int]) -> Converted:
    declared = denoiser(cast(DiffusionUNet, network), description_of(network, image_shape))
    return Converted(convert(declared), network)


def backend_of(
    converted: Converted,
    image_shape: tuple[int, int, int] = SHAPE,
    precision: Precision = "float32",
    threads: int = 1,
    max_batch: int = MAX_BATCH,
    free_memory: Callable[[], float] = lambda: math.inf,
) -> OpenVINOBackend:
    shapes = shapes_of(converted.network, image_shape)
    return OpenVINOBackend(at_size(converted.model, shapes), shapes, precision, threads, max_batch, free_memory)


def no_memory() -> float:
    """Memory only for size 1."""
    return 0.0


def inputs(
    rows: int, network: Model | None = None, image_shape: tuple[int, int, int] = SHAPE, last: int = 999
) -> dict[str, Tensor]:
    """Images, each with its own timestep and label for small_network()."""
    x = torch.randn((rows, *image_shape), generator=torch.Generator().manual_seed(3))
    timesteps = torch.linspace(0, last, rows).long()
    return inputs_of(small_network() if network is None else network, x, timesteps, torch.arange(rows) % 6)


def some(given: Inputs, which: list[int]) -> dict[str, Tensor]:
    """These rows of a pass."""
    return {name: values[which] for name, values in given.items()}


def run(backend: OpenVINOBackend, given: Inputs) -> Tensor:
    """A copy of a pass's output."""
    return backend.start(given)().clone()


def rows_alone(backend: OpenVINOBackend, given: Inputs) -> Tensor:
    return torch.cat([run(backend, some(given, [i])) for i in range(len(given["x"]))])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def small() -> Converted:
    return converted(small_network(), SHAPE)


@pytest.fixture(scope="module")
def tiny() -> Converted:
    """A converted network that compiles very fast, for tests that do not compare bits."""
    network = DiffusionUNet(3, 4, (1,), num_classes=5)
    fill(network)
    return converted(network, SHAPE)


@pytest.fixture(
    scope="module",
    params=[
        "float32",
        pytest.param(
            "bfloat16", marks=pytest.mark.skipif(not computes_bfloat16(), reason="no instructions for bfloat16")
        ),
    ],
)
def precision(request: pytest.FixtureRequest) -> Precision:
    return cast(Precision, request.param)


# Outputs.


def unet(image_channels: int, model_channels: int, multipliers: tuple[int, ...], **extras: Any) -> Callable[[], Model]:
    return lambda: DiffusionUNet(image_channels, model_channels, multipliers, **extras)


def with_text(**fields: Any) -> Callable[[], Model]:
    return lambda: small_text_network(**fields)


def unet_2d(**fields: Any) -> Callable[[], Model]:
    """A small network with changed fields. Each kind of layer has another number of channels."""
    small = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return lambda: UNet2D(UNet2DConfig(**{**small, **fields}))


FOURIER = unet_2d(
    time_embedding_type="fourier",
    time_embedding_dim=11,
    num_class_embeds=4,
    block_out_channels=(8,),
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
)

# By name: the network, its sample shape, the first and last timestep, and the number of labels.
NETWORKS: dict[str, tuple[Callable[[], Model], tuple[int, int, int], int, int, int]] = {
    "bare": (unet(1, 4, (1, 2)), (1, 8, 12), 0, 999, 1),
    "every extra": (small_network, (3, 12, 8), 0, 999, 6),
    "attention at two of three levels": (
        unet(2, 6, (2, 1, 3), norm_groups=3, attention_levels=(0, 2), input_skip=True),
        (2, 8, 16),
        0,
        999,
        1,
    ),
    "2d: first DDPMs": (
        unet_2d(
            in_channels=1,
            out_channels=1,
            flip_sin_to_cos=False,
            freq_shift=1,
            downsample_padding=0,
            attention_head_dim=None,
            norm_eps=1e-2,
            num_class_embeds=4,
        ),
        (1, 4, 10),
        0,
        999,
        4,
    ),
    "2d: fourier, one level": (FOURIER, (3, 5, 7), 1, 999, 4),
    "2d: learned, odd widths, no middle, labels as timesteps": (
        unet_2d(
            time_embedding_type="learned",
            num_train_timesteps=40,
            block_out_channels=(9, 15),
            norm_num_groups=3,
            mid_block_type=None,
            act_fn="relu",
            class_embed_type="timestep",
        ),
        (3, 8, 8),
        0,
        39,
        40,
    ),
    "2d: ADM": (
        unet_2d(
            out_channels=6,
            resnet_time_scale_shift="scale_shift",
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=8,
            attn_norm_num_groups=4,
            num_class_embeds=10,
        ),
        (3, 8, 8),
        0,
        999,
        10,
    ),
    "2d: heads by count, labels as timesteps": (
        unet_2d(
            num_attention_heads=2,
            resnet_time_scale_shift="scale_shift",
            time_proj_dim=7,
            act_fn="gelu",
            class_embed_type="timestep",
            attention_head_dim=3,
        ),
        (3, 8, 8),
        0,
        999,
        200,
    ),
    "2d: label vectors, centred, three levels, heads that leave channels over, scaled middle without attention": (
        unet_2d(
            class_embed_type="identity",
            center_input_sample=True,
            mid_block_scale_factor=2.5,
            add_attention=False,
            act_fn="mish",
            time_embedding_dim=13,
            block_out_channels=(8, 4, 12),
            attention_head_dim=3,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
            up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        ),
        (3, 8, 8),
        0,
        999,
        1,
    ),
    "text: odd sizes, three levels, padding 0, labels, heads that leave channels over, no self-attention": (
        with_text(
            block_out_channels=(8, 12, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
            downsample_padding=0,
            attention_head_dim=(3, 5, 3),
            only_cross_attention=(True, False, True),
            num_class_embeds=4,
        ),
        (4, 9, 13),
        0,
        999,
        4,
    ),
    "text: linear projections, no middle, a second activation, deep transformers": (
        with_text(
            use_linear_projection=True,
            mid_block_type=None,
            time_embedding_act_fn="gelu",
            act_fn="mish",
            transformer_layers_per_block=(2, 1),
        ),
        (4, 6, 4),
        0,
        999,
        1,
    ),
    "text: as SSD-1B": (
        with_text(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            transformer_layers_per_block=(1, (2, 2)),
            reverse_transformer_layers_per_block=((1, 3), 1),
        ),
        (4, 8, 8),
        0,
        999,
        1,
    ),
}


QUICK = ("bare", "every extra", "2d: fourier, one level", "2d: ADM", "text: as SSD-1B")  # the others vary these


@pytest.mark.parametrize(
    ("build", "image_shape", "first", "last", "labels"),
    [
        pytest.param(*network, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, network in NETWORKS.items()
    ],
)
def test_computes_what_torch_computes(
    build: Callable[[], Model], image_shape: tuple[int, int, int], first: int, last: int, labels: int
) -> None:
    """Alone and in several pieces, at both ends of the schedule. The model has no GroupNorm left."""
    network = build()
    fill(network)
    made = converted(network, image_shape)
    model = at_size(made.model, shapes_of(network, image_shape))
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert "GroupNormalization" not in kinds
    norms = nn.GroupNorm | nn.LayerNorm
    assert kinds.count("MVN") == sum(isinstance(module, norms) for module in network.modules())

    x = torch.randn((3, *image_shape), generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([first, last, (first + last) // 2])
    told = torch.tensor([labels - 1, 0, min(1, labels - 1)])
    with torch.inference_mode():
        given = inputs_of(network, x, timesteps, told)
        context = [given["context"]] if "context" in given else []
        expected = network(x, timesteps, *context, told)
    divisor = timesteps.view(-1, 1, 1, 1) if network.embedder.divides_output else 1
    backend = backend_of(made, image_shape)
    for out in (run(backend, given) / divisor, rows_alone(backend, given) / divisor):
        assert out.dtype == torch.float32
        assert out.shape == expected.shape
        assert expected.isfinite().all()
        for image, image_expected in zip(out, expected, strict=True):
            assert (image - image_expected).abs().max() <= 1e-5 * image_expected.abs().max()
    assert backend.sizes == [1, 2]  # also for a network that is NaN at timestep 0


@pytest.mark.skipif(not computes_bfloat16(), reason="no instructions for bfloat16")
def test_bfloat16_tells_neighbouring_timesteps_apart() -> None:
    """bfloat16 does not represent 999. Computed in bfloat16, late timesteps had the embeddings of other timesteps."""
    network = DiffusionUNet(3, 16, (1,), norm_groups=4)
    fill(network)
    made = converted(network, SHAPE)
    exact, rough = backend_of(made), backend_of(made, precision="bfloat16")
    x = inputs(1)["x"]

    def error(timestep: int) -> float:
        given = inputs_of(network, x, torch.tensor([timestep]), torch.tensor([0]))
        expected = run(exact, given)
        return float((run(rough, given) - expected).abs().max() / expected.abs().max())

    early = [error(t) for t in (0, 1, 100, 200, 255)]
    assert 1e-4 < max(early) < 0.02  # bfloat16 was used, and nothing less precise
    for t in (501, 997, 998, 999):
        assert error(t) < 2 * max(early)


# Bits.


def test_a_row_has_the_same_bits_in_every_pass(small: Converted, precision: Precision) -> None:
    """Any number of rows, position and neighbours; with and without memory for sizes; whole and in halves."""
    given = inputs(2 * MAX_BATCH)
    random = Random(0)
    ones = backend_of(small, precision=precision, free_memory=no_memory)
    alone = rows_alone(ones, given)
    assert all((alone[i] - alone[k]).abs().max() > 1e-3 for i in range(len(alone)) for k in range(i))  # all rows differ
    halved = backend_of(small, precision=precision, threads=2)
    for backend, sizes in ((ones, [1]), (backend_of(small, precision=precision), [1, 2, 4]), (halved, [1, 2, 4])):
        assert list(backend.widths) == list(range(1, MAX_BATCH + 1))
        assert backend.reproducible
        for rows in range(1, MAX_BATCH + 1):
            for _ in range(3):
                chosen = random.sample(range(2 * MAX_BATCH), rows)
                assert torch.equal(run(backend, some(given, chosen)), alone[chosen])
        assert backend.sizes == sizes


@pytest.mark.slow
def test_a_row_with_text_has_the_same_bits_in_every_pass(precision: Precision) -> None:
    """Its neighbours have other contexts."""
    network, shape = small_text_network(), (4, 6, 8)
    given = inputs(4, network, shape)
    backend = backend_of(converted(network, shape), shape, precision, threads=2)
    alone = rows_alone(backend, given)
    swapped = run(backend, {**given, "context": given["context"].roll(1, 0)})
    assert all((alone[i] - swapped[i]).abs().max() > 1e-3 for i in range(4))  # a context changes its row
    for which in ([0, 1], [3, 2], [0, 1, 2, 3], [2, 0, 3], [1, 1, 1, 0]):
        assert torch.equal(run(backend, some(given, which)), alone[which])
    assert backend.sizes == [1, 2, 4]


def test_no_bit_depends_on_the_number_of_threads(precision: Precision) -> None:
    """For a GroupNorm over so many values, OpenVINO would split the sums over threads."""
    shape = (3, 32, 32)
    network = DiffusionUNet(3, 16, (1,), norm_groups=1)
    fill(network)
    made = converted(network, shape)
    given = inputs(3, network, shape)
    one, two = (backend_of(made, shape, precision, threads) for threads in (1, 2))
    assert torch.equal(rows_alone(one, given), rows_alone(two, given))
    assert torch.equal(run(one, given), run(two, given))
    assert one.sizes == two.sizes == [1, 2]


@pytest.fixture(scope="module")
def alone(small: Converted, precision: Precision) -> Alone:
    """Single rows run in pieces of size 1, full passes in pieces of all sizes, each in halves."""
    ones = backend_of(small, precision=precision, max_batch=WIDTH, free_memory=no_memory)
    return Alone(ones, crowds=backend_of(small, precision=precision, threads=2, max_batch=WIDTH))


# Sizes.


def test_each_size_is_compiled_once_when_a_pass_first_has_so_many_rows(tiny: Converted) -> None:
    compiled: list[None] = []

    def asked() -> float:  # called before each compilation except size 1's
        compiled.append(None)
        return math.inf

    backend = backend_of(tiny, free_memory=asked)
    assert backend.sizes == [1]
    for rows, sizes in ((1, [1]), (3, [1, 2]), (2, [1, 2]), (5, [1, 2, 4]), (4, [1, 2, 4]), (6, [1, 2, 4])):
        run(backend, inputs(rows, tiny.network))
        assert backend.sizes == sizes
        assert len(compiled) == len(sizes) - 1


def test_a_prepared_backend_has_all_sizes_and_no_pass_compiles(tiny: Converted) -> None:
    """A pass that compiled would take seconds, which no promise counts. The warm-up may leave out any width."""
    compiled: list[None] = []

    def asked() -> float:
        compiled.append(None)
        return math.inf

    backend = backend_of(tiny, free_memory=asked)
    backend.prepare()
    assert backend.sizes == [1, 2, 4]
    for rows in range(1, MAX_BATCH + 1):
        run(backend, inputs(rows, tiny.network))
    assert len(compiled) == 2


def test_inputs_are_taken_as_they_are_laid_out(tiny: Converted) -> None:
    backend = backend_of(tiny)
    given = inputs(3, tiny.network)
    expected = rows_alone(backend, given)
    odd = {
        "x": given["x"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "emb": given["emb"].T.contiguous().T,
    }
    assert not any(values.is_contiguous() for values in odd.values())
    assert torch.equal(run(backend, odd), expected)


def test_where_memory_is_short_pieces_are_smaller(
    tiny: Converted, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A size needs the weights' memory plus, for each row, what size 1 took beyond that. Half of memory stays free."""
    held: Iterator[int] = iter([0, 10**9])  # much more than the weights
    monkeypatch.setattr(openvino, "resident", lambda: next(held))
    free = {2: 4.01e9, 4: 7.9e9}
    sizes = iter(free)
    backend = backend_of(tiny, free_memory=lambda: free[next(sizes)])
    given = inputs(6, tiny.network)
    expected = rows_alone(backend, given)
    run(backend, some(given, [0, 1]))
    for _ in range(2):
        assert torch.equal(run(backend, given), expected)
    assert backend.sizes == [1, 2]
    assert warnings(caplog) == ["there is no memory to compile passes of 4 rows; they run in smaller pieces"]


class MixesRows(DiffusionUNet):
    """Rows depend on each other, as with batch norm in training."""

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        out = super().denoise(x, emb)
        return out + out.mean(dim=0, keepdim=True)


class AtMostTwo(DiffusionUNet):
    """Fails at 4 rows, which do not broadcast with 2."""

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        out = super().denoise(x, emb)
        return (out * torch.ones(2, 1, 1, 1))[: x.shape[0]]


def check_falls_back(kind: type[DiffusionUNet], sizes: list[int]) -> None:
    network = kind(3, 4, (1,))
    fill(network)
    backend = backend_of(converted(network, SHAPE))
    given = inputs(4, network)
    expected = rows_alone(backend, given)
    for _ in range(2):
        assert torch.equal(run(backend, given), expected)
    assert backend.sizes == sizes


def test_a_size_with_other_bits_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    check_falls_back(MixesRows, [1])
    assert warnings(caplog) == [
        f"passes of {size} rows have other bits than those of one; they run in smaller pieces" for size in (4, 2)
    ]


def test_a_size_that_cannot_be_compiled_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    check_falls_back(AtMostTwo, [1, 2])
    assert warnings(caplog) == ["passes of 4 rows could not be compiled; they run in smaller pieces"]
    assert caplog.records[-1].exc_info


def test_memory_that_cannot_be_told_is_logged(tiny: Converted, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> float:
        raise ValueError("no number")

    backend = backend_of(tiny, free_memory=broken)
    given = inputs(2, tiny.network)
    assert torch.equal(run(backend, given), rows_alone(backend, given))
    assert len(warnings(caplog)) == 1
    assert backend.sizes == [1]


@pytest.mark.parametrize("max_batch", [1, 3, 6])
def test_more_rows_than_a_pass_may_have_are_refused(tiny: Converted, max_batch: int) -> None:
    backend = backend_of(tiny, max_batch=max_batch)
    assert list(backend.widths) == list(range(1, max_batch + 1))
    with pytest.raises(ValueError, match=f"{max_batch + 1} rows do not fit a pass of {max_batch}"):
        backend.start(inputs(max_batch + 1, tiny.network))
    assert run(backend, inputs(max_batch, tiny.network)).shape == (max_batch, *SHAPE)


# Fingerprint and telemetry.


def test_fingerprint_names_what_moves_bits(tiny: Converted) -> None:
    first = backend_of(tiny).fingerprint
    assert first.keys() == {"backend", "backend_version", "precision", "processor", "threads"}
    assert first["backend"] == "openvino"
    assert first["precision"] == "float32"
    assert backend_of(tiny, max_batch=2).fingerprint == first  # max_batch changes no bit
    assert backend_of(tiny, precision="bfloat16").fingerprint == first | {"precision": "bfloat16"}


@pytest.mark.slow
@pytest.mark.slow
def test_no_usage_statistics_are_sent() -> None:
    """OpenVINO's import and its convert_model send statistics with this package, so it must not be importable.

    This holds whichever of our modules is imported first.
    """
    assert find_spec("openvino.tools.ovc"), "there is nothing to be kept from sending"
    conversion = """
import sys, torch
from model.backends.conversion import at_size, convert
from model.backends.network import denoiser
from model.backends.openvino import OpenVINOBackend
from model.nets.unet import DiffusionUNet
from tests.trajectories import description_of
network = DiffusionUNet(3, 4, (1,))
model = convert(denoiser(network, description_of(network, (3, 8, 8))))
shapes = {"x": (3, 8, 8), "emb": (16,)}
OpenVINOBackend(at_size(model, shapes), shapes, "float32", 1, 1, lambda: 0)
assert "openvino.tools.ovc" in sys.modules, "it is no longer by this module; look for where it is"
sys.exit(any(module and name.startswith("openvino_telemetry") for name, module in sys.modules.items()))
"""
    backend = "import model.backends.openvino, sys; sys.exit(sys.modules['openvino_telemetry'] is not None)"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for code in (conversion, backend)]
    assert [process.wait(PATIENCE) for process in processes] == [0, 0]


@pytest.mark.slow
def test_a_signal_finds_its_stack_after_a_backend_ends_on_another_thread() -> None:
    """OpenVINO's plugin owns the main thread's stack for signals. In a process that lost it, SIGUSR1 would end all."""
    code = """
import gc, signal, threading
from tests.test_openvino import SHAPE, backend_of, converted, small_network


held = [backend_of(converted(small_network(), SHAPE))]
def end():
    held.clear()
    gc.collect()
thread = threading.Thread(target=end)
thread.start()
thread.join()
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
signal.raise_signal(signal.SIGUSR1)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=START)
    assert (ran.returncode, ran.stdout) == (0, "heard\n"), ran.stderr
