"""Texts in the engine, with a fake text encoder and a fake clock: encoded ahead of passes, and once."""

import logging
from collections.abc import Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import replace
from threading import Lock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.rows import Condition, Image, Moments, Row
from service.engine.bounds import MARGIN, SHARED
from service.engine.requests import Encoding, Upload
from service.errors import ComputationFailed, Draining, Failed, Invalid
from service.http.metrics import Metrics, exposition
from tests.engines import (
    GROUP,
    LONG,
    OTHER,
    PATIENCE,
    PROBE_SEED,
    PROBE_TOKEN,
    WARM_UP_PASSES,
    Diary,
    FakeRunner,
    Setting,
    a_context,
    a_decoded,
    a_row,
    a_setting,
    a_text,
    a_text_row,
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
    warm_text,
)
from tests.properties import examples
from tests.scripted import FATES, TEXT_FATES, Client, Script, Submit, scripts
from tests.test_responses import SERVED

SLOWEST = SHARED * (1 + MARGIN)  # the promised time of a text, in multiples of its own time


# The warm-up


def test_the_warm_up_measures_a_text_by_the_fastest_call_but_the_first() -> None:
    s = a_setting(FakeRunner({1: 1.0}), text_seconds=0.1)
    slower = iter([0.5, 0.3, 0.0, 0.1])
    s.texts.during = lambda call: s.clock.advance(next(slower))
    with undisturbed():
        s.engine.start()
        assert s.engine.wait_loaded(PATIENCE)
    assert s.texts.calls == [PROBE_TOKEN] * WARM_UP_PASSES
    assert s.machine.text is not None
    assert s.machine.text.by_width == pytest.approx({1: 0.1})
    assert s.observer.encoded_texts == []
    assert s.is_empty()
    s.engine.close()


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_an_engine_whose_text_encoder_does_not_work_is_failed(fault: str) -> None:
    s = a_setting(FakeRunner({1: 1.0}), text_seconds=0.5)
    setattr(s.texts, fault, {PROBE_TOKEN})
    s.engine.start()
    assert s.engine.wait_loaded(PATIENCE)
    assert status_of(s.engine) == "failed"
    assert ("this text breaks" if fault == "breaking" else "text is not finite") in (s.engine.beyond_help or "")
    with pytest.raises(Failed, match="the engine has stopped"):
        s.submit(a_text_row(1, 1))
    s.engine.close()


# Contexts


def test_rows_run_with_the_contexts_of_their_texts() -> None:
    with warm_text(2) as s:
        seen: dict[int, list[list[list[float]]]] = {}

        def look(call: str) -> None:
            for row in (state.row for state in s.runner.rows.values() if state.row.seed != PROBE_SEED):
                seen[row.seed] = [one.context.tokens.tolist() for one in row.branches if one.context is not None]

        s.runner.during = look
        jobs = [s.submit(a_text_row(7, 1, 2, steps=3)), s.submit(a_text_row(8, 3, steps=2), a_text_row(9, 1, steps=2))]
        assert images_of(jobs[0]) == [an_image(7, 3)]
        assert images_of(jobs[1]) == [an_image(8, 2), an_image(9, 2)]
        assert sorted(s.texts.calls) == [1, 2, 3]
    contexts = {token: a_context(token).tokens.tolist() for token in (1, 2, 3)}
    assert seen == {7: [contexts[1], contexts[2]], 8: [contexts[3]], 9: [contexts[1]]}
    assert s.is_empty()


def test_a_text_is_encoded_once_for_all_rows_and_requests() -> None:
    with warm_text(4) as s:
        for _ in range(3):
            s.submit(*(a_text_row(seed, 5, 6) for seed in range(1, 4))).result(PATIENCE)
        assert s.texts.calls == [5, 6]
        s.submit(a_text_row(1, 6, 7)).result(PATIENCE)
        assert s.texts.calls == [5, 6, 7]
    assert s.observer.encoded_texts == [0.5] * 3
    assert s.observer.known_texts == 2 + 2 + 1
    assert s.is_empty()


