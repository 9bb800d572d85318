"""The network on torch, as it is, on the CPU or on CUDA."""

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Precision = Literal["float32", "bfloat16"]


class EagerBackend:
    """Runs every pass at one batch size, padded: torch's bytes depend on the batch size, at one size on nothing else.

    Implements model.runner.Backend. So a lone row costs as much as a full pass.

    Args:
        network: called with (x, timesteps, labels); its parameters are moved to the device.
        device: cpu or cuda.
        precision: float32, or bfloat16 by autocast.
        width: the batch size.
    """

    def __init__(self, network: nn.Module, device: torch.device, precision: Precision, width: int) -> None:
        # On the CPU, torch's kernels for channels_last are up to 1.4 times as fast, with errors three times as large,
        # which DDIM magnifies until one value in fifty of an image differs from diffusers'.
        exact = device.type == "cpu" and precision == "float32"
        self._format = torch.contiguous_format if exact else torch.channels_last
        self._network = network.to(device=device, memory_format=self._format).eval()  # type: ignore[call-overload]
        self._precision = precision
        self._width = width
        self._device = device
        if device.type == "cuda" and precision == "float32":
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False

    @property
    def widths(self) -> Sequence[int]:
        return (self._width,)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {
            "backend": "torch",
            "backend_version": torch.__version__,
            "precision": self._precision,
            "processor": processor(self._device),
            "threads": torch.get_num_threads() if self._device.type == "cpu" else 0,
            "width": self._width,
        }

    @torch.inference_mode()
    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        rows = len(x)
        missing = self._width - rows
        if missing < 0:
            raise ValueError(f"{rows} rows do not fit a pass of {self._width}")
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=self._format)
        timesteps = F.pad(timesteps, (0, missing)).to(self._device)
        labels = F.pad(labels, (0, missing)).to(self._device)
        with self._autocast():
            out: Tensor = self._network(x, timesteps, labels)
        return out[:rows].float()

    def _autocast(self) -> AbstractContextManager[None]:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)


def keeps_rows_apart(backend: EagerBackend, image_shape: tuple[int, int, int]) -> bool:
    """Whether a row has the same bits alone and among others, at the first and at the last place."""
    width = backend.widths[-1]
    if width == 1:  # there are no others
        return True
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((width, *image_shape), generator=rng).to(backend.device)
    timesteps = torch.arange(width) % 2
    labels = torch.zeros(width, dtype=torch.int64)
    crowd = backend.forward(x, timesteps, labels)
    first, last = (backend.forward(x[i, None], timesteps[i, None], labels[i, None])[0] for i in (0, width - 1))
    return torch.equal(crowd[0], first) and torch.equal(crowd[-1], last)


def processor(device: torch.device) -> str:
    """The GPU's model, or the CPU's with the instruction sets that torch's kernels choose by."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"
    cpuinfo = Path("/proc/cpuinfo")
    facts = dict(
        line.split(":", 1) for line in (cpuinfo.read_text() if cpuinfo.exists() else "").splitlines() if ":" in line
    )
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    vector = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx", "fma")))
    name = facts.get("model name", platform.processor())
    return " ".join([platform.machine(), name, torch.backends.cpu.get_cpu_capability(), *vector])
