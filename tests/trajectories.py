"""Runs rows on a small random network, for tests."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model.backends.backend import Backend, Precision
from model.backends.network import Denoiser, Shapes, TextDenoiser
from model.backends.torch_cpu import TorchCPUBackend
from model.conditions import Conditions
from model.description import ModelDescription, Recommended, TextDescription
from model.nets.embedder import Embedder
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D
from model.nets.unet_condition import UNet2DCondition
from model.nets.unet_condition_config import UNet2DConditionConfig
from model.nets.unets import UNet
from model.rows import Condition, Forward, Group, Reading, Row
from model.runner import SlotRunner
from model.samplers import StepTable
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


def small_text_network(**fields: Any) -> UNet2DCondition:
    """A UNet2DCondition with changed fields. Each kind of layer has another number of channels."""
    small = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 12,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    network = UNet2DCondition(UNet2DConditionConfig.model_validate({**small, **fields}))
    fill(network)
    return network


class Told(nn.Module):
    """A network for tests. Its subclasses have `forward` with x, timesteps and labels; 5 is no label."""

    embedder = Embedder(
        dim=2,
        of_time=lambda t, _: torch.stack([t.float(), torch.zeros_like(t, dtype=torch.float32)], dim=1),
        of_label=lambda labels: torch.stack([torch.zeros_like(labels), labels], dim=1).float(),
    )

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self(x, emb[:, 0], emb[:, 1].long())
        return out


Model = UNet | Told
TOKENS = 7  # of a context


def network_of(model: Model) -> nn.Module:
    """A model, as a backend runs it."""
    if isinstance(model, UNet2DCondition):
        return TextDenoiser(model)
    return Denoiser(model)  # type: ignore[arg-type]


def shapes_of(model: Model, image_shape: tuple[int, int, int]) -> Shapes:
    """What a model takes."""
    context_dim = model.embedder.context_dim
    context = {} if context_dim is None else {"context": (TOKENS, context_dim)}
    return {"x": image_shape, "emb": (model.embedder.dim,), **context}


def inputs_of(model: Model, x: Tensor, timesteps: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """A pass's inputs for images at these timesteps with these labels, each embedded alone, and random contexts."""
    embedder, emb = model.embedder, []
    for i in range(len(x)):
        emb.append(embedder.of_time(timesteps[i, None], None))
        if embedder.of_label is not None:
            emb[-1] = emb[-1] + embedder.of_label(labels[i, None])
    given = {"x": x, "emb": torch.cat(emb)}
    if embedder.context_dim is not None:
        rng = torch.Generator().manual_seed(4)
        given["context"] = torch.randn((len(x), TOKENS, embedder.context_dim), generator=rng)
    return given


def torch_backend(model: Model, image_shape: tuple[int, int, int], precision: Precision, width: int) -> TorchCPUBackend:
    return TorchCPUBackend(network_of(model), shapes_of(model, image_shape), precision, width)


def runner_of(
    model: Model,
    image_shape: tuple[int, int, int],
    width: int,
    slots: int = 8,
    precision: Precision = "float32",
) -> SlotRunner:
    return runner_on(torch_backend(model, image_shape, precision, width), image_shape, slots, model)


def runner_on(
    backend: Backend, image_shape: tuple[int, int, int], slots: int, model: Model, no_label: int | None = 5
) -> SlotRunner:
    """A runner on a backend of a model. Contexts have TOKENS tokens, if the model takes them."""
    text_length = None if model.embedder.context_dim is None else TOKENS
    return SlotRunner(backend, image_shape, Conditions(model.embedder, backend, no_label, text_length), slots)


def labelled(table: StepTable, seed: int, label: int | None = None, guidance_scale: float = 1.0, **fields: Any) -> Row:
    """A row with a label, guided away from no label if the scale is not 1."""
    own = Condition(label)
    branches = (own,) if guidance_scale == 1 else (own, Condition())
    return Row(table, seed, Group(8, 8), branches=branches, guidance_scale=guidance_scale, **fields)


def description_of(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    num_train_timesteps: int = 1000,
    digest: str = "0" * 64,
) -> ModelDescription:
    """The description of a network. One with text has contexts of TOKENS tokens."""
    return ModelDescription(
        name="small",
        digest=digest,
        architecture="unet_2d" if isinstance(network, UNet2D) else "diffusion_unet",
        image_shape=image_shape,
        sample_shape=image_shape,
        factor=getattr(network, "factor", 1),
        out_channels=image_shape[0],
        first_timestep=0,
        num_classes=None,
        no_label=None,
        class_names=(),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        schedule=Schedule(num_train_timesteps=num_train_timesteps),
        recommended=Recommended(),
        text=TextDescription(TOKENS, 4, 0) if isinstance(network, UNet2DCondition) else None,
    )


def forwards(row: Row, slot: int, line: int) -> list[Forward]:
    """The forward rows of the step of one line."""
    return [Forward(slot, branch, line) for branch in range(row.forwards[line])]


def trajectory(runner: SlotRunner, row: Row) -> Iterator[Reading]:
    """The state of a row after each step, when it runs alone."""
    slot = runner.admit(row)
    for line in range(len(row.table)):
        runner.step(forwards(row, slot, line))
        yield runner.read(slot)
    runner.release(slot)
