"""The stages beside denoising, with a fake VAE and a fake clock: uploads are encoded, latents decoded, answers encoded.

They work beside the passes of other rows.
"""

import gc
import json
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.rows import Image, Moments, Row
from service.engine.bounds import MARGIN, SHARED
from service.engine.engine import Engine
from service.engine.requests import Finished, Progress, Upload
from service.errors import ComputationFailed, DeadlinePassed, Draining, Failed, Invalid, QueueFull
from service.http.metrics import Metrics, exposition
from tests.engines import (
    ENDLESS,
    GROUP,
    LONG,
    OTHER,
    PATIENCE,
    PROBE,
    PROBE_SEED,
    WARM_UP_PASSES,
    Call,
    Diary,
    FakeEncoding,
    FakeRunner,
    Recorder,
    Setting,
    a_decoded,
    a_row,
    a_setting,
    a_start,
    an_estimate,
    an_image,
    check_beyond_help,
    check_that_it_gives_up,
    check_that_nothing_but_a_hang_does_harm,
    check_that_probes_tell,
    elsewhere,
    error_of,
    images_of,
    pixels,
    started,
    status_of,
    undisturbed,
    warm,
    warm_latent,
)
from tests.properties import examples
from tests.scripted import DECODED_FATES, FATES, Client, Script, Submit, scripts
from tests.test_responses import SERVED

BLOCKER = 99  # its seed
SLOWEST = SHARED * (1 + MARGIN)  # the promised time of a batch, in multiples of its own time


def keep_decoder_busy(s: Setting) -> Future[Finished]:
    """Hold the decoder in a batch of one row. Rows that take their last step now wait for the decoder."""
    s.vae.hold()
    blocker = s.submit(a_row(BLOCKER))
    assert s.vae.next_batch() == [BLOCKER]
    return blocker


def seeds_of(calls: list[Call]) -> list[list[int]]:
    assert {name for name, _ in calls} <= {"decode"}
    return [seeds for _, seeds in calls]


# The warm-up


def test_the_warm_up_measures_batches_of_each_width_by_the_fastest_but_the_first() -> None:
    s = a_setting(FakeRunner({1: 0.1}), decode_seconds={1: 0.1, 2: 0.15})
    slower = iter([0.5, *[0.5, 0.3, 0.0, 0.1], *[0.3, 0.0, 0.1], *[0.5, 0.3, 0.0, 0.1]])
    s.vae.during = lambda call: s.clock.advance(next(slower))
    with undisturbed():
        s.engine.start()
        assert s.engine.wait_loaded(PATIENCE)
    probe = [PROBE_SEED]
    widths = [*[Call("decode", probe)] * (WARM_UP_PASSES - 1), *[Call("decode", 2 * probe)] * WARM_UP_PASSES]
    assert s.vae.calls == [Call("decode", probe), *[Call("encode", probe)] * WARM_UP_PASSES, *widths]
    assert s.machine.decode[GROUP].by_width == pytest.approx({1: 0.1, 2: 0.15})
    assert s.machine.encode[GROUP].by_width == pytest.approx({1: 0.1})
    assert s.machine.passes[GROUP].by_width == pytest.approx({1: 0.1})
    assert s.observer.batches == []
    assert s.is_empty()
    s.engine.close()
    assert s.vae.complaints == []


@pytest.mark.parametrize("fault", ["breaking", "poisoned", "encoding breaks"])
def test_an_engine_whose_vae_does_not_work_is_failed(fault: str) -> None:
    s = a_setting(FakeRunner({1: 1.0}), decode_seconds={1: 1.0})
    if fault == "encoding breaks":
        s.vae.during = lambda call: setattr(s.vae, "faults", int(call == "encode"))
    else:
        setattr(s.vae, fault, {PROBE_SEED})
    s.engine.start()
    assert s.engine.wait_loaded(PATIENCE)
    assert status_of(s.engine) == "failed"
    for ask in (partial(s.submit, a_row(1)), partial(s.upload, 1, 1)):
        with pytest.raises(Failed, match="the engine has stopped"):
            ask()
    s.engine.close()


# Results


def test_a_request_gives_its_images_decoded_in_the_order_of_its_rows() -> None:
    with warm_latent(2) as s:
        job = s.submit(a_row(1, steps=5), a_row(2, steps=1), a_row(3, steps=2, guided=True))
        assert images_of(job) == [a_decoded(1, 5), a_decoded(2, 1), a_decoded(3, 2)]
    assert s.observer.ended == [3]
    assert s.is_empty()


def test_latents_and_predictions_that_are_asked_for_are_not_decoded() -> None:
    with warm_latent(2) as s:
        latent = s.submit(a_row(1, latent=True))
        prediction = s.submit(replace(a_row(2, steps=2), model_output=True))
        assert images_of(latent) == [an_image(1, 1)]
        assert images_of(prediction) == [an_image(2, 2)]
        assert latent.result().decode_s == prediction.result().decode_s == 0
        assert s.vae.calls == []
    assert s.is_empty()


def test_a_finished_request_says_how_long_it_was_decoded_from_its_last_step_on() -> None:
    with warm_latent(1, decode_seconds={1: 0.25}) as s:
        s.vae.hold()
        first = s.submit(a_row(1, steps=3))
        assert s.vae.next_batch() == [1]
        second = s.submit(a_row(2))
        s.take_all_steps()
        s.clock.advance(8.0)
        s.vae.let_go()
        waited = second.result(PATIENCE).decode_s
        passes = len(s.runner.passes) - 3  # since the last step of the first request; its latents were held up by them
        assert first.result(PATIENCE)[1:4] == (0.0, 3.0, passes + 8.0 + 0.25)
        assert 8.0 + 2 * 0.25 < waited <= passes + 8.0 + 2 * 0.25
    assert [sum(finished[1:4]) == taken_s for finished, _, _, taken_s in s.observer.finished] == [True, True]


# Beside passes


def test_others_take_their_steps_while_a_batch_is_decoded() -> None:
    with warm_latent(2) as s:
        blocker = keep_decoder_busy(s)
        plain = s.submit(a_row(1, steps=5, latent=True))
        assert images_of(plain) == [an_image(1, 5)]
        to_come = s.submit(a_row(2, steps=4))
        s.take_all_steps()
        assert s.to_decode == (2, 2)
        assert s.counters == (0, 0, 0)
        assert s.in_flight == []  # rows that wait for the decoder hold no slot
        assert not blocker.done()
        assert not to_come.done()
        s.vae.let_go()
        assert images_of(blocker) == [a_decoded(BLOCKER, 1)]
        assert images_of(to_come) == [a_decoded(2, 4)]
    assert s.is_empty()


