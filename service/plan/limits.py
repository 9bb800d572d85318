"""The numbers behind the named limits of the table of fields. They come from the model and the settings."""

from collections.abc import Mapping

from model.description import ModelDescription
from service.plan.entries import Limit
from service.plan.shared_fields import MAX_SEED

Limits = Mapping[str, float]


def limits_of(model: ModelDescription, max_images: int, timeout: float) -> Limits:
    """All named limits.

    Args:
        max_images: the most images in one request.
        timeout: the most seconds for one request.
    """
    last = model.schedule.num_train_timesteps - 1
    most = max(model.distilled.num_inference_steps) if model.distilled else last + 1
    return {
        "max_images": max_images,
        "timeout": timeout,
        "most_steps": most,
        "first_timestep": model.first_timestep,
        "last_timestep": last,
        "longest_walk": max(1, min(most, last)),
        "most_clip_skip": MAX_SEED if model.text is None else model.text.layers - 1,  # the plan says more without text
    }


def resolved(limit: Limit | None, limits: Limits) -> float | None:
    """The number of a limit of the table."""
    return limits[limit] if isinstance(limit, str) else limit
