"""Tables against the diffusers schedulers that they stand for: whole trajectories over a non-linear toy network.

diffusers rounds to float32, and a trajectory makes that larger. So its schedulers run here in double precision, on
levels in double precision, and the ends agree to 1e-9. Before, the levels are compared with their own. The schedulers
as they are shipped are compared, too.
"""

import inspect
from collections.abc import Collection, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Self

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from model.grids import GridError, Steps
from model.lines import Column
from model.samplers import SAMPLERS, StepTable, departures, sample_steps, sample_table
from model.schedule import Float64, Schedule, SigmaSchedule
from tests.properties import examples
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

# diffusers' warnings with NumPy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

CLASSES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
IN_SIGMA = {"euler", "euler_a", "heun"}  # diffusers has x = x_0 + σ·ε for them
SHAPE = (1, 4, 6, 6)
NOISE: Float64
IMAGE: Float64
NOISE, IMAGE = np.random.default_rng(0).standard_normal((2, *SHAPE))

STABLE_DIFFUSION: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
schedules = st.fixed_dictionaries(
    {name: st.just(value) for name, value in STABLE_DIFFUSION.items()}
    | {"prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"])},
    optional={
        "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
        "steps_offset": st.just(1),
    },
)


def fields_of(sampler: str) -> Collection[str]:
    """The fields of diffusers' class."""
    return inspect.signature(CLASSES[sampler][0]).parameters.keys()


def has(sampler: str, *fields: str) -> bool:
    return {*fields} <= {*fields_of(sampler)}


def network(x: Float64, t: float) -> Float64:
    predicted: Float64 = 0.8 * np.sin(2 * x + t / 300) + 0.3 * np.roll(x, 1) + 0.1 * np.cos(t / 100)
    return predicted


def ours(table: StepTable, noise: torch.dtype = torch.float32, image: Float64 | None = None) -> Float64:
    """The end of a trajectory from noise, or from an image."""
    rng = torch.Generator().manual_seed(0)
    (f, g), memories = table.levels[0], list[Float64]()
    x = NOISE * table.init if image is None else f * image + g * NOISE
    for step, values in zip(table.steps, table.lines, strict=True):
        line = dict(zip(Column, values, strict=True))
        out = network(x, step.timestep)
        x0 = (line[Column.P] * x + line[Column.Q] * out).clip(-line[Column.BOUND], line[Column.BOUND])
        x_next = line[Column.A] * x + line[Column.B] * x0 + line[Column.E] * out
        if step.is_noisy:
            x_next += line[Column.D] * torch.randn(SHAPE, generator=rng, dtype=noise).double().numpy()
        for column, memory in zip((Column.C_1, Column.C_2, Column.C_3), memories, strict=False):
            x_next += line[column] * memory
        if step.remembers:
            left = line[Column.R_X] * x + line[Column.R_0] * x0 + line[Column.R_E] * out
            memories = [left, *memories[:2]]
        x = x_next
    return x


def theirs(
    scheduler: Any,
    sampler: str,
    eta: float = 0.0,
    dtype: torch.dtype = torch.float32,
    begin: int = 0,
    image: Float64 | None = None,
) -> tuple[Float64, Float64]:
    """The end of the loop of diffusers' pipelines, and the levels at which they add noise, before each line and after.

    Args:
        begin: the first step that is taken.
        image: what the pipeline from an image starts from.
    """
    first = begin * scheduler.order
    timesteps = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(
            first
        )  # else a first timestep that is there twice is skipped, and the last step fails
    step: dict[str, Any] = {"eta": eta} if sampler in ("ddim", "tcd") else {}
    if sampler in ("ddim", "ddpm", "dpmpp_2m_sde", "euler_a", "lcm", "tcd"):
        step["generator"] = torch.Generator().manual_seed(0)
    levels = [level_of(scheduler, sampler, timesteps[:1])]
    if image is None:
        x = torch.tensor(NOISE).to(dtype) * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(torch.tensor(image).to(dtype), torch.tensor(NOISE).to(dtype), timesteps[:1])
    for i, t in enumerate(timesteps):
        scaled = scheduler.scale_model_input(x, t).double().numpy()
        x = scheduler.step(torch.tensor(network(scaled, float(t))).to(dtype), t, x, **step).prev_sample
        levels.append((1.0, 0.0) if i + 1 == len(timesteps) else level_of(scheduler, sampler, timesteps[i + 1 : i + 2]))
    end: Float64 = x.double().numpy()
    return end, np.array(levels)