def test_images_are_decoded_while_a_pass_runs() -> None:
    with warm_latent(1) as s:
        blocker = keep_decoder_busy(s)
        waiting = s.submit(a_row(1))
        s.take_all_steps()
        s.runner.hold()
        stepping = s.submit(a_row(2, steps=2))
        assert s.runner.next_pass() == [(2, 0)]
        s.vae.let_go()
        assert images_of(blocker) == [a_decoded(BLOCKER, 1)]
        assert images_of(waiting) == [a_decoded(1, 1)]
        assert s.runner.passes[-1] == [(2, 0)]
        assert not stepping.done()
        s.runner.let_go()
        assert images_of(stepping) == [a_decoded(2, 2)]
    assert s.is_empty()


# Batches


def test_rows_that_take_their_last_step_in_one_pass_are_decoded_in_one_batch() -> None:
    with warm_latent(4) as s:
        for _ in range(10):  # the decoder once got the rows one by one, and began with the first
            s.submit(*map(a_row, range(1, 5))).result(PATIENCE)
        assert seeds_of(s.vae.calls) == [[1, 2, 3, 4]] * 10
        assert s.observer.batches_of("decode") == [(4, 1.0)] * 10


def test_what_waits_is_decoded_together_the_earliest_promise_first() -> None:
    with warm_latent(4, decode_seconds={1: 1.0, 3: 1.5}) as s:
        keep_decoder_busy(s)
        promises: dict[int, float] = {}
        for seed, timeout_s in enumerate((LONG, 15.5, 15.0, LONG, 14.5), 1):
            accepted = s.accept(a_row(seed), timeout_s=timeout_s)
            promises[seed] = s.clock.now + accepted.promise_s
        s.take_all_steps()
        order = sorted(promises, key=lambda seed: promises[seed])
        assert order != sorted(order)
        assert s.vae.next_batch() == order[:3]
        assert s.vae.next_batch() == order[3:]
        s.vae.let_go()
    assert s.is_empty()


def test_a_batch_has_no_image_that_goes_after_an_image_of_another_size() -> None:
    runner = FakeRunner({1: 1.0})
    with started(a_setting(runner, other=FakeRunner({1: 1.0}, like=runner), decode_seconds={4: 1.0})) as s:
        keep_decoder_busy(s)
        for seed, group in enumerate((GROUP, GROUP, OTHER, GROUP), 1):
            s.submit(a_row(seed, group=group), timeout_s=20 + seed)
        s.take_all_steps()
        assert [s.vae.next_batch() for _ in range(3)] == [[1, 2], [3], [4]]
        s.vae.let_go()
    assert s.is_empty()


def test_batches_are_no_wider_than_pays() -> None:
    with warm_latent(4, decode_seconds={1: 1.0, 2: 1.5, 4: 3.0}) as s:
        s.submit(*map(a_row, range(1, 6))).result(PATIENCE)
        assert seeds_of(s.vae.calls) == [[1, 2], [3, 4], [5]]


def test_images_of_one_request_and_of_others_share_batches() -> None:
    with warm_latent(4, decode_seconds={4: 1.0}) as s:
        keep_decoder_busy(s)
        jobs = [s.submit(a_row(1), a_row(2)), s.submit(a_row(3)), s.submit(a_row(4), a_row(5))]
        s.take_all_steps()
        assert s.vae.next_batch() == [1, 2, 3, 4]
        s.vae.let_go()
        assert [len(images_of(job)) for job in jobs] == [2, 1, 2]
        assert seeds_of(s.vae.calls) == [[BLOCKER], [1, 2, 3, 4], [5]]


def test_expectations_follow_what_batches_take() -> None:
    with warm_latent(1, decode_seconds={1: 1.0, 4: 2.0}) as s:
        s.vae.seconds = {1: 3.0, 4: 6.0}
        for _ in range(60):
            s.submit(a_row(1)).result(PATIENCE)
        assert s.machine.decode[GROUP].by_width == pytest.approx({1: 3.0, 4: 6.0}, rel=0.2)
        assert s.machine.passes[GROUP].by_width == {1: 1.0}


# Watchers


def test_a_watcher_is_told_of_steps_previews_and_images_in_this_order() -> None:
    with warm_latent(1, decode_seconds={1: 0.5}) as s:
        s.keep_busy()
        diary = Diary(preview_every=2)
        diary.future = s.accept(a_row(7, steps=3), watcher=diary).future
        s.runner.let_go()
        assert images_of(diary.future) == [a_decoded(7, 3)]
    assert diary.entries == [
        ("progress", 1, 3),
        ("progress", 2, 3),
        ("preview", 0, 2, an_estimate(7, 2)),  # of latents
        ("progress", 3, 3),
        ("image", 0, a_decoded(7, 3)),
        ("progress", 3, 3),
    ]
    assert diary.was_done == [False]
    assert diary.etas[-2:] == [pytest.approx(0.5, abs=0.1), 0.0]


def test_images_of_a_request_are_shown_as_they_are_decoded() -> None:
    with warm_latent(1, decode_seconds={1: 1.0}) as s:
        diary = Diary()
        s.vae.hold()
        job = s.accept(a_row(1), a_row(2, steps=2), watcher=diary)
        assert s.vae.next_batch() == [1]
        s.take_all_steps()
        assert s.vae.next_batch() == [2]
        diary.wait_for(partial(has_done, 1))
        assert diary.of("image") == [(0, a_decoded(1, 1))]
        assert not job.future.done()
        s.vae.let_go()
        job.future.result(PATIENCE)
    assert diary.of("image") == [(0, a_decoded(1, 1)), (1, a_decoded(2, 2))]


# Leaving


@pytest.mark.parametrize("place", ["waits", "is in the batch"])
def test_a_request_may_be_cancelled_while_only_decoding_is_left(place: str) -> None:
    with warm_latent(4) as s:
        keep_decoder_busy(s)
        leaver, stayer = s.submit(a_row(1), a_row(2)), s.submit(a_row(3))
        s.take_all_steps()
        if place == "is in the batch":
            assert s.vae.next_batch() == [1, 2, 3]
        assert s.to_decode[0] in (3, 4)
        assert elsewhere(leaver.cancel)
        assert s.observer.ended.count("disconnect") == 1  # at once
        waiting = 1 + (place == "waits")
        assert s.to_decode == (waiting, waiting)
        assert s.places.taken == waiting
        if place == "waits":
            assert s.vae.next_batch() == [3]
        s.vae.let_go()
        assert images_of(stayer) == [a_decoded(3, 1)]
    assert Counter(s.observer.ended) == {"disconnect": 1, 1: 2}
    assert s.is_empty()


