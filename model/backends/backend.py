"""What computes: the network on some device, in some precision."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16"]

# How the names of variables begin by which libraries choose kernels: torch, oneDNN, MKL, OpenMP, OpenVINO, NumPy, the C
# library, and those of CUDA. NumPy's OpenBLAS is not among them, for nothing in the bytes is a product of its matrices.
_CHOOSING_KERNELS = (
    "ATEN_", "TORCH_ALLOW_", "TORCH_BLAS_", "TORCH_CUDNN_", "TORCH_LINALG_", "TORCH_LINEAR_", "TORCH_MKLDNN_",
    "DNNL_", "ONEDNN_", "MKL_", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OV_", "NPY_", "GLIBC_TUNABLES",
    "CUBLAS", "CUDNN_", "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


class Backend(Protocol):
    """The network on some device. All calls come from one thread."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that passes really run at, rising."""

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """All that can move a bit of the output, by name."""

    @property
    def reproducible(self) -> bool:
        """Whether a row was seen to have the same bits alone and among others."""

    def send(self, values: Tensor) -> Tensor:
        """Bring values from the CPU to the device, without waiting."""

    def start(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Callable[[], Tensor]:
        """Start a pass over inputs on the device. What is returned waits for its end.

        It maps x float32 [B, C, H, W], timesteps int64 [B] and labels int64 [B] to float32 [B, out_channels, H, W],
        which holds until the next pass is started. B is at most the last of `widths`.
        """


Pass = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, timesteps, labels → predictions


def keeps_rows_apart(
    together: Pass, alone: Pass, rows: int, sample_shape: tuple[int, int, int], device: torch.device
) -> bool:
    """Whether each row of a pass of `rows` has the bits that it has in a pass of its own."""
    if rows == 1:  # there are no others
        return True
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((rows, *sample_shape), generator=rng).to(device)
    timesteps = torch.ones(rows, dtype=torch.int64, device=device)  # some networks do not know 0
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    crowd = together(x, timesteps, labels).clone()
    return all(torch.equal(crowd[i], alone(x[i, None], timesteps[i, None], labels[i, None])[0]) for i in range(rows))


def processor(device: torch.device) -> str:
    """The GPU's model, or the CPU's with the instruction sets that kernels choose by."""
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


def host() -> dict[str, str]:
    """What of this process can move a bit on every backend, by name: it draws noise, and makes the step tables."""
    return {
        "torch": torch.__version__,
        "instructions": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "environment": " ".join(
            f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_CHOOSING_KERNELS)
        ),
    }