def test_a_branch_without_a_text_needs_no_encoding() -> None:
    """As the negative branch of SDXL, where no negative prompt means zeros."""

    def with_nothing(row: Row) -> Row:
        return replace(row, branches=(*row.branches, Condition(time_ids=(4, 4, 0, 0, 4, 4))))

    with warm_text(2) as s:
        seen: list[Condition] = []
        s.runner.during = lambda call: seen.extend(state.row.branches[-1] for state in s.runner.rows.values())
        assert images_of(s.submit(with_nothing(a_text_row(7, 1, steps=2)))) == [an_image(7, 2)]
        assert images_of(s.submit(with_nothing(a_row(8, steps=2)))) == [an_image(8, 2)]
        assert s.texts.calls == [1]
    own = [one for one in seen if one.time_ids is not None]
    assert own
    assert all(one.text is None and one.context is None for one in own)
    assert s.is_empty()


def test_a_known_prompt_takes_no_time_and_has_the_promise_of_a_row_without_text() -> None:
    with warm_text(1, text_seconds=8.0) as s:
        first = s.accept(a_text_row(1, 5, steps=2))
        first.future.result(PATIENCE)
        again, plain = s.accept(a_text_row(2, 5, steps=2), timeout_s=2.5), s.accept(a_row(3, steps=2))
        assert (again.eta_s, again.promise_s) == (2.0, 2.5)
        assert first.eta_s == pytest.approx(10.0)
        assert plain.promise_s > again.promise_s
        assert images_of(again.future) == [an_image(2, 2)]
        assert again.future.result().queue_s == 0
    assert [kept for _, kept, *_ in s.observer.finished] == [True] * 3


def test_who_waits_for_a_text_that_another_has_encoded_meanwhile_pays_nothing_and_teaches_nothing() -> None:
    with warm_text(4, text_seconds=2.0) as s:
        s.texts.hold()
        jobs = [s.submit(a_text_row(1, 9))]
        assert s.texts.next_call() == 9
        jobs += [s.submit(a_text_row(seed, 5)) for seed in range(2, 6)]
        assert s.to_encode[0] == 5
        assert s.texts.next_call() == 5
        s.texts.let_go()
        assert [images_of(job) for job in jobs] == [[an_image(seed, 1)] for seed in range(1, 6)]
        assert s.texts.calls == [9, 5]
        assert s.machine.text is not None
        assert s.machine.text.seconds(1) >= 2.0
    assert len(s.observer.batches_of("encode")) == len(s.observer.encoded_texts) == 2
    assert s.observer.known_texts == 3


def test_others_take_their_steps_while_a_text_is_encoded() -> None:
    with warm_text(1) as s:
        s.texts.hold()
        waiting = s.submit(a_text_row(1, 9))
        assert s.texts.next_call() == 9
        assert images_of(s.submit(a_row(2, steps=3))) == [an_image(2, 3)]
        assert not waiting.done()
        assert s.to_encode[0] == 1
        s.texts.let_go()
        assert images_of(waiting) == [an_image(1, 1)]


def test_texts_are_encoded_one_by_one_the_earliest_promise_first() -> None:
    with warm_text(1, text_seconds=1.0) as s:
        s.texts.hold()
        s.submit(a_text_row(1, 90))
        assert s.texts.next_call() == 90
        promises = {}
        for tokens, steps, timeout_s in (((1, 2), 40, LONG), ((3,), 1, 40.0), ((4, 5), 1, 20.0)):
            promises[tokens] = s.accept(a_text_row(steps, *tokens, steps=steps), timeout_s=timeout_s).promise_s
        order = sorted(promises, key=lambda tokens: promises[tokens])
        assert order == [(4, 5), (3,), (1, 2)]
        assert [s.texts.next_call() for _ in range(5)] == [4, 5, 3, 1, 2]
        s.texts.let_go()


def test_expectations_follow_what_texts_take() -> None:
    with warm_text(1, text_seconds=1.0) as s:
        s.texts.seconds = 3.0
        for token in range(1, 61):
            s.submit(a_text_row(token, token)).result(PATIENCE)
        assert s.machine.text is not None
        assert s.machine.text.seconds(1) == pytest.approx(3.0, rel=0.1)


# Promises


