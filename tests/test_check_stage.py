"""Checks of images in the engine, with a fake check and a fake clock: one at a time, ahead of the answer."""

from collections import Counter
from dataclasses import replace

import pytest

from service.engine.bounds import MARGIN, SHARED
from service.errors import ComputationFailed, Failed, Invalid, Refused
from tests.engines import (
    GROUP,
    OTHER,
    PATIENCE,
    PROBE_SEED,
    WARM_UP_PASSES,
    Diary,
    FakeEncoding,
    FakeRunner,
    a_decoded,
    a_row,
    a_setting,
    a_start,
    an_image,
    check_beyond_help,
    elsewhere,
    error_of,
    images_of,
    started,
    status_of,
    undisturbed,
    warm,
    warm_checked,
)

SLOWEST = SHARED * (1 + MARGIN)  # the promised time of a check, in multiples of its own time


# The warm-up


def test_the_warm_up_measures_a_check_of_the_probes_image_in_each_group() -> None:
    """The probe's image may be refused."""
    runner = FakeRunner({1: 1.0})
    s = a_setting(runner, other=FakeRunner({1: 1.0}, like=runner), check_seconds=0.25)
    s.check.refusing = {PROBE_SEED}
    slower = iter([50.0, 0.3, 0.5, 0.0, 0.1] * 2)
    s.check.during = lambda call: s.clock.advance(next(slower))
    with undisturbed():
        s.engine.start()
        assert s.engine.wait_loaded(PATIENCE)
    assert len(s.check.calls) == 2 * (1 + WARM_UP_PASSES)
    assert {group: costs.by_width for group, costs in s.machine.check.items()} == {GROUP: {1: 0.25}, OTHER: {1: 0.25}}
    assert status_of(s.engine) == "ready"
    s.engine.close()


@pytest.mark.parametrize(
    ("fault", "why"), [("failing", "the check of an image failed"), ("breaking", "this check breaks")]
)
def test_an_engine_whose_check_does_not_work_is_failed(fault: str, why: str) -> None:
    s = a_setting(FakeRunner({1: 1.0}), check_seconds=0.25)
    setattr(s.check, fault, {PROBE_SEED})
    s.engine.start()
    assert s.engine.wait_loaded(PATIENCE)
    assert status_of(s.engine) == "failed"
    assert why in (s.engine.beyond_help or "")
    s.engine.close()


def test_a_check_that_does_not_return_at_the_start_is_found() -> None:
    s = a_setting(FakeRunner({1: 1.0}), check_seconds=0.25)
    s.check.hold()
    s.engine.start()
    assert s.check.next_call() == PROBE_SEED
    s.clock.advance(600)
    s.engine.check_health()
    assert not s.engine.alive
    s.clock.advance(1800)
    s.engine.check_health()
    assert "checking an image has not returned" in (s.engine.beyond_help or "")
    s.check.let_go()
    s.engine.close()


# Images


def test_each_image_is_checked_before_it_is_encoded_and_the_check_sees_the_image() -> None:
    with warm_checked(2, decode_seconds={1: 0.5}) as s:
        encoding = FakeEncoding(of_whole=1)
        order: list[str] = []
        s.check.during = lambda call: order.append("check")
        encoding.during = lambda index: order.append("encode")
        assert images_of(s.submit(a_row(1, 3), encoding=encoding)) == [a_decoded(1, 3)]
        assert order == ["check", "encode", "encode"]
        assert s.check.calls == [1]
        job = s.submit(a_row(1, 5), a_row(2, 1), encoding=FakeEncoding())
        assert images_of(job) == [a_decoded(1, 5), a_decoded(2, 1)]
        assert sorted(s.check.calls[1:]) == [1, 2]
    assert s.is_empty()


