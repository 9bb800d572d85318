"""Samplers as tables: a pure function from a schedule and timesteps to one line of coefficients a step.

A line is one step of the update (model/update.py). x is the image at this timestep, and out the network's prediction:

    x0     = bound(p·x + q·out)
    x_next = a·x + b·x0 + c·x0_previous + d·noise + e·out

With a learned variance the network also predicts v, and the noise has the factor d·exp(s·v). p and q absorb the
prediction type. Tables are built in float64. A new sampler is a new function here; the update stays the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.grids import GridError, Int64, Steps, ddim_steps, ddim_through, ddpm_steps, dpmpp_2m_steps, through
from model.schedule import Float64, Schedule

# Replaces ᾱ = 0, and no other ᾱ, where a formula divides by ᾱ: diffusers' DPMSolverMultistepScheduler.
_ALPHA_BAR_FOR_0 = 2.0**-24
# The smallest posterior variance before its logarithm: diffusers' DDPMScheduler.
_LEAST_VARIANCE = 1e-20


class Column(IntEnum):
    """The columns of a line."""

    P = 0
    Q = 1
    A = 2
    B = 3
    C = 4
    D = 5
    E = 6
    S = 7
    BOUND = 8  # x0 is clipped to ±BOUND; inf for no clipping
    QUANTILE = 9  # of |x0|, for dynamic thresholding; 0 for none
    MAXIMUM = 10  # of the threshold


class Step(NamedTuple):
    """A step of a trajectory.

    Attributes:
        timestep: the network's input.
        line: the step's coefficients, float32 [len(Column)].
        is_noisy: whether noise is added.
        is_thresholded: whether a quantile bounds x0.
    """

    timestep: int
    line: NDArray[np.float32]
    is_noisy: bool
    is_thresholded: bool


@dataclass(frozen=True, eq=False)
class StepTable:
    """The steps of one trajectory. Rows share a table, so its arrays are read-only.

    Attributes:
        timesteps: the network's input at each step, int64 [N], strictly falling.
        lines: coefficients, float64 [N, len(Column)].
    """

    timesteps: Int64
    lines: Float64

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def steps(self) -> list[Step]:
        """The steps, as a runner reads them."""
        lines = self.lines.astype(np.float32)
        noisy, thresholded = (lines[:, column] != 0 for column in (Column.D, Column.QUANTILE))
        return list(map(Step, self.timesteps.tolist(), lines, noisy.tolist(), thresholded.tolist()))

    def first(self) -> "StepTable":
        """A table of the first step alone."""
        return StepTable(self.timesteps[:1], self.lines[:1])


def ddim_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """DDIM, Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.

    ε is the network's own, not computed again from the clipped x0: diffusers' default.
    """
    alpha_bar, alpha_bar_next = steps.alphas_cumprod(schedule)
    lines = _x0_lines(schedule, alpha_bar, schedule.clip_sample)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * np.sqrt(np.maximum(variance, 0))
    direction = np.sqrt(np.maximum(1 - alpha_bar_next - sigma**2, 0))  # of ε
    lines[:, Column.B] = np.sqrt(alpha_bar_next)
    lines[:, Column.D] = sigma
    match schedule.prediction_type:
        case "epsilon":
            lines[:, Column.E] = direction
        case "v_prediction":  # ε = √ᾱ·v + √(1−ᾱ)·x
            lines[:, Column.A] = direction * np.sqrt(1 - alpha_bar)
            lines[:, Column.E] = direction * np.sqrt(alpha_bar)
        case "sample":  # ε = (x − √ᾱ·x0)/√(1−ᾱ)
            lines[:, Column.A] = direction / np.sqrt(1 - alpha_bar)
            lines[:, Column.E] = -direction * np.sqrt(alpha_bar / (1 - alpha_bar))
    return lines


def ddpm_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Ancestral sampling, Ho et al. 2020, arXiv:2006.11239, eq. 7, between any two timesteps. Ignores eta."""
    alpha_bar, alpha_bar_next = steps.alphas_cumprod(schedule)
    alpha = alpha_bar / alpha_bar_next  # of the whole step
    lines = _x0_lines(schedule, alpha_bar, schedule.clip_sample)
    lines[:, Column.A] = np.sqrt(alpha) * (1 - alpha_bar_next) / (1 - alpha_bar)
    lines[:, Column.B] = np.sqrt(alpha_bar_next) * (1 - alpha) / (1 - alpha_bar)
    small, large = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha), 1 - alpha
    match schedule.variance_type:
        case "fixed_small" | "fixed_small_log":
            deviation = np.sqrt(small)
        case "fixed_large" | "fixed_large_log":
            deviation = np.sqrt(large)
        case "learned_range":
            # Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15, with v from −1 to 1 instead of 0 to 1.
            log_small, log_large = np.log(np.maximum(small, _LEAST_VARIANCE)), np.log(large)
            deviation = np.exp((log_large + log_small) / 4)
            lines[:, Column.S] = (log_large - log_small) / 4
    lines[:, Column.D] = np.where(steps.timesteps > 0, deviation, 0)
    return lines