def test_a_request_may_be_cancelled_while_one_of_its_images_is_decoded_and_another_has_steps_left() -> None:
    with warm_latent(1, decode_seconds={1: 1.0}) as s:
        s.vae.hold()
        leaver = s.submit(a_row(1), a_row(2, steps=ENDLESS))
        assert s.vae.next_batch() == [1]
        assert s.to_decode == (2, 1)
        leaver.cancel()
        assert s.to_decode == (0, 0)
        s.vae.let_go()
        assert images_of(s.submit(a_row(3))) == [a_decoded(3, 1)]
    assert s.observer.ended == ["disconnect", 1]
    assert s.is_empty()


@pytest.mark.parametrize("call", ["decode", "image"])
def test_a_request_may_be_cancelled_by_another_thread_in_any_call_of_the_decoder(call: str) -> None:
    """The other thread must not wait for the call."""
    with warm_latent(4) as s:
        cancelled: list[bool] = []
        leaver: list[Future[Finished]] = []

        def cancel() -> None:
            if leaver and not cancelled:
                cancelled.append(elsewhere(leaver[0].cancel))

        class Leaving(Diary):
            def image(self, index: int, encoded: bytes) -> None:
                super().image(index, encoded)
                if call == "image":
                    cancel()

        s.keep_busy()
        s.vae.during = lambda called: cancel() if called == call else None
        leaver.append(s.accept(a_row(1), a_row(2), watcher=Leaving()).future)
        stayer = s.submit(a_row(3))
        s.runner.let_go()
        assert images_of(stayer) == [a_decoded(3, 1)]
        s.submit(a_row(4), encoding=FakeEncoding()).result(PATIENCE)  # every thread has made its calls for the others
        assert cancelled == [True]
    assert Counter(s.observer.ended) == {"disconnect": 1, 1: 2}
    assert s.is_empty()


@pytest.mark.parametrize("others", [0, 2])
def test_what_a_finished_request_held_goes_at_once(others: int) -> None:
    gc.collect()
    gc.disable()
    try:
        with warm_latent(4) as s:
            for seed in range(others):
                s.submit(a_row(10 + seed, steps=ENDLESS))
            future = s.accept(a_row(1), a_row(2), watcher=Diary(preview_every=1)).future
            images = [weakref.ref(image) for image in future.result(PATIENCE).images]
            s.submit(a_row(3), encoding=FakeEncoding()).result(PATIENCE)  # all stages have let go of the first request
            s.observer.finished.clear()
            waiting = weakref.ref(future)
            del future
            assert waiting() is None
            assert [image() for image in images] == [None, None]
    finally:
        gc.enable()


def test_a_request_whose_time_is_over_while_it_waits_for_the_decoder_is_late() -> None:
    with warm_latent(2) as s:
        blocker = keep_decoder_busy(s)
        late, stayer = s.submit(a_row(1, steps=2), timeout_s=25), s.submit(a_row(2, steps=2))
        s.take_all_steps()
        s.clock.advance(25)
        assert s.vae.next_batch() == [2]
        with pytest.raises(DeadlinePassed, match="not done within 25 s"):
            late.result(PATIENCE)
        assert s.places.taken == 1
        s.vae.let_go()
        assert images_of(blocker) == [a_decoded(BLOCKER, 1)]
        assert images_of(stayer) == [a_decoded(2, 2)]
    assert s.observer.ended == [1, "timeout", 1]
    assert s.is_empty()


def test_a_request_whose_time_is_over_in_its_last_batch_is_done_and_its_promise_missed() -> None:
    with warm_latent(1) as s:
        s.vae.hold()
        job = s.submit(a_row(1), timeout_s=20)
        s.vae.next_batch()
        s.clock.advance(25)
        s.vae.let_go()
        assert images_of(job) == [a_decoded(1, 1)]
    assert [kept for _, kept, *_ in s.observer.finished] == [False]


# Failures


def test_images_of_a_batch_that_raises_are_tried_again_alone_and_only_the_culprit_fails() -> None:
    with warm_latent(4) as s:
        s.keep_busy()
        s.vae.breaking = {2}
        jobs = [s.submit(a_row(seed, steps=seed)) for seed in (1, 1, 1)]
        culprit = s.submit(a_row(2, steps=1))
        s.runner.let_go()
        with pytest.raises(ComputationFailed) as error:
            culprit.result(PATIENCE)
        assert str(error.value) == "an image of this request could not be decoded"  # the cause goes only to the log
        assert [images_of(job) for job in jobs] == [[a_decoded(1, 1)]] * 3
        assert seeds_of(s.vae.calls) == [[1, 1, 1, 2], [1], [1], [1], [2]]
    assert s.observer.failed_batches == ["decode"] * 2
    assert s.observer.failed_passes == 0
    assert Counter(s.observer.ended) == {"failed": 1, 1: 3}
    assert s.is_empty()


@pytest.mark.parametrize("culprit", [1, 2, 3])
def test_a_request_of_several_images_fails_whole_and_the_others_are_not_tried(culprit: int) -> None:
    with warm_latent(4) as s:
        s.keep_busy()
        s.vae.breaking = {culprit}
        failing, innocent = s.submit(a_row(1), a_row(2), a_row(3)), s.submit(a_row(4))
        s.runner.let_go()
        assert isinstance(error_of(failing), ComputationFailed)
        assert images_of(innocent) == [a_decoded(4, 1)]
        tried = [[seed] for seed in (1, 2, 3) if seed <= culprit]
        assert seeds_of(s.vae.calls) == [[1, 2, 3, 4], *tried, [4]]
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_who_is_cancelled_during_a_batch_that_raises_is_not_tried_again() -> None:
    with warm_latent(2) as s:
        s.keep_busy()
        s.vae.hold()
        s.vae.faults = 1
        leaver, stayer = s.submit(a_row(1)), s.submit(a_row(2))
        s.runner.let_go()
        assert s.vae.next_batch() == [1, 2]
        leaver.cancel()
        assert s.vae.next_batch() == [2]
        s.vae.let_go()
        assert images_of(stayer) == [a_decoded(2, 1)]
    assert s.observer.ended == ["disconnect", 1]


@pytest.mark.parametrize("images", [1, 2])
def test_a_fault_of_decoding_that_does_not_come_again_harms_nobody(images: int) -> None:
    with warm_latent(2) as s:
        s.vae.faults = 1
        job = s.submit(*(a_row(seed) for seed in range(images)))
        assert images_of(job) == [a_decoded(seed, 1) for seed in range(images)]
        assert status_of(s.engine) == "ready"
        assert not s.engine.in_doubt
    assert s.observer.ended == [images]
    assert s.is_empty()


def test_an_image_that_is_not_finite_when_it_is_decoded_fails_its_request_alone() -> None:
    with warm_latent(3) as s:
        s.keep_busy()
        s.vae.poisoned = {1}
        bad, good = s.submit(a_row(1), a_row(2)), s.submit(a_row(3))
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match="not finite"):
            bad.result(PATIENCE)
        assert images_of(good) == [a_decoded(3, 1)]
        assert seeds_of(s.vae.calls) == [[1, 2, 3]]
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


