"""Step tables: rules of their lines, the papers' formulas computed without a table, and diffusers' grids."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from model.grids import GridError, Steps
from model.lines import Column
from model.samplers import SAMPLERS, Kept, StepTable, denoise_table, sample_steps, sample_table
from model.schedule import Float64, PredictionType, Schedule, TimestepSpacing
from tests.reference import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

# diffusers' warning with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

P, Q, A, B, D, E, S, BOUND, C_1, C_2, C_3, R_X, R_0, R_E, QUANTILE, MAXIMUM = Column
MEMORIES = [C_1, C_2, C_3]
OF_RESULT = [A, B, *MEMORIES, D, E]
ESTIMATE = [0, 1, 0, 0, 0, 0, 0]  # of a line whose result is x0
OF_BOUND = [BOUND, QUANTILE, MAXIMUM]
FINITE = [column for column in Column if column != BOUND]
PREDICTION_TYPES: list[PredictionType] = ["epsilon", "v_prediction", "sample"]
SPACINGS: list[TimestepSpacing] = ["leading", "trailing", "linspace"]
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "pndm": partial(PNDMScheduler, skip_prk_steps=True),
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m_sde": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"),
    "heun": HeunDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
    "tcd": TCDScheduler,
}
LISTING = sorted(name for name, sampler in SAMPLERS.items() if sampler.through is not None)
SOLVERS = {"dpmpp_2m", "dpmpp_2m_sde", "unipc"}
EULER = {"euler", "euler_a", "heun"}
THRESHOLDING = {"ddim", "ddpm", "lcm", *SOLVERS}
BOUNDLESS = {"pndm", "tcd"}
TAUGHT = {"lcm", "tcd"}  # on a teacher's timesteps
NOISY = {"ddim", "ddpm", "dpmpp_2m_sde", "euler_a", "lcm", "tcd"}  # some with eta
TWICE = {"pndm", "heun"}  # they are told timesteps twice
DIVIDING = {"pndm", *SOLVERS, *EULER}  # by ᾱ; they replace an ᾱ of 0 by 2⁻²⁴

schedules = st.builds(
    Schedule,
    num_train_timesteps=st.sampled_from([7, 50, 1000]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
    rescale_betas_zero_snr=st.booleans(),
    prediction_type=st.sampled_from(PREDICTION_TYPES),
    variance_type=st.sampled_from(["fixed_small", "fixed_large"]),
    timestep_spacing=st.sampled_from([None, *SPACINGS]),
    steps_offset=st.sampled_from([0, 1]),
    set_alpha_to_one=st.sampled_from([None, False, True]),
    interpolation_type=st.sampled_from(["linear", "log_linear"]),
    use_karras_sigmas=st.booleans(),
    solver_type=st.sampled_from(["midpoint", "heun"]),
    final_sigmas_type=st.sampled_from(["zero", "sigma_min"]),
    original_inference_steps=st.sampled_from([7, 50]),
    timestep_scaling=st.sampled_from([0.1, 10.0]),
)
etas = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


def timesteps_of(schedule: Schedule) -> st.SearchStrategy[tuple[int, ...]]:
    """Strictly falling lists."""
    timesteps = st.integers(0, schedule.num_train_timesteps - 1)
    return st.sets(timesteps, min_size=1, max_size=30).map(lambda drawn: tuple(sorted(drawn, reverse=True)))


class Case(NamedTuple):
    """A table, and the levels that it was made from."""

    schedule: Schedule
    sampler: str
    steps: Steps
    lines: Float64

    @property
    def alpha_bar(self) -> Float64:
        """ᾱ before each line."""
        before = self.steps.alpha_bar
        return np.where(before == 0, 2.0**-24, before) if self.sampler in DIVIDING else before


@st.composite
def cases(draw: st.DrawFn, samplers: Sequence[str] = sorted(SAMPLERS.keys() - {"pndm"})) -> Case:
    schedule, name, eta = draw(schedules), draw(st.sampled_from(samplers)), draw(etas)
    sampler = SAMPLERS[name]
    try:
        if draw(st.booleans()):
            listed = draw(timesteps_of(schedule))
            if sampler.through is None:
                steps = sampler.walk(schedule, np.array(listed))
                return Case(schedule, name, steps, sampler.lines(schedule, steps, eta))
            lines = sample_table(schedule, name, listed, eta).lines
            return Case(schedule, name, sampler.through(schedule, np.array(listed)), lines)
        N = draw(st.one_of(st.integers(1, schedule.num_train_timesteps), st.integers(1, 7)))
        return Case(schedule, name, sample_steps(schedule, name, N), sample_table(schedule, name, N, eta).lines)
    except GridError:
        reject()


Shares = tuple[Float64, Float64]  # of x_0 and of ε


def exact_prediction(schedule: Schedule, alpha_bar: Float64) -> Shares:
    """What an exact network predicts for √ᾱ·x_0 + √(1−ᾱ)·ε."""
    zero, one = np.zeros_like(alpha_bar), np.ones_like(alpha_bar)
    match schedule.prediction_type:
        case "epsilon":
            return zero, one
        case "v_prediction":
            return -np.sqrt(1 - alpha_bar), np.sqrt(alpha_bar)
        case "sample":
            return one, zero


def shares(case: Case) -> Shares:
    """What is in each line's result for an image of its level and exact predictions, without the line's own noise."""
    lines = case.lines
    x = np.sqrt(case.alpha_bar), np.sqrt(1 - case.alpha_bar)
    x0 = np.ones(len(lines)), np.zeros(len(lines))
    out = exact_prediction(case.schedule, case.alpha_bar)
    results = []
    for of_x, of_x0, of_out in zip(x, x0, out, strict=True):
        result = lines[:, A] * of_x + lines[:, B] * of_x0 + lines[:, E] * of_out
        left = lines[:, R_X] * of_x + lines[:, R_0] * of_x0 + lines[:, R_E] * of_out
        memories: list[float] = []
        for i in range(len(lines)):
            result[i] += sum(c * m for c, m in zip(lines[i, MEMORIES], memories, strict=False))
            if lines[i, [R_X, R_0, R_E]].any():
                memories = [left[i], *memories]
        results.append(result)
    return results[0], results[1]


def scale_of_result(case: Case) -> Float64:
    """1, but for Euler's end: there diffusers takes x/√ᾱ for the image."""
    scale = np.ones(len(case.lines))
    if case.sampler == "euler":
        scale[-1] = case.steps.alpha_bar_next[-1] ** -0.5
    return scale


