"""Step tables: rules of their lines, the papers' formulas computed without a table, and diffusers' grids."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from model.grids import GridError, Steps, ddim_steps
from model.samplers import SAMPLERS, Column, StepTable, denoise_table, sample_table
from model.schedule import Float64, PredictionType, Schedule, TimestepSpacing
from tests.reference import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

# diffusers' warning with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

P, Q, A, B, C, D, E, S, BOUND, QUANTILE, MAXIMUM = Column
PREDICTION_TYPES: list[PredictionType] = ["epsilon", "v_prediction", "sample"]
SPACINGS: list[TimestepSpacing] = ["leading", "trailing", "linspace"]
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}

schedules = st.builds(
    Schedule,
    num_train_timesteps=st.sampled_from([7, 50, 1000]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
    rescale_betas_zero_snr=st.booleans(),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    variance_type=st.sampled_from(["fixed_small", "fixed_large"]),
    timestep_spacing=st.sampled_from([None, *SPACINGS]),
    steps_offset=st.sampled_from([0, 1]),
    set_alpha_to_one=st.booleans(),
)
etas = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def timesteps_of(schedule: Schedule) -> st.SearchStrategy[tuple[int, ...]]:
    """Strictly falling lists."""
    timesteps = st.integers(0, schedule.num_train_timesteps - 1)
    return st.sets(timesteps, min_size=1, max_size=30).map(lambda drawn: tuple(sorted(drawn, reverse=True)))


class Case(NamedTuple):
    """A table, and the steps that it was made from."""

    schedule: Schedule
    sampler: str
    steps: Steps
    lines: Float64

    def alphas_cumprod(self) -> tuple[Float64, Float64]:
        """ᾱ before and after each step. For the sampler that takes logarithms, 2⁻²⁴ replaces an initial ᾱ of 0."""
        before, after = self.steps.alphas_cumprod(self.schedule)
        return (np.where(before == 0, 2.0**-24, before), after) if self.sampler == "dpmpp_2m" else (before, after)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    schedule, sampler, eta = draw(schedules), draw(st.sampled_from(sorted(SAMPLERS))), draw(etas)
    if draw(st.booleans()):
        listed = draw(timesteps_of(schedule))
        steps = SAMPLERS[sampler].through(schedule, np.array(listed))
        return Case(schedule, sampler, steps, sample_table(schedule, sampler, listed, eta).lines)
    N = draw(st.one_of(st.integers(1, schedule.num_train_timesteps), st.integers(1, 7)))
    try:
        table = sample_table(schedule, sampler, N, eta)
    except GridError:
        assume(False)
    return Case(schedule, sampler, SAMPLERS[sampler].steps(schedule, N), table.lines)


def signal_and_noise(case: Case) -> tuple[Float64, Float64]:
    """The shares of x_0 and ε in each line's result for x = √ᾱ·x_0 + √(1−ᾱ)·ε, without the line's own noise."""
    alpha_bar, _ = case.alphas_cumprod()
    a, b, c, e = (case.lines[:, column] for column in (A, B, C, E))
    signal, noise = a * np.sqrt(alpha_bar) + b + c, a * np.sqrt(1 - alpha_bar)
    match case.schedule.prediction_type:
        case "epsilon":
            return signal, noise + e
        case "v_prediction":
            return signal - e * np.sqrt(1 - alpha_bar), noise + e * np.sqrt(alpha_bar)
        case "sample":
            return signal + e, noise


@given(cases())
def test_each_line_keeps_the_signal(case: Case) -> None:
    _, alpha_bar_next = case.alphas_cumprod()
    signal, _ = signal_and_noise(case)
    np.testing.assert_allclose(signal, np.sqrt(alpha_bar_next), rtol=0, atol=1e-11)


@given(cases())
def test_each_line_keeps_the_noise(case: Case) -> None:
    assume(case.sampler != "ddpm" or case.schedule.variance_type == "fixed_small")
    _, alpha_bar_next = case.alphas_cumprod()
    _, noise = signal_and_noise(case)
    np.testing.assert_allclose(noise**2 + case.lines[:, D] ** 2, 1 - alpha_bar_next, rtol=0, atol=1e-11)


@given(cases())
def test_each_line_finds_x0_in_an_exact_prediction(case: Case) -> None:
    alpha_bar, _ = case.alphas_cumprod()
    root, root_noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    p, q = case.lines[:, P], case.lines[:, Q]
    match case.schedule.prediction_type:
        case "epsilon":
            signal, noise = p * root, p * root_noise + q
            known = alpha_bar > 0  # pure noise says nothing about x_0
            signal, noise = signal[known], noise[known] * root[known]
        case "v_prediction":
            signal, noise = p * root - q * root_noise, p * root_noise + q * root
        case "sample":
            signal, noise = q, p
    np.testing.assert_allclose(signal, 1, rtol=0, atol=1e-11)
    np.testing.assert_allclose(noise, 0, rtol=0, atol=1e-11)


@given(cases())
def test_tables_are_finite_and_end_clean(case: Case) -> None:
    assert np.isfinite(case.lines[:, :BOUND]).all()
    _, alpha_bar_next = case.alphas_cumprod()
    if alpha_bar_next[-1] == 1 and (case.schedule.variance_type == "fixed_small" or case.sampler != "ddpm"):
        np.testing.assert_allclose(case.lines[-1, [A, B, C, D, E]], [0, 1, 0, 0, 0], rtol=0, atol=1e-9)


def test_dpmpp_2m_is_finite_where_zero_snr_ends_in_several_small_alphas() -> None:
    """Between 2⁻²⁴, which replaces ᾱ = 0, and the next ᾱ, which is even smaller."""
    table = sample_table(Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction"), "dpmpp_2m", 999)
    assert np.isfinite(table.lines[:, :BOUND]).all()


# The papers' formulas, one step at a time.


def prediction(x: Float64, t: int) -> Float64:
    """A fake network: a function of the image and the timestep."""
    values: Float64 = np.sin(3 * x + t) + 0.3 * np.roll(x, 1)
    return values


def x0_and_noise(schedule: Schedule, x: Float64, out: Float64, alpha_bar: float) -> tuple[Float64, Float64]:
    """x_0 and ε from a prediction, where x = √ᾱ·x_0 + √(1−ᾱ)·ε and v = √ᾱ·ε − √(1−ᾱ)·x_0."""
    root, root_noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    match schedule.prediction_type:
        case "epsilon":
            return (x - root_noise * out) / root, out
        case "v_prediction":
            return root * x - root_noise * out, root * out + root_noise * x
        case "sample":
            return out, (x - root * out) / root_noise


def bounded(schedule: Schedule, x0: Float64, clip: bool) -> Float64:
    return x0.clip(-schedule.clip_sample_range, schedule.clip_sample_range) if clip else x0


def noise_of(step: int) -> Float64:
    return np.random.default_rng(step).standard_normal(16)


def ddim_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Each step goes T // N timesteps down."""
    stride = schedule.num_train_timesteps // len(timesteps)
    return ddim_through_by_hand(schedule, timesteps, eta, x, [t - stride for t in timesteps])


