"""Sums of our own arithmetic, for each version in service.plan.served.ARITHMETIC.

A change that changes a bit raises the version, and adds its sums here: `python -m tests.test_arithmetic` prints them.

Machines differ in the last bits, so sums have a tolerance. This test cannot find changes of last bits only.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.lines import Column
from model.nets.autoencoder import Autoencoder, AutoencoderConfig
from model.nets.clip import CLIPText, CLIPTextConfig, CLIPTextWithProjectionConfig
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D, UNet2DConfig
from model.nets.unet_condition import UNet2DCondition
from model.nets.unet_condition_config import UNet2DConditionConfig
from model.noise import first_draw
from model.rows import Image
from model.samplers import SAMPLERS, StepTable, denoise_table, sample_table
from model.schedule import Schedule
from model.update import guided, remembered, rescaled, update
from service.http.formats import contact_sheet
from service.http.png import encode_png, to_uint8
from service.plan.served import ARITHMETIC
from tests.test_responses import planned


def waves(*shape: int) -> Tensor:
    """Numbers from −1 to 1, always the same."""
    i = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (((i * 37) % 101) / 50 - 1).reshape(shape).float()


def weighed(values: object) -> float:
    """A weighted sum of all values, with different weights. Values that are not finite count as 9."""
    flat = np.nan_to_num(np.asarray(values, np.float64).ravel(), nan=9, posinf=9, neginf=9)
    return float(flat @ (1 + np.arange(len(flat)) % 89))


def filled(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
        parameter.detach().copy_(waves(*parameter.shape) / fan_in**0.5)
    return network.requires_grad_(False).eval()


SCHEDULES = [
    *(Schedule(beta_schedule=name) for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")),
    Schedule(variance_type="learned_range", clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    Schedule(variance_type="fixed_large", timestep_spacing="linspace", thresholding=True),
    Schedule(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    Schedule(prediction_type="sample", num_train_timesteps=100),
]


# Samplers as old as the version, and younger ones: a new one moves no bit.
EARLIER = ["ddim", "ddpm", "dpmpp_2m", "pndm", "euler", "euler_a"]
YOUNGER = ["dpmpp_2m_sde", "heun", "unipc", "tcd"]


def all_tables(samplers: Collection[str]) -> list[StepTable]:
    return [
        table
        for schedule in SCHEDULES
        for sampler in samplers
        for eta in ((0.0, 0.5) if SAMPLERS[sampler].takes_eta else (0.0,))
        for table in (sample_table(schedule, sampler, 7, eta), denoise_table(schedule, sampler, 60, 5, eta))
    ]


def tables(samplers: Collection[str] = EARLIER) -> float:
    lines = [table.lines for table in all_tables(samplers)]
    return weighed(np.arcsinh(np.concatenate(lines)))  # arcsinh: no line dominates


def grids(samplers: Collection[str] = EARLIER) -> float:
    return weighed(np.concatenate([table.timesteps for table in all_tables(samplers)]))


def lcm() -> float:
    return tables(["lcm"]) + grids(["lcm"])


def younger() -> float:
    return tables(YOUNGER) + grids(YOUNGER)


def schedules() -> float:
    return weighed([schedule.alphas_cumprod.sum() for schedule in SCHEDULES])


def steps() -> float:
    """The update and guidance, using every column."""
    x, out, m_1, noise, m_2, m_3 = (waves(3, 2, 4, 4) * k for k in (1, 0.7, 0.4, 1.3, 0.3, 0.9))
    memories = [m_1, m_2, m_3]
    lines = waves(3, len(Column)) + 1.5
    lines[:, Column.BOUND] = 0.8
    lines[0, Column.QUANTILE], lines[0, Column.MAXIMUM] = 0.9, 1.5
    plain = update(x, out, memories, noise, lines, [0])
    learned = update(x, torch.cat([out, waves(3, 2, 4, 4)], dim=1), memories, noise, lines, [])
    left = remembered(x, plain[1], out, lines)
    combined = guided([x, out], torch.tensor([1.0, 2.0, 7.5]))
    balanced = rescaled(combined, out, torch.tensor([0.0, 0.7, 1.0]))
    return weighed(torch.stack([*plain, *learned, left, combined, balanced]))


def noise() -> float:
    return weighed(np.stack([first_draw(seed, (1, 8, 8)) for seed in (0, 7, 2**53 - 1)]))


@torch.inference_mode()
def networks() -> float:
    t, labels = torch.tensor([3, 900]), torch.tensor([0, 2])
    skeleton = DiffusionUNet(
        3, 8, (1, 2), norm_groups=4, attention_levels=(1,), middle_attention=True, num_classes=2, input_skip=True
    )
    blocks = UNet2DConfig(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vae = Autoencoder(AutoencoderConfig(kind="kl", latent_channels=3, block_out_channels=(8, 12), norm_num_groups=4))
    filled(vae)
    x = waves(2, 3, 8, 8)
    outputs = [filled(skeleton)(x, t, labels), filled(UNet2D(blocks))(x, t), vae.encode(x)]
    return weighed(torch.cat([out.flatten() for out in outputs]))


@torch.inference_mode()
def text_networks() -> float:
    clip = CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    condition = UNet2DConditionConfig(
        block_out_channels=(8, 16),
        layers_per_block=(1,),
        norm_num_groups=4,
        attention_head_dim=(2,),
        cross_attention_dim=(8,),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    encoder = filled(CLIPText(clip))
    context = torch.cat([encoder(torch.tensor([[3, 14, 15, 9]]), clip_skip) for clip_skip in (0, 1)])
    return weighed(filled(UNet2DCondition(condition))(waves(2, 4, 8, 8), torch.tensor([3, 900]), context))


@torch.inference_mode()
def told_networks() -> float:
    """Networks that are told sizes (SDXL), guidance (LCM), or both, and the pooled text of a second encoder."""
    clip = CLIPTextWithProjectionConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        hidden_act="gelu", projection_dim=6, eos_token_id=2,
    )  # fmt: skip
    sizes: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 54,
    }
    guidance: dict[str, Any] = {"time_cond_proj_dim": 8}
    ids = torch.tensor([[3, 14, 15, 9], [3, 15, 9, 9]])
    encoder = CLIPText(clip)
    filled(encoder)
    states = encoder.encoder(encoder.embeddings(ids))
    assert encoder.pooler is not None
    pooled = encoder.pooler(states[:, -1], ids)
    time_ids = torch.tensor([[64, 64, 0, 0, 64, 64], [96, 64, 8, 3, 104, 128]])
    outputs = []
    for fields in (sizes, guidance, {**sizes, **guidance}):
        config = UNet2DConditionConfig(
            block_out_channels=(8, 16),
            layers_per_block=(1,),
            norm_num_groups=4,
            attention_head_dim=(2,),
            cross_attention_dim=(8,),
            use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2D",
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=((1,), (2,)),
            **fields,
        )
        given: dict[str, Any] = {"w": torch.tensor([0.02, 0.3])} if "time_cond_proj_dim" in fields else {}
        given |= {"added": (pooled, time_ids)} if "addition_embed_type" in fields else {}
        network = filled(UNet2DCondition(config))
        outputs.append(network(waves(2, 4, 8, 8), torch.tensor([3.25, 900.0]), states[:, -2], **given))
    return weighed(torch.cat(outputs))


SUMS: dict[int, dict[str, float]] = {
    2: {
        "schedules": 14252.558824417616,
        "tables": 115919.64789755261,
        "grids": 4996292.0,
        "steps": 9102.099634431303,
        "noise": -169.6767815592466,
        "networks": -2297.7193843779387,
    },
    3: {
        "schedules": 14252.558824417616,
        "tables": 115919.64789755261,
        "grids": 4996292.0,
        "steps": 9102.099634431303,
        "noise": -169.6767815592466,
        "networks": -2297.7193843779387,
    },
    4: {
        "schedules": 14252.558824417616,
        "tables": 285003.50136063795,
        "grids": 9253514.0,
        "steps": 3093.4636219274253,
        "noise": -169.6767815592466,
        "networks": -2297.7193843779387,
        "text networks": -1616.3620989061892,
        "lcm": 1535928.4033729266,
        "younger samplers": 8692695.377142929,
        "told networks": -6121.760492254049,
    },
}
PARTS: dict[str, tuple[Callable[[], float], float]] = {  # with the relative tolerance of the sum
    "lcm": (lcm, 1e-11),
    "younger samplers": (younger, 1e-11),
    "schedules": (schedules, 1e-12),
    "tables": (tables, 1e-11),
    "grids": (grids, 0),
    "steps": (steps, 1e-5),
    "noise": (noise, 1e-4),
    "networks": (networks, 1e-5),
    "text networks": (text_networks, 1e-5),
    "told networks": (told_networks, 1e-5),
}


@pytest.mark.parametrize("part", PARTS)
def test_who_moves_a_bit_raises_the_number(part: str) -> None:
    compute, tolerance = PARTS[part]
    assert compute() == pytest.approx(SUMS[ARITHMETIC][part], rel=tolerance)


# Exact on every machine.

TEXTS: dict[int, dict[str, str]] = {
    2: {
        "colours": "e8cc7c2f5ca660e3",
        "recipes": "a964ddd9be046b49",
        "before the pixels": "fa91d6a2a275d837",
    },
    3: {
        "colours": "e8cc7c2f5ca660e3",
        "recipes": "a964ddd9be046b49",
        "before the pixels": "fa91d6a2a275d837",
    },
    4: {
        "colours": "e8cc7c2f5ca660e3",
        "recipes": "a964ddd9be046b49",
        "before the pixels": "167eaaaca47b7922",
    },
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def texts() -> dict[str, str]:
    images: list[Image] = [waves(1, 4, 4).mul(k).numpy() for k in (1.0, 0.5, 1.2)]
    plan = planned(num_images=3, class_label=["zero", None, 2], sampler="ddim", eta=0.25)
    sheet = encode_png(contact_sheet(images), plan.canonical)
    return {
        "colours": sha256(b"".join(to_uint8(image).tobytes() for image in [*images, contact_sheet(images)])),
        "recipes": sha256(json.dumps(plan.recipes, sort_keys=True).encode()),
        "before the pixels": sha256(sheet[: sheet.index(b"IDAT") - 4]),
    }


def test_who_changes_recipes_or_colours_raises_the_number() -> None:
    assert texts() == TEXTS[ARITHMETIC]


if __name__ == "__main__":
    print(ARITHMETIC, {part: compute() for part, (compute, _) in PARTS.items()}, texts())
