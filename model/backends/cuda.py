"""A network on CUDA: one captured graph of one width."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from model.backends.backend import Precision, is_batch_invariant, processor

log = logging.getLogger(__name__)


class CudaBackend:
    """Pads every pass to one width, and replays a captured graph.

    Implements model.backends.backend.Backend. There is one width because kernels, and with them a row's bits, depend on
    the width. In bfloat16 a check at the start misses that, yet a third of all images differed. If `max_batch` does not
    fit into memory, the width is halved until it fits.

    Args:
        network: called with (x, timesteps, labels); its parameters move to the device.
        sample_shape: (C, H, W).
        device: a CUDA device.
        precision: bfloat16 by autocast, or float32 without TF32.
        max_batch: the largest width.

    Raises:
        torch.OutOfMemoryError: if not even one row fits.
    """

    def __init__(
        self,
        network: nn.Module,
        sample_shape: tuple[int, int, int],
        device: torch.device,
        precision: Precision,
        max_batch: int,
    ) -> None:
        self._device = device
        self._precision = precision
        self._sample_shape = sample_shape
        if precision == "float32":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        self._network = network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._graph = self._widest(max_batch)
        self.reproducible = is_batch_invariant(self._graph.run, self._graph.run, self._width, sample_shape, device)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def _width(self) -> int:
        return len(self._graph.x)

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

    def send(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self._device, non_blocking=True)

    @torch.inference_mode()
    def start(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        if len(x) > self._width:
            raise ValueError(f"{len(x)} rows do not fit a pass of {self._width}")
        out = self._graph.run(x, timesteps, labels)

        def finish() -> Tensor:
            torch.cuda.current_stream(self._device).synchronize()
            return out

        return finish

    def _widest(self, width: int) -> "_Graph":
        while True:
            try:
                return self._capture(width)
            except torch.OutOfMemoryError:
                if width == 1:
                    raise
                log.warning("passes of %d rows do not fit into the memory of %s", width, self._device)
            width //= 2
            torch.cuda.empty_cache()  # outside `except`: the error's traceback holds the failed pass

    def _capture(self, width: int) -> "_Graph":
        return _Graph(self._network, self._sample_shape, self._device, self._precision, width)


class _Graph:
    """A captured forward pass of one width, with fixed input and output tensors."""

    @torch.inference_mode()
    def __init__(
        self,
        network: nn.Module,
        sample_shape: tuple[int, int, int],
        device: torch.device,
        precision: Precision,
        width: int,
    ) -> None:
        self._device = device
        self.x = torch.zeros((width, *sample_shape), device=device).contiguous(memory_format=torch.channels_last)
        self.timesteps = torch.ones(width, dtype=torch.int64, device=device)  # 0 is invalid for some networks
        self.labels = torch.zeros(width, dtype=torch.int64, device=device)
        autocast: AbstractContextManager[None] = (
            nullcontext() if precision == "float32" else torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
        )
        with torch.cuda.device(device), autocast:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # libraries allocate their workspaces before the capture
                    network(self.x, self.timesteps, self.labels)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=side):  # synchronizes with the device first
                    self._out: Tensor = network(self.x, self.timesteps, self.labels).float()
            torch.cuda.current_stream().wait_stream(side)

    @torch.inference_mode()  # x, timesteps and labels are inference tensors, which only inference mode may write
    def run(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Queue a pass of at most `width` rows. Its output is valid until the next pass."""
        rows = len(x)
        self.x[:rows].copy_(x)
        self.timesteps[:rows].copy_(timesteps)
        self.labels[:rows].copy_(labels)
        with torch.cuda.device(self._device):
            self._graph.replay()
        return self._out[:rows]
