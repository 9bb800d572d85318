"""What guides a request's rows: their class labels, and classifier-free guidance."""

import hashlib
from collections.abc import Sequence

from model.description import ModelDescription
from model.rows import Condition
from service.errors import Invalid
from service.plan.fields import Denoise, Label, Sample

Interval = tuple[float, float]

ALL_STEPS: Interval = (0.0, 1.0)


def branches(label: int | None, guidance_scale: float) -> tuple[Condition, ...]:
    """The conditions of a row: its label, and "no label" if the row is guided."""
    return (Condition(label), Condition()) if guidance_scale > 1 else (Condition(label),)


# Labels.


def labels_of(label: Label | Sequence[Label], num_images: int, model: ModelDescription) -> list[int | None]:
    """The class of each image, by index.

    Raises:
        Invalid: there is no such class, or the list is not as long as the images.
    """
    if isinstance(label, int | str | None):
        return [label_of(label, model)] * num_images
    if len(label) != num_images:
        raise Invalid.field("class_label", f"must be one label, or {num_images} in a list, and is {len(label)}")
    return [label_of(one, model) for one in label]


def label_of(label: Label, model: ModelDescription) -> int | None:
    """The index of a class.

    Raises:
        Invalid: there is no such class.
    """
    if label is None:
        return None
    if model.num_classes is None:
        raise Invalid.field("class_label", f"must be null: this model has no classes, and the label is {label!r}")
    if label in model.class_names:
        return model.class_names.index(str(label))
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10:
        label = int(label)
    if isinstance(label, int) and 0 <= label < model.num_classes:
        return label
    named = model.class_names != tuple(map(str, range(model.num_classes)))  # bare numbers add nothing
    names = f", or one of {', '.join(model.class_names[:20])}" if model.class_names and named else ""
    more = ", …" if len(model.class_names) > 20 else ""
    raise Invalid.field("class_label", f"must be 0 to {model.num_classes - 1}{names}{more}, and is {label!r}")


def class_of(seed: int, model: ModelDescription) -> int:
    """A class chosen by the seed, for an image without a class and a network that needs one."""
    assert model.num_classes is not None
    digest = hashlib.sha256(f"class of {seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % model.num_classes


# Guidance.


def is_guidable(model: ModelDescription) -> bool:
    """Whether the network knows both labels and "no label", which guidance needs."""
    return model.num_classes is not None and not model.needs_label


def check_guidance(scale: float, labels: Sequence[int | None], model: ModelDescription) -> None:
    """Check a guidance_scale.

    Raises:
        Invalid: the model or the request knows no guidance.
    """
    if scale > 1 and model.needs_label:
        raise Invalid.field("guidance_scale", f"must be 1: this model was trained with labels only; it is {scale:g}")
    if scale > 1 and all(label is None for label in labels):
        raise Invalid.field("guidance_scale", f"must be 1 without a class_label, and is {scale:g}")


def interval_of(request: Sample | Denoise, model: ModelDescription) -> Interval:
    """The part of the steps that has guidance, wherever rows are guided.

    Raises:
        Invalid: the interval falls, or the model knows no guidance.
    """
    if request.guidance_interval is None:
        return ALL_STEPS
    begin, end = (abs(float(share)) for share in request.guidance_interval)  # -0.0 is 0.0
    if begin > end:
        raise Invalid.field("guidance_interval", f"must not fall, and is {begin:g} to {end:g}")
    if (begin, end) != ALL_STEPS and not is_guidable(model):
        raise Invalid.field("guidance_interval", f"must be [0, 1]: this model knows no guidance; it is {[begin, end]}")
    return begin, end
