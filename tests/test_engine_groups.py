"""The engine with two groups, which are sizes of images: each has its runner, its slots, its costs and its health."""

from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from model.rows import Row
from service.engine.requests import Finished
from service.errors import ComputationFailed, Failed
from tests.engines import (
    ENDLESS,
    GROUP,
    LONG,
    OTHER,
    PATIENCE,
    PROBE_SEEDS,
    WARM_UP_PASSES,
    Call,
    FakeEncoding,
    FakeRunner,
    Setting,
    a_decoded,
    a_row,
    a_setting,
    an_image,
    error_of,
    images_of,
    started,
    status_of,
    undisturbed,
)


def a_pair(seconds: float = 1.0, other_seconds: float = 1.0, width: int = 2) -> tuple[FakeRunner, FakeRunner]:
    first = FakeRunner({1: seconds, width: seconds})
    return first, FakeRunner({1: other_seconds, width: other_seconds}, like=first)


def here(seed: int, steps: int = 1, **more: Any) -> Row:
    return a_row(seed, steps, **more)


def there(seed: int, steps: int = 1, **more: Any) -> Row:
    return a_row(seed, steps, group=OTHER, **more)


def noting(order: list[int], seed: int, index: int) -> None:
    order.append(seed)


def seeds_of(s: Setting) -> list[set[int]]:
    return [{seed for seed, _ in forwards} for forwards in s.runner.passes]


def test_the_warm_up_measures_each_group() -> None:
    first, other = a_pair(0.1, 0.3)
    s = a_setting(first, decode_seconds={1: 0.05}, other=other)
    with undisturbed():
        s.engine.start()
        assert s.engine.wait_loaded(PATIENCE)
    machine = s.machine
    assert [machine.passes[group].by_width for group in (GROUP, OTHER)] == [
        pytest.approx({1: 0.1, 2: 0.1}),
        pytest.approx({1: 0.3, 2: 0.3}),
    ]
    assert [machine.decode[group].by_width for group in (GROUP, OTHER)] == [pytest.approx({1: 0.05})] * 2
    assert machine.answer.largest == 2  # values of an image
    assert [len(forwards) for forwards in s.runner.passes] == [*[1] * WARM_UP_PASSES, *[2] * WARM_UP_PASSES] * 2
    assert s.engine.widths == [1, 2]  # of the first group
    s.engine.close()
    assert (first.rows, other.rows) == ({}, {})


def test_a_group_that_does_not_work_is_told_at_the_start() -> None:
    first, other = a_pair()
    other.poisoned = set(PROBE_SEEDS)
    s = a_setting(first, other=other)
    s.engine.start()
    assert s.engine.wait_loaded(PATIENCE)
    assert status_of(s.engine) == "failed"
    s.engine.close()


def test_a_pass_has_rows_of_one_group() -> None:
    first, other = a_pair()
    with started(a_setting(first, other=other)) as s:
        s.keep_busy()
        jobs = [s.submit(here(1, 3)), s.submit(there(2, 3)), s.submit(here(3, 3)), s.submit(there(4, 3))]
        s.runner.let_go()
        assert [images_of(job) for job in jobs] == [[an_image(seed, 3)] for seed in (1, 2, 3, 4)]
        assert all(seeds <= {PROBE_SEEDS[0], 1, 3} or seeds <= {2, 4} for seeds in seeds_of(s))
        assert {1, 3} in seeds_of(s)
        assert {2, 4} in seeds_of(s)  # rows of one group share passes
    assert first.admitted[-2:] == [1, 3]
    assert other.admitted[-2:] == [2, 4]
    assert other.complaints == []
    assert s.is_empty()


@pytest.mark.parametrize("leaver", [1, 2])
def test_a_row_that_leaves_frees_its_slot_in_its_own_runner(leaver: int) -> None:
    first, other = a_pair()
    with started(a_setting(first, other=other)) as s:
        s.runner.hold()
        jobs: dict[int, Future[Finished]] = {1: s.submit(here(1, ENDLESS)), 2: s.submit(there(2, ENDLESS))}
        while not (first.rows and other.rows):
            s.runner.next_pass()
            if not other.rows:  # until the other group comes, the first one's row goes first
                s.submit(there(9)).cancel()
                jobs[2].cancel()
                jobs[2] = s.submit(there(2, 1000))
        assert jobs[leaver].cancel()
        s.runner.next_pass()
        s.runner.next_pass()
        assert [sorted(state.row.seed for state in runner.rows.values()) for runner in (first, other)] == [
            [seed for seed in (own,) if seed != leaver] for own in (1, 2)
        ]
        jobs[3 - leaver].cancel()
        s.runner.let_go()
        assert s.engine.wait_idle(PATIENCE)
    assert (first.complaints, other.complaints) == ([], [])