def level_of(scheduler: Any, sampler: str, timestep: torch.Tensor) -> tuple[float, float]:
    """√ᾱ and √(1−ᾱ) of what add_noise makes at a timestep."""
    one, none = torch.eye(2, dtype=torch.float64)
    f, g = scheduler.add_noise(one, none, timestep.repeat(2)).tolist()
    scale = (1 + g**2) ** 0.5 if sampler in IN_SIGMA else 1.0
    return f / scale, g / scale


class InDouble(TorchFunctionMode):
    """Where diffusers asks for float32, it gets float64: for x, for noise, and for factors made of whole timesteps."""

    def __enter__(self) -> Self:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float32)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and len(args) == 2 and args[1] is torch.float32:
            return args[0]
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "dtype": torch.float64} if func is torch.randn else kwargs)


def set_exactly(scheduler: Any, schedule: Schedule, steps: Steps) -> None:
    """Give a scheduler its levels in double precision: ᾱ of all timesteps, or σ and timesteps of its steps.

    They differ from its own by what float32 rounds.
    """
    if hasattr(scheduler, "sigmas"):
        alpha_bar = np.append(steps.alpha_bar, steps.alpha_bar_next[-1])
        exact = torch.tensor(np.sqrt((1 - alpha_bar) / alpha_bar))
        own = scheduler.sigmas[: len(exact)]  # with log_linear, there is one more
        torch.testing.assert_close(own.double(), exact, rtol=1e-5, atol=5e-7)
        torch.testing.assert_close(scheduler.timesteps.double(), torch.tensor(steps.timesteps), rtol=0, atol=1.3e-4)
        scheduler.sigmas, scheduler.timesteps = exact, torch.tensor(steps.timesteps)
        return
    exact = torch.tensor(schedule.alphas_cumprod)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), exact, rtol=1e-5, atol=1e-6)
    scheduler.alphas_cumprod = exact
    if hasattr(scheduler, "final_alpha_cumprod"):
        clean = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = torch.ones_like(exact[0]) if clean else exact[0]


def difference(a: Float64, b: Float64) -> float:
    """In relation to the largest value, if that is more than 1."""
    assert np.isfinite(b).all()
    return float(np.abs(a - b).max() / max(1, np.abs(b).max()))


@lru_cache(maxsize=8)
def made(sampler: str, fields: tuple[tuple[str, Any], ...]) -> Any:
    kind, own = CLASSES[sampler]
    return kind(**own, **dict(fields))


def scheduler_of(
    sampler: str, fields: dict[str, Any], grid: int | tuple[int, ...], sigma_schedule: SigmaSchedule | None = None
) -> Any:
    """diffusers' scheduler with its timesteps."""
    unbounded = {"clip_sample": False} if sampler in ("ddim", "ddpm") else {}
    named = {f"use_{sigma_schedule}_sigmas": True} if sigma_schedule in ("karras", "exponential") else {}
    scheduler = copy(made(sampler, tuple({**unbounded, **fields, **named}.items())))
    scheduler.set_timesteps(**{"num_inference_steps": grid} if isinstance(grid, int) else {"timesteps": [*grid]})
    if sigma_schedule == "normal":
        assert isinstance(grid, int)
        set_normal(scheduler, grid)
    return scheduler


def set_normal(scheduler: Any, N: int) -> None:
    """k-diffusion's DiscreteSchedule.get_sigmas, for a scheduler of diffusers. That has no option for it."""
    log_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().log()
    t = torch.linspace(len(log_sigmas) - 1, 0, N)
    share = t.frac()
    sigmas = ((1 - share) * log_sigmas[t.floor().long()] + share * log_sigmas[t.ceil().long()]).exp()
    end = torch.zeros(1)
    if scheduler.order == 1:
        scheduler.timesteps, scheduler.sigmas = t, torch.cat([sigmas, end])
    else:
        scheduler.timesteps = torch.cat([t[:1], t[1:].repeat_interleave(2)])
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), end])


