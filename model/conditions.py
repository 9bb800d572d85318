"""What rows are given beside x, kept on the device, each once: embeddings of timesteps and conditions, and contexts."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.backends.backend import Backend
from model.nets.embedder import Embedder
from model.rows import Condition, Context

Key = TypeVar("Key", bound=Hashable)
Time = tuple[float, float | None]  # a timestep, and the w of its row (model.rows.Condition.w)

_FIRST = 64  # places of a new shelf, unless they take more bytes than these
_FIRST_BYTES = 2**20
_BYTES = 32 * 2**20  # of a shelf, unless more is in use


class Conditions:
    """The embeddings and contexts of one network, for the runners of all groups on one device.

    One thread makes all calls. The embedding of a timestep, and of w where the network has guidance embedded, is
    computed when a pass first needs it, alone, so its bits do not depend on other rows. What a condition gives is kept
    as long as a row holds the condition, and longer while there is room.

    Args:
        embedder: on the backends' device.
        backend: copies numbers to the device.
        no_label: the label of conditions without one; None if the network has no such label.
        text_length: tokens of a context; None for a network without text.
    """

    def __init__(
        self, embedder: Embedder, backend: Backend, no_label: int | None, text_length: int | None = None
    ) -> None:
        self._embedder = embedder
        self._backend = backend
        self._no_label = no_label
        self._text_length = text_length
        of_condition: dict[str, tuple[int, ...]] = {}
        if embedder.of_label is not None or embedder.of_added is not None:
            of_condition["emb"] = (embedder.dim,)
        if text_length is not None:
            assert embedder.context_dim is not None
            of_condition["context"] = text_length, embedder.context_dim
        self._times = Shelf[Time]({"emb": (embedder.dim,), "t": (1,)}, backend.device)
        self._conditions = Shelf[Condition](of_condition, backend.device)
        self._held: dict[Condition, int] = {}  # how often each condition is held

    @torch.inference_mode()
    def hold(self, conditions: Sequence[Condition]) -> list[int]:
        """Keep the conditions of a row until they are dropped. Returns their indexes. If this raises, none is held."""
        kept = [_kept(condition) for condition in conditions]
        for condition in kept:
            self._held[condition] = self._held.get(condition, 0) + 1
        try:
            return [self._index(key, condition) for key, condition in zip(kept, conditions, strict=True)]
        except BaseException:
            self.drop(conditions)
            raise

    def drop(self, conditions: Sequence[Condition]) -> None:
        """Undo one `hold`."""
        for condition in map(_kept, conditions):
            self._held[condition] -= 1
            if not self._held[condition]:
                del self._held[condition]
                self._conditions.renew(condition)

    def _index(self, key: Condition, condition: Condition) -> int:
        index = self._conditions.find(key)
        return self._conditions.put(key, self._given(condition), self._held) if index is None else index

    @torch.inference_mode()
    def times(self, times: Sequence[Time]) -> list[int]:
        """The indexes of timesteps, each with its row's w. They are valid until the next call."""
        return [self._time(time, times) for time in times]

    def inputs(self, times: Tensor, conditions: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a pass is given beside x.

        Args:
            times, conditions: indexes of each row's timestep and condition, int64 [B] on the device.

        Returns:
            The network's inputs by name; and the numbers by which the network's output must be divided, [B, 1, 1, 1],
            or None.
        """
        of_times, of_conditions = self._times.values, self._conditions.values
        inputs = {"emb": of_times["emb"].index_select(0, times)}
        if "emb" in of_conditions:
            inputs["emb"] = inputs["emb"] + of_conditions["emb"].index_select(0, conditions)
        if "context" in of_conditions:
            inputs["context"] = of_conditions["context"].index_select(0, conditions)
        if not self._embedder.divides_output:
            return inputs, None
        return inputs, of_times["t"].index_select(0, times).view(-1, 1, 1, 1)

    def _time(self, time: Time, in_use: Collection[Time]) -> int:
        index = self._times.find(time)
        return self._times.put(time, self._given_by(*time), in_use) if index is None else index

    def _given_by(self, timestep: float, w: float | None) -> dict[str, Tensor]:
        t = self._sent(timestep)
        return {"emb": self._embedder.of_time(t, None if w is None else self._sent(w)).squeeze(0), "t": t}

    def _sent(self, number: float) -> Tensor:
        return self._backend.send(torch.tensor([number], dtype=torch.float32))

    def _given(self, condition: Condition) -> dict[str, Tensor]:
        """What a condition gives, by the names of its shelf."""
        given = {}
        if "emb" in self._conditions.values:
            given["emb"] = self._emb(condition).squeeze(0)
        if "context" in self._conditions.values:
            tokens = self._backend.send(torch.from_numpy(self._context(condition).tokens))
            of_text = self._embedder.of_text
            given["context"] = tokens if of_text is None else of_text(tokens.unsqueeze(0)).squeeze(0)
        return given

    def _emb(self, condition: Condition) -> Tensor:
        """The sum of the embeddings of a condition's label, pooled text and sizes, [1, D]."""
        of_label, of_added = self._embedder.of_label, self._embedder.of_added
        label = self._no_label if condition.label is None else condition.label
        parts = []
        if of_label is not None and label is not None:
            parts.append(of_label(self._backend.send(torch.tensor([label]))))
        if of_added is not None:
            pooled = self._context(condition).pooled
            if pooled is None or condition.time_ids is None:
                raise ValueError(f"a condition has no {'pooled text' if pooled is None else 'time_ids'}")
            pooled_text = self._backend.send(torch.from_numpy(pooled[None]))
            parts.append(of_added(pooled_text, self._backend.send(torch.tensor([condition.time_ids]))))
        return reduce(torch.add, parts) if parts else torch.zeros((1, self._embedder.dim), device=self._backend.device)

    def _context(self, condition: Condition) -> Context:
        """What the text encoders make of a condition's text: zeros for no prompt."""
        if condition.text is None:
            embedder = self._embedder
            assert self._text_length is not None
            assert embedder.text_dim is not None
            pooled = None if embedder.pooled_dim is None else np.zeros(embedder.pooled_dim, np.float32)
            return Context(np.zeros((self._text_length, embedder.text_dim), np.float32), pooled)
        if condition.context is None:
            raise ValueError("a condition has no context")
        return condition.context


def _kept(condition: Condition) -> Condition:
    """The key of a condition's embedding and context. They depend neither on w nor on where the context is."""
    if condition.context is None and condition.w is None:
        return condition
    return replace(condition, context=None, w=None)


class Shelf(Generic[Key]):
    """Vectors on the device by key, in bounded memory. What was renewed least recently makes room.

    Args:
        shapes: of what is kept for each key, by name.
        most: keys. There are more only while all of them are in use. Default: as many as 32 MiB hold, at least 64.

    Attributes:
        places: for keys.
        values: float32 [places, *shape], by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device, most: int | None = None) -> None:
        of_a_key = max(1, 4 * sum(map(math.prod, shapes.values())))  # bytes
        self._most = max(_FIRST, _BYTES // of_a_key) if most is None else most
        self.places = min(_FIRST, self._most, max(1, _FIRST_BYTES // of_a_key))
        self.values = {name: torch.zeros((self.places, *shape), device=device) for name, shape in shapes.items()}
        self._device = device
        self._index: dict[Key, int] = {}  # least recently renewed first
        self._free = list(reversed(range(self.places)))

    def __len__(self) -> int:
        return len(self._index)

    def find(self, key: Key) -> int | None:
        """The index of a key; None if there is none."""
        return self._index.get(key)

    def put(self, key: Key, given: Mapping[str, Tensor], in_use: Collection[Key]) -> int:
        """Keep what is given, by name, and return its index. Keys in use stay where they are."""
        if not self._free:
            self._make_room(in_use)
        index = self._free[-1]
        place = torch.full((1,), index, device=self._device)
        for name, values in self.values.items():
            values.index_copy_(0, place, given[name].unsqueeze(0))
        self._index[key] = index
        self._free.pop()
        return index

    def renew(self, key: Key) -> None:
        """Note that a key, if there is one, was needed just now."""
        if key in self._index:
            self._index[key] = self._index.pop(key)

    def _make_room(self, in_use: Collection[Key]) -> None:
        if self.places >= self._most:
            oldest = next((key for key in self._index if key not in in_use), None)
            if oldest is not None:
                self._free.append(self._index.pop(oldest))
                return
        more = self.places if self.places >= self._most else min(self.places, self._most - self.places)
        self.values = {
            name: torch.cat([values, values.new_zeros((more, *values.shape[1:]))])
            for name, values in self.values.items()
        }
        self._free = list(reversed(range(self.places, self.places + more)))
        self.places += more
