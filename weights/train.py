"""Train the weights in the box.

    python -m weights.train weights/digits

Reads config.json (network and schedule) and training.toml from the folder, and writes model.safetensors there: the
moving average of the weights. An interrupted run resumes from the last checkpoint in FOLDER/work, with the random
numbers of an uninterrupted one. Computes in bfloat16 if the device has instructions for it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.checkpoints import native
from model.checkpoints.config import DiffusionUNetConfig
from model.checkpoints.load import load_autoencoder
from model.nets.unet import DiffusionUNet
from model.schedule import Schedule
from weights import autoencode, data, descent
from weights.descent import Descent, Pace, random_numbers


@dataclass(frozen=True)
class Training(Pace):
    """The fields of training.toml, which explains them."""

    data: str
    class_power: float
    label_dropout: float
    max_shift: int
    min_snr_gamma: float


class Examples(NamedTuple):
    """The batch of a step: noisy images, timesteps, labels, targets of the prediction, and weights of the loss."""

    x_t: Tensor
    t: Tensor
    labels: Tensor
    target: Tensor
    weight: Tensor


def batch_at(step: int, x: Tensor, y: Tensor, deck: Tensor, training: Training, no_label: int) -> tuple[Tensor, Tensor]:
    """The batch of one step: images [B, C, H, W] of x, shifted at random, and labels [B] of y, some dropped."""
    chosen = data.chosen(step, deck, training.batch_size, training.seed)
    rng = random_numbers(training.seed, step)
    x, y = x[chosen], y[chosen].clone()
    y[torch.rand(len(y), generator=rng) < training.label_dropout] = no_label
    return data.shifted(x, training.max_shift, rng), y


def noised(x_0: Tensor, schedule: Schedule, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw timesteps, spread evenly over the batch, and noise. Return x_t, t and the target of the prediction."""
    T, B = schedule.num_train_timesteps, len(x_0)
    t = ((torch.randperm(B, generator=rng) + torch.rand(B, generator=rng)) * T / B).long()
    noise = torch.randn(x_0.shape, generator=rng)
    alpha_bar = torch.from_numpy(schedule.alphas_cumprod[t.numpy()].astype(np.float32))[:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    match schedule.prediction_type:
        case "epsilon":
            target = noise
        case "v_prediction":  # Salimans & Ho 2022, arXiv:2202.00512, section 4
            target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
        case "sample":
            target = x_0
    return x_t, t, target


def initialise(network: DiffusionUNet) -> None:
    """Start each residual branch and the output at zero. Large learning rates are then stable."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and name.split(".")[-1] in ("conv2", "proj", "final_conv"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def loss_weights(t: Tensor, schedule: Schedule, gamma: float) -> Tensor:
    """The loss weights of v predictions at timesteps t [B]: min(SNR, γ)/(SNR + 1), or 1 if γ is 0.

    Hang et al. 2023, arXiv:2303.09556, section 3.4.
    """
    if gamma == 0:
        return torch.ones(len(t))
    alpha_bar = torch.from_numpy(schedule.alphas_cumprod[t.numpy()])
    snr = alpha_bar / (1 - alpha_bar)
    return (snr.clamp(max=gamma) / (snr + 1)).float()


def train(folder: Path) -> None:
    config = native.read_config(folder)
    if not isinstance(config, DiffusionUNetConfig):
        raise SystemExit(f"{folder / native.CONFIG}: the recipe trains diffusion_unet, not {config.architecture}")
    recipe = folder / "training.toml"
    training = Training.read(recipe)
    if training.min_snr_gamma and config.schedule.prediction_type != "v_prediction":
        raise SystemExit(f"{recipe}: min_snr_gamma is for v_prediction, and must be 0 here")
    split = data.load(folder / training.data)
    x, y, deck = split.train_x, split.train_y, data.evened(split.train_y, training.class_power)
    made_of = [folder / native.CONFIG, recipe]
    if config.autoencoder is not None:
        x = autoencode.encoded(load_autoencoder(folder), x)
        made_of.append(folder / autoencode.RECIPE)
    no_label = 0 if config.num_classes is None else config.num_classes
    device = descent.available_device()

    torch.manual_seed(training.seed)
    network = config.build()
    initialise(network)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def examples_at(step: int) -> Examples:
        x_0, labels = batch_at(step, x, y, deck, training, no_label)
        x_t, t, target = noised(x_0, config.schedule, random_numbers(training.seed + 1, step))
        return Examples(x_t, t, labels, target, loss_weights(t, config.schedule, training.min_snr_gamma))

    def loss_of(examples: Examples) -> Tensor:
        x_t, t, labels, target, weight = (part.to(device) for part in examples)
        with descent.autocast(device):
            out = network(x_t, t, labels)
        loss: Tensor = ((out.float() - target).square().mean((1, 2, 3)) * weight).mean()
        return loss

    settled = config.model_dump_json(exclude={"name", "class_names", "recommended"})  # these may change later
    latents_of = [] if config.autoencoder is None else [folder / native.AUTOENCODER]
    work = Descent(network, training, folder / "work" / "training.pt", descent.digest(settled, recipe, *latents_of))
    work.run(examples_at, loss_of)
    work.end()
    descent.write(network, folder / native.WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.train", description="Train the weights in the box.")
    parser.add_argument("folder", type=Path, help="a folder with config.json and training.toml, such as weights/digits")
    train(parser.parse_args().folder)


if __name__ == "__main__":
    main()