def compare(
    sampler: str,
    fields: dict[str, Any],
    grid: int | tuple[int, ...],
    eta: float = 0.0,
    sigma_schedule: SigmaSchedule | None = None,
    begin: int | None = None,
    as_shipped: bool = False,
) -> float:
    """How far a trajectory's ends are apart.

    Args:
        begin: the first step of a trajectory from an image; None for one from noise.
        as_shipped: with diffusers' roundings.
    """
    schedule = Schedule(**{"clip_sample": False, **fields})
    table = sample_table(schedule, sampler, grid, eta, sigma_schedule, begin or 0)
    scheduler = scheduler_of(sampler, fields, grid, sigma_schedule)
    is_whole = sampler == "lcm" and isinstance(grid, int)  # all steps, over a part of the teacher's timesteps
    if is_whole and begin:
        original = schedule.original_inference_steps
        scheduler.set_timesteps(grid, strength=(original - begin + 0.5) / original)  # rounded down
    first, image = 0 if is_whole else begin or 0, None if begin is None else IMAGE
    if as_shipped:
        end, (expected, levels) = ours(table, image=image), theirs(scheduler, sampler, eta, torch.float32, first, image)
    else:
        set_exactly(scheduler, schedule, sample_steps(schedule, sampler, grid, sigma_schedule))
        end = ours(table, torch.float64, image)
        with InDouble():
            expected, levels = theirs(scheduler, sampler, eta, torch.float64, first, image)
    np.testing.assert_allclose(table.levels, levels, rtol=0, atol=2e-6 if as_shipped else EXACT)
    return difference(end, expected)


EXACT = 1e-9  # of max(1, |x|)
SPACINGS = ("leading", "trailing", "linspace")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
UNABLE = {("pndm", "sample"), ("euler_a", "sample")}  # diffusers' classes refuse these


def rounding(sampler: str, prediction_type: str) -> float:
    """How far from exact ends diffusers' float32 leads, of max(1, |x|).

    Most are below 4e-6. A network that predicts x_0 has its first steps divide by a small ᾱ. Noise at each step makes
    errors larger; LCM and TCD give x_0 itself, or nearly. Examples are random: bounds have room.
    """
    if prediction_type == "sample":
        return 2e-4
    return 1.6e-4 if sampler in ("lcm", "tcd") else 2e-5


@st.composite
def trajectories(draw: st.DrawFn) -> dict[str, Any]:
    sampler = draw(st.sampled_from(sorted(CLASSES)))
    N = draw(st.integers(1, 50))
    fields = draw(schedules)
    assume((sampler, fields["prediction_type"]) not in UNABLE)
    return {
        "sampler": sampler,
        "grid": N,
        "eta": draw(st.sampled_from([0.0, 0.6])) if SAMPLERS[sampler].takes_eta else 0.0,
        "sigma_schedule": draw(st.sampled_from([None, *SAMPLERS[sampler].sigma_schedules])),
        "begin": draw(st.none() | st.integers(0, N - 1)),
        "fields": fields,
    }


def starts_clean(sampler: str, N: int, sigma_schedule: str | None) -> bool:
    """Whether the spacing linspace has its only step at timestep 0."""
    return N == 1 and sampler in IN_SIGMA and sigma_schedule != "normal"