def ddim_through_by_hand(
    schedule: Schedule, timesteps: list[int], eta: float, x: Float64, following: list[int]
) -> Float64:
    """Song et al. 2020, eq. 12 and 16. The timestep after the last may be negative: the clean end."""
    alphas = schedule.alphas_cumprod
    for i, (t, s) in enumerate(zip(timesteps, following, strict=True)):
        alpha_bar = float(alphas[t])
        end = 1.0 if schedule.set_alpha_to_one else float(alphas[0])
        alpha_bar_next = float(alphas[s]) if s >= 0 else end
        x0, epsilon = x0_and_noise(schedule, x, prediction(x, t), alpha_bar)
        x0 = bounded(schedule, x0, schedule.clip_sample)
        sigma = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)) ** 0.5
        direction = max(1 - alpha_bar_next - sigma**2, 0) ** 0.5
        x = alpha_bar_next**0.5 * x0 + direction * epsilon + sigma * noise_of(i)
    return x


def ddpm_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Ho et al. 2020, eq. 6 and 7, with the β of the whole step."""
    for i, t in enumerate(timesteps):
        alpha_bar = float(schedule.alphas_cumprod[t])
        alpha_bar_next = float(schedule.alphas_cumprod[timesteps[i + 1]]) if i + 1 < len(timesteps) else 1.0
        beta = 1 - alpha_bar / alpha_bar_next
        x0, _ = x0_and_noise(schedule, x, prediction(x, t), alpha_bar)
        x0 = bounded(schedule, x0, schedule.clip_sample)
        mean = (
            alpha_bar_next**0.5 * beta / (1 - alpha_bar) * x0
            + (1 - beta) ** 0.5 * (1 - alpha_bar_next) / (1 - alpha_bar) * x
        )
        small = (1 - alpha_bar_next) / (1 - alpha_bar) * beta
        variance = small if schedule.variance_type == "fixed_small" else beta
        x = mean + (variance**0.5 * noise_of(i) if t > 0 else 0)
    return x


def dpmpp_2m_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2. The first step and the last are of first order; the last is x_0."""
    alphas = np.sqrt(schedule.alphas_cumprod)
    sigmas = np.sqrt(1 - schedule.alphas_cumprod)
    lambdas = np.log(alphas / sigmas)
    before: Float64 | None = None
    for i, t in enumerate(timesteps):
        x0, _ = x0_and_noise(schedule, x, prediction(x, t), float(schedule.alphas_cumprod[t]))
        x0 = bounded(schedule, x0, schedule.clip_sample)
        if i + 1 == len(timesteps):
            return x0
        s = timesteps[i + 1]
        h = lambdas[s] - lambdas[t]
        D = x0
        if before is not None:
            r = (lambdas[t] - lambdas[timesteps[i - 1]]) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x = sigmas[s] / sigmas[t] * x - alphas[s] * (np.exp(-h) - 1) * D
        before = x0
    raise AssertionError("no timesteps")


