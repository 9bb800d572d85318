"""Rows through a runner on a small random network, for tests."""

from collections.abc import Iterator

import torch
from torch import nn

from model.backends.backend import Precision
from model.backends.padded import PaddedBackend
from model.rows import Forward, Reading, Row
from model.runner import SlotRunner
from model.unet import DiffusionUNet
from tests.networks import fill

CPU = torch.device("cpu")


def small_network(image_channels: int = 3, gain: float = 1.0) -> DiffusionUNet:
    """Every extra is on. Labels are 0 to 4; 5 is no label."""
    network = DiffusionUNet(
        image_channels,
        16,
        (1, 2),
        norm_groups=4,
        attention_levels=(1,),
        middle_attention=True,
        num_classes=5,
        input_skip=True,
    )
    fill(network, gain=gain)
    return network


def runner_of(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    width: int,
    slots: int = 8,
    precision: Precision = "float32",
) -> SlotRunner:
    backend = PaddedBackend(network, image_shape, precision, width)
    return SlotRunner(backend, image_shape, image_shape[0], no_label=5, slots=slots)


def forwards(row: Row, slot: int) -> list[Forward]:
    """The forward rows of one step."""
    return [Forward(slot, branch) for branch in range(row.forwards_per_step)]


def trajectory(runner: SlotRunner, row: Row) -> Iterator[Reading]:
    """The row's state after each step, running alone."""
    slot = runner.admit(row)
    for _ in range(len(row.table)):
        runner.step(forwards(row, slot))
        yield runner.read(slot)
    runner.release(slot)