@examples(60)
@given(trajectories())
def test_a_table_ends_where_its_scheduler_does(asked: dict[str, Any]) -> None:
    """From noise, and from an image at each step; with add_noise at each level on the way."""
    try:
        assert compare(**asked) <= EXACT
        assert compare(**asked, as_shipped=True) <= rounding(asked["sampler"], asked["fields"]["prediction_type"])
    except GridError:
        assert asked["fields"].get("timestep_spacing", "linspace") == "linspace" or asked["sampler"] == "lcm"
        assert starts_clean(asked["sampler"], asked["grid"], asked["sigma_schedule"]) or asked["sampler"] == "lcm"


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", sorted(CLASSES))
def test_all_tables_end_where_their_schedulers_do(sampler: str, prediction_type: str) -> None:
    """Every spacing with every number of steps to 50, and with every sigma schedule.

    Sigma schedules have fewer numbers: the least, the solvers' own 14 and 15, and those where timesteps repeat.
    """
    if (sampler, prediction_type) in UNABLE:
        return
    for spacing in SPACINGS:
        fields = {**STABLE_DIFFUSION, "timestep_spacing": spacing, "prediction_type": prediction_type}
        for sigma_schedule in (None, *SAMPLERS[sampler].sigma_schedules):
            for N in range(1, 51) if sigma_schedule is None else (1, 2, 3, 14, 15, 30, 45, 48, 49, 50):
                if spacing == "linspace" and starts_clean(sampler, N, sigma_schedule):
                    with pytest.raises(GridError, match="would be at timestep 0"):
                        compare(sampler, fields, N, 0.0, sigma_schedule)
                    continue
                left_out = (0, N // 2, N * 7 // 8)[N % 3]
                for begin in (None, min(left_out, 50 - N) if sampler == "lcm" else left_out):
                    eta = 0.3 if SAMPLERS[sampler].takes_eta and begin else 0.0
                    assert compare(sampler, fields, N, eta, sigma_schedule, begin) <= EXACT


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("sampler", ["pndm", "euler", "euler_a", "heun", "unipc"])
def test_few_steps(sampler: str, N: int, spacing: str) -> None:
    at_timestep_0 = spacing == "linspace" and starts_clean(sampler, N, None)
    for prediction_type in ("epsilon", "v_prediction"):
        fields = {**STABLE_DIFFUSION, "timestep_spacing": spacing, "prediction_type": prediction_type}
        if at_timestep_0:
            with pytest.raises(GridError, match="would be at timestep 0"):
                compare(sampler, fields, N)
        else:
            assert compare(sampler, fields, N) <= EXACT


@examples(60)
@given(
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    original=st.sampled_from([25, 50, 60, 333]),
    scaling=st.sampled_from([0.01, 10.0, 100]),
    share=st.floats(0, 1),
    fields=st.sampled_from([{}, {"steps_offset": 1, "timestep_spacing": "trailing", "set_alpha_to_one": False}]),
)
def test_lcm_with_other_fields(
    prediction_type: str, original: int, scaling: float, share: float, fields: dict[str, Any]
) -> None:
    """It passes over those that place the timesteps of other samplers."""
    own = {"prediction_type": prediction_type, "original_inference_steps": original, "timestep_scaling": scaling}
    assert compare("lcm", {**STABLE_DIFFUSION, **own, **fields}, 1 + int(share * (original - 1))) <= EXACT


LEVELS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
    {"use_exponential_sigmas": True, "sigma_max": 12.0},
    {"use_karras_sigmas": True, "interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"},
]


@examples(100)
@given(fields=schedules, levels=st.sampled_from(LEVELS), N=st.integers(2, 50))
def test_eulers_levels(fields: dict[str, Any], levels: dict[str, Any], N: int) -> None:
    assert compare("euler", {**fields, **levels}, N) <= EXACT


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_eulers_grids(levels: dict[str, Any]) -> None:
    """Timesteps within two units of float32's last place, of which diffusers' own rounding is one."""
    for N in (2, 7, 30, 50):
        scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, **levels)
        scheduler.set_timesteps(N)
        steps = sample_steps(Schedule(**STABLE_DIFFUSION, **levels), "euler", N)
        np.testing.assert_allclose(steps.timesteps, scheduler.timesteps.double().numpy(), rtol=0, atol=1.3e-4)
        ends = 1 / (1 + scheduler.sigmas.double().numpy()[: N + 1] ** 2)
        np.testing.assert_allclose(steps.alpha_bar, ends[:-1], rtol=3e-6)
        np.testing.assert_allclose(steps.alpha_bar_next, ends[1:], rtol=3e-6)


