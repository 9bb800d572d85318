"""The engine with a fake runner and a fake clock: rows join, overtake, run, fail and are shown, pass by pass."""

import itertools
import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest

from model.rows import Image
from service.engine.bounds import MARGIN
from service.engine.denoising import Phase
from service.engine.engine import Engine, Observer
from service.engine.requests import Progress
from service.errors import ComputationFailed, DeadlinePassed, Draining, Failed, Invalid, Loading, QueueFull, Unavailable
from tests.engines import (
    ENDLESS,
    GROUP,
    LONG,
    PATIENCE,
    PROBE,
    PROBE_SEED,
    WARM_UP_PASSES,
    Diary,
    FakeRunner,
    Recorder,
    Setting,
    a_decoded,
    a_row,
    a_setting,
    an_estimate,
    an_image,
    check_beyond_help,
    check_that_it_gives_up,
    check_that_probes_tell,
    elsewhere,
    error_of,
    images_of,
    started,
    status_of,
    undisturbed,
    warm,
)

# The warm-up


def test_the_warm_up_measures_each_width_by_the_fastest_of_its_passes_but_the_first() -> None:
    runner = FakeRunner({1: 0.1, 2: 0.15, 4: 0.2})
    slower = iter([0.5, 0.3, 0.0, 0.1] * 3)

    def slow_down(call: str) -> None:
        if call == "pass":
            runner.clock.now += next(slower)

    s = a_setting(runner)
    runner.during = slow_down
    with undisturbed():
        s.engine.start()
        assert s.engine.wait_loaded(PATIENCE)
    assert s.engine.widths == [1, 2, 4]
    assert [len(rows) for rows in runner.passes] == [*[1] * 4, *[4] * 4, *[2] * 4]
    assert s.machine.passes[GROUP].by_width == pytest.approx({1: 0.1, 2: 0.15, 4: 0.2})
    assert s.is_empty()
    s.engine.close()
    assert runner.complaints == []


@pytest.mark.parametrize(("seconds", "most"), [(0.1, 10.0), (1.0, 14.0), (6.0, 18.0), (60.0, 180.0)])
def test_a_warm_up_takes_ten_seconds_or_two_passes_beside_the_probe(seconds: float, most: float) -> None:
    runner = FakeRunner({width: width * seconds for width in range(1, 33)})
    s = a_setting(runner)
    began = s.clock.now
    s.engine.start()
    assert s.engine.wait_loaded(PATIENCE)
    assert s.clock.now - began <= most
    assert s.engine.widths[-1] == 32
    assert s.machine.passes[GROUP].by_width[32] >= 32 * seconds * 0.99  # a width that was not measured is no promise
    s.engine.close()


def test_an_engine_is_loading_until_it_is_warm_and_then_ready() -> None:
    s = a_setting(FakeRunner({2: 0.1}))
    engine, runner = s.engine, s.runner

    def check_loading() -> None:
        assert status_of(engine) == "loading"
        assert engine.alive
        assert engine.scheduler is None
        assert not engine.wait_loaded(0)
        with pytest.raises(Loading):
            engine.submit([a_row(1)], LONG, "alice")
        with pytest.raises(Loading):
            engine.probe()

    check_loading()
    runner.hold()
    engine.start()
    for _ in range(WARM_UP_PASSES):
        assert set(runner.next_pass()) == {(PROBE_SEED, 0)}
        check_loading()
    runner.let_go()
    assert engine.wait_loaded(PATIENCE)
    assert status_of(engine) == "ready"
    assert not engine.in_doubt
    assert images_of(s.submit(a_row(1))) == [an_image(1, 1)]
    engine.close()
    assert runner.complaints == []
    assert s.observer.refused == ["loading"] * (1 + WARM_UP_PASSES)


@pytest.mark.parametrize("fault", ["refused", "breaking", "poisoned", "too wide"])
def test_an_engine_whose_warm_up_fails_is_failed_and_refuses_requests(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    s = a_setting(FakeRunner({1: 1.0, 2: 1.0}))

    def too_wide(call: str) -> None:
        s.runner.faults = int(call == "pass" and len(s.runner.passes[-1]) == 2)

    if fault == "too wide":
        s.runner.during = too_wide
    else:
        setattr(s.runner, fault, {PROBE_SEED})
    s.engine.start()
    assert s.engine.wait_loaded(PATIENCE)
    assert status_of(s.engine) == "failed"
    assert not s.engine.alive
    with pytest.raises(Failed, match="the engine has stopped"):
        s.submit(a_row(1))
    with pytest.raises(Failed, match="the engine has stopped"):
        s.engine.probe()
    assert s.observer.refused == ["failed"]
    assert (s.engine.beyond_help or "").startswith("the model could not be warmed up: ")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]  # the caller logs the reason
    s.engine.close()
    assert s.runner.complaints == []


def test_an_engine_can_be_closed_while_it_warms_up() -> None:
    s = a_setting(FakeRunner({1: 1.0}))
    s.runner.hold()
    s.engine.start()
    s.runner.next_pass()
    with ThreadPoolExecutor() as pool:
        closing = pool.submit(s.engine.close)
        s.runner.let_go()
        closing.result(PATIENCE)
    assert status_of(s.engine) == "draining"
    assert not s.engine.alive


# Results