def dpmpp_2m_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, algorithm 2, midpoint. Ignores eta.

    The first step and the last are of first order. The first has no earlier x0. The last, at the clean end, gives x0.
    """
    alpha_bar, alpha_bar_next = (_above_zero(a) for a in steps.alphas_cumprod(schedule))
    lines = _x0_lines(schedule, alpha_bar, schedule.clips_multistep)
    with np.errstate(divide="ignore"):  # λ = ∞ at the clean end
        lambda_, lambda_next = (np.log(np.sqrt(a)) - np.log(np.sqrt(1 - a)) for a in (alpha_bar, alpha_bar_next))
    h = lambda_next - lambda_
    gain = -np.sqrt(alpha_bar_next) * np.expm1(-h)
    lines[:, Column.A] = np.sqrt((1 - alpha_bar_next) / (1 - alpha_bar))
    lines[:, Column.B] = gain
    second = slice(1, -1)
    r = (lambda_[1:-1] - lambda_[:-2]) / h[second]
    correction = np.zeros(len(h))
    correction[second] = gain[second] / (2 * r)
    lines[:, Column.B] += correction
    lines[:, Column.C] = -correction
    return lines


@dataclass(frozen=True, slots=True)
class Sampler:
    """A named sampler.

    Attributes:
        lines: the lines of a step table.
        steps: the diffusers scheduler's grid for a number of steps.
        through: the grid of listed timesteps.
        takes_eta: whether the sampler uses `eta`.
    """

    lines: Callable[[Schedule, Steps, float], Float64]
    steps: Callable[[Schedule, int], Steps]
    through: Callable[[Schedule, Int64], Steps] = through
    takes_eta: bool = False


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim_lines, ddim_steps, ddim_through, takes_eta=True),
    "ddpm": Sampler(ddpm_lines, ddpm_steps),
    "dpmpp_2m": Sampler(dpmpp_2m_lines, dpmpp_2m_steps),
}


@lru_cache(maxsize=32)
def sample_table(schedule: Schedule, sampler: str, grid: int | tuple[int, ...], eta: float = 0.0) -> StepTable:
    """The table from pure noise to an image.

    Args:
        grid: the number of steps, or the timesteps themselves, strictly falling.

    Raises:
        GridError: if the sampler has no grid of so many different timesteps.
    """
    steps = _steps(schedule, sampler, grid)
    table = StepTable(steps.timesteps, SAMPLERS[sampler].lines(schedule, steps, eta))
    for array in (table.timesteps, table.lines):
        array.flags.writeable = False  # the table is cached and shared
    return table


def _steps(schedule: Schedule, sampler: str, grid: int | tuple[int, ...]) -> Steps:
    if isinstance(grid, tuple):
        return SAMPLERS[sampler].through(schedule, np.array(grid, np.int64))
    try:
        return SAMPLERS[sampler].steps(schedule, grid)
    except GridError as error:
        raise GridError(f"{error}; {_allowed(schedule, sampler, grid)}") from None


def denoise_table(
    schedule: Schedule, sampler: str, timestep: int, num_inference_steps: int, eta: float = 0.0
) -> StepTable:
    """The table from a noisy image at `timestep` to a clean one, at the timesteps floor(t·(N−i)/N + ½).

    With any sampler, one step gives the model's estimate of x_0. No noise is added at the clean end.
    """
    if num_inference_steps == 1:
        return _single_step(schedule, timestep)
    N = num_inference_steps
    timesteps = (2 * timestep * (N - np.arange(N)) + N) // (2 * N)
    steps = through(schedule, timesteps.astype(np.int64))
    lines = SAMPLERS[sampler].lines(schedule, steps, eta)
    lines[-1, Column.D] = 0
    return StepTable(steps.timesteps, lines)


def _single_step(schedule: Schedule, timestep: int) -> StepTable:
    timesteps = np.array([timestep], dtype=np.int64)
    lines = _x0_lines(schedule, schedule.alphas_cumprod[timesteps], schedule.clip_sample)
    lines[:, Column.B] = 1
    return StepTable(timesteps, lines)


def _x0_lines(schedule: Schedule, alpha_bar: Float64, clip: bool) -> Float64:
    """Lines [N, len(Column)] with the columns that map x and the prediction to x0. The other columns are 0."""
    lines = np.zeros((len(alpha_bar), len(Column)))
    match schedule.prediction_type:
        case "epsilon":  # DDPM eq. 15
            divisor = np.sqrt(_above_zero(alpha_bar))
            lines[:, Column.P] = 1 / divisor
            lines[:, Column.Q] = -np.sqrt(1 - alpha_bar) / divisor
        case "v_prediction":  # Salimans & Ho 2022, arXiv:2202.00512, appendix D
            lines[:, Column.P] = np.sqrt(alpha_bar)
            lines[:, Column.Q] = -np.sqrt(1 - alpha_bar)
        case "sample":
            lines[:, Column.Q] = 1
    lines[:, Column.BOUND] = np.inf
    if schedule.thresholding:  # Saharia et al. 2022, arXiv:2205.11487, section 2.3; takes precedence over clip_sample
        lines[:, Column.QUANTILE] = schedule.dynamic_thresholding_ratio
        lines[:, Column.MAXIMUM] = schedule.sample_max_value
    elif clip:
        lines[:, Column.BOUND] = schedule.clip_sample_range
    return lines


def _above_zero(alpha_bar: Float64) -> Float64:
    return np.where(alpha_bar == 0, _ALPHA_BAR_FOR_0, alpha_bar)


def _allowed(schedule: Schedule, sampler: str, refused: int) -> str:
    """The numbers of steps that a sampler allows, in words: its range, and the nearest allowed numbers."""

    def fits(N: int) -> bool:
        try:
            SAMPLERS[sampler].steps(schedule, N)
        except GridError:
            return False
        return True

    T = schedule.num_train_timesteps
    largest = next((N for N in range(T, 0, -1) if fits(N)), 0)
    if refused > largest:
        return f"{sampler} takes 1 to {largest} here"
    below = next((N for N in range(refused - 1, 0, -1) if fits(N)), None)
    above = next(N for N in range(refused + 1, largest + 1) if fits(N))
    return f"{sampler} takes 1 to {largest} here, and nearest to it {' or '.join(str(n) for n in (below, above) if n)}"
