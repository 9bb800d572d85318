"""What AUTOMATIC1111's programs ask at connect: the model, its options, samplers, and lists of what is not here."""

from collections.abc import Mapping

from model.description import ModelDescription
from service.http.a1111 import samplers
from service.http.a1111.fields import CLIP_SKIP
from service.http.a1111.info import short_hash

# Lists of what this server does not have, by path.
EMPTY: Mapping[str, object] = {
    "upscalers": [],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "loras": [],
    "embeddings": {"loaded": {}, "skipped": {}},
}


def models(model: ModelDescription) -> list[dict[str, object]]:
    """The one model. A path of the server is nobody's business, so the file's name is the model's."""
    return [
        {
            "title": model.name,
            "model_name": model.name,
            "hash": short_hash(model.digest),
            "sha256": model.digest,
            "filename": model.name,
            "config": None,
        }
    ]


def options(model: ModelDescription) -> dict[str, object]:
    """The options that programs read, at the values that are in force."""
    return {
        "sd_model_checkpoint": model.name,
        "sd_checkpoint_hash": model.digest,
        "sd_vae": "None",
        CLIP_SKIP: 1,
        "samples_format": "png",
        "samples_save": False,
        "grid_save": False,
        "return_grid": False,
        "live_previews_enable": True,
    }


def not_set(values: Mapping[str, object], model: ModelDescription) -> list[str]:
    """The names of options whose values are not in force."""
    in_force = options(model)
    return [name for name, value in values.items() if name not in in_force or in_force[name] != value]


def sampler_list(model: ModelDescription) -> list[dict[str, object]]:
    return [{"name": one.name, "aliases": list(one.aliases), "options": {}} for one in samplers.served_samplers(model)]


def scheduler_list(model: ModelDescription) -> list[dict[str, object]]:
    return [
        {
            "name": one.name,
            "label": one.label,
            "aliases": list(one.aliases) or None,
            "default_rho": -1.0,
            "need_inner_model": False,
        }
        for one in samplers.served_schedulers(model)
    ]
