"""What a backend runs: a network, and the inputs that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder, DecoderOnly, EncoderOnly
from model.nets.unets import UNet

Shapes = Mapping[str, tuple[int, ...]]  # of one row of each input, by the input's name


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a model.

    Attributes:
        name: denoiser, decoder or encoder.
        module: float32, on the CPU. Its arguments have the names and order of `inputs`, and are float32 [B, …] each.
        digest: ModelDescription.digest.
        inputs: what the network takes: the shape of a row of each input, at the size that the weights were trained for.
            The first is x, (C, h, w). The network takes other heights and widths, too.
        work_per_place: a measure of the work of one row for each place of x.
    """

    name: str
    module: nn.Module
    digest: str
    inputs: Shapes
    work_per_place: float

    def at(self, shape: tuple[int, int, int]) -> Shapes:
        """What the network takes where a row of x is (C, h, w)."""
        return {**self.inputs, "x": shape}

    def work(self, shape: tuple[int, int, int]) -> float:
        """A measure of the work of one row where a row of x is (C, h, w)."""
        return self.work_per_place * shape[1] * shape[2]


class Denoiser(nn.Module):
    """A U-Net as a backend runs it: x [B, C, h, w] and emb [B, D] → predictions.

    emb is the sum of the embeddings of timestep and condition. See model.nets.embedder.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.unet.denoise(x, emb)


def denoiser(unet: UNet, model: ModelDescription) -> Network:
    """The U-Net."""
    inputs = {"x": model.sample_shape, "emb": (unet.embedder.dim,)}
    return Network("denoiser", Denoiser(unet), model.digest, inputs, model.num_parameters)


def decoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """The VAE's decoder: maps the output of Autoencoder.unscaled to images."""
    work = _size(autoencoder.decoder) * autoencoder.config.factor**2
    return Network("decoder", DecoderOnly(autoencoder), model.digest, {"x": model.sample_shape}, work)


def encoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """The VAE's encoder: maps images to scaled latents."""
    work = _size(autoencoder.encoder)
    return Network("encoder", EncoderOnly(autoencoder), model.digest, {"x": model.image_shape}, work)


def _size(half: nn.Module) -> int:
    return sum(parameter.numel() for parameter in half.parameters())
