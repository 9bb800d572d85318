"""Rows in slots: each row has the same bytes alone and beside any other rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.backends.backend import Backend, Inputs, Precision
from model.beginnings import beginning
from model.lines import Column
from model.noise import generator
from model.rows import Condition, Forward, Group, Image, Moments, Reading, Row, Source
from model.runner import SlotRunner
from model.samplers import StepTable, denoise_table, sample_table
from model.schedule import Schedule
from tests.properties import examples
from tests.reference import rescale_noise_cfg
from tests.trajectories import (
    Told,
    forwards,
    inputs_of,
    labelled,
    runner_of,
    runner_on,
    small_network,
    torch_backend,
    trajectory,
)

SHAPE = (3, 8, 8)
WIDTH = 4
SLOTS = 5

V = Schedule(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
MOMENTS = Moments(*np.random.default_rng(1).uniform(0.1, 1.0, (2, *SHAPE)).astype(np.float32))
MASK = np.arange(64).reshape(8, 8) % 3 > 0
START = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
ROWS = [
    labelled(sample_table(Schedule(), "ddpm", 5), seed=0, label=0),
    labelled(sample_table(Schedule(variance_type="fixed_large"), "ddpm", 2), seed=1),
    labelled(sample_table(Schedule(), "ddim", 4), seed=2, label=4, guidance_scale=3.0),
    labelled(sample_table(V, "ddim", 3, eta=1.0), seed=3, guidance_scale=1.5),
    labelled(sample_table(V, "ddim", 6, eta=0.5), seed=3, label=1),
    labelled(sample_table(V, "dpmpp_2m", 6), seed=4, label=2, guidance_scale=2.0),
    labelled(sample_table(Schedule(), "dpmpp_2m", 4), seed=0, label=0),
    labelled(sample_table(Schedule(thresholding=True, sample_max_value=2.0), "ddpm", 3), seed=5, label=3),
    labelled(denoise_table(V, "ddpm", 400, 4), seed=6, start=START, label=2),
    labelled(denoise_table(V, "dpmpp_2m", 700, 3), seed=6, start=START[::-1].copy(), guidance_scale=4.0, label=1),
    labelled(denoise_table(V, "ddim", 700, 1), seed=6, start=START),
    labelled(denoise_table(V, "ddim", 999, 1), seed=7, label=0, guidance_scale=5.0, model_output=True),
    labelled(sample_table(V, "ddim", 6), seed=8, label=3, guidance_scale=3.0, guidance_interval=(0.2, 0.7)),
    Row(
        sample_table(V, "ddpm", 4),
        seed=9,
        group=Group(8, 8),
        branches=(Condition(0), Condition(2), Condition()),
        guidance_scale=2.0,
        guidance_interval=(0.5, 1.0),
    ),
    labelled(sample_table(V, "pndm", 5), seed=10, label=1),
    labelled(sample_table(Schedule(), "pndm", 3), seed=11, label=2, guidance_scale=3.0, guidance_rescale=0.7),
    labelled(sample_table(V, "euler", 4), seed=12, label=0),
    labelled(sample_table(V, "unipc", 5), seed=14, label=2),
    labelled(sample_table(Schedule(), "heun", 3), seed=15, label=1, guidance_scale=2.0),
    labelled(sample_table(Schedule(), "dpmpp_2m_sde", 4), seed=16, label=3),
    labelled(sample_table(Schedule(), "euler_a", 3), seed=13, label=4, guidance_scale=5.0, guidance_rescale=1.0),
    labelled(denoise_table(V, "pndm", 600, 4), seed=14, start=START),
    labelled(sample_table(V, "euler_a", 5, begin=2), seed=15, source=Source(MOMENTS), guidance_scale=2.0, label=1),
    labelled(sample_table(Schedule(), "dpmpp_2m", 6, begin=1), seed=16, source=Source(MOMENTS, MASK)),
    labelled(sample_table(V, "pndm", 3), seed=17, source=Source(MOMENTS, ~MASK, from_noise=True), label=2),
]


def same(a: Reading, b: Reading) -> bool:
    return np.array_equal(a.x, b.x) and np.array_equal(a.x0, b.x0)


class Alone:
    """The state of each of ROWS after each number of steps, alone on its runner.

    Args:
        backend: of small_network(), for passes of up to WIDTH rows.
        crowds: the backend of the other runners; the same by default.
    """

    def __init__(self, backend: Backend, crowds: Backend | None = None) -> None:
        self.backend = crowds or backend
        self.states: list[list[Reading]] = []
        for row in ROWS:
            start = beginning(row, generator(row.seed), SHAPE).x.numpy()
            states = trajectory(runner_on(backend, SHAPE, 1, small_network()), row)
            self.states.append([Reading(start, np.zeros_like(start)), *states])

    def runner(self, slots: int) -> SlotRunner:
        return runner_on(self.backend, SHAPE, slots, small_network())


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request: pytest.FixtureRequest) -> Alone:
    return Alone(torch_backend(small_network(), SHAPE, request.param, WIDTH))


class InFlight:
    """A row of ROWS in a crowd."""

    def __init__(self, which: int, slot: int) -> None:
        self.which = which
        self.slot = slot
        self.steps = 0
        self.pending = forwards(ROWS[which], slot, 0)

    def ran(self, forward: Forward) -> None:
        self.pending.remove(forward)
        if not self.pending:
            self.steps += 1
            self.pending = [] if self.done else forwards(ROWS[self.which], self.slot, self.steps)

    @property
    def done(self) -> bool:
        return self.steps == len(ROWS[self.which].table)


@examples(40)
@given(
    waiting=st.lists(st.integers(0, len(ROWS) - 1), min_size=2, max_size=9),
    slots=st.sampled_from((1, 2, SLOTS)),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_a_crowd_have_their_own_bytes_at_every_step(
    alone: Alone, waiting: list[int], slots: int, seed: int
) -> None:
    """Rows join in small groups, and leave when they are done or earlier. Passes take any forward rows in any order.

    Some passes raise. The runner starts with enough slots, or adds them.
    """
    backend, random = Faulty(alone.backend), Random(seed)
    runner = runner_on(backend, SHAPE, slots, small_network())
    crowd: list[InFlight] = []
    while waiting or crowd:
        while waiting and len(crowd) < SLOTS and (not crowd or random.random() < 0.5):
            which = waiting.pop()
            crowd.append(InFlight(which, runner.admit(ROWS[which])))
        if random.random() < 0.05:
            runner.release(crowd.pop(random.randrange(len(crowd))).slot)

        pending = [(member, forward) for member in crowd for forward in member.pending]
        chosen = random.sample(pending, min(len(pending), random.randint(1, WIDTH)))
        if chosen and random.random() < 0.2:
            setattr(backend, random.choice(("in_start", "in_wait")), 1)
            with pytest.raises(RuntimeError, match="a fault of the device"):
                runner.step([forward for _, forward in chosen])
        elif chosen:
            runner.step([forward for _, forward in chosen])
            for member, forward in chosen:
                member.ran(forward)
        for member in crowd:
            assert same(runner.read(member.slot), alone.states[member.which][member.steps])
        for member in [member for member in crowd if member.done]:
            runner.release(member.slot)
            crowd.remove(member)


def test_twins_are_equal_and_other_seeds_are_not(alone: Alone) -> None:
    """So the crowd's test does compare different images."""
    final = [states[-1].x for states in alone.states]
    assert all(np.isfinite(x).all() for x in final)
    for i, x in enumerate(final):
        for other in final[:i]:
            assert np.abs(x - other).max() > 1e-3


