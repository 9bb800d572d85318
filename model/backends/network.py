"""What a backend runs: a network, and the inputs that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder, DecoderOnly, EncoderOnly
from model.nets.clip import CLIPText
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D
from model.nets.unet_condition import UNet2DCondition
from model.nets.unets import UNet

Shapes = Mapping[str, tuple[int, ...]]  # of one row of each input, by the input's name


@dataclass(frozen=True, slots=True)
class Network:
    """A network of a model.

    Attributes:
        name: denoiser, decoder, encoder, text encoder or text encoder 2.
        module: on the CPU. Its parameters may be in half precision. Its arguments have the names and order of `inputs`,
            and are float32 [B, …] each.
        digest: ModelDescription.digest.
        inputs: what the network takes: the shape of a row of each input, at the size that the weights were trained for.
            The first is x: images or latents, (C, h, w), or embedded tokens, (N, C). The network takes other heights
            and widths, too.
        work_per_value: a measure of the work of one row for each value of x.
        factor: height and width of x must be multiples of this.
    """

    name: str
    module: nn.Module
    digest: str
    inputs: Shapes
    work_per_value: float
    factor: int = 1

    def at(self, shape: tuple[int, ...]) -> Shapes:
        """What the network takes where a row of x has this shape."""
        return {**self.inputs, "x": shape}

    def work(self, shape: tuple[int, ...]) -> float:
        """A measure of the work of one row where a row of x has this shape."""
        return self.work_per_value * prod(shape)


class Denoiser(nn.Module):
    """A U-Net without text as a backend runs it: x [B, C, h, w] and emb [B, D] → predictions.

    emb is the sum of the embeddings of timestep and condition. See model.nets.embedder.
    """

    def __init__(self, unet: DiffusionUNet | UNet2D) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.unet.denoise(x, emb)


class TextDenoiser(nn.Module):
    """A U-Net with text as a backend runs it: x, emb and context [B, tokens, channels] → predictions."""

    def __init__(self, unet: UNet2DCondition) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        return self.unet.denoise(x, emb, context)


def denoiser(unet: UNet, model: ModelDescription) -> Network:
    """The U-Net."""
    shape = model.input_shape_of(model.group)
    inputs: dict[str, tuple[int, ...]] = {"x": shape, "emb": (unet.embedder.dim,)}
    if isinstance(unet, UNet2DCondition):
        assert model.text is not None
        inputs["context"] = model.text.length, unet.config.context_dim
        module: nn.Module = TextDenoiser(unet)
    else:
        module = Denoiser(unet)
    return Network("denoiser", module, model.digest, inputs, model.num_parameters / shape[0], unet.factor)


def decoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """The VAE's decoder: maps the output of Autoencoder.unscaled to images."""
    work = _size(autoencoder.decoder) * autoencoder.config.factor**2 / model.sample_shape[0]
    return Network("decoder", DecoderOnly(autoencoder), model.digest, {"x": model.sample_shape}, work)


def encoder(autoencoder: Autoencoder, model: ModelDescription) -> Network:
    """The VAE's encoder: maps images to the distribution of their latents."""
    work = _size(autoencoder.encoder) / model.image_shape[0]
    inputs = {"x": model.image_shape}
    return Network("encoder", EncoderOnly(autoencoder), model.digest, inputs, work, autoencoder.config.factor)


def text_encoder(clip: CLIPText, model: ModelDescription, number: int = 1) -> Network:
    """A text encoder between the embeddings of tokens and the last norm: maps them to the outputs of all layers.

    Args:
        number: 1 or 2: which of the model's text encoders this is.
    """
    assert model.text is not None
    inputs = {"x": (model.text.length, clip.config.hidden_size)}
    work = _size(clip.encoder) / clip.config.hidden_size
    name = "text encoder" if number == 1 else f"text encoder {number}"
    return Network(name, clip.encoder, model.digest, inputs, work)


def _size(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())
