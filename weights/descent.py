"""The training loop: AdamW, warm-up, cosine decay, moving average, and checkpoints to resume from."""

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
    """The fields that all recipes share. The .toml files explain them."""

    seed: int
    images: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    ema_decay: float

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a recipe. It must have all fields, and no others."""
        values = tomllib.loads(path.read_text())
        wrong = values.keys() ^ {field.name for field in fields(cls)}
        if wrong:
            raise SystemExit(f"{path}: missing or unknown: {', '.join(sorted(wrong))}")
        return cls(**values)

    @property
    def steps(self) -> int:
        return self.images // self.batch_size


def digest(*parts: Path | str) -> str:
    """A hash of files and strings."""
    read = (part.encode() if isinstance(part, str) else part.read_bytes() for part in parts)
    return hashlib.sha256(b"".join(read)).hexdigest()


def random_numbers(seed: int, step: int) -> torch.Generator:
    """The generator of one step. A resumed run draws the same numbers."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate_at(step: int, pace: Pace) -> float:
    """Linear warm-up, then a cosine down to 0."""
    warmup = min(1.0, (step + 1) / pace.warmup_steps)
    return pace.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / pace.steps))


def available_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16, if the device has instructions for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_computes_in_bfloat16(device))


@cache
def _computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


class Descent:
    """A training run.

    Args:
        network: on its device. If there is a checkpoint, the network gets its weights.
        pace: the recipe.
        checkpoint: the file to resume from, written every CHECKPOINT_EVERY steps.
        recipe: a digest. A checkpoint of another recipe is refused.
    """

    def __init__(self, network: nn.Module, pace: Pace, checkpoint: Path, recipe: str) -> None:
        self._network = network
        self._pace = pace
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._first_step = 0
        self._weights = network.state_dict()  # references, not copies
        self._average = {key: tensor.clone() for key, tensor in self._weights.items()}
        self._optimiser = torch.optim.AdamW(
            network.parameters(), lr=pace.learning_rate, weight_decay=pace.weight_decay, betas=(0.9, 0.99)
        )
        if checkpoint.exists():
            self._resume(next(network.parameters()).device)

    def _resume(self, device: torch.device) -> None:
        saved = torch.load(self._checkpoint, map_location=device, weights_only=True)
        if saved["recipe"] != self._recipe:
            raise SystemExit(f"{self._checkpoint} was made by another recipe: move it away to start again")
        self._network.load_state_dict(saved["network"])
        self._optimiser.load_state_dict(saved["optimiser"])
        self._average, self._first_step = saved["average"], saved["step"]

    def run(self, batch_at: Callable[[int], Batch], loss_of: Callable[[Batch], Tensor]) -> None:
        """Run all remaining steps.

        Args:
            batch_at: makes the batch of a step. It runs in this thread: another thread would start torch threads of its
                own, and a step then took 1.5 times as long.
            loss_of: computes the loss of a batch.
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
    path.chmod(0o644)  # safetensors lets only the owner read
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def save_whole(content: object, path: Path) -> None:
    """Write a file under another name and rename it, so that an interruption never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    partial.replace(path)
