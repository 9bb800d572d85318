"""The CUDA backend, and the runner's use of a device.

Without a GPU, torch's meta device replaces it. Its tensors have no values, so code that would wait for values raises,
and copies between it and the CPU are recorded. Fake tensors replace those of cuda:0; there, operations that mix devices
raise.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.backends import cuda
from model.backends.backend import Inputs, Precision, is_batch_invariant
from model.backends.cuda import CudaBackend, CudaPrecision, candidate_widths, cheapest_width
from model.backends.network import Shapes
from model.lines import Column
from model.nets.autoencoder import Autoencoder
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D, UNet2DConfig
from model.rows import Forward, Moments, Reading, Row, Source
from model.runner import SlotRunner
from model.samplers import denoise_table, sample_table
from model.schedule import Schedule
from model.update import remembered, update
from model.vae import choose_vae
from tests.autoencoders import Kind, latent_description, random_images, small_autoencoder
from tests.trajectories import (
    CPU,
    Told,
    forwards,
    inputs_of,
    labelled,
    network_of,
    runner_on,
    shapes_of,
    small_network,
    small_text_network,
    torch_backend,
    trajectory,
)

SHAPE = (3, 8, 8)
SHAPES = {"x": SHAPE, "emb": (64,)}  # of small_network()
META = torch.device("meta")

V = Schedule(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
THRESHOLDED = Schedule(thresholding=True, sample_max_value=2.0)
LEARNED = Schedule(variance_type="learned_range")
START = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
ROWS = {
    "plain": labelled(sample_table(V, "ddim", 3), seed=0, label=1),
    "noisy": labelled(sample_table(Schedule(), "ddpm", 3), seed=1),
    "guided": labelled(sample_table(V, "dpmpp_2m", 3), seed=2, label=2, guidance_scale=2.0),
    "guided and noisy": labelled(sample_table(V, "ddim", 3, eta=1.0), seed=3, guidance_scale=1.5),
    "thresholded": labelled(sample_table(THRESHOLDED, "ddpm", 3), seed=4, label=3),
    "from a start": labelled(denoise_table(V, "ddpm", 400, 3), seed=5, start=START, label=2),
    "with a mask": labelled(
        sample_table(V, "dpmpp_2m", 4, begin=1), seed=7, source=Source(Moments(START, START), START[0, ::-1] > 0)
    ),
    "the prediction": labelled(
        denoise_table(V, "ddim", 999, 1), seed=6, guidance_scale=5.0, label=0, model_output=True
    ),
}
with_variance = pytest.mark.parametrize("out_channels", [3, 6], ids=["fixed variance", "learned variance"])


class Moves(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records copies between the CPU and the device, by operation, and lets the runner read images."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.to_device: list[str] = []
        self.to_cpu: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = devices((args, kwargs))
        to = kwargs.get("device")
        if given == {"meta"} and to is not None and torch.device(to).type == "cpu":
            self.to_cpu.append(str(func))
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        out = func(*args, **kwargs)
        if given | devices(out) == {"cpu", "meta"}:
            self.to_device.append(str(func))
        return out


def devices(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


class MetaBackend:
    """A device without values that records its inputs. Implements model.backends.backend.Backend."""

    widths = (16,)
    device = META
    fingerprint: dict[str, str | int] = {}  # noqa: RUF012
    reproducible = True

    def __init__(self, out_channels: int) -> None:
        self.out_channels = out_channels
        self.sent = 0
        self.passes: list[Inputs] = []

    def prepare(self) -> None:
        """Nothing is to be compiled."""

    def send(self, values: Tensor) -> Tensor:
        assert values.device == CPU
        assert values.is_contiguous()  # needs only one plain copy
        self.sent += 1
        return values.to(self.device, non_blocking=True)

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        self.passes.append(inputs)
        return lambda: torch.empty((len(inputs["x"]), self.out_channels, *SHAPE[1:]), device=self.device)


def meta_runner(out_channels: int, model: DiffusionUNet | UNet2D | None = None) -> tuple[SlotRunner, MetaBackend]:
    backend = MetaBackend(out_channels)
    return runner_on(backend, SHAPE, 2, (small_network() if model is None else model).to(META)), backend


# The meta device.


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
    ],
)
def test_waiting_for_the_device_raises(wait: Callable[[Tensor], object]) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        wait(torch.zeros(2, device=META))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.tensor(1.0),
        lambda x: x[0].copy_(torch.zeros(3)),
        lambda x: torch.zeros(3).to(META),
    ],
)
def test_moves_to_the_device_are_seen(move: Callable[[Tensor], object]) -> None:
    x = torch.zeros((2, 3), device=META)
    with Moves() as moves:
        move(x)
    assert len(moves.to_device) == 1


def test_other_work_moves_nothing() -> None:
    x = torch.zeros((2, 3), device=META)
    with Moves() as moves:
        x[0] = 0
        x[1] = 2 * x[0].clamp(min=1.0) + 3
        torch.ones(3).sum()
    assert moves.to_device == moves.to_cpu == []


# The runner.


@with_variance
@pytest.mark.parametrize("names", [*([name] for name in ROWS), list(ROWS)], ids=lambda names: " + ".join(names))
def test_a_step_brings_the_device_what_is_sent_and_asks_it_nothing(names: list[str], out_channels: int) -> None:
    """Also if there are more rows than slots."""
    runner, backend = meta_runner(out_channels)
    rows = [row_of(name, out_channels) for name in names]
    with Moves() as moves:
        slots = [runner.admit(row) for row in rows]
        for step in range(max(len(row.table) for row in rows)):
            going = [(row, slot) for row, slot in zip(rows, slots, strict=True) if step < len(row.table)]
            runner.step([forward for row, slot in going for forward in forwards(row, slot, step)])
    assert moves.to_cpu == []
    assert len(moves.to_device) == backend.sent, moves.to_device


class FakeBackend(MetaBackend):
    """cuda:0 under FakeTensorMode, which does not copy tensors that were made from lists."""

    device = torch.device("cuda:0")

    def send(self, values: Tensor) -> Tensor:
        assert values.device == CPU
        return torch.empty(values.shape, dtype=values.dtype, device=self.device)


@with_variance
def test_a_runner_on_cuda_0(out_channels: int) -> None:
    rows = [row_of(name, out_channels) for name in ROWS]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        backend = FakeBackend(out_channels)
        runner = runner_on(backend, SHAPE, 2, Told())
        slots = [runner.admit(row) for row in rows]
        for step in range(max(len(row.table) for row in rows)):
            going = [(row, slot) for row, slot in zip(rows, slots, strict=True) if step < len(row.table)]
            runner.step([forward for row, slot in going for forward in forwards(row, slot, step)])
        with pytest.raises(RuntimeError, match="device"):
            torch.zeros(2, device=backend.device) + torch.zeros(2)
    assert len(backend.passes) == 3
    for inputs in backend.passes:
        assert {tensor.device for tensor in inputs.values()} == {backend.device}
        assert {tensor.dtype for tensor in inputs.values()} == {torch.float32}
        assert inputs["x"].is_contiguous()
        assert mode is inputs["x"].fake_mode  # type: ignore[attr-defined]


@with_variance
def test_an_update_on_cuda_0(out_channels: int) -> None:
    with FakeTensorMode():
        x, noise, *memories = (torch.empty((2, *SHAPE), device="cuda:0") for _ in range(5))
        out = torch.empty((2, out_channels, *SHAPE[1:]), device="cuda:0")
        lines = torch.empty((2, len(Column)), device="cuda:0")
        x_next, x0 = update(x, out, memories, noise, lines, thresholded=[1])
        for image in (x_next, x0, remembered(x, x0, out, lines)):
            assert image.device == torch.device("cuda:0")
            assert image.dtype == torch.float32
            assert image.is_contiguous()


def row_of(name: str, out_channels: int) -> Row:
    """One of ROWS. With a learned variance, the noisy row uses it."""
    if name == "noisy" and out_channels == 6:
        return labelled(sample_table(LEARNED, "ddpm", 3), seed=1)
    return ROWS[name]


@with_variance
def test_what_reaches_a_pass(out_channels: int) -> None:
    runner, backend = meta_runner(out_channels)
    slots = [runner.admit(row) for row in ROWS.values()]
    runner.step([f for row, slot in zip(ROWS.values(), slots, strict=True) for f in forwards(row, slot, 0)])
    [inputs] = backend.passes
    assert inputs["x"].shape == (len(ROWS) + 3, *SHAPE)  # three rows are guided
    assert inputs["emb"].shape == (len(ROWS) + 3, 64)
    assert len(inputs) == 2
    for tensor in inputs.values():
        assert (tensor.device, tensor.dtype) == (META, torch.float32)
        assert tensor.is_contiguous()


def test_a_branch_that_waits_for_the_other_sends_little() -> None:
    """The inputs of an update are sent only when the row takes its step."""
    runner, backend = meta_runner(3)
    slot = runner.admit(ROWS["guided"])
    sent = []
    for branch in (0, 1):
        before = backend.sent
        runner.step([Forward(slot, branch, 0)])
        sent.append(backend.sent - before)
    assert sent[0] < sent[1]


@with_variance
def test_only_reading_fetches(out_channels: int) -> None:
    runner, backend = meta_runner(out_channels)
    slots = {name: runner.admit(ROWS[name]) for name in ("plain", "the prediction")}
    runner.step([f for name, slot in slots.items() for f in forwards(ROWS[name], slot, 0)])
    sent = backend.sent
    for name, slot in slots.items():
        with Moves() as moves:
            reading = runner.read(slot)
        assert len(moves.to_cpu) == 2, moves.to_cpu  # x and x0
        assert moves.to_device == []
        channels = out_channels if name == "the prediction" else SHAPE[0]
        assert reading.x.shape == (channels, *SHAPE[1:])
        assert reading.x0.shape == SHAPE
        runner.release(slot)
    assert backend.sent == sent


@pytest.mark.parametrize("encoding", ["fourier", "learned"])
def test_embeddings_and_the_division_by_a_timestep_stay_on_the_device(encoding: str) -> None:
    unet = small_unet2d(time_embedding_type=encoding, num_train_timesteps=1000, num_class_embeds=6)
    runner, backend = meta_runner(3, unet)
    row = ROWS["guided"]
    with Moves() as moves:
        slot = runner.admit(row)
        for line in range(len(row.table)):
            runner.step(forwards(row, slot, line))
    assert moves.to_cpu == []
    assert len(moves.to_device) == backend.sent
    assert {tensor.device for inputs in backend.passes for tensor in inputs.values()} == {META}


def test_an_embedding_is_sent_once() -> None:
    """A second row at the same timesteps sends no more than its own state."""
    runner, backend = meta_runner(3)
    sent = []
    for _ in range(2):
        before = backend.sent
        slot = runner.admit(ROWS["plain"])
        for line in range(3):
            runner.step([Forward(slot, 0, line)])
        sent.append(backend.sent - before)
    assert sent[0] - sent[1] == 3 + 1  # three timesteps and a label


@with_variance
def test_an_update_stays_on_the_device(out_channels: int) -> None:
    """Also with a quantile, whose check in torch would wait on the CPU."""
    x, noise, *memories = (torch.empty((2, *SHAPE), device=META) for _ in range(5))
    out = torch.empty((2, out_channels, *SHAPE[1:]), device=META)
    lines = torch.empty((2, len(Column)), device=META)
    with Moves() as moves:
        x_next, x0 = update(x, out, memories, noise, lines, thresholded=[0, 1])
        memory = remembered(x, x0, out, lines)
    assert moves.to_cpu == moves.to_device == []
    for image in (x_next, x0, memory):
        assert image.device == META
        assert image.dtype == torch.float32
        assert image.shape == x.shape
        assert image.is_contiguous()


# Networks.


def small_unet2d(**config: Any) -> UNet2D:
    return UNet2D(
        UNet2DConfig(
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            **config,
        )
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DiffusionUNet": small_network,
    "UNet2D": small_unet2d,
    "UNet2D, learned variance": lambda: small_unet2d(out_channels=6),
    "UNet2D, fourier": lambda: small_unet2d(time_embedding_type="fourier"),
    "UNet2D, learned encoding": lambda: small_unet2d(time_embedding_type="learned", num_train_timesteps=1000),
    "UNet2D, by ResnetBlocks": lambda: small_unet2d(downsample_type="resnet", resnet_time_scale_shift="scale_shift"),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_networks_pass_stays_on_the_device(name: str, dtype: torch.dtype) -> None:
    """Otherwise no graph can be captured. The meta device has no autocast, so here the parameters are bfloat16."""
    network = NETWORKS[name]().to(device=META, dtype=dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    x = torch.empty((4, *SHAPE), dtype=dtype, device=META).contiguous(memory_format=torch.channels_last)
    numbers = torch.empty(4, dtype=torch.int64, device=META)
    with torch.inference_mode(), Moves() as moves:
        out = network(x, numbers, numbers)
    assert moves.to_cpu == moves.to_device == []
    assert out.device == META
    assert out.shape == (4, 6 if "variance" in name else 3, *SHAPE[1:])
    assert out.dtype == dtype


@pytest.mark.parametrize("kind", get_args(Kind))
def test_an_autoencoders_passes_stay_on_the_device(kind: Kind) -> None:
    """Also in the search for codes. It is not in a graph, and would block its thread."""
    autoencoder = small_autoencoder(kind).to(device=META, memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.empty((4, *SHAPE), device=META)
    with torch.inference_mode(), Moves() as moves:
        latents = autoencoder.encode(image)
        decoded = autoencoder.decode(latents)
    assert moves.to_cpu == moves.to_device == []
    assert latents.device == decoded.device == META
    assert decoded.shape == image.shape


def test_a_pass_with_text_stays_on_the_device() -> None:
    """In a graph, nothing may wait for values. The size is odd, so the way up looks at the sizes of the way down."""
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 27}  # 3 of the pooled text
    network = small_text_network(
        encoder_hid_dim=7, num_class_embeds=4, time_cond_proj_dim=6, addition_embed_type="text_time", **sizes
    ).to(device=META)
    embedder = network.embedder
    assert embedder.of_text is not None
    assert embedder.of_added is not None
    with torch.inference_mode(), Moves() as moves:
        context = embedder.of_text(torch.empty((2, 5, 7), device=META))
        t, w = torch.empty((2, 2), device=META)
        added = embedder.of_added(torch.empty((2, 3), device=META), torch.empty((2, 6), device=META))
        emb = embedder.of(t, torch.empty(2, device=META, dtype=torch.int64), w) + added
        out = network.denoise(torch.empty((2, 4, 9, 13), device=META), emb, context)
    assert moves.to_cpu == moves.to_device == []
    assert out.shape == (2, 4, 9, 13)


# Widths, with passes that are not graphs.


class EagerGraph(cuda._Graph):
    """A graph whose replay runs the network on the CPU."""

    def __init__(self, network: nn.Module, width: int, shapes: Shapes = SHAPES) -> None:
        with torch.inference_mode():
            self._inputs = {name: torch.zeros((width, *shape)) for name, shape in shapes.items()}
            self._network = network
            self.replay()

    def replay(self) -> None:
        self._out = self._network(*self._inputs.values())


class EagerBackend(CudaBackend):
    """A backend whose passes take the time that a test says.

    Args:
        seconds: of a pass of this width.
    """

    def __init__(self, network: nn.Module, max_batch: int, seconds: Callable[[int], float] = lambda width: 1.0) -> None:
        self._of_width = seconds
        super().__init__(network, SHAPES, CPU, "float32", max_batch)

    def _capture(self, width: int) -> EagerGraph:
        return EagerGraph(self._network, width)

    def _seconds(self, graph: cuda._Graph) -> float:
        return self._of_width(len(graph._inputs["x"]))


class ByWidth(nn.Module):
    """A network that does not fit at some widths, and records the widths at which it ran."""

    def __init__(self, too_large: Sequence[int] = ()) -> None:
        super().__init__()
        self.too_large = too_large
        self.ran: list[int] = []

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        width = len(x)
        self.ran.append(width)
        if width in self.too_large:
            raise torch.OutOfMemoryError(f"no memory for {width} rows")
        return x * 1.25


class MixesRows(nn.Module):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


def test_rows_that_are_not_kept_apart_are_noticed() -> None:
    backend = EagerBackend(MixesRows(), 4)
    assert backend.widths == [4]
    assert not backend.reproducible


def test_a_leak_of_contexts_between_rows_is_noticed() -> None:
    """Rows with equal contexts would not show such a leak."""
    shapes = {"x": (3, 4, 4), "emb": (8,), "context": (5, 6)}

    def leaking(given: Inputs) -> Tensor:
        return given["x"] + given["context"].mean()

    def apart(given: Inputs) -> Tensor:
        return given["x"] + given["context"].mean(dim=(1, 2)).view(-1, 1, 1, 1)

    assert is_batch_invariant(apart, apart, 4, shapes, CPU)
    assert not is_batch_invariant(leaking, leaking, 4, shapes, CPU)

    def with_equal_contexts(given: Inputs) -> Tensor:
        return leaking({**given, "context": torch.ones_like(given["context"])})

    assert is_batch_invariant(with_equal_contexts, with_equal_contexts, 4, shapes, CPU)


def test_all_inputs_of_a_pass_are_copied() -> None:
    """Also the contexts. The rows that fill the pass up change nothing."""
    network = small_text_network()
    shapes = shapes_of(network, (4, 8, 8))
    graph = EagerGraph(network_of(network), 3, shapes)
    given = inputs_of(network, torch.randn((3, 4, 8, 8)), torch.tensor([0, 500, 999]), torch.zeros(3))
    together = graph.run(given).clone()
    for i in range(3):
        assert torch.equal(graph.run({name: values[i, None] for name, values in given.items()})[0], together[i])
    other = {**given, "context": given["context"].flip(0)}
    assert not torch.equal(graph.run(other)[0], together[0])
    assert torch.equal(graph.run(other)[1], together[1])


@pytest.mark.parametrize(
    ("max_batch", "too_large", "width", "tried"),
    [
        (1, [], 1, []),
        (2, [], 2, []),
        (12, [], 12, []),
        (24, [24], 16, [24]),
        (24, range(9, 99), 8, [16]),
        (24, range(2, 99), 1, [2]),
    ],
)
def test_what_does_not_fit_is_left_out(
    max_batch: int, too_large: Sequence[int], width: int, tried: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """All passes cost the same, so the widest that fits is best."""
    with caplog.at_level(logging.WARNING):
        backend = EagerBackend(ByWidth(too_large), max_batch)
    assert backend.widths == [width]
    assert backend.fingerprint["width"] == width
    assert backend.reproducible
    assert caplog.messages == [f"passes of {w} rows do not fit into the memory of cpu" for w in tried]


@pytest.mark.parametrize(
    ("seconds", "max_batch", "width"),
    [
        (lambda width: 1.0, 32, 32),  # a tiny network: only the launch costs
        (lambda width: 1.0 * width, 32, 2),  # a large one: each row costs the same
        (lambda width: 1.0 * width, 1, 1),
        (lambda width: 1.0 + 0.1 * width, 32, 32),  # 0.131 a row, and 0.163 at half the width
        (lambda width: 0.3 + 1.0 * width, 32, 4),  # 1.075 a row, and 1.009 at the best width
        (lambda width: max(1.0, width / 8), 32, 8),
        (lambda width: max(1.0, width / 8), 6, 6),
    ],
)
def test_the_width_is_the_narrowest_that_costs_little_more_than_the_best(
    seconds: Callable[[int], float], max_batch: int, width: int
) -> None:
    backend = EagerBackend(ByWidth(), max_batch, seconds)
    assert backend.widths == [width]
    assert backend.fingerprint["width"] == width
    rows = {"x": torch.ones((width, *SHAPE)), "emb": torch.zeros((width, 64))}
    backend._network.ran.clear()
    backend.start(rows)
    assert backend._network.ran == [width]


def test_candidates_are_powers_of_two_and_the_most() -> None:
    assert candidate_widths(32) == [2, 4, 8, 16, 32]
    assert candidate_widths(12) == [2, 4, 8, 12]
    assert candidate_widths(2) == [2]
    assert candidate_widths(1) == [1]


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-6, 1e3), min_size=1))
def test_no_narrower_width_costs_as_little(costs: dict[int, float]) -> None:
    width = cheapest_width(costs)
    best = min(seconds / rows for rows, seconds in costs.items())
    assert costs[width] / width <= 1.1 * best
    assert all(costs[narrower] / narrower > 1.1 * best for narrower in costs if narrower < width)


def test_where_not_one_row_fits_that_is_said() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 1 rows"):
        EagerBackend(ByWidth(too_large=range(99)), 8)


def test_all_passes_run_at_one_width() -> None:
    """Another width would have other kernels, and so sometimes other bits."""
    network = ByWidth()
    backend = EagerBackend(network, 12)
    network.ran.clear()
    for rows in range(1, 13):
        backend.start({"x": torch.zeros((rows, *SHAPE)), "emb": torch.zeros((rows, 64))})
    assert network.ran == 12 * [12]
    with pytest.raises(ValueError, match="13 rows do not fit a pass of 12"):
        backend.start({"x": torch.zeros((13, *SHAPE)), "emb": torch.zeros((13, 64))})


# On a GPU.


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    """The last GPU. If there are several, it is not the default of new threads."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false: there is no GPU here")
    return torch.device("cuda", torch.cuda.device_count() - 1)


