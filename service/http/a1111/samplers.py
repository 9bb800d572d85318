"""AUTOMATIC1111's names of samplers and schedulers → ours.

Names and aliases are those of its modules sd_samplers_kdiffusion, sd_samplers_timesteps, sd_samplers_lcm and
sd_schedulers. TCD and DDPM have the names of its forks.
"""

from collections.abc import Sequence
from typing import NamedTuple

from model.description import ModelDescription
from model.samplers import SAMPLERS
from model.schedule import SigmaSchedule
from service.errors import UnknownSampler
from service.http.models import shown

AUTOMATIC = "Automatic"


class Sampler(NamedTuple):
    """A sampler.

    Attributes:
        name: AUTOMATIC1111's.
        ours: its name here.
    """

    name: str
    aliases: tuple[str, ...]
    ours: str


class Scheduler(NamedTuple):
    """A scheduler: how noise levels are spaced.

    Attributes:
        label: the name for people, which may follow a sampler's name.
        ours: `sigma_schedule`; None for the one of the weights.
    """

    name: str
    label: str
    aliases: tuple[str, ...]
    ours: SigmaSchedule | None


_SAMPLERS = (
    Sampler("DPM++ 2M", ("k_dpmpp_2m",), "dpmpp_2m"),
    Sampler("DPM++ 2M SDE", ("k_dpmpp_2m_sde",), "dpmpp_2m_sde"),
    Sampler("Euler a", ("k_euler_a", "k_euler_ancestral"), "euler_a"),
    Sampler("Euler", ("k_euler",), "euler"),
    Sampler("Heun", ("k_heun",), "heun"),
    Sampler("DDIM", ("ddim",), "ddim"),
    Sampler("PLMS", ("plms",), "pndm"),
    Sampler("UniPC", ("unipc",), "unipc"),
    Sampler("LCM", ("k_lcm",), "lcm"),
    Sampler("TCD", ("tcd",), "tcd"),
    Sampler("DDPM", ("ddpm",), "ddpm"),
)
_WEIGHTS_OWN = Scheduler("automatic", AUTOMATIC, (), None)
_SCHEDULERS = (
    Scheduler("uniform", "Uniform", (), "normal"),
    Scheduler("karras", "Karras", (), "karras"),
    Scheduler("exponential", "Exponential", (), "exponential"),
    Scheduler("normal", "Normal", (), "normal"),
)
_NOT_SERVED = (
    Scheduler("polyexponential", "Polyexponential", (), None),
    Scheduler("sgm_uniform", "SGM Uniform", ("SGMUniform",), None),
    Scheduler("kl_optimal", "KL Optimal", (), None),
    Scheduler("align_your_steps", "Align Your Steps", (), None),
    Scheduler("simple", "Simple", (), None),
    Scheduler("ddim", "DDIM", (), None),
    Scheduler("beta", "Beta", (), None),
    Scheduler("turbo", "Turbo", (), None),
)


class Chosen(NamedTuple):
    """The sampler and the scheduler of a request.

    Attributes:
        sampler: ours; None for the one that the weights recommend.
        sigma_schedule: ours; None for the one of the weights.
        label: the scheduler's, as texts about an image have it.
        warnings: sentences.
    """

    sampler: str | None
    sigma_schedule: SigmaSchedule | None
    label: str
    warnings: tuple[str, ...]


def served_samplers(model: ModelDescription) -> list[Sampler]:
    """The samplers that requests may name."""
    allowed = list(SAMPLERS) if model.distilled is None else [model.distilled.sampler]
    return [one for one in _SAMPLERS if one.ours in allowed]


def served_schedulers(model: ModelDescription) -> list[Scheduler]:
    """The schedulers that a request may name. The first is that of the weights."""
    return [_WEIGHTS_OWN, *(_SCHEDULERS if model.distilled is None else ())]


def name_of(sampler: str) -> str:
    """AUTOMATIC1111's name of a sampler, or ours if it has none."""
    return next((one.name for one in _SAMPLERS if one.ours == sampler), sampler)


def chosen(name: str | None, scheduler: str | None, model: ModelDescription) -> Chosen:
    """Read a sampler's name, perhaps with a scheduler's at its end, and a scheduler's name.

    Raises:
        UnknownSampler: no sampler that is served has this name.
    """
    asked = _scheduler_named(scheduler)
    sampler = None
    if name:
        base, at_its_end = _split(name)
        asked = at_its_end or asked
        sampler = _sampler_named(base, model)
        if sampler is None:
            names = ", ".join(one.name for one in served_samplers(model))
            raise UnknownSampler(f"Sampler not found: {shown(name)}. The samplers are {names}")
    if asked is None and scheduler:
        return Chosen(sampler, None, AUTOMATIC, (_not_taken(scheduler),))
    if asked is None or asked is _WEIGHTS_OWN:
        return Chosen(sampler, None, AUTOMATIC, ())
    ours = sampler or model.recommended.sampler
    if asked.ours == "normal" and model.schedule.sigma_schedule not in SAMPLERS[ours].sigma_schedules:
        return Chosen(sampler, None, asked.label, ())  # what the weights' scheduler says anyway
    if asked in served_schedulers(model) and asked.ours in SAMPLERS[ours].sigma_schedules:
        return Chosen(sampler, asked.ours, asked.label, ())
    return Chosen(sampler, None, AUTOMATIC, (_not_taken(asked.label, f" with {name_of(ours)}"),))


def _not_taken(scheduler: str, why: str = "") -> str:
    return f"the scheduler {shown(scheduler)} is not served{why}: the noise levels are those of the weights' scheduler"


def _split(name: str) -> tuple[str, Scheduler | None]:
    """A sampler's name, and the scheduler that it ends with."""
    if name.lower().endswith("_ka"):  # aliases of early versions
        return name[: -len("_ka")], _scheduler_named("karras")
    for scheduler in (_WEIGHTS_OWN, *_SCHEDULERS, *_NOT_SERVED):
        for one in _names(scheduler):
            if name.lower().endswith(f" {one}"):
                return name[: -len(one) - 1].rstrip(), scheduler
    return name, None


def _sampler_named(name: str, model: ModelDescription) -> str | None:
    wanted = name.strip().lower()
    for one in served_samplers(model):
        if wanted in (one.name.lower(), *one.aliases, one.ours):
            return one.ours
    return None


def _scheduler_named(name: str | None) -> Scheduler | None:
    wanted = (name or "").strip().lower()
    known: Sequence[Scheduler] = (_WEIGHTS_OWN, *_SCHEDULERS, *_NOT_SERVED)
    return next((one for one in known if wanted in _names(one)), None)


def _names(scheduler: Scheduler) -> tuple[str, ...]:
    return tuple(name.lower() for name in (scheduler.label, scheduler.name, *scheduler.aliases))
