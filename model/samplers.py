"""Samplers as tables: a pure function from a schedule and a grid to one line of coefficients a forward evaluation.

model/lines.py has the lines. A new sampler is a new function there and an entry here; the update stays the same.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from model.grids import (
    GridError,
    Int64,
    Steps,
    ddim_steps,
    ddim_through,
    ddpm_steps,
    lcm_rest,
    lcm_steps,
    lcm_whole,
    pndm_rest,
    pndm_steps,
    pndm_through,
    tcd_steps,
    tcd_through,
    through,
)
from model.lines import (
    C,
    Column,
    R,
    ddim_lines,
    ddpm_lines,
    euler_a_lines,
    euler_lines,
    lcm_lines,
    single_line,
    tcd_lines,
)
from model.multistep_lines import dpmpp_2m_lines, dpmpp_2m_sde_lines, heun_lines, pndm_lines, unipc_lines
from model.schedule import Float64, Schedule, SigmaSchedule
from model.sigma_grids import (
    dpmpp_2m_steps,
    dpmpp_2m_through,
    euler_a_steps,
    euler_steps,
    euler_through,
    heun_steps,
    heun_through,
    heun_walk,
    unipc_steps,
)


class Kept(IntEnum):
    """Where a row's memories are between two lines."""

    NOWHERE = 0  # the line reads and leaves none
    AS_X0 = 1  # the only memory is x0 of the line before, which is kept anyway
    IN_RING = 2


class Step(NamedTuple):
    """A line of a table, as a runner reads it.

    Attributes:
        timestep: the network's input.
        line: the coefficients, float32 [len(Column)].
        is_noisy: whether noise is added.
        is_thresholded: whether a quantile bounds x0.
        remembered: how many memories there are before this line.
        reads: how many of the last memories the line reads.
        remembers: whether the line leaves a memory.
        kept: where a runner has what the line reads and leaves: one of Kept.
    """

    timestep: float
    line: NDArray[np.float32]
    is_noisy: bool
    is_thresholded: bool
    remembered: int
    reads: int
    remembers: bool
    kept: int


@dataclass(frozen=True, eq=False)
class StepTable:
    """The lines of one trajectory, one for each forward evaluation. Rows share a table, so its arrays are read-only.

    Attributes:
        timesteps: the network's input at each line, float64 [lines]. It may be a fraction, and it may
            repeat.
        lines: coefficients, float64 [lines, len(Column)].
        init: the scale of the noise that a trajectory from pure noise starts from.
        levels: √ᾱ and √(1−ᾱ) of x before each line, and 1 and 0 after the last, float64 [lines + 1, 2]: what diffusers'
            add_noise gives an image and its noise at a listed timestep. Empty, [0, 2], if nobody adds noise.
    """

    timesteps: Float64
    lines: Float64
    init: float = 1.0
    levels: Float64 = field(default_factory=lambda: np.empty((0, 2)))

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def steps(self) -> list[Step]:
        """The lines, as a runner reads them."""
        values = self.lines.astype(np.float32)
        noisy, thresholded = (values[:, column] != 0 for column in (Column.D, Column.QUANTILE))
        reads = ((values[:, C] != 0) * np.arange(1, len(C) + 1)).max(axis=1, initial=0)
        remembers = (values[:, R] != 0).any(axis=1)
        before = np.cumsum(remembers) - remembers
        left_x0 = np.append(False, (values[:-1, R] == (0, 1, 0)).all(axis=1))[: len(self)]  # by the line before
        if ((reads == 0) | ((reads == 1) & left_x0)).all():
            kept = np.where(reads, Kept.AS_X0, Kept.NOWHERE)
        else:
            kept = np.where(reads + remembers, Kept.IN_RING, Kept.NOWHERE)
        columns = (noisy, thresholded, before, reads, remembers, kept)
        return list(map(Step, self.timesteps.tolist(), values, *(column.tolist() for column in columns)))

    def first(self, lines: int = 1) -> "StepTable":
        """A table of the first line alone, or of the first lines."""
        return StepTable(self.timesteps[:lines], self.lines[:lines], self.init, self.levels[: lines + 1])


