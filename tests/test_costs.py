"""The costs of passes: measured at the start, and updated later."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.costs import Costs
from tests.lines import cost_tables

GPU = {1: 5.0, 2: 5.0, 4: 5.2, 8: 6.0, 16: 8.0}
CPU = {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.4}


def state(costs: Costs) -> tuple[int, list[float]]:
    return costs.width, list(costs.ceilings)


@given(cost_tables)
def test_a_pass_costs_what_the_narrowest_that_holds_it_does(table: dict[int, float]) -> None:
    costs = Costs(table)
    for rows in range(1, max(table) + 1):
        assert costs.seconds(rows) == table[min(width for width in table if width >= rows)]
    assert costs.by_width == table
    assert (costs.speed, costs.version) == (1.0, 0)


@given(cost_tables)
def test_the_width_is_the_narrowest_whose_rows_cost_about_the_least(table: dict[int, float]) -> None:
    costs = Costs(table)
    a_row = {width: seconds / width for width, seconds in table.items()}
    assert a_row[costs.width] <= 1.02 * min(a_row.values())
    assert all(a_row[width] > 1.02 * min(a_row.values()) for width in table if width < costs.width)
    assert costs.seconds_per_row == pytest.approx(a_row[costs.width])


@pytest.mark.parametrize(
    ("table", "width"),
    [
        (GPU, 16),
        (CPU, 4),
        ({1: 1.0, 2: 2.0, 3: 3.0}, 1),  # nothing is gained together
        ({1: 1.0, 2: 1.97, 3: 2.95}, 1),  # hardly anything is gained
        ({1: 1.0, 2: 1.95, 3: 3.0}, 2),
        ({7: 1.0}, 7),
    ],
)
def test_wider_passes_than_pay_are_not_wanted(table: dict[int, float], width: int) -> None:
    assert Costs(table).width == width


@given(cost_tables)
def test_ceilings_are_the_lowest_that_never_fall(table: dict[int, float]) -> None:
    costs = Costs(table)
    assert len(costs.ceilings) == max(table) + 1
    assert costs.ceilings[0] == 0
    for rows in range(1, max(table) + 1):
        assert costs.ceilings[rows] == max(costs.seconds(fewer) for fewer in range(1, rows + 1))


@given(cost_tables, st.integers(0, 60))
def test_rounds_are_full_passes_and_a_last_one(table: dict[int, float], forwards: int) -> None:
    costs = Costs(table)
    seconds, left = 0.0, forwards
    while left:
        rows = min(left, costs.width)
        seconds += costs.ceilings[rows]
        left -= rows
    assert costs.rounds(forwards) == pytest.approx(seconds)
    assert costs.rounds(forwards) <= costs.rounds(forwards + 1) + 1e-12


@given(cost_tables, st.lists(st.integers(1, 16), max_size=30))
def test_passes_that_take_what_was_expected_change_nothing(table: dict[int, float], passes: list[int]) -> None:
    costs = Costs(table)
    before = state(costs)
    for rows in passes:
        costs.follow(min(rows, max(table)), costs.seconds(min(rows, max(table))))
    assert costs.by_width == pytest.approx(table)
    assert costs.speed == pytest.approx(1.0)
    assert costs.version == 0
    assert state(costs) == before


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("slower", [0.5, 2.0])
def test_a_machine_that_becomes_slower_or_faster_shows_it_at_every_width(rows: int, slower: float) -> None:
    """Even if only one width runs."""
    costs = Costs(GPU)
    truth = slower * costs.seconds(rows)
    for _ in range(60):
        costs.follow(rows, truth)
    assert costs.seconds(rows) == pytest.approx(truth, rel=0.01)
    for width, seconds in costs.by_width.items():
        assert seconds == pytest.approx(slower * GPU[width], rel=0.15)
    assert costs.width == 16


def test_a_machine_that_is_twice_as_slow_is_known_to_be_much_slower_after_a_few_passes() -> None:
    costs = Costs(CPU)
    for _ in range(10):
        costs.follow(4, 2 * CPU[4])
    assert costs.seconds(4) > 1.6 * CPU[4]


def test_passes_that_vary_do_not_move_the_costs_far() -> None:
    costs = Costs(CPU)
    for i in range(200):
        costs.follow(1 + i % 4, (0.9, 1.1)[i // 4 % 2] * CPU[1 + i % 4])
    for width, seconds in costs.by_width.items():
        assert seconds == pytest.approx(CPU[width], rel=0.06)


@pytest.mark.parametrize("seconds", [50.0, 5000.0])
def test_one_outlier_says_little(seconds: float) -> None:
    costs = Costs(CPU)
    costs.follow(2, seconds)
    for width, expected in costs.by_width.items():
        assert CPU[width] < expected < 1.4 * CPU[width]
    for _ in range(30):
        costs.follow(2, CPU[2])
    for width, expected in costs.by_width.items():
        assert expected == pytest.approx(CPU[width], rel=0.08)


def test_a_width_that_becomes_slower_than_the_others_is_noticed() -> None:
    costs = Costs(CPU)
    truth = {**CPU, 4: 6.0}
    for _ in range(500):
        for width, seconds in truth.items():
            costs.follow(width, seconds)
    assert costs.by_width == pytest.approx(truth, rel=0.05)
    assert costs.width == 3
    assert costs.version > 0


@given(cost_tables, st.lists(st.tuples(st.integers(1, 16), st.floats(0.2, 5.0)), max_size=40))
def test_the_version_rises_when_width_or_ceilings_change(
    table: dict[int, float], passes: list[tuple[int, float]]
) -> None:
    costs = Costs(table)
    for rows, times in passes:
        before, version = state(costs), costs.version
        costs.follow(min(rows, max(table)), times * costs.seconds(min(rows, max(table))))
        assert costs.version >= version
        if costs.version == version:
            assert state(costs) == before


@given(cost_tables, st.lists(st.tuples(st.integers(1, 16), st.floats(0.2, 5.0)), max_size=40))
def test_ceilings_stay_within_a_few_percent_of_the_costs_that_they_follow(
    table: dict[int, float], passes: list[tuple[int, float]]
) -> None:
    costs = Costs(table)
    for rows, times in passes:
        costs.follow(min(rows, max(table)), times * costs.seconds(min(rows, max(table))))
    assert all(a <= b for a, b in pairwise(costs.ceilings))
    for rows in range(1, max(table) + 1):
        most = max(costs.seconds(fewer) for fewer in range(1, rows + 1))
        assert costs.ceilings[rows] * costs.speed == pytest.approx(most, rel=0.035)


@given(cost_tables, st.lists(st.tuples(st.integers(1, 16), st.floats(0.0, 1e6)), max_size=40))
def test_costs_stay_positive_and_finite(table: dict[int, float], passes: list[tuple[int, float]]) -> None:
    costs = Costs(table)
    for rows, seconds in passes:
        costs.follow(min(rows, max(table)), seconds)
    assert all(0 < seconds < 1e30 for seconds in costs.by_width.values())
    assert costs.speed > 0


def test_a_clock_that_has_not_moved_leaves_costs_positive() -> None:
    costs = Costs({1: 0.0, 2: 0.0, 4: 0.0})
    assert costs.width == 4
    assert all(0 < seconds < 1e-6 for seconds in costs.by_width.values())
    costs.follow(1, 0.5)
    assert 0 < costs.seconds_per_row < 1e-6
    assert costs.speed > 0


def test_what_decoding_costs_follows_decoding_and_not_passes() -> None:
    decoding = Costs({1: 1.0, 4: 2.0})
    costs = Costs(CPU, decoding)
    assert costs.decoding is decoding
    for _ in range(60):
        costs.follow(4, 2 * CPU[4])
    assert decoding.by_width == {1: 1.0, 4: 2.0}
    assert Costs(CPU).decoding is None


@given(cost_tables, st.lists(st.tuples(st.integers(1, 16), st.floats(0.2, 50.0)), max_size=40))
def test_the_best_is_what_no_slow_pass_makes_worse(table: dict[int, float], passes: list[tuple[int, float]]) -> None:
    costs = Costs(table)
    best = costs.best.by_width
    assert best == table
    for rows, times in passes:
        costs.follow(min(rows, max(table)), times * costs.seconds(min(rows, max(table))))
        assert all(costs.best.by_width[width] <= seconds for width, seconds in best.items())
        best = costs.best.by_width


def test_the_best_follows_a_machine_that_turns_out_faster_than_at_its_start_at_all_widths() -> None:
    costs = Costs(GPU, Costs({1: 4.0}))
    for _ in range(60):
        costs.follow(4, GPU[4] / 3)
    for width, seconds in costs.best.by_width.items():
        assert seconds == pytest.approx(GPU[width] / 3, rel=0.25)  # the shape takes a part of the change
    assert costs.best.decoding is not None
    assert costs.best.decoding.by_width == {1: 4.0}
    for _ in range(60):
        costs.follow(4, 10 * GPU[4])
    assert costs.best.by_width[4] == pytest.approx(GPU[4] / 3)
