"""The costs of passes: measured at the start, and updated later."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.costs import Costs, Machine, PerValue, Speed
from service.engine.trials import SHARE
from tests.lines import GROUPS, ONE, cost_tables

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
    costs = Costs(GPU)
    for _ in range(60):
        costs.follow(4, GPU[4] / 3)
    for width, seconds in costs.best.by_width.items():
        assert seconds == pytest.approx(GPU[width] / 3, rel=0.25)  # the shape takes a part of the change
    for _ in range(60):
        costs.follow(4, 10 * GPU[4])
    assert costs.best.by_width[4] == pytest.approx(GPU[4] / 3)


# Several kinds of work


def test_a_pass_of_any_group_shows_the_speed_of_all() -> None:
    speed = Speed()
    small, large = Costs(CPU, speed), Costs({1: 20.0, 2: 30.0}, speed)
    for _ in range(60):
        small.follow(4, 2 * CPU[4])
    assert small.speed == large.speed
    assert large.seconds(1) == pytest.approx(2 * 20.0, rel=0.15)
    assert large.best.by_width == {1: 20.0, 2: 30.0}
    for _ in range(60):
        large.follow(2, 10.0)
    assert large.best.seconds(1) < 20.0


def test_passes_say_nothing_of_the_speed_of_a_stage() -> None:
    """They run beside each other, and one may be slow while the other is not."""
    machine = Machine({ONE: Costs(CPU)}, {ONE: Costs({1: 1.0, 4: 2.0})}, {ONE: Costs({1: 3.0})}, PerValue(0.1, 0.0))
    for _ in range(60):
        machine.passes[ONE].follow(4, 2 * CPU[4])
    assert machine.decode[ONE].by_width == {1: 1.0, 4: 2.0}
    assert machine.encode[ONE].by_width == {1: 3.0}
    best = machine.best
    assert best.passes[ONE].by_width == CPU
    assert best.decode[ONE].by_width == {1: 1.0, 4: 2.0}
    assert best.answer.seconds(10) == pytest.approx(1.0)


def test_the_version_of_a_machine_rises_with_that_of_any_of_its_costs() -> None:
    machine = Machine({ONE: Costs(CPU), GROUPS[1]: Costs(GPU)}, {ONE: Costs({1: 1.0})})
    versions = [machine.version]
    for costs in (machine.passes[GROUPS[1]], machine.decode[ONE]):
        version = costs.version
        while costs.version == version:
            costs.follow(1, 3 * costs.seconds(1))
        versions.append(machine.version)
    machine.answer.follow(10**6, 60.0)
    versions.append(machine.version)
    assert versions == sorted(set(versions))


@given(st.floats(1e-9, 1e-6), st.floats(1e-5, 1e-2), st.lists(st.integers(1000, 10**7), min_size=1, max_size=5))
def test_the_costs_of_the_answer_become_an_upper_bound_of_those_that_are_measured(
    a_value: float, constant: float, sizes: list[int]
) -> None:
    """Whatever the mix of sizes is, and however wrong the start was. The costs in use lag by a few per cent."""
    answer = PerValue()
    for _ in range(2000 // len(sizes)):
        for values in sizes:
            answer.follow(values, constant + a_value * values)
    for values in sizes:
        truth = constant + a_value * values
        assert 0.9 * truth <= answer.seconds(values) <= 2 * truth


def test_an_image_that_compresses_badly_counts_at_once_and_one_that_compresses_well_for_little() -> None:
    """So the costs are an upper bound for most images."""
    answer = PerValue(1e-8, 1e-6)
    for i in range(100):
        answer.follow(10**6, (0.01, 0.02)[i % 2])
    assert 0.018 < answer.seconds(10**6) < 0.021
    assert answer.seconds(10**6, pieces=3) == pytest.approx(answer.seconds(10**6), rel=0.1)


def test_the_largest_piece_of_an_answer_is_known_from_the_start_and_from_each_call() -> None:
    answer = PerValue(largest=100)
    answer.follow(300, 0.01)
    answer.follow(10, 0.01)
    assert answer.largest == 300


def test_answers_that_vary_seldom_change_the_costs() -> None:
    """Each change weighs all jobs again, before the next pass."""
    answer, draw = PerValue(), random.Random(0)

    def encode(times: int) -> None:
        for _ in range(times):
            answer.follow(10**6, 0.01 * draw.uniform(0.8, 1.2))

    encode(500)
    version = answer.version
    encode(1000)
    assert answer.version - version <= 10
    assert 0.01 < answer.seconds(10**6) < 0.016


# Widths that were never measured


def test_the_seconds_of_a_width_that_was_not_measured_are_the_most_that_its_neighbours_allow() -> None:
    costs = Costs({1: 1.0, 4: 2.5}, widths=(1, 2, 3, 4, 8, 16))
    assert costs.by_width == pytest.approx({1: 1.0, 2: 2.0, 3: 2.5, 4: 2.5, 8: 5.0, 16: 10.0})
    assert costs.width == 4  # a wider pass is thought to gain nothing


@given(
    st.lists(st.floats(0.0, 1.0), min_size=15, max_size=15),
    st.sets(st.integers(2, 16)),
)
def test_promises_allow_for_widths_that_were_not_measured(more: list[float], measured: set[int]) -> None:
    """Where a wider pass costs no less, and a row of it no more."""
    truth = {1: 1.0}
    for width, share in enumerate(more, start=2):
        truth[width] = truth[width - 1] * (1 + share / (width - 1))
    costs = Costs({width: truth[width] for width in {1} | measured}, widths=range(1, 17))
    assert all(costs.ceilings[width] >= seconds - 1e-9 for width, seconds in truth.items())


def test_a_width_that_was_not_measured_has_the_seconds_of_its_first_pass() -> None:
    costs = Costs({1: 1.0, 4: 2.5}, widths=(1, 2, 3, 4, 8, 16))
    costs.follow(2, 1.1)
    costs.follow(8, 3.0)
    assert costs.by_width[2] == pytest.approx(1.1)
    assert costs.by_width[8] == pytest.approx(3.0)
    assert costs.width == 8


# Widths that look bad


NOISY_START = {1: 1.0, 8: 8.8}
TRUTH = {1: 1.0, 8: 2.4}


def work(costs: Costs, truth: dict[int, float], passes: int, noise: float = 0.0, seed: int = 0) -> tuple[float, float]:
    """Passes with enough work for any width. Returns the seconds of all of them, and of trials."""
    draw, all_s, trials_s = random.Random(seed), 0.0, 0.0
    for _ in range(passes):
        trial = costs.to_try()
        if trial is not None:
            costs.trials.begin(trial)
        width = trial or costs.width
        seconds = truth[width] * (1 + noise * draw.uniform(-1, 1))
        costs.follow(width, seconds)
        all_s += seconds
        trials_s += seconds if trial else 0.0
    return all_s, trials_s


def test_a_width_that_a_noisy_start_made_look_bad_is_found_again() -> None:
    costs = Costs(NOISY_START)
    assert costs.width == 1
    passes = 0
    while costs.width == 1:
        work(costs, TRUTH, 1)
        passes += 1
    assert passes <= 2 + 8.8 / SHARE  # a trial is expected to take 8.8 s
    work(costs, TRUTH, 2000)
    assert costs.width == 8
    assert costs.by_width == pytest.approx(TRUTH, rel=0.05)


@pytest.mark.parametrize("seen", [9.6, 30.0, 800.0])
@pytest.mark.parametrize("truth", [2.4, 6.0, 7.2])
def test_however_bad_a_width_looked_it_is_found_after_a_bounded_time(seen: float, truth: float) -> None:
    costs = Costs({1: 1.0, 8: seen})
    work(costs, {1: 1.0, 8: truth}, 8000, noise=0.02)
    assert costs.width == 8


def test_a_narrow_width_that_looked_bad_is_found_too() -> None:
    costs = Costs({1: 2.0, 8: 8.8})
    assert costs.width == 8
    work(costs, {1: 1.0, 8: 8.8}, 500)
    assert costs.width == 1


def test_a_width_that_becomes_good_after_many_trials_is_noticed() -> None:
    costs = Costs(NOISY_START)
    work(costs, NOISY_START, 20_000)
    assert costs.width == 1
    work(costs, TRUTH, 1000)
    assert costs.width == 8


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("table", [NOISY_START, {1: 1.0, 2: 1.9, 4: 3.8, 8: 7.7, 16: 15.5}, GPU])
def test_where_the_start_was_right_trials_take_their_share_and_the_width_stays(
    table: dict[int, float], noise: float
) -> None:
    costs = Costs(table)
    width, changes = costs.width, 0
    all_s = trials_s = 0.0
    for seed in range(100):
        spent = work(costs, table, 100, noise, seed)
        all_s, trials_s = all_s + spent[0], trials_s + spent[1]
        changes += costs.width != width
        width = costs.width
    assert 0 < trials_s <= SHARE * all_s + 2 * max(table.values())
    best = min(seconds / rows for rows, seconds in table.items())
    assert table[costs.width] / costs.width <= 1.1 * best
    assert changes <= 20  # in 10,000 passes


def test_widths_that_were_not_measured_are_learned_in_operation() -> None:
    costs = Costs({1: 1.0}, widths=(1, 2, 4, 8, 16))
    assert costs.width == 1
    truth = {1: 1.0, 2: 1.2, 4: 1.6, 8: 2.4, 16: 5.0}
    work(costs, truth, 3000)
    assert costs.width == 8
    assert costs.by_width == pytest.approx(truth, rel=0.05)


def test_without_passes_there_is_no_trial() -> None:
    costs = Costs(NOISY_START)
    assert costs.to_try() is None
    work(costs, NOISY_START, 100)
    assert costs.to_try() is None
