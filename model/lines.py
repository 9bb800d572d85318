"""The lines of samplers: pure functions from a schedule and its noise levels to one line of coefficients each.

A line is one step of the update (model/update.py). x is the image at this timestep, out the network's prediction:

    x0     = bound(p·x + q·out)
    m      = r_x·x + r_0·x0 + r_e·out
    x_next = a·x + b·x0 + c_1·m_1 + c_2·m_2 + c_3·m_3 + d·noise + e·out

m_1 is what was remembered last, m_2 what was remembered before that. A line with r_x = r_0 = r_e = 0 leaves no memory.
With a learned variance the network also predicts v, and the noise has the factor d·exp(s·v). p and q absorb the
prediction type. Lines are computed in float64.

x is in variance-preserving form for all samplers: x/√(1+σ²) for those that diffusers writes in σ. That is what
their scale_model_input gives the network.
"""

from enum import IntEnum

import numpy as np

from model.grids import Steps
from model.schedule import Float64, Schedule, above_zero

# The smallest posterior variance before its logarithm: diffusers' DDPMScheduler.
_LEAST_VARIANCE = 1e-20

# The deviation of images that consistency models count with, Song et al. 2023, arXiv:2303.01469, appendix C.
_SIGMA_DATA = 0.5


class Column(IntEnum):
    """The columns of a line."""

    P = 0
    Q = 1
    A = 2
    B = 3
    D = 4
    E = 5
    S = 6
    BOUND = 7  # x0 is clipped to ±BOUND; inf for no clipping
    C_1 = 8  # those that a pass reads must follow BOUND
    C_2 = 9
    C_3 = 10
    R_X = 11
    R_0 = 12
    R_E = 13
    QUANTILE = 14  # of |x0|, for dynamic thresholding; 0 for none
    MAXIMUM = 15  # of the threshold


C = (Column.C_1, Column.C_2, Column.C_3)
R = (Column.R_X, Column.R_0, Column.R_E)


def ddim_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """DDIM, Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.

    ε is the network's own, not computed again from the clipped x0: diffusers' default.
    """
    lines = ddim_unbounded(schedule, steps.alpha_bar, steps.alpha_bar_next, eta)
    return bounded(lines, schedule, schedule.clip_sample)


def ddim_unbounded(schedule: Schedule, alpha_bar: Float64, alpha_bar_next: Float64, eta: float) -> Float64:
    """DDIM's lines without a bound."""
    lines = x0_lines(schedule, alpha_bar)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * np.sqrt(np.maximum(variance, 0))
    direction = np.sqrt(np.maximum(1 - alpha_bar_next - sigma**2, 0))  # of ε
    lines[:, Column.B] = np.sqrt(alpha_bar_next)
    lines[:, Column.D] = sigma
    lines[:, Column.A], lines[:, Column.E] = noise_of(schedule, alpha_bar, direction)
    return lines


def ddpm_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Ancestral sampling, Ho et al. 2020, arXiv:2006.11239, eq. 7, between any two timesteps. Ignores eta."""
    alpha_bar, alpha_bar_next = steps.alpha_bar, steps.alpha_bar_next
    alpha = alpha_bar / alpha_bar_next  # of the whole step
    lines = bounded(x0_lines(schedule, alpha_bar), schedule, schedule.clip_sample)
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


def euler_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Euler's method, Karras et al. 2022, arXiv:2206.00364, algorithm 2 without churn. Ignores eta.

    In variance-preserving form this is DDIM. The end is an exception: there diffusers takes x/√ᾱ for the image.
    """
    lines = ddim_unbounded(schedule, above_zero(steps.alpha_bar), above_zero(steps.alpha_bar_next), eta=0)
    lines[-1, [Column.A, Column.B, Column.E]] /= np.sqrt(steps.alpha_bar_next[-1])
    return clipped(lines, schedule, schedule.clips_multistep)


def euler_a_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Euler's method with ancestral noise, as in k-diffusion: DDIM with η = 1. Ignores eta."""
    lines = ddim_unbounded(schedule, above_zero(steps.alpha_bar), above_zero(steps.alpha_bar_next), eta=1)
    return clipped(lines, schedule, schedule.clips_multistep)


