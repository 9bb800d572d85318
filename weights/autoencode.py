"""Train the VAE of the weights in the box.

    python -m weights.autoencode weights/emoji

Reads config.json and autoencoder.toml from the folder, and writes autoencoder.safetensors there. An interrupted run
resumes, as in weights/train.py. Run weights/train.py next: it trains the U-Net on the latents.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.checkpoints import native
from model.nets.autoencoder import Autoencoder
from weights import data, descent
from weights.descent import Descent, Pace, random_numbers

RECIPE = "autoencoder.toml"
_AT_ONCE = 250  # images of one pass without gradients


@dataclass(frozen=True)
class Autoencoding(Pace):
    """The fields of autoencoder.toml, which explains them."""

    data: str
    kl_weight: float


class Examples(NamedTuple):
    """The batch of a step: images, and unit noise for their latents."""

    x: Tensor
    noise: Tensor


def examples_at(step: int, x: Tensor, recipe: Autoencoding, latent_shape: tuple[int, ...]) -> Examples:
    """The images [B, C, H, W] of one step, randomly mirrored and with randomly permuted channels, and noise."""
    chosen = data.chosen(step, torch.arange(len(x)), recipe.batch_size, recipe.seed)
    rng = random_numbers(recipe.seed, step)
    colours = torch.randperm(x.shape[1], generator=rng)
    mirrored = torch.rand(2, generator=rng) < 0.5
    images = x[chosen][:, colours].flip([axis for axis in (2, 3) if mirrored[axis - 2]])
    return Examples(images, torch.randn((len(images), *latent_shape), generator=rng))


def loss_of(autoencoder: Autoencoder, examples: Examples, kl_weight: float) -> Tensor:
    """The mean absolute error of pixels + kl_weight × the Kullback-Leibler divergence of the latents from unit noise.

    Kingma & Welling 2013, arXiv:1312.6114, eq. 10, averaged over the latents.
    """
    mean, log_variance = autoencoder.moments(examples.x).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    decoded = autoencoder.decode_unscaled(mean + torch.exp(0.5 * log_variance) * examples.noise)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return (decoded.float() - examples.x).abs().mean() + kl_weight * divergence.mean()


@torch.inference_mode()
def encoded(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """The scaled latents of images."""
    return torch.cat([autoencoder.encode(part) for part in torch.split(x, _AT_ONCE)])


@torch.inference_mode()
def standardise(autoencoder: Autoencoder, x: Tensor) -> None:
    """Change the convolutions around the latents, so that each channel has mean 0 and variance 1 for these images."""
    outward, inward = autoencoder.quant_conv, autoencoder.post_quant_conv
    assert outward is not None
    assert outward.bias is not None
    assert inward is not None
    assert inward.bias is not None
    z = encoded(autoencoder, x)
    mean, std = z.mean((0, 2, 3)) / autoencoder.config.scaling_factor, z.std((0, 2, 3))
    outward.weight[: len(mean)] /= std[:, None, None, None]
    outward.bias[: len(mean)] = (outward.bias[: len(mean)] - mean) / std
    inward.bias += inward.weight[:, :, 0, 0] @ mean
    inward.weight *= std[:, None, None]


def train(folder: Path) -> None:
    config = native.read_config(folder)
    if config.autoencoder is None or config.autoencoder.kind != "kl":
        raise SystemExit(f"{folder / native.CONFIG}: the recipe trains an autoencoder of kind kl, and there is none")
    recipe = Autoencoding.read(folder / RECIPE)
    split = data.load(folder / recipe.data)
    device = descent.available_device()

    torch.manual_seed(recipe.seed)
    autoencoder = Autoencoder(config.autoencoder)
    nn.init.zeros_(autoencoder.decoder.conv_out.weight)
    autoencoder.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch_at(step: int) -> Examples:
        return examples_at(step, split.train_x, recipe, config.sample_shape)

    def loss(examples: Examples) -> Tensor:
        on_device = Examples(*(part.to(device) for part in examples))
        with descent.autocast(device):
            return loss_of(autoencoder, on_device, recipe.kl_weight)

    made_of = descent.digest(config.autoencoder.model_dump_json(), folder / RECIPE)
    work = Descent(autoencoder, recipe, folder / "work" / "autoencoder.pt", made_of)
    work.run(batch_at, loss)
    work.end()
    standardise(autoencoder, split.train_x)
    descent.write(autoencoder, folder / native.AUTOENCODER)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.autoencode", description="Train a VAE.")
    parser.add_argument("folder", type=Path, help="a folder with config.json and autoencoder.toml, e.g. weights/emoji")
    train(parser.parse_args().folder)


if __name__ == "__main__":
    main()
