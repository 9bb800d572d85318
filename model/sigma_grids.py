"""Grids of samplers that count in σ: those of the fast solvers, and Euler's and Heun's."""

from dataclasses import replace

import numpy as np

from model.grids import GridError, Int64, Steps, checked, through
from model.schedule import Float64, Schedule, SigmaSchedule, above_zero
from model.sigmas import interpolated, log_linear, spread, truncated_timesteps_of

# DPM-Solver++ and UniPC.


def dpmpp_2m_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """DPMSolverMultistepScheduler's grid.

    The levels of a sigma schedule lie between the schedule's own extremes. Karras' and exponential levels have whole
    timesteps, which may repeat.
    """
    if sigmas is None:
        return _solver_steps(schedule, num_inference_steps)
    levels, timesteps = _over_all(schedule, sigmas, num_inference_steps)
    if sigmas != "normal":
        rounds = sigmas == "karras" and schedule.beta_schedule != "squaredcos_cap_v2"
        timesteps = timesteps.round() if rounds else truncated_timesteps_of(schedule, levels)
    return _levels(timesteps, _falling(np.append(levels, _last_sigma(schedule)), num_inference_steps))


def dpmpp_2m_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """DPMSolverMultistepScheduler's grid of listed timesteps: each step goes to the next one.

    Raises:
        GridError: if the levels have timesteps of their own.
    """
    _check_list(schedule)
    return _solver_through(schedule, timesteps)


def unipc_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """UniPCMultistepScheduler's grid: DPM-Solver++'s, but for roundings and for the end of a sigma schedule."""
    if sigmas is None:
        return _solver_steps(schedule, num_inference_steps)
    levels, timesteps = _over_all(schedule, sigmas, num_inference_steps)
    if sigmas != "normal":
        timesteps = timesteps.round() if sigmas == "karras" else truncated_timesteps_of(schedule, levels)
    end = levels[-1] if schedule.final_sigmas_type == "sigma_min" else 0.0
    return _levels(timesteps, _falling(np.append(levels, end), num_inference_steps))