def lcm_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Multistep consistency sampling of LCM, Luo et al. 2023, arXiv:2310.04378, algorithm 3. Ignores eta.

    The estimate of x_0 gets fresh noise of the next level. The last line, at the clean end, gives the estimate.
    """
    lines = x0_lines(schedule, steps.alpha_bar)
    s = schedule.timestep_scaling * steps.timesteps
    signal, deviation = np.sqrt(steps.alpha_bar_next), np.sqrt(1 - steps.alpha_bar_next)
    lines[:, Column.A] = signal * _SIGMA_DATA**2 / (s**2 + _SIGMA_DATA**2)  # c_skip
    lines[:, Column.B] = signal * s / np.sqrt(s**2 + _SIGMA_DATA**2)  # c_out
    lines[:, Column.D] = deviation
    return bounded(lines, schedule, schedule.clips_multistep)


def tcd_lines(schedule: Schedule, steps: Steps, eta: float) -> Float64:
    """Strategic stochastic sampling of TCD, Zheng et al. 2024, arXiv:2402.19159, algorithm 2, with γ = eta.

    A line goes to s = ⌊(1−γ)t'⌋ without noise, and from there back to t' with noise; the last goes to the end. x0 has
    no bound, as in diffusers.
    """
    end, alpha_bar_next = steps.alpha_bar_next[-1], steps.alpha_bar_next
    s = np.floor(np.float32(1 - eta) * steps.timesteps[1:].astype(np.float32)).astype(np.int64)
    alpha_bar_s = np.append(schedule.alphas_cumprod[s], end) if eta else alpha_bar_next
    share = alpha_bar_next / alpha_bar_s
    lines = ddim_unbounded(schedule, steps.alpha_bar, alpha_bar_s, eta=0)
    lines[:, [Column.A, Column.B, Column.E]] *= np.sqrt(share)[:, None]
    lines[:, Column.D] = np.sqrt(1 - share)
    return lines


def single_line(schedule: Schedule, timestep: int) -> Float64:
    """The one line from an image at a timestep to the estimate of x_0."""
    lines = x0_lines(schedule, schedule.alphas_cumprod[[timestep]])
    lines[:, Column.B] = 1
    return bounded(lines, schedule, schedule.clip_sample)


def x0_lines(schedule: Schedule, alpha_bar: Float64) -> Float64:
    """Lines [N, len(Column)] with the columns that map x and the prediction to x0. The other columns are 0."""
    lines = np.zeros((len(alpha_bar), len(Column)))
    match schedule.prediction_type:
        case "epsilon":  # DDPM eq. 15
            divisor = np.sqrt(above_zero(alpha_bar))
            lines[:, Column.P] = 1 / divisor
            lines[:, Column.Q] = -np.sqrt(1 - alpha_bar) / divisor
        case "v_prediction":  # Salimans & Ho 2022, arXiv:2202.00512, appendix D
            lines[:, Column.P] = np.sqrt(alpha_bar)
            lines[:, Column.Q] = -np.sqrt(1 - alpha_bar)
        case "sample":
            lines[:, Column.Q] = 1
    lines[:, Column.BOUND] = np.inf
    return lines


def noise_of(schedule: Schedule, alpha_bar: Float64, share: Float64) -> tuple[Float64, Float64]:
    """The coefficients of x and of the prediction in share·ε, [N] each."""
    match schedule.prediction_type:
        case "epsilon":
            return np.zeros_like(share), share
        case "v_prediction":  # ε = √ᾱ·v + √(1−ᾱ)·x
            return share * np.sqrt(1 - alpha_bar), share * np.sqrt(alpha_bar)
        case "sample":  # ε = (x − √ᾱ·x0)/√(1−ᾱ)
            return share / np.sqrt(1 - alpha_bar), -share * np.sqrt(alpha_bar / (1 - alpha_bar))


def bounded(lines: Float64, schedule: Schedule, clip: bool) -> Float64:
    """The lines with dynamic thresholding, or else with a clip, as the schedule says."""
    if schedule.thresholding:  # Saharia et al. 2022, arXiv:2205.11487, section 2.3; takes precedence over clip_sample
        lines[:, Column.QUANTILE] = schedule.dynamic_thresholding_ratio
        lines[:, Column.MAXIMUM] = schedule.sample_max_value
        return lines
    return clipped(lines, schedule, clip)


def clipped(lines: Float64, schedule: Schedule, clip: bool) -> Float64:
    if clip:
        lines[:, Column.BOUND] = schedule.clip_sample_range
    return lines
