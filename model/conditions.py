"""What rows are given beside x: embeddings of timesteps and of conditions, kept on the device, each once."""

from collections.abc import Collection, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from model.backends.backend import Backend
from model.nets.embedder import Embedder
from model.rows import Condition

Key = TypeVar("Key", bound=Hashable)

_FIRST = 64  # places of a new shelf
_BYTES = 32 * 2**20  # of a shelf, unless more vectors are in use


class Conditions:
    """The embeddings of one network, for the runners of all groups on one device. One thread makes all calls.

    A timestep's embedding is computed when a pass first needs it, alone, so its bits do not depend on other rows. A
    condition's embedding is kept as long as a row holds it, and longer while there is room.

    Args:
        embedder: on the backends' device.
        backend: copies numbers to the device.
        no_label: the label of conditions without one; None if the network has no such label.
    """

    def __init__(self, embedder: Embedder, backend: Backend, no_label: int | None) -> None:
        self._embedder = embedder
        self._backend = backend
        self._no_label = no_label
        most = max(_FIRST, _BYTES // (4 * embedder.dim))
        self._times = Shelf[float](embedder.dim + 1, backend.device, most)  # with the timestep itself
        self._conditions = Shelf[Condition](embedder.dim, backend.device, most)
        self._held: dict[Condition, int] = {}  # how often each condition is held

    @torch.inference_mode()
    def hold(self, conditions: Sequence[Condition]) -> list[int]:
        """Keep the conditions of a row until they are dropped. Returns their indexes. If this raises, none is held."""
        for condition in conditions:
            self._held[condition] = self._held.get(condition, 0) + 1
        try:
            return [self._index(condition) for condition in conditions]
        except BaseException:
            self.drop(conditions)
            raise

    def drop(self, conditions: Sequence[Condition]) -> None:
        """Undo one `hold`."""
        for condition in conditions:
            self._held[condition] -= 1
            if not self._held[condition]:
                del self._held[condition]
                self._conditions.renew(condition)

    def _index(self, condition: Condition) -> int:
        index = self._conditions.find(condition)
        return self._conditions.put(condition, self._embedded(condition), self._held) if index is None else index

    @torch.inference_mode()
    def times(self, timesteps: Sequence[float]) -> list[int]:
        """The indexes of timesteps. They are valid until the next call."""
        return [self._time(timestep, timesteps) for timestep in timesteps]

    def inputs(self, times: Tensor, conditions: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """What a pass is given beside x.

        Args:
            times, conditions: indexes of each row's timestep and condition, int64 [B] on the device.

        Returns:
            The network's inputs by name; and the numbers by which the network's output must be divided, [B, 1, 1, 1],
            or None.
        """
        known = self._times.values.index_select(0, times)
        emb = known.narrow(1, 0, self._embedder.dim)
        if self._embedder.of_label is not None:
            emb = emb + self._conditions.values.index_select(0, conditions)
        divisor = known.select(1, self._embedder.dim).view(-1, 1, 1, 1) if self._embedder.divides_output else None
        return {"emb": emb}, divisor

    def _time(self, timestep: float, in_use: Collection[float]) -> int:
        index = self._times.find(timestep)
        return self._times.put(timestep, self._embedded_time(timestep), in_use) if index is None else index

    def _embedded_time(self, timestep: float) -> Tensor:
        t = self._backend.send(torch.tensor([timestep], dtype=torch.float32))
        return torch.cat([self._embedder.of_time(t).squeeze(0), t])

    def _embedded(self, condition: Condition) -> Tensor:
        label = self._no_label if condition.label is None else condition.label
        if label is None or self._embedder.of_label is None:
            return torch.zeros(self._embedder.dim, device=self._backend.device)
        return self._embedder.of_label(self._backend.send(torch.tensor([label]))).squeeze(0)


class Shelf(Generic[Key]):
    """Vectors on the device by key, in bounded memory. The vector that was renewed least recently makes room.

    Args:
        dim: channels of a vector.
        most: vectors. There are more only while all of them are in use.

    Attributes:
        values: the vectors, float32 [places, dim].
    """

    def __init__(self, dim: int, device: torch.device, most: int) -> None:
        self.values = torch.zeros((min(_FIRST, most), dim), device=device)
        self._most = most
        self._index: dict[Key, int] = {}  # least recently renewed first
        self._free = list(reversed(range(len(self.values))))

    def __len__(self) -> int:
        return len(self._index)

    def find(self, key: Key) -> int | None:
        """The index of a key's vector; None if there is none."""
        return self._index.get(key)

    def put(self, key: Key, vector: Tensor, in_use: Collection[Key]) -> int:
        """Keep a vector, [dim], and return its index. Vectors in use stay where they are."""
        if not self._free:
            self._make_room(in_use)
        index = self._free[-1]
        place = torch.full((1,), index, device=self.values.device)
        self.values.index_copy_(0, place, vector.unsqueeze(0))
        self._index[key] = index
        self._free.pop()
        return index

    def renew(self, key: Key) -> None:
        """Note that a key, if there is one, was needed just now."""
        if key in self._index:
            self._index[key] = self._index.pop(key)

    def _make_room(self, in_use: Collection[Key]) -> None:
        places = len(self.values)
        if places >= self._most:
            oldest = next((key for key in self._index if key not in in_use), None)
            if oldest is not None:
                self._free.append(self._index.pop(oldest))
                return
        self.values = torch.cat([self.values, torch.zeros_like(self.values)])
        self._free = list(reversed(range(places, 2 * places)))