def test_a_request_gives_its_images_in_the_order_of_its_rows() -> None:
    with warm(2) as s:
        job = s.submit(a_row(1, steps=5), a_row(2, steps=1), a_row(3, steps=2, guided=True), a_row(4))
        assert images_of(job) == [an_image(1, 5), an_image(2, 1), an_image(3, 2), an_image(4, 1)]
    assert s.observer.ended == [4]
    assert s.is_empty()


def test_a_finished_request_says_how_long_it_waited_and_ran() -> None:
    with warm(1) as s:
        s.runner.hold()
        first = s.submit(a_row(1))
        assert s.runner.next_pass() == [(1, 0)]
        s.clock.now += 0.5
        second = s.submit(a_row(2, steps=3))
        s.runner.let_go()
        assert first.result(PATIENCE)[1:4] == (0.0, 1.5, 0.0)
        assert second.result(PATIENCE)[1:4] == (1.0, 3.0, 0.0)
    assert s.observer.started == [0.0, 1.0]


# Joining and overtaking


def test_requests_that_arrive_during_a_pass_join_the_next() -> None:
    with warm(3) as s:
        s.runner.hold()
        jobs = [s.submit(a_row(1, steps=3))]
        assert s.runner.next_pass() == [(1, 0)]
        jobs += [s.submit(a_row(2, steps=4)), s.submit(a_row(3, steps=5))]
        assert s.runner.next_pass() == [(1, 0), (2, 0), (3, 0)]
        s.runner.let_go()
        assert [images_of(job) for job in jobs] == [[an_image(1, 3)], [an_image(2, 4)], [an_image(3, 5)]]


def test_short_requests_overtake_long_ones_which_keep_their_slot_and_their_state() -> None:
    with warm(1) as s:
        s.runner.hold()
        long = s.accept(a_row(1, steps=20))
        assert [s.runner.next_pass() for _ in range(2)] == [[(1, 0)]] * 2
        short = s.accept(a_row(2, steps=2))
        assert (long.position, short.position) == (0, 0)
        assert [s.runner.next_pass() for _ in range(2)] == [[(2, 0)]] * 2
        assert [(slot, state.row.seed, state.steps) for slot, state in s.runner.rows.items()] == [(0, 1, 2), (1, 2, 1)]
        assert s.runner.next_pass() == [(1, 0)]
        assert images_of(short.future) == [an_image(2, 2)]
        s.runner.let_go()
        assert images_of(long.future) == [an_image(1, 20)]
    assert s.runner.admitted == [1, 2]
    assert s.line.preemptions == 1


def test_a_guided_row_can_be_overtaken_between_its_branches() -> None:
    with warm(1) as s:
        s.runner.hold()
        long = s.submit(a_row(1, steps=10, guided=True))
        assert s.runner.next_pass() == [(1, 0)]
        short = s.submit(a_row(2))
        assert s.runner.next_pass() == [(2, 0)]
        assert s.runner.next_pass() == [(1, 1)]
        s.runner.let_go()
        assert images_of(short) == [an_image(2, 1)]
        assert images_of(long) == [an_image(1, 10)]
    assert s.runner.admitted == [1, 2]


def test_no_more_rows_hold_a_slot_than_four_times_the_widest_pass() -> None:
    with warm(1) as s:
        s.runner.hold()
        for seed in range(1, 7):
            s.submit(a_row(seed, steps=200 - 20 * seed))
            assert s.runner.next_pass() == [(min(seed, 4), 0)]
        assert s.in_flight == [1, 2, 3, 4]
        assert s.counters[:2] == (4, 2)


def test_the_probe_goes_first_and_needs_no_place_in_the_queue() -> None:
    with warm(1, max_queue=1) as s:
        s.runner.hold()
        job = s.submit(a_row(1, steps=9))
        assert s.runner.next_pass() == [(1, 0)]
        with pytest.raises(QueueFull):
            s.submit(a_row(2))
        probe = s.engine.probe()
        assert s.places.taken == 1
        assert s.runner.next_pass() == PROBE
        assert s.runner.next_pass() == [(1, 0)]
        assert images_of(probe) == [an_image(PROBE_SEED, 1)]
        s.runner.let_go()
        assert images_of(job) == [an_image(1, 9)]
    assert s.observer.started == [0.0]
    assert s.observer.ended == [1]


def test_a_cancelled_probe_leaves_without_being_counted() -> None:
    with warm(1) as s:
        s.runner.hold()
        job = s.submit(a_row(1, steps=2))
        s.runner.next_pass()
        s.engine.probe().cancel()
        assert s.runner.next_pass() == [(1, 0)]
        s.runner.let_go()
        job.result(PATIENCE)
    assert s.observer.ended == [1]
    assert s.is_empty()


# Passes that raise