# Readiness


def test_the_probe_is_decoded_only_where_decoding_has_failed() -> None:
    with warm_latent(1) as s:
        s.clock.advance(21)
        assert s.engine.in_doubt  # because no pass has run for a long time
        assert images_of(s.engine.probe()) == [an_image(PROBE_SEED, 1)]
        assert not s.engine.in_doubt
        assert s.vae.calls == []

        s.vae.breaking = {1}
        assert isinstance(error_of(s.submit(a_row(1))), ComputationFailed)
        assert s.engine.in_doubt
        assert images_of(s.engine.probe()) == [a_decoded(PROBE_SEED, 1)]
        assert not s.engine.in_doubt


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_a_probe_shows_whether_decoding_works_again(fault: str) -> None:
    with warm_latent(1) as s:
        check_that_probes_tell(s, s.vae, fault)
    assert s.observer.ended == ["failed"]


def test_latents_that_are_finite_do_not_show_that_decoding_works() -> None:
    with warm_latent(1) as s:
        s.vae.breaking = {1}
        assert isinstance(error_of(s.submit(a_row(1))), ComputationFailed)
        assert images_of(s.submit(a_row(2, latent=True))) == [an_image(2, 1)]
        assert s.engine.in_doubt
        assert images_of(s.submit(a_row(3))) == [a_decoded(3, 1)]
        assert not s.engine.in_doubt


def test_latents_that_are_not_finite_do_not_show_that_decoding_does_not_work() -> None:
    with warm_latent(1) as s:
        s.runner.poisoned = {1}
        assert isinstance(error_of(s.submit(a_row(1, latent=True))), ComputationFailed)
        assert s.engine.in_doubt
        s.engine.probe().result(PATIENCE)
        assert not s.engine.in_doubt
        assert s.vae.calls == []


def test_an_upload_says_nothing_of_whether_images_can_be_decoded() -> None:
    with warm_latent(1) as s:
        s.vae.poisoned = {7}
        for job in (s.submit(a_start(7, 1)), s.upload(7, 1)):  # a client may have sent anything
            assert isinstance(error_of(job), ComputationFailed)
        assert not s.engine.in_doubt
        s.vae.breaking = {1}
        for job in (s.submit(a_start(1, 1)), s.upload(1, 1)):
            assert isinstance(error_of(job), ComputationFailed)
        assert not s.engine.in_doubt
        assert isinstance(error_of(s.submit(a_row(1))), ComputationFailed)
        s.upload(2, 1).result(PATIENCE)
        s.submit(a_start(2, 1)).result(PATIENCE)
        assert s.engine.in_doubt


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_images_that_cannot_be_decoded_never_make_the_engine_fail_however_many_there_are(fault: str) -> None:
    with warm_latent(1, decode_seconds={1: 1.0}) as s:
        for seed in range(1, 30):
            setattr(s.vae, fault, {seed})
            assert isinstance(error_of(s.submit(a_row(seed))), ComputationFailed)
            assert status_of(s.engine) == "ready"
            if seed % 3 == 0:
                s.engine.check_health()
                s.engine.probe().result(PATIENCE)
                assert not s.engine.in_doubt
        assert s.engine.alive
        assert s.engine.beyond_help is None


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_an_engine_whose_probes_cannot_be_decoded_gives_up(fault: str) -> None:
    with warm_latent(1) as s:
        check_that_it_gives_up(s, s.vae, fault)


def test_an_upload_that_is_encoded_is_no_doubt() -> None:
    """The engine's own idle time does not matter."""
    with warm_latent(1, decode_seconds={1: 12.0}) as s:
        s.vae.hold()
        upload = s.upload(1, 1)
        assert s.vae.next_call() == Call("encode", [1])
        s.clock.advance(100)
        assert not s.engine.in_doubt
        s.engine.asked()
        s.engine.check_health()
        assert s.runner.passes == []
        assert status_of(s.engine) == "ready"
        s.vae.let_go()
        upload.result(PATIENCE)


# Batches that do not return


@pytest.mark.parametrize(("seconds", "limit"), [(0.25, 8.0), (5.0, 80.0)])
def test_a_batch_that_does_not_return_fails_all_requests(seconds: float, limit: float) -> None:
    with warm_latent(1, decode_seconds={1: seconds}) as s:
        blocker = keep_decoder_busy(s)
        began = s.clock.now
        s.clock.advance(limit - 4)
        jobs = [blocker, s.submit(a_row(1))]
        s.take_all_steps()
        s.runner.hold()
        jobs.append(s.submit(a_row(2, steps=5)))
        s.runner.next_pass()
        jobs.append(s.submit(a_start(3, 1)))
        s.clock.now = began + limit - 0.1
        s.engine.check_health()
        assert s.engine.alive
        assert not any(job.done() for job in jobs)

        s.clock.now = began + limit
        for _ in range(2):  # a second time does nothing
            s.engine.check_health()
            assert all(isinstance(error_of(job), Failed) for job in jobs)
            assert status_of(s.engine) == "failed"
            assert not s.engine.alive
            assert s.engine.wait_idle(0)
            assert s.to_decode == (0, 0)
        for ask in (partial(s.submit, a_row(4)), s.engine.probe, partial(s.upload, 4, 1)):
            with pytest.raises(Failed, match="does not return"):
                ask()
        assert s.observer.ended == ["failed"] * 4


def test_an_engine_whose_decoder_was_stuck_recovers_when_that_returns_and_no_earlier() -> None:
    """A pass that ended meanwhile once made the engine accept requests again."""
    with warm_latent(1) as s:
        keep_decoder_busy(s)
        s.clock.advance(12)
        s.runner.hold()
        s.submit(a_row(1))
        s.runner.next_pass()
        s.clock.advance(4)
        s.engine.check_health()
        s.runner.let_go()
        s.settle()
        assert not s.engine.alive
        with pytest.raises(Failed, match="does not return"):
            s.submit(a_row(2))
        s.vae.let_go()
        s.settle_decoding()
        assert s.engine.alive
        s.engine.check_health()
        assert images_of(s.submit(a_row(3))) == [a_decoded(3, 1)]
        assert status_of(s.engine) == "ready"
        assert not s.engine.in_doubt
    assert s.observer.ended == ["failed", "failed", 1]
    assert s.is_empty()


def test_an_upload_that_is_stuck_is_found_and_answered_once() -> None:
    with warm_latent(1) as s:
        s.vae.hold()
        uploads = [s.upload(1, 1), s.upload(2, 1)]
        assert s.vae.next_call() == Call("encode", [1])
        s.clock.advance(30)
        s.engine.check_health()
        assert all(isinstance(error_of(upload), Failed) for upload in uploads)
        assert not s.engine.alive
        s.vae.let_go()
        s.engine.close()
        assert s.vae.calls == [Call("encode", [1])]
    assert s.observer.ended == ["failed"] * 2


