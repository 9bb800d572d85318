"""Grids: the noise levels that a sampler visits. They equal the diffusers scheduler's, and so do the images."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.schedule import Float64, Schedule, SigmaSchedule

Int64 = NDArray[np.int64]


class GridError(ValueError):
    """There is no such grid. The message says why, and which numbers of steps are possible."""


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """The noise levels before and after each line of a trajectory.

    Attributes:
        timesteps: what the network is told, float64 [lines].
        alpha_bar: ᾱ before each line, float64 [lines].
        alpha_bar_next: ᾱ after each line, float64 [lines].
        listed: ᾱ of the timesteps, float64 [lines]: alpha_bar, but where a line starts at another level than its
            timestep's.
        init: the scale of the noise that the trajectory starts from.
        skipped: how many lines at the beginning are left out.
    """

    timesteps: Float64
    alpha_bar: Float64
    alpha_bar_next: Float64
    listed: Float64
    init: float = 1.0
    skipped: int = 0

    def since(self, line: int) -> "Steps":
        """The steps from a line on."""
        return Steps(
            self.timesteps[line:],
            self.alpha_bar[line:],
            self.alpha_bar_next[line:],
            self.listed[line:],
            self.init,
            self.skipped + line,
        )


def ddim_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """DDIMScheduler's grid: each step goes T // N timesteps down, whatever the next listed timestep."""
    return _strides(schedule, num_inference_steps, _end(schedule, set_alpha_to_one=True))


def ddim_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """DDIM's grid of listed timesteps, which DDIMScheduler does not accept: each step goes to the next of them."""
    return through(schedule, timesteps, _end(schedule, set_alpha_to_one=True))


def ddpm_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """DDPMScheduler's grid: each step goes to the next listed timestep."""
    return through(schedule, _timesteps(schedule, num_inference_steps))


