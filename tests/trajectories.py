"""Runs rows on a small random network, for tests."""

from collections.abc import Iterator

import torch
from torch import nn

from model.backends.backend import Backend, Precision
from model.backends.torch_cpu import TorchCPUBackend
from model.description import ModelDescription, Recommended
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D
from model.rows import Forward, Reading, Row
from model.runner import SlotRunner
from model.schedule import Schedule
from tests.networks import fill

CPU = torch.device("cpu")


def small_network(image_channels: int = 3, gain: float = 1.0) -> DiffusionUNet:
    """A DiffusionUNet with all extras. Labels are 0 to 4; 5 means no label."""
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
    return runner_on(TorchCPUBackend(network, image_shape, precision, width), image_shape, slots)


def runner_on(backend: Backend, image_shape: tuple[int, int, int], slots: int) -> SlotRunner:
    return SlotRunner(backend, image_shape, no_label=5, slots=slots)


def description_of(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    num_train_timesteps: int = 1000,
    digest: str = "0" * 64,
) -> ModelDescription:
    """The Network of a module."""
    return ModelDescription(
        name="small",
        digest=digest,
        architecture="unet_2d" if isinstance(network, UNet2D) else "diffusion_unet",
        image_shape=image_shape,
        sample_shape=image_shape,
        out_channels=image_shape[0],
        first_timestep=0,
        num_classes=None,
        no_label=None,
        class_names=(),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        schedule=Schedule(num_train_timesteps=num_train_timesteps),
        recommended=Recommended(),
    )


def forwards(row: Row, slot: int, line: int) -> list[Forward]:
    """The forward rows of the step of one line."""
    return [Forward(slot, branch, line) for branch in range(row.forwards_per_step)]


def trajectory(runner: SlotRunner, row: Row) -> Iterator[Reading]:
    """The state of a row after each step, when it runs alone."""
    slot = runner.admit(row)
    for line in range(len(row.table)):
        runner.step(forwards(row, slot, line))
        yield runner.read(slot)
    runner.release(slot)
