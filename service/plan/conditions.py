"""What each of a request's rows is told: a label or texts, and how far guidance goes."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

from model.rows import Condition
from service.plan import texts
from service.plan.fields import Denoise, Sample
from service.plan.guidance import OFF, Guidance, guidance_of
from service.plan.served import Served
from service.plan.texts import Words


class _OfRow(TypedDict):
    """Arguments of a Row."""

    branches: tuple[Condition, ...]
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float]


class Told(NamedTuple):
    """What a row is told beside its steps.

    Attributes:
        words: None for a model without text.
    """

    label: int | None
    words: Words | None
    guidance: Guidance

    @property
    def of_row(self) -> _OfRow:
        branches = (Condition(self.label), Condition()) if self.words is None else self.words.branches
        return {
            "branches": branches if self.guidance.is_on else branches[:1],
            "guidance_scale": self.guidance.scale,
            "guidance_rescale": self.guidance.rescale,
            "guidance_interval": self.guidance.interval,
        }


def told_of(
    request: Sample | Denoise, labels: Sequence[int | None], default: float, served: Served
) -> tuple[list[Told], Guidance, tuple[str, ...]]:
    """What each row is told, the guidance that was asked for, and warnings.

    Args:
        default: the guidance_scale of a request that names none.
    """
    guidance = guidance_of(request, default, labels, served.model)
    words, warnings = texts.words_of(request, len(labels), guidance.is_on, served)
    each: Sequence[Words | None] = words or [None] * len(labels)
    told = [
        Told(label, one, OFF if not guidance.is_on or (one is None and label is None) else guidance)
        for label, one in zip(labels, each, strict=True)
    ]
    return told, guidance, tuple(warnings)


def recipe_of(told: Sequence[Told], served: Served) -> dict[str, object]:
    """What rows are told, as the recipe of their images has it."""
    guidance = next((one.guidance for one in told if one.guidance.is_on), OFF)
    words = [one.words for one in told if one.words is not None]
    return {"class_label": told[0].label, **guidance.recipe, **texts.recipe_of(words, served.recipe_prompts)}