def test_rows_of_a_pass_that_raises_are_tried_again_alone_and_only_the_culprit_fails() -> None:
    with warm(6) as s:
        s.keep_busy()
        s.runner.breaking = {3}
        innocent = [s.submit(a_row(1)), s.submit(a_row(2, guided=True))]
        culprit = s.submit(a_row(3, guided=True))
        innocent.append(s.submit(a_row(4, steps=3)))
        together = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0)]
        assert s.runner.next_pass() == together
        s.runner.let_go()
        with pytest.raises(ComputationFailed) as error:
            culprit.result(PATIENCE)
        assert str(error.value) == "a forward pass of this request failed"  # the cause goes only to the log
        assert [images_of(job) for job in innocent] == [[an_image(1, 1)], [an_image(2, 1)], [an_image(4, 3)]]
        alone = [[(1, 0)], [(2, 0), (2, 1)], [(3, 0), (3, 1)], [(4, 0)]]
        assert s.runner.passes == [PROBE, together, *alone, [(4, 0)], [(4, 0)]]
    assert s.observer.failed_passes == 2
    assert Counter(s.observer.ended) == {"failed": 1, 1: 3}
    assert s.is_empty()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_a_fault_that_does_not_come_again_harms_nobody(width: int) -> None:
    with warm(width) as s:
        s.keep_busy()
        jobs = [s.submit(a_row(1, steps=2, guided=True), a_row(2, steps=2)), s.submit(a_row(3, steps=3, guided=True))]
        s.runner.next_pass()
        s.runner.faults = 1
        s.runner.let_go()
        assert [images_of(job) for job in jobs] == [[an_image(1, 2), an_image(2, 2)], [an_image(3, 3)]]
        assert status_of(s.engine) == "ready"
    assert s.observer.failed_passes == 1
    assert sorted(s.observer.ended, key=str) == [1, 2]
    assert s.is_empty()


@pytest.mark.parametrize("culprit", [2, 3])
def test_a_request_of_several_images_fails_whole(culprit: int) -> None:
    with warm(4) as s:
        s.keep_busy()
        s.runner.breaking = {culprit}
        innocent = s.submit(a_row(1, steps=2))
        failing = s.submit(a_row(2, steps=3), a_row(3, steps=3), a_row(4, steps=3))
        assert s.runner.next_pass() == [(1, 0), (2, 0), (3, 0), (4, 0)]
        s.runner.let_go()
        assert isinstance(error_of(failing), ComputationFailed)
        assert images_of(innocent) == [an_image(1, 2)]
        tried = [[(seed, 0)] for seed in (1, 2, 3) if seed <= culprit]  # rows of the culprit's request leave with it
        assert s.runner.passes[2:] == [*tried, [(1, 0)]]
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_who_is_cancelled_during_a_pass_that_raises_is_not_tried_again() -> None:
    with warm(2) as s:
        s.keep_busy()
        s.runner.faults = 1
        leaver, stayer = s.submit(a_row(1)), s.submit(a_row(2))
        s.runner.faults = 0
        assert s.runner.next_pass() == [(1, 0), (2, 0)]
        s.runner.faults = 1
        leaver.cancel()
        assert s.runner.next_pass() == [(2, 0)]
        s.runner.let_go()
        assert images_of(stayer) == [an_image(2, 1)]
    assert s.observer.ended == ["disconnect", 1]
    assert s.is_empty()


@pytest.mark.parametrize("fault", ["refused", "breaking", "poisoned", "unreadable"])
def test_requests_that_fail_never_make_the_engine_fail_however_many_there_are(fault: str) -> None:
    with warm(1) as s:
        for seed in range(1, 30):
            setattr(s.runner, fault, {seed})
            assert isinstance(error_of(s.submit(a_row(seed))), ComputationFailed)
            assert s.engine.in_doubt
            assert status_of(s.engine) == "ready"
            if seed % 3 == 0:  # several failures come between two checks
                s.engine.check_health()
                assert status_of(s.engine) == "ready"
                s.engine.probe().result(PATIENCE)
                assert not s.engine.in_doubt
        assert s.engine.alive
        assert s.engine.beyond_help is None
    assert s.is_empty()


def test_one_of_several_rows_that_cannot_be_read_fails_its_request_alone() -> None:
    with warm(3) as s:
        s.keep_busy()
        s.runner.unreadable = {1}
        bad, good = s.submit(a_row(1), a_row(2, steps=9)), s.accept(a_row(3, steps=9)).future
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match="could not be read"):
            bad.result(PATIENCE)
        assert images_of(good) == [an_image(3, 9)]
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_an_innocent_that_works_alone_shows_that_the_engine_has_not_failed() -> None:
    with warm(2) as s:
        s.runner.breaking = {2}
        for _ in range(3):
            s.keep_busy()
            jobs = [s.submit(a_row(1)), s.submit(a_row(2))]
            s.runner.let_go()
            assert [error_of(job) is None for job in jobs] == [True, False]
            assert status_of(s.engine) == "ready"
    assert s.observer.failed_passes == 6


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_a_probe_shows_whether_the_model_works_again(fault: str) -> None:
    with warm(1) as s:
        check_that_probes_tell(s, s.runner, fault)
    assert s.observer.ended == ["failed"]


@pytest.mark.parametrize("fault", ["refused", "breaking", "poisoned", "unreadable"])
def test_an_engine_whose_probes_keep_failing_gives_up(fault: str) -> None:
    with warm(1) as s:
        check_that_it_gives_up(s, s.runner, fault)


