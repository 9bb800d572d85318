"""What a backend runs: a network, and what is known of it."""

from dataclasses import dataclass

from torch import nn

from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder, DecoderOnly, EncoderOnly


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a model.

    Attributes:
        name: denoiser, decoder or encoder.
        module: in float32 on the CPU. It maps x, timesteps and labels to its output; where there are no timesteps, x
            alone, and passes over the others.
        digest: of the model's weights.
        input_shape: of x without its rows, (C, H, W).
        num_train_timesteps: how many there are; None where it knows none.
        work: of a row, in some unit.
    """

    name: str
    module: nn.Module
    digest: str
    input_shape: tuple[int, int, int]
    num_train_timesteps: int | None
    work: float


def denoiser(module: nn.Module, model: ModelDescription) -> Network:
    """What denoises."""
    shape = model.sample_shape
    work = model.num_parameters * shape[1] * shape[2]
    return Network("denoiser", module, model.digest, shape, model.schedule.num_train_timesteps, work)


def decoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """What makes images of latents, as Autoencoder.unscaled gives them."""
    return Network(
        "decoder", DecoderOnly(autoencoder), model.digest, model.sample_shape, None, _work(autoencoder.decoder, model)
    )


def encoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """What makes latents of images."""
    return Network(
        "encoder", EncoderOnly(autoencoder), model.digest, model.image_shape, None, _work(autoencoder.encoder, model)
    )


def _work(half: nn.Module, model: ModelDescription) -> float:
    return sum(parameter.numel() for parameter in half.parameters()) * model.image_shape[1] * model.image_shape[2]
