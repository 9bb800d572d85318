"""A network on CUDA: one captured graph of one width."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor, nn

from model.backends.backend import Inputs, Precision, check_fits, is_batch_invariant, processor
from model.backends.network import Shapes
from model.nets.precision import narrow

log = logging.getLogger(__name__)

CudaPrecision = Precision | Literal["float16"]

_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MEASURED = 5  # passes of each width
_WORSE = 1.1  # times the least cost of a row that a row may cost at the chosen width


class CudaBackend:
    """Pads every pass to one width, and replays a captured graph.

    Implements model.backends.backend.Backend. There is one width because kernels, and with them a row's bits, depend on
    the width. In bfloat16 a check at the start misses that, yet a third of all images differed. `cheapest_width`
    chooses the width from measured passes. Widths that do not fit into memory are left out.

    Args:
        network: see model.backends.network.Network.module. Its parameters move to the device, where other backends may
            use them too. See model.nets.precision.narrow.
        shapes: what the network takes.
        device: a CUDA device.
        precision: bfloat16 or float16 by autocast, or float32 without TF32.
        max_batch: the largest width.

    Raises:
        torch.OutOfMemoryError: if not even one row fits.
    """

    def __init__(
        self, network: nn.Module, shapes: Shapes, device: torch.device, precision: CudaPrecision, max_batch: int
    ) -> None:
        self._device = device
        self._precision = precision
        self._shapes = shapes
        if precision == "float32":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        narrow(network, _AUTOCAST.get(precision, torch.float32))  # on the CPU: fewer bytes reach the device
        self._network = network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._width, self._graph = self._chosen(candidate_widths(max_batch))
        self.reproducible = is_batch_invariant(self._graph.run, self._graph.run, self._width, shapes, device)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def widths(self) -> Sequence[int]:
        return [self._width]

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {
            "backend": "torch-cuda",
            "backend_version": (
                f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
            ),
            "precision": self._precision,
            "processor": processor(self._device),
            "width": self._width,
        }

    def prepare(self) -> None:
        """The only width is ready."""

    def send(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self._device, non_blocking=True)

    @torch.inference_mode()
    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        check_fits(len(inputs["x"]), self._width)
        out = self._graph.run(inputs)

        def finish() -> Tensor:
            torch.cuda.current_stream(self._device).synchronize()
            return out

        return finish

    def _chosen(self, widths: Sequence[int]) -> tuple[int, "_Graph"]:
        """The width that `cheapest_width` chooses, and its graph. Only one graph is held at a time."""
        costs: dict[int, float] = {}
        for width in widths:
            graph = self._captured(width)
            if graph is None:
                break
            costs[width] = self._seconds(graph)
            del graph
        width = cheapest_width(costs) if costs else 1  # not even two rows fit
        return width, self._capture(width)

    def _captured(self, width: int) -> "_Graph | None":
        """The graph of a width; None if the width does not fit into memory."""
        try:
            return self._capture(width)
        except torch.OutOfMemoryError:
            if width == 1:
                raise
            log.warning("passes of %d rows do not fit into the memory of %s", width, self._device)
        torch.cuda.empty_cache()  # outside `except`: the error's traceback holds the failed pass
        return None

    def _capture(self, width: int) -> "_Graph":
        return _Graph(self._network, self._shapes, self._device, self._precision, width)

    def _seconds(self, graph: "_Graph") -> float:
        """The fewest seconds of a pass."""
        torch.cuda.synchronize(self._device)
        taken = []
        for _ in range(1 + _MEASURED):
            began = perf_counter()
            graph.replay()
            torch.cuda.synchronize(self._device)
            taken.append(perf_counter() - began)
        return min(taken[1:])


def candidate_widths(most: int) -> list[int]:
    """The widths to measure: powers of two from 2 on, and `most`. 2 is a row with guidance."""
    return sorted({most, *(1 << i for i in range(1, most.bit_length()))})


def cheapest_width(costs: Mapping[int, float]) -> int:
    """The narrowest width at which a row costs at most a tenth more than at the best width.

    A wider pass makes each row wait longer, and gains at most that tenth.

    Args:
        costs: seconds of a pass, by width.
    """
    best = min(seconds / width for width, seconds in costs.items())
    return min(width for width, seconds in costs.items() if seconds / width <= _WORSE * best)


class _Graph:
    """A captured forward pass of one width, with fixed input and output tensors."""

    @torch.inference_mode()
    def __init__(
        self, network: nn.Module, shapes: Shapes, device: torch.device, precision: CudaPrecision, width: int
    ) -> None:
        self._device = device
        self._inputs = {name: _zeros((width, *shape), device) for name, shape in shapes.items()}
        values = list(self._inputs.values())
        autocast: AbstractContextManager[None] = (
            nullcontext()
            if precision == "float32"
            else torch.autocast("cuda", _AUTOCAST[precision], cache_enabled=False)
        )
        with torch.cuda.device(device), autocast:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries allocate their workspaces before the capture
                    network(*values)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=side):  # synchronizes with the device first
                    self._out: Tensor = network(*values).float()
            torch.cuda.current_stream().wait_stream(side)

    @torch.inference_mode()  # the inputs are inference tensors, which only inference mode may write
    def run(self, inputs: Inputs) -> Tensor:
        """Queue a pass of at most the graph's width. Its output is valid until the next pass."""
        rows = len(inputs["x"])
        for name, values in self._inputs.items():
            values[:rows].copy_(inputs[name])
        self.replay()
        return self._out[:rows]

    def replay(self) -> None:
        """Queue a pass over the inputs of the last one."""
        with torch.cuda.device(self._device):
            self._graph.replay()


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    values = torch.zeros(shape, device=device)
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values
