"""The runner: the state of rows in flight, and their steps: gather → forward → update → scatter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.backends.backend import Backend
from model.beginnings import beginning
from model.conditions import Conditions
from model.memories import Memories, Recall
from model.noise import draw, generator
from model.rows import Forward, Reading, Row
from model.samplers import Step
from model.update import blended, guided, rescaled, update


class _Slot:
    """A row in flight, and the inputs of its present step so far."""

    def __init__(self, row: Row, rng: torch.Generator, conditions: list[int], kept: Tensor | None) -> None:
        self.row = row
        self.rng = rng
        self.conditions = conditions  # the indexes of the row's branches
        self.kept = kept  # see model.beginnings.Beginning, on the device
        self.waiting: dict[int, Tensor] = {}  # predictions of the present step by branch, until all are there
        self.noise: Tensor | None = None  # of the present step, once drawn
        self.prediction: Tensor | None = None  # of the last step, if the row wants it


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The inputs of an update, on the device, except for predictions.

    Attributes:
        lines_of: the line of each row, by its slot.
        index: the slots, on the device.
        x, noise, lines, thresholded: see model.update.update.
        recall: the rows' memories.
        kept: what masks keep; None if no row has one.
    """

    lines_of: Mapping[int, int]
    index: Tensor
    x: Tensor
    recall: Recall
    noise: Tensor
    lines: Tensor
    thresholded: list[int]
    kept: "_Kept | None"


class _Kept(NamedTuple):
    """What masks keep in a pass. See model.update.blended.

    Attributes:
        rows: the numbers of the rows with a mask, int64 [masked].
        kept, levels: of these rows.
    """

    rows: Tensor
    kept: Tensor
    levels: Tensor


