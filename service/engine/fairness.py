"""How clients share the places of the queue. Pure Python.

Free places go to the first client that asks. In a full queue, a client that holds its share gets no more places, and a
client that holds less still gets in. So no client can lock out the others.
"""

from collections import Counter
from typing import Literal


class Places:
    """How many places each client holds.

    Args:
        total: places; clients that hold less than their share get up to an eighth more.
        clients: the least number of clients among which places are shared.

    Attributes:
        total: as above.
    """

    def __init__(self, total: int, clients: int = 1) -> None:
        self.total = total
        self._at_most = total + -(-total // 8)
        self._clients = clients
        self._held: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        return self._held.total()

    def refusal(self, client: str) -> Literal["share", "full"] | None:
        """Why a client gets no place: the client holds its share of a full queue, or no place is left."""
        if self.taken < self.total:
            return None
        clients = max(self._clients, len(self._held.keys() | {client}))
        if clients > 1 and self._held[client] >= self.total / clients:
            return "share"
        return None if clients > 1 and self.taken < self._at_most else "full"

    def take(self, client: str) -> None:
        self._held[client] += 1

    def give_back(self, client: str) -> None:
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