def test_one_image_is_checked_at_a_time_the_earliest_promise_first_while_others_take_their_steps() -> None:
    with warm_checked(4) as s:
        s.check.hold()
        first = s.submit(a_row(9))
        assert s.check.next_call() == 9
        jobs = {1: s.accept(a_row(1, 2), a_row(2, 2)), 3: s.accept(a_row(3), timeout_s=6)}
        assert jobs[3].promise_s < jobs[1].promise_s
        s.take_all_steps()
        assert s.to_check == (4, 4)
        assert [s.check.next_call() for _ in range(3)] == [3, 1, 2]
        s.check.let_go()
        assert images_of(first) == [an_image(9, 1)]
        assert [len(images_of(job.future)) for job in jobs.values()] == [2, 1]
    assert s.is_empty()


def test_latents_and_predictions_are_not_checked_and_neither_is_the_probe() -> None:
    with warm_checked(1, decode_seconds={1: 0.5}) as s:
        assert images_of(s.submit(a_row(1, latent=True))) == [an_image(1, 1)]
        assert images_of(s.submit(replace(a_row(2, 2), model_output=True))) == [an_image(2, 2)]
        s.clock.advance(21)
        s.engine.probe().result(PATIENCE)
        assert s.check.calls == []


def test_images_of_rows_without_steps_are_checked_too() -> None:
    """Otherwise latents could be made into a picture that the check has not seen."""
    with warm_checked(1, decode_seconds={1: 0.5}) as s:
        assert images_of(s.submit(a_start(3, 3))) == [a_decoded(3, 3)]
        s.check.refusing = {4}
        assert isinstance(error_of(s.upload(4, 2.5, a_start(4, 0))), Refused)
        assert s.check.calls == [3, 4]
    assert s.is_empty()


@pytest.mark.parametrize("images", [1, 3])
def test_a_refused_image_refuses_its_request_with_the_reason(images: int) -> None:
    with warm_checked(4) as s:
        s.keep_busy()
        s.check.refusing = {1}
        encoding = FakeEncoding()
        bad = s.submit(*(a_row(seed) for seed in range(1, images + 1)), encoding=encoding)
        good = s.submit(a_row(7))
        s.runner.let_go()
        with pytest.raises(Refused, match=r"^image 1 is not nice$"):
            bad.result(PATIENCE)
        assert images_of(good) == [an_image(7, 1)]
        assert s.check.calls == [1, 7]  # the other images of the request are not asked for
        assert encoding.calls == []
        assert not s.engine.in_doubt
    assert Counter(s.observer.ended) == {"refused": 1, 1: 1}
    assert s.observer.failed_batches == []
    assert s.is_empty()


def test_what_is_refused_is_never_shown() -> None:
    """Neither in a preview nor as an image that is ready before the others. An image that has passed may be shown."""
    with warm_checked(1, decode_seconds={1: 0.5}) as s:
        s.check.refusing = {2}
        diary = Diary(preview_every=1)
        job = s.accept(a_row(1), a_row(2, steps=3), watcher=diary).future
        assert isinstance(error_of(job), Refused)
        assert diary.of("preview") == []
        assert {index for index, _ in diary.of("image")} <= {0}
    assert s.is_empty()


def test_latents_have_previews_even_with_a_check() -> None:
    """They are not checked themselves."""
    with warm_checked(1, decode_seconds={1: 0.5}) as s:
        diary = Diary(preview_every=1)
        s.accept(a_row(1, 2, latent=True), watcher=diary).future.result(PATIENCE)
        assert len(diary.of("preview")) == 2


def test_a_check_that_fails_is_asked_once_and_fails_the_request() -> None:
    with warm_checked(1) as s:
        s.check.failing = {1}
        with pytest.raises(ComputationFailed, match="the check of an image failed"):
            s.submit(a_row(1)).result(PATIENCE)
        assert images_of(s.submit(a_row(2))) == [an_image(2, 1)]
        assert s.check.calls == [1, 2]
        assert not s.engine.in_doubt
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_a_check_that_raises_anything_else_fails_the_request_alone() -> None:
    with warm_checked(1) as s:
        s.check.breaking = {1}
        with pytest.raises(ComputationFailed, match="could not be checked"):
            s.submit(a_row(1)).result(PATIENCE)
        assert images_of(s.submit(a_row(2))) == [an_image(2, 1)]
        assert not s.engine.in_doubt
    assert s.observer.failed_batches == ["check"] * 2
    assert s.is_empty()


