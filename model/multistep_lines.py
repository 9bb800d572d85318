"""The lines of samplers that remember: solvers over several steps, and Heun's method with two evaluations a step."""

from typing import NamedTuple

import numpy as np

from model.grids import Steps
from model.lines import C, Column, bounded, clipped, noise_of, x0_lines
from model.schedule import Float64, Schedule, above_zero

# The weights of this line's prediction and of those before it: PNDM's linear multistep method.
_ADAMS_BASHFORTH = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23, -16, 5, 0], [55, -59, 37, -9]])
_ADAMS_BASHFORTH[2:] /= [[12], [24]]

_FEW = 15  # DPMSolverMultistepScheduler's last step is of first order below that number of steps


def pndm_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """PNDM, Liu et al. 2022, arXiv:2202.09778, eq. 9, 12 and 13, with the pseudo linear multistep of PLMS alone.

    The predictions are combined, and the combination is taken for the network's own. The first step takes two lines:
    it goes back, and is taken again with the mean of the predictions at both of its ends. Ignores eta.
    """
    alpha_bar, alpha_bar_next = above_zero(steps.alpha_bar), above_zero(steps.alpha_bar_next)
    scale = np.sqrt(alpha_bar_next / alpha_bar)
    divisor = alpha_bar * np.sqrt(1 - alpha_bar_next) + np.sqrt(alpha_bar * (1 - alpha_bar) * alpha_bar_next)
    of_x, of_out = noise_of(schedule, alpha_bar, (alpha_bar - alpha_bar_next) / divisor)
    of_x += scale

    lines = x0_lines(schedule, above_zero(steps.listed))
    order = np.minimum([0, 0, *range(1, len(lines))][: len(lines)], 3)
    lines[:, Column.A] = of_x
    lines[:, [Column.E, *C]] = of_out[:, None] * _ADAMS_BASHFORTH[order]
    lines[:-1, Column.R_E] = 1
    if len(lines) > 1:
        back = of_x[1] / of_x[0]  # the first line, solved for its x
        lines[1, [Column.A, Column.E, Column.C_1]] = back, of_out[1] / 2, of_out[1] / 2 - back * of_out[0]
        lines[1, Column.R_E] = 0
    return lines


def dpmpp_2m_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, algorithm 2, midpoint or heun. Ignores eta.

    The first step is of first order: there is no earlier x0. So is a last step that gives x0.
    """
    return _dpmpp_2m(schedule, steps, _Spans.of(steps), 1)


def dpmpp_2m_sde_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """SDE-DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, appendix: with noise at each step. Ignores eta."""
    spans = _Spans.of(steps)
    lines = _dpmpp_2m(schedule, steps, spans, 2)
    lines[:, Column.A] *= np.exp(-spans.h)
    lines[:, Column.D] = np.sqrt(1 - spans.alpha_bar_next) * np.sqrt(-np.expm1(-2 * np.maximum(spans.h, 0)))
    return lines


def unipc_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """UniPC-2 with B_2(h), Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2. Ignores eta.

    A line corrects where the line before came to, and predicts from there. The corrected x of the line before is not
    remembered: it is in x, beside the estimates. The first step and the last are of first order.
    """
    spans = _Spans.of(steps)
    h, gain = spans.h, -np.sqrt(spans.alpha_bar_next) * np.expm1(-spans.h)
    second = slice(1, -1)

    # Predictors: a·x + b·x0 + c·m_1, with x corrected.
    a = np.sqrt((1 - spans.alpha_bar_next) / (1 - spans.alpha_bar))
    b, c, r, rho_1 = gain.copy(), np.zeros_like(gain), np.ones_like(gain), np.zeros_like(gain)
    r[second] = -spans.before(second) / h[second]
    c[second] = gain[second] / (2 * r[second])
    b -= c

    # Correctors, of the line before: x + u·x0 + v·m_1 + w·m_2.
    rho_2 = np.full_like(gain, 1 / 2)
    phi_1 = np.expm1(-h[second])
    phi_2 = -phi_1 / h[second] - 1
    phi_3 = -phi_2 / h[second] - 1 / 2
    rho_1[second] = (phi_2 - 2 * phi_3) / phi_1 / (1 - r[second])
    rho_2[second] = phi_2 / phi_1 - rho_1[second]
    u = gain * rho_2
    v = gain * (1 - rho_1 / r - rho_2) - b
    w = gain * rho_1 / r - c

    lines = bounded(x0_lines(schedule, spans.alpha_bar), schedule, schedule.clips_multistep)
    lines[:, Column.A], lines[:, Column.B], lines[:, Column.C_1] = a, b, c
    lines[1:, [Column.B, Column.C_1, Column.C_2]] += a[1:, None] * np.array([u, v, w]).T[:-1]
    lines[:-1, Column.R_0] = lines[1:, Column.C_1] != 0
    return lines


def heun_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Heun's method, Karras et al. 2022, arXiv:2206.00364, algorithm 1 without churn. Ignores eta.

    A step is a line of Euler's method, which remembers its x, and a line that takes the step again with the mean of
    the slopes at both ends. The last step is a line of Euler's method alone. A bound of x0 changes the slopes, too.
    """
    alpha_bar, alpha_bar_next = above_zero(steps.alpha_bar), steps.alpha_bar_next
    lines = x0_lines(schedule, alpha_bar)
    euler, again = lines[::2], lines[1::2]
    start, end = alpha_bar[::2], alpha_bar_next[::2]
    ratio = np.sqrt((1 / end - 1) / (1 / start - 1))  # of σ at the end to σ at the start
    euler[:, Column.A] = np.sqrt((1 - end) / (1 - start))
    euler[:, Column.B] = np.sqrt(end) * (1 - ratio)
    euler[:-1, Column.R_X] = 1
    start, end, half = start[:-1], end[:-1], (1 - 1 / ratio[:-1]) / 2
    again[:, Column.A] = 1 / 2 + half
    again[:, Column.B] = -np.sqrt(end) * half
    again[:, Column.C_1] = np.sqrt(end / start) / 2
    return clipped(lines, schedule, schedule.clips_multistep)