@pytest.mark.parametrize("noticed", [True, False])
def test_an_engine_whose_decoder_is_stuck_can_be_closed(noticed: bool) -> None:
    with warm_latent(1) as s:
        jobs = keep_decoder_busy(s), s.submit(a_start(1, 1))
        s.clock.advance(40)
        if noticed:
            s.engine.check_health()
        elsewhere(s.engine.close)
        for error in map(error_of, jobs):
            assert isinstance(error, Failed if noticed else Draining)
        assert status_of(s.engine) == "draining"
        assert not s.engine.alive


# The end


def test_draining_waits_for_what_is_encoded_and_decoded() -> None:
    with warm_latent(1) as s:
        s.vae.hold()
        upload = s.upload(2, 1)
        assert s.vae.next_call() == Call("encode", [2])
        s.engine.drain()
        for ask in (partial(s.submit, a_row(3)), partial(s.upload, 3, 1)):
            with pytest.raises(Draining):
                ask()
        assert not s.engine.wait_idle(0)
        s.vae.let_go()
        assert images_of(upload) == [an_image(2, 0.5)]
        assert s.engine.wait_idle(PATIENCE)
    with warm_latent(1) as s:
        jobs = keep_decoder_busy(s), s.submit(a_start(1, 1))
        s.engine.drain()
        assert not s.engine.wait_idle(0)
        s.vae.let_go()
        assert [images_of(job) for job in jobs] == [[a_decoded(BLOCKER, 1)], [a_decoded(1, 1)]]
        assert s.engine.wait_idle(PATIENCE)


def test_closing_while_images_are_decoded_answers_all_as_draining_and_joins_the_threads() -> None:
    others = threading.enumerate()
    with warm_latent(2, seconds=1e-6) as s:  # passes go on meanwhile, and must not make the batch seem stuck
        jobs = [keep_decoder_busy(s), s.submit(a_row(1)), s.submit(a_row(2, ENDLESS))]
        jobs.append(s.submit(a_start(3, 1)))
        with ThreadPoolExecutor() as pool:
            closing = pool.submit(s.engine.close)
            assert all(isinstance(error_of(job), Draining) for job in jobs)
            s.vae.let_go()
            closing.result(PATIENCE)
        assert set(threading.enumerate()) <= set(others)
        assert seeds_of(s.vae.calls) == [[BLOCKER]]
        assert s.engine.wait_idle(0)
        with pytest.raises(Draining):
            s.upload(4, 1)
    assert s.observer.ended == ["draining"] * 4


def test_requests_and_uploads_of_an_engine_whose_decoder_dies_fail() -> None:
    with warm_latent(2) as s:
        s.keep_busy()
        s.vae.forgetful = True
        jobs = [s.submit(a_row(1)), s.submit(a_row(2)), s.submit(a_row(3, ENDLESS))]
        s.vae.hold()
        s.runner.let_go()
        assert s.vae.next_batch() == [1, 2]
        s.vae.let_go()
        assert s.engine.wait_idle(PATIENCE)
        assert Counter(type(error_of(job)) for job in jobs) == {type(None): 2, Failed: 1}  # two were decoded
        check_beyond_help(s, "decoding has died")
        with pytest.raises(Failed, match="the engine has stopped"):
            s.upload(5, 1)


def test_what_is_to_be_decoded_fails_where_the_engine_dies() -> None:
    with warm_latent(1) as s:
        jobs = keep_decoder_busy(s), s.submit(a_start(1, 1))
        s.runner.unreleased = {2}
        s.submit(a_row(2, latent=True))
        assert all(isinstance(error_of(job), Failed) for job in jobs)
        s.vae.let_go()
        assert status_of(s.engine) == "failed"
        s.settle_decoding()
        assert seeds_of(s.vae.calls) == [[BLOCKER]]


# Uploads


def test_an_upload_is_encoded_and_its_rows_start_from_the_latents() -> None:
    with warm_latent(1) as s:
        starts: list[Image | None] = []
        s.runner.during = lambda call: starts.extend(row.row.start for row in s.runner.rows.values())
        job = s.upload(1, 2.5, a_row(7, steps=2))
        assert images_of(job) == [a_decoded(7, 2)]
        assert {str(start) for start in starts} == {str(pixels(1, 2.0))}
        assert job.result().queue_s == 1.0  # the encoding
    assert s.observer.batches == [("encode", 1, 1.0), ("decode", 1, 1.0)]
    assert (s.observer.accepted, s.observer.started) == (1, [1.0])
    assert [kept for _, kept, *_ in s.observer.finished] == [True]
    assert s.is_empty()


def test_rows_without_steps_are_encoded_and_decoded_alone() -> None:
    with warm_latent(1) as s:
        assert images_of(s.upload(1, 2.5)) == [an_image(1, 2.0)]
        assert images_of(s.upload(1, 2.5, a_start(1, 0))) == [a_decoded(1, 2)]
        assert images_of(s.submit(a_start(2, 3))) == [a_decoded(2, 3)]
        assert images_of(s.submit(a_start(3, 3, latent=True))) == [an_image(3, 3)]
        assert s.runner.passes == []
    assert s.observer.ended == [1] * 4
    assert s.is_empty()


def test_rows_without_steps_take_the_time_of_their_stages() -> None:
    with warm_latent(1, decode_seconds={1: 0.5}) as s:
        accepted = s.accept_upload(1, 2.5, a_start(1, 0))
        finished = accepted.future.result(PATIENCE)
        assert (finished.queue_s, finished.denoise_s, finished.decode_s) == (0.5, 0.0, 0.5)
        assert accepted.eta_s == pytest.approx(1.0)


def test_uploads_are_encoded_beside_passes_and_decoding_the_earliest_promise_first() -> None:
    with warm_latent(1) as s:
        keep_decoder_busy(s)
        s.vae.let_go()
        s.vae.hold()
        s.runner.hold()
        s.submit(a_row(50, ENDLESS))
        s.runner.next_pass()
        s.upload(1, 1)
        assert s.vae.next_call() == Call("encode", [1])
        for seed, timeout_s in ((2, LONG), (3, 30), (4, 20)):
            s.accept_upload(seed, 1, timeout_s=timeout_s)
        assert s.to_encode[0] == 4
        assert [s.vae.next_call() for _ in range(3)] == [Call("encode", [seed]) for seed in (4, 3, 2)]
        s.vae.let_go()
        assert s.runner.passes[-1] == [(50, 0)]