def test_the_probe_runs_in_the_group_that_failed() -> None:
    first, other = a_pair()
    with started(a_setting(first, other=other)) as s:
        other.breaking = {1, PROBE_SEEDS[1]}
        assert isinstance(error_of(s.submit(there(1))), ComputationFailed)
        assert images_of(s.submit(here(2))) == [an_image(2, 1)]
        assert s.engine.in_doubt  # an image of another group tells nothing of this one
        assert status_of(s.engine) == "ready"
        assert isinstance(error_of(s.engine.probe()), ComputationFailed)
        s.engine.check_health()
        assert status_of(s.engine) == "failed"
        assert images_of(s.submit(here(3))) == [an_image(3, 1)]
        other.breaking = set()
        for _ in range(2):  # the first is perhaps the one that the check began
            error_of(s.engine.probe())
        assert {PROBE_SEEDS[1]} in seeds_of(s)
        assert status_of(s.engine) == "ready"
        assert not s.engine.in_doubt
        s.clock.advance(100)  # in doubt by age, the first group is asked
        s.engine.asked()
        s.engine.check_health()
        assert s.engine.wait_idle(PATIENCE)
        assert seeds_of(s)[-1] == {PROBE_SEEDS[0]}


def test_the_limit_of_a_call_is_that_of_its_own_group() -> None:
    first, other = a_pair(1.0, 10.0)
    with started(a_setting(first, other=other)) as s:
        s.runner.hold()
        job = s.submit(there(1))
        assert s.runner.next_pass() == [(1, 0)]
        s.clock.advance(159)
        s.engine.check_health()
        assert s.engine.alive
        s.clock.advance(1)
        s.engine.check_health()
        assert not s.engine.alive
        assert isinstance(error_of(job), Failed)


def test_a_batch_of_decoding_has_images_of_one_group_and_none_that_overtakes_another_group() -> None:
    first, other = a_pair(width=4)
    with started(a_setting(first, decode_seconds={4: 1.0}, other=other)) as s:
        s.vae.hold()
        blocker = s.submit(here(99))
        assert s.vae.next_batch() == [99]
        jobs = [s.submit(here(1), here(2)), s.submit(there(3), there(4)), s.submit(here(5))]
        s.take_all_steps()
        assert [s.vae.next_call().seeds for _ in range(3)] == [[1, 2], [3, 4], [5]]
        s.vae.let_go()
        assert images_of(blocker) == [a_decoded(99, 1)]
        assert [len(images_of(job)) for job in jobs] == [2, 2, 1]
    assert s.is_empty()


def test_who_has_left_does_not_bring_its_group_forward() -> None:
    first, other = a_pair(width=4)
    with started(a_setting(first, decode_seconds={4: 1.0}, other=other)) as s:
        s.vae.hold()
        blocker = s.submit(here(99))
        assert s.vae.next_batch() == [99]
        leaver = s.submit(here(1))
        sooner, later = s.submit(there(3)), s.submit(here(2, steps=30))
        s.take_all_steps()
        leaver.cancel()
        assert [s.vae.next_call() for _ in range(2)] == [Call("decode", [3]), Call("decode", [2])]
        s.vae.let_go()
        assert [len(images_of(job)) for job in (blocker, sooner, later)] == [1, 1, 1]
    assert s.is_empty()


def test_answers_of_both_groups_are_encoded_the_earliest_promise_first() -> None:
    first, other = a_pair()
    with started(a_setting(first, other=other)) as s:
        blocking = FakeEncoding()
        blocking.hold()
        jobs = [s.submit(here(1), encoding=blocking)]
        assert blocking.next_call() == 0
        s.keep_busy()
        order: list[int] = []
        promises: dict[int, float] = {}
        for seed, row, timeout_s in ((2, here(2, 9), LONG), (3, there(3, 2), 18.0), (4, here(4, 2), 17.0)):
            encoding = FakeEncoding()
            encoding.during = partial(noting, order, seed)
            accepted = s.accept(row, encoding=encoding, timeout_s=timeout_s)
            promises[seed] = s.clock.now + accepted.promise_s
            jobs.append(accepted.future)
        s.runner.let_go()
        s.take_all_steps()
        blocking.let_go()
        for job in jobs:
            job.result(PATIENCE)
        assert order == sorted(promises, key=lambda seed: promises[seed])
        assert order != sorted(order)
    assert s.is_empty()