@pytest.mark.parametrize("works", ["an image", "a pass"])
def test_an_engine_does_not_give_up_while_anything_works(works: str) -> None:
    """A request's image while every pass of the probe raises; or only its passes, while its image is NaN."""
    with warm(1) as s:
        s.runner.breaking = {PROBE_SEED}
        s.runner.poisoned = {1} if works == "a pass" else set()
        for _ in range(5):
            for _ in range(3):
                assert isinstance(error_of(s.engine.probe()), ComputationFailed)
            s.engine.check_health()
            assert status_of(s.engine) == "failed"
            assert isinstance(error_of(s.engine.probe()), ComputationFailed)  # perhaps the probe that the check began
            failed = error_of(s.submit(a_row(1, steps=3)))
            assert (failed is not None) == (works == "a pass")
            assert s.engine.alive
        s.engine.check_health()
        assert s.engine.beyond_help is None


@pytest.mark.parametrize(("seconds", "fresh_s"), [(0.01, 10.0), (0.25, 10.0), (1.0, 20.0), (4.0, 80.0)])
def test_an_idle_engine_comes_into_doubt_and_a_probe_clears_that_once_somebody_asks(
    seconds: float, fresh_s: float
) -> None:
    """After ten seconds and twenty times the probe's duration."""
    with warm(1, seconds=seconds) as s:
        s.clock.now += fresh_s
        assert not s.engine.in_doubt
        s.clock.now += 0.5
        assert s.engine.in_doubt
        s.engine.check_health()
        assert s.runner.passes == []  # nobody has called the health check
        s.runner.hold()
        for _ in range(500):
            s.engine.asked()
            s.engine.check_health()
            assert status_of(s.engine) == "ready"
        assert s.runner.next_pass() == PROBE
        s.clock.now += 2 * seconds
        for _ in range(500):
            s.engine.asked()
            s.engine.check_health()
            assert status_of(s.engine) == "ready"
        s.runner.let_go()
        s.engine.probe().result(PATIENCE)
        assert not s.engine.in_doubt
        assert s.engine.wait_idle(PATIENCE)
        assert s.runner.passes == [PROBE]


def test_what_runs_is_no_doubt() -> None:
    with warm(1, seconds=4.0) as s:
        s.runner.hold()
        job = s.submit(a_row(1))
        s.runner.next_pass()
        s.clock.now += 55
        assert not s.engine.in_doubt
        assert status_of(s.engine) == "ready"
        s.runner.let_go()
        job.result(PATIENCE)


# Rows that fail by themselves


def test_an_image_that_is_not_finite_fails_its_request_alone() -> None:
    with warm(3) as s:
        s.keep_busy()
        s.runner.poisoned = {1}
        bad = s.submit(a_row(1), a_row(2, steps=9))
        good = s.submit(a_row(3, steps=9))
        assert s.runner.next_pass() == [(3, 0), (2, 0), (1, 0)]
        assert s.runner.next_pass() == [(3, 0)]
        assert s.in_flight == [3]
        with pytest.raises(ComputationFailed, match="not finite"):
            bad.result(PATIENCE)
        assert s.engine.in_doubt
        s.runner.let_go()
        assert images_of(good) == [an_image(3, 9)]
        assert not s.engine.in_doubt
        assert status_of(s.engine) == "ready"
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


@pytest.mark.parametrize("poisoned", [1, 2, 3])
def test_all_rows_of_a_request_may_be_done_in_the_pass_in_which_one_is_not_finite(poisoned: int) -> None:
    with warm(3) as s:
        s.runner.poisoned = {poisoned}
        with pytest.raises(ComputationFailed, match="not finite"):
            s.submit(a_row(1), a_row(2), a_row(3)).result(PATIENCE)
        s.settle()
    assert s.engine.in_doubt
    assert s.observer.ended == ["failed"]
    assert s.is_empty()


@pytest.mark.parametrize("refused", [2, 3])
def test_a_row_that_cannot_be_admitted_fails_its_request_alone(refused: int) -> None:
    with warm(4) as s:
        s.keep_busy()
        s.runner.refused = {refused}
        bad = s.submit(a_row(2, guided=True), a_row(3))
        good = s.submit(a_row(1, steps=9))
        s.runner.next_pass()
        s.runner.next_pass()
        assert s.in_flight == [1]
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match="could not be started") as error:
            bad.result(PATIENCE)
        assert "refused" not in str(error.value)
        assert images_of(good) == [an_image(1, 9)]
        assert status_of(s.engine) == "ready"
        assert not s.engine.in_doubt
    assert len(s.observer.started) == (1 if refused == 2 else 2)  # rows that never ran have not started
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


# Passes that do not return


@pytest.mark.parametrize(("seconds", "limit"), [(0.01, 8.0), (0.5, 8.0), (1.0, 16.0), (5.0, 80.0)])
def test_a_pass_that_does_not_return_fails_all_requests(seconds: float, limit: float) -> None:
    with warm(1, seconds=seconds) as s:
        s.runner.hold()
        jobs = [s.submit(a_row(1, steps=5)), s.submit(a_row(2, steps=9))]
        assert s.runner.next_pass() == [(1, 0)]
        jobs.append(s.engine.probe())
        s.clock.now += limit - 0.1
        s.engine.check_health()
        assert status_of(s.engine) == "ready"
        assert s.engine.alive
        jobs.append(s.submit(a_row(3)))
        assert not any(job.done() for job in jobs)

        s.clock.now += 0.1
        for _ in range(2):  # a second call has no effect
            s.engine.check_health()
            assert all(isinstance(error_of(job), Failed) for job in jobs)
            assert status_of(s.engine) == "failed"
            assert not s.engine.alive
            assert s.engine.wait_idle(0)
            assert s.places.taken == 0
        with pytest.raises(Failed, match="the model does not return"):
            s.submit(a_row(4))
        with pytest.raises(Failed, match="the model does not return"):
            s.engine.probe()
        assert s.observer.ended == ["failed"] * 3
        assert s.observer.refused == ["failed"]