class _Spans(NamedTuple):
    """What the solvers know of steps. ᾱ is above 0, and λ = ½·ln(ᾱ/(1−ᾱ)) is ∞ at the clean end.

    Attributes:
        alpha_bar, alpha_bar_next, lambda_: before and after each line, and λ before, [lines].
        h: by how much λ rises, [lines].
    """

    alpha_bar: Float64
    alpha_bar_next: Float64
    lambda_: Float64
    h: Float64

    @classmethod
    def of(cls, steps: Steps) -> "_Spans":
        alpha_bar, alpha_bar_next = above_zero(steps.alpha_bar), above_zero(steps.alpha_bar_next)
        with np.errstate(divide="ignore"):
            lambda_, lambda_next = (np.log(np.sqrt(a)) - np.log(np.sqrt(1 - a)) for a in (alpha_bar, alpha_bar_next))
        return cls(alpha_bar, alpha_bar_next, lambda_, lambda_next - lambda_)

    def before(self, second: slice) -> Float64:
        """By how much λ rose at the lines before these, which begin with the second."""
        rises: Float64 = np.diff(self.lambda_, prepend=np.nan)[second]
        return rises


def _dpmpp_2m(schedule: Schedule, steps: Steps, spans: _Spans, k: int) -> Float64:
    """The lines that both forms share. Estimates have the factor 1 − exp(−k·h)."""
    lines = bounded(x0_lines(schedule, spans.alpha_bar), schedule, schedule.clips_multistep)
    alpha, h = np.sqrt(spans.alpha_bar_next), spans.h
    gain = -alpha * np.expm1(-k * h)
    lines[:, Column.A] = np.sqrt((1 - spans.alpha_bar_next) / (1 - spans.alpha_bar))
    lines[:, Column.B] = gain
    is_few = len(lines) + steps.skipped < _FEW
    second = slice(1, -1 if is_few or spans.alpha_bar_next[-1] == 1 else None)
    with np.errstate(divide="ignore", invalid="ignore"):  # a last line may stay at its level
        r = spans.before(second) / h[second]
        of_slope = (
            gain[second] / 2 if schedule.solver_type == "midpoint" else alpha[second] - gain[second] / (k * h[second])
        )
        correction = np.where(h[second] == 0, 0, of_slope / r)
    lines[second, Column.B] += correction
    lines[second, Column.C_1] = -correction
    lines[:-1, Column.R_0] = lines[1:, Column.C_1] != 0
    return lines
