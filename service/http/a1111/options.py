"""The options of AUTOMATIC1111's API. All are fixed here: a request that names another value is told so."""

from collections.abc import Mapping

from model.description import ModelDescription

CLIP_SKIP = "CLIP_stop_at_last_layers"
_OWN_VAE = ("None", "Automatic", "")  # the VAE of the weights, by each of its names


def in_force(model: ModelDescription) -> dict[str, object]:
    """The options that programs read, and their values."""
    return {
        "sd_model_checkpoint": model.name,
        "sd_checkpoint_hash": model.digest,
        "sd_vae": _OWN_VAE[0],
        CLIP_SKIP: 1,
        "samples_format": "png",
        "samples_save": False,
        "grid_save": False,
        "return_grid": False,
        "live_previews_enable": True,
    }


def not_in_force(values: Mapping[str, object], model: ModelDescription) -> list[str]:
    """The names of options that have other values. Null is no value."""
    own = in_force(model)
    return [name for name, value in values.items() if value is not None and not _is_own(name, value, own)]


def _is_own(name: str, value: object, own: Mapping[str, object]) -> bool:
    if name == "sd_vae":
        return value in _OWN_VAE
    return name in own and own[name] == value