@pytest.mark.parametrize("breaking", [set(), {1}], ids=["works", "raises"])
def test_an_engine_that_was_stuck_recovers_when_the_pass_returns(breaking: set[int]) -> None:
    with warm(2) as s:
        s.runner.breaking = breaking
        s.runner.hold()
        watcher = Diary(preview_every=1)
        job = s.accept(a_row(1), a_row(2, steps=3), watcher=watcher).future
        s.runner.next_pass()
        s.clock.now += 40
        s.engine.check_health()
        assert isinstance(error_of(job), Failed)
        released, both = threading.Event(), itertools.count(1)
        s.runner.during = lambda call: released.set() if call == "release" and next(both) == 2 else None
        s.runner.let_go()
        assert released.wait(PATIENCE)
        assert s.engine.alive
        assert status_of(s.engine) == "ready"
        assert images_of(s.submit(a_row(3, steps=2))) == [an_image(3, 2)]
        assert s.runner.passes[1:] == [[(3, 0)]] * 2
        assert not s.engine.in_doubt
    assert watcher.entries == []
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def hanging(s: Setting, call: str) -> tuple[threading.Event, threading.Event]:
    """Make a call of the runner hang. Returns two events: the engine is inside, and let it return."""
    inside, leave = threading.Event(), threading.Event()

    def hang(made: str) -> None:
        if made == call:
            inside.set()
            assert leave.wait(PATIENCE)

    s.runner.during = hang
    return inside, leave


@pytest.mark.parametrize("call", ["admit", "pass", "read", "release"])
def test_whatever_does_not_return_is_found_and_given_up_on(call: str, caplog: pytest.LogCaptureFixture) -> None:
    """Any call may hang, not only a pass: on CUDA, a pass's queued work runs on while its rows are updated and read."""
    with warm(1, seconds=0.5) as s:
        inside, leave = hanging(s, call)
        jobs = [s.submit(a_row(1)), s.submit(a_row(2))]
        assert inside.wait(PATIENCE)
        s.clock.now += 7.9
        s.engine.check_health()
        assert s.engine.alive
        s.clock.now += 0.1
        for _ in range(3):
            s.engine.check_health()
            assert not s.engine.alive
            assert s.engine.beyond_help is None  # the call may still return
            assert all(isinstance(error_of(job), Failed) for job in jobs)
            s.clock.now += 7.9
        s.clock.now += 0.3
        s.engine.check_health()
        check_beyond_help(s, "a forward pass has not returned for 32 s")
        leave.set()
        s.engine.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "CRITICAL"]


@pytest.mark.parametrize("call", ["admit", "pass", "read"])
def test_a_warm_up_that_does_not_return_is_given_up_on(call: str) -> None:
    s = a_setting(FakeRunner({1: 1.0}))
    inside, leave = hanging(s, call)
    s.engine.start()
    assert inside.wait(PATIENCE)
    s.clock.now += 599  # it may have to compile first
    s.engine.check_health()
    assert status_of(s.engine) == "loading"
    s.clock.now += 1
    s.engine.check_health()
    assert status_of(s.engine) == "failed"
    s.clock.now += 1800
    s.engine.check_health()
    assert s.engine.beyond_help == "a forward pass has not returned for 2400 s"
    leave.set()
    s.engine.close()


def test_an_idle_engine_is_never_stuck() -> None:
    s = a_setting(FakeRunner({1: 1.0}))
    s.clock.now += LONG
    s.engine.check_health()
    assert status_of(s.engine) == "loading"
    with started(s):
        s.clock.now += LONG
        s.engine.check_health()
        assert s.engine.alive
        assert images_of(s.submit(a_row(1))) == [an_image(1, 1)]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_stuck_engine_can_be_closed(noticed: bool) -> None:
    with warm(1) as s:
        s.runner.hold()
        job = s.submit(a_row(1))
        s.runner.next_pass()
        s.clock.now += 40
        if noticed:
            s.engine.check_health()
        elsewhere(s.engine.close)
        assert isinstance(error_of(job), Failed if noticed else Draining)
        assert status_of(s.engine) == "draining"
        assert not s.engine.alive
        with pytest.raises(Failed, match=r"does not return|has stopped"):
            s.engine.probe()


# Watchers


def test_a_watcher_is_told_of_each_step_and_of_the_image_before_it_is_answered() -> None:
    with warm(1) as s:
        s.keep_busy()
        diary = Diary(preview_every=1)
        diary.future = s.accept(a_row(7, steps=3), watcher=diary).future
        s.runner.let_go()
        assert images_of(diary.future) == [an_image(7, 3)]
    assert diary.entries == [
        ("progress", 1, 3),
        ("preview", 0, 1, an_estimate(7, 1)),
        ("progress", 2, 3),
        ("preview", 0, 2, an_estimate(7, 2)),
        ("progress", 3, 3),
        ("preview", 0, 3, an_estimate(7, 3)),
        ("image", 0, an_image(7, 3)),
        ("progress", 3, 3),
    ]
    assert diary.was_done == [False]
    assert 2 <= diary.etas[0] <= 2 + MARGIN
    assert 1 <= diary.etas[1] <= 1 + MARGIN
    assert 0 < diary.etas[2] < 0.1  # the encoding
    assert diary.etas[3] == 0


