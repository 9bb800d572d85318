"""Rows in flight advance together, one forward pass a tick; rows join and leave between steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduler import Scheduler, Task


class Ticket(Task):
    """A task that remembers what it asked for and when it ran."""

    __slots__ = ("forwards", "present", "steps")

    def __init__(self, steps: int, forwards_per_step: int) -> None:
        super().__init__(steps, forwards_per_step)
        self.steps = steps
        self.forwards: list[tuple[int, int]] = []  # (tick, branch)
        self.present = True  # neither finished nor removed

    @property
    def work(self) -> tuple[int, int]:
        return self.steps, self.forwards_per_step

    @property
    def left(self) -> int:
        """Forward rows still to run, counted from scratch."""
        return self.steps * self.forwards_per_step - len(self.forwards)

    @property
    def due(self) -> list[int]:
        """Branches of the present step that have not run, counted from scratch."""
        return list(range(len(self.forwards) % self.forwards_per_step, self.forwards_per_step))


@dataclass
class Line:
    """A scheduler, all tickets that it was ever given, in their order, and how many ticks there were."""

    scheduler: Scheduler[Ticket]
    tickets: list[Ticket] = field(default_factory=list)
    ticks: int = 0

    @property
    def present(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.present]

    def add(self, kinds: Sequence[tuple[int, int]]) -> list[Ticket]:
        tickets = [Ticket(*kind) for kind in kinds]
        self.tickets += tickets
        self.scheduler.add(tickets)
        return tickets

    def remove(self, tickets: Sequence[Ticket]) -> None:
        self.scheduler.remove(tickets)
        for ticket in tickets:
            ticket.present = False

    def tick(self, removed_during: Sequence[Ticket] = ()) -> list[tuple[Ticket, int]]:
        """One tick. `removed_during` leave after their batch was chosen, as jobs do that cannot be started."""
        batch = self.scheduler.next_batch()
        chosen = list(batch)
        self.remove(removed_during)
        batch = [(ticket, branch) for ticket, branch in batch if ticket not in removed_during]
        for ticket, branch in batch:
            ticket.forwards.append((self.ticks, branch))
        finished = self.scheduler.advance(batch)
        assert finished == [ticket for ticket in self.tickets if ticket.present and ticket.left == 0]
        for ticket in finished:
            ticket.present = False
        self.ticks += 1
        return chosen

    def run_out(self) -> None:
        """Tick until nothing is left, which takes at most one tick for each forward row."""
        for _ in range(sum(ticket.left for ticket in self.present)):
            if self.scheduler.outstanding:
                self.tick()
        assert not self.present


@dataclass(frozen=True)
class Add:
    kinds: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Remove:
    picks: tuple[int, ...]  # places in the list of all tickets, modulo its length


@dataclass(frozen=True)
class Tick:
    pass


@dataclass(frozen=True)
class TickWithout:
    """A tick in which a ticket leaves after it was chosen."""

    pick: int


Action = Add | Remove | Tick | TickWithout

widths = st.integers(1, 6)
kinds = st.tuples(st.integers(1, 5), st.sampled_from((1, 2)))
adds = st.lists(kinds, min_size=1, max_size=4).map(lambda some: Add(tuple(some)))
removals = st.lists(st.integers(0, 99), min_size=1, max_size=3).map(lambda some: Remove(tuple(some)))
ticks = st.just(Tick())
scripts: st.SearchStrategy[list[Action]] = st.lists(
    st.one_of(adds, ticks, ticks, removals, st.integers(0, 99).map(TickWithout)), max_size=30
)
scripts_without_removals: st.SearchStrategy[list[Action]] = st.lists(st.one_of(adds, ticks, ticks), max_size=30)


def act(line: Line, action: Action) -> list[tuple[Ticket, int]] | None:
    """Do what the script says. Returns the batch of a tick."""
    match action:
        case Add(some):
            line.add(some)
        case Remove(picks):
            line.remove([line.tickets[pick % len(line.tickets)] for pick in picks if line.tickets])
        case Tick():
            return line.tick()
        case TickWithout(pick):
            batch_tickets = line.present[: line.scheduler.max_batch]
            return line.tick(removed_during=[batch_tickets[pick % len(batch_tickets)]] if batch_tickets else [])
    return None


def expected_forwards(ticket: Ticket) -> list[int]:
    """The branches of a ticket in the order in which they must run."""
    return [branch for _ in range(ticket.steps) for branch in range(ticket.forwards_per_step)]


@given(widths, scripts)
def test_each_task_runs_exactly_its_forward_rows_branch_after_branch(max_batch: int, script: list[Action]) -> None:
    line = Line(Scheduler(max_batch))
    removed: set[Ticket] = set()
    for action in script:
        before = line.present
        act(line, action)
        removed.update(ticket for ticket in before if not ticket.present and ticket.left)
    line.run_out()
    for ticket in line.tickets:
        branches = [branch for _, branch in ticket.forwards]
        if ticket in removed:
            assert branches == expected_forwards(ticket)[: len(branches)]
            assert len(branches) < len(expected_forwards(ticket))
        else:
            assert branches == expected_forwards(ticket)


@given(widths, scripts)
def test_a_tick_has_at_most_max_batch_rows_each_once_and_none_of_who_has_left(
    max_batch: int, script: list[Action]
) -> None:
    line = Line(Scheduler(max_batch))
    for action in script:
        present = line.present
        batch = act(line, action)
        if batch is not None:
            assert len(batch) <= max_batch
            assert len(set(batch)) == len(batch)
            assert {ticket for ticket, _ in batch} <= set(present)


@given(widths, scripts)
def test_a_tick_is_full_wherever_enough_is_due(max_batch: int, script: list[Action]) -> None:
    line = Line(Scheduler(max_batch))
    for action in script:
        due = sum(len(ticket.due) for ticket in line.present)
        batch = act(line, action)
        if batch is not None:
            assert len(batch) == min(max_batch, due)


@given(widths, scripts)
def test_a_tick_takes_what_is_due_from_the_front_of_the_line(max_batch: int, script: list[Action]) -> None:
    line = Line(Scheduler(max_batch))
    for action in script:
        due = [(ticket, branch) for ticket in line.present for branch in ticket.due]
        batch = act(line, action)
        if batch is not None:
            assert batch == due[:max_batch]


@given(widths, scripts_without_removals, kinds)
def test_of_equal_work_the_first_to_come_is_the_first_to_be_done(
    max_batch: int, script: list[Action], kind: tuple[int, int]
) -> None:
    line = Line(Scheduler(max_batch))
    for action in script:
        act(line, Add((kind,)) if isinstance(action, Add) and len(action.kinds) == 1 else action)
    line.run_out()
    last_done: dict[tuple[int, int], int] = {}
    for ticket in line.tickets:
        done = ticket.forwards[-1][0]
        assert done >= last_done.get(ticket.work, 0)
        last_done[ticket.work] = done


@given(widths, scripts)
def test_no_more_tasks_than_max_batch_are_started_and_not_finished(max_batch: int, script: list[Action]) -> None:
    line = Line(Scheduler(max_batch))
    holding: set[Ticket] = set()  # what has a slot: given when the batch is chosen, given back when it leaves
    for action in script:
        batch = act(line, action)
        holding.update(ticket for ticket, _ in batch or ())
        assert len(holding) <= max_batch
        holding = {ticket for ticket in holding if ticket.present}
        assert line.scheduler.running == len(holding)


@given(widths, scripts)
def test_counters_agree_with_a_recount_at_any_time(max_batch: int, script: list[Action]) -> None:
    line = Line(Scheduler(max_batch))

    def recount() -> tuple[int, int, int]:
        started = sum(ticket in chosen for ticket in line.present)
        left = sum(ticket.left for ticket in line.present)
        return started, len(line.present) - started, left

    chosen: set[Ticket] = set()
    for action in script:
        batch = act(line, action)
        chosen.update(ticket for ticket, _ in batch or ())
        counters = line.scheduler.running, line.scheduler.waiting, line.scheduler.outstanding
        assert counters == recount()
        assert all(ticket.forwards_left == ticket.left for ticket in line.present)
    line.run_out()
    assert (line.scheduler.running, line.scheduler.waiting, line.scheduler.outstanding) == (0, 0, 0)


def test_rows_join_and_leave_between_steps() -> None:
    line = Line(Scheduler(2))
    [a, b, c] = line.add([(3, 1), (1, 1), (2, 1)])
    assert line.tick() == [(a, 0), (b, 0)]
    assert line.tick() == [(a, 0), (c, 0)]  # b has left, c has joined
    [d] = line.add([(1, 1)])
    assert line.tick() == [(a, 0), (c, 0)]
    assert line.tick() == [(d, 0)]
    assert line.tick() == []


def test_branches_of_a_guided_row_may_fall_into_different_ticks() -> None:
    line = Line(Scheduler(3))
    [a, b] = line.add([(2, 2), (2, 2)])
    assert line.tick() == [(a, 0), (a, 1), (b, 0)]
    assert line.tick() == [(a, 0), (a, 1), (b, 1)]
    assert line.tick() == [(b, 0), (b, 1)]
    assert line.tick() == []


def test_a_guided_row_runs_where_only_one_row_fits_a_pass() -> None:
    line = Line(Scheduler(1))
    [a, b] = line.add([(2, 2), (1, 1)])
    assert [line.tick() for _ in range(6)] == [[(a, 0)], [(a, 1)], [(a, 0)], [(a, 1)], [(b, 0)], []]


@pytest.mark.parametrize("ticks_before", [0, 1, 2, 3, 4])
def test_a_removed_task_never_runs_again(ticks_before: int) -> None:
    """Waiting, in the middle of a guided step, between steps, or finished: removal is the same call."""
    line = Line(Scheduler(1))
    [a, b] = line.add([(2, 2), (1, 1)])
    for _ in range(ticks_before):
        line.tick()
    line.remove([a])
    line.remove([a])  # a second time does nothing
    assert len(a.forwards) == ticks_before
    assert line.scheduler.running == 0
    assert line.scheduler.waiting == 1
    assert line.scheduler.outstanding == 1
    assert line.tick() == [(b, 0)]
    assert line.tick() == []


def test_removing_what_was_never_added_changes_nothing() -> None:
    line = Line(Scheduler(2))
    [a] = line.add([(1, 1)])
    line.scheduler.remove([Ticket(5, 2)])
    assert (line.scheduler.running, line.scheduler.waiting, line.scheduler.outstanding) == (0, 1, 1)
    assert line.tick() == [(a, 0)]


def test_a_scheduler_without_room_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, and is 0"):
        Scheduler(0)
