"""The start says so where the recommended settings cannot be done within TIMEOUT on this machine."""

from dataclasses import replace

import pytest

from model.description import Recommended, TextDescription
from model.rows import Row, Tokens
from service.config import Settings
from service.engine.bounds import MARGIN, SHARED
from service.engine.costs import Costs, Machine, PerValue
from service.engine.forecast import forecast
from service.plan.served import Served
from service.slow import too_slow
from tests.engines import FakeEncoding, FakeRunner, a_row, a_setting, a_text_row, started
from tests.local import SERVED

STEPS = 20
SLOWEST = SHARED * (1 + MARGIN)


def machine_of(a_pass: float, text: float | None = None) -> Machine:
    [group] = SERVED.groups
    return Machine(
        {group: Costs({1: a_pass})}, answer=PerValue(0.0, 0.0), text=None if text is None else Costs({1: text})
    )


def served_with(recommended: Recommended) -> Served:
    return replace(SERVED, model=replace(SERVED.model, recommended=recommended))


@pytest.mark.parametrize(("a_pass", "fits"), [(1.0, True), (11.9, True), (12.1, False)])
def test_a_warning_comes_where_a_request_without_settings_would_be_refused(a_pass: float, fits: bool) -> None:
    served = served_with(Recommended("ddim", STEPS, 1.0))
    warning = too_slow(machine_of(a_pass), served, Settings(timeout=12.0 * STEPS * (1 + MARGIN)))
    assert (warning is None) == fits


def test_the_warning_says_what_an_image_costs_and_what_to_change() -> None:
    warning = too_slow(machine_of(100.0), served_with(Recommended("ddim", STEPS, 1.0)), Settings(timeout=60.0))
    assert warning is not None
    for part in ("ddim", "20 steps", "guidance 1", "takes about 2e+03 s", "2.5e+03 s", "STEPWISE_TIMEOUT=60"):
        assert part in warning
    for setting in ("raise STEPWISE_TIMEOUT", "fewer steps with STEPWISE_RECOMMENDED"):
        assert setting in warning


def test_a_prompt_is_encoded_in_this_time() -> None:
    model = replace(SERVED.model, num_classes=None, no_label=None, class_names=(), text=TextDescription(3, 2, 0))
    served = replace(
        SERVED,
        model=replace(model, recommended=Recommended("ddim", STEPS, 1.0)),
        tokenize=lambda text: Tokens((1, 2, 3), 0),
    )
    exactly = STEPS * (1 + MARGIN) + 4.0 * SLOWEST + (1 + MARGIN)
    assert too_slow(machine_of(1.0, text=4.0), served, Settings(timeout=exactly + 1e-6)) is None
    assert too_slow(machine_of(1.0, text=4.0), served, Settings(timeout=exactly - 1e-6)) is not None


@pytest.mark.parametrize(
    "row", [a_row(1, 5), a_row(1, 5, latent=True), a_text_row(1, 1, 2, steps=4)], ids=["pixels", "latents", "text"]
)
def test_a_forecast_is_what_an_idle_engine_promises_at_the_earliest_and_expects(row: Row) -> None:
    setting = a_setting(FakeRunner({1: 1.0}), decode_seconds={1: 0.5}, text_seconds=0.25, check_seconds=0.125)
    with started(setting) as s:
        told = forecast([row], FakeEncoding().values, s.machine)
        accepted = s.accept(row, timeout_s=told.promise_s, encoding=FakeEncoding())
        assert accepted.promise_s == pytest.approx(told.promise_s)
        assert accepted.eta_s == pytest.approx(told.expected_s)
        accepted.future.result(60.0)