def test_progress_is_that_of_the_slowest_row() -> None:
    with warm(1) as s:
        diary = Diary()
        s.accept(a_row(1, steps=2), a_row(2, steps=2), watcher=diary).future.result(PATIENCE)
    steps = [step for step, _ in diary.of("progress")]
    assert steps == sorted(steps)
    assert [steps.count(step) for step in (0, 1)] >= [1, 2]  # the first row takes its second step before the second row
    assert steps[-1] == 2
    assert diary.of("image") == [(0, an_image(1, 2)), (1, an_image(2, 2))]


def test_a_watched_request_is_estimated_anew_every_100_ms_and_no_more_often() -> None:
    """Passes take longer than expected, so each new estimate differs. In between, the last estimate counts down."""
    with warm(1, seconds=0.0625) as s:
        diary = Diary()
        s.runner.seconds[1] = pass_s = 0.09375
        s.accept(a_row(1, steps=20), watcher=diary).future.result(PATIENCE)
    etas = [progress.eta_s for progress in diary.told if progress.step < progress.steps]
    new = [i for i in range(1, len(etas)) if etas[i] != etas[i - 1] - pass_s]
    assert new
    assert all((later - earlier) * pass_s >= 0.1 for earlier, later in pairwise([0, *new]))


class Asking(Recorder):
    """An observer that, on each call, reads what the engine's lock guards from another thread."""

    engine: Engine | None = None

    def __getattribute__(self, name: str) -> Any:
        engine = super().__getattribute__("engine")
        if engine is not None and name.split("_")[0] in ("phase", "pass", "batch", "decoding", "request"):
            elsewhere(lambda: engine.alive)
        return super().__getattribute__(name)


