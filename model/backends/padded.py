"""The network on torch, on the CPU: what remains where OpenVINO is not installed."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backends.backend import Precision, keeps_rows_apart, processor


class PaddedBackend:
    """Runs every pass at one batch size, padded: torch's bytes depend on the batch size, at one size on nothing else.

    Implements model.backends.backend.Backend. So a lone row costs as much as a full pass.

    Args:
        network: called with (x, timesteps, labels).
        sample_shape: (C, H, W).
        precision: float32, or bfloat16 by autocast.
        width: the batch size.
    """

    device = torch.device("cpu")

    def __init__(
        self, network: nn.Module, sample_shape: tuple[int, int, int], precision: Precision, width: int
    ) -> None:
        # torch's kernels for channels_last are up to 1.4 times as fast, with errors three times as large, which DDIM
        # magnifies until one value in fifty of an image differs from diffusers'.
        self._format = torch.contiguous_format if precision == "float32" else torch.channels_last
        self._network = network.to(memory_format=self._format).eval()  # type: ignore[call-overload]
        self._precision = precision
        self._width = width
        self.reproducible = keeps_rows_apart(self._forward, self._forward, width, sample_shape, self.device)

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

    def send(self, values: Tensor) -> Tensor:
        return values

    def start(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        out = self._forward(x, timesteps, labels)
        return lambda: out

    @torch.inference_mode()
    def _forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        rows = len(x)
        missing = self._width - rows
        if missing < 0:
            raise ValueError(f"{rows} rows do not fit a pass of {self._width}")
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=self._format)
        timesteps = F.pad(timesteps, (0, missing))
        labels = F.pad(labels, (0, missing))
        with self._autocast():
            out: Tensor = self._network(x, timesteps, labels)
        return out[:rows].float()

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)
