"""Measuring passes at the start takes a bounded time, and the most important widths come first."""

from collections.abc import Sequence

import numpy as np
import pytest

from model.lines import Column
from model.rows import Forward, Group, Reading, Row
from model.samplers import StepTable
from service.engine.costs import Costs
from service.engine.stage_health import StageHealth
from service.engine.warm_up import by_importance, measure_passes

PROBE = Row(StepTable(np.zeros(1, np.int64), np.zeros((1, len(Column)))), 0, Group(8, 8))


class Machine:
    """A runner whose passes take seconds on its own clock."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.widths: Sequence[int] = sorted(seconds)
        self.now = 0.0
        self.passes: list[int] = []
        self.slots = 0

    def admit(self, row: Row) -> int:
        self.slots += 1
        return self.slots

    def step(self, forwards: Sequence[Forward]) -> None:
        self.passes.append(len(forwards))
        self.now += self.seconds[len(forwards)]

    def read(self, slot: int) -> Reading:
        raise NotImplementedError("nothing is read while passes are measured")

    def release(self, slot: int) -> None:
        self.slots -= 1

    def measured(self) -> dict[int, float]:
        return measure_passes(self, PROBE, StageHealth(self.clock), self.clock)

    def clock(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("widths", "order"),
    [
        ([1], [1]),
        ([1, 2], [1, 2]),
        ([1, 2, 4, 8, 16], [1, 16, 4, 2, 8]),
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 8, 4, 2, 6, 3, 5, 7]),
    ],
)
def test_the_ends_are_measured_first_and_then_the_middle_of_each_gap(widths: list[int], order: list[int]) -> None:
    assert by_importance(widths) == order


def test_a_fast_machine_is_measured_at_all_widths() -> None:
    table = {1: 0.01, 2: 0.012, 4: 0.02, 8: 0.03}
    machine = Machine(table)
    assert machine.measured() == pytest.approx(table)
    assert machine.slots == 0
    assert sorted(machine.passes) == sorted([*table] * 4)


def test_the_pass_that_may_compile_does_not_count() -> None:
    class Compiles(Machine):
        def step(self, forwards: Sequence[Forward]) -> None:
            self.now += 0.0 if len(forwards) in self.passes else 1.0
            super().step(forwards)

    assert Compiles({1: 0.1, 2: 0.2}).measured() == pytest.approx({1: 0.1, 2: 0.2})


@pytest.mark.parametrize("a_row", [0.1, 0.28, 1.0, 4.0])
def test_a_slow_machine_is_measured_for_ten_seconds(a_row: float) -> None:
    """Wide passes are left out, and their costs are guessed."""
    table = {width: a_row * width for width in (1, 2, 4, 8, 16)}
    machine = Machine(table)
    measured = machine.measured()
    assert machine.now <= max(10.0, 2 * a_row) + 1e-9
    assert measured == pytest.approx({width: table[width] for width in measured})
    assert 1 in measured
    assert Costs(measured, widths=machine.widths).by_width == pytest.approx(table)


def test_a_machine_whose_pass_takes_longer_than_ten_seconds_is_measured_with_one() -> None:
    machine = Machine({1: 30.0, 2: 50.0, 4: 90.0})
    assert machine.measured() == {1: 30.0}
    assert machine.passes == [1]


@pytest.mark.parametrize(
    ("a_pass", "before", "passes", "measured"),
    [
        (0.1, [], 4, 0.1),
        (0.1, [0.7, 0.2], 2, 0.1),
        (0.1, [0.1, 0.05], 2, 0.05),
        (1.1, [], 2, 1.1),
        (1.1, [1.3], 1, 1.1),
        (1.1, [1.3, 1.2], 0, 1.2),
        (3.0, [], 1, 3.0),
        (3.0, [3.2], 0, 3.2),
    ],
)
def test_passes_of_the_probe_count_and_long_ones_are_not_repeated(
    a_pass: float, before: list[float], passes: int, measured: float
) -> None:
    machine = Machine({1: a_pass})
    assert measure_passes(machine, PROBE, StageHealth(machine.clock), machine.clock, before) == {
        1: pytest.approx(measured)
    }
    assert len(machine.passes) == passes
