"""Small random autoencoders for tests."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from model.description import ModelDescription, VAEDescription
from model.nets.autoencoder import Autoencoder, AutoencoderConfig
from model.rows import Image
from tests.networks import fill
from tests.trajectories import description_of

Kind = Literal["kl", "vq"]

_COMMON: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "scaling_factor": 0.5}
_FIELDS: dict[str, dict[str, Any]] = {
    "kl": {"latent_channels": 4},
    "vq": {"latent_channels": 3, "vq_embed_dim": 2, "num_vq_embeddings": 40},
}


def small_autoencoder(kind: Kind, **fields: Any) -> Autoencoder:
    """Latents are half as large as images."""
    autoencoder = Autoencoder(AutoencoderConfig(kind=kind, **{**_COMMON, **_FIELDS[kind], **fields}))
    fill(autoencoder)
    return autoencoder


def latent_description(
    autoencoder: Autoencoder, image_shape: tuple[int, int, int], digest: str = "0" * 64
) -> ModelDescription:
    """The description of a latent model with this autoencoder."""
    config = autoencoder.config
    sides = image_shape[1] // config.factor, image_shape[2] // config.factor
    return replace(
        description_of(nn.Identity(), (config.channels, *sides), digest=digest),
        image_shape=image_shape,
        vae=VAEDescription(config.kind, config.factor, config.scaling_factor, num_parameters=1),
    )


def random_images(count: int, shape: Sequence[int]) -> list[Image]:
    """Random images or latents."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(tuple(shape), generator=rng).numpy() for _ in range(count)]
