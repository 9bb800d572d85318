"""The choice of backend: CUDA on a GPU, OpenVINO on a CPU, torch without OpenVINO."""

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from model.backends import footprint
from model.backends.backend import Backend, Precision
from model.backends.cuda import CudaBackend, CudaPrecision
from model.backends.memory import available
from model.backends.network import Network
from model.backends.torch_cpu import TorchCPUBackend

log = logging.getLogger(__name__)

BFLOAT16_CAPABILITY = (8, 0)  # the first CUDA compute capability with bfloat16 instructions (Ampere)
FLOAT16_CAPABILITY = (7, 0)  # the first with fast matrix products in float16 (Volta)

Kind = Literal["cuda", "openvino", "torch_cpu"]
Choice = Precision | Literal["auto"]
Make = Callable[[tuple[int, ...]], Backend]

_GIB = 2**30
_LARGE_PASS = 8e12  # Network.work of a pass that need not be wider on CUDA: two rows of Stable Diffusion 1 at 512x512


def choose(
    network: Network,
    device: torch.device,
    precision: Choice,
    threads: int,
    max_batch: int | None,
    cache_dir: Path | None,
) -> Make:
    """Choose the best kind of backend for a network.

    Args:
        network: the backends take over its module.
        device: cpu or cuda.
        precision: auto is bfloat16 if the device has instructions for it. On a GPU without them, auto is float16 for
            U-Nets with text, which are trained or published in it, and float32 for all else.
        threads: compute threads on the CPU.
        max_batch: the largest width; None chooses by device and network.
        cache_dir: the folder for converted models; None caches nothing.

    Returns:
        A function that makes a backend for a shape of x. Backends of several sizes share the weights where they can.
        The function raises MemoryError, on CUDA torch.OutOfMemoryError, if a pass of one row does not fit.
    """
    if device.type == "cuda":
        on_gpu = _precision_on(torch.cuda.get_device_capability(device), network) if precision == "auto" else precision
        return lambda shape: CudaBackend(
            network.module, network.at(shape), device, on_gpu, max_batch or default_width(network, shape, "cuda")
        )
    if find_spec("openvino") is None:
        log.warning(
            "OpenVINO is not installed, so torch computes, several times slower; the extra `cpu` brings OpenVINO: "
            "in a checkout, pip install -e '.[cpu]'"
        )
        return _on_torch(network, "float32" if precision == "auto" else precision, max_batch)

    from model.backends.openvino import computes_bfloat16

    native = computes_bfloat16()
    if precision == "bfloat16" and not native:
        log.warning("this processor has no instructions for bfloat16, so torch computes it, slowly")
        return _on_torch(network, precision, max_batch)
    # Torch has little left to do, and its threads would compete with OpenVINO's. Besides, embeddings must not depend on
    # the number of threads.
    torch.set_num_threads(1)
    chosen: Precision = ("bfloat16" if native else "float32") if precision == "auto" else precision
    return _on_openvino(network, chosen, threads, max_batch, cache_dir)


def _precision_on(capability: tuple[int, int], network: Network) -> CudaPrecision:
    """The fastest precision of a GPU that a network's values fit.

    float16 ends at 65,504. The U-Nets of Stable Diffusion stay below, its VAE does not, and other networks may not.
    """
    if capability >= BFLOAT16_CAPABILITY:
        return "bfloat16"
    return "float16" if "context" in network.inputs and capability >= FLOAT16_CAPABILITY else "float32"


def _on_torch(network: Network, precision: Precision, max_batch: int | None) -> Make:
    def make(shape: tuple[int, ...]) -> Backend:
        width = max_batch or default_width(network, shape, "torch_cpu")
        shapes = network.at(shape)
        _check_memory(network.name, width * footprint.activations(network.module, shapes), precision)
        backend = TorchCPUBackend(network.module, shapes, precision, width)
        if backend.reproducible:
            return backend
        log.warning("passes of %d rows have other bits than those of one, so each row runs alone", width)
        return TorchCPUBackend(network.module, shapes, precision, 1)

    return make


def _on_openvino(
    network: Network, precision: Precision, threads: int, max_batch: int | None, cache_dir: Path | None
) -> Make:
    from model.backends.conversion import activations, at_size, converted
    from model.backends.openvino import OpenVINOBackend

    model, release = converted(network, cache_dir)
    weights = footprint.parameters(network.module)
    declared = replace(network, module=nn.Identity())  # the converted model has the weights; torch's are freed

    def make(shape: tuple[int, ...]) -> Backend:
        shapes = declared.at(shape)
        sized = at_size(model, shapes)
        _check_memory(declared.name, weights + activations(sized), precision)
        width = max_batch or default_width(declared, shape, "openvino")
        return OpenVINOBackend(sized, shapes, precision, threads, width, available, release)

    return make


def _check_memory(name: str, needed: int, precision: Precision) -> None:
    """Raise MemoryError if a pass will not fit, before anything is compiled.

    Args:
        needed: bytes in float32.
    """
    needed //= 1 if precision == "float32" else 2
    left = available()
    if needed > left:
        raise MemoryError(f"its {name} needs {needed / _GIB:.1f} GiB, and {left / _GIB:.1f} GiB are left")


def default_width(network: Network, shape: tuple[int, ...], kind: Kind) -> int:
    """The largest width for a shape of x, if MAX_BATCH is not set.

    cuda: a lone row costs a whole pass. That is nothing for a network of a millisecond, and much for a large one: 32
    rows of Stable Diffusion 1 are 26 TFLOP. A large network's width is 2, a row with guidance.
    openvino: a row of a large network costs the same at any width, and a long pass makes others wait. For rows under a
    millisecond, such as the digits', a wide pass shares the overhead. torch: a lone row costs a whole pass, so the
    width is small: 8 rows of the digits cost as much as 3 would alone, 8 rows of 36 M parameters at 32x32 as much as 6.
    Few latents wait for decoding at the same time, so decoders have small widths on padded backends.
    """
    denoises, work = network.name == "denoiser", network.work(shape)
    if kind == "cuda":
        fitting = int(_LARGE_PASS / work)
        return max(2, min(32, fitting)) if denoises else max(1, min(4, fitting))
    if kind == "torch_cpu":
        return 8 if denoises and work <= 1e10 else 1
    return 16 if work <= 2e9 else max(1, min(8, int(1.5e11 / work)))
