"""How clients share the places of the queue. Pure Python.

While places are free, the first to come has them. In a full queue a client that holds its share gets no more, and a
client that holds less still gets in. So others are served, however much one client sends.
"""

from collections import Counter
from typing import Literal


class Places:
    """Who holds how many.

    Args:
        total: places; up to an eighth more are for clients that hold less than their share.
        clients: how many there are at least.

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
        """Why a client gets no other place: it holds its share of a full queue, or there is none."""
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