def test_a_promise_has_its_texts_in_it() -> None:
    with warm_text(1, text_seconds=4.0) as s:
        alone_s = 2 * 4.0 * SLOWEST + (2 + 1) * (1 + MARGIN)  # a pass may be under way when it may run
        with pytest.raises(Invalid, match="must be at least"):
            s.accept(a_text_row(1, 1, 2, steps=1), timeout_s=alone_s - 0.1)
        accepted = s.accept(a_text_row(1, 1, 2, steps=1), timeout_s=alone_s)
        assert accepted.promise_s == alone_s
        assert accepted.eta_s == pytest.approx(2 * 4.0 + 2)
        assert images_of(accepted.future) == [an_image(1, 1)]
        assert accepted.future.result().queue_s == 8.0
    assert [kept for _, kept, *_ in s.observer.finished] == [True]
    assert s.observer.refused == ["impossible"]


def test_the_estimate_counts_all_texts_that_wait() -> None:
    with warm_text(1, text_seconds=4.0) as s:
        s.texts.hold()
        s.submit(a_text_row(1, 1, 2))
        assert s.texts.next_call() == 1
        assert s.accept(a_text_row(2, 3)).eta_s == pytest.approx(3 * 4.0 + 1)
        assert s.line.backlog_s == pytest.approx(3 * 4.0 + 3)
        s.texts.let_go()


def test_progress_counts_texts() -> None:
    with warm_text(1, text_seconds=2.0) as s:
        diary = Diary()
        s.accept(a_text_row(1, 1, 2, steps=1), watcher=diary).future.result(PATIENCE)
    fractions = [progress.fraction for progress in diary.told]
    assert fractions[:2] == pytest.approx([2 / 6, 4 / 6], rel=0.01)  # its two branches take a pass each
    assert fractions[-2] < fractions[-1] == 1.0
    assert [progress.step for progress in diary.told][:4] == [0, 0, 0, 1]


# With an upload


def upload_of(seed: int, rows: Sequence[Row]) -> Upload:
    def then(latents: Sequence[Moments]) -> tuple[list[Row], Encoding | None]:
        return [replace(row, start=latents[0].mean) for row in rows], None

    return Upload([pixels(seed, 2.5)], then)


@pytest.mark.parametrize("known", [False, True])
def test_rows_of_an_upload_have_its_latents_and_their_contexts(known: bool) -> None:
    with warm_text(1, decode_seconds={1: 1.0}) as s:
        if known:
            s.submit(a_text_row(1, 5, 6, latent=True)).result(PATIENCE)
        rows = [a_text_row(7, 5, 6, steps=2)]
        starts: list[Image | None] = []
        s.runner.during = lambda call: starts.extend(state.row.start for state in s.runner.rows.values())
        assert images_of(s.accept(*rows, upload=upload_of(1, rows)).future) == [a_decoded(7, 2)]
        assert {str(start) for start in starts} == {str(pixels(1, 2.0))}
        assert s.texts.calls == [5, 6]
        assert [call.name for call in s.vae.calls] == ["encode", "decode"]
    assert s.is_empty()


def test_an_upload_whose_rows_have_other_texts_than_its_draft_fails_and_the_log_has_nothing_of_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with warm_text(1, decode_seconds={1: 1.0}) as s:
        job = s.accept(a_text_row(1, 1), upload=upload_of(1, [a_text_row(1, 4711)])).future
        with pytest.raises(ComputationFailed):
            job.result(PATIENCE)
        assert images_of(s.submit(a_text_row(2, 1))) == [a_decoded(2, 1)]
    assert "KeyError" in caplog.text
    assert "4711" not in caplog.text
    assert s.is_empty()


