"""How much memory a pass of torch takes, known before anything is computed."""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.backends.network import Shapes

_META = torch.device("meta")


def activations(module: nn.Module, shapes: Shapes) -> int:
    """The most bytes that intermediate results of one row take at once, in float32.

    The pass runs without values, on torch's meta device. The first call imports much of torch, for a second.
    """
    inputs = [torch.empty((1, *shape), device=_META) for shape in shapes.values()]
    outline, held = _without_values(module), _Held()
    with torch.inference_mode(), held:
        outline(*inputs)
    return held.most


def parameters(module: nn.Module) -> int:
    """Bytes of a module's parameters in float32."""
    return 4 * sum(parameter.numel() for parameter in module.parameters())


def _without_values(module: nn.Module) -> nn.Module:
    """A copy of a module on torch's meta device, in float32."""
    # deepcopy takes what it finds in `memo` for copies that exist already.
    memo = {id(values): values.to(_META) for values in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo).float()


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, until the tensors are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.most = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for values in tree_leaves(out):
            if isinstance(values, Tensor):
                self._hold(values.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