@examples(40)
@given(fields=schedules, N=st.integers(1, 50))
def test_karras_levels_of_dpmpp_2m(fields: dict[str, Any], N: int) -> None:
    """From 45 steps on, timesteps repeat, and the levels do not."""
    karras = {**fields, "use_karras_sigmas": True}
    assert compare("dpmpp_2m", karras, N) <= EXACT
    table = sample_table(Schedule(**karras), "dpmpp_2m", N)
    assert (np.diff(table.timesteps) <= 0).all()
    assert len(table) == N


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler"])
def test_repeated_timesteps_have_levels_of_their_own(sampler: str) -> None:
    steps = sample_steps(Schedule(**STABLE_DIFFUSION, use_karras_sigmas=True), sampler, 50)
    assert (np.diff(steps.timesteps) == 0).any() == (sampler == "dpmpp_2m")
    assert (np.diff(steps.alpha_bar) > 0).all()


LISTING = [name for name in CLASSES if SAMPLERS[name].through is not None and name != "ddim"]  # diffusers' takes none


@pytest.mark.parametrize("sampler", LISTING)
@pytest.mark.parametrize("timesteps", [(999, 640, 300, 41, 3), (999, 749, 499, 249), (800,), (0,)])
def test_listed_timesteps(sampler: str, timesteps: tuple[int, ...]) -> None:
    for spacing in ("leading", "trailing"):  # whence Euler's first noise
        for begin in (None, len(timesteps) // 2):
            fields = {**STABLE_DIFFUSION, "timestep_spacing": spacing}
            assert compare(sampler, fields, timesteps, begin=begin) <= EXACT


def test_who_takes_a_list_is_who_does_in_diffusers() -> None:
    """set_timesteps of these has an argument for it. DDIM's step goes to the next timestep here."""
    for name, (kind, _) in CLASSES.items():
        takes = "timesteps" in inspect.signature(kind.set_timesteps).parameters or name == "ddim"
        assert (SAMPLERS[name].through is not None) == takes


def test_who_knows_sigma_schedules_is_who_does_in_diffusers() -> None:
    """normal is k-diffusion's, for those that know the others."""
    for name in CLASSES:
        known = {kind for kind in ("karras", "exponential") if has(name, f"use_{kind}_sigmas")}
        assert {*SAMPLERS[name].sigma_schedules} == (known | {"normal"} if known else set())


@pytest.mark.parametrize(
    ("sampler", "fields", "message"),
    [
        ("pndm", {}, "must be null with pndm; a list is for ddim, "),
        ("euler_a", {}, "must be null with euler_a; a list is for ddim, "),
        ("unipc", {}, "must be null with unipc; a list is for ddim, "),
        *(
            (sampler, {field: True}, f"must be null: the weights' scheduler has {field}, and so timesteps of its own$")
            for sampler in ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde")
            for field in ("use_karras_sigmas", "use_exponential_sigmas")
        ),
    ],
)
def test_who_takes_no_list(sampler: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=f"^{message}"):
        sample_table(Schedule(**fields), sampler, (999, 500))


# Zero terminal SNR.


@examples(100)
@given(
    sampler=st.sampled_from([name for name in CLASSES if "rescale_betas_zero_snr" in fields_of(name)]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    N=st.integers(1, 50),
    prediction_type=st.sampled_from(["v_prediction", "epsilon"]),
)
def test_zero_terminal_snr(sampler: str, spacing: str, N: int, prediction_type: str) -> None:
    assume(prediction_type == "v_prediction" or sampler not in ("ddim", "ddpm", "lcm", "tcd"))  # these divide by 0
    fields = {**STABLE_DIFFUSION, "prediction_type": prediction_type, "timestep_spacing": spacing}
    fields["rescale_betas_zero_snr"] = True
    try:
        assert compare(sampler, fields, N) <= EXACT
    except GridError:
        assert (N, spacing) == (1, "linspace")


# Fields that a class does not have.

FOREIGN: list[dict[str, Any]] = [
    {"rescale_betas_zero_snr": True},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"interpolation_type": "log_linear"},
    {"final_sigmas_type": "sigma_min"},
    {"sigma_min": 0.05, "sigma_max": 10.0},
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0},
    {"thresholding": True, "sample_max_value": 1.5},
    {"set_alpha_to_one": False},
    {"variance_type": "fixed_large"},
    {"original_inference_steps": 20, "timestep_scaling": 1.0},
]


