"""The Diffusion U-Net: the bare skeleton against a second one written from its description, and each extra."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.layers import Attention, ResnetBlock, sinusoidal_embedding
from model.nets.unet import DiffusionUNet
from tests.networks import fill

SKELETONS = [
    (3, 8, (1, 2, 4)),
    (1, 6, (1,)),
    (2, 4, (1, 1)),
    (3, 4, (1, 3, 2)),
    (4, 2, (1, 2, 2, 5)),
]
SIZES = [(16, 16), (16, 32), (48, 16)]


def skeleton_weights(in_ch: int, model_ch: int, ch_mult: Sequence[int]) -> dict[str, Tensor]:
    """Random weights with the state-dict keys of the skeleton's description."""
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
    """The skeleton as its description defines it."""

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


def random_network(seed: int = 0, **extras: Any) -> DiffusionUNet:
    network = DiffusionUNet(3, 8, (1, 2), **extras)
    fill(network, seed)
    return network


def inputs(channels: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn((3, channels, 8, 12), generator=torch.Generator().manual_seed(5))
    return x, torch.tensor([0, 321, 999])


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def affine(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def attention(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.qkv.weight": (3 * channels, channels, 1, 1),
        f"{name}.qkv.bias": (3 * channels,),
        f"{name}.proj.weight": (channels, channels, 1, 1),
        f"{name}.proj.bias": (channels,),
    }


MIDDLE_ATTENTION = attention("middle_attention", 16)
NORMS = {
    key: shape
    for name, first, second in [
        ("downs.0", 8, 8),
        ("downs.2", 8, 16),
        ("middle", 16, 16),
        ("ups.0", 32, 16),
        ("ups.2", 24, 8),
    ]
    for key, shape in (affine(f"{name}.norm1", first) | affine(f"{name}.norm2", second)).items()
}


@pytest.mark.parametrize(
    ("extras", "added"),
    [
        ({"norm_groups": 4}, NORMS),
        ({"attention_levels": (0,)}, attention("down_attentions.0", 8) | attention("up_attentions.0", 8)),
        ({"attention_levels": (1,)}, attention("down_attentions.1", 16) | attention("up_attentions.1", 16)),
        ({"middle_attention": True}, MIDDLE_ATTENTION),
        ({"middle_attention": True, "norm_groups": 2}, NORMS | MIDDLE_ATTENTION | affine("middle_attention.norm", 16)),
        ({"num_classes": 5}, {"label_embed.weight": (6, 32)}),
        ({"input_skip": True}, {"final_conv.weight": (3, 16, 3, 3)}),
    ],
)
def test_each_extra_adds_its_own_keys_only(extras: dict[str, Any], added: dict[str, tuple[int, ...]]) -> None:
    assert shapes(random_network(**extras).state_dict()) == shapes(skeleton_weights(3, 8, (1, 2))) | added


@torch.inference_mode()
def test_norm_comes_ahead_of_each_silu_of_a_resnet_block() -> None:
    block = ResnetBlock(4, 6, 10, norm_groups=2)
    fill(block)
    w = block.state_dict()
    rng = torch.Generator().manual_seed(4)
    x, t_emb = torch.randn((2, 4, 5, 5), generator=rng), torch.randn((2, 10), generator=rng)
    h = F.silu(F.group_norm(x, 2, w["norm1.weight"], w["norm1.bias"]))
    h = F.conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
    h = h + F.linear(F.silu(t_emb), w["time_mlp.weight"], w["time_mlp.bias"])[:, :, None, None]
    h = F.silu(F.group_norm(h, 2, w["norm2.weight"], w["norm2.bias"]))
    h = F.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1)
    assert_close(block(x, t_emb), h + F.conv2d(x, w["shortcut.weight"], w["shortcut.bias"]))


@torch.inference_mode()
def test_norm_groups_reach_the_network() -> None:
    x, t = inputs()
    one, four = random_network(norm_groups=1), random_network(norm_groups=4)
    assert (one(x, t) - four(x, t)).abs().max() > 1e-2
    layers = [layer for layer in four.modules() if isinstance(layer, nn.GroupNorm)]
    assert [layer.num_groups for layer in layers] == [4] * 10


@pytest.mark.parametrize("norm_groups", [None, 2])
@torch.inference_mode()
def test_attention_by_hand(norm_groups: int | None) -> None:
    layer = Attention(4, norm_groups)
    fill(layer, gain=2)
    w = layer.state_dict()
    x = torch.randn((2, 4, 3, 5), generator=torch.Generator().manual_seed(4))
    h = x if norm_groups is None else F.group_norm(x, norm_groups, w["norm.weight"], w["norm.bias"])
    positions = h.flatten(2).mT  # [B, 15, 4]
    q, k, v = F.linear(positions, w["qkv.weight"][:, :, 0, 0], w["qkv.bias"]).chunk(3, dim=2)
    attended = torch.softmax(q @ k.mT / 4**0.5, dim=2) @ v
    projected = F.linear(attended, w["proj.weight"][:, :, 0, 0], w["proj.bias"])
    assert_close(layer(x), x + projected.mT.reshape(x.shape))


@pytest.mark.parametrize(
    "extras", [{"attention_levels": (0,)}, {"attention_levels": (1,)}, {"middle_attention": True}], ids=str
)
@torch.inference_mode()
def test_attention_is_added_to_the_bare_network(extras: dict[str, Any]) -> None:
    x, t = inputs()
    network = random_network(**extras)
    bare = random_network()
    bare.load_state_dict({key: network.state_dict()[key] for key in bare.state_dict()}, strict=True)
    for layer in (layer for layer in network.modules() if isinstance(layer, Attention)):
        before = network(x, t)
        for parameter in layer.proj.parameters():
            parameter.zero_()
        assert (network(x, t) - before).abs().max() > 1e-3  # the layer had an effect
    assert_close(network(x, t), bare(x, t))


@torch.inference_mode()
def test_label_embedding_is_added_to_the_time_embedding() -> None:
    """So a label has the same effect as a change of the bare network's last time embedding bias."""
    x, t = inputs()
    network = random_network(num_classes=5)
    weights = network.state_dict()
    labels = torch.tensor([0, 4, 2])
    out = network(x, t, labels)
    embeddings = weights.pop("label_embed.weight")
    bare = random_network()
    for i, label in enumerate(labels):
        bare.load_state_dict(weights | {"time_embed.2.bias": weights["time_embed.2.bias"] + embeddings[label]})
        assert_close(out[i, None], bare(x[i, None], t[i, None]))


@torch.inference_mode()
def test_label_num_classes_is_no_label() -> None:
    x, t = inputs()
    network = random_network(num_classes=5)
    without = network(x, t)
    assert torch.equal(without, network(x, t, None))
    assert torch.equal(without, network(x, t, torch.full((3,), 5)))
    assert (without - network(x, t, torch.tensor([0, 1, 2]))).abs().max() > 1e-2


@torch.inference_mode()
def test_network_without_classes_takes_any_label() -> None:
    x, t = inputs()
    network = random_network()
    assert torch.equal(network(x, t), network(x, t, torch.tensor([0, 7, 2])))


@pytest.mark.parametrize("ch_mult", [(1, 2), (3, 2)])
@torch.inference_mode()
def test_input_skip_goes_beside_the_last_upsample(ch_mult: tuple[int, ...]) -> None:
    x, t = inputs()
    network = DiffusionUNet(3, 8, ch_mult, input_skip=True)
    fill(network)
    w = network.state_dict()
    assert network.final_conv.in_channels == 8 * ch_mult[0] + 8
    first = F.conv2d(x, w["input_conv.weight"], w["input_conv.bias"], padding=1)
    of_skip = F.conv2d(first, w["final_conv.weight"][:, -8:], padding=1)
    with_skip = network(x, t)
    network.final_conv.weight[:, -8:] = 0
    assert_close(with_skip, network(x, t) + of_skip)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ch_mult": (2, 4)}, "the first of channel_multipliers is 2, and must be 1: without input_skip, "),
        ({"ch_mult": ()}, r"channel_multipliers is \[\], and must be one or more positive integers"),
        ({"ch_mult": (1, 0)}, r"channel_multipliers is \[1, 0\], and must be one or more positive integers"),
        ({"model_ch": 7}, "model_channels is 7, and must be even"),
        ({"model_ch": 0}, "model_channels is 0, and must be even"),
        ({"norm_groups": 3}, "norm_groups is 3, which does not divide a width of (8|16) channels"),
        ({"norm_groups": 16}, "norm_groups is 16, which does not divide a width of 8 channels"),
        ({"norm_groups": 0}, "norm_groups is 0, "),
        ({"attention_levels": (1, 2)}, "attention_levels names level 2; the levels are 0 to 1"),
        ({"attention_levels": (-1,)}, "attention_levels names level -1; the levels are 0 to 1"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionUNet(**{"in_ch": 3, "model_ch": 8, "ch_mult": (1, 2), **arguments})


@pytest.mark.parametrize(("height", "width"), [(12, 18), (6, 16), (16, 0), (4, 1)])
def test_sizes_that_cannot_be_halved_are_refused(height: int, width: int) -> None:
    network = random_network()
    message = f"image size {height}x{width} cannot be halved 2 times: height and width must be multiples of 4"
    with pytest.raises(ValueError, match=message):
        network.check_size(height, width)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros((1, 3, height, width)), torch.tensor([1]))


def encoding_by_hand(t: Tensor, dim: int) -> Tensor:
    """The sinusoidal encoding, computed number by number in double precision."""
    half = dim // 2
    encoding = torch.zeros((len(t), dim), dtype=torch.float64)
    for i, timestep in enumerate(t.tolist()):
        for k in range(half):
            f = 10000 ** (-k / half)
            encoding[i, k] = math.sin(timestep * f)
            encoding[i, half + k] = math.cos(timestep * f)
    return encoding


@pytest.mark.parametrize("dim", [2, 8, 32, 256])
def test_sinusoidal_embedding(dim: int) -> None:
    t = torch.tensor([0, 1, 2, 10, 257, 500, 998, 999])
    embedding = sinusoidal_embedding(t, dim)
    assert embedding.dtype == torch.float32
    assert (embedding - encoding_by_hand(t, dim)).abs().max() < 1e-4


@torch.inference_mode()
def test_embedding_is_exact_under_bfloat16_autocast() -> None:
    """bfloat16 represents 256 and 258 but not 257. The network must still distinguish all timesteps."""
    network = random_network()
    told: list[Tensor] = []
    network.time_embed.register_forward_pre_hook(lambda module, args: told.append(args[0]))
    t = torch.tensor([257, 511, 999])
    with torch.autocast("cpu", torch.bfloat16):
        out = network(inputs()[0], t)
    assert out.dtype == torch.bfloat16  # autocast was on
    assert told[0].dtype == torch.float32
    assert (told[0] - encoding_by_hand(t, 8)).abs().max() < 1e-4