EXACT = sorted(SAMPLERS.keys() - {"pndm", "lcm"})  # each of their lines ends at its level, if the prediction is exact


@given(cases(["lcm"]))
def test_a_line_of_lcm_mixes_the_image_into_its_estimate_and_is_the_image_at_timestep_0(case: Case) -> None:
    """The share of x falls with the timestep. Then comes the noise of the next level."""
    signal, noise = shares(case)
    s = case.schedule.timestep_scaling * case.steps.timesteps
    skip, out = 0.25 / (s**2 + 0.25), s / np.sqrt(s**2 + 0.25)
    ends = np.sqrt(case.steps.alpha_bar_next)
    np.testing.assert_allclose(signal, ends * (out + skip * np.sqrt(case.alpha_bar)), rtol=0, atol=1e-11)
    np.testing.assert_allclose(noise, ends * skip * np.sqrt(1 - case.alpha_bar), rtol=0, atol=1e-11)
    np.testing.assert_allclose(case.lines[:, D] ** 2, 1 - case.steps.alpha_bar_next, rtol=0, atol=1e-11)
    if case.steps.timesteps[-1] == 0:
        assert case.lines[-1, OF_RESULT].tolist() == [1, 0, 0, 0, 0, 0, 0]


@given(cases(EXACT))
def test_each_line_keeps_the_signal(case: Case) -> None:
    signal, _ = shares(case)
    expected = np.sqrt(case.steps.alpha_bar_next) * scale_of_result(case)
    np.testing.assert_allclose(signal, expected, rtol=0, atol=1e-11)


