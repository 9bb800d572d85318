"""Grids: the noise levels that a sampler visits. They equal the diffusers scheduler's, and so do the images."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.schedule import Float64, Schedule, SigmaSchedule

Int64 = NDArray[np.int64]

_RHO = 7  # Karras et al. 2022, arXiv:2206.00364, section 3.2


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
        """The steps without the first lines."""
        return Steps(
            self.timesteps[line:],
            self.alpha_bar[line:],
            self.alpha_bar_next[line:],
            self.listed[line:],
            self.init,
            self.skipped + line,
        )


def since(schedule: Schedule, steps: Steps, begin: int) -> Steps:
    """The grid of all steps without the first `begin`, as the pipelines that start from an image take it."""
    return steps.since(begin)


def ddim_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """DDIMScheduler's grid: each step goes T // N timesteps down, whatever the next listed timestep."""
    return _strides(schedule, num_inference_steps, _end(schedule, set_alpha_to_one=True))


def ddim_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """DDIM's grid of listed timesteps, which DDIMScheduler does not accept: each step goes to the next of them."""
    return _to(schedule, timesteps, np.append(timesteps[1:], -1), _end(schedule, set_alpha_to_one=True))


def ddpm_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """DDPMScheduler's grid: each step goes to the next listed timestep."""
    return through(schedule, _timesteps(schedule, num_inference_steps))