# Failures


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_a_text_that_cannot_be_encoded_fails_its_request_alone(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with warm_text(1) as s:
        setattr(s.texts, fault, {4711})
        bad, good = s.submit(a_text_row(1, 3, 4711)), s.submit(a_text_row(2, 3))
        with pytest.raises(ComputationFailed, match="prompt") as error:
            bad.result(PATIENCE)
        assert images_of(good) == [an_image(2, 1)]
        assert s.texts.calls == [3, 4711, *([4711] if fault == "breaking" else [])]  # what raises is tried again
        assert s.engine.alive
    assert "4711" not in caplog.text + str(error.value)
    assert s.observer.failed_batches == (["encode"] * 2 if fault == "breaking" else [])
    assert s.observer.ended == ["failed", 1]
    assert s.is_empty()


def test_a_fault_of_the_text_encoder_that_does_not_come_again_harms_nobody() -> None:
    with warm_text(1) as s:
        s.texts.faults = 1
        assert images_of(s.submit(a_text_row(1, 3))) == [an_image(1, 1)]
        assert not s.engine.in_doubt
    assert s.observer.ended == [1]


def test_a_context_that_is_not_finite_is_not_kept() -> None:
    with warm_text(1) as s:
        s.texts.poisoned = {3}
        assert isinstance(error_of(s.submit(a_text_row(1, 3))), ComputationFailed)
        s.texts.poisoned = set()
        assert images_of(s.submit(a_text_row(2, 3))) == [an_image(2, 1)]
        assert s.texts.calls == [3, 3]


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 1.0)])
def test_a_prompt_whose_weights_leave_no_context_fails_alone_in_words(weights: tuple[float, ...]) -> None:
    with warm_text(1) as s:
        s.texts.poisoned = {3}
        row = replace(a_row(1), branches=(Condition(text=a_text(3)._replace(weights=weights)),))
        said = "the encoded prompt, with its weights, has" if weights else "the encoded prompt has"
        assert str(error_of(s.submit(row))) == f"{said} values that are not finite"
        assert images_of(s.submit(a_text_row(2, 4))) == [an_image(2, 1)]


def test_a_request_may_be_cancelled_while_its_text_is_encoded() -> None:
    with warm_text(1) as s:
        s.texts.hold()
        leaver, stayer = s.submit(a_text_row(1, 3, 4)), s.submit(a_text_row(2, 3))
        assert s.texts.next_call() == 3
        assert elsewhere(leaver.cancel)
        assert s.to_encode[0] == 1
        s.texts.let_go()
        assert images_of(stayer) == [an_image(2, 1)]
        assert s.texts.calls == [3]  # what was encoded for nobody is kept
    assert s.observer.ended == ["disconnect", 1]
    assert s.observer.started == [pytest.approx(0.5)]
    assert s.is_empty()


# Health


def test_the_probe_encodes_its_text_only_where_encoding_has_failed() -> None:
    with warm_text(1) as s:
        s.clock.advance(21)
        assert s.engine.in_doubt  # because nothing has run for a long time
        s.engine.probe().result(PATIENCE)
        assert not s.engine.in_doubt
        assert s.texts.calls == []
        s.submit(a_text_row(1, PROBE_TOKEN)).result(PATIENCE)  # its context is known from now on
        s.texts.breaking = {1}
        assert isinstance(error_of(s.submit(a_text_row(1, 1))), ComputationFailed)
        assert s.engine.in_doubt
        s.texts.calls.clear()
        s.engine.probe().result(PATIENCE)
        assert not s.engine.in_doubt
        assert s.texts.calls == [PROBE_TOKEN]


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_a_probe_shows_whether_encoding_works_again(fault: str) -> None:
    with warm_text(1) as s:
        check_that_probes_tell(s, s.texts, fault, a_text_row(1, 1))
    assert s.observer.ended == ["failed"]


@pytest.mark.parametrize("fault", ["breaking", "poisoned"])
def test_an_engine_whose_probes_cannot_be_encoded_gives_up(fault: str) -> None:
    with warm_text(1) as s:
        check_that_it_gives_up(s, s.texts, fault, a_text_row(1, 1))


def test_images_do_not_show_that_texts_can_be_encoded() -> None:
    with warm_text(1, decode_seconds={1: 1.0}) as s:
        s.submit(a_text_row(1, 2)).result(PATIENCE)
        s.texts.breaking = {1}
        assert isinstance(error_of(s.submit(a_text_row(1, 1))), ComputationFailed)
        rows = [a_text_row(7, 2)]
        s.accept(*rows, upload=upload_of(1, rows)).future.result(PATIENCE)  # the stage works, and its text is known
        assert s.engine.in_doubt
        s.submit(a_text_row(1, 3)).result(PATIENCE)
        assert not s.engine.in_doubt


def test_a_text_that_does_not_return_is_found() -> None:
    with warm_text(1) as s:
        s.texts.hold()
        job = s.submit(a_text_row(1, 3))
        assert s.texts.next_call() == 3
        s.clock.advance(8.0)
        s.engine.check_health()
        assert isinstance(error_of(job), Failed)
        assert not s.engine.alive
        s.clock.advance(24)
        s.engine.check_health()
        check_beyond_help(s, "encoding a text or an upload has not returned for 32 s")
        s.texts.let_go()