@dataclass(frozen=True, slots=True)
class Sampler:
    """A named sampler.

    Attributes:
        lines: the lines of a step table.
        steps: the diffusers scheduler's grid for a number of steps.
        order: how many lines a step takes at most: diffusers' `order`.
        rest: the grid for a number of steps without the first of them; None if that is a slice of the whole grid.
        whole: of how many `rest` leaves out the first.
        walk: the grid of timesteps from a noisy image to a clean one.
        through: the grid of timesteps that a request lists; None if it may list none.
        takes_eta: whether the sampler uses `eta`.
        sigma_schedules: those that a request may ask for.
        fixed: fields of the diffusers scheduler's config that we follow at these values alone. None is an absent field.
    """

    lines: Callable[[Schedule, Steps, float], Float64]
    steps: Callable[[Schedule, int, SigmaSchedule | None], Steps]
    order: int = 1
    rest: Callable[[Schedule, Steps, int], Steps] | None = None
    whole: Callable[[Schedule, int], int] = lambda schedule, num_inference_steps: num_inference_steps
    walk: Callable[[Schedule, Int64], Steps] = through
    through: Callable[[Schedule, Int64], Steps] | None = through
    takes_eta: bool = False
    sigma_schedules: tuple[SigmaSchedule, ...] = ()
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


_ALL = get_args(SigmaSchedule)
_NO_BETA = {"use_beta_sigmas": (False, None)}
_SOLVERS = {**_NO_BETA, "solver_order": (2, None), "lower_order_final": (True, None)}
_DPMPP = {**_SOLVERS, "euler_at_final": (False, None), "use_lu_lambdas": (False, None), "lambda_min_clipped": (None,)}

SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(ddim_lines, ddim_steps, through=ddim_through, takes_eta=True),
    "ddpm": Sampler(ddpm_lines, ddpm_steps),
    "dpmpp_2m": Sampler(
        dpmpp_2m_lines,
        dpmpp_2m_steps,
        through=dpmpp_2m_through,
        sigma_schedules=_ALL,
        fixed={"algorithm_type": ("dpmsolver++", "deis", None), **_DPMPP},
    ),
    "dpmpp_2m_sde": Sampler(
        dpmpp_2m_sde_lines,
        dpmpp_2m_steps,
        through=dpmpp_2m_through,
        sigma_schedules=_ALL,
        fixed={"algorithm_type": ("sde-dpmsolver++",), **_DPMPP},
    ),
    "euler": Sampler(euler_lines, euler_steps, through=euler_through, sigma_schedules=_ALL, fixed=_NO_BETA),
    "euler_a": Sampler(euler_a_lines, euler_a_steps, through=None),
    "heun": Sampler(
        heun_lines,
        heun_steps,
        order=2,
        walk=heun_walk,
        through=heun_through,
        sigma_schedules=_ALL,
        fixed=_NO_BETA,
    ),
    "pndm": Sampler(
        pndm_lines, pndm_steps, rest=pndm_rest, walk=pndm_through, through=None, fixed={"skip_prk_steps": (True,)}
    ),
    "unipc": Sampler(
        unipc_lines,
        unipc_steps,
        through=None,
        sigma_schedules=_ALL,
        fixed={
            **_SOLVERS,
            "predict_x0": (True, None),
            "solver_type": ("bh2", "midpoint", "heun", "logrho", None),
            "disable_corrector": ([], None),
            "solver_p": (None,),
        },
    ),
    "lcm": Sampler(lcm_lines, lcm_steps, rest=lcm_rest, whole=lcm_whole),
    "tcd": Sampler(tcd_lines, tcd_steps, through=tcd_through, takes_eta=True),
}


def departures(sampler: str, schedule: Schedule, config: Mapping[str, object]) -> list[str]:
    """The fields of a scheduler_config.json by which diffusers draws otherwise than we do.

    Args:
        schedule: that of the config.
        config: of the diffusers scheduler that `sampler` stands for.
    """
    clip, highest = config.get("lambda_min_clipped"), float(schedule.sigmas[-1])
    without_effect = set()
    if isinstance(clip, int | float) and highest > 0 and clip <= -math.log(highest):
        without_effect.add("lambda_min_clipped")  # below all levels, so nothing is clipped
    if sampler != "unipc" and schedule.final_sigmas_type == "zero":
        without_effect |= {"lower_order_final", "euler_at_final"}  # the last step is of first order anyway
    fixed = SAMPLERS[sampler].fixed.items()
    return [name for name, values in fixed if name not in without_effect and config.get(name) not in values]