def dpmpp_2m_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """DPMSolverMultistepScheduler's grid: leading and linspace leave out the last of N + 1 timesteps.

    Karras' levels lie between the schedule's own extremes. Their timesteps are whole numbers, and may repeat.
    """
    T, N = schedule.num_train_timesteps, num_inference_steps
    timesteps: Float64
    if sigmas is not None:
        _check_number(N, T)
        levels = _between(schedule, sigmas, schedule.sigmas[-1], schedule.sigmas[0], N)
        timesteps = _timesteps_of(schedule, levels)
        timesteps = np.trunc(timesteps) if schedule.beta_schedule == "squaredcos_cap_v2" else timesteps.round()
        return _levels(timesteps, _falling(np.append(levels, 0.0), N))
    match schedule.timestep_spacing or "linspace":
        case "linspace":
            timesteps = np.linspace(0, T - 1, N + 1).round()[::-1][:-1]
        case "leading":
            timesteps = (np.arange(N + 1.0) * (T // (N + 1)))[::-1][:-1] + schedule.steps_offset
        case "trailing":
            timesteps = np.arange(T, 0, -T / N).round() - 1
    return through(schedule, _checked(timesteps, T, N).astype(np.int64))


def dpmpp_2m_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """DPMSolverMultistepScheduler's grid of listed timesteps: each step goes to the next one.

    Raises:
        GridError: if the levels have timesteps of their own.
    """
    _check_list(schedule, "use_karras_sigmas")
    return through(schedule, timesteps)


def pndm_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """PNDMScheduler's grid with skip_prk_steps: DDIM's, with the second timestep twice."""
    timesteps = _timesteps(schedule, num_inference_steps)
    twice = timesteps if num_inference_steps == 1 else np.insert(timesteps, 1, timesteps[1])
    return _plms(schedule, twice, schedule.num_train_timesteps // num_inference_steps)


def pndm_since(schedule: Schedule, steps: Steps, begin: int) -> Steps:
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
    schedule = schedule.with_fields(rescale_betas_zero_snr=False)
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


def euler_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """EulerDiscreteScheduler's grid. The timesteps of linspace, of Karras' and of exponential levels are fractions."""
    timesteps = _euler_timesteps(schedule, num_inference_steps)
    levels = _sigmas_at(schedule, timesteps)
    if sigmas is not None:
        levels = _between(schedule, sigmas, levels[0], levels[-1], num_inference_steps)
        timesteps = _timesteps_of(schedule, levels)
    levels = _falling(np.append(levels, _last_sigma(schedule)), len(timesteps))
    return _scaled(schedule, _levels(timesteps, levels))


def euler_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """EulerDiscreteScheduler's grid of listed timesteps.

    Raises:
        GridError: if the levels have timesteps of their own.
    """
    _check_list(schedule, "use_karras_sigmas", "use_exponential_sigmas")
    sigmas = np.append(_sigmas_at(schedule, timesteps.astype(float)), _last_sigma(schedule))
    return _scaled(schedule, _levels(timesteps.astype(float), _falling(sigmas, len(timesteps))))


def euler_a_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """EulerAncestralDiscreteScheduler's grid: Euler's, without other levels than those of the timesteps."""
    timesteps = _euler_timesteps(schedule, num_inference_steps)
    levels = np.interp(timesteps, np.arange(len(schedule.sigmas)), schedule.sigmas)
    return _scaled(schedule, _levels(timesteps, _falling(np.append(levels, 0.0), len(timesteps))))


def lcm_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """LCMScheduler's grid: N of the timesteps that the teacher took, about evenly spaced, from the noisiest one on."""
    return _taught(schedule, num_inference_steps, schedule.original_inference_steps)


def lcm_since(schedule: Schedule, steps: Steps, begin: int) -> Steps:
    """The same number of steps over the rest of the teacher's timesteps: LCMScheduler's grid with a `strength`."""
    return _taught(schedule, len(steps.timesteps), schedule.original_inference_steps - begin)


def lcm_whole(schedule: Schedule, num_inference_steps: int) -> int:
    """How many timesteps the teacher took."""
    return schedule.original_inference_steps


def _taught(schedule: Schedule, N: int, last: int) -> Steps:
    """N of the teacher's last timesteps, about evenly spaced, from the noisiest of these on."""
    T, original = schedule.num_train_timesteps, schedule.original_inference_steps
    if original > T:
        raise GridError(f"original_inference_steps is {original}, more than the timesteps 0 to {T - 1}")
    if last < N:
        left = f", of which {last} are left" if last < original else ""
        raise GridError(f"{N} steps are more than original_inference_steps, which is {original}{left}")
    taught = np.arange(last, 0, -1) * (T // original) - 1
    return through(schedule, taught[np.floor(np.linspace(0, last, N, endpoint=False)).astype(np.int64)])


def _euler_timesteps(schedule: Schedule, N: int) -> Float64:
    T = schedule.num_train_timesteps
    timesteps: Float64
    match schedule.timestep_spacing or "linspace":
        case "linspace":
            if N == 1:
                raise GridError("1 step of the spacing linspace would be at timestep 0, and leave all of the noise")
            timesteps = np.linspace(0, T - 1, N, dtype=np.float32)[::-1].astype(float)
        case "leading":
            timesteps = (np.arange(float(N)) * (T // N))[::-1] + schedule.steps_offset
        case "trailing":
            timesteps = np.arange(T, 0, -T / N).round() - 1
    _check_number(N, T)
    return _checked(timesteps, T, N)


def _scaled(schedule: Schedule, steps: Steps) -> Steps:
    """The grid with Euler's first noise: noise alone, or with the spacing leading an image of unit variance."""
    leading = schedule.timestep_spacing == "leading"
    return steps if leading else replace(steps, init=float(np.sqrt(1 - steps.alpha_bar[0])))


def _check_list(schedule: Schedule, *fields: str) -> None:
    for field in fields:
        if getattr(schedule, field):
            raise GridError(f"must be null: the weights' scheduler has {field}, and so timesteps of its own")


def _check_number(N: int, T: int) -> None:
    if N > T:
        raise GridError(f"{N} steps are more than the timesteps 0 to {T - 1}")


def _sigmas_at(schedule: Schedule, timesteps: Float64) -> Float64:
    """σ at timesteps, [N]. With log_linear, N + 1 levels from the highest to the lowest instead, as in diffusers."""
    sigmas = schedule.sigmas
    if schedule.interpolation_type == "log_linear":
        return _log_linear(sigmas[-1], sigmas[0], len(timesteps) + 1)
    between: Float64 = np.interp(timesteps, np.arange(len(sigmas)), sigmas)
    return between


def _between(schedule: Schedule, sigmas: SigmaSchedule, highest: float, lowest: float, N: int) -> Float64:
    """N levels that fall as asked, [N]."""
    highest = schedule.sigma_max or highest
    lowest = schedule.sigma_min or lowest
    if sigmas == "exponential":
        return _log_linear(highest, lowest, N)
    ramp = np.linspace(0, 1, N)
    levels: Float64 = (highest ** (1 / _RHO) + ramp * (lowest ** (1 / _RHO) - highest ** (1 / _RHO))) ** _RHO
    return levels


def _log_linear(highest: float, lowest: float, N: int) -> Float64:
    levels: Float64 = np.exp(np.linspace(np.log(highest), np.log(lowest), N))
    return levels


def _timesteps_of(schedule: Schedule, sigmas: Float64) -> Float64:
    """The timesteps of levels, between those of the schedule: linear in log σ, as float32."""
    known, asked = np.log(schedule.sigmas), np.log(sigmas)
    below = np.where(known[:, None] <= asked, np.arange(len(known))[:, None], 0).max(axis=0).clip(max=len(known) - 2)
    share = ((known[below] - asked) / (known[below] - known[below + 1])).clip(0, 1)
    timesteps: Float64 = (1 - share) * below + share * (below + 1)
    return timesteps.astype(np.float32).astype(float)


def _last_sigma(schedule: Schedule) -> float:
    return float(schedule.sigmas[0]) if schedule.final_sigmas_type == "sigma_min" else 0.0


def _falling(sigmas: Float64, N: int) -> Float64:
    """σ of N lines and of the end. The last line may stay at its level.

    Raises:
        GridError: if another does.
    """
    if (np.diff(sigmas[:N]) >= 0).any():
        raise GridError(f"{N} steps would not lower the noise at each step")
    return sigmas


def _levels(timesteps: Float64, sigmas: Float64) -> Steps:
    """The grid of N timesteps with these σ, of which the first N + 1 count."""
    alpha_bar = 1 / (1 + sigmas[: len(timesteps) + 1] ** 2)
    return Steps(timesteps, alpha_bar[:-1], alpha_bar[1:], alpha_bar[:-1])


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
    return _checked(timesteps, T, N).astype(np.int64)


def _checked(timesteps: Float64, T: int, N: int) -> Float64:
    if len(timesteps) != N or timesteps[0] >= T or timesteps[-1] < 0:
        raise GridError(f"{N} steps do not fit the timesteps 0 to {T - 1}")
    if (np.diff(timesteps) >= 0).any():
        raise GridError(f"{N} steps would repeat a timestep of 0 to {T - 1}")
    return timesteps


def _strides(schedule: Schedule, N: int, end: float) -> Steps:
    """Each step goes T // N timesteps down."""
    timesteps = _timesteps(schedule, N)
    return _to(schedule, timesteps, timesteps - schedule.num_train_timesteps // N, end)


def through(schedule: Schedule, timesteps: Int64) -> Steps:
    """The grid of listed timesteps: each step goes to the next one, and the last to the clean end."""
    return _to(schedule, timesteps, np.append(timesteps[1:], -1), end=1.0)


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
