"""How weights are trained: AdamW, a warm-up, a cosine decay, a moving average, and checkpoints to go on from."""

import hashlib
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_EVERY = 200  # steps
SHOWN_EVERY = 20

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Pace:
    """The part of a recipe that is here. Each field is explained where it is set, in a .toml file."""

    seed: int
    images: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    ema_decay: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe, which must have all fields and no others."""
        values = tomllib.loads(path.read_text())
        wrong = values.keys() ^ {field.name for field in fields(cls)}
        if wrong:
            raise SystemExit(f"{path}: missing or unknown: {', '.join(sorted(wrong))}")
        return cls(**values)

    @property
    def steps(self) -> int:
        return self.images // self.batch_size


def digest(*parts: Path | str) -> str:
    """A hash over what a checkpoint depends on: files, and words."""
    read = (part.encode() if isinstance(part, str) else part.read_bytes() for part in parts)
    return hashlib.sha256(b"".join(read)).hexdigest()


def random_numbers(seed: int, step: int) -> torch.Generator:
    """A generator of its own for each step, so that a resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate_at(step: int, pace: Pace) -> float:
    """Linear warm-up, then a cosine down to 0."""
    warmup = min(1.0, (step + 1) / pace.warmup_steps)
    return pace.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / pace.steps))


def available_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16, where the device computes in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_computes_in_bfloat16(device))


@cache  # autocast is asked for at every step
def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


class Descent:
    """The state of a training.

    Args:
        network: on its device. Where there is a checkpoint, its weights are read.
        pace: of the training.
        checkpoint: a file to go on from, and to write now and then.
        recipe: a digest; a checkpoint of another recipe is refused.
    """

    def __init__(self, network: nn.Module, pace: Pace, checkpoint: Path, recipe: str) -> None:
        self._network = network
        self._pace = pace
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._first_step = 0
        self._weights = network.state_dict()  # the network's own tensors
        self._average = {key: tensor.clone() for key, tensor in self._weights.items()}
        self._optimiser = torch.optim.AdamW(
            network.parameters(), lr=pace.learning_rate, weight_decay=pace.weight_decay, betas=(0.9, 0.99)
        )
        if checkpoint.exists():
            self._go_on(next(network.parameters()).device)

    def _go_on(self, device: torch.device) -> None:
        saved = torch.load(self._checkpoint, map_location=device, weights_only=True)
        if saved["recipe"] != self._recipe:
            raise SystemExit(f"{self._checkpoint} was made by another recipe: move it away to start again")
        self._network.load_state_dict(saved["network"])
        self._optimiser.load_state_dict(saved["optimiser"])
        self._average, self._first_step = saved["average"], saved["step"]

    def run(self, batch_at: Callable[[int], Batch], loss_of: Callable[[Batch], Tensor]) -> None:
        """Take all steps that are left.

        Args:
            batch_at: makes what a step learns from. Not in a thread beside it, which would bring threads of its own to
                the cores that compute: a step then took half as long again.
            loss_of: computes the loss.
        """
        steps = self._pace.steps
        shown: Tensor | None = None
        bar = tqdm(range(self._first_step, steps), initial=self._first_step, total=steps, unit="step", mininterval=2)
        for step in bar:
            batch = batch_at(step)
            for group in self._optimiser.param_groups:
                group["lr"] = learning_rate_at(step, self._pace)
            loss = loss_of(batch)
            self._optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
            self._optimiser.step()

            decay = min(self._pace.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)
            shown = loss.detach() if shown is None else shown.lerp(loss.detach(), 0.01)
            if step % SHOWN_EVERY == 0:
                bar.set_postfix(loss=f"{shown.item():.4f}", refresh=False)
            if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
                self._save(step + 1)

    def _save(self, step: int) -> None:
        progress: dict[str, Any] = {
            "recipe": self._recipe,
            "step": step,
            "network": self._network.state_dict(),
            "average": self._average,
            "optimiser": self._optimiser.state_dict(),
        }
        save_whole(progress, self._checkpoint)

    def end(self) -> None:
        """Give the network the moving average."""
        self._network.load_state_dict(self._average)


def write(network: nn.Module, path: Path) -> None:
    """Write a network's weights."""
    save_file({key: tensor.contiguous().cpu() for key, tensor in network.state_dict().items()}, path)
    path.chmod(0o644)  # safetensors writes for the owner alone
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def save_whole(content: object, path: Path) -> None:
    """Write a file beside its place first, so that a break never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)