def pndm_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """PNDMScheduler's grid with skip_prk_steps: DDIM's, with the second timestep twice."""
    timesteps = _timesteps(schedule, num_inference_steps)
    twice = timesteps if num_inference_steps == 1 else np.insert(timesteps, 1, timesteps[1])
    return _plms(schedule, twice, schedule.num_train_timesteps // num_inference_steps)


def pndm_rest(schedule: Schedule, steps: Steps, begin: int) -> Steps:
    """The rest of PNDM's list. Again its second line goes back to where its first began.

    Unless that is the timestep that is listed twice, each later line is told a timestep below its own level.
    """
    stride = schedule.num_train_timesteps // max(1, len(steps.timesteps) - 1)
    return replace(_plms(schedule, steps.timesteps[begin:].astype(np.int64), stride), skipped=begin)


def _plms(schedule: Schedule, timesteps: Int64, stride: int) -> Steps:
    """Each line goes a stride down from its timestep, and only the second comes to its timestep from a stride above.

    With linspace and trailing, that is not always the first timestep. PNDMScheduler does not have the field
    rescale_betas_zero_snr, so the levels are those without it.
    """
    schedule = schedule.without("rescale_betas_zero_snr")
    steps = _to(schedule, timesteps, timesteps - stride, _end(schedule, set_alpha_to_one=False))
    return steps if len(timesteps) == 1 else _going_back(schedule, steps, int(timesteps[1]) + stride)


def _going_back(schedule: Schedule, steps: Steps, start: int) -> Steps:
    """The steps with a second line that leads from another timestep to its own."""
    T, second = schedule.num_train_timesteps, 1
    if start >= T:
        raise GridError(f"{len(steps.timesteps) - 1} steps do not fit the timesteps 0 to {T - 1}")
    alpha_bar, alpha_bar_next = steps.alpha_bar.copy(), steps.alpha_bar_next.copy()
    alpha_bar[second], alpha_bar_next[second] = schedule.alphas_cumprod[start], steps.listed[second]
    return replace(steps, alpha_bar=alpha_bar, alpha_bar_next=alpha_bar_next)


def pndm_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """PNDM's grid of listed timesteps: each step goes to the next one, and the second line starts at the first."""
    if len(timesteps) == 1:
        return through(schedule, timesteps)
    steps = _to(schedule, np.insert(timesteps, 1, timesteps[1]), np.append(timesteps[1:2], [*timesteps[1:], -1]), 1.0)
    return _going_back(schedule, steps, int(timesteps[0]))


def lcm_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """LCMScheduler's grid: N of the timesteps that the teacher took, about evenly spaced, from the noisiest one on."""
    return _taught(schedule, num_inference_steps, schedule.original_inference_steps)


def lcm_rest(schedule: Schedule, steps: Steps, begin: int) -> Steps:
    """The same number of steps over the rest of the teacher's timesteps: LCMScheduler's grid with a `strength`."""
    return _taught(schedule, len(steps.timesteps), schedule.original_inference_steps - begin)


def lcm_whole(schedule: Schedule, num_inference_steps: int) -> int:
    """How many timesteps the teacher took."""
    return schedule.original_inference_steps


def tcd_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """TCDScheduler's grid: LCM's, but the end is timestep 0."""
    end = float(schedule.alphas_cumprod[0])
    return _taught(schedule, num_inference_steps, schedule.original_inference_steps, end)


def tcd_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """TCDScheduler's grid of listed timesteps."""
    return through(schedule, timesteps, end=float(schedule.alphas_cumprod[0]))


def _taught(schedule: Schedule, N: int, last: int, end: float = 1.0) -> Steps:
    """N of the teacher's last timesteps, about evenly spaced, from the noisiest of these on."""
    T, original = schedule.num_train_timesteps, schedule.original_inference_steps
    if original > T:
        raise GridError(f"original_inference_steps is {original}, more than the timesteps 0 to {T - 1}")
    if last < N:
        left = f", of which {last} are left" if last < original else ""
        raise GridError(f"{N} steps are more than original_inference_steps, which is {original}{left}")
    taught = np.arange(last, 0, -1) * (T // original) - 1
    return through(schedule, taught[np.floor(np.linspace(0, last, N, endpoint=False)).astype(np.int64)], end)


def _timesteps(schedule: Schedule, N: int) -> Int64:
    """The timesteps that DDPMScheduler, DDIMScheduler and PNDMScheduler share."""
    T = schedule.num_train_timesteps
    timesteps: Float64
    match schedule.timestep_spacing or "leading":
        case "leading":
            timesteps = (np.arange(float(N)) * (T // N))[::-1] + schedule.steps_offset
        case "trailing":
            timesteps = np.round(np.arange(T, 0, -T / N)) - 1
        case "linspace":
            timesteps = np.linspace(0, T - 1, N).round()[::-1]
    return checked(timesteps, T, N).astype(np.int64)


def checked(timesteps: Float64, T: int, N: int) -> Float64:
    """The timesteps of N steps.

    Raises:
        GridError: unless there are N, between 0 and T − 1, each below the one before.
    """
    if len(timesteps) != N or timesteps[0] >= T or timesteps[-1] < 0:
        raise GridError(f"{N} steps do not fit the timesteps 0 to {T - 1}")
    if (np.diff(timesteps) >= 0).any():
        raise GridError(f"{N} steps would repeat a timestep of 0 to {T - 1}")
    return timesteps


def _strides(schedule: Schedule, N: int, end: float) -> Steps:
    """Each step goes T // N timesteps down."""
    timesteps = _timesteps(schedule, N)
    return _to(schedule, timesteps, timesteps - schedule.num_train_timesteps // N, end)


def through(schedule: Schedule, timesteps: Int64, end: float = 1.0) -> Steps:
    """The grid of listed timesteps: each step goes to the next one, and the last to the end, with ᾱ = `end`."""
    return _to(schedule, timesteps, np.append(timesteps[1:], -1), end)


def _to(schedule: Schedule, timesteps: Int64, next_timesteps: Int64, end: float) -> Steps:
    """The grid from timesteps to others. A negative one is the end, with ᾱ = `end`."""
    alphas = schedule.alphas_cumprod
    after = np.where(next_timesteps < 0, end, alphas[np.maximum(next_timesteps, 0)])
    return Steps(timesteps.astype(float), alphas[timesteps], after, alphas[timesteps])


def _end(schedule: Schedule, set_alpha_to_one: bool) -> float:
    """ᾱ at the end.

    Args:
        set_alpha_to_one: the sampler's default.
    """
    to_one = set_alpha_to_one if schedule.set_alpha_to_one is None else schedule.set_alpha_to_one
    return 1.0 if to_one else float(schedule.alphas_cumprod[0])