def test_an_upload_has_a_place_in_the_queue_and_takes_a_share() -> None:
    with warm_latent(1, max_queue=2) as s:
        s.vae.hold()
        first, second = s.upload(1, 1), s.upload(2, 1)
        assert s.vae.next_call() == Call("encode", [1])
        assert s.places.taken == 2
        with pytest.raises(QueueFull, match="all 2 places"):
            s.upload(3, 1)
        assert second.cancel()
        third = s.upload(3, 1)  # takes the place of the second
        assert first.cancel()  # during its call
        assert s.upload(4, 1).cancel()
        assert s.vae.next_call() == Call("encode", [3])
        s.vae.let_go()
        assert images_of(third) == [an_image(3, 0.5)]
        assert s.engine.wait_idle(PATIENCE)
        s.upload(5, 1).result(PATIENCE)
        assert [call.seeds for call in s.vae.calls] == [[1], [3], [5]]
    assert s.observer.ended == ["disconnect"] * 3 + [1] * 2
    assert s.observer.refused == ["full"]
    assert s.is_empty()


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_an_upload_that_cannot_be_encoded_fails_alone(fault: str) -> None:
    with warm_latent(1) as s:
        setattr(s.vae, fault, {1})
        bad, good = s.upload(1, 1, a_row(1)), s.upload(2, 1, a_row(2))
        with pytest.raises(ComputationFailed, match="encoded"):
            bad.result(PATIENCE)
        assert images_of(good) == [a_decoded(2, 1)]
        assert s.engine.alive
        assert not s.engine.in_doubt
        calls = [Call("encode", [1])] * (2 if fault == "breaking" else 1)  # what raises is tried again
        assert s.vae.calls == [*calls, Call("encode", [2]), Call("decode", [2])]
    assert s.observer.failed_batches == (["encode"] * 2 if fault == "breaking" else [])
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_what_is_wrong_with_latents_is_told() -> None:
    def refuse(latents: Sequence[Moments]) -> tuple[list[Row], None]:
        raise Invalid.field("image", "is too bright")

    with warm_latent(1) as s:
        job = s.accept(a_row(1), upload=Upload([pixels(1, 1)], refuse)).future
        with pytest.raises(Invalid, match="too bright"):
            job.result(PATIENCE)
    assert s.observer.ended == ["failed"]
    assert s.is_empty()


def test_an_upload_whose_rows_cannot_be_made_fails_alone() -> None:
    def fail(latents: Sequence[Moments]) -> tuple[list[Row], None]:
        raise MemoryError

    with warm_latent(1) as s:
        job = s.accept(a_row(1), upload=Upload([pixels(1, 1)], fail)).future
        assert isinstance(error_of(job), ComputationFailed)
        assert images_of(s.upload(2, 1, a_row(2))) == [a_decoded(2, 1)]
        assert s.engine.alive
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_a_request_whose_time_is_over_while_its_upload_waits_is_late() -> None:
    with warm_latent(1) as s:
        s.vae.hold()
        first, late = s.upload(1, 1), s.accept_upload(2, 1, timeout_s=25).future
        assert s.vae.next_call() == Call("encode", [1])
        s.clock.advance(25)
        s.engine.check_health()  # is stuck only later: all of these calls are slow
        with pytest.raises(DeadlinePassed, match="not done within 25 s"):
            late.result(PATIENCE)
        s.vae.let_go()
        error_of(first)
    assert s.observer.ended[0] == "timeout"


def test_what_cannot_be_encoded_in_time_is_refused_before_it_is_encoded() -> None:
    with warm_latent(1, decode_seconds={1: 4.0}) as s:
        with pytest.raises(Invalid, match="must be at least"):
            s.accept_upload(1, 1, timeout_s=4.0)
        assert s.vae.calls == []
    assert s.observer.refused == ["impossible"]


# Answers


def texts_of(future: Future[Finished]) -> list[list[list[list[float]]]]:
    found: list[list[list[list[float]]]] = json.loads(future.result(PATIENCE).body)
    return found