class SlotRunner:
    """Runs mixed rows of one group through one backend. Implements model.rows.Runner.

    The CPU knows everything that a pass needs, and sends it to the device. Only images are read back.

    Args:
        backend: the network.
        sample_shape: (C, H, W).
        conditions: what rows are given beside x. Runners of other groups may share it.
        slots: initial number of slots. It doubles when all are taken.
        inpaints: whether the network takes a mask and the masked image's latents beside x. Each row must have them.
    """

    def __init__(
        self,
        backend: Backend,
        sample_shape: tuple[int, int, int],
        conditions: Conditions,
        slots: int,
        inpaints: bool = False,
    ) -> None:
        self._backend = backend
        self._shape = sample_shape
        self._conditions = conditions
        self._slots: dict[int, _Slot] = {}
        self._free = list(reversed(range(slots)))
        self._x = torch.zeros((slots, *sample_shape), device=backend.device)
        self._x0 = torch.zeros_like(self._x)
        # A mask and the masked image's latents; no channels for networks that do not inpaint.
        C, *size = sample_shape
        self._beside = torch.zeros((slots, 1 + C if inpaints else 0, *size), device=backend.device)
        self._memories = Memories.of(slots, sample_shape, backend)
        self._no_noise = torch.zeros((1, *sample_shape), device=backend.device)

    @property
    def widths(self) -> Sequence[int]:
        return self._backend.widths

    @torch.inference_mode()
    def admit(self, row: Row) -> int:
        if not self._free:
            self._double()
        rng = generator(row.seed)
        begun = beginning(row, rng, self._shape)
        slot = self._free[-1]
        index = self._send([slot])
        self._x.index_copy_(0, index, self._backend.send(begun.x[None]))
        self._x0.select(0, slot).zero_()
        if self._inpaints:
            if begun.beside is None:
                raise ValueError("this network inpaints, and the row has no masked image")
            self._beside.index_copy_(0, index, self._backend.send(begun.beside[None]))
        kept = None if begun.kept is None else self._backend.send(begun.kept)
        # A row that cannot be admitted takes no slot, and holds no condition.
        self._slots[slot] = _Slot(row, rng, self._conditions.hold(row.branches), kept)
        self._free.pop()
        return slot

    @property
    def _inpaints(self) -> bool:
        return self._beside.shape[1] > 0

    def _double(self) -> None:
        slots = len(self._x)
        states = self._x, self._x0, self._beside
        doubled = [torch.cat([state, torch.zeros_like(state)]) for state in states]
        memories = self._memories.doubled()  # all, or none if memory runs out
        (self._x, self._x0, self._beside), self._memories = doubled, memories
        self._free = list(reversed(range(slots, 2 * slots)))

    @torch.inference_mode()
    def step(self, forwards: Sequence[Forward]) -> None:
        slots = [self._slots[f.slot] for f in forwards]
        index, times, conditions = self._send(
            [f.slot for f in forwards],
            self._conditions.times(
                [
                    (slot.row.table.steps[f.line].timestep, slot.row.branches[f.branch].w)
                    for f, slot in zip(forwards, slots, strict=True)
                ]
            ),
            [slot.conditions[f.branch] for f, slot in zip(forwards, slots, strict=True)],
        ).unbind()
        x = self._x.index_select(0, index)
        inputs, divisor = self._conditions.inputs(times, conditions)
        seen = torch.cat([x, self._beside.index_select(0, index)], dim=1) if self._inpaints else x
        wait = self._backend.start({"x": seen, **inputs})

        complete = self._complete(forwards)
        # While the device computes:
        gathered = self._gathered(complete, index, x) if complete else None

        predictions = wait() if divisor is None else wait() / divisor
        kept = [(f, predictions.select(0, i).clone()) for i, f in enumerate(forwards) if f.slot not in complete]
        if gathered is not None:
            self._take(gathered, forwards, predictions)
        for f, prediction in kept:
            self._slots[f.slot].waiting[f.branch] = prediction

    def _complete(self, forwards: Sequence[Forward]) -> dict[int, int]:
        """The lines of rows that complete a step with these forward rows, by their slots."""
        ran: dict[int, int] = {}
        lines: dict[int, int] = {}
        for slot, _, line in forwards:
            ran[slot] = ran.get(slot, len(self._slots[slot].waiting)) + 1
            lines[slot] = line
        return {slot: line for slot, line in lines.items() if ran[slot] == self._slots[slot].row.forwards[line]}

    def _gathered(self, complete: Mapping[int, int], index: Tensor, x: Tensor) -> _Inputs:
        """The inputs of the rows' steps. `index` and `x` are the pass's, and are reused if the rows are the same."""
        if len(complete) != len(x):
            index = self._send([*complete])
            x = self._x.index_select(0, index)
        slots = [self._slots[i] for i in complete]
        steps = [slot.row.table.steps[line] for slot, line in zip(slots, complete.values(), strict=True)]
        return _Inputs(
            complete,
            index,
            x,
            self._memories.recall([*complete], steps, self._x0, index),
            self._noise(slots, steps),
            self._backend.send(torch.from_numpy(np.array([step.line for step in steps]))),
            [i for i, step in enumerate(steps) if step.is_thresholded],
            self._kept(complete),
        )

    def _kept(self, complete: Mapping[int, int]) -> _Kept | None:
        """What masks keep of the rows' images, at the levels after their lines."""
        rows: list[int] = []
        kept, levels = list[Tensor](), []
        for row, (i, line) in enumerate(complete.items()):
            slot = self._slots[i]
            if slot.kept is not None:
                rows.append(row)
                kept.append(slot.kept)
                levels.append(slot.row.table.levels[line + 1])
        if not rows:
            return None
        sent = self._backend.send(torch.from_numpy(np.array(levels, np.float32)))
        return _Kept(self._send(rows), torch.stack(kept), sent)

    def _noise(self, slots: Sequence[_Slot], steps: Sequence[Step]) -> Tensor:
        """The noise of the rows' steps, [B, C, H, W] on the device; 0 for rows without noise."""
        if not any(step.is_noisy for step in steps):
            return self._no_noise.expand(len(slots), *self._shape)
        noise = torch.zeros((len(slots), *self._shape))
        for i, (slot, step) in enumerate(zip(slots, steps, strict=True)):
            if step.is_noisy:
                if slot.noise is None:
                    slot.noise = draw(slot.rng, self._shape)
                noise[i] = slot.noise
        return self._backend.send(noise)

    def _take(self, inputs: _Inputs, forwards: Sequence[Forward], predictions: Tensor) -> None:
        slots = [self._slots[i] for i in inputs.lines_of]
        out = self._guided(inputs.lines_of, forwards, predictions)
        wanted = {i: out.select(0, i).clone() for i, slot in enumerate(slots) if slot.row.model_output}
        recall = inputs.recall
        x, x0 = update(inputs.x, out, recall.read, inputs.noise, inputs.lines, inputs.thresholded)
        left = recall.left(inputs.x, x0, out, inputs.lines)
        if inputs.kept is not None:
            rows, kept, levels = inputs.kept
            x = x.index_copy(0, rows, blended(x.index_select(0, rows), kept, levels))
        # A pass that raises before this line has changed no row, and can be run again.
        self._x.index_copy_(0, inputs.index, x)
        self._x0.index_copy_(0, inputs.index, x0)
        if recall.places is not None and left is not None:
            self._memories.keep(recall.places, left)
        for i, prediction in wanted.items():
            slots[i].prediction = prediction
        for slot in slots:
            slot.waiting.clear()
            slot.noise = None

    def _guided(self, complete: Mapping[int, int], forwards: Sequence[Forward], predictions: Tensor) -> Tensor:
        """One prediction for each row that takes its step, from this pass and from predictions that waited."""
        if len(complete) == len(forwards) and not any(self._slots[i].waiting for i in complete):
            return predictions
        waiting = {(i, branch): out for i in complete for branch, out in self._slots[i].waiting.items()}
        if waiting:
            predictions = torch.cat([predictions, torch.stack(list(waiting.values()))])
        place = {key: i for i, key in enumerate([*((f.slot, f.branch) for f in forwards), *waiting])}
        out = predictions.index_select(0, self._send([place[i, 0] for i in complete]))
        with_guidance: dict[int, list[tuple[int, int]]] = {}  # by the number of predictions: place in `out`, and slot
        for row, (slot, line) in enumerate(complete.items()):
            number = self._slots[slot].row.forwards[line]
            if number > 1:
                with_guidance.setdefault(number, []).append((row, slot))
        for number, rows in with_guidance.items():
            own_places, *places = self._send(
                [row for row, _ in rows], *([place[slot, branch] for _, slot in rows] for branch in range(number))
            ).unbind()
            scale = self._backend.send(torch.tensor([self._slots[slot].row.guidance_scale for _, slot in rows]))
            # The learned variance follows the image's channels. It is that of the row's own condition.
            own, *variance = torch.split(predictions.index_select(0, places[0]), self._shape[0], dim=1)
            others = [predictions.index_select(0, index).narrow(1, 0, self._shape[0]) for index in places[1:]]
            combined = self._rescaled(guided([own, *others], scale), own, [slot for _, slot in rows])
            out = out.index_copy(0, own_places, torch.cat([combined, *variance], dim=1))
        return out

    def _rescaled(self, combined: Tensor, own: Tensor, slots: Sequence[int]) -> Tensor:
        """Guided predictions, [B, C, H, W], rescaled in rows with guidance_rescale."""
        factors = [self._slots[slot].row.guidance_rescale for slot in slots]
        which = [i for i, factor in enumerate(factors) if factor]
        if not which:
            return combined
        index, factor = self._send(which), self._backend.send(torch.tensor([factors[i] for i in which]))
        some = rescaled(combined.index_select(0, index), own.index_select(0, index), factor)
        return combined.index_copy(0, index, some)

    def _send(self, *numbers: list[int]) -> Tensor:
        """Copy lists of one length to the device, int64: one list as [N], several as [lists, N]."""
        return self._backend.send(torch.from_numpy(np.array(numbers[0] if len(numbers) == 1 else numbers)))

    def read(self, slot: int) -> Reading:
        state = self._slots[slot]
        x = self._x[slot] if state.prediction is None else state.prediction
        return Reading(x.cpu().numpy().copy(), self._x0[slot].cpu().numpy().copy())

    def release(self, slot: int) -> None:
        row = self._slots.pop(slot).row
        self._free.append(slot)
        self._conditions.drop(row.branches)