def _solver_steps(schedule: Schedule, N: int) -> Steps:
    """Leading and linspace leave out the last of N + 1 timesteps."""
    T = schedule.num_train_timesteps
    timesteps: Float64
    match schedule.timestep_spacing or "linspace":
        case "linspace":
            timesteps = np.linspace(0, T - 1, N + 1).round()[::-1][:-1]
        case "leading":
            timesteps = (np.arange(N + 1.0) * (T // (N + 1)))[::-1][:-1] + schedule.steps_offset
        case "trailing":
            timesteps = np.arange(T, 0, -T / N).round() - 1
    return _solver_through(schedule, checked(timesteps, T, N).astype(np.int64))


def _solver_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """Each step goes to the next timestep. The solvers divide by ᾱ."""
    end = float(schedule.alphas_cumprod[0]) if schedule.final_sigmas_type == "sigma_min" else 1.0
    steps = through(schedule, timesteps, end)
    return replace(steps, alpha_bar=above_zero(steps.alpha_bar), listed=above_zero(steps.listed))


# Euler and Heun.


def euler_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """EulerDiscreteScheduler's grid. The timesteps of linspace and of a sigma schedule are fractions."""
    levels, timesteps = _euler_levels(schedule, num_inference_steps, sigmas)
    levels = _falling(np.append(levels, _last_sigma(schedule)), len(timesteps))
    return _scaled(schedule, _levels(timesteps, levels))


def euler_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """EulerDiscreteScheduler's grid of listed timesteps.

    Raises:
        GridError: if the levels have timesteps of their own.
    """
    _check_list(schedule)
    sigmas = np.append(_sigmas_at(schedule, timesteps.astype(float)), _last_sigma(schedule))
    return _scaled(schedule, _levels(timesteps.astype(float), _falling(sigmas, len(timesteps))))


def euler_a_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """EulerAncestralDiscreteScheduler's grid: Euler's, without other levels than those of the timesteps."""
    timesteps = _euler_timesteps(schedule, num_inference_steps)
    levels = np.append(interpolated(schedule, timesteps), 0.0)
    return _scaled(schedule, _levels(timesteps, _falling(levels, len(timesteps))))


def heun_steps(schedule: Schedule, num_inference_steps: int, sigmas: SigmaSchedule | None) -> Steps:
    """HeunDiscreteScheduler's grid: Euler's, with two lines for each step but the last."""
    return _corrected(euler_steps(_of_heun(schedule), num_inference_steps, sigmas))


def heun_through(schedule: Schedule, timesteps: Int64) -> Steps:
    """HeunDiscreteScheduler's grid of listed timesteps.

    Raises:
        GridError: if the levels have timesteps of their own.
    """
    return _corrected(euler_through(_of_heun(schedule), timesteps))


def heun_walk(schedule: Schedule, timesteps: Int64) -> Steps:
    """Heun's grid from a noisy image to a clean one."""
    return _corrected(_solver_through(_of_heun(schedule), timesteps))


def _of_heun(schedule: Schedule) -> Schedule:
    """The schedule without the fields that EulerDiscreteScheduler has, and HeunDiscreteScheduler has not."""
    return schedule.without("rescale_betas_zero_snr", "final_sigmas_type", "interpolation_type")


def _corrected(steps: Steps) -> Steps:
    """The steps with a second line for each but the last: where the step ends, the network is asked again."""
    step = np.repeat(np.arange(len(steps.timesteps)), 2)
    before, after = step[1:], step[2:]
    return Steps(
        steps.timesteps[before],
        steps.alpha_bar[before],
        np.append(steps.alpha_bar[after], steps.alpha_bar_next[-1]),
        steps.alpha_bar[before],
        steps.init,
    )


def _euler_levels(schedule: Schedule, N: int, sigmas: SigmaSchedule | None) -> tuple[Float64, Float64]:
    """Levels and timesteps. Those of Karras and exponential ones lie between the first and the last of the spacing."""
    if sigmas == "normal":
        return _over_all(schedule, sigmas, N)
    timesteps = _euler_timesteps(schedule, N)
    levels = _sigmas_at(schedule, timesteps)
    return (levels, timesteps) if sigmas is None else spread(schedule, sigmas, levels[0], levels[-1], N)


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
    return checked(timesteps, T, N)


def _scaled(schedule: Schedule, steps: Steps) -> Steps:
    """The grid with Euler's first noise: noise alone, or with the spacing leading an image of unit variance."""
    leading = schedule.timestep_spacing == "leading"
    return steps if leading else replace(steps, init=float(np.sqrt(1 - steps.alpha_bar[0])))


# All of them.


def _over_all(schedule: Schedule, sigmas: SigmaSchedule, N: int) -> tuple[Float64, Float64]:
    """Levels and timesteps between the schedule's own extremes."""
    T = schedule.num_train_timesteps
    _check_number(N, T)
    if T == 1:
        raise GridError("levels between the schedule's own need 2 of its timesteps, and there is 1")
    return spread(schedule, sigmas, schedule.sigmas[-1], schedule.sigmas[0], N)


def _check_list(schedule: Schedule) -> None:
    if schedule.sigma_schedule is not None:
        field = f"use_{schedule.sigma_schedule}_sigmas"
        raise GridError(f"must be null: the weights' scheduler has {field}, and so timesteps of its own")


def _check_number(N: int, T: int) -> None:
    if N > T:
        raise GridError(f"{N} steps are more than the timesteps 0 to {T - 1}")


def _sigmas_at(schedule: Schedule, timesteps: Float64) -> Float64:
    """σ at timesteps, [N]. With log_linear, N + 1 levels from the highest to the lowest instead, as in diffusers."""
    if schedule.interpolation_type == "log_linear":
        return log_linear(schedule.sigmas[-1], schedule.sigmas[0], len(timesteps) + 1)
    return interpolated(schedule, timesteps)


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