def test_branches_of_a_guided_row_may_come_in_any_order(alone: Alone) -> None:
    which = 2
    runner = alone.runner(slots=1)
    slot = runner.admit(ROWS[which])
    for line, branches in enumerate([(0, 1), (1, 0), (1, 0), (0, 1)]):
        runner.step([Forward(slot, branches[0], line)])
        assert same(runner.read(slot), alone.states[which][line])  # the row waits for its other branch
        runner.step([Forward(slot, branches[1], line)])
        assert same(runner.read(slot), alone.states[which][line + 1])


@pytest.mark.parametrize("passes", [[], [0], [1], [0, 1], [0, 1, 0], [0, 1, 1]])
def test_a_slot_released_at_any_time_is_as_new(alone: Alone, passes: list[int]) -> None:
    guided, second = ROWS[5], 6
    runner = alone.runner(slots=1)
    slot = runner.admit(guided)
    for number, branch in enumerate(passes):
        runner.step([Forward(slot, branch, number // 2)])
    runner.release(slot)
    for state, expected in zip(trajectory(runner, ROWS[second]), alone.states[second][1:], strict=True):
        assert same(state, expected)


# More rows than slots.


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_where_all_slots_are_taken_there_will_be_twice_as_many(alone: Alone, slots: int) -> None:
    """Whatever the state of the rows: after the first branch of a step, or at the end."""
    runner = alone.runner(slots)
    crowd: list[InFlight] = []
    for which, row in enumerate(ROWS):
        member = InFlight(which, runner.admit(row))
        crowd.append(member)
        for _ in range(1 if which % 2 else sum(row.forwards)):
            forward = member.pending[0]
            runner.step([forward])
            member.ran(forward)
        for other in crowd:
            assert same(runner.read(other.slot), alone.states[other.which][other.steps])
    assert sorted(member.slot for member in crowd) == list(range(len(ROWS)))
    assert any(len(member.pending) == 1 < ROWS[member.which].forwards[0] for member in crowd)
    while pending := [(member, forward) for member in crowd for forward in member.pending if not member.done]:
        runner.step([forward for _, forward in pending[:WIDTH]])
        for member, forward in pending[:WIDTH]:
            member.ran(forward)
    for member in crowd:
        assert same(runner.read(member.slot), alone.states[member.which][-1])
        runner.release(member.slot)
    assert {runner.admit(row) for row in ROWS} == set(range(len(ROWS)))  # released slots are used first


class NoMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which one operation runs out of memory. Views and in-place writes do not count.

    Args:
        left: number of operations before it.
    """

    def __init__(self, left: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = left

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and not func.name().split(".")[0].endswith("_"):
            self.left -= 1
            if self.left == -1:
                raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


def times_without_memory(act: Callable[[], object]) -> int:
    """Call with no memory for the first operation, then for the second, and so on until the call succeeds."""
    for number in count():
        try:
            with NoMemory(number):
                act()
        except torch.OutOfMemoryError:
            continue
        return number
    raise AssertionError


def test_a_row_that_finds_no_memory_has_taken_nothing(alone: Alone) -> None:
    runner = alone.runner(slots=1)
    guided = InFlight(2, runner.admit(ROWS[2]))
    runner.step([guided.pending[0]])
    slots: list[int] = []
    assert times_without_memory(lambda: slots.append(runner.admit(ROWS[8]))) > 3
    assert slots == [1]
    runner.step([guided.pending[1], *forwards(ROWS[8], slots[0], 0)])
    assert same(runner.read(guided.slot), alone.states[2][1])
    assert same(runner.read(slots[0]), alone.states[8][1])
    assert runner.admit(ROWS[0]) == 2


def test_a_row_that_cannot_be_admitted_has_taken_nothing(alone: Alone) -> None:
    runner = alone.runner(slots=1)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            runner.admit(labelled(ROWS[0].table, seed=0, start=np.zeros((3, 8, 9), np.float32)))
    assert [runner.admit(row) for row in ROWS[:2]] == [0, 1]


# Passes that raise.


class Faulty:
    """A backend that raises on request. Implements model.backends.backend.Backend.

    Attributes:
        in_start, in_wait: number of next passes that raise there.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.in_start = self.in_wait = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        if self.in_start:
            self.in_start -= 1
            raise RuntimeError("a fault of the device")
        finish = self._backend.start(inputs)

        def wait() -> Tensor:
            out = finish()
            if self.in_wait:
                self.in_wait -= 1
                out.fill_(torch.nan)
                raise RuntimeError("a fault of the device")
            return out

        return wait


@pytest.mark.parametrize(("in_start", "in_wait"), [(1, 0), (0, 1), (0, 2), (2, 1)])
def test_a_pass_that_raises_changes_no_row_and_can_be_run_again(alone: Alone, in_start: int, in_wait: int) -> None:
    """Also for rows with noise: a second try draws the same noise."""
    backend = Faulty(alone.backend)
    runner = runner_on(backend, SHAPE, len(ROWS), small_network())
    for which, row in enumerate(ROWS):
        slot = runner.admit(row)
        for step in range(len(row.table)):
            for batch in (
                ([forward] for forward in forwards(row, slot, step)) if step % 2 else [forwards(row, slot, step)]
            ):
                backend.in_start, backend.in_wait = in_start, in_wait
                for _ in range(in_start + in_wait):
                    with pytest.raises(RuntimeError, match="a fault of the device"):
                        runner.step(batch)
                    assert same(runner.read(slot), alone.states[which][step])
                runner.step(batch)
            assert same(runner.read(slot), alone.states[which][step + 1])


class Cheap(Told):
    """A network of few operations that uses all of its inputs."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x.sin() + (t / 1000 + labels)[:, None, None, None]


@pytest.mark.parametrize("together", [True, False], ids=["branches together", "branches apart"])
@pytest.mark.parametrize("which", range(len(ROWS)))
def test_whatever_operation_of_a_pass_raises_it_can_be_run_again(which: int, together: bool) -> None:
    row = ROWS[which]
    expected = list(trajectory(runner_of(Cheap(), SHAPE, WIDTH), row))
    runner = runner_of(Cheap(), SHAPE, WIDTH)
    slot = runner.admit(row)
    before = runner.read(slot)
    for line, after in enumerate(expected):
        pending = forwards(row, slot, line)
        batches = [pending] if together else [[forward] for forward in pending]
        for batch in batches:
            assert same(runner.read(slot), before)
            assert times_without_memory(lambda batch=batch: runner.step(batch)) > 5  # type: ignore[misc]
        before = runner.read(slot)
        assert same(before, after)


def test_who_is_in_a_pass_that_raises_may_be_overtaken_or_leave(alone: Alone) -> None:
    """Before the pass runs again, beside others."""
    backend = Faulty(alone.backend)
    runner = runner_on(backend, SHAPE, 3, small_network())
    noisy, guided, leaver = (InFlight(which, runner.admit(ROWS[which])) for which in (0, 3, 1))
    runner.step([guided.pending[0]])
    backend.in_wait = 1
    with pytest.raises(RuntimeError):
        runner.step([noisy.pending[0], guided.pending[1], leaver.pending[0]])
    runner.release(leaver.slot)
    other = InFlight(7, runner.admit(ROWS[7]))
    for batch in ([other], [noisy, other], [guided], [noisy]):
        runner.step([Forward(member.slot, int(member is guided), member.steps) for member in batch])
        for member in batch:
            member.steps += 1
        for member in (noisy, guided, other):
            assert same(runner.read(member.slot), alone.states[member.which][member.steps])


def test_readings_are_copies() -> None:
    runner = runner_of(small_network(), SHAPE, WIDTH)
    slot = runner.admit(ROWS[0])
    before = runner.read(slot)
    kept = Reading(before.x.copy(), before.x0.copy())
    runner.step([Forward(slot, 0, 0)])
    assert same(before, kept)
    after = runner.read(slot)
    after.x[:] = 0
    assert not same(runner.read(slot), after)


# Networks whose output shows their inputs.


class Tells(Told):
    """A network that predicts one number for each row."""

    def __init__(self, number: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.number(x, t, labels).to(x.dtype)[:, None, None, None].expand_as(x)


def told_timestep(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return t


def told_label(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return labels


def told_width(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return torch.full((len(x),), len(x))


def table_of(timesteps: list[int], **columns: float) -> StepTable:
    """A table of equal lines."""
    lines = np.zeros((len(timesteps), len(Column)))
    lines[:, Column.BOUND] = np.inf
    for name, value in columns.items():
        lines[:, Column[name]] = value
    return StepTable(np.array(timesteps), lines)


def numbers(runner: SlotRunner, row: Row) -> Iterator[float]:
    """The image's value after each step, where all values of an image are equal."""
    for reading in trajectory(runner, row):
        assert (reading.x == reading.x.flat[0]).all()
        yield float(reading.x.flat[0])


def test_network_is_told_each_steps_timestep() -> None:
    runner = runner_of(Tells(told_timestep), SHAPE, WIDTH)
    row = labelled(table_of([999, 501, 7, 0], E=1), seed=0)
    assert list(numbers(runner, row)) == [999, 501, 7, 0]


@pytest.mark.parametrize(
    ("label", "scale", "told"),
    [
        (3, 1.0, 3),
        (0, 1.0, 0),
        (None, 1.0, 5),  # no label
        (3, 2.0, 5 + 2 * (3 - 5)),
        (None, 2.0, 5),
        (1, 4.5, 5 + 4.5 * (1 - 5)),
    ],
)
def test_network_is_told_each_branchs_label(label: int | None, scale: float, told: float) -> None:
    runner = runner_of(Tells(told_label), SHAPE, WIDTH)
    row = labelled(table_of([1, 0], E=1), seed=0, label=label, guidance_scale=scale)
    assert row.forwards == (1, 1) if scale == 1 else (2, 2)
    assert list(numbers(runner, row)) == [told, told]


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_each_pass_is_padded_to_one_width(width: int, rows: int) -> None:
    model = Tells(told_width)
    backend = torch_backend(model, SHAPE, "float32", width)
    assert list(backend.widths) == [width]
    numbers = torch.zeros(rows, dtype=torch.int64)
    inputs = inputs_of(model, torch.zeros((rows, *SHAPE)), numbers, numbers)
    if rows > width:
        with pytest.raises(ValueError, match=f"{rows} rows do not fit a pass of {width}"):
            backend.start(inputs)()
    else:
        assert torch.equal(backend.start(inputs)(), torch.full((rows, *SHAPE), float(width)))


def test_a_pass_wider_than_the_width_is_refused() -> None:
    runner = runner_of(small_network(), SHAPE, width=2)
    assert list(runner.widths) == [2]
    slots = [runner.admit(row) for row in ROWS[:3]]
    with pytest.raises(ValueError, match="3 rows do not fit a pass of 2"):
        runner.step([Forward(slot, 0, 0) for slot in slots])


def draws(seed: int, number: int) -> list[Image]:
    """The generator's draws for a seed, in order, in the shape of diffusers' draws."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn((1, *SHAPE), generator=rng)[0].numpy() for _ in range(number)]


@pytest.mark.parametrize("start", [None, START])
def test_a_start_takes_the_place_of_the_first_draw(start: Image | None) -> None:
    """So the noise of later steps is the same with and without a start."""
    runner = runner_of(Tells(told_label), SHAPE, WIDTH)
    first, second, third = draws(11, 3)
    row = labelled(table_of([2, 1], D=1), seed=11, start=start)
    slot = runner.admit(row)
    assert np.array_equal(runner.read(slot).x, first if start is None else start)
    runner.release(slot)
    for reading, noise in zip(trajectory(runner, row), (second, third), strict=True):
        assert np.array_equal(reading.x, noise)


def test_steps_without_noise_draw_none() -> None:
    runner = runner_of(Tells(told_label), SHAPE, WIDTH)
    table = table_of([3, 2, 1], A=1)
    table.lines[2, [Column.A, Column.D]] = [0, 1]
    states = list(trajectory(runner, labelled(table, seed=12)))
    first, second = draws(12, 2)
    assert np.array_equal(states[1].x, first)
    assert np.array_equal(states[2].x, second)


def test_the_first_noise_has_the_tables_scale() -> None:
    runner = runner_of(Tells(told_label), SHAPE, WIDTH)
    [noise] = draws(11, 1)
    for start, expected in ((None, noise * np.float32(0.75)), (START, START)):
        row = labelled(replace(table_of([1], A=1), init=0.75), seed=11, start=start)
        assert np.array_equal(runner.read(runner.admit(row)).x, expected)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"Q": 1, "R_0": 1, "C_1": 1}, [0, 9, 4, 2, 7, 5, 8]),  # x0 is the timestep, as the prediction is
        ({"R_E": 1, "C_1": 1}, [0, 9, 4, 2, 7, 5, 8]),
        ({"R_E": 1, "C_2": 1}, [0, 0, 9, 4, 2, 7, 5]),
        ({"R_E": 1, "C_3": 1}, [0, 0, 0, 9, 4, 2, 7]),
        ({"R_E": 1, "C_1": 100, "C_2": 10, "C_3": 1}, [0, 900, 490, 249, 724, 572, 857]),
    ],
    ids=str,
)
def test_memories_come_back_in_their_order(columns: dict[str, float], expected: list[float]) -> None:
    """What is not there is 0, whatever the slot held before."""
    runner = runner_of(Tells(told_timestep), SHAPE, WIDTH, slots=1)
    row = labelled(table_of([9, 4, 2, 7, 5, 8, 1], **columns), seed=0)
    for _ in range(2):
        assert list(numbers(runner, row)) == expected


def test_a_line_may_remember_x_or_nothing() -> None:
    table = table_of([9, 4, 2, 7], E=1)
    table.lines[1, Column.R_X] = 1
    table.lines[3, [Column.E, Column.C_1]] = 0, 1
    assert list(numbers(runner_of(Tells(told_timestep), SHAPE, WIDTH), labelled(table, seed=0))) == [9, 4, 2, 9]


def test_what_a_slot_remembers_does_not_touch_the_next_row() -> None:
    """Even if it is not finite, and the next row shares a pass with one that reads memories."""
    bad = 666
    runner = runner_of(Tells(lambda x, t, labels: torch.where(t == bad, torch.nan, t)), SHAPE, WIDTH, slots=2)
    slot = runner.admit(labelled(table_of([bad], R_E=1), seed=0))
    runner.step([Forward(slot, 0, 0)])
    runner.release(slot)
    reader = runner.admit(labelled(table_of([9, 4], R_E=1, C_1=1), seed=1))
    assert reader == slot
    runner.step([Forward(reader, 0, 0)])
    other = runner.admit(labelled(table_of([5], E=1, R_E=1), seed=2))
    runner.step([Forward(reader, 0, 1), Forward(other, 0, 0)])
    assert (runner.read(reader).x == 9).all()
    assert (runner.read(other).x == 5).all()


# Backends.


class WithVariance(Told):
    """A network with a learned variance that depends on the label."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out = self.network(x, t, labels)
        return torch.cat([out, out.sin() + labels[:, None, None, None] / 10], dim=1)


def test_a_learned_variance_is_that_of_the_rows_own_label() -> None:
    """Guidance changes only the prediction."""
    network = WithVariance()
    table = denoise_table(Schedule(variance_type="learned_range"), "ddpm", 500, 1)
    row = labelled(table, seed=0, start=START, label=2, guidance_scale=3.0, model_output=True)
    runner = runner_of(network, SHAPE, WIDTH)
    [reading] = trajectory(runner, row)
    x, t = torch.from_numpy(START)[None].repeat(2, 1, 1, 1), torch.tensor([500, 500])
    with torch.inference_mode():
        own, none = network(x, t, torch.tensor([2, 5]))
    torch.testing.assert_close(torch.from_numpy(reading.x[:3]), none[:3] + 3 * (own[:3] - none[:3]))
    torch.testing.assert_close(torch.from_numpy(reading.x[3:]), own[3:])


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0])
def test_rescaling_looks_at_the_prediction_alone(factor: float) -> None:
    """Not at a learned variance."""
    table = denoise_table(Schedule(variance_type="learned_range"), "ddpm", 500, 1)
    row = labelled(table, seed=0, start=START, label=2, guidance_scale=3.0, guidance_rescale=factor, model_output=True)
    [reading] = trajectory(runner_of(WithVariance(), SHAPE, WIDTH), row)
    x, t = torch.from_numpy(START)[None].repeat(2, 1, 1, 1), torch.tensor([500, 500])
    with torch.inference_mode():
        own, none = WithVariance()(x, t, torch.tensor([2, 5]))
    guided = none[:3] + 3 * (own[:3] - none[:3])
    expected = rescale_noise_cfg(guided[None], own[None, :3], factor)[0]
    torch.testing.assert_close(torch.from_numpy(reading.x[:3]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(reading.x[3:]), own[3:])


def test_rows_with_a_learned_variance_have_their_own_bytes() -> None:
    table = sample_table(Schedule(variance_type="learned_range"), "ddpm", 4)
    rows = [labelled(table, seed, label=seed) for seed in range(3)]

    def runner() -> SlotRunner:
        return runner_of(WithVariance(), SHAPE, WIDTH, slots=3)

    crowd = runner()
    slots = [crowd.admit(row) for row in rows]
    for line in range(4):
        crowd.step([Forward(slot, 0, line) for slot in slots])
    for row, slot in zip(rows, slots, strict=True):
        assert same(crowd.read(slot), list(trajectory(runner(), row))[-1])


class MixesRows(Told):
    """A network whose rows affect each other, as with batch norm in training."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


class LooksAtItsPlace(Told):
    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x + torch.arange(len(x))[:, None, None, None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_is_batch_invariant(precision: Precision, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch_backend(small_network(), SHAPE, precision, WIDTH).reproducible
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("network", [MixesRows(), LooksAtItsPlace()])
def test_rows_that_are_not_kept_apart_are_noticed(network: Told) -> None:
    assert not torch_backend(network, SHAPE, "float32", WIDTH).reproducible


def test_predictions_are_float32_in_either_precision() -> None:
    x = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0))
    network = small_network()
    inputs = inputs_of(network, x, torch.tensor([3, 900]), torch.tensor([0, 5]))
    exact, rough = (torch_backend(network, SHAPE, p, WIDTH).start(inputs)() for p in ("float32", "bfloat16"))
    assert exact.dtype == rough.dtype == torch.float32
    error = (exact - rough).abs().max() / exact.abs().max()
    assert 1e-4 < error < 0.1  # bfloat16 was used, and nothing less precise


def test_fingerprint_names_what_moves_bits() -> None:
    first = torch_backend(LooksAtItsPlace(), SHAPE, "float32", 4).fingerprint
    assert first["threads"] == torch.get_num_threads()
    assert first["backend_version"] == torch.__version__
    assert torch_backend(LooksAtItsPlace(), SHAPE, "bfloat16", 4).fingerprint == first | {"precision": "bfloat16"}
    assert torch_backend(LooksAtItsPlace(), SHAPE, "float32", 8).fingerprint == first | {"width": 8}