@given(cases(EXACT))
def test_each_line_keeps_the_noise(case: Case) -> None:
    assume(case.sampler != "ddpm" or case.schedule.variance_type == "fixed_small")
    _, noise = shares(case)
    expected = (1 - case.steps.alpha_bar_next) * scale_of_result(case) ** 2
    np.testing.assert_allclose(noise**2 + case.lines[:, D] ** 2, expected, rtol=1e-11, atol=1e-11)


@given(cases(["pndm"]))
def test_a_line_of_pndm_is_ddims_where_all_predictions_are_equal(case: Case) -> None:
    """The second line and the first, one after the other, are one step of DDIM."""
    lines, ends = case.lines, case.steps.alpha_bar_next
    ddim = SAMPLERS["ddim"].lines(case.schedule, replace(case.steps, alpha_bar=case.alpha_bar), 0.0)
    of_x, of_out = ddim[:, A] + ddim[:, B] * ddim[:, P], ddim[:, E] + ddim[:, B] * ddim[:, Q]
    alone, both = lines[:, A].copy(), lines[:, [E, *MEMORIES]].sum(axis=1)
    if len(lines) > 1:
        alone[1], both[1] = lines[1, A] * lines[0, A], both[1] + lines[1, A] * both[0]
    np.testing.assert_allclose(alone, of_x, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(both, of_out, rtol=1e-9, atol=1e-9)
    assert (lines[:, [B, D]] == 0).all()
    assert len(ends) == len(lines)


@given(cases())
def test_each_line_finds_x0_in_an_exact_prediction(case: Case) -> None:
    alpha_bar = case.alpha_bar
    p, q = case.lines[:, P], case.lines[:, Q]
    of_x0, of_noise = exact_prediction(case.schedule, alpha_bar)
    signal, noise = p * np.sqrt(alpha_bar) + q * of_x0, p * np.sqrt(1 - alpha_bar) + q * of_noise
    if case.schedule.prediction_type == "epsilon":
        known = alpha_bar > 0  # pure noise says nothing about x_0
        signal, noise = signal[known], noise[known] * np.sqrt(alpha_bar[known])
    np.testing.assert_allclose(signal, 1, rtol=0, atol=1e-11)
    np.testing.assert_allclose(noise, 0, rtol=0, atol=1e-11)


@given(cases(sorted(SAMPLERS)))
def test_tables_are_finite_and_end_clean(case: Case) -> None:
    assert np.isfinite(case.lines[:, FINITE]).all()
    exact = case.sampler in EXACT and (case.schedule.variance_type == "fixed_small" or case.sampler != "ddpm")
    if case.steps.alpha_bar_next[-1] == 1 and exact:
        np.testing.assert_allclose(case.lines[-1, OF_RESULT], ESTIMATE, rtol=0, atol=1e-9)


def test_dpmpp_2m_is_finite_where_zero_snr_ends_in_several_small_alphas() -> None:
    """Between 2⁻²⁴, which replaces ᾱ = 0, and the next ᾱ, which is even smaller."""
    table = sample_table(Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction"), "dpmpp_2m", 999)
    assert np.isfinite(table.lines[:, FINITE]).all()


@pytest.mark.parametrize("sampler", sorted(EULER - {"heun"}))
def test_where_the_noise_would_rise_euler_refuses(sampler: str) -> None:
    """Between that next ᾱ and 2⁻²⁴."""
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    message = f"1000 steps would not lower the noise at each step; {sampler} takes 1 to 285 here"
    with pytest.raises(GridError, match=f"^{message}$"):
        sample_table(schedule, sampler, 1000)


# The papers' formulas, one step at a time.


def prediction(x: Float64, t: float) -> Float64:
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


def pndm_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Liu et al. 2022, eq. 9 and 12. The second timestep is there twice, and the first step is taken twice."""
    alphas = schedule.alphas_cumprod
    stride = schedule.num_train_timesteps // (len(timesteps) - 1 or 1)
    known: list[Float64] = []
    first = x
    for i, t in enumerate(timesteps):
        start, out = t, prediction(x, t)
        if i == 1:
            x, start, mean = first, t + stride, (out + known[0]) / 2
        else:
            known = [out, *known[:3]]
            weights, divisor = {1: ([1], 1), 2: ([3, -1], 2), 3: ([23, -16, 5], 12), 4: ([55, -59, 37, -9], 24)}[
                len(known)
            ]
            mean = np.tensordot(weights, known, axes=1) / divisor
        end = alphas[start - stride] if start >= stride else 1.0 if schedule.set_alpha_to_one else alphas[0]
        x0, epsilon = x0_and_noise(schedule, x, mean, float(alphas[start]))
        x = end**0.5 * x0 + (1 - end) ** 0.5 * epsilon
    return x


def euler_by_hand(schedule: Schedule, timesteps: list[float], eta: float, x: Float64) -> Float64:
    return euler_with(0.0, schedule, timesteps, x)


def euler_a_by_hand(schedule: Schedule, timesteps: list[float], eta: float, x: Float64) -> Float64:
    return euler_with(1.0, schedule, timesteps, x)


def euler_with(ancestral: float, schedule: Schedule, timesteps: list[float], x: Float64) -> Float64:
    """k-diffusion's sample_euler and sample_euler_ancestral, in x = x_0 + σ·ε."""
    levels = [*np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas), 0.0]
    x = x * (1 + levels[0] ** 2) ** 0.5
    for i, (t, (sigma, after)) in enumerate(zip(timesteps, pairwise(levels), strict=True)):
        scaled = x / (1 + sigma**2) ** 0.5
        x0, epsilon = x0_and_noise(schedule, scaled, prediction(scaled, t), 1 / (1 + sigma**2))
        up = ancestral * (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        x = bounded(schedule, x0, schedule.clip_sample) + down * epsilon + up * noise_of(i)
    return x


def lcm_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Luo et al. 2023, algorithm 3, with the boundary conditions of Song et al. 2023."""
    for i, t in enumerate(timesteps):
        x0, _ = x0_and_noise(schedule, x, prediction(x, t), float(schedule.alphas_cumprod[t]))
        s = schedule.timestep_scaling * t
        share = s / (s**2 + 0.25) ** 0.5
        x = share * bounded(schedule, x0, schedule.clip_sample) + (1 - share**2) * x
        if i + 1 < len(timesteps):
            alpha_bar = float(schedule.alphas_cumprod[timesteps[i + 1]])
            x = alpha_bar**0.5 * x + (1 - alpha_bar) ** 0.5 * noise_of(i)
    return x


def dpmpp_2m_sde_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """k-diffusion's sample_dpmpp_2m_sde with eta 1 and midpoint, which ends at x_0."""
    lambdas = np.log(np.sqrt(schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)))
    before: Float64 | None = None
    for i, t in enumerate(timesteps):
        x0, _ = x0_and_noise(schedule, x, prediction(x, t), float(schedule.alphas_cumprod[t]))
        x0 = bounded(schedule, x0, schedule.clip_sample)
        if i + 1 == len(timesteps):
            return x0
        s = timesteps[i + 1]
        h, alpha_bar_next = lambdas[s] - lambdas[t], float(schedule.alphas_cumprod[s])
        D = x0
        if before is not None:
            D = x0 + h / (lambdas[t] - lambdas[timesteps[i - 1]]) / 2 * (x0 - before)
        ratio = ((1 - alpha_bar_next) / (1 - schedule.alphas_cumprod[t])) ** 0.5
        deviation = (1 - alpha_bar_next) ** 0.5 * (1 - np.exp(-2 * h)) ** 0.5
        x = ratio * np.exp(-h) * x + alpha_bar_next**0.5 * (1 - np.exp(-2 * h)) * D + deviation * noise_of(i)
        before = x0
    raise AssertionError("no timesteps")


def unipc_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Zhao et al. 2023: at each timestep UniC-2 corrects x with the estimate there, and UniP-2 goes on from that x."""
    alphas, sigmas = np.sqrt(schedule.alphas_cumprod), np.sqrt(1 - schedule.alphas_cumprod)
    lambdas = np.log(alphas / sigmas)
    corrected: list[Float64] = []
    estimates: list[Float64] = []
    for i, t in enumerate(timesteps):
        x0, _ = x0_and_noise(schedule, x, prediction(x, t), float(schedule.alphas_cumprod[t]))
        x0 = bounded(schedule, x0, schedule.clip_sample)
        if i + 1 == len(timesteps):
            return x0
        if i > 0:
            s = timesteps[i - 1]
            h = lambdas[t] - lambdas[s]
            B = np.exp(-h) - 1
            base = sigmas[t] / sigmas[s] * corrected[-1] - alphas[t] * B * estimates[-1]
            if i == 1:
                x = base - alphas[t] * B * 0.5 * (x0 - estimates[-1])
            else:
                r = (lambdas[timesteps[i - 2]] - lambdas[s]) / h
                b = [(B / -h - 1) / B, 2 * ((B / -h - 1) / -h - 0.5) / B]
                rho = np.linalg.solve([[1, 1], [r, 1]], b)
                slope = rho[0] * (estimates[-2] - estimates[-1]) / r + rho[1] * (x0 - estimates[-1])
                x = base - alphas[t] * B * slope
        corrected.append(x)
        estimates.append(x0)
        s = timesteps[i + 1]
        h = lambdas[s] - lambdas[t]
        B = np.exp(-h) - 1
        x = sigmas[s] / sigmas[t] * x - alphas[s] * B * x0
        if i > 0:
            r = (lambdas[timesteps[i - 1]] - lambdas[t]) / h
            x = x - alphas[s] * B * 0.5 * (estimates[-2] - x0) / r
    raise AssertionError("no timesteps")


def heun_by_hand(schedule: Schedule, timesteps: list[float], eta: float, x: Float64) -> Float64:
    """Karras et al. 2022, algorithm 1 without churn, in x = x_0 + σ·ε."""
    steps = list(dict.fromkeys(timesteps))
    levels = [*np.interp(steps, np.arange(len(schedule.sigmas)), schedule.sigmas), 0.0]
    x = x * (1 + levels[0] ** 2) ** 0.5

    def slope(x: Float64, sigma: float, t: float) -> Float64:
        scaled = x / (1 + sigma**2) ** 0.5
        x0, _ = x0_and_noise(schedule, scaled, prediction(scaled, t), 1 / (1 + sigma**2))
        return (x - bounded(schedule, x0, schedule.clip_sample)) / sigma

    for i, (sigma, after) in enumerate(pairwise(levels)):
        d = slope(x, sigma, steps[i])
        ahead = x + d * (after - sigma)
        x = x + (d + slope(ahead, after, steps[i + 1])) / 2 * (after - sigma) if after else ahead
    return x


def tcd_by_hand(schedule: Schedule, timesteps: list[int], eta: float, x: Float64) -> Float64:
    """Zheng et al. 2024, algorithm 2. The last step goes to timestep 0, without noise."""
    for i, (t, after) in enumerate(pairwise([*timesteps, 0])):
        s = int(np.float32(1 - eta) * np.float32(after))
        alpha_bar, alpha_bar_s, alpha_bar_next = (float(schedule.alphas_cumprod[one]) for one in (t, s, after))
        x0, epsilon = x0_and_noise(schedule, x, prediction(x, t), alpha_bar)
        x = alpha_bar_s**0.5 * x0 + (1 - alpha_bar_s) ** 0.5 * epsilon
        if i + 1 < len(timesteps):
            share = alpha_bar_next / alpha_bar_s
            x = share**0.5 * x + (1 - share) ** 0.5 * noise_of(i)
    return x


def run(table: StepTable, x: Float64) -> Float64:
    """Take the lines of a table, in double precision."""
    memories: list[Float64] = []
    for i, (step, line) in enumerate(zip(table.steps, table.lines, strict=True)):
        out = prediction(x, step.timestep)
        x0 = (line[P] * x + line[Q] * out).clip(-line[BOUND], line[BOUND])
        x_next = line[A] * x + line[B] * x0 + line[D] * noise_of(i) + line[E] * out
        for factor, memory in zip(line[MEMORIES], memories, strict=False):
            x_next = x_next + factor * memory
        if step.remembers:
            memories = [line[R_X] * x + line[R_0] * x0 + line[R_E] * out, *memories[:2]]
        x = x_next
    return x


BY_HAND: dict[str, Callable[[Schedule, list[Any], float, Float64], Float64]] = {
    "ddim": ddim_by_hand,
    "ddpm": ddpm_by_hand,
    "dpmpp_2m": dpmpp_2m_by_hand,
    "pndm": pndm_by_hand,
    "euler": euler_by_hand,
    "euler_a": euler_a_by_hand,
    "heun": heun_by_hand,
    "dpmpp_2m_sde": dpmpp_2m_sde_by_hand,
    "unipc": unipc_by_hand,
    "lcm": lcm_by_hand,
    "tcd": tcd_by_hand,
}


schedule_fields = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.sampled_from([40, 1000]),
        "original_inference_steps": st.sampled_from([33, 50]),
        "timestep_scaling": st.sampled_from([0.05, 10.0]),
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
    timesteps = table.timesteps if sampler in EULER else table.timesteps.astype(int)
    expected = BY_HAND[sampler](schedule, timesteps.tolist(), eta, x)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(run(table, x), expected, rtol=0, atol=1e-6 * scale)


@given(fields=schedule_fields, sampler=st.sampled_from(LISTING), eta=etas, data=st.data())
def test_table_takes_the_steps_of_the_paper_through_listed_timesteps(
    fields: dict[str, Any], sampler: str, eta: float, data: st.DataObject
) -> None:
    schedule = Schedule(**fields)
    timesteps = data.draw(timesteps_of(schedule))
    table = sample_table(schedule, sampler, timesteps, eta)
    assert tuple(once(sampler, table.timesteps.tolist())) == timesteps
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


def test_eta_means_something_to_those_that_take_it() -> None:
    for name, sampler in SAMPLERS.items():
        none, some = (sample_table(Schedule(), name, 10, eta).lines for eta in (0.0, 0.5))
        assert (none != some).any() == sampler.takes_eta == (name in ("ddim", "tcd"))


def test_a_table_without_lines_has_no_steps() -> None:
    assert StepTable(np.empty(0), np.empty((0, len(Column)))).steps == []


def test_dpmpp_2m_needs_no_memory_but_x0() -> None:
    """A runner keeps x0 of the line before anyway. PNDM's predictions need places of their own."""
    for sampler, kept in (("ddim", Kept.NOWHERE), ("euler_a", Kept.NOWHERE), ("dpmpp_2m", Kept.AS_X0)):
        steps = sample_table(Schedule(), sampler, 10).steps
        assert {step.kept for step in steps} <= {kept, Kept.NOWHERE}
        assert kept in {step.kept for step in steps}
    steps = sample_table(Schedule(steps_offset=1), "pndm", 6).steps
    assert [step.reads for step in steps] == [0, 1, 1, 2, 3, 3, 3]
    assert [step.remembers for step in steps] == [True, False, True, True, True, True, False]
    assert [step.remembered for step in steps] == [0, 1, 1, 2, 3, 4, 5]
    assert {step.kept for step in steps} == {Kept.IN_RING}


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
    """diffusers' solvers know thresholding, and no clip_sample; Heun's knows clip_sample alone. TCD bounds nothing."""

    def bounds(sampler: str, schedule: Schedule) -> list[float]:
        lines = sample_table(schedule, sampler, 10).lines
        assert (lines[:, OF_BOUND] == lines[0, OF_BOUND]).all()
        found: list[float] = lines[0, OF_BOUND].tolist()
        return found

    named = Schedule(clip_sample=True, clip_sample_range=2.5)
    thresholded = Schedule(clip_sample=True, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5)
    for name in SAMPLERS:
        clips_by_default, clips, thresholds = name in ("ddim", "ddpm"), name not in BOUNDLESS, name in THRESHOLDING
        assert bounds(name, Schedule()) == [1.0 if clips_by_default else np.inf, 0, 0]
        assert bounds(name, named) == [2.5 if clips else np.inf, 0, 0]
        assert bounds(name, Schedule(clip_sample=False)) == [np.inf, 0, 0]
        if thresholds:
            assert bounds(name, thresholded) == [np.inf, 0.9, 1.5]
        else:
            assert bounds(name, thresholded) == [1.0 if clips else np.inf, 0, 0]


# Grids.


def once(sampler: str, timesteps: list[float]) -> list[float]:
    """The timesteps, those once that PNDM and Heun's method are told twice."""
    return list(dict.fromkeys(timesteps)) if sampler in TWICE else timesteps


def lines_of(sampler: str, N: int) -> int:
    """The number of lines, which is what a request costs."""
    return {"pndm": N + (N > 1), "heun": 2 * N - 1}.get(sampler, N)


def is_a_grid(timesteps: Sequence[float], T: int, N: int) -> bool:
    """Whether these are N strictly falling timesteps in 0 … T−1."""
    falling = all(t > s for t, s in pairwise(timesteps))
    return len(timesteps) == N and falling and timesteps[-1] >= 0 and timesteps[0] < T


def grids_agree(schedule: Schedule, sampler: str, numbers: list[int]) -> int:
    """Compare with diffusers' timesteps. Where these are no grid, the number must be refused. Returns how many are."""
    spacing = {} if schedule.timestep_spacing is None else {"timestep_spacing": schedule.timestep_spacing}
    T = schedule.num_train_timesteps
    betas = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}  # Heun's and TCD's defaults are others
    scheduler = SCHEDULERS[sampler](num_train_timesteps=T, steps_offset=schedule.steps_offset, **spacing, **betas)
    refused = 0
    for N in numbers:
        try:
            scheduler.set_timesteps(N)
        except ValueError:  # LCMScheduler's and TCDScheduler's
            theirs = []
        else:
            theirs = scheduler.timesteps.tolist()
        if sampler == "pndm" and N > 1:
            assert theirs[1] == theirs[2]
            fits = is_a_grid(once(sampler, theirs), T, N) and theirs[1] + T // N < T
        else:
            starts_clean = sampler in EULER and N == 1 and schedule.timestep_spacing in (None, "linspace")
            fits = is_a_grid(once(sampler, theirs), T, N) and not starts_clean
        if fits:
            steps = sample_steps(schedule, sampler, N)
            assert steps.timesteps.tolist() == theirs
            if sampler in EULER:
                levels = 1 / (1 + scheduler.sigmas.double().numpy() ** 2)
                np.testing.assert_allclose(steps.alpha_bar, levels[:-1], rtol=2e-6)
                np.testing.assert_allclose(steps.alpha_bar_next, levels[1:], rtol=2e-6)
                init = scheduler.init_noise_sigma / (scheduler.sigmas[0] ** 2 + 1) ** 0.5
                assert steps.init == pytest.approx(float(init), abs=1e-6)
        else:
            refused += 1
            with pytest.raises(GridError):
                sample_steps(schedule, sampler, N)
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
        ("pndm", None, 0, 0),
        ("pndm", "leading", 1, 1),
        ("pndm", "trailing", 0, 62),
        ("pndm", "linspace", 0, 0),
        ("euler", None, 0, 1),
        ("euler", "leading", 1, 1),
        ("euler", "trailing", 0, 62),
        ("euler_a", "linspace", 0, 1),
        ("euler_a", "leading", 0, 0),
        ("lcm", None, 0, 950),
        ("lcm", "trailing", 1, 950),
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
    assert is_a_grid(once(sampler, table.timesteps.tolist()), T, N)
    assert len(table) == len(table.lines) == lines_of(sampler, N)
    assert table.levels.shape == (len(table) + 1, 2)


