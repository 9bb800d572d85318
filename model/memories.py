"""What rows remember of their earlier lines, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.backends.backend import Backend
from model.lines import C
from model.samplers import Step

_NOTHING = 0  # the place of zeros, for rows that read less than others
_DEPTH = len(C)


class Memories:
    """A ring of three memories for each slot. A row's number of memories so far says which is which.

    So nothing is moved when a row remembers, and nothing is cleared for the next row of the slot.

    Args:
        values: float32 [1 + 3·slots, C, H, W].
    """

    def __init__(self, values: Tensor, backend: Backend) -> None:
        self._values = values
        self._backend = backend

    @classmethod
    def of(cls, slots: int, shape: tuple[int, int, int], backend: Backend) -> "Memories":
        return cls(torch.zeros((1 + _DEPTH * slots, *shape), device=backend.device), backend)

    def doubled(self) -> "Memories":
        """The same for twice the slots."""
        rings = self._values.narrow(0, 1, len(self._values) - 1)
        return Memories(torch.cat([self._values, torch.zeros_like(rings)]), self._backend)

    def read(self, slots: Sequence[int], steps: Sequence[Step]) -> list[Tensor]:
        """m_1, m_2 and m_3 of rows, as many as their lines read at most, [B, C, H, W] each. What is not there is 0."""
        depth = max(step.reads for step in steps)
        if not depth:
            return []
        places = [
            _place(slot, step.remembered - back) if back <= min(step.reads, step.remembered) else _NOTHING
            for back in range(1, depth + 1)
            for slot, step in zip(slots, steps, strict=True)
        ]
        gathered = self._values.index_select(0, self._send(places))
        return list(gathered.view(depth, len(slots), *gathered.shape[1:]).unbind())

    def places(self, slots: Sequence[int], steps: Sequence[Step]) -> Tensor | None:
        """Where to keep what the lines leave: the rows' numbers and their places, int64 [2, kept]; None for nothing."""
        kept = [
            (row, _place(slot, step.remembered))
            for row, (slot, step) in enumerate(zip(slots, steps, strict=True))
            if step.remembers
        ]
        return self._send(list(zip(*kept, strict=True))) if kept else None

    def keep(self, places: Tensor, memories: Tensor) -> None:
        """Keep memories, [kept, C, H, W], at their places, int64 [kept]."""
        self._values.index_copy_(0, places, memories)

    def _send(self, numbers: object) -> Tensor:
        return self._backend.send(torch.tensor(numbers))


def _place(slot: int, number: int) -> int:
    """The place of a row's memory, counted from its first."""
    return 1 + _DEPTH * slot + number % _DEPTH
