"""Train the weights in the box.

    python -m weights.train weights/digits

Reads config.json (network and schedule) and training.toml from the folder, and writes model.safetensors there: the
moving average of the weights. Started again after a break, it goes on from the last checkpoint in FOLDER/work, and
draws the same random numbers as if it had not been interrupted. bf16 autocast where the CPU or GPU computes in it.
"""

import argparse
import hashlib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from model.checkpoints import native
from model.checkpoints.config import DiffusionUNetConfig
from model.schedule import Schedule
from model.unet import DiffusionUNet
from weights import data

CHECKPOINT_EVERY = 200  # steps


@dataclass(frozen=True)
class Training:
    """training.toml, which explains each field."""

    data: str
    seed: int
    images: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    label_dropout: float
    max_shift: int
    ema_decay: float

    @classmethod
    def read(cls, path: Path) -> "Training":
        values = tomllib.loads(path.read_text())
        wrong = values.keys() ^ {field.name for field in fields(cls)}
        if wrong:
            raise SystemExit(f"{path}: missing or unknown: {', '.join(sorted(wrong))}")
        return cls(**values)


def random_numbers(seed: int, step: int) -> torch.Generator:
    """A generator of its own for each step, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def batch_at(step: int, split: data.Split, training: Training, no_label: int) -> tuple[Tensor, Tensor]:
    """Images [B, 1, H, W], shifted by up to max_shift pixels, and labels [B], some dropped, of one step."""
    steps_an_epoch = len(split.train_x) // training.batch_size
    epoch, place = divmod(step, steps_an_epoch)
    order = torch.randperm(len(split.train_x), generator=random_numbers(training.seed, -1 - epoch))
    chosen = order[place * training.batch_size : (place + 1) * training.batch_size]
    rng = random_numbers(training.seed, step)

    x, y = split.train_x[chosen], split.train_y[chosen].clone()
    y[torch.rand(len(y), generator=rng) < training.label_dropout] = no_label
    return data.shifted(x, training.max_shift, rng), y


def noised(x_0: Tensor, schedule: Schedule, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw timesteps, spread evenly over the batch, and noise. Return x_t, t and what the network should predict."""
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
    """Let each residual branch, and the output, begin at zero: large learning rates are then stable."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and name.split(".")[-1] in ("conv2", "proj", "final_conv"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def learning_rate_at(step: int, steps: int, training: Training) -> float:
    """Linear warm-up, then a cosine down to 0."""
    warmup = min(1.0, (step + 1) / training.warmup_steps)
    return training.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def train(folder: Path) -> None:
    config = native.read_config(folder)
    if not isinstance(config, DiffusionUNetConfig):
        raise SystemExit(f"{folder / native.CONFIG}: the recipe trains diffusion_unet, not {config.architecture}")
    training = Training.read(folder / "training.toml")
    split = data.load(folder / training.data)
    no_label = 0 if config.num_classes is None else config.num_classes
    steps = training.images // training.batch_size
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(training.seed)
    network = config.build()
    initialise(network)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, betas=(0.9, 0.99)
    )
    checkpoint = folder / "work" / "training.pt"
    first_step = 0
    recipe = recipe_digest(folder)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        if saved["recipe"] != recipe:
            raise SystemExit(f"{checkpoint} was made by another recipe: move it away to start again")
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        average, first_step = saved["average"], saved["step"]

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device))
    bar = tqdm(range(first_step, steps), initial=first_step, total=steps, unit="step", mininterval=2)
    smooth_loss = 1.0
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = learning_rate_at(step, steps, training)
        x_0, labels = batch_at(step, split, training, no_label)
        x_t, t, target = noised(x_0, config.schedule, random_numbers(training.seed + 1, step))
        with autocast:
            out = network(x_t.to(device), t.to(device), labels.to(device))
            loss = (out - target.to(device)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()

        decay = min(training.ema_decay, (1 + step) / (10 + step))
        for key, tensor in network.state_dict().items():
            average[key].lerp_(tensor, 1 - decay)
        smooth_loss += 0.01 * (loss.item() - smooth_loss)
        bar.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            progress = {
                "recipe": recipe,
                "step": step + 1,
                "network": network.state_dict(),
                "average": average,
                "optimiser": optimiser.state_dict(),
            }
            save_checkpoint(checkpoint, progress)

    target_path = folder / native.WEIGHTS
    save_file({key: tensor.contiguous().cpu() for key, tensor in average.items()}, target_path)
    target_path.chmod(0o644)  # safetensors writes for the owner alone
    print(f"{target_path}: {target_path.stat().st_size / 2**20:.1f} MiB")


def recipe_digest(folder: Path) -> str:
    """A hash over what a checkpoint depends on: the network, its schedule and the training."""
    return hashlib.sha256((folder / native.CONFIG).read_bytes() + (folder / "training.toml").read_bytes()).hexdigest()


def save_checkpoint(path: Path, progress: Mapping[str, object]) -> None:
    """Write the checkpoint beside its place first, so that a break never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(progress, partial)
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.train", description="Train the weights in the box.")
    parser.add_argument("folder", type=Path, help="a folder with config.json and training.toml, such as weights/digits")
    train(parser.parse_args().folder)


if __name__ == "__main__":
    main()
