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
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.backends import cuda
from model.backends.backend import Precision
from model.backends.cuda import CudaBackend
from model.backends.torch_cpu import TorchCPUBackend
from model.nets.autoencoder import Autoencoder
from model.nets.unet2d import UNet2D, UNet2DConfig
from model.rows import Forward, Reading, Row
from model.runner import SlotRunner
from model.samplers import Column, denoise_table, sample_table
from model.schedule import Schedule
from model.update import update
from model.vae import choose_vae
from tests.autoencoders import Kind, latent_description, random_images, small_autoencoder
from tests.trajectories import CPU, forwards, small_network, trajectory

SHAPE = (3, 8, 8)
META = torch.device("meta")

V = Schedule(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
THRESHOLDED = Schedule(thresholding=True, sample_max_value=2.0)
LEARNED = Schedule(variance_type="learned_range")
START = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
ROWS = {
    "plain": Row(sample_table(V, "ddim", 3), seed=0, label=1),
    "noisy": Row(sample_table(Schedule(), "ddpm", 3), seed=1),
    "guided": Row(sample_table(V, "dpmpp_2m", 3), seed=2, label=2, guidance_scale=2.0),
    "guided and noisy": Row(sample_table(V, "ddim", 3, eta=1.0), seed=3, guidance_scale=1.5),
    "thresholded": Row(sample_table(THRESHOLDED, "ddpm", 3), seed=4, label=3),
    "from a start": Row(denoise_table(V, "ddpm", 400, 3), seed=5, start=START, label=2),
    "the prediction": Row(denoise_table(V, "ddim", 999, 1), seed=6, guidance_scale=5.0, label=0, model_output=True),
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
        self.passes: list[tuple[Tensor, Tensor, Tensor]] = []

    def send(self, values: Tensor) -> Tensor:
        assert values.device == CPU
        assert values.is_contiguous()  # needs only one plain copy
        self.sent += 1
        return values.to(self.device, non_blocking=True)

    def start(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        self.passes.append((x, timesteps, labels))
        return lambda: torch.empty((len(x), self.out_channels, *SHAPE[1:]), device=self.device)


def meta_runner(out_channels: int) -> tuple[SlotRunner, MetaBackend]:
    backend = MetaBackend(out_channels)
    return SlotRunner(backend, SHAPE, no_label=5, slots=2), backend


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
        runner = SlotRunner(backend, SHAPE, no_label=5, slots=2)
        slots = [runner.admit(row) for row in rows]
        for step in range(max(len(row.table) for row in rows)):
            going = [(row, slot) for row, slot in zip(rows, slots, strict=True) if step < len(row.table)]
            runner.step([forward for row, slot in going for forward in forwards(row, slot, step)])
        with pytest.raises(RuntimeError, match="device"):
            torch.zeros(2, device=backend.device) + torch.zeros(2)
    assert len(backend.passes) == 3
    for x, timesteps, labels in backend.passes:
        assert {tensor.device for tensor in (x, timesteps, labels)} == {backend.device}
        assert (x.dtype, timesteps.dtype, labels.dtype) == (torch.float32, torch.int64, torch.int64)
        assert x.is_contiguous()
        assert mode is x.fake_mode  # type: ignore[attr-defined]


@with_variance
def test_an_update_on_cuda_0(out_channels: int) -> None:
    with FakeTensorMode():
        x, x0_previous, noise = (torch.empty((2, *SHAPE), device="cuda:0") for _ in range(3))
        out = torch.empty((2, out_channels, *SHAPE[1:]), device="cuda:0")
        lines = torch.empty((2, len(Column)), device="cuda:0")
        for image in update(x, out, x0_previous, noise, lines, thresholded=[1]):
            assert image.device == torch.device("cuda:0")
            assert image.dtype == torch.float32
            assert image.is_contiguous()


def row_of(name: str, out_channels: int) -> Row:
    """One of ROWS. With a learned variance, the noisy row uses it."""
    if name == "noisy" and out_channels == 6:
        return Row(sample_table(LEARNED, "ddpm", 3), seed=1)
    return ROWS[name]


@with_variance
def test_what_reaches_a_pass(out_channels: int) -> None:
    runner, backend = meta_runner(out_channels)
    slots = [runner.admit(row) for row in ROWS.values()]
    runner.step([f for row, slot in zip(ROWS.values(), slots, strict=True) for f in forwards(row, slot, 0)])
    [(x, timesteps, labels)] = backend.passes
    assert x.shape == (len(ROWS) + 3, *SHAPE)  # three rows are guided
    assert x.dtype == torch.float32
    assert timesteps.shape == labels.shape == (len(x),)
    assert timesteps.dtype == labels.dtype == torch.int64
    assert {tensor.device for tensor in (x, timesteps, labels)} == {META}
    assert all(tensor.is_contiguous() for tensor in (x, timesteps, labels))


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


@with_variance
def test_an_update_stays_on_the_device(out_channels: int) -> None:
    """Also with a quantile, whose check in torch would wait on the CPU."""
    x, x0_previous, noise = (torch.empty((2, *SHAPE), device=META) for _ in range(3))
    out = torch.empty((2, out_channels, *SHAPE[1:]), device=META)
    lines = torch.empty((2, len(Column)), device=META)
    with Moves() as moves:
        x_next, x0 = update(x, out, x0_previous, noise, lines, thresholded=[0, 1])
    assert moves.to_cpu == moves.to_device == []
    for image in (x_next, x0):
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


# Widths, with passes that are not graphs.


class EagerGraph(cuda._Graph):
    """A graph whose replay runs the network on the CPU."""

    def __init__(self, network: nn.Module, width: int) -> None:
        with torch.inference_mode():
            self.x = torch.zeros((width, *SHAPE))
            self.timesteps = torch.ones(width, dtype=torch.int64)
            self.labels = torch.zeros(width, dtype=torch.int64)
            self._network = network
            self._device: Any = -1  # torch.cuda.device then changes nothing
            self._graph: Any = self
            self.replay()

    def replay(self) -> None:
        self._out = self._network(self.x, self.timesteps, self.labels)


class EagerBackend(CudaBackend):
    def __init__(self, network: nn.Module, max_batch: int) -> None:
        super().__init__(network, SHAPE, CPU, "float32", max_batch)

    def _capture(self, width: int) -> EagerGraph:
        return EagerGraph(self._network, width)


class ByWidth(nn.Module):
    """A network that does not fit at some widths, and records the widths at which it ran."""

    def __init__(self, too_large: Sequence[int] = ()) -> None:
        super().__init__()
        self.too_large = too_large
        self.ran: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        width = len(x)
        self.ran.append(width)
        if width in self.too_large:
            raise torch.OutOfMemoryError(f"no memory for {width} rows")
        return x * 1.25


class MixesRows(nn.Module):
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


def test_rows_that_are_not_kept_apart_are_noticed() -> None:
    backend = EagerBackend(MixesRows(), 4)
    assert backend.widths == [4]
    assert not backend.reproducible


@pytest.mark.parametrize(
    ("max_batch", "too_large", "width"),
    [(1, [], 1), (12, [], 12), (24, range(9, 99), 6), (24, range(6, 99), 3), (24, range(2, 99), 1), (24, [24], 12)],
)
def test_the_width_is_halved_until_it_fits(
    max_batch: int, too_large: Sequence[int], width: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        backend = EagerBackend(ByWidth(too_large), max_batch)
    assert backend.widths == [width]
    assert backend.fingerprint["width"] == width
    assert backend.reproducible
    tried = [w for w in (24, 12, 6, 3) if width < w <= max_batch]
    assert caplog.messages == [f"passes of {w} rows do not fit into the memory of cpu" for w in tried]


def test_where_not_one_row_fits_that_is_said() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="no memory for 1 rows"):
        EagerBackend(ByWidth(too_large=range(99)), 8)


def test_all_passes_run_at_one_width() -> None:
    """Another width would have other kernels, and so sometimes other bits."""
    network = ByWidth()
    backend = EagerBackend(network, 12)
    numbers = torch.ones(13, dtype=torch.int64)
    network.ran.clear()
    for rows in range(1, 13):
        backend.start(torch.zeros((rows, *SHAPE)), numbers[:rows], numbers[:rows])
    assert network.ran == 12 * [12]
    with pytest.raises(ValueError, match="13 rows do not fit a pass of 12"):
        backend.start(torch.zeros((13, *SHAPE)), numbers, numbers)


# On a GPU.


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    """The last GPU. If there are several, it is not the default of new threads."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is false: there is no GPU here")
    return torch.device("cuda", torch.cuda.device_count() - 1)


WIDTH = 8


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def backend(request: pytest.FixtureRequest, gpu: torch.device) -> CudaBackend:
    return CudaBackend(small_network(), SHAPE, gpu, request.param, WIDTH)


Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(rows: int) -> Inputs:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn((rows, *SHAPE), generator=rng)
    return x, torch.arange(rows) * 999 // rows, torch.arange(rows) % 6


def predicted(backend: CudaBackend, rows: Inputs) -> Tensor:
    x, timesteps, labels = (backend.send(values) for values in rows)
    return backend.start(x, timesteps, labels)().cpu()


@pytest.mark.cuda
def test_rows_have_the_same_bits_alone_and_in_a_crowd_at_every_place(backend: CudaBackend) -> None:
    assert backend.reproducible
    x, timesteps, labels = inputs(WIDTH)
    order = torch.arange(WIDTH)
    alone = torch.cat([predicted(backend, (x[i, None], timesteps[i, None], labels[i, None])) for i in order])
    for width in range(1, WIDTH + 1):
        for turn in range(WIDTH):
            which = order.roll(turn)[:width]
            assert torch.equal(predicted(backend, (x[which], timesteps[which], labels[which])), alone[which])


@pytest.mark.cuda
def test_a_crowd_of_mixed_rows_has_the_bits_of_each_alone(backend: CudaBackend) -> None:
    def runner(slots: int) -> SlotRunner:
        return SlotRunner(backend, SHAPE, no_label=5, slots=slots)

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
    exact = TorchCPUBackend(small_network(), SHAPE, "float32", WIDTH).start(*rows)()
    out = predicted(backend, rows)
    assert out.dtype == torch.float32
    error = (out - exact).abs().max() / exact.abs().max()
    if backend.fingerprint["precision"] == "float32":
        assert error < 1e-4
    else:
        assert 1e-4 < error < 0.1  # bfloat16 was used, and nothing less precise


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
        x, timesteps, labels = (backend.send(values) for values in inputs(WIDTH))
        finish = backend.start(x, timesteps, labels)
        update(x, x, x, x, backend.send(lines), range(WIDTH))
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
    vae = choose_vae(copy.deepcopy(autoencoder), model, gpu, precision, 1, None)
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

    denoises = CudaBackend(small_network(), SHAPE, gpu, precision, WIDTH)
    expected = predicted(denoises, inputs(WIDTH))
    with ThreadPoolExecutor(1) as pool:
        for turn in range(width):
            order = [(turn + i) % width for i in range(width)]
            crowd = pool.submit(vae.decode, [latents[i] for i in order])
            assert torch.equal(predicted(denoises, inputs(WIDTH)), expected)
            assert all(np.array_equal(image, alone[i]) for image, i in zip(crowd.result(), order, strict=True))

    [image] = random_images(1, SHAPE)
    [exact] = autoencoder.encode(torch.tensor(image)[None])
    assert (torch.from_numpy(vae.encode(image)) - exact).abs().max() < 0.1 * exact.abs().max()


class Hungry(nn.Module):
    """A network whose rows take a sixth of the GPU's memory each."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        torch.empty(len(x) * (torch.cuda.mem_get_info(x.device)[1] // 6), dtype=torch.uint8, device=x.device)
        return 2 * x


class HungryInCapture(nn.Module):
    """A network whose graph fits only for at most two rows."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = 2 * x
        if torch.cuda.is_current_stream_capturing() and len(x) > 2:
            raise torch.OutOfMemoryError(f"no memory for {len(x)} rows")
        return out


@pytest.mark.cuda
@pytest.mark.parametrize(("network", "width"), [(Hungry(), 4), (HungryInCapture(), 2)])
def test_what_does_not_fit_the_gpu_is_halved(gpu: torch.device, network: nn.Module, width: int) -> None:
    backend = CudaBackend(network, SHAPE, gpu, "float32", WIDTH)
    assert backend.widths == [width]
    rows = inputs(width)
    assert torch.equal(predicted(backend, rows), 2 * rows[0])


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fingerprint_names_what_moves_bits(gpu: torch.device, precision: Precision) -> None:
    parts = CudaBackend(small_network(), SHAPE, gpu, precision, 2).fingerprint
    assert parts["backend"] == "torch-cuda"
    assert str(parts["backend_version"]).startswith(f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN ")
    assert str(parts["processor"]).startswith(torch.cuda.get_device_name(gpu))
    assert (parts["precision"], parts["width"]) == (precision, 2)
    assert CudaBackend(small_network(), SHAPE, gpu, precision, 2).fingerprint == parts
