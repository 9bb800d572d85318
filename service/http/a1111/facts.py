"""What AUTOMATIC1111's programs ask at connect, beside options: the model, samplers, and lists of what is not here."""

from collections.abc import Mapping

from model.description import ModelDescription
from service.http.a1111 import samplers
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
