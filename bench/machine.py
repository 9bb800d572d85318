"""A description of the machine on which figures are measured."""

import platform
import time
from pathlib import Path

import torch

from service.config import available_cores


def machine() -> str:
    """Cores, processor, versions, and the machine's present speed."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return (
        f"{available_cores()} cores of {names[0] if names else platform.processor()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, a 3x3 convolution of 256 channels at "
        f"{peak(torch.float32):.0f} GFLOP/s in float32 and {peak(torch.bfloat16):.0f} in bfloat16"
    )


def peak(dtype: torch.dtype) -> float:
    """GFLOP/s of a large convolution."""
    x, weight = torch.randn(8, 256, 64, 64, dtype=dtype), torch.randn(256, 256, 3, 3, dtype=dtype)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    seconds = []
    with torch.inference_mode():
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.conv2d(x, weight, padding=1)
            seconds.append(time.perf_counter() - began)
    return 2 * x.numel() * weight[:, 0].numel() / min(seconds) / 1e9