WIDTH = 8


def cuda_backend(gpu: torch.device, precision: CudaPrecision, width: int) -> CudaBackend:
    """A backend of this width, whatever passes cost."""

    class Fixed(CudaBackend):
        def _seconds(self, graph: cuda._Graph) -> float:
            return 1.0  # so the widest pass is best

    return Fixed(network_of(small_network()), SHAPES, gpu, precision, width)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def backend(request: pytest.FixtureRequest, gpu: torch.device) -> CudaBackend:
    return cuda_backend(gpu, request.param, WIDTH)


def inputs(rows: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *SHAPE), generator=rng)
    return inputs_of(small_network(), x, torch.arange(rows) * 999 // rows, torch.arange(rows) % 6)


def some(rows: Inputs, which: Tensor) -> Inputs:
    """These rows of a pass."""
    return {name: values[which] for name, values in rows.items()}


def predicted(backend: CudaBackend, rows: Inputs) -> Tensor:
    return backend.start({name: backend.send(values) for name, values in rows.items()})().cpu()


@pytest.mark.cuda
def test_rows_have_the_same_bits_alone_and_in_a_crowd_at_every_place(backend: CudaBackend) -> None:
    assert backend.reproducible
    rows = inputs(WIDTH)
    order = torch.arange(WIDTH)
    alone = torch.cat([predicted(backend, some(rows, order[i, None])) for i in order])
    for width in range(1, WIDTH + 1):
        for turn in range(WIDTH):
            which = order.roll(turn)[:width]
            assert torch.equal(predicted(backend, some(rows, which)), alone[which])


@pytest.mark.cuda
def test_a_crowd_of_mixed_rows_has_the_bits_of_each_alone(backend: CudaBackend) -> None:
    network = small_network().to(backend.device)

    def runner(slots: int) -> SlotRunner:
        return runner_on(backend, SHAPE, slots, network)

    alone = {name: list(trajectory(runner(1), row)) for name, row in ROWS.items()}
    crowd = runner(len(ROWS))
    slots = {name: crowd.admit(row) for name, row in ROWS.items()}
    for step in range(3):
        pending = [
            f for name, slot in slots.items() if step < len(ROWS[name].table) for f in forwards(ROWS[name], slot, step)
        ]
        while pending:
            crowd.step(pending[:WIDTH])
            del pending[:WIDTH]
        for name, slot in slots.items():
            if step < len(ROWS[name].table):
                assert same(crowd.read(slot), alone[name][step])


def same(a: Reading, b: Reading) -> bool:
    return np.array_equal(a.x, b.x) and np.array_equal(a.x0, b.x0)


@pytest.mark.cuda
def test_predictions_are_near_those_of_the_cpu(backend: CudaBackend) -> None:
    rows = inputs(WIDTH)
    exact = torch_backend(small_network(), SHAPE, "float32", WIDTH).start(rows)()
    out = predicted(backend, rows)
    assert out.dtype == torch.float32
    error = (out - exact).abs().max() / exact.abs().max()
    if backend.fingerprint["precision"] == "float32":
        assert error < 1e-4
    else:
        assert 1e-5 < error < 0.1  # the precision was used, and nothing less precise


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_network_with_text_computes_on_the_gpu_what_it_computes_on_the_cpu(
    gpu: torch.device, precision: CudaPrecision
) -> None:
    """Alone and in a crowd, at an odd size."""
    network = small_text_network()
    shape = (4, 9, 13)
    given = inputs_of(network, torch.randn((4, *shape)), torch.tensor([0, 333, 500, 999]), torch.zeros(4))
    with torch.inference_mode():
        exact = network.denoise(**given)
    backend = CudaBackend(network_of(network), shapes_of(network, shape), gpu, precision, 4)
    alone = torch.cat([predicted(backend, some(given, torch.tensor([i]))) for i in range(4)])
    width = backend.widths[0]
    assert torch.equal(predicted(backend, some(given, torch.arange(width))), alone[:width])
    assert (alone - exact).abs().max() < (1e-4 if precision == "float32" else 0.1) * exact.abs().max()


@pytest.mark.cuda
def test_another_thread_gets_the_same_bits(backend: CudaBackend) -> None:
    """The engine's thread is not the one that captured the graph."""
    here = predicted(backend, inputs(WIDTH))
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(predicted, backend, inputs(WIDTH)).result(), here)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_only_the_end_of_a_pass_waits_for_the_device(backend: CudaBackend, gpu: torch.device) -> None:
    predicted(backend, inputs(WIDTH))  # one-time allocations
    lines = torch.tensor(sample_table(THRESHOLDED, "ddpm", WIDTH).lines).float()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = {name: backend.send(values) for name, values in inputs(WIDTH).items()}
        x = sent["x"]
        finish = backend.start(sent)
        update(x, x, [x, x, x], x, backend.send(lines), range(WIDTH))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert finish().device == gpu


