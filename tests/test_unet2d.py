"""UNet2D, loaded from folders that diffusers wrote, computes what diffusers' UNet2DModel computes."""

import inspect
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import load
from model.checkpoints.native import parse
from model.nets.unet2d import UNet2D, UNet2DConfig
from tests.checkpoints import refusal
from tests.networks import fill
from tests.properties import examples
from tests.reference import DDPMPipeline, DDPMScheduler, UNet2DModel

Fields = dict[str, Any]

DOWN_TYPES = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_TYPES = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

# Small. Each kind of layer has another number of channels. Tests change single fields.
NETWORK: Fields = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
BASE: Fields = {**NETWORK, "sample_size": 8}
LEARNED: Fields = {"time_embedding_type": "learned", "num_train_timesteps": 40}
EXTRAS = {"time_proj_dim", "num_attention_heads"}  # fields that UNet2DModel lacks


def model_of(fields: Fields) -> Any:
    """UNet2DModel with random weights."""
    unet = UNet2DModel(**{**BASE, **fields})
    fill(unet)
    return unet


def scheduler_of(unet: Any) -> Any:
    """A scheduler with the timesteps and the variance of the network."""
    twice = unet.config.out_channels == 2 * unet.config.in_channels
    return DDPMScheduler(
        num_train_timesteps=unet.config.num_train_timesteps or 1000,
        variance_type="learned_range" if twice else "fixed_small",
    )


def save(unet: Any, folder: Path) -> Path:
    unet.save_pretrained(folder)
    scheduler_of(unet).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> UNet2D:
    network = load(folder).network
    assert isinstance(network, UNet2D)
    return network


