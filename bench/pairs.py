"""Measure two things in turn, pair by pair, so that a slow moment of the machine meets both."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Quartiles(NamedTuple):
    median: float
    lower: float
    upper: float


def quartiles(values: list[float]) -> Quartiles:
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, lower, upper)


@dataclass
class Pairs:
    """Rates of a first and a second thing, an entry a pair."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)

    def measure(self, first: Callable[[], float], second: Callable[[], float]) -> None:
        """Measure both once more. The order alternates from pair to pair."""
        if len(self.first) % 2:
            self.second.append(second())
            self.first.append(first())
        else:
            self.first.append(first())
            self.second.append(second())

    @property
    def ratios(self) -> Quartiles:
        """The second rate relative to the first, in each pair."""
        return quartiles([second / first for first, second in zip(self.first, self.second, strict=True)])