def test_closing_while_a_text_is_encoded_answers_all_as_draining() -> None:
    with warm_text(1) as s:
        s.texts.hold()
        jobs = [s.submit(a_text_row(1, 3)), s.submit(a_text_row(2, 4))]
        assert s.texts.next_call() == 3
        s.clock.advance(40)
        elsewhere(s.engine.close)
        assert all(isinstance(error_of(job), Draining) for job in jobs)
        s.texts.let_go()


def test_each_group_knows_of_its_own_texts() -> None:
    runner = FakeRunner({1: 1.0})
    with started(a_setting(runner, other=FakeRunner({1: 1.0}, like=runner), text_seconds=0.5)) as s:
        s.texts.breaking = {1}
        assert isinstance(error_of(s.submit(a_text_row(1, 1, group=OTHER))), ComputationFailed)
        s.submit(a_text_row(2, 2)).result(PATIENCE)
        assert s.engine.in_doubt  # of the other group
        s.engine.probe().result(PATIENCE)
        assert s.texts.calls[-1] == PROBE_TOKEN
        assert not s.engine.in_doubt
        assert set(s.machine.passes) == {GROUP, OTHER}


# Metrics


def test_metrics_tell_of_texts() -> None:
    def shown(s: Setting, metrics: Metrics) -> dict[str, float]:
        lines = [line for line in exposition(metrics, s.engine, SERVED).decode().splitlines() if line[0] != "#"]
        values = dict(line.removeprefix("stepwise_").rsplit(" ", 1) for line in lines)
        return {name: float(value) for name, value in values.items() if name.startswith("text")}

    with warm_text(1, text_seconds=0.5) as s:
        metrics = Metrics()
        metrics.text_encoded(0.25)
        metrics.text_known()
        found = {name: value for name, value in shown(s, metrics).items() if "bucket" not in name and "_c" in name}
        found = {name: value for name, value in found.items() if "_created" not in name}
        assert found == {"text_cost_seconds": 0.5, "text_seconds_count": 1}
        assert shown(s, metrics)['texts_total{source="encoder"}'] == 1
        assert shown(s, metrics)['texts_total{source="cache"}'] == 1
    with warm(1) as plain:
        assert "text_cost_seconds" not in shown(plain, Metrics())


# Random mixes


@examples(150)
@given(
    st.sampled_from(({1: 1.0}, {4: 1.0}, {1: 1.0, 2: 1.2, 5: 2.0})),
    st.sampled_from((0.1, 0.5, 3.0)),
    scripts(("admit", "pass", "text", "text", "check"), FATES, texts=True),
)
def test_nothing_is_left_behind_by_any_mix_of_requests_with_texts_and_checks(
    costs: dict[int, float], seconds: float, script: Script
) -> None:
    """Requests arrive, leave, fail, come too late or get stuck, inside any call of runner, encoder and check."""
    setting = a_setting(FakeRunner(costs), max_queue=5, text_seconds=seconds, check_seconds=seconds / 2)
    with started(setting) as s:
        s.texts.breaking, s.texts.poisoned = {TEXT_FATES["breaks"]}, {TEXT_FATES["is NaN"]}
        client, to_come = Client(s), list(script)
        playing, fresh = Lock(), iter(range(1000, 10**6))  # three threads play one script

        def act(call: str) -> None:
            with playing:
                if to_come and to_come[0][0] == call:
                    elsewhere(lambda: client.play(to_come[0][1]))
                    to_come.pop(0)

        s.runner.during = s.texts.during = s.check.during = act
        while to_come and s.engine.beyond_help is None:  # each round makes every kind of call
            s.engine.check_health()
            with playing:
                job = client.submit(Submit(((1, False, "good"),), LONG, "d", watched=False, tokens=(next(fresh),)))
            if job is not None:
                with suppress(CancelledError):
                    job.exception(PATIENCE)
        assert s.engine.wait_idle(PATIENCE)
        if s.engine.beyond_help is None:
            s.wait_alive()  # stuck calls return
            s.engine.check_health()
        client.check_ends()
        check_that_nothing_but_a_hang_does_harm(s)