@pytest.mark.parametrize("decode_seconds", [None, {1: 1.0}], ids=["images", "latents"])
def test_no_observer_is_told_anything_while_the_lock_is_held(
    decode_seconds: dict[int, float] | None, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Asking()
    with started(a_setting(FakeRunner({1: 1.0}), 2, observer, decode_seconds)) as s:
        observer.engine = s.engine
        s.keep_busy()
        with pytest.raises(Invalid):
            s.submit(a_row(5, steps=50), timeout_s=1.0, client="5")
        seconds = {1: 9.0, 2: LONG, 3: LONG}
        late, left, done = (s.submit(a_row(i, steps=2), timeout_s=seconds[i], client=f"{i}") for i in seconds)
        with pytest.raises(Unavailable):
            s.submit(a_row(4), client="1")
        left.cancel()
        s.clock.advance(9.5)
        s.runner.let_go()
        assert isinstance(error_of(late), DeadlinePassed)
        done.result(PATIENCE)
    assert observer.ended == ["disconnect", "timeout", 1]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_guided_row_has_stepped_when_both_its_branches_have_run() -> None:
    with warm(1) as s:
        diary = Diary(preview_every=1)
        s.accept(a_row(1, steps=2, guided=True), watcher=diary).future.result(PATIENCE)
    assert diary.of("progress") == [(0, 2), (1, 2), (1, 2), (2, 2), (2, 2)]
    assert diary.of("preview") == [(0, 1, an_estimate(1, 1)), (0, 2, an_estimate(1, 2))]


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("every", [0, 1, 2, 3, 4])
def test_previews_come_so_often_of_each_row(every: int, guided: bool, width: int) -> None:
    with warm(width) as s:
        diary, steps = Diary(every), 4
        rows = [a_row(seed, steps, guided) for seed in (1, 2, 3)]
        reads = Counter[str]()
        s.runner.during = lambda call: reads.update([call])
        s.accept(*rows, watcher=diary).future.result(PATIENCE)
    expected = [step for step in range(1, steps + 1) if every and step % every == 0]
    for index in range(3):
        previews = [(step, x0) for at, step, x0 in diary.of("preview") if at == index]
        assert previews == [(step, an_estimate(1 + index, step)) for step in expected]
    assert sorted(diary.of("image")) == [(index, an_image(1 + index, steps)) for index in range(3)]
    assert reads["read"] == 3 + 3 * len(expected)  # only wanted previews and images are read
    progress = [step for step, _ in diary.of("progress")]
    assert progress == sorted(progress)
    assert progress[-1] == steps


def test_only_those_who_watch_are_told_and_of_their_own_rows_alone() -> None:
    with warm(4) as s:
        s.keep_busy()
        diaries = [Diary(preview_every=1), Diary(preview_every=2)]
        jobs = [
            s.accept(a_row(1, steps=2), watcher=diaries[0]),
            s.accept(a_row(2, steps=2)),
            s.accept(a_row(3, steps=2), watcher=diaries[1]),
        ]
        s.runner.let_go()
        for job in jobs:
            job.future.result(PATIENCE)
    assert [diary.of("preview") for diary in diaries] == [
        [(0, 1, an_estimate(1, 1)), (0, 2, an_estimate(1, 2))],
        [(0, 2, an_estimate(3, 2))],
    ]
    assert [diary.of("image") for diary in diaries] == [[(0, an_image(1, 2))], [(0, an_image(3, 2))]]


def test_a_watcher_of_a_request_that_left_is_told_no_more() -> None:
    with warm(2) as s:
        s.runner.hold()
        diary = Diary(preview_every=1)
        leaver = s.accept(a_row(1, steps=9), watcher=diary)
        assert [s.runner.next_pass() for _ in range(2)] == [[(1, 0)]] * 2
        told = [("progress", 1, 9), ("preview", 0, 1, an_estimate(1, 1))]
        assert diary.entries == told
        leaver.future.cancel()
        s.runner.let_go()
        s.submit(a_row(2)).result(PATIENCE)
    assert diary.entries == told


# Observers


def test_passes_are_told_to_the_observer() -> None:
    with warm(2, 4) as s:
        s.runner.seconds = {2: 0.25, 4: 0.5}
        s.submit(a_row(1), a_row(2, steps=2), a_row(3)).result(PATIENCE)
    assert s.observer.passes == [(3, 0.5), (1, 0.25)]


def test_phases_add_up_to_all_the_time_since_the_warm_up() -> None:
    with warm(1) as s:
        began = s.clock.now
        s.clock.now += 2.5
        s.submit(a_row(1, steps=3)).result(PATIENCE)
        s.clock.now += 4.0
        s.submit(a_row(2)).result(PATIENCE)
    by_phase: Counter[Phase] = Counter()
    for phase, seconds in s.observer.phases:
        by_phase[phase] += seconds  # type: ignore[assignment]
    assert by_phase == {"idle": 6.5, "schedule": 0, "admit": 0, "pass": 4.0, "advance": 0}
    assert sum(by_phase.values()) == s.clock.now - began
    first = [phase for phase, _ in s.observer.phases][:6]
    assert first == ["idle", "schedule", "admit", "pass", "advance", "schedule"]


def test_passes_that_raise_take_their_time_too() -> None:
    with warm(2) as s:
        began = s.clock.now
        s.runner.faults = 1
        s.submit(a_row(1), a_row(2)).result(PATIENCE)
    assert sum(seconds for phase, seconds in s.observer.phases if phase == "pass") == s.clock.now - began == 3.0


# Costs


def test_expectations_follow_what_passes_take() -> None:
    with started(a_setting(FakeRunner({1: 1.0, 4: 2.0}))) as s:
        s.runner.seconds = {1: 1.5, 4: 3.0}
        first = s.accept(a_row(1, steps=2))
        first.future.result(PATIENCE)
        followed = s.machine.passes[GROUP].by_width
        assert all(1 < followed[width] / cost < 1.5 for width, cost in ((1, 1.0), (4, 2.0)))
        for _ in range(100):
            s.submit(a_row(1), a_row(2), a_row(3)).result(PATIENCE)
        assert s.machine.passes[GROUP].by_width == {1: pytest.approx(1.5, rel=0.05), 4: pytest.approx(3.0, rel=0.05)}
        assert first.eta_s == 2.0
        assert s.accept(a_row(1, steps=2)).eta_s == pytest.approx(3.0, rel=0.2)


def test_neither_waiting_for_work_nor_a_pass_that_raises_counts_as_cost() -> None:
    with warm(1) as s:
        s.runner.faults = 1
        for _ in range(5):
            s.clock.now += 100
            s.submit(a_row(1, steps=2)).result(PATIENCE)
        assert s.machine.passes[GROUP].by_width == {1: 1.0}


def test_the_backlog_is_what_is_left_at_the_cheapest_width() -> None:
    with started(a_setting(FakeRunner({1: 1.0, 4: 2.0}))) as s:
        assert s.line.backlog_s == 0
        s.runner.hold()
        s.submit(a_row(1, steps=3), a_row(2, steps=3, guided=True))
        s.runner.next_pass()
        assert s.counters == (2, 0, 6)
        assert s.line.backlog_s == pytest.approx(3.0)
        s.runner.next_pass()
        assert s.line.backlog_s == pytest.approx(1.5)


# The engine's state


def test_a_draining_engine_refuses_new_requests_and_finishes_the_others() -> None:
    with warm(1) as s:
        s.runner.hold()
        running, waiting = s.submit(a_row(1, steps=2)), s.submit(a_row(2))
        s.runner.next_pass()
        s.engine.drain()
        assert status_of(s.engine) == "draining"
        assert s.engine.alive
        with pytest.raises(Draining):
            s.submit(a_row(3))
        assert not s.engine.wait_idle(0)
        s.runner.let_go()
        assert images_of(running) == [an_image(1, 2)]
        assert images_of(waiting) == [an_image(2, 1)]
        assert s.engine.wait_idle(PATIENCE)
        assert images_of(s.engine.probe()) == [an_image(PROBE_SEED, 1)]


def test_an_engine_that_drains_before_it_is_warm_never_takes_requests() -> None:
    s = a_setting(FakeRunner({1: 1.0}))
    s.engine.drain()
    with started(s):
        assert status_of(s.engine) == "draining"
        with pytest.raises(Draining):
            s.submit(a_row(1))
    assert s.observer.refused == ["draining"]


def test_an_engine_that_drains_while_it_is_stuck_never_takes_requests_again() -> None:
    with warm(1) as s:
        s.keep_busy()
        s.clock.now += 40
        s.engine.check_health()
        s.engine.drain()
        s.runner.let_go()
        s.settle()
        assert s.engine.alive
        with pytest.raises(Draining):
            s.submit(a_row(1))


def test_wait_idle_ends_when_the_last_request_has_left() -> None:
    with warm(1) as s:
        assert s.engine.wait_idle(0)
        s.runner.hold()
        job = s.submit(a_row(1, ENDLESS))
        s.runner.next_pass()
        assert not s.engine.wait_idle(0)
        idle = threading.Event()
        threading.Thread(
            target=lambda: idle.set() if s.engine.wait_idle(threading.TIMEOUT_MAX) else None, daemon=True
        ).start()
        s.runner.next_pass()
        s.runner.next_pass()
        assert not idle.is_set()
        job.cancel()
        s.runner.let_go()
        assert idle.wait(PATIENCE)


def test_closing_fails_what_is_not_done_and_joins_the_thread() -> None:
    with warm(1) as s:
        engine = s.engine
        s.runner.hold()
        jobs = [s.submit(a_row(1, ENDLESS)), s.submit(a_row(2, ENDLESS))]
        s.runner.next_pass()
        jobs.append(s.submit(a_row(3)))
        told: list[int] = []
        for job in jobs:  # on the engine's thread, after a while
            job.add_done_callback(lambda _: told.append(sum(range(10**6))))
        with ThreadPoolExecutor() as pool:
            closing = pool.submit(engine.close)
            s.runner.let_go()
            closing.result(PATIENCE)
        assert len(told) == 3
        assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
        assert all(isinstance(error_of(job), Draining) for job in jobs)
        assert engine.wait_idle(0)
        assert status_of(engine) == "draining"
        assert not engine.alive
        with pytest.raises(Draining):
            s.submit(a_row(4))
        with pytest.raises(Unavailable):
            engine.probe()
        engine.close()  # a second call has no effect
    assert s.observer.ended == ["draining"] * 3
    assert s.observer.refused == ["draining"]


def test_an_engine_that_never_started_can_be_closed() -> None:
    engine = a_setting(FakeRunner({1: 1.0})).engine
    engine.close()
    assert status_of(engine) == "draining"
    with pytest.raises(Unavailable):
        engine.probe()


def test_requests_of_an_engine_that_dies_fail(caplog: pytest.LogCaptureFixture) -> None:
    with warm(2) as s:
        s.keep_busy()
        s.runner.unreleased = {1}
        jobs = [s.submit(a_row(1)), s.submit(a_row(2)), s.submit(a_row(3, ENDLESS))]
        s.runner.let_go()
        assert all(isinstance(error_of(job), Failed) for job in jobs)
        check_beyond_help(s, "denoising has died")
        assert s.observer.ended == ["failed"] * 3
    [last] = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert last.getMessage() == "denoising has died: only a new process helps"


class Deaf(Recorder):
    """An observer that raises in every call."""

    def __getattribute__(self, name: str) -> Any:
        if name in dir(Observer) and not name.startswith("_"):
            return self._raise
        return super().__getattribute__(name)

    def _raise(self, *args: object) -> None:
        raise RuntimeError("the observer is broken")


def test_an_observer_that_raises_harms_nobody() -> None:
    runner = FakeRunner({2: 1.0})
    with started(a_setting(runner, observer=Deaf(), decode_seconds={1: 1.0})) as s:
        for seed in range(1, 4):
            assert images_of(s.submit(a_row(seed))) == [a_decoded(seed, 1)]
        runner.breaking = s.vae.breaking = {4, 5}
        for latent in (True, False):
            assert isinstance(error_of(s.submit(a_row(4, latent=latent))), ComputationFailed)
        with pytest.raises(Invalid):
            s.submit(a_row(6), timeout_s=0.001)
        s.submit(a_row(7)).cancel()
        assert images_of(s.submit(a_row(8))) == [a_decoded(8, 1)]  # the slot of 7 is released before this pass
        assert s.engine.alive
    assert s.is_empty()


class Bomb(Diary):
    """A watcher that raises in one of its calls."""

    def __init__(self, at: str) -> None:
        super().__init__(preview_every=1)
        self.at = at

    def progress(self, progress: Progress) -> None:
        self._blow_up("progress")

    def preview(self, index: int, step: int, x0: Image) -> None:
        self._blow_up("preview")

    def image(self, index: int, encoded: bytes) -> None:
        self._blow_up("image")

    def _blow_up(self, told: str) -> None:
        if told == self.at:
            raise RuntimeError("the watcher is broken")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("told", ["progress", "preview", "image"])
@pytest.mark.parametrize("decode_seconds", [None, {1: 1.0}], ids=["passes", "decoding"])
def test_a_watcher_that_raises_fails_its_request_alone(
    told: str, steps: int, decode_seconds: dict[int, float] | None
) -> None:
    with started(a_setting(FakeRunner({2: 1.0}), decode_seconds=decode_seconds)) as s:
        s.keep_busy()
        bad = s.accept(a_row(1, steps), a_row(2, steps), watcher=Bomb(told)).future
        good = s.submit(a_row(3, steps=4))
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match="could not be followed"):
            bad.result(PATIENCE)
        assert images_of(good) == [(a_decoded if decode_seconds else an_image)(3, 4)]
        assert not s.engine.in_doubt  # a broken watcher says nothing about the model
    assert s.is_empty()