def run(table: StepTable, x: Float64) -> Float64:
    """Take the steps of a table, in double precision."""
    x0_previous = np.zeros_like(x)
    for i, (t, (p, q, a, b, c, d, e, _, bound, _, _)) in enumerate(zip(table.timesteps, table.lines, strict=True)):
        out = prediction(x, int(t))
        x0 = (p * x + q * out).clip(-bound, bound)
        x, x0_previous = a * x + b * x0 + c * x0_previous + d * noise_of(i) + e * out, x0
    return x


BY_HAND: dict[str, Callable[[Schedule, list[int], float, Float64], Float64]] = {
    "ddim": ddim_by_hand,
    "ddpm": ddpm_by_hand,
    "dpmpp_2m": dpmpp_2m_by_hand,
}


schedule_fields = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.sampled_from([40, 1000]),
        "beta_schedule": st.sampled_from(["linear", "squaredcos_cap_v2"]),
        "prediction_type": st.sampled_from(PREDICTION_TYPES),
        "variance_type": st.sampled_from(["fixed_small", "fixed_large"]),
        "timestep_spacing": st.sampled_from(SPACINGS),
        "set_alpha_to_one": st.booleans(),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([0.5, 1.0]),
    }
)


@given(
    fields=schedule_fields,
    sampler=st.sampled_from(sorted(SAMPLERS)),
    N=st.integers(1, 30),
    eta=etas,
)
def test_table_takes_the_steps_of_the_paper(fields: dict[str, Any], sampler: str, N: int, eta: float) -> None:
    schedule = Schedule(**fields)
    try:
        table = sample_table(schedule, sampler, N, eta)
    except GridError:
        assume(False)
    x = np.random.default_rng(100).standard_normal(16)
    expected = BY_HAND[sampler](schedule, table.timesteps.tolist(), eta, x)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(run(table, x), expected, rtol=0, atol=1e-6 * scale)