@pytest.mark.parametrize(
    ("sampler", "fields"), [(name, fields) for name in CLASSES for fields in FOREIGN if not has(name, *fields)], ids=str
)
def test_fields_that_only_other_classes_have_change_nothing(sampler: str, fields: dict[str, Any]) -> None:
    """diffusers keeps them for other classes, and so a config may have any of them."""
    kind, own = CLASSES[sampler]
    clips = {"clip_sample": False} if has(sampler, "clip_sample") else {}
    known = {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}
    scheduler = kind.from_config({**own, **clips, **known, **fields})
    scheduler.set_timesteps(12)
    table = sample_table(Schedule(**{"clip_sample": False, **known, **fields}), sampler, 12)
    assert difference(ours(table), theirs(scheduler, sampler)[0]) <= 4e-6


# What the tables leave out.


def test_departures() -> None:
    """Checked against what each class would do with its own defaults."""
    schedule = Schedule()
    for sampler, (kind, own) in CLASSES.items():
        config = dict(kind(**own).config)
        assert departures(sampler, schedule, config) == []
        assert departures(sampler, schedule, {**config, "use_beta_sigmas": True}) == (
            ["use_beta_sigmas"] if has(sampler, "use_beta_sigmas") else []
        )
    defaults = dict(PNDMScheduler().config)
    assert departures("pndm", schedule, {}) == departures("pndm", schedule, defaults) == ["skip_prk_steps"]
    assert departures("dpmpp_2m", schedule, {"use_karras_sigmas": None}) == []
    other = {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "lower_order_final": False}
    assert departures("dpmpp_2m", schedule, other) == ["algorithm_type", "solver_order"]
    assert departures("dpmpp_2m_sde", schedule, other) == ["solver_order"]
    ends = Schedule(final_sigmas_type="sigma_min")
    assert departures("dpmpp_2m_sde", ends, other) == ["solver_order", "lower_order_final"]
    assert departures("unipc", schedule, {"solver_type": "bh1", "disable_corrector": [0]}) == [
        "solver_type",
        "disable_corrector",
    ]


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("N", [1, 2, 14, 15, 30])
def test_the_solvers_own_fields(sampler: str, N: int) -> None:
    """The last step is of first order where it ends clean, or is one of few."""
    for own in ({"final_sigmas_type": "sigma_min"}, {"solver_type": "heun"}):
        for sigma_schedule in (None, "karras", "exponential"):
            fields = {**STABLE_DIFFUSION, **own}
            for begin in (None, N // 2):
                apart = compare(sampler, fields, N, sigma_schedule=sigma_schedule, begin=begin)
                assert apart <= EXACT


def test_heun_clips_where_its_config_says_so() -> None:
    assert compare("heun", {**STABLE_DIFFUSION, "clip_sample": True, "clip_sample_range": 0.7}, 12) <= EXACT


@pytest.mark.parametrize("sampler", [*CLASSES])
def test_a_schedule_that_begins_at_a_large_sigma(sampler: str) -> None:
    """That of the digits: 20,291. Heun's method diverges from there, and diffusers' does likewise."""
    for N in (4, 25):
        assert compare(sampler, {"beta_schedule": "squaredcos_cap_v2"}, N) <= EXACT
    table = sample_table(Schedule(beta_schedule="squaredcos_cap_v2", clip_sample=False), sampler, 4)
    assert (np.abs(ours(table)).max() > 1e7) == (sampler == "heun")


@pytest.mark.parametrize(("clip", "zero_snr", "clips"), [(-5.1, False, False), (-5.1, True, True), (-1, False, True)])
def test_a_clip_of_levels_is_told_where_it_clips(clip: float, zero_snr: bool, clips: bool) -> None:
    fields = {**STABLE_DIFFUSION, "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    schedule = Schedule(**fields)
    scheduler = DPMSolverMultistepScheduler(**fields, lambda_min_clipped=clip)
    assert departures("dpmpp_2m", schedule, dict(scheduler.config)) == (["lambda_min_clipped"] if clips else [])
    scheduler.set_timesteps(12)
    off = difference(ours(sample_table(schedule, "dpmpp_2m", 12)), theirs(scheduler, "dpmpp_2m")[0])
    assert off > 1e-3 if clips else off <= 4e-6