def inputs(unet: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Three images, each with its own timestep and label. No timestep is 0, which fourier encodings do not allow."""
    config = unet.config
    rng = torch.Generator().manual_seed(5)
    size = (config.sample_size, config.sample_size) if isinstance(config.sample_size, int) else config.sample_size
    x = torch.randn((3, config.in_channels, *size), generator=rng)
    last = (config.num_train_timesteps or 1000) - 1
    labels: Tensor | None = None
    if config.class_embed_type == "identity":
        width = config.time_embedding_dim or 4 * config.block_out_channels[0]
        labels = torch.randn((3, width), generator=rng)
    elif config.class_embed_type == "timestep":
        labels = torch.tensor([5, 1, 30])
    elif config.num_class_embeds is not None:
        labels = torch.tensor([config.num_class_embeds - 1, 0, 1])
    return x, torch.tensor([1, 12, last]), labels


def assert_close(out: Tensor, expected: Tensor) -> None:
    """|difference| ≤ 1e-5 × max |out|, image by image."""
    assert out.dtype == expected.dtype == torch.float32
    assert out.shape == expected.shape
    assert expected.isfinite().all()
    for image, image_expected in zip(out, expected, strict=True):
        assert (image - image_expected).abs().max() <= 1e-5 * image_expected.abs().max()


@torch.inference_mode()
def assert_computes(network: UNet2D, unet: Any) -> None:
    x, t, labels = inputs(unet)
    assert_close(network(x, t, labels), unet(x, t, class_labels=labels).sample)


def check(fields: Fields, folder: Path) -> None:
    """Write a network with diffusers, load it, and compare outputs."""
    unet = model_of(fields)
    assert_computes(loaded(save(unet, folder)), unet)


@pytest.mark.parametrize("resampling", ["conv", "resnet"])
@pytest.mark.parametrize("up", UP_TYPES)
@pytest.mark.parametrize("down", DOWN_TYPES)
def test_block_types(down: str, up: str, resampling: str, tmp_path: Path) -> None:
    """Only some block types use downsample_type, upsample_type and downsample_padding."""
    fields = {
        "down_block_types": (down, down),
        "up_block_types": (up, up),
        "downsample_type": resampling,
        "upsample_type": resampling,
        "downsample_padding": 0,
    }
    check(fields, tmp_path)


THREE_LEVELS: Fields = {
    "block_out_channels": (8, 12, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D", "AttnUpBlock2D"),
}
NO_ATTENTION: Fields = {
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
ATTENTION: Fields = {
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}
SCALE_SHIFT: Fields = {"resnet_time_scale_shift": "scale_shift"}

CASES: dict[str, Fields] = {
    "base": {},
    # Levels and blocks
    "asymmetric": THREE_LEVELS,
    "narrower below": {**THREE_LEVELS, "block_out_channels": (16, 4, 8)},
    "prefixes of old versions": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
    "one level": {
        "sample_size": (5, 7),
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
    },
    "six levels": {
        "sample_size": (64, 128),
        "block_out_channels": (4, 4, 8, 8, 12, 12),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    },
    "layers 2": {"layers_per_block": 2},
    "layers 3": {**THREE_LEVELS, "layers_per_block": 3},
    "rectangular": {"sample_size": (12, 8)},
    # Resampling
    "padding 0": {**THREE_LEVELS, "downsample_padding": 0},
    "padding 0, rectangular": {**NO_ATTENTION, "downsample_padding": 0, "sample_size": (4, 10)},
    "down by resnet": {**ATTENTION, "downsample_type": "resnet"},
    "up by resnet": {**ATTENTION, "upsample_type": "resnet"},
    "resampling null": {**ATTENTION, "downsample_type": None, "upsample_type": None},
    "resampling by resnet, scale_shift": {
        **ATTENTION,
        **SCALE_SHIFT,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    # Time in the blocks, and the middle
    "scale_shift": SCALE_SHIFT,
    "scale_shift, attn_norm": {**SCALE_SHIFT, "attn_norm_num_groups": 4},
    "scale_shift, attn_norm other": {**SCALE_SHIFT, "attn_norm_num_groups": 2},
    "attn_norm": {"attn_norm_num_groups": 8},
    "attn_norm beside no attention": {"attn_norm_num_groups": 5, "add_attention": False},
    "no middle": {"mid_block_type": None},
    "no middle, three levels": {**THREE_LEVELS, "mid_block_type": None},
    "no middle, wide heads": {**NO_ATTENTION, "mid_block_type": None, "attention_head_dim": 99},
    "no middle attention": {"add_attention": False},
    "no attention, wide heads": {**NO_ATTENTION, "add_attention": False, "attention_head_dim": 99},
    "middle scale": {"mid_block_scale_factor": 2.5},
    "middle scale below 1": {"mid_block_scale_factor": 0.3},
    "middle scale, no attention": {"mid_block_scale_factor": 2**0.5, "add_attention": False},
    "middle scale, scale_shift": {**SCALE_SHIFT, "mid_block_scale_factor": 1.7},
    # Attention
    "one head": {**ATTENTION, "attention_head_dim": None},
    "heads of 1": {**ATTENTION, "attention_head_dim": 1},
    "heads of 8": {**ATTENTION, "attention_head_dim": 8},
    "odd heads that leave channels over": {**ATTENTION, "attention_head_dim": 3},
    "one narrow head": {**ATTENTION, "attention_head_dim": 7},
    # Norms and activations
    "groups 1": {**ATTENTION, "norm_num_groups": 1},
    "groups 8": {**ATTENTION, "norm_num_groups": 8},
    "groups 3": {**ATTENTION, "norm_num_groups": 3, "block_out_channels": (6, 15), "attention_head_dim": 5},
    "groups 5": {**SCALE_SHIFT, "norm_num_groups": 5, "block_out_channels": (10, 15), "attn_norm_num_groups": 3},
    "eps 0.01": {"norm_eps": 0.01},
    "eps 0.3": {**ATTENTION, "norm_eps": 0.3},
    "eps 0.3, scale_shift": {**SCALE_SHIFT, "norm_eps": 0.3, "attn_norm_num_groups": 2},
    **{f"act {name}": {"act_fn": name} for name in ("silu", "swish", "mish", "gelu", "relu", "SiLU", "MISH", "Gelu")},
    "act relu, scale_shift": {**THREE_LEVELS, **SCALE_SHIFT, "act_fn": "relu"},
    # Time
    "sines first": {"flip_sin_to_cos": False},
    "freq_shift 1": {"freq_shift": 1},
    "sines first, freq_shift 1": {"flip_sin_to_cos": False, "freq_shift": 1},
    "freq_shift -2": {"freq_shift": -2},
    "freq_shift 0.5": {"freq_shift": 0.5},
    "time_embedding_dim": {"time_embedding_dim": 20},
    "time_embedding_dim odd": {**SCALE_SHIFT, "time_embedding_dim": 13},
    "fourier": {"time_embedding_type": "fourier"},
    "fourier, time_embedding_dim": {"time_embedding_type": "fourier", "time_embedding_dim": 11},
    "learned": LEARNED,
    "learned, time_embedding_dim": {**LEARNED, "time_embedding_dim": 11},
    "odd width": {"block_out_channels": (9, 15), "norm_num_groups": 3},
    "odd width, sines first": {
        "block_out_channels": (9, 15),
        "norm_num_groups": 3,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
    "odd width, fourier": {
        "block_out_channels": (9, 15),
        "norm_num_groups": 3,
        "time_embedding_type": "fourier",
    },
    "odd width, learned": {**LEARNED, "block_out_channels": (9, 15), "norm_num_groups": 3},
    # Labels
    "classes": {"num_class_embeds": 4},
    "classes, scale_shift": {**SCALE_SHIFT, "num_class_embeds": 2, "time_embedding_dim": 12},
    "classes, fourier": {"num_class_embeds": 4, "time_embedding_type": "fourier"},
    "labels as timesteps": {"class_embed_type": "timestep"},
    "labels as timesteps, counted": {"class_embed_type": "timestep", "num_class_embeds": 50},
    "labels as timesteps, other encoding": {
        "class_embed_type": "timestep",
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 12,
    },
    "labels as timesteps, fourier": {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    "labels as timesteps, learned": {"class_embed_type": "timestep", **LEARNED},
    "label vectors": {"class_embed_type": "identity"},
    "label vectors, counted": {"class_embed_type": "identity", "num_class_embeds": 3, "time_embedding_dim": 12},
    # Images
    "centred": {"center_input_sample": True},
    "grey": {"in_channels": 1, "out_channels": 1},
    "four channels": {"in_channels": 4, "out_channels": 4},
    "variance": {"out_channels": 6},
    "grey, variance, centred": {"in_channels": 1, "out_channels": 2, "center_input_sample": True},
    # Published networks, with fewer channels
    "like google/ddpm-cifar10-32": {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
    },
    "like ADM": {
        **SCALE_SHIFT,
        "out_channels": 6,
        "block_out_channels": (8, 16, 24),
        "layers_per_block": 2,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 8,
        "attn_norm_num_groups": 4,
        "num_class_embeds": 10,
    },
    "dropout, which only trains": {"dropout": 0.5},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_fields(fields: Fields, tmp_path: Path) -> None:
    check(fields, tmp_path)


def test_activations_differ_by_more_than_parity_allows(tmp_path: Path) -> None:
    """So the comparisons above can tell them apart."""
    outs = []
    for name in ("silu", "mish", "gelu", "relu"):
        network = loaded(save(model_of({"act_fn": name}), tmp_path / name))
        outs.append(network(*inputs(model_of({}))))
    for i, out in enumerate(outs):
        assert all((out - other).abs().max() > 1e-2 for other in outs[:i])


@st.composite
def networks(draw: st.DrawFn) -> Fields:
    """Fields of any small valid network, drawn independently where possible."""
    levels = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 4))
    widths = tuple(groups * draw(st.integers(1 if level else 2, 4)) for level in range(levels))
    down = tuple(draw(st.sampled_from(DOWN_TYPES)) for _ in widths)
    up = tuple(draw(st.sampled_from(UP_TYPES)) for _ in widths)
    in_channels = draw(st.sampled_from((1, 2, 3, 4)))
    divisors = [n for n in range(1, widths[-1] + 1) if widths[-1] % n == 0]
    # At least 2 at the lowest level: a norm over very few values amplifies float32's rounding.
    side = st.integers(2, 3).map(lambda n: n * 2 ** (levels - 1))
    embedding = draw(st.sampled_from(({}, {"time_embedding_type": "fourier"}, LEARNED)))
    return {
        "sample_size": (draw(side), draw(side)),
        "in_channels": in_channels,
        "out_channels": in_channels * draw(st.sampled_from((1, 2))),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from([n for n in (0, 1, 0.25) if n != widths[0] // 2])),
        "time_embedding_dim": draw(st.none() | st.integers(1, 24)),
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "mid_block_type": draw(st.sampled_from(("UNetMidBlock2D", "UNetMidBlock2D", None))),
        "layers_per_block": draw(st.integers(1, 2)),
        "mid_block_scale_factor": draw(st.sampled_from((1, 1.5, 0.4))),
        "downsample_padding": draw(st.integers(0, 1)),
        "downsample_type": draw(st.sampled_from(("conv", "resnet"))),
        "upsample_type": draw(st.sampled_from(("conv", "resnet"))),
        "act_fn": draw(st.sampled_from(("silu", "swish", "mish", "gelu", "relu", "ReLU"))),
        "attention_head_dim": draw(st.none() | st.integers(1, min(widths))),
        "norm_num_groups": groups,
        "attn_norm_num_groups": draw(st.none() | st.sampled_from(divisors)),
        "norm_eps": draw(st.sampled_from((1e-5, 1e-3, 0.1))),
        "resnet_time_scale_shift": draw(st.sampled_from(("default", "scale_shift"))),
        "add_attention": draw(st.booleans()),
        "class_embed_type": draw(st.sampled_from((None, "timestep", "identity"))),
        "num_class_embeds": draw(st.none() | st.integers(2, 5)),
        **embedding,
    }


@pytest.mark.slow
@examples(40, derandomize=True)  # one network in thousands exceeds the tolerance for rounding
@given(networks())
def test_any_network(fields: Fields) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(fields, Path(folder))


def test_whole_pipeline(tmp_path: Path) -> None:
    """A network's own folder and its pipeline give the same description."""
    unet = model_of({**THREE_LEVELS, "num_class_embeds": 7, "out_channels": 6, "sample_size": (8, 12)})
    pipeline = DDPMPipeline(unet, scheduler_of(unet))
    pipeline.save_pretrained(tmp_path / "model")
    alone = load(save(unet, tmp_path / "alone" / "model")).description
    checkpoint = load(tmp_path / "model")
    assert isinstance(checkpoint.network, UNet2D)
    assert_computes(checkpoint.network, unet)
    assert checkpoint.description.digest == alone.digest
    assert checkpoint.description.name == alone.name
    assert alone.architecture == "unet_2d"
    assert alone.name == "model"
    assert alone.image_shape == (3, 8, 12)
    assert alone.out_channels == 6
    assert alone.num_classes == 7
    assert alone.no_label is None
    assert alone.num_parameters == unet.num_parameters()
    assert not checkpoint.network.training
    assert not any(parameter.requires_grad for parameter in checkpoint.network.parameters())


def write_config(folder: Path, changes: Fields, without: frozenset[str] = frozenset()) -> None:
    """Change fields of a config.json that diffusers wrote, and remove some."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in without}), encoding="utf-8")


def defaults_of_diffusers() -> Fields:
    parameters = inspect.signature(UNet2DModel.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def test_defaults_are_those_of_diffusers() -> None:
    theirs = defaults_of_diffusers()
    fields = UNet2DConfig.model_fields
    assert fields.keys() - theirs.keys() == EXTRAS
    assert theirs.keys() - fields.keys() == {"sample_size", "dropout"}
    shared = fields.keys() & theirs.keys()
    assert {name: fields[name].default for name in shared} == {name: theirs[name] for name in shared}
    assert [fields[name].default for name in EXTRAS] == [None, None]


def test_fields_left_out_are_defaults(tmp_path: Path) -> None:
    """Configs of old versions lack these fields."""
    unet = model_of({"attention_head_dim": 8})
    folder = save(unet, tmp_path)
    defaults = defaults_of_diffusers()
    at_default = frozenset(name for name in defaults if unet.config[name] == defaults[name])
    assert len(at_default) > 15
    write_config(folder, {}, without=at_default)
    assert_computes(loaded(folder), unet)


@pytest.mark.parametrize("fields", [{"num_class_embeds": 4}, {"class_embed_type": "timestep"}], ids=str)
@torch.inference_mode()
def test_without_labels_nothing_is_added(fields: Fields, tmp_path: Path) -> None:
    """diffusers refuses this, so the reference is its network with the same weights, without labels."""
    unet, plain = model_of(fields), model_of({})
    plain.load_state_dict({key: value for key, value in unet.state_dict().items() if "class_embedding" not in key})
    network = loaded(save(unet, tmp_path))
    x, t, labels = inputs(unet)
    assert_close(network(x, t), plain(x, t).sample)
    assert (network(x, t) - network(x, t, labels)).abs().max() > 1e-2


@pytest.mark.parametrize("fields", [{}, {"class_embed_type": "identity"}], ids=str)
@torch.inference_mode()
def test_networks_without_classes_take_any_label(fields: Fields, tmp_path: Path) -> None:
    """The runner always passes integer labels. A network of label vectors ignores them."""
    network = loaded(save(model_of(fields), tmp_path))
    x, t, _ = inputs(model_of({}))
    assert torch.equal(network(x, t), network(x, t, torch.tensor([0, 7, 2])))


def config_of(fields: Fields) -> UNet2DConfig:
    return UNet2DConfig(**{**NETWORK, **fields})


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_by_count_are_heads_by_width(heads: int, tmp_path: Path) -> None:
    """If all levels have the same channels, the two fields are equivalent."""
    fields = {**ATTENTION, "block_out_channels": (8, 8)}
    unet = model_of({**fields, "attention_head_dim": 8 // heads})
    network = UNet2D(config_of({**fields, "num_attention_heads": heads, "attention_head_dim": 3}))
    network.load_state_dict(loaded(save(unet, tmp_path)).state_dict(), strict=True)
    assert_computes(network, unet)


def test_heads_by_count_at_several_widths(tmp_path: Path) -> None:
    """UNet2DModel lacks this field, so the test sets it in each of its attention layers."""
    fields = {**ATTENTION, "block_out_channels": (8, 16), "attention_head_dim": None}
    unet = model_of(fields)
    network = UNet2D(config_of({**fields, "num_attention_heads": 4}))
    network.load_state_dict(loaded(save(unet, tmp_path)).state_dict(), strict=True)
    layers = [layer for layer in unet.modules() if hasattr(layer, "to_q")]
    assert len(layers) == 7
    for layer in layers:
        layer.heads = 4
    assert_computes(network, unet)


def encoded_by_hand(config: UNet2DConfig, t: Tensor, table: Tensor | None) -> Tensor:
    """The timestep encodings, computed number by number in double precision."""
    dim = config.encoding_dim
    rows = []
    for timestep in t.tolist():
        if config.time_embedding_type == "learned":
            assert table is not None
            row = table[timestep].tolist()
        elif config.time_embedding_type == "fourier":
            assert table is not None
            angles = [2 * math.pi * w * math.log(timestep) for w in table.tolist()]
            row = [*map(math.sin, angles), *map(math.cos, angles)]
        else:
            half = dim // 2
            angles = [timestep * 10000 ** (-k / (half - config.freq_shift)) for k in range(half)]
            sines, cosines = [*map(math.sin, angles)], [*map(math.cos, angles)]
            row = (cosines + sines if config.flip_sin_to_cos else sines + cosines) + [0.0] * (dim % 2)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {"time_proj_dim": 12},
        {"time_proj_dim": 4, "flip_sin_to_cos": False, "freq_shift": 1},
        {"time_proj_dim": 13, "time_embedding_dim": 20},
        {"time_proj_dim": 12, "class_embed_type": "timestep"},
        {"time_proj_dim": 6, "time_embedding_type": "fourier"},
        {"time_proj_dim": 12, "class_embed_type": "timestep", "time_embedding_type": "fourier"},
        {"time_proj_dim": 5, **LEARNED, "class_embed_type": "timestep"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_time_proj_dim(fields: Fields, tmp_path: Path) -> None:
    """UNet2DModel gets a time embedding of 0, and ours, computed by hand, as a label vector."""
    width = fields.get("time_embedding_dim", 4 * fields["time_proj_dim"])
    unet = model_of({"time_embedding_dim": width, "class_embed_type": "identity"})
    for parameter in unet.time_embedding.linear_2.parameters():
        parameter.zero_()
    rest = loaded(save(unet, tmp_path)).state_dict()

    config = config_of(fields)
    network = UNet2D(config)
    fill(network, seed=1)
    weights = network.state_dict()
    network.load_state_dict(
        {key: value if key.startswith(("time_", "class_")) else rest[key] for key, value in weights.items()}
    )

    def mlp(name: str, encoded: Tensor) -> Tensor:
        h = F.linear(encoded, weights[f"{name}.linear_1.weight"], weights[f"{name}.linear_1.bias"])
        return F.linear(F.silu(h), weights[f"{name}.linear_2.weight"], weights[f"{name}.linear_2.bias"])

    x, _, _ = inputs(unet)
    t, labels = torch.tensor([1, 17, 39]), torch.tensor([5, 1, 30])
    table = weights.get("time_proj.weight")
    emb = mlp("time_embedding", encoded_by_hand(config, t, table))
    if config.class_embed_type == "timestep":
        emb = emb + mlp("class_embedding", encoded_by_hand(config, labels, table))
    expected = unet(x, t, class_labels=emb).sample
    if config.time_embedding_type == "fourier":
        expected = expected / t[:, None, None, None]
    assert_close(network(x, t, labels), expected)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint. Tests change copies."""
    return save(model_of({}), tmp_path_factory.mktemp("unet2d") / "model")


FIR = "belongs to NCSN++: its FIR filters are not supported"
TEXT = "attends to text, and that is not supported"
UPSCALER = "belongs to the latent upscaler, and that is not supported"
A_DOWN_TYPE = "must be 'DownBlock2D', 'AttnDownBlock2D' or 'ResnetDownsampleBlock2D'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Incompatible numbers
        ({"norm_num_groups": 3}, "norm_num_groups is 3, which does not divide a width of 8"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, which does not divide a width of 8"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups is 5, which does not divide a width of 16"),
        ({"attention_head_dim": 17}, "attention_head_dim is 17, and a width only 16"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 blocks, and block_out_channels 2 widths"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "up_block_types has 3 blocks, and block_out_channels 2 widths"),
        ({"block_out_channels": [8, 8, 8]}, "down_block_types has 2 blocks, and block_out_channels 3 widths"),
        (
            {"time_embedding_type": "learned"},
            "num_train_timesteps is required where time_embedding_type is learned",
        ),
        ({"freq_shift": 4}, "freq_shift is 4, which leaves no frequency of 8"),
        (
            {"sample_size": 9},
            "image size 9x9 cannot be halved 1 times: height and width must be multiples of 2",
        ),
        (
            {"sample_size": [8, 7]},
            "image size 8x7 cannot be halved 1 times: height and width must be multiples of 2",
        ),
        # Blocks of other networks
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, f"down_block_types has SkipDownBlock2D, which {FIR}"),
        ({"up_block_types": ["UpBlock2D", "AttnSkipUpBlock2D"]}, f"up_block_types has AttnSkipUpBlock2D, which {FIR}"),
        (
            {"down_block_types": ["UNetResAttnSkipDownBlock2D"] * 2},
            f"down_block_types has AttnSkipDownBlock2D, which {FIR}",
        ),
        (
            {"down_block_types": ["CrossAttnDownBlock2D"] * 2},
            f"down_block_types has CrossAttnDownBlock2D, which {TEXT}",
        ),
        (
            {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2},
            f"up_block_types has SimpleCrossAttnUpBlock2D, which {TEXT}",
        ),
        ({"down_block_types": ["KDownBlock2D"] * 2}, f"down_block_types has KDownBlock2D, which {UPSCALER}"),
        ({"up_block_types": ["KCrossAttnUpBlock2D"] * 2}, f"up_block_types has KCrossAttnUpBlock2D, which {UPSCALER}"),
        (
            {"down_block_types": ["DownBlock2D", "DownEncoderBlock2D"]},
            f"down_block_types.1 is DownEncoderBlock2D, and {A_DOWN_TYPE}",
        ),
        ({"down_block_types": ["UpBlock2D", "DownBlock2D"]}, f"down_block_types.0 is UpBlock2D, and {A_DOWN_TYPE}"),
        ({"down_block_types": ["DownBlock2D", 3]}, f"down_block_types.1 is 3, and {A_DOWN_TYPE}"),
        (
            {"time_embedding_type": "rope"},
            "time_embedding_type is rope, and must be 'positional', 'fourier' or 'learned'",
        ),
        ({"act_fn": "GLU"}, "act_fn is glu, and must be 'silu', 'swish', 'mish', 'gelu' or 'relu'"),
        (
            {"resnet_time_scale_shift": "ada_group"},
            "resnet_time_scale_shift is ada_group, and must be 'default' or 'scale_shift'",
        ),
        (
            {"class_embed_type": "projection"},
            "class_embed_type is projection, and must be 'timestep' or 'identity'",
        ),
        ({"downsample_type": "fir"}, "downsample_type is fir, and must be 'conv' or 'resnet'"),
        ({"_class_name": "UNet3DConditionModel"}, "_class_name is UNet3DConditionModel, and must be UNet2DModel"),
        # Names, types and limits
        ({"in_channels": "3"}, "in_channels is 3, and must be a valid integer"),
        ({"layers_per_block": 1.5}, "layers_per_block is 1.5, and must be a valid integer"),
        ({"layers_per_block": True}, "layers_per_block is True, and must be a valid integer"),
        ({"layers_per_block": 0}, "layers_per_block is 0, and must be greater than or equal to 1"),
        ({"norm_num_groups": None}, "norm_num_groups is None, and must be a valid integer"),
        ({"norm_eps": "1e-5"}, "norm_eps is 1e-5, and must be a valid number"),
        ({"norm_eps": math.nan}, "norm_eps is nan, and must be a finite number"),
        ({"flip_sin_to_cos": 1}, "flip_sin_to_cos is 1, and must be a valid boolean"),
        ({"add_attention": "no"}, "add_attention is no, and must be a valid boolean"),
        ({"act_fn": 7}, "act_fn is 7, and must be 'silu', 'swish', 'mish', 'gelu' or 'relu'"),
        ({"block_out_channels": 8}, "block_out_channels is 8, and must be a valid tuple"),
        ({"block_out_channels": [8, "16"]}, "block_out_channels.1 is 16, and must be a valid integer"),
        ({"block_out_channels": [8, 2**15]}, "block_out_channels.1 is 32768, and must be less than or equal to 16384"),
        ({"downsample_padding": 2}, "downsample_padding is 2, and must be less than or equal to 1"),
        ({"mid_block_scale_factor": 0}, "mid_block_scale_factor is 0, and must be greater than 0"),
        ({"sample_size": None}, "sample_size is None, and must be the images' size or [height, width]"),
        ({"sample_size": "8"}, "sample_size is 8, and must be the images' size or [height, width]"),
        (
            {"in_channels": "3", "layers_per_block": 0},
            (
                "in_channels is 3, and must be a valid integer; "
                "layers_per_block is 0, and must be greater than or equal to 1"
            ),
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_configs_refused(written: Path, tmp_path: Path, changes: Fields, message: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    write_config(folder, changes)
    assert refusal(folder) == f"config.json: {message}"


def test_what_is_refused_is_what_was_changed(written: Path) -> None:
    """The checkpoint that the refusals start from loads."""
    assert_computes(loaded(written), model_of({}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "network: num_attention_heads is 3, which does not divide 16"),
        ({"num_attention_heads": 0}, "network.num_attention_heads is 0, and must be greater than or equal to 1"),
        ({"time_proj_dim": 0}, "network.time_proj_dim is 0, and must be greater than or equal to 1"),
        ({"time_proj_dim": 2, "freq_shift": 1}, "network: freq_shift is 1, which leaves no frequency of 2"),
    ],
    ids=str,
)
def test_native_configs_refused(changes: Fields, message: str) -> None:
    values: Fields = {
        "architecture": "unet_2d",
        "image_size": [8, 8],
        "schedule": {},
        "network": {**NETWORK, **changes},
    }
    with pytest.raises(CheckpointError) as error:
        parse(Path("config.json"), values)
    assert str(error.value) == f"config.json: {message}"


@pytest.mark.parametrize(("height", "width"), [(8, 6), (2, 8), (0, 8), (9, 8)])
def test_images_that_cannot_be_halved_are_refused(height: int, width: int) -> None:
    network = UNet2D(config_of(THREE_LEVELS))
    message = f"image size {height}x{width} cannot be halved 2 times: height and width must be multiples of 4"
    with pytest.raises(ValueError, match=message):
        network.check_size(height, width)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros((1, 3, height, width)), torch.tensor([1]))
