"""What a backend runs: a network and its description."""

from dataclasses import dataclass

from torch import nn

from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder, DecoderOnly, EncoderOnly


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a model.

    Attributes:
        name: denoiser, decoder or encoder.
        module: float32, on the CPU. Maps x, timesteps and labels to its output. Networks without timesteps ignore the
            other arguments.
        digest: ModelDescription.digest.
        input_shape: (C, H, W) of a row of x.
        num_train_timesteps: None for a network without timesteps.
        work: of one row: parameters × height × width.
    """

    name: str
    module: nn.Module
    digest: str
    input_shape: tuple[int, int, int]
    num_train_timesteps: int | None
    work: float


def denoiser(module: nn.Module, model: ModelDescription) -> Network:
    """The U-Net."""
    shape = model.sample_shape
    work = model.num_parameters * shape[1] * shape[2]
    return Network("denoiser", module, model.digest, shape, model.schedule.num_train_timesteps, work)


def decoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """The VAE's decoder: maps the output of Autoencoder.unscaled to images."""
    return Network(
        "decoder", DecoderOnly(autoencoder), model.digest, model.sample_shape, None, _work(autoencoder.decoder, model)
    )


def encoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """The VAE's encoder: maps images to scaled latents."""
    return Network(
        "encoder", EncoderOnly(autoencoder), model.digest, model.image_shape, None, _work(autoencoder.encoder, model)
    )


def _work(half: nn.Module, model: ModelDescription) -> float:
    return sum(parameter.numel() for parameter in half.parameters()) * model.image_shape[1] * model.image_shape[2]