@pytest.mark.parametrize("values", [(1, 0), (1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("setting", [warm, warm_latent])
def test_the_answer_is_encoded_in_the_engine(
    setting: Callable[..., AbstractContextManager[Setting]], values: tuple[int, int]
) -> None:
    with setting(2) as s:
        encoding = FakeEncoding(*values)
        job = s.submit(a_row(1, 5), a_row(2, 1), a_row(3, 2), encoding=encoding)
        assert texts_of(job) == images_of(job)
        calls = [*([0, 1, 2] if values[0] else []), *([-1] if values[1] else [])]
        assert sorted(encoding.calls[:3]) == calls[:3]
        assert encoding.calls[3:] == calls[3:]
    assert s.observer.ended == [3]
    assert s.is_empty()


def test_a_promise_lasts_to_the_last_byte_of_the_answer() -> None:
    with warm(1) as s:
        slow, quick = FakeEncoding(), FakeEncoding()
        slow.during = lambda index: s.clock.advance(100.0)
        quick.during = lambda index: s.clock.advance(0.0625)
        for encoding in (slow, quick):
            job = s.accept(a_row(1, 4), a_row(2, 4), encoding=encoding)
            job.future.result(PATIENCE)
    (first, kept_1, _, taken_1), (second, kept_2, _, taken_2) = s.observer.finished
    assert (kept_1, kept_2) == (False, True)
    assert (first.encode_s, taken_1) == (200.0, 208.0)
    assert (second.encode_s, taken_2) == (0.125, 8.125)


def test_images_are_encoded_while_other_images_take_their_steps() -> None:
    with warm(1) as s:
        encoding = FakeEncoding(of_whole=1)
        encoding.hold()
        s.runner.hold()
        job = s.submit(a_row(1), a_row(2, 3), encoding=encoding)
        passes = [s.runner.next_pass() for _ in range(3)]
        assert encoding.next_call() == 0
        assert (2, 0) in passes[-1]
        s.runner.let_go()
        assert encoding.next_call() == 1
        assert encoding.next_call() == -1
        assert not job.done()
        assert s.to_encode == (0, 1)
        encoding.let_go()
        assert images_of(job) == [an_image(1, 1), an_image(2, 3)]
    assert s.is_empty()


@pytest.mark.parametrize("first", ["is done", "leaves"])
def test_a_large_piece_waits_for_the_job_that_has_no_room_for_it_and_others_go_on(first: str) -> None:
    """The first job has no time to spare. A sheet that takes 30 s to encode comes, and is not refused."""
    order: list[str] = []

    def an_encoding(name: str, *values: int) -> FakeEncoding:
        encoding = FakeEncoding(*values)
        encoding.during = lambda index: order.append(name)
        return encoding

    with warm(1) as s:
        s.runner.hold()
        tight = s.submit(a_row(1, 3), timeout_s=3.8, encoding=an_encoding("tight"))
        assert s.runner.next_pass() == [(1, 0)]
        large = s.accept(a_start(2, 0), a_start(3, 0), timeout_s=300.0, encoding=an_encoding("large", 0, 10**9))
        assert large.promise_s > 3.8 + 30
        for seed in (4, 5):  # the stage looks at what waits before each
            small = s.submit(a_start(seed, 0), encoding=an_encoding("small"))
            assert texts_of(small) == [an_image(seed, 0)]
        if first == "leaves":
            assert tight.cancel()
            assert texts_of(large.future) == [an_image(2, 0), an_image(3, 0)]
        s.runner.let_go()
        assert texts_of(large.future) == [an_image(2, 0), an_image(3, 0)]
        s.submit(a_row(6)).result(PATIENCE)  # nothing of the first job runs any longer
    if first == "leaves":
        assert order == ["small", "small", "large"]
    else:
        assert order == ["small", "small", "tight", "large"]
        assert all(kept for _, kept, _, _ in s.observer.finished)
    assert s.is_empty()


def test_the_estimate_counts_the_encoding_and_follows_its_costs() -> None:
    with warm(1) as s:
        encoding = FakeEncoding(of_image=1_000_000)
        encoding.during = lambda index: s.clock.advance(2.0)
        first = s.accept(a_row(1), encoding=encoding)
        assert 1.0 < first.eta_s < 1.5
        first.future.result(PATIENCE)
        for seed in range(2, 12):
            s.submit(a_row(seed), encoding=encoding).result(PATIENCE)
        assert s.accept(a_row(12), encoding=encoding).eta_s == pytest.approx(3.0, rel=0.1)
        assert s.accept(a_row(13), encoding=FakeEncoding(1)).promise_s < 13  # with room for another large image


def test_an_answer_that_cannot_be_encoded_fails_alone_and_is_tried_twice() -> None:
    with warm(2) as s:
        s.keep_busy()
        bad, good = FakeEncoding(), FakeEncoding()
        bad.breaking = {1}
        jobs = [s.submit(a_row(1), a_row(2), a_row(3), encoding=bad), s.submit(a_row(4), encoding=good)]
        s.runner.let_go()
        with pytest.raises(ComputationFailed, match=r"^the answer to this request could not be encoded$"):
            jobs[0].result(PATIENCE)
        assert texts_of(jobs[1]) == [an_image(4, 1)]
        assert bad.calls.count(1) == 2
        assert not s.engine.in_doubt  # the model is not at fault
    assert s.observer.failed_batches == ["answer"] * 2
    assert Counter(s.observer.ended) == {"failed": 1, 1: 1}
    assert s.is_empty()


@pytest.mark.parametrize("values", [(1, 0), (1, 1), (0, 1)])
def test_a_fault_of_encoding_that_does_not_come_again_harms_nobody(values: tuple[int, int]) -> None:
    with warm(1) as s:
        encoding = FakeEncoding(*values)
        encoding.faults = 1
        job = s.submit(a_row(1), a_row(2), encoding=encoding)
        assert texts_of(job) == [an_image(1, 1), an_image(2, 1)]
    assert s.observer.failed_batches == ["answer"]
    assert s.observer.ended == [2]


def test_a_client_that_leaves_while_its_answer_is_encoded_is_gone() -> None:
    with warm(2) as s:
        encoding, other = FakeEncoding(of_whole=1), FakeEncoding()
        encoding.hold()
        leaver = s.submit(a_row(1), a_row(2), encoding=encoding)
        assert encoding.next_call() == 0
        stayer = s.submit(a_row(3), encoding=other)
        assert elsewhere(leaver.cancel)
        assert s.observer.ended == ["disconnect"]
        assert s.places.taken == 1
        encoding.let_go()
        assert texts_of(stayer) == [an_image(3, 1)]
        assert encoding.calls == [0]  # nothing more of it is encoded
    assert s.is_empty()


def test_an_encoding_that_does_not_return_is_found() -> None:
    with warm(1) as s:
        encoding = FakeEncoding()
        encoding.hold()
        job = s.submit(a_row(1), encoding=encoding)
        assert encoding.next_call() == 0
        s.clock.advance(7.9)
        s.engine.check_health()
        assert s.engine.alive
        s.clock.advance(0.1)
        s.engine.check_health()
        assert isinstance(error_of(job), Failed)
        assert not s.engine.alive
        s.clock.advance(24)
        s.engine.check_health()
        check_beyond_help(s, "encoding an answer has not returned for 32 s")
        encoding.let_go()


def test_the_probe_has_no_answer() -> None:
    with warm(1) as s:
        assert s.engine.probe().result(PATIENCE).body == b""
    assert s.observer.batches == []


# Progress


def has_done(images: int, progress: Progress) -> bool:
    return progress.images_done == images


def test_progress_is_of_all_work_and_never_falls() -> None:
    with warm_latent(1, decode_seconds={1: 0.5}) as s:
        diary = Diary()
        encoding = FakeEncoding(1_000_000, 1_000_000)
        job = s.accept_upload(1, 1, a_row(1, 4), a_row(2, 2), watcher=diary, encoding=encoding).future
        job.result(PATIENCE)
    fractions = [progress.fraction for progress in diary.told]
    assert fractions == sorted(fractions)
    assert all(fraction < 1 for fraction in fractions[:-1])
    assert diary.told[-1] == Progress(4, 4, 0.0, 2, 2, 1.0)
    assert 0 < fractions[0] < 0.2  # the upload is encoded
    assert diary.told[0][:2] == (0, 4)
    done = [progress.images_done for progress in diary.told]
    assert done == sorted(done)
    assert {0, 1, 2} <= set(done)
    of_images = [(progress.step, progress.fraction) for progress in diary.told if progress.images_done == 2]
    assert len(of_images) == 2  # the last image, and the whole


def test_progress_is_told_of_an_image_though_the_slowest_takes_no_step() -> None:
    with warm(1) as s:
        diary = Diary()
        s.runner.hold()
        job = s.accept(*(a_row(seed, 3) for seed in range(1, 5)), watcher=diary).future
        s.runner.next_pass()
        for images in (1, 2, 3):
            for _ in range(3):
                s.runner.next_pass()
            told = diary.wait_for(partial(has_done, images))
            assert (told.step, told.steps, told.images) == (0, 3, 4)
            assert told.fraction == pytest.approx(images / 4, abs=0.1)  # the next row has begun
        s.runner.let_go()
        job.result(PATIENCE)
    assert diary.told[-1] == Progress(3, 3, 0.0, 4, 4, 1.0)


def test_the_work_of_rows_without_steps_is_told() -> None:
    with warm_latent(1) as s:
        diary = Diary()
        s.accept(a_start(1, 1), watcher=diary).future.result(PATIENCE)
    assert diary.told[-1] == Progress(0, 0, 0.0, 1, 1, 1.0)
    assert diary.of("image") == [(0, a_decoded(1, 1))]


# Estimates and promises


@pytest.mark.parametrize(
    ("steps", "images", "decode_seconds", "seconds"),
    [
        (5, 1, {1: 0.5}, 5.5),
        (3, 4, {1: 0.5, 2: 0.75, 4: 1.0}, 4.0),
        (3, 3, {1: 0.5, 2: 0.75, 4: 1.0}, 4.0),
        (3, 3, {1: 0.5, 2: 0.75}, 4.25),  # a batch of two, and one
        (2, 4, {1: 0.5}, 4.0),
    ],
)
def test_a_lone_request_takes_what_was_expected(
    steps: int, images: int, decode_seconds: dict[int, float], seconds: float
) -> None:
    with warm_latent(4, decode_seconds=decode_seconds) as s:
        accepted = s.accept(*(a_row(seed, steps) for seed in range(1, images + 1)))
        assert accepted.eta_s == pytest.approx(seconds)
        finished = accepted.future.result(PATIENCE)
        assert (finished.denoise_s, finished.decode_s) == (steps, seconds - steps)
    assert s.observer.finished == [(finished, True, accepted.eta_s, seconds)]


def test_who_comes_while_others_wait_to_be_decoded_is_expected_later() -> None:
    with warm_latent(1, decode_seconds={1: 1.0, 4: 2.0}) as s:
        keep_decoder_busy(s)
        s.submit(a_row(1), a_row(2))
        s.take_all_steps()
        assert s.to_decode == (3, 3)
        assert s.line.backlog_s == pytest.approx(3 * 0.5)
        accepted = s.accept(a_row(3))
        assert accepted.eta_s == pytest.approx(2.0 + 1.0 + 1.0)  # three in one batch, a pass, and its own
        s.vae.let_go()
        accepted.future.result(PATIENCE)


def test_what_cannot_be_decoded_in_time_is_refused() -> None:
    with warm_latent(1, decode_seconds={1: 4.0}) as s:
        alone_s = 2 * (1 + MARGIN) + 2 * 4.0 * SLOWEST  # its batch, and one that may already run
        for timeout_s in (alone_s - 0.1, alone_s):
            if timeout_s < alone_s:
                with pytest.raises(Exception, match="must be at least"):
                    s.submit(a_row(1, steps=2), timeout_s=timeout_s)
            else:
                assert s.accept(a_row(1, steps=2), timeout_s=timeout_s).promise_s == alone_s
        s.accept(a_row(2, steps=2, latent=True), timeout_s=alone_s)
    assert s.observer.refused == ["impossible"]


# Metrics


def test_metrics_tell_of_decoding() -> None:
    def shown(metrics: Metrics, engine: Engine) -> dict[str, float]:
        lines = [line for line in exposition(metrics, engine, SERVED).decode().splitlines() if not line.startswith("#")]
        values = dict(line.removeprefix("stepwise_").rsplit(" ", 1) for line in lines)
        return {name: float(value) for name, value in values.items() if "decod" in name and "bucket" not in name}

    with warm_latent(1, decode_seconds={1: 0.5, 2: 0.75}) as s:
        metrics = Metrics()
        keep_decoder_busy(s)
        metrics.batch_done("decode", 3, 1.5)
        metrics.batch_failed("decode")
        found = {name: value for name, value in shown(metrics, s.engine).items() if "_created" not in name}
        assert found == {
            "decode_seconds_count": 1,
            "decode_seconds_sum": 1.5,
            "decode_images_count": 1,
            "decode_images_sum": 3,
            "decode_failures_total": 1,
            "images_decoding": 1,
            'decode_cost_seconds{images="1",size="2x1"}': 0.5,
            'decode_cost_seconds{images="2",size="2x1"}': 0.75,
            'stage_seconds_total{stage="decode"}': 1.5,
            'stage_failures_total{stage="decode"}': 1,
        }
    with warm(1) as plain:
        metrics = Metrics()
        assert not [name for name in shown(metrics, plain.engine) if "cost" in name]


# The probe's effect on others


def test_a_probe_that_is_decoded_needs_no_place_and_is_told_to_no_observer() -> None:
    with warm_latent(1, max_queue=1) as s:
        s.vae.poisoned = {1}
        assert isinstance(error_of(s.submit(a_row(1))), ComputationFailed)
        s.runner.hold()
        job = s.submit(a_row(2, steps=9))
        assert s.runner.next_pass() == [(2, 0)]
        probe = s.engine.probe()
        assert s.places.taken == 1
        assert s.runner.next_pass() == PROBE
        s.runner.let_go()
        assert images_of(probe) == [a_decoded(PROBE_SEED, 1)]
        assert images_of(job) == [a_decoded(2, 9)]
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_the_observer_is_told_before_whoever_waits() -> None:
    class Asking(Recorder):
        def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None:
            super().request_finished(finished, kept, eta_s, taken_s)
            self.was_done = [job.done() for job in jobs]

    told, jobs = Asking(), list[Future[Finished]]()
    with warm_latent(1, observer=told) as s:
        s.keep_busy()
        jobs.append(s.submit(a_row(1)))
        s.runner.let_go()
        jobs[0].result(PATIENCE)
        assert told.was_done == [False]


# Random mixes


@examples(200)
@given(
    st.sampled_from(({1: 1.0}, {4: 1.0}, {1: 1.0, 2: 1.2, 5: 2.0})),
    st.sampled_from(({1: 1.0}, {3: 0.5}, {1: 1.0, 2: 1.5, 4: 2.0})),
    scripts(("admit", "pass", "read", "decode", "decode"), (*FATES, *DECODED_FATES), latents=True),
)
def test_nothing_is_left_behind_by_any_mix_of_requests_that_are_decoded(
    costs: dict[int, float], decode_costs: dict[int, float], script: Script
) -> None:
    """Requests arrive, leave, fail, come too late or get stuck, inside any call of the runner or the VAE.

    Innocent rows fail only through passes and batches that do not return. The engine gives up only where one of those
    takes too long.
    """
    with started(a_setting(FakeRunner(costs), max_queue=5, decode_seconds=decode_costs)) as s:
        client, to_come = Client(s), list(script)
        playing = threading.Lock()  # two threads play one script

        def act(call: str) -> None:
            with playing:
                if to_come and to_come[0][0] == call:
                    elsewhere(lambda: client.play(to_come[0][1]))
                    to_come.pop(0)

        s.runner.during = s.vae.during = act
        while to_come and s.engine.beyond_help is None:  # each round makes every kind of call
            s.engine.check_health()
            with playing:
                job = client.submit(Submit(((1, False, "good"),), LONG, "d", watched=False))
            if job is not None:
                with suppress(CancelledError):
                    job.exception(PATIENCE)
        assert s.engine.wait_idle(PATIENCE)
        if s.engine.beyond_help is None:
            s.wait_alive()  # stuck calls return
            s.engine.check_health()
            s.settle_decoding()
        client.check_ends()
        check_that_nothing_but_a_hang_does_harm(s)