OF_LINSPACE = "1 step of the spacing linspace would be at timestep 0, and leave all of the noise"


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
        (
            Schedule(),
            "euler",
            1,
            f"{OF_LINSPACE}; euler takes 2 to 1000 here",
        ),
        (
            Schedule(num_train_timesteps=20),
            "euler_a",
            21,
            "21 steps are more than the timesteps 0 to 19; euler_a takes 2 to 20 here",
        ),
        (
            Schedule(num_train_timesteps=1),
            "euler",
            1,
            f"{OF_LINSPACE}; euler takes no number of steps here",
        ),
        (
            Schedule(),
            "lcm",
            51,
            "51 steps are more than original_inference_steps, which is 50; lcm takes 1 to 50 here",
        ),
        (
            Schedule(num_train_timesteps=20),
            "lcm",
            1,
            "original_inference_steps is 50, more than the timesteps 0 to 19; lcm takes no number of steps here",
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
            SAMPLERS[sampler].steps(schedule, number, None)
        except GridError:
            return False
        return True

    fitting = [number for number in range(1, T + 1) if fits(number)]
    try:
        sample_table(schedule, sampler, N)
    except GridError as error:
        told = str(error).split("; ", 1)[1].removeprefix(f"{sampler} takes ")
        if not fitting:
            assert told == "no number of steps here"
            return
        least, most, *nearest = map(int, re.findall(r"\d+", told))
        assert [least, most] == [fitting[0], fitting[-1]]
        if least < N < most:
            assert nearest == [max(n for n in fitting if n < N), min(n for n in fitting if n > N)]
        else:
            assert not nearest


def test_ddim_goes_a_stride_down_wherever_the_next_timestep_is() -> None:
    """CHECKPOINTS.md, trap 11: with 30 steps these disagree at 29 places for linspace and at 10 for trailing."""
    for spacing, disagree in cast("list[tuple[TimestepSpacing, int]]", [("linspace", 29), ("trailing", 10)]):
        schedule = Schedule(timestep_spacing=spacing)
        steps = sample_steps(schedule, "ddim", 30)
        below = steps.timesteps.astype(int) - 33
        expected = np.where(below < 0, 1.0, schedule.alphas_cumprod[below.clip(min=0)])
        assert steps.alpha_bar_next.tolist() == expected.tolist()
        assert (steps.alpha_bar_next[:-1] != steps.alpha_bar[1:]).sum() == disagree


# Tables that do not start from pure noise.


@given(t=st.integers(1, 999), data=st.data(), sampler=st.sampled_from(sorted(SAMPLERS)), schedule=schedules)
def test_denoise_table(t: int, data: st.DataObject, sampler: str, schedule: Schedule) -> None:
    t = min(t, schedule.num_train_timesteps - 1)
    assume(t > 1)
    N = data.draw(st.integers(2, t))
    table = denoise_table(schedule, sampler, t, N, eta=0.5)
    by_hand = [int(t * (N - i) / N + 0.5) for i in range(N)]
    assert once(sampler, table.timesteps.tolist()) == by_hand
    assert len(table) == lines_of(sampler, N)
    assert is_a_grid(by_hand, t + 1, N)
    assert by_hand[0] == t
    assert np.isfinite(table.lines[:, FINITE]).all()
    assert table.init == 1
    if sampler in EXACT:
        np.testing.assert_allclose(table.lines[-1, OF_RESULT], ESTIMATE, rtol=0, atol=1e-9)
    # In between, it steps as the sampler does.
    steps = SAMPLERS[sampler].walk(schedule, np.array(by_hand))
    assert steps.alpha_bar_next[-1] == 1
    assert (table.lines[:-1] == SAMPLERS[sampler].lines(schedule, steps, 0.5)[:-1]).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_denoise_adds_no_noise_at_the_end_even_with_a_large_variance(sampler: str) -> None:
    noise = denoise_table(Schedule(variance_type="fixed_large"), sampler, 600, 20, eta=1.0).lines[:, D]
    assert noise[-1] == 0
    assert (noise[:-1] > 0).all() == (sampler in NOISY)


@given(t=st.integers(0, 6), sampler=st.sampled_from(sorted(SAMPLERS)), schedule=schedules)
def test_denoising_in_one_step_is_x0(t: int, sampler: str, schedule: Schedule) -> None:
    table = denoise_table(schedule, sampler, t, 1)
    assert table.timesteps.tolist() == [t]
    [line] = table.lines
    assert line[OF_RESULT].tolist() == ESTIMATE
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
    assert (learned[:, [P, Q, A, B, E]] == small[:, [P, Q, A, B, E]]).all()
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


def test_the_first_step_of_heun_has_two_lines() -> None:
    table = denoise_table(Schedule(), "heun", 900, 3)
    assert len(table) == 5
    assert table.first(SAMPLERS["heun"].order).timesteps.tolist() == [900, 600]
