"""What each of a request's rows is told: a label or texts, and how far guidance goes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict

from model.description import ModelDescription
from model.rows import Condition, Group
from service.plan import micro_conditions, texts
from service.plan.fields import Denoise, Sample
from service.plan.guidance import OFF, UNGUIDED, Guidance, guidance_of
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
        sizes: None for a network that is told no sizes.
    """

    label: int | None
    words: Words | None
    sizes: micro_conditions.ToldSizes | None
    guidance: Guidance

    @property
    def of_row(self) -> _OfRow:
        branches = (Condition(self.label), Condition()) if self.words is None else self.words.branches
        if not self.guidance.combines:
            branches = (replace(branches[0], w=self.guidance.w),)
        if self.sizes is not None:
            told = (one for one in (self.sizes.own, self.sizes.negative) if one is not None)
            branches = tuple(
                replace(branch, time_ids=one.time_ids) for branch, one in zip(branches, told, strict=False)
            )
        return {
            "branches": branches,
            "guidance_scale": self.guidance.scale,
            "guidance_rescale": self.guidance.rescale,
            "guidance_interval": self.guidance.interval,
        }


class Asked(NamedTuple):
    """What a request asks for beside its steps and the size of its images.

    Attributes:
        told: for each row.
        fields: of the request, with their defaults filled in.
        warnings: sentences.
    """

    told: list[Told]
    fields: dict[str, object]
    warnings: tuple[str, ...]


def asked_of(
    request: Sample | Denoise,
    labels: Sequence[int | None],
    steps: int,
    default: float,
    group: Group,
    served: Served,
) -> Asked:
    """What a request asks for.

    Args:
        steps: of the request.
        default: the guidance_scale of a request that names none.

    Raises:
        Invalid: the model cannot use what the request says.
    """
    model = served.model
    guidance = guidance_of(request, default, labels, model)
    words, warnings = texts.words_of(request, len(labels), steps, guidance.combines, served)
    sizes = micro_conditions.told_of(request, group, model)
    if not guidance.combines and micro_conditions.is_negative_given(request):
        warnings.append(f"negative sizes and crops have no effect: {UNGUIDED}")
    each: Sequence[Words | None] = words or [None] * len(labels)
    told = [
        Told(label, one, sizes, OFF if one is None and label is None else guidance.in_effect)
        for label, one in zip(labels, each, strict=True)
    ]
    of_sizes = micro_conditions.NOTHING if sizes is None else sizes.fields
    return Asked(told, {**guidance.fields, **texts.fields_of(request, model), **of_sizes}, tuple(warnings))


def embedded_fields(model: ModelDescription) -> list[str]:
    """The fields of a request that the network is told as numbers, beside the timestep."""
    guidance = ["guidance_scale"] if model.embeds_guidance else []
    return [*guidance, *(micro_conditions.OWN if model.embeds_sizes else ())]


def recipe_of(told: Sequence[Told], served: Served) -> dict[str, object]:
    """What rows are told, as the recipe of their images has it."""
    guidance = next((one.guidance for one in told if one.guidance.is_on), OFF)
    words = [one.words for one in told if one.words is not None]
    label, sizes = told[0].label, told[0].sizes
    return {
        "class_label": label,
        **guidance.recipe,
        **texts.recipe_of(words, served.recipe_prompts),
        **(micro_conditions.NOTHING if sizes is None else sizes.recipe(guidance.combines)),
    }
