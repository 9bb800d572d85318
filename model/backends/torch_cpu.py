"""A network on torch's CPU kernels, for machines without OpenVINO."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backends.backend import Inputs, Precision, check_fits, is_batch_invariant, processor
from model.backends.network import Shapes
from model.nets.precision import narrow


class TorchCPUBackend:
    """Pads every pass to one width, because torch's bits depend on the width. A lone row costs a full pass.

    Implements model.backends.backend.Backend.

    Args:
        network: see model.backends.network.Network.module, and model.nets.precision.narrow.
        shapes: what the network takes.
        precision: float32, or bfloat16 by autocast.
        width: rows of every pass.
    """

    device = torch.device("cpu")

    def __init__(self, network: nn.Module, shapes: Shapes, precision: Precision, width: int) -> None:
        # torch's channels_last kernels are up to 1.4 times as fast, but their errors are three times as large. In
        # float32 DDIM amplifies these until one pixel value in fifty differs from diffusers'.
        self._format = torch.contiguous_format if precision == "float32" else torch.channels_last
        narrow(network, torch.float32 if precision == "float32" else torch.bfloat16)
        self._network = network.to(memory_format=self._format).eval()  # type: ignore[call-overload]
        self._shapes = shapes
        self._precision = precision
        self._width = width
        self.reproducible = is_batch_invariant(self._forward, self._forward, width, shapes, self.device)

    @property
    def widths(self) -> Sequence[int]:
        return (self._width,)

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {
            "backend": "torch",
            "backend_version": torch.__version__,
            "precision": self._precision,
            "processor": processor(self.device),
            "threads": torch.get_num_threads(),
            "width": self._width,
        }

    def prepare(self) -> None:
        """The only width is ready."""

    def send(self, values: Tensor) -> Tensor:
        return values

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        out = self._forward(inputs)
        return lambda: out

    @torch.inference_mode()
    def _forward(self, inputs: Inputs) -> Tensor:
        rows = len(inputs["x"])
        check_fits(rows, self._width)
        padded = [self._padded(inputs[name]) for name in self._shapes]
        with self._autocast():
            out: Tensor = self._network(*padded)
        return out[:rows].float()

    def _padded(self, values: Tensor) -> Tensor:
        """Values with rows of zeros up to the width."""
        values = F.pad(values, (0, 0) * (values.ndim - 1) + (0, self._width - len(values)))
        return values.contiguous(memory_format=self._format) if values.ndim == 4 else values

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)