@given(fields=schedule_fields, sampler=st.sampled_from(sorted(SAMPLERS)), eta=etas, data=st.data())
def test_table_takes_the_steps_of_the_paper_through_listed_timesteps(
    fields: dict[str, Any], sampler: str, eta: float, data: st.DataObject
) -> None:
    schedule = Schedule(**fields)
    timesteps = data.draw(timesteps_of(schedule))
    table = sample_table(schedule, sampler, timesteps, eta)
    assert tuple(table.timesteps) == timesteps
    x = np.random.default_rng(100).standard_normal(16)
    if sampler == "ddim":
        expected = ddim_through_by_hand(schedule, [*timesteps], eta, x, [*timesteps[1:], -1])
    else:
        expected = BY_HAND[sampler](schedule, [*timesteps], eta, x)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(run(table, x), expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("N", [10, 50, 100])
def test_ddim_with_eta_1_is_ddpm_where_their_grids_are_one(prediction_type: PredictionType, N: int) -> None:
    schedule = Schedule(prediction_type=prediction_type, clip_sample=False)
    ddim, ddpm = (sample_table(schedule, sampler, N, eta=1.0) for sampler in ("ddim", "ddpm"))
    assert ddim.timesteps.tolist() == ddpm.timesteps.tolist()
    np.testing.assert_allclose(ddim.lines[:, D], ddpm.lines[:, D], rtol=0, atol=1e-12)
    x = np.random.default_rng(100).standard_normal(16)
    np.testing.assert_allclose(run(ddim, x), run(ddpm, x), rtol=1e-9)
    assert np.abs(run(ddim, x) - run(sample_table(schedule, "ddim", N, eta=0.9), x)).max() > 1e-3


def test_eta_means_something_to_ddim_alone() -> None:
    for name, sampler in SAMPLERS.items():
        none, some = (sample_table(Schedule(), name, 10, eta).lines for eta in (0.0, 0.5))
        assert (none != some).any() == sampler.takes_eta == (name == "ddim")


def test_tables_are_shared_and_cannot_be_written_to() -> None:
    table = sample_table(Schedule(), "ddim", 10)
    assert sample_table(Schedule(), "ddim", 10) is table
    for array in (table.lines, table.timesteps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# Bounds.


def test_schedules_alike_but_for_what_was_named_have_their_own_tables() -> None:
    """DPM-Solver++ bounds x_0 only if the config names clip_sample."""
    for schedule, bound in 2 * [(Schedule(), np.inf), (Schedule(clip_sample=True), 1.0)]:
        assert (sample_table(schedule, "dpmpp_2m", 10).lines[:, BOUND] == bound).all()


def test_bounds() -> None:
    for name in SAMPLERS:
        by_default = np.inf if name == "dpmpp_2m" else 1.0
        assert (sample_table(Schedule(), name, 10).lines[:, [BOUND, QUANTILE]] == [by_default, 0]).all()
        named = Schedule(clip_sample=True, clip_sample_range=2.5)
        assert (sample_table(named, name, 10).lines[:, [BOUND, QUANTILE]] == [2.5, 0]).all()
        unbounded = Schedule(clip_sample=False)
        assert (sample_table(unbounded, name, 10).lines[:, [BOUND, QUANTILE]] == [np.inf, 0]).all()
        thresholded = Schedule(
            clip_sample=True, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5
        )
        assert (sample_table(thresholded, name, 10).lines[:, BOUND:] == [np.inf, 0.9, 1.5]).all()


# Grids.


def is_a_grid(timesteps: list[int], T: int, N: int) -> bool:
    """Whether these are N strictly falling timesteps in 0 … T−1."""
    falling = all(t > s for t, s in pairwise(timesteps))
    return len(timesteps) == N and falling and timesteps[-1] >= 0 and timesteps[0] < T


def grids_agree(schedule: Schedule, sampler: str, numbers: list[int]) -> int:
    """Compare with diffusers' timesteps. Where these are no grid, the number must be refused. Returns how many are."""
    spacing = {} if schedule.timestep_spacing is None else {"timestep_spacing": schedule.timestep_spacing}
    T = schedule.num_train_timesteps
    scheduler = SCHEDULERS[sampler](num_train_timesteps=T, steps_offset=schedule.steps_offset, **spacing)
    refused = 0
    for N in numbers:
        scheduler.set_timesteps(N)
        theirs = scheduler.timesteps.tolist()
        if is_a_grid(theirs, T, N):
            assert SAMPLERS[sampler].steps(schedule, N).timesteps.tolist() == theirs
        else:
            refused += 1
            with pytest.raises(GridError):
                SAMPLERS[sampler].steps(schedule, N)
    return refused


@pytest.mark.parametrize(
    ("sampler", "spacing", "steps_offset", "refused"),
    [
        ("ddim", None, 0, 0),
        ("ddim", "leading", 0, 0),
        ("ddim", "leading", 1, 1),
        ("ddim", "trailing", 0, 62),
        ("ddim", "linspace", 0, 0),
        ("ddpm", None, 0, 0),
        ("ddpm", "leading", 1, 1),
        ("ddpm", "trailing", 0, 62),
        ("ddpm", "linspace", 0, 0),
        ("dpmpp_2m", None, 0, 1),
        ("dpmpp_2m", "leading", 0, 1),
        ("dpmpp_2m", "leading", 1, 2),
        ("dpmpp_2m", "trailing", 0, 62),
        ("dpmpp_2m", "linspace", 0, 1),
    ],
)
def test_grids_are_those_of_diffusers(
    sampler: str, spacing: TimestepSpacing | None, steps_offset: int, refused: int
) -> None:
    schedule = Schedule(timestep_spacing=spacing, steps_offset=steps_offset)
    assert grids_agree(schedule, sampler, list(range(1, 1001))) == refused


@given(
    T=st.integers(1, 200),
    data=st.data(),
    spacing=st.sampled_from([None, *SPACINGS]),
    steps_offset=st.integers(0, 5),
    sampler=st.sampled_from(sorted(SAMPLERS)),
)
def test_grids_of_any_length_are_those_of_diffusers(
    T: int, data: st.DataObject, spacing: TimestepSpacing | None, steps_offset: int, sampler: str
) -> None:
    schedule = Schedule(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=steps_offset)
    grids_agree(schedule, sampler, [data.draw(st.integers(1, T))])


@given(
    T=st.integers(1, 3000),
    N=st.integers(1, 3500),
    spacing=st.sampled_from([None, *SPACINGS]),
    steps_offset=st.integers(0, 3),
    sampler=st.sampled_from(sorted(SAMPLERS)),
)
def test_each_number_is_refused_or_has_so_many_falling_timesteps(
    T: int, N: int, spacing: TimestepSpacing | None, steps_offset: int, sampler: str
) -> None:
    schedule = Schedule(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=steps_offset)
    try:
        table = sample_table(schedule, sampler, N)
    except GridError:
        return
    assert is_a_grid(table.timesteps.tolist(), T, N)
    assert len(table) == N == len(table.lines)


@pytest.mark.parametrize(
    ("schedule", "sampler", "N", "message"),
    [
        (
            Schedule(timestep_spacing="trailing"),
            "ddpm",
            61,
            "61 steps do not fit the timesteps 0 to 999; ddpm takes 1 to 1000 here, and nearest to it 60 or 62",
        ),
        (
            Schedule(),
            "dpmpp_2m",
            1000,
            "1000 steps would repeat a timestep of 0 to 999; dpmpp_2m takes 1 to 999 here",
        ),
        (
            Schedule(timestep_spacing="leading", steps_offset=1),
            "ddim",
            1000,
            "1000 steps do not fit the timesteps 0 to 999; ddim takes 1 to 999 here",
        ),
        (
            Schedule(num_train_timesteps=20),
            "ddpm",
            21,
            "21 steps would repeat a timestep of 0 to 19; ddpm takes 1 to 20 here",
        ),
    ],
)
def test_refusal_names_the_numbers_that_would_do(schedule: Schedule, sampler: str, N: int, message: str) -> None:
    with pytest.raises(GridError, match=f"^{re.escape(message)}$"):
        sample_table(schedule, sampler, N)


@given(
    T=st.integers(1, 400),
    N=st.integers(1, 500),
    spacing=st.sampled_from(SPACINGS),
    steps_offset=st.integers(0, 3),
    sampler=st.sampled_from(sorted(SAMPLERS)),
)
def test_refusal_tells_the_truth(T: int, N: int, spacing: TimestepSpacing, steps_offset: int, sampler: str) -> None:
    schedule = Schedule(num_train_timesteps=T, timestep_spacing=spacing, steps_offset=steps_offset)

    def fits(number: int) -> bool:
        try:
            SAMPLERS[sampler].steps(schedule, number)
        except GridError:
            return False
        return True

    try:
        sample_table(schedule, sampler, N)
    except GridError as error:
        told = [int(number) for number in re.findall(r"\d+", str(error).split("; ", 1)[1].replace(sampler, ""))]
        largest = max([number for number in range(1, T + 1) if fits(number)], default=0)
        assert told[:2] == [1, largest]
        if largest > N:
            below = [number for number in range(1, N) if fits(number)][-1:]
            above = next(number for number in range(N + 1, T + 1) if fits(number))
            assert told[2:] == [*below, above]


def test_ddim_goes_a_stride_down_wherever_the_next_timestep_is() -> None:
    """CHECKPOINTS.md, trap 11: with 30 steps these disagree at 29 places for linspace and at 10 for trailing."""
    for spacing, disagree in cast("list[tuple[TimestepSpacing, int]]", [("linspace", 29), ("trailing", 10)]):
        steps = ddim_steps(Schedule(timestep_spacing=spacing), 30)
        assert steps.next_timesteps.tolist() == (steps.timesteps - 33).tolist()
        assert (steps.next_timesteps[:-1] != steps.timesteps[1:]).sum() == disagree


# Tables that do not start from pure noise.


@given(t=st.integers(1, 999), data=st.data(), sampler=st.sampled_from(sorted(SAMPLERS)), schedule=schedules)
def test_denoise_table(t: int, data: st.DataObject, sampler: str, schedule: Schedule) -> None:
    t = min(t, schedule.num_train_timesteps - 1)
    assume(t > 1)
    N = data.draw(st.integers(2, t))
    table = denoise_table(schedule, sampler, t, N, eta=0.5)
    by_hand = [int(t * (N - i) / N + 0.5) for i in range(N)]
    assert table.timesteps.tolist() == by_hand
    assert is_a_grid(by_hand, t + 1, N)
    assert by_hand[0] == t
    assert np.isfinite(table.lines[:, :BOUND]).all()
    np.testing.assert_allclose(table.lines[-1, [A, B, C, D, E]], [0, 1, 0, 0, 0], rtol=0, atol=1e-9)
    # In between, it steps as the sampler does.
    steps = Steps(table.timesteps, np.append(table.timesteps[1:], -1), 1.0)
    assert (table.lines[:-1] == SAMPLERS[sampler].lines(schedule, steps, 0.5)[:-1]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_denoise_adds_no_noise_at_the_end_even_with_a_large_variance(sampler: str) -> None:
    noise = denoise_table(Schedule(variance_type="fixed_large"), sampler, 600, 20, eta=1.0).lines[:, D]
    assert noise[-1] == 0
    assert (noise[:-1] > 0).all() == (sampler != "dpmpp_2m")


@given(t=st.integers(0, 6), sampler=st.sampled_from(sorted(SAMPLERS)), schedule=schedules)
def test_denoising_in_one_step_is_x0(t: int, sampler: str, schedule: Schedule) -> None:
    table = denoise_table(schedule, sampler, t, 1)
    assert table.timesteps.tolist() == [t]
    [line] = table.lines
    assert line[[A, B, C, D, E]].tolist() == [0, 1, 0, 0, 0]
    assert line[BOUND] == schedule.clip_sample_range
    assume(schedule.alphas_cumprod[t] > 0)
    x = np.random.default_rng(0).standard_normal(16) / 2
    expected, _ = x0_and_noise(schedule, x, prediction(x, t), float(schedule.alphas_cumprod[t]))
    np.testing.assert_allclose(run(table, x), expected.clip(-1, 1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_learned_variance_lies_between_the_fixed_ones(spacing: TimestepSpacing) -> None:
    """v = −1 gives the small variance, v = 1 the large one. In between, the logarithm is linear."""
    learned, small, large = (
        sample_table(Schedule(variance_type=kind, timestep_spacing=spacing), "ddpm", 20).lines
        for kind in ("learned_range", "fixed_small", "fixed_large")
    )
    assert (learned[:, [P, Q, A, B, C, E]] == small[:, [P, Q, A, B, C, E]]).all()
    np.testing.assert_allclose(learned[:, D] * np.exp(-learned[:, S]), small[:, D], atol=1e-12)
    np.testing.assert_allclose((learned[:, D] * np.exp(learned[:, S]))[:-1], large[:-1, D])
    np.testing.assert_allclose(learned[:-1, D] ** 2, (small * large)[:-1, D])
    assert learned[-1, D] == 0  # at timestep 0
    assert (small[:, S] == 0).all()


def test_first() -> None:
    table = sample_table(Schedule(), "ddim", 10)
    first = table.first()
    assert len(first) == 1
    assert first.timesteps.tolist() == [900]
    assert (first.lines == table.lines[:1]).all()
