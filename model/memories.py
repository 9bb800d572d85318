"""What rows remember of their earlier lines, on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.backends.backend import Backend
from model.lines import C
from model.samplers import Kept, Step
from model.update import remembered

_DEPTH = len(C)


class Recall(NamedTuple):
    """The memories of a pass.

    Attributes:
        read: m_1, m_2 and m_3 of each row, as many as the lines read at most, [B, C, H, W] each.
        rows: the numbers of the rows that leave a memory in a ring, int64 [left]; None for all of them.
        places: where these memories go, int64 [left]; None if no row leaves one.
    """

    read: Sequence[Tensor] = ()
    rows: Tensor | None = None
    places: Tensor | None = None

    def left(self, x: Tensor, x0: Tensor, out: Tensor, lines: Tensor) -> Tensor | None:
        """The memories, [left, C, H, W]; None if no row leaves one. The arguments are those of `remembered`."""
        if self.places is None:
            return None
        if self.rows is not None:
            x, x0, out, lines = (each.index_select(0, self.rows) for each in (x, x0, out, lines))
        return remembered(x, x0, out, lines)


_NOTHING = Recall()


class Memories:
    """A ring of three memories for each slot. A row's number of memories so far says which is which.

    So nothing is moved when a row remembers, and nothing is cleared for the next row of the slot.

    Args:
        values: float32 [1 + 3·slots, C, H, W]. The first stays 0, for what is not there.
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

    def recall(self, slots: Sequence[int], steps: Sequence[Step], x0: Tensor, index: Tensor) -> Recall:
        """What the lines of a pass read, and where they leave what they leave.

        Args:
            x0: the last estimates of all slots.
            index: the slots, on the device.
        """
        match max([step.kept for step in steps]):
            case Kept.NOWHERE:
                return _NOTHING
            case Kept.AS_X0:
                return Recall([x0.index_select(0, index)])
            case _:
                return self._of_rings(slots, steps, x0)

    def keep(self, places: Tensor, memories: Tensor) -> None:
        """Keep memories, [left, C, H, W], at their places, int64 [left]."""
        self._values.index_copy_(0, places, memories)

    def _of_rings(self, slots: Sequence[int], steps: Sequence[Step], x0: Tensor) -> Recall:
        depth = max(step.reads for step in steps)
        read = [
            _place(slot, step.remembered - back)
            if step.kept == Kept.IN_RING and back <= min(step.reads, step.remembered)
            else 0
            for back in range(1, depth + 1)
            for slot, step in zip(slots, steps, strict=True)
        ]
        leave = [row for row, step in enumerate(steps) if step.kept == Kept.IN_RING and step.remembers]
        recent = [row for row, step in enumerate(steps) if step.kept == Kept.AS_X0]
        memories = list(self._gathered(read).view(depth, len(steps), *x0.shape[1:]).unbind()) if read else []
        if recent:
            of_slots = x0.index_select(0, self._send([slots[row] for row in recent]))
            memories[0] = memories[0].index_copy(0, self._send(recent), of_slots)
        return Recall(
            memories,
            self._send(leave) if len(leave) < len(steps) else None,
            self._send([_place(slots[row], steps[row].remembered) for row in leave]) if leave else None,
        )

    def _gathered(self, places: list[int]) -> Tensor:
        return self._values.index_select(0, self._send(places))

    def _send(self, numbers: list[int]) -> Tensor:
        return self._backend.send(torch.from_numpy(np.array(numbers, np.int64)))


def _place(slot: int, number: int) -> int:
    """The place of a row's memory, counted from its first."""
    return 1 + _DEPTH * slot + number % _DEPTH
