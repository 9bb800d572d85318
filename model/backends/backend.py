"""The Backend protocol, and what its fingerprint is made of."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from model.backends.network import Shapes

Precision = Literal["float32", "bfloat16"]
Inputs = Mapping[str, Tensor]

# Prefixes of the environment variables that choose kernels, in torch, oneDNN, MKL, OpenMP, OpenVINO, NumPy, the C
# library and CUDA's libraries. NumPy's OpenBLAS is missing: no byte of an image comes from its matrix products.
_CHOOSING_KERNELS = (
    "ATEN_", "TORCH_ALLOW_", "TORCH_BLAS_", "TORCH_CUDNN_", "TORCH_LINALG_", "TORCH_LINEAR_", "TORCH_MKLDNN_",
    "DNNL_", "ONEDNN_", "MKL_", "OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OV_", "NPY_", "GLIBC_TUNABLES",
    "CUBLAS", "CUDNN_", "NVIDIA_TF32_OVERRIDE",
)  # fmt: skip


class Backend(Protocol):
    """Runs a network on one device. One thread makes all calls."""

    @property
    def widths(self) -> Sequence[int]:
        """The widths that passes really run at, ascending."""

    @property
    def device(self) -> torch.device:
        """The device of inputs and outputs."""

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything that can change a bit of the output, by name."""

    @property
    def reproducible(self) -> bool:
        """Whether a row had the same bits alone and in a full pass, when this was tried."""

    def prepare(self) -> None:
        """Compile what is not compiled yet, so that no later pass compiles. Called once all backends are made."""

    def send(self, values: Tensor) -> Tensor:
        """Copy values from the CPU to the device, without waiting."""

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        """Start a pass over inputs on the device. The returned function waits for it and returns the output.

        Args:
            inputs: float32 [B, …] each, by the names that the network declares (model.backends.network.Network.inputs).
                B is at most the last of `widths`.

        Returns:
            float32 [B, …]. It is valid until the next pass starts.
        """


def check_fits(rows: int, width: int) -> None:
    """Raise ValueError if a pass cannot take so many rows."""
    if rows > width:
        raise ValueError(f"{rows} rows do not fit a pass of {width}")


def own_stream(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A context whose work on a GPU does not wait for other work there, such as the U-Net's passes."""
    if device.type != "cuda":
        return nullcontext
    return partial(torch.cuda.stream, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


Pass = Callable[[Inputs], Tensor]


def is_batch_invariant(together: Pass, alone: Pass, rows: int, shapes: Shapes, device: torch.device) -> bool:
    """Whether each row of a pass of `rows` has the same bits as in a pass of its own."""
    if rows == 1:
        return True
    rng = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn((rows, *shape), generator=rng).to(device) for name, shape in shapes.items()}
    crowd = together(inputs).clone()
    return all(
        torch.equal(crowd[i], alone({name: values[i, None] for name, values in inputs.items()})[0]) for i in range(rows)
    )


def processor(device: torch.device) -> str:
    """The GPU's model, or the CPU's model with the instruction sets that choose kernels."""
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
    """What can change bits on every backend, by name: the CPU draws the noise and computes the step tables."""
    return {
        "torch": torch.__version__,
        "instructions": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "libc": " ".join(platform.libc_ver()).strip(),
        "environment": " ".join(
            f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(_CHOOSING_KERNELS)
        ),
    }