def test_a_check_that_does_not_return_is_found() -> None:
    with warm_checked(1) as s:
        s.check.hold()
        job = s.submit(a_row(1))
        assert s.check.next_call() == 1
        s.clock.advance(8.0)
        s.engine.check_health()
        assert isinstance(error_of(job), Failed)
        s.clock.advance(24)
        s.engine.check_health()
        check_beyond_help(s, "checking an image has not returned for 32 s")
        s.check.let_go()


def test_a_client_that_leaves_while_its_image_is_checked_is_gone() -> None:
    with warm_checked(2) as s:
        s.check.hold()
        encoding = FakeEncoding()
        leaver = s.submit(a_row(1), a_row(2), encoding=encoding)
        assert s.check.next_call() == 1
        stayer = s.submit(a_row(3))
        assert elsewhere(leaver.cancel)
        assert s.observer.ended == ["disconnect"]
        s.check.let_go()
        assert images_of(stayer) == [an_image(3, 1)]
        assert s.check.calls == [1, 3]
        assert encoding.calls == []
    assert s.is_empty()


# Time


def test_a_promise_and_an_estimate_have_the_checks_in_them() -> None:
    with warm_checked(1, check_seconds=4.0) as s:
        alone_s = 2 * (1 + MARGIN) + 3 * 4.0 * SLOWEST  # its checks, and one that may be under way
        rows = a_row(1), a_row(2)
        with pytest.raises(Invalid, match="must be at least"):
            s.accept(*rows, timeout_s=alone_s - 0.1)
        accepted = s.accept(*rows, timeout_s=alone_s)
        assert accepted.promise_s == alone_s
        assert accepted.eta_s == pytest.approx(1 + 2 * 4.0, rel=0.15)  # the second row steps meanwhile
        assert len(images_of(accepted.future)) == 2
        assert s.accept(replace(a_row(3), model_output=True), timeout_s=2.0).promise_s == 2.0  # is not checked
    assert s.observer.finished[0][1]


def test_checks_are_in_no_other_time_of_the_answer() -> None:
    with warm_checked(1, check_seconds=4.0, decode_seconds={1: 0.5}) as s:
        finished = s.submit(a_row(1, steps=3), encoding=FakeEncoding()).result(PATIENCE)
        assert finished[1:5] == (0.0, 3.0, 0.5, 0.0)
    [(_, _, _, taken_s)] = s.observer.finished
    assert taken_s == 3.0 + 0.5 + 4.0


def test_expectations_follow_what_checks_take() -> None:
    with warm_checked(1, check_seconds=1.0) as s:
        s.check.seconds = 3.0
        for seed in range(1, 61):
            s.submit(a_row(seed)).result(PATIENCE)
        assert s.machine.check[GROUP].seconds(1) == pytest.approx(3.0, rel=0.1)


def test_progress_counts_checks() -> None:
    with warm_checked(1, check_seconds=2.0) as s:
        diary = Diary()
        s.accept(a_row(1, steps=2), watcher=diary, encoding=FakeEncoding()).future.result(PATIENCE)
    fractions = [progress.fraction for progress in diary.told]
    assert fractions == sorted(fractions)
    assert fractions[:2] == pytest.approx([1 / 4, 2 / 4], rel=0.01)
    assert fractions[-1] == 1.0


def test_an_engine_without_a_check_checks_nothing() -> None:
    with warm(1) as s:
        s.submit(a_row(1)).result(PATIENCE)
        assert s.machine.check == {}
    assert s.observer.batches == []


def test_what_is_checked_leaves_nothing_behind_with_two_groups() -> None:
    runner = FakeRunner({1: 1.0})
    with started(a_setting(runner, other=FakeRunner({1: 1.0}, like=runner), check_seconds=0.25)) as s:
        s.submit(a_row(1)).result(PATIENCE)
        s.submit(a_row(2, group=OTHER)).result(PATIENCE)
        assert s.check.calls == [1, 2]
    assert s.is_empty()
