"""σ: how the noise levels of a trajectory fall, and which timesteps they have."""

import numpy as np

from model.schedule import Float64, Schedule, SigmaSchedule

_RHO = 7  # Karras et al. 2022, arXiv:2206.00364, section 3.2


def spread(
    schedule: Schedule, sigma_schedule: SigmaSchedule, highest: float, lowest: float, N: int
) -> tuple[Float64, Float64]:
    """N levels that fall from the highest to the lowest, and their timesteps, which are fractions, [N] each.

    `normal` is k-diffusion's get_sigmas, which AUTOMATIC1111 calls Normal and Uniform: evenly spaced timesteps, and
    between those of the schedule log σ is linear. diffusers has no option for it: its spacing linspace is the same
    for the timesteps of Euler's method, but takes σ itself as linear.

    Args:
        highest, lowest: σ; the schedule's sigma_max and sigma_min take precedence.
    """
    highest, lowest = schedule.sigma_max or highest, schedule.sigma_min or lowest
    match sigma_schedule:
        case "karras":
            ramp = np.linspace(0, 1, N)
            levels = (highest ** (1 / _RHO) + ramp * (lowest ** (1 / _RHO) - highest ** (1 / _RHO))) ** _RHO
        case "exponential":
            levels = log_linear(highest, lowest, N)
        case "normal":
            first, last = timesteps_of(schedule, np.array([highest, lowest]))
            timesteps = np.linspace(first, last, N)
            return np.exp(np.interp(timesteps, np.arange(len(schedule.sigmas)), np.log(schedule.sigmas))), timesteps
    return levels, timesteps_of(schedule, levels)


def log_linear(highest: float, lowest: float, N: int) -> Float64:
    """N levels from the highest to the lowest, evenly spaced in log σ, [N]."""
    levels: Float64 = np.exp(np.linspace(np.log(highest), np.log(lowest), N))
    return levels


def interpolated(schedule: Schedule, timesteps: Float64) -> Float64:
    """σ at timesteps, linear between those of the schedule, [N]."""
    levels: Float64 = np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas)
    return levels


def timesteps_of(schedule: Schedule, levels: Float64) -> Float64:
    """The timesteps of levels, between those of the schedule: linear in log σ, as float32, [N]."""
    timesteps = _timesteps(np.log(schedule.sigmas), np.log(levels))
    return timesteps.astype(np.float32).astype(float)


def truncated_timesteps_of(schedule: Schedule, levels: Float64) -> Float64:
    """The whole timesteps below, as diffusers' solvers truncate them, [N].

    That of the schedule's noisiest level is the last or the last but one: this hangs on how float32 rounds its log.
    """
    known, levels = schedule.sigmas.astype(np.float32), levels.astype(np.float32).astype(float)
    return np.trunc(_timesteps(np.log(known).astype(float), np.log(levels)))


def _timesteps(known: Float64, asked: Float64) -> Float64:
    below = (np.searchsorted(known, asked, side="right") - 1).clip(0, len(known) - 2)
    share = ((known[below] - asked) / (known[below] - known[below + 1])).clip(0, 1)
    timesteps: Float64 = (1 - share) * below + share * (below + 1)
    return timesteps