@pytest.fixture(scope="module", params=get_args(Kind))
def autoencoder(request: pytest.FixtureRequest) -> Autoencoder:
    return small_autoencoder(request.param)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_latents_have_the_image_of_the_cpu_in_any_company(
    autoencoder: Autoencoder, gpu: torch.device, precision: Precision
) -> None:
    """Also on another thread while passes run here: the VAE has its own stream."""
    model = latent_description(autoencoder, SHAPE)
    vae = choose_vae(copy.deepcopy(autoencoder), model, gpu, precision, 1, None)(model.group, None)
    width = vae.widths[-1]
    assert vae.reproducible
    latents = random_images(width, model.sample_shape)
    exact = autoencoder.decode(torch.tensor(np.stack(latents)))
    alone = [vae.decode([one])[0] for one in latents]
    error = (torch.tensor(np.stack(alone)) - exact).abs().max() / exact.abs().max()
    if precision == "float32":
        assert error < 1e-4
    else:
        assert 1e-4 < error < 0.1

    denoises = cuda_backend(gpu, precision, WIDTH)
    expected = predicted(denoises, inputs(WIDTH))
    with ThreadPoolExecutor(1) as pool:
        for turn in range(width):
            order = [(turn + i) % width for i in range(width)]
            crowd = pool.submit(vae.decode, [latents[i] for i in order])
            assert torch.equal(predicted(denoises, inputs(WIDTH)), expected)
            assert all(np.array_equal(image, alone[i]) for image, i in zip(crowd.result(), order, strict=True))

    [image] = random_images(1, SHAPE)
    [exact] = autoencoder.encode(torch.tensor(image)[None])
    assert (torch.from_numpy(vae.encode(image).mean) - exact).abs().max() < 0.1 * exact.abs().max()


