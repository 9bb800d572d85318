"""The runner: state of the rows in flight, and their steps: gather → forward → update → scatter."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.backends.backend import Backend
from model.noise import draw, generator
from model.rows import Forward, Reading, Row
from model.samplers import Column
from model.update import guided, update


class _Slot:
    """A row in flight: how far it is, and what of the present step has come in."""

    def __init__(self, row: Row, rng: torch.Generator) -> None:
        self.row = row
        self.rng = rng
        lines = row.table.lines.astype(np.float32)
        self.lines = torch.from_numpy(lines)  # [N, len(Column)]
        self.is_noisy: list[bool] = (lines[:, Column.D] != 0).tolist()  # by step
        self.is_thresholded: list[bool] = (lines[:, Column.QUANTILE] != 0).tolist()
        self.timesteps: list[int] = row.table.timesteps.tolist()
        self.step = 0
        self.branches: set[int] = set()
        self.noise: Tensor | None = None  # of the present step, once it is drawn


class SlotRunner:
    """Runs rows of any mix through one backend. Implements model.rows.Runner.

    What a pass needs is known on the CPU, and is sent to the device; nothing is read back but images.

    Args:
        backend: the network.
        image_shape: (C, H, W).
        out_channels: of what the network predicts: C, or 2·C with a learned variance.
        no_label: the label of rows without one.
        slots: for rows in flight. When all are taken, there will be twice as many.
    """

    def __init__(
        self, backend: Backend, image_shape: tuple[int, int, int], out_channels: int, no_label: int, slots: int
    ) -> None:
        self._backend = backend
        self._shape = image_shape
        self._no_label = no_label
        self._slots: dict[int, _Slot] = {}
        self._free = list(reversed(range(slots)))
        self._x = torch.zeros((slots, *image_shape), device=backend.device)
        self._x0 = torch.zeros((slots, *image_shape), device=backend.device)
        # First the predictions of all slots with their own label, then those without.
        self._out = torch.zeros((2 * slots, out_channels, *image_shape[1:]), device=backend.device)
        self._branch = slots  # from a slot's first prediction to its second

    @property
    def widths(self) -> Sequence[int]:
        return self._backend.widths

    @torch.inference_mode()
    def admit(self, row: Row) -> int:
        if not self._free:
            self._double()
        rng = generator(row.seed)
        start = draw(rng, self._shape)
        if row.start is not None:
            start = torch.from_numpy(row.start)
        slot, state = self._free[-1], _Slot(row, rng)
        self._x.index_copy_(0, self._send([slot]), self._backend.send(start[None]))
        self._x0.select(0, slot).zero_()
        self._slots[slot] = state  # a row that cannot be admitted has taken nothing
        self._free.pop()
        return slot

    def _double(self) -> None:
        slots = len(self._x)
        own, without_label = self._out.chunk(2)
        x, x0 = (torch.cat([state, torch.zeros_like(state)]) for state in (self._x, self._x0))
        out = torch.cat([own, torch.zeros_like(own), without_label, torch.zeros_like(own)])
        self._x, self._x0, self._out, self._branch = x, x0, out, 2 * slots  # all, or for want of memory none
        self._free = list(reversed(range(slots, 2 * slots)))

    @torch.inference_mode()
    def step(self, forwards: Sequence[Forward]) -> None:
        slots = [self._slots[f.slot] for f in forwards]
        index, places, timesteps, labels = self._send(
            [f.slot for f in forwards],
            [f.slot + f.branch * self._branch for f in forwards],
            [slot.timesteps[slot.step] for slot in slots],
            [self._label(slot.row, f.branch) for f, slot in zip(forwards, slots, strict=True)],
        )
        wait = self._backend.start(self._x.index_select(0, index), timesteps, labels)

        complete = self._complete(forwards)
        noise = self._noise(complete)  # drawn while the device computes

        self._out.index_copy_(0, places, wait())
        for f, slot in zip(forwards, slots, strict=True):
            slot.branches.add(f.branch)
        if complete:
            self._update(complete, noise)

    def _complete(self, forwards: Sequence[Forward]) -> list[int]:
        """The slots of rows that take their step with these forward rows."""
        branches: dict[int, set[int]] = {}
        for slot, branch in forwards:
            branches.setdefault(slot, set(self._slots[slot].branches)).add(branch)
        return [slot for slot, run in branches.items() if len(run) == self._slots[slot].row.forwards_per_step]

    def _noise(self, complete: list[int]) -> Tensor:
        """The noise of rows that take their step, [B, C, H, W] on the device; 0 for those that need none."""
        noise = torch.zeros((len(complete), *self._shape))
        for i, slot in enumerate(self._slots[i] for i in complete):
            if slot.is_noisy[slot.step]:
                if slot.noise is None:
                    slot.noise = draw(slot.rng, self._shape)
                noise[i] = slot.noise
        return self._backend.send(noise)

    def _update(self, complete: list[int], noise: Tensor) -> None:
        slots = [self._slots[i] for i in complete]
        index = self._send(complete)
        out = self._out.index_select(0, index)
        with_guidance = [i for i, slot in enumerate(slots) if slot.row.forwards_per_step == 2]
        if with_guidance:
            rows, places = self._send(with_guidance, [complete[i] + self._branch for i in with_guidance])
            scale = self._backend.send(torch.tensor([slots[i].row.guidance_scale for i in with_guidance]))
            # A learned variance, behind the image's channels, is that of the row's own label.
            own, *variance = torch.split(out.index_select(0, rows), self._shape[0], dim=1)
            unconditional = self._out.index_select(0, places).narrow(1, 0, self._shape[0])
            out = out.index_copy(0, rows, torch.cat([guided(own, unconditional, scale), *variance], dim=1))

        lines = self._backend.send(torch.stack([slot.lines[slot.step] for slot in slots]))
        thresholded = [i for i, slot in enumerate(slots) if slot.is_thresholded[slot.step]]
        x, x0 = self._x.index_select(0, index), self._x0.index_select(0, index)
        x, x0 = update(x, out, x0, noise, lines, thresholded)
        # Until here a pass that raises has changed no row, and can be run again.
        self._x.index_copy_(0, index, x)
        self._x0.index_copy_(0, index, x0)
        if with_guidance:
            self._out.index_copy_(0, index, out)  # for rows that want it
        for slot in slots:
            slot.step += 1
            slot.branches.clear()
            slot.noise = None

    def _send(self, *numbers: list[int]) -> Tensor:
        """Bring lists of one length to the device, int64; one list as [N], several as [lists, N]."""
        return self._backend.send(torch.tensor(numbers[0] if len(numbers) == 1 else numbers))

    def read(self, slot: int) -> Reading:
        state = self._slots[slot]
        done = state.step == len(state.row.table)
        x = self._out[slot] if state.row.model_output and done else self._x[slot]
        return Reading(x.cpu().numpy().copy(), self._x0[slot].cpu().numpy().copy())

    def release(self, slot: int) -> None:
        del self._slots[slot]
        self._free.append(slot)

    def _label(self, row: Row, branch: int) -> int:
        return self._no_label if row.label is None or branch == 1 else row.label
