"""In which precision the parameters of networks are kept.

A checkpoint's parameters stay as its files have them. Backends widen or narrow what they run. Embeddings, and all else
that no backend runs, are in float32: such parts are the attribute `outside` of a network's class, by name.
"""

from collections.abc import Iterator

import torch
from torch import nn

HALVES = (torch.float16, torch.bfloat16)
_NARROW = (nn.Linear, nn.Conv2d)  # what torch's autocast computes in half precision


def widen_outside(network: nn.Module) -> None:
    """Bring the parts that no backend runs to float32."""
    for part in _outside(network):
        part.float()


def narrow(network: nn.Module, dtype: torch.dtype) -> None:
    """Bring the parameters of what a backend runs to the dtype in which torch's autocast uses them.

    With autocast to this dtype, an output has the bits that it has with parameters in float32. Under autocast to half
    precision, norms compute with float32. For a dtype of float32, all parameters are brought there.
    """
    kept = {id(part) for outside in _outside(network) for part in outside.modules()}
    for part in network.modules():
        if id(part) not in kept:
            to = dtype if isinstance(part, _NARROW) else torch.float32
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.to(to)


def _outside(network: nn.Module) -> Iterator[nn.Module]:
    for part in network.modules():
        for name in getattr(part, "outside", ()):
            found = getattr(part, name, None)
            if found is not None:
                yield found
