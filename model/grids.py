"""Grids: the timesteps that a sampler visits. They equal the diffusers scheduler's, and so do the images."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.schedule import Float64, Schedule

Int64 = NDArray[np.int64]


class GridError(ValueError):
    """No grid has so many different timesteps. The message says which numbers of steps are possible."""


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """The timesteps before and after each step of a trajectory.

    Attributes:
        timesteps: int64 [N].
        next_timesteps: int64 [N]; a negative one is the clean end.
        final_alpha_bar: ᾱ at the clean end.
    """

    timesteps: Int64
    next_timesteps: Int64
    final_alpha_bar: float

    def alphas_cumprod(self, schedule: Schedule) -> tuple[Float64, Float64]:
        """ᾱ before and after each step, [N] each."""
        alphas = schedule.alphas_cumprod
        after = np.where(self.next_timesteps < 0, self.final_alpha_bar, alphas[np.maximum(self.next_timesteps, 0)])
        return alphas[self.timesteps], after


def ddim_steps(schedule: Schedule, num_inference_steps: int) -> Steps:
    """DDIMScheduler's grid: each step goes T // N timesteps down, whatever the next listed timestep."""
    timesteps = _timesteps(schedule, num_inference_steps)
    stride = schedule.num_train_timesteps // num_inference_steps
    return Steps(timesteps, timesteps - stride, _ddim_end(schedule))


def ddim_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """DDIM's grid of listed timesteps, which DDIMScheduler does not accept: each step goes to the next of them."""
    return replace(through(schedule, timesteps), final_alpha_bar=_ddim_end(schedule))


def _ddim_end(schedule: Schedule) -> float:
    return 1.0 if schedule.set_alpha_to_one else float(schedule.alphas_cumprod[0])


def ddpm_steps(schedule: Schedule, num_inference_steps: int) -> Steps:
    """DDPMScheduler's grid: each step goes to the next listed timestep."""
    return through(schedule, _timesteps(schedule, num_inference_steps))


def dpmpp_2m_steps(schedule: Schedule, num_inference_steps: int) -> Steps:
    """DPMSolverMultistepScheduler's grid: leading and linspace leave out the last of N + 1 timesteps."""
    T, N = schedule.num_train_timesteps, num_inference_steps
    timesteps: Float64
    match schedule.timestep_spacing or "linspace":
        case "linspace":
            timesteps = np.linspace(0, T - 1, N + 1).round()[::-1][:-1]
        case "leading":
            timesteps = (np.arange(N + 1.0) * (T // (N + 1)))[::-1][:-1] + schedule.steps_offset
        case "trailing":
            timesteps = np.arange(T, 0, -T / N).round() - 1
    return through(schedule, _checked(timesteps.astype(np.int64), T, N))


def _timesteps(schedule: Schedule, N: int) -> Int64:
    """The timesteps that DDPMScheduler and DDIMScheduler share."""
    T = schedule.num_train_timesteps
    timesteps: Float64
    match schedule.timestep_spacing or "leading":
        case "leading":
            timesteps = (np.arange(float(N)) * (T // N))[::-1] + schedule.steps_offset
        case "trailing":
            timesteps = np.round(np.arange(T, 0, -T / N)) - 1
        case "linspace":
            timesteps = np.linspace(0, T - 1, N).round()[::-1]
    return _checked(timesteps.astype(np.int64), T, N)


def _checked(timesteps: Int64, T: int, N: int) -> Int64:
    if len(timesteps) != N or timesteps[0] >= T or timesteps[-1] < 0:
        raise GridError(f"{N} steps do not fit the timesteps 0 to {T - 1}")
    if (np.diff(timesteps) >= 0).any():
        raise GridError(f"{N} steps would repeat a timestep of 0 to {T - 1}")
    return timesteps


def through(schedule: Schedule, timesteps: Int64) -> Steps:
    """The grid of listed timesteps: each step goes to the next one, and the last to the clean end."""
    return Steps(timesteps, np.append(timesteps[1:], -1), final_alpha_bar=1.0)
