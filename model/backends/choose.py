"""Which backend computes: CUDA where there is a GPU, OpenVINO on the CPU, torch where that is not installed."""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from model.backends.backend import Backend, Precision
from model.backends.cuda import CudaBackend
from model.backends.memory import available
from model.backends.network import Network
from model.backends.padded import PaddedBackend

log = logging.getLogger(__name__)

BFLOAT16_CAPABILITY = (8, 0)  # CUDA's compute capability from which on GPUs have instructions for bfloat16: Ampere

Kind = Literal["cuda", "openvino", "padded"]
Choice = Precision | Literal["auto"]


def choose(
    network: Network,
    device: torch.device,
    precision: Choice,
    threads: int,
    max_batch: int | None,
    cache_dir: Path | None,
) -> Backend:
    """The best backend for a network.

    Args:
        network: its module is the backend's from now on.
        device: cpu or cuda.
        precision: auto is bfloat16 where the device has instructions for it.
        threads: compute threads, on the CPU.
        max_batch: the most rows of a pass; None: by the device and the network.
        cache_dir: the folder for converted models; None for none.
    """
    module, shape = network.module, network.input_shape
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY  # of this GPU, not of the first one
        chosen: Precision = ("bfloat16" if native else "float32") if precision == "auto" else precision
        return CudaBackend(module, shape, device, chosen, max_batch or default_width(network, "cuda"))
    if find_spec("openvino") is None:
        log.warning(
            "OpenVINO is not installed, so torch computes, several times slower; the extra `cpu` brings OpenVINO: "
            "in a checkout, pip install -e '.[cpu]'"
        )
        chosen = "float32" if precision == "auto" else precision
        return PaddedBackend(module, shape, chosen, max_batch or default_width(network, "padded"))

    from model.backends.conversion import converted
    from model.backends.openvino import OpenVINOBackend, computes_bfloat16

    native = computes_bfloat16()
    if precision == "bfloat16" and not native:
        log.warning("this processor has no instructions for bfloat16, so torch computes it, slowly")
        return PaddedBackend(module, shape, precision, max_batch or default_width(network, "padded"))
    chosen = ("bfloat16" if native else "float32") if precision == "auto" else precision
    # What is left for torch is small, its threads would keep OpenVINO's from running, and the table of time embeddings
    # that a conversion makes may not depend on how many there are.
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
    """Rows of a pass where MAX_BATCH is not set.

    On the CPU a row of a large network costs the same in any company, and a long pass keeps others waiting. Rows like
    the digits', of less than a millisecond, are worth what surrounds a pass. Padded, a lone row costs a whole pass:
    eight digits as much as three, of a network of 36 M parameters at 32x32 as six. Latents seldom wait for decoding in
    crowds, so a padded pass over them is short.
    """
    denoises = network.name == "denoiser"
    if kind == "cuda":
        return 32 if denoises else 4
    if kind == "padded":
        return 8 if denoises and network.work <= 1e10 else 1
    return 16 if network.work <= 2e9 else max(1, min(8, int(1.5e11 / network.work)))
