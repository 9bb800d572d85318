"""The choice of backend: CUDA on a GPU, OpenVINO on a CPU, torch without OpenVINO."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from model.backends.backend import Backend, Precision
from model.backends.cuda import CudaBackend
from model.backends.memory import available
from model.backends.network import Network
from model.backends.torch_cpu import TorchCPUBackend

log = logging.getLogger(__name__)

BFLOAT16_CAPABILITY = (8, 0)  # the first CUDA compute capability with bfloat16 instructions (Ampere)

Kind = Literal["cuda", "openvino", "torch_cpu"]
Choice = Precision | Literal["auto"]


def choose(
    network: Network,
    device: torch.device,
    precision: Choice,
    threads: int,
    max_batch: int | None,
    cache_dir: Path | None,
) -> Backend:
    """Make the best backend for a network.

    Args:
        network: the backend takes over its module.
        device: cpu or cuda.
        precision: auto is bfloat16 if the device has instructions for it.
        threads: compute threads on the CPU.
        max_batch: the largest width; None chooses by device and network.
        cache_dir: the folder for converted models; None caches nothing.
    """
    module, shape = network.module, network.input_shape
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
        chosen: Precision = ("bfloat16" if native else "float32") if precision == "auto" else precision
        return CudaBackend(module, shape, device, chosen, max_batch or default_width(network, "cuda"))
    if find_spec("openvino") is None:
        log.warning(
            "OpenVINO is not installed, so torch computes, several times slower; the extra `cpu` brings OpenVINO: "
            "in a checkout, pip install -e '.[cpu]'"
        )
        chosen = "float32" if precision == "auto" else precision
        return TorchCPUBackend(module, shape, chosen, max_batch or default_width(network, "torch_cpu"))

    from model.backends.conversion import converted
    from model.backends.openvino import OpenVINOBackend, computes_bfloat16

    native = computes_bfloat16()
    if precision == "bfloat16" and not native:
        log.warning("this processor has no instructions for bfloat16, so torch computes it, slowly")
        return TorchCPUBackend(module, shape, precision, max_batch or default_width(network, "torch_cpu"))
    chosen = ("bfloat16" if native else "float32") if precision == "auto" else precision
    # Torch has little left to do, and its threads would compete with OpenVINO's. Besides, the table of time embeddings
    # in a converted model must not depend on the number of threads.
    torch.set_num_threads(1)
    return OpenVINOBackend(
        converted(network, cache_dir),
        shape,
        chosen,
        threads,
        max_batch or default_width(network, "openvino"),
        available,
    )


def default_width(network: Network, kind: Kind) -> int:
    """The largest width if MAX_BATCH is not set.

    openvino: a row of a large network costs the same at any width, and a long pass makes others wait. For rows under a
    millisecond, such as the digits', a wide pass shares the overhead. torch: a lone row costs a whole pass, so the
    width is small: 8 rows of the digits cost as much as 3 would alone, 8 rows of 36 M parameters at 32x32 as much as 6.
    Few latents wait for decoding at the same time, so decoders have small widths on padded backends.
    """
    denoises = network.name == "denoiser"
    if kind == "cuda":
        return 32 if denoises else 4
    if kind == "torch_cpu":
        return 8 if denoises and network.work <= 1e10 else 1
    return 16 if network.work <= 2e9 else max(1, min(8, int(1.5e11 / network.work)))