class Hungry(nn.Module):
    """A network whose rows take a sixth of the GPU's memory each."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        torch.empty(len(x) * (torch.cuda.mem_get_info(x.device)[1] // 6), dtype=torch.uint8, device=x.device)
        return 2 * x


class HungryInCapture(nn.Module):
    """A network whose graph fits only for at most two rows."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out = 2 * x
        if torch.cuda.is_current_stream_capturing() and len(x) > 2:
            raise torch.OutOfMemoryError(f"no memory for {len(x)} rows")
        return out


@pytest.mark.cuda
@pytest.mark.parametrize(("network", "width"), [(Hungry(), 4), (HungryInCapture(), 2)])
def test_what_does_not_fit_the_gpu_is_left_out(gpu: torch.device, network: nn.Module, width: int) -> None:
    backend = CudaBackend(network, SHAPES, gpu, "float32", WIDTH)
    assert backend.widths[0] <= width
    rows = inputs(1)
    assert torch.equal(predicted(backend, rows), 2 * rows["x"])


@pytest.mark.cuda
def test_backends_of_two_sizes_share_the_weights(gpu: torch.device) -> None:
    network = network_of(small_network())
    weights = sum(parameter.nbytes for parameter in network.parameters())
    backends = [CudaBackend(network, {"x": (3, side, side), "emb": (64,)}, gpu, "float32", 2) for side in (8, 16)]
    assert {parameter.device for parameter in network.parameters()} == {gpu}
    assert weights == sum(parameter.nbytes for parameter in network.parameters())
    for backend, side in zip(backends, (8, 16), strict=True):
        x = torch.ones((1, 3, side, side))
        given = inputs_of(small_network(), x, torch.tensor([500]), torch.tensor([1]))
        exact = torch_backend(small_network(), (3, side, side), "float32", 1).start(given)()
        assert (predicted(backend, given) - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_fingerprint_names_what_moves_bits(gpu: torch.device, precision: CudaPrecision) -> None:
    parts = cuda_backend(gpu, precision, 2).fingerprint
    assert parts["backend"] == "torch-cuda"
    assert str(parts["backend_version"]).startswith(f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN ")
    assert str(parts["processor"]).startswith(torch.cuda.get_device_name(gpu))
    assert (parts["precision"], parts["width"]) == (precision, 2)
    assert cuda_backend(gpu, precision, 2).fingerprint == parts
