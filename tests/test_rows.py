"""Rows: how many forward rows each line takes."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.lines import Column
from model.rows import Condition, Group, Row
from model.samplers import StepTable

TENTHS = st.integers(0, 10)


def table_of(steps: int) -> StepTable:
    return StepTable(np.zeros(steps, np.int64), np.zeros((steps, len(Column))))


@given(steps=st.integers(0, 60), branches=st.integers(1, 4), begin=TENTHS, end=TENTHS)
def test_a_line_is_guided_inside_the_interval(steps: int, branches: int, begin: int, end: int) -> None:
    """from <= i/N < to, in exact arithmetic."""
    row = Row(
        table_of(steps), 0, Group(8, 8), branches=(Condition(),) * branches, guidance_interval=(begin / 10, end / 10)
    )
    inside = [Fraction(begin, 10) <= Fraction(i, steps) < Fraction(end, 10) for i in range(steps)]
    assert row.forwards == tuple(branches if guided else 1 for guided in inside)


def test_all_lines_are_guided_by_default() -> None:
    assert Row(table_of(3), 0, Group(8, 8), branches=(Condition(1), Condition())).forwards == (2, 2, 2)


def test_a_row_without_guidance_takes_one_forward_row_a_line() -> None:
    assert Row(table_of(3), 0, Group(8, 8)).forwards == (1, 1, 1)


def test_a_row_without_lines_takes_none() -> None:
    assert Row(table_of(0), 0, Group(8, 8)).forwards == ()


def test_groups_are_written_as_width_and_height() -> None:
    assert str(Group(height=32, width=48)) == "48x32"
