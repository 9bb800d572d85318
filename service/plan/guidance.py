"""Classifier-free guidance: how far, in which steps, and for which rows."""

from collections.abc import Sequence
from typing import NamedTuple

from model.description import ModelDescription
from service.errors import Invalid
from service.plan.fields import Denoise, Sample

Interval = tuple[float, float]

ALL_STEPS: Interval = (0.0, 1.0)

UNGUIDED = "guidance_scale is at most 1, which is no guidance"
EMBEDDED = "this network has guidance embedded, and makes no second prediction to compare with"


class Guidance(NamedTuple):
    """The guidance of a row.

    Attributes:
        scale: more than 1 guides.
        interval: from and to, as shares of the steps.
        rescale: 0 to 1.
        is_embedded: the network is told the scale, in the place of a second prediction.
    """

    scale: float = 1.0
    interval: Interval = ALL_STEPS
    rescale: float = 0.0
    is_embedded: bool = False

    @property
    def is_on(self) -> bool:
        return self.scale > 1

    @property
    def combines(self) -> bool:
        """Whether two predictions are combined."""
        return self.is_on and not self.is_embedded

    @property
    def w(self) -> float | None:
        """As model.rows.Condition has it."""
        return max(0.0, self.scale - 1) if self.is_embedded else None

    @property
    def fields(self) -> dict[str, object]:
        """The fields of a request, with their defaults filled in."""
        return {
            "guidance_scale": self.scale,
            "guidance_interval": list(self.interval),
            "guidance_rescale": self.rescale,
        }

    @property
    def in_effect(self) -> "Guidance":
        """The same without what has no effect."""
        return self if self.is_on else OFF._replace(is_embedded=self.is_embedded)

    @property
    def recipe(self) -> dict[str, object]:
        """The fields of guidance `in_effect`, as a recipe has them: null for defaults."""
        return {
            "guidance_scale": self.scale,
            "guidance_interval": None if self.interval == ALL_STEPS else list(self.interval),
            "guidance_rescale": self.rescale or None,
        }


OFF = Guidance()


def is_guidable(model: ModelDescription) -> bool:
    """Whether the network knows what guidance needs: texts, or both labels and "no label"."""
    return model.text is not None or (model.num_classes is not None and not model.needs_label)


def why_one_prediction(model: ModelDescription) -> str | None:
    """Why the network never makes a second prediction for guidance. None if it does."""
    if model.embeds_guidance:
        return EMBEDDED
    return None if is_guidable(model) else "this model knows no guidance"


def guidance_of(
    request: Sample | Denoise, default: float, labels: Sequence[int | None], model: ModelDescription
) -> Guidance:
    """The guidance of a request's rows that have a text or a label. The others have none.

    Args:
        default: the scale of a request that names none.
        labels: of the rows.

    Raises:
        Invalid: the model or the request knows no guidance, or the interval falls.
    """
    tells = model.text is not None or any(label is not None for label in labels)
    scale = request.guidance_scale
    if scale is None:
        scale = default if tells else 1.0
    elif scale > 1 and not is_guidable(model):
        why = "this model was trained with labels only" if model.needs_label else "this model knows no guidance"
        raise Invalid.field("guidance_scale", f"must be at most 1: {why}; it is {scale:g}")
    elif scale > 1 and not tells:
        raise Invalid.field("guidance_scale", f"must be at most 1 without a class_label, and is {scale:g}")
    return Guidance(float(scale), _interval(request, model), _rescale(request, model), model.embeds_guidance)


def _interval(request: Sample | Denoise, model: ModelDescription) -> Interval:
    if request.guidance_interval is None:
        return ALL_STEPS
    begin, end = (abs(float(share)) for share in request.guidance_interval)  # -0.0 is 0.0
    if begin > end:
        raise Invalid.field("guidance_interval", f"must not fall, and is {begin:g} to {end:g}")
    why = why_one_prediction(model)
    if (begin, end) != ALL_STEPS and why:
        raise Invalid.field("guidance_interval", f"must be [0, 1]: {why}; it is {[begin, end]}")
    return begin, end


def _rescale(request: Sample | Denoise, model: ModelDescription) -> float:
    why = why_one_prediction(model)
    if request.guidance_rescale and why:
        raise Invalid.field("guidance_rescale", f"must be 0: {why}; it is {request.guidance_rescale:g}")
    return abs(float(request.guidance_rescale))
