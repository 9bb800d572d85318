"""The Diffusion U-Net: the bare skeleton against one built from its description alone, and each extra."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.unet import DiffusionUNet

SKELETONS = [
    (3, 8, (1, 2, 4)),
    (1, 6, (1,)),
    (2, 4, (1, 1)),
    (3, 4, (1, 3, 2)),
    (4, 2, (1, 2, 2, 5)),
]
SIZES = [(16, 16), (16, 32), (48, 16)]


def skeleton_weights(in_ch: int, model_ch: int, ch_mult: Sequence[int]) -> dict[str, Tensor]:
    """Random weights by the keys that the description gives the skeleton."""
    rng = torch.Generator().manual_seed(1)
    weights = {}

    def parameters(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = torch.randn(shape, generator=rng) / math.prod(shape[1:]) ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=rng) / 4

    def resnet_block(name: str, before: int, after: int) -> None:
        parameters(f"{name}.conv1", after, before, 3, 3)
        parameters(f"{name}.time_mlp", after, 4 * model_ch)
        parameters(f"{name}.conv2", after, after, 3, 3)
        if before != after:
            parameters(f"{name}.shortcut", after, before, 1, 1)

    parameters("time_embed.0", 4 * model_ch, model_ch)
    parameters("time_embed.2", 4 * model_ch, 4 * model_ch)
    parameters("input_conv", model_ch, in_ch, 3, 3)
    channels = model_ch
    for level, multiplier in enumerate(ch_mult):
        resnet_block(f"downs.{2 * level}", channels, multiplier * model_ch)
        channels = multiplier * model_ch
        parameters(f"downs.{2 * level + 1}.conv", channels, channels, 3, 3)
    resnet_block("middle", channels, channels)
    for level, multiplier in enumerate(reversed(ch_mult)):
        resnet_block(f"ups.{2 * level}", channels + multiplier * model_ch, multiplier * model_ch)
        channels = multiplier * model_ch
        parameters(f"ups.{2 * level + 1}.conv", channels, channels, 3, 3)
    parameters("final_conv", in_ch, model_ch, 3, 3)
    return weights


def skeleton(weights: dict[str, Tensor], ch_mult: Sequence[int], x: Tensor, t: Tensor) -> Tensor:
    """What the description says that the skeleton computes."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=stride, padding=1)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def resnet_block(name: str, x: Tensor) -> Tensor:
        h = conv(f"{name}.conv1", F.silu(x))
        h = h + linear(f"{name}.time_mlp", F.silu(t_emb))[:, :, None, None]
        h = conv(f"{name}.conv2", F.silu(h))
        if f"{name}.shortcut.weight" in weights:
            x = F.conv2d(x, weights[f"{name}.shortcut.weight"], weights[f"{name}.shortcut.bias"])
        return h + x

    half = weights["time_embed.0.weight"].shape[1] // 2
    f = torch.tensor([10000 ** (-k / half) for k in range(half)])
    t_emb = torch.cat([torch.sin(t[:, None] * f), torch.cos(t[:, None] * f)], dim=1)
    t_emb = linear("time_embed.2", F.silu(linear("time_embed.0", t_emb)))

    x = conv("input_conv", x)
    skips = []
    for level in range(len(ch_mult)):
        x = resnet_block(f"downs.{2 * level}", x)
        x = conv(f"downs.{2 * level + 1}.conv", x, stride=2)
        skips.append(x)
    x = resnet_block("middle", x)
    for level in range(len(ch_mult)):
        x = resnet_block(f"ups.{2 * level}", torch.cat([x, skips.pop()], dim=1))
        x = conv(f"ups.{2 * level + 1}.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
    return conv("final_conv", x)


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("in_ch", "model_ch", "ch_mult"), SKELETONS)
def test_bare_network_is_the_skeleton(
    in_ch: int, model_ch: int, ch_mult: tuple[int, ...], height: int, width: int
) -> None:
    weights = skeleton_weights(in_ch, model_ch, ch_mult)
    network = DiffusionUNet(in_ch, model_ch, ch_mult)
    assert shapes(network.state_dict()) == shapes(weights)
    network.load_state_dict(weights, strict=True)
    rng = torch.Generator().manual_seed(2)
    x = torch.randn((4, in_ch, height, width), generator=rng)
    t = torch.tensor([0, 1, 500, 999])
    with torch.inference_mode():
        out = network(x, t)
        expected = skeleton(weights, ch_mult, x, t)
    assert out.shape == x.shape
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
