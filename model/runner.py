"""The runner: state of the rows in flight, and their steps: gather → forward → update → scatter."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from model.noise import draw, generator
from model.rows import Forward, Reading, Row
from model.samplers import Column
from model.update import guided, update


class Backend(Protocol):
    """The network on some device, in some precision."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that passes really run at, rising."""

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """All that can move a bit of the output, by name."""

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Map x float32 [B, C, H, W], timesteps int64 [B] and labels int64 [B] to float32 [B, out_channels, H, W].

        B is at most the last of `widths`. A row's output does not depend on the others.
        """


class _Slot:
    """A row in flight: how far it is, and what of the present step has come in."""

    def __init__(self, row: Row, rng: torch.Generator) -> None:
        self.row = row
        self.rng = rng
        self.lines = torch.from_numpy(row.table.lines).float()  # [N, len(Column)]
        self.timesteps: list[int] = row.table.timesteps.tolist()
        self.step = 0
        self.branches: set[int] = set()


class SlotRunner:
    """Runs rows of any mix through one backend. Implements model.rows.Runner.

    Args:
        backend: the network.
        image_shape: (C, H, W).
        out_channels: of what the network predicts: C, or 2·C with a learned variance.
        no_label: the label of rows without one.
        slots: the most rows in flight at once.
    """

    def __init__(
        self, backend: Backend, image_shape: tuple[int, int, int], out_channels: int, no_label: int, slots: int
    ) -> None:
        self._backend = backend
        self._shape = image_shape
        self._no_label = no_label
        self._slots: dict[int, _Slot] = {}
        self._free = list(reversed(range(slots)))
        state = (slots, *image_shape)
        self._x = torch.zeros(state, device=backend.device)
        self._x0 = torch.zeros(state, device=backend.device)
        self._out = torch.zeros((2, slots, out_channels, *image_shape[1:]), device=backend.device)  # by branch

    @property
    def widths(self) -> Sequence[int]:
        return self._backend.widths

    @torch.inference_mode()
    def admit(self, row: Row) -> int:
        if not self._free:
            raise RuntimeError(f"all {len(self._slots)} slots are taken")
        rng = generator(row.seed)
        start = draw(rng, self._shape)
        if row.start is not None:
            start = torch.from_numpy(row.start)
        index = self._free.pop()
        self._slots[index] = _Slot(row, rng)
        self._x[index] = start
        self._x0[index] = 0
        return index

    @torch.inference_mode()
    def step(self, forwards: Sequence[Forward]) -> None:
        slots = [self._slots[f.slot] for f in forwards]
        index = torch.tensor([f.slot for f in forwards])
        timesteps = torch.tensor([slot.timesteps[slot.step] for slot in slots])
        labels = torch.tensor([self._label(slot.row, f.branch) for slot, f in zip(slots, forwards, strict=True)])
        branches = torch.tensor([f.branch for f in forwards])

        out = self._backend.forward(self._x[index], timesteps, labels)
        self._out[branches, index] = out

        for slot, f in zip(slots, forwards, strict=True):
            slot.branches.add(f.branch)
        complete = [
            i
            for i in dict.fromkeys(f.slot for f in forwards)
            if len(self._slots[i].branches) == self._slots[i].row.forwards_per_step
        ]
        if complete:
            self._update(complete)

    def _update(self, complete: list[int]) -> None:
        slots = [self._slots[i] for i in complete]
        index = torch.tensor(complete)
        device = self._backend.device
        out = self._out[0, index]
        with_guidance = [i for i, slot in enumerate(slots) if slot.row.forwards_per_step == 2]
        if with_guidance:
            scale = torch.tensor([slots[i].row.guidance_scale for i in with_guidance], device=device)
            channels = self._shape[0]  # a learned variance is that of the row's own label
            unguided = self._out[1, index[with_guidance], :channels]
            out[with_guidance, :channels] = guided(out[with_guidance, :channels], unguided, scale)
            self._out[0, index] = out

        lines = torch.stack([slot.lines[slot.step] for slot in slots])
        noise = torch.zeros((len(slots), *self._shape))
        for i, slot in enumerate(slots):
            if lines[i, Column.D] != 0:
                noise[i] = draw(slot.rng, self._shape)

        x, x0 = update(self._x[index], out, self._x0[index], noise.to(device), lines.to(device))
        self._x[index] = x
        self._x0[index] = x0
        for slot in slots:
            slot.step += 1
            slot.branches.clear()

    def read(self, slot: int) -> Reading:
        state = self._slots[slot]
        done = state.step == len(state.row.table)
        x = self._out[0, slot] if state.row.model_output and done else self._x[slot]
        return Reading(x.cpu().numpy().copy(), self._x0[slot].cpu().numpy().copy())

    def release(self, slot: int) -> None:
        del self._slots[slot]
        self._free.append(slot)

    def _label(self, row: Row, branch: int) -> int:
        return self._no_label if row.label is None or branch == 1 else row.label