@lru_cache(maxsize=32)
def sample_table(
    schedule: Schedule,
    sampler: str,
    grid: int | tuple[int, ...],
    eta: float = 0.0,
    sigma_schedule: SigmaSchedule | None = None,
    begin: int = 0,
) -> StepTable:
    """The table from pure noise, or from a noisy image, to an image.

    Args:
        grid: the number of steps, or the timesteps themselves, strictly falling.
        sigma_schedule: how the noise falls; None as the schedule says. One of the sampler's own sigma_schedules.
        begin: how many of the steps at the beginning are left out: diffusers' t_start. A multistep sampler starts
            at first order there, so this is no slice of the whole table. A number of steps of `lcm` stays whole: it
            counts those of its teacher (original_inference_steps) that are left out. See `left_out`.

    Raises:
        GridError: if the sampler has no such grid.
    """
    steps = sample_steps(schedule, sampler, grid, sigma_schedule, begin)
    table = _table(steps, SAMPLERS[sampler].lines(schedule, steps, eta))
    for array in (table.timesteps, table.lines, table.levels):
        array.flags.writeable = False  # the table is cached and shared
    return table


def left_out(schedule: Schedule, sampler: str, grid: int | tuple[int, ...], strength: float) -> int:
    """The `begin` of sample_table for the last `strength` of the steps, as the pipelines round it.

    It is the number of all steps if the strength leaves none.
    """
    whole = len(grid) if isinstance(grid, tuple) else SAMPLERS[sampler].whole(schedule, grid)
    return whole - min(int(whole * strength), whole)


def _table(steps: Steps, lines: Float64) -> StepTable:
    levels = np.append(np.sqrt([steps.listed, 1 - steps.listed]).T, [[1.0, 0.0]], axis=0)
    return StepTable(steps.timesteps, lines, steps.init, levels)


def sample_steps(
    schedule: Schedule,
    sampler: str,
    grid: int | tuple[int, ...],
    sigma_schedule: SigmaSchedule | None = None,
    begin: int = 0,
) -> Steps:
    """The grid of a `sample_table`.

    Raises:
        GridError: if the sampler has no such grid.
    """
    if isinstance(grid, tuple):
        if sigma_schedule is not None:
            raise GridError(f"must be null with sigma_schedule={sigma_schedule}, which has timesteps of its own")
        through = SAMPLERS[sampler].through
        if through is None:
            able = ", ".join(name for name, other in SAMPLERS.items() if other.through is not None)
            raise GridError(f"must be null with {sampler}; a list is for {able}")
        return through(schedule, np.array(grid, np.int64)).since(begin * SAMPLERS[sampler].order)
    own = schedule.sigma_schedule
    sigmas = sigma_schedule or (own if own in SAMPLERS[sampler].sigma_schedules else None)
    try:
        steps = SAMPLERS[sampler].steps(schedule, grid, sigmas)
    except GridError as error:
        raise GridError(f"{error}; {_allowed(schedule, sampler, grid, sigmas)}") from None
    rest = SAMPLERS[sampler].rest
    return steps.since(begin * SAMPLERS[sampler].order) if rest is None else rest(schedule, steps, begin)


def denoise_table(
    schedule: Schedule, sampler: str, timestep: int, num_inference_steps: int, eta: float = 0.0
) -> StepTable:
    """The table from a noisy image at `timestep` to a clean one, at the timesteps floor(t·(N−i)/N + ½).

    With any sampler, one step gives the model's estimate of x_0. No noise is added at the clean end.
    """
    N = num_inference_steps
    if N == 1:
        steps = through(schedule, np.array([timestep]))
        return _table(steps, single_line(schedule, timestep))
    timesteps = (2 * timestep * (N - np.arange(N)) + N) // (2 * N)
    steps = SAMPLERS[sampler].walk(schedule, timesteps.astype(np.int64))
    lines = SAMPLERS[sampler].lines(schedule, steps, eta)
    lines[-1, Column.D] = 0
    return _table(steps, lines)


def _allowed(schedule: Schedule, sampler: str, refused: int, sigmas: SigmaSchedule | None) -> str:
    """The numbers of steps that a sampler allows, in words: its range, and the nearest allowed numbers."""

    def fits(N: int) -> bool:
        try:
            SAMPLERS[sampler].steps(schedule, N, sigmas)
        except GridError:
            return False
        return True

    T = schedule.num_train_timesteps
    smallest = next((N for N in range(1, T + 1) if fits(N)), None)
    if smallest is None:
        return f"{sampler} takes no number of steps here"
    largest = next(N for N in range(T, 0, -1) if fits(N))
    if not smallest < refused < largest:
        return f"{sampler} takes {smallest} to {largest} here"
    below = next(N for N in range(refused - 1, 0, -1) if fits(N))
    above = next(N for N in range(refused + 1, largest + 1) if fits(N))
    return f"{sampler} takes {smallest} to {largest} here, and nearest to it {below} or {above}"
