"""UNet2DCondition computes what diffusers' UNet2DConditionModel computes, with the weights that diffusers writes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from model.nets.layers import guidance_embedding
from model.nets.unet_condition import UNet2DCondition
from model.nets.unet_condition_config import UNet2DConditionConfig
from tests.networks import fill
from tests.properties import examples
from tests.reference import UNet2DConditionModel, get_guidance_scale_embedding

Fields = dict[str, Any]

# Small. Each kind of layer has another number of channels. Tests change single fields.
BASE: Fields = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TOKENS = 5
TEXT_DIM = 7  # of encoder_hid_dim


def reference(fields: Fields) -> Any:
    """UNet2DConditionModel with random weights. Those of norms are near 1."""
    unet = UNet2DConditionModel(**{**BASE, **fields})
    fill(unet)
    for name, parameter in unet.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return unet


def network_of(unet: Any, fields: Fields) -> UNet2DCondition:
    """Our network, with the weights of diffusers' by the names of checkpoints."""
    network = UNet2DCondition(UNet2DConditionConfig.model_validate({**BASE, **fields})).eval()
    state = unet.state_dict()
    network.load_state_dict(
        {
            key.replace("time_emb_proj", "time_mlp").replace("conv_shortcut", "shortcut"): values
            for key, values in state.items()
        }
    )
    return network


class Told(NamedTuple):
    """What three rows are told: timesteps, which may be fractions, w and sizes."""

    timesteps: Sequence[float] = (0.0, 12.25, 999.0)
    w: Sequence[float] = (0.0, 7.5, 0.8)
    sizes: Sequence[Sequence[int]] = ((1024, 1024, 0, 0, 1024, 1024), (512, 768, 3, 17, 4096, 64), (0, 1, 2, 3, 4, 5))


TOLD = Told()


def added(fields: Fields, told: Told) -> dict[str, Tensor]:
    """The arguments of our network for guidance, pooled texts and sizes, where it takes them."""
    config = UNet2DConditionConfig.model_validate({**BASE, **fields})
    given: dict[str, Any] = {}
    if config.time_cond_proj_dim is not None:
        given["w"] = torch.tensor(told.w)
    if config.pooled_dim is not None:
        pooled = torch.randn((3, config.pooled_dim), generator=torch.Generator().manual_seed(6))
        given["added"] = pooled, torch.tensor(told.sizes)
    return given


def theirs(fields: Fields, given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for diffusers' network."""
    renamed: dict[str, Any] = {}
    if "w" in given:
        renamed["timestep_cond"] = get_guidance_scale_embedding(given["w"], fields["time_cond_proj_dim"])
    if "added" in given:
        pooled, sizes = given["added"]
        renamed["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return renamed


def inputs(fields: Fields, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Three latents, each with its own timestep, context and label."""
    config = UNet2DConditionConfig.model_validate({**BASE, **fields})
    rng = torch.Generator().manual_seed(5)
    x = torch.randn((3, config.in_channels, *size), generator=rng)
    context = torch.randn((3, TOKENS, config.encoder_hid_dim or config.context_dim), generator=rng)
    labels: Tensor | None = None
    if config.class_embed_type == "identity":
        labels = torch.randn((3, config.time_emb_dim), generator=rng)
    elif config.class_embed_type == "timestep":
        labels = torch.tensor([5, 1, 30])
    elif config.num_class_embeds is not None:
        labels = torch.tensor([config.num_class_embeds - 1, 0, 1])
    return x, torch.tensor(TOLD.timesteps), context, labels


@torch.inference_mode()
def check(fields: Fields, size: tuple[int, int] = (8, 8), told: Told = TOLD) -> None:
    """|difference| ≤ 1e-5 × max |out|."""
    unet = reference(fields)
    x, _, context, labels = inputs(fields, size)
    t, given = torch.tensor(told.timesteps), added(fields, told)
    out = network_of(unet, fields)(x, t, context, labels, **given)
    expected = unet(x, t, context, class_labels=labels, **theirs(fields, given)).sample
    assert out.shape == expected.shape
    assert expected.isfinite().all()
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


THREE_LEVELS: Fields = {
    "block_out_channels": [8, 12, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
XL: Fields = {
    **THREE_LEVELS,
    "layers_per_block": 2,
    "use_linear_projection": True,
    "attention_head_dim": [2, 3, 4],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 57,  # 9 of the pooled text
}
SSD: Fields = {
    **XL,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
CASES: dict[str, Fields] = {
    "base": {},
    # The networks of published models, made small
    "Stable Diffusion 1": {
        "block_out_channels": [8, 16, 32, 32],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "Stable Diffusion 2": {
        "block_out_channels": [8, 16, 32, 32],
        "layers_per_block": 2,
        "attention_head_dim": [1, 2, 4, 4],
        "use_linear_projection": True,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "tiny-sd": {
        "block_out_channels": [8, 16, 32],
        "mid_block_type": None,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    },
    "SDXL": {**XL, "transformer_layers_per_block": [1, 2, 10]},
    "SSD-1B": SSD,
    "Segmind-Vega": {
        **SSD,
        "transformer_layers_per_block": [1, [1, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
    },
    "LCM": {"time_cond_proj_dim": 8},
    "LCM of SDXL": {**XL, "time_cond_proj_dim": 256},
    "LCM of SSD-1B": {**SSD, "time_cond_proj_dim": 5},
    # Levels
    "one level": {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
    "lists by level": {
        **THREE_LEVELS,
        "layers_per_block": [2, 1, 3],
        "attention_head_dim": [1, 3, 4],
        "cross_attention_dim": [99, 12, 12],
        "only_cross_attention": [False, True, False],
        "transformer_layers_per_block": [1, 2, 0],
    },
    "narrower below": {**THREE_LEVELS, "block_out_channels": [16, 4, 8]},
    # The middle
    "no middle": {"mid_block_type": None},
    "a middle without attention, scaled": {"mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 2.5},
    "a scaled middle": {"mid_block_scale_factor": 0.3},
    "a middle's transformer of the last level's depth": {"transformer_layers_per_block": [1, 3]},
    "a middle's transformer of the first number in a list": {
        "transformer_layers_per_block": [1, [2, 4]],
        "reverse_transformer_layers_per_block": [3, [2, 1]],
        "layers_per_block": [1, 2],
    },
    # Attention
    "heads that do not divide the width": {"attention_head_dim": [3, 5]},
    "as many heads as channels": {"attention_head_dim": [8, 16]},
    "no self-attention": {**THREE_LEVELS, "only_cross_attention": True},
    "a layer ahead of the context": {"encoder_hid_dim": TEXT_DIM},
    "a named layer ahead of the context": {"encoder_hid_dim": TEXT_DIM, "encoder_hid_dim_type": "text_proj"},
    # Time and labels
    "activations everywhere": {"act_fn": "mish", "timestep_post_act": "gelu", "time_embedding_act_fn": "relu"},
    "the activation of the time MLP": {"act_fn": "gelu"},
    "another time embedding": {"time_embedding_dim": 11, "flip_sin_to_cos": False, "freq_shift": 1},
    "fourier": {"time_embedding_type": "fourier"},
    "fourier, sines first": {"time_embedding_type": "fourier", "time_embedding_dim": 10, "flip_sin_to_cos": False},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "guidance with fourier": {"time_embedding_type": "fourier", "time_cond_proj_dim": 8},
    "guidance ahead of the time MLP and its activation": {
        "time_cond_proj_dim": 8,
        "act_fn": "gelu",
        "timestep_post_act": "mish",
    },
    "sizes in another encoding": {**XL, "flip_sin_to_cos": False, "freq_shift": 1},
    "sizes, whatever act_fn is": {**XL, "act_fn": "relu"},
    "sizes, labels, guidance and an activation of the sum": {
        **XL,
        "num_class_embeds": 5,
        "time_cond_proj_dim": 4,
        "time_embedding_act_fn": "mish",
    },
    "the fields of sizes, without sizes": {
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20,
    },
    "labels": {"num_class_embeds": 5},
    "labels as timesteps": {"class_embed_type": "timestep", "act_fn": "relu"},
    "labels as vectors": {"class_embed_type": "identity"},
    # Convolutions and norms
    "kernels": {"conv_in_kernel": 5, "conv_out_kernel": 1},
    "channels": {"in_channels": 3, "out_channels": 6},
    "padding 0": {**THREE_LEVELS, "downsample_padding": 0},
    "centred": {"center_input_sample": True},
    "the eps of ResnetBlocks is not that of transformers": {"norm_eps": 0.1},
    "another number of groups": {"norm_num_groups": 2},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_fields(fields: Fields) -> None:
    check(fields)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(9, 13), (5, 11), (4, 7), (17, 8), (6, 6)], ids=str)
def test_any_size_of_latents(size: tuple[int, int], padding: int) -> None:
    """Nothing of them need be even."""
    check({**THREE_LEVELS, "downsample_padding": padding}, size)


def test_one_pixel() -> None:
    check(THREE_LEVELS, (1, 1))


@st.composite
def networks(draw: st.DrawFn) -> tuple[Fields, tuple[int, int], Told]:
    """Fields of any small valid network, drawn independently where possible, a size, and what rows are told."""
    levels = draw(st.integers(1, 3))
    groups = draw(st.sampled_from((2, 4)))
    widths = [groups * draw(st.integers(2, 4)) for _ in range(levels)]
    attends = st.sampled_from(("", "CrossAttn"))
    down, up = ([draw(attends) for _ in widths] for _ in range(2))
    middle = draw(st.sampled_from(("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)))
    if middle != "UNetMidBlock2DCrossAttn" and not any(down + up):
        down[0] = "CrossAttn"

    def by_level(values: st.SearchStrategy[Any]) -> Any:
        return draw(values | st.lists(values, min_size=levels, max_size=levels))

    layers = by_level(st.integers(1, 2))
    each_layers = layers if isinstance(layers, list) else [layers] * levels
    depth = st.integers(0, 2)
    depths: Any = by_level(depth)
    reverse: Any = draw(st.none() | st.lists(depth, min_size=levels, max_size=levels))
    if draw(st.booleans()):
        depths = [draw(st.lists(depth, min_size=n, max_size=n)) for n in each_layers]
        reverse = [draw(st.lists(depth, min_size=n + 1, max_size=n + 1)) for n in reversed(each_layers)]
    hid_dim = draw(st.none() | st.just(TEXT_DIM))
    embedding = draw(st.sampled_from(("positional", "fourier")))
    activation = st.sampled_from(("silu", "swish", "mish", "gelu", "relu"))
    size_dim = draw(st.integers(4, 9))
    told = Told(
        draw(st.lists(st.integers(0, 999) | st.floats(0, 999), min_size=3, max_size=3)),
        draw(st.lists(st.floats(0, 29), min_size=3, max_size=3)),
        draw(st.lists(st.lists(st.integers(0, 4096), min_size=6, max_size=6), min_size=3, max_size=3)),
    )
    in_channels = draw(st.integers(1, 4))
    side = st.integers(2**levels, 11)  # a norm over very few values amplifies float32's rounding
    fields = {
        "in_channels": in_channels,
        "out_channels": draw(st.sampled_from((in_channels, 4))),
        "center_input_sample": draw(st.booleans()),
        "flip_sin_to_cos": draw(st.booleans()),
        "freq_shift": draw(st.sampled_from((0, 1))),
        "time_embedding_type": embedding,
        "time_embedding_dim": draw(st.none() | st.integers(1, 12).map(lambda n: 2 * n)),
        "time_embedding_act_fn": draw(st.none() | activation),
        "timestep_post_act": draw(st.none() | activation),
        "down_block_types": [f"{kind}DownBlock2D" for kind in down],
        "mid_block_type": middle,
        "up_block_types": [f"{kind}UpBlock2D" for kind in up],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "mid_block_scale_factor": draw(st.sampled_from((1, 1.5, 0.4))),
        "downsample_padding": draw(st.integers(0, 1)),
        "conv_in_kernel": draw(st.sampled_from((1, 3, 5))),
        "conv_out_kernel": draw(st.sampled_from((1, 3, 5))),
        "act_fn": draw(activation),
        "norm_num_groups": groups,
        "norm_eps": draw(st.sampled_from((1e-5, 1e-3, 0.1))),
        "resnet_time_scale_shift": draw(st.sampled_from(("default", "scale_shift"))),
        "attention_head_dim": by_level(st.integers(1, min(widths))),
        "cross_attention_dim": 12 if hid_dim else draw(st.sampled_from((12, [12] * levels))),
        "only_cross_attention": by_level(st.booleans()),
        "use_linear_projection": draw(st.booleans()),
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": reverse,
        "encoder_hid_dim": hid_dim,
        "class_embed_type": draw(st.sampled_from((None, "timestep", "identity"))),
        "num_class_embeds": draw(st.none() | st.integers(2, 5)),
        "addition_embed_type": draw(st.sampled_from((None, "text_time"))),
        "addition_time_embed_dim": size_dim,
        "projection_class_embeddings_input_dim": 6 * size_dim + draw(st.integers(1, 9)),
        "time_cond_proj_dim": draw(st.none() | st.integers(4, 9)),
    }
    return fields, (draw(side), draw(side)), told


@examples(60, derandomize=True)  # one network in thousands exceeds the tolerance for rounding
@given(networks())
def test_any_network(drawn: tuple[Fields, tuple[int, int], Told]) -> None:
    check(*drawn)


def test_activations_differ_by_more_than_parity_allows() -> None:
    """So the comparisons above can tell them apart, in each of the three places."""
    x, t, context, _ = inputs({}, (8, 8))
    for field in ("act_fn", "timestep_post_act", "time_embedding_act_fn"):
        outs = []
        for name in ("silu", "mish", "gelu", "relu"):
            outs.append(network_of(reference({field: name}), {field: name})(x, t, context))
        for i, out in enumerate(outs):
            assert all((out - other).abs().max() > 1e-3 for other in outs[:i])


@torch.inference_mode()
def test_the_embedder_tells_the_network_all_that_it_knows() -> None:
    """What a backend runs takes the embeddings of time and text. They are the network's own."""
    fields = {**XL, "encoder_hid_dim": TEXT_DIM, "num_class_embeds": 5, "time_cond_proj_dim": 4}
    network = network_of(reference(fields), fields)
    x, t, context, labels = inputs(fields, (8, 8))
    given: Any = added(fields, TOLD)
    assert labels is not None
    embedder = network.embedder
    assert (embedder.dim, embedder.context_dim, embedder.text_dim, embedder.pooled_dim) == (32, 12, TEXT_DIM, 9)
    assert embedder.of_label is not None
    assert embedder.of_text is not None
    assert embedder.of_added is not None
    emb = embedder.of_time(t, given["w"]) + embedder.of_label(labels) + embedder.of_added(*given["added"])
    out = network.denoise(x, emb, embedder.of_text(context))
    assert torch.equal(out, network(x, t, context, labels, **given))
    for other in ({"added": given["added"]}, {"w": given["w"], "added": (given["added"][0], torch.zeros(3, 6))}):
        assert not torch.equal(out, network(x, t, context, labels, **other))
    assert not torch.equal(out, network(x, t, context, **given))
    plain = UNet2DCondition(UNet2DConditionConfig.model_validate(BASE)).embedder
    assert (plain.of_text, plain.of_added, plain.text_dim, plain.pooled_dim) == (None, None, 12, None)


def test_a_network_is_given_what_it_takes() -> None:
    x, t, context, _ = inputs({}, (8, 8))
    with pytest.raises(ValueError, match="the network has no guidance embedded, and is given w"):
        network_of(reference({}), {})(x, t, context, w=torch.ones(3))
    x, t, context, _ = inputs(XL, (8, 8))
    with pytest.raises(ValueError, match="the network is told pooled texts and sizes, and is given none"):
        network_of(reference(XL), XL)(x, t, context)


@examples(200)
@given(st.lists(st.floats(0, 29, width=32), min_size=1, max_size=5), st.integers(4, 300))
def test_guidance_is_encoded_as_diffusers_encodes_it(w: list[float], dim: int) -> None:
    """Bit for bit: 1000·w is so large that the last bits of the frequencies count."""
    numbers = torch.tensor(w)
    assert torch.equal(guidance_embedding(numbers, dim), get_guidance_scale_embedding(numbers, dim))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": [1]}, None),  # for all levels
        ({"attention_head_dim": [2, 2, 2]}, "attention_head_dim has 3 values, and block_out_channels 2 widths"),
        ({"cross_attention_dim": [1, 2, 3]}, "cross_attention_dim has 3 values, and block_out_channels 2 widths"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types has 1 values, and block_out_channels 2 widths"),
        (
            {"cross_attention_dim": [12, 13]},
            "cross_attention_dim has [12, 13], and must be one number where it is used",
        ),
        ({"attention_head_dim": [9, 2]}, "attention_head_dim is 9, the number of heads, and a width only 8"),
        ({"norm_num_groups": 3}, "norm_num_groups is 3, which does not divide a width of 8"),
        ({"conv_in_kernel": 4}, "conv_in_kernel is 4, and must be odd: the size would change"),
        ({"freq_shift": 4}, "freq_shift is 4, which leaves no frequency of 8"),
        (
            {"time_embedding_type": "fourier", "time_embedding_dim": 7},
            "time_embedding_dim is 7, and must be even with fourier",
        ),
        (
            {"transformer_layers_per_block": [[1, 1], 1]},
            "reverse_transformer_layers_per_block is required where transformer_layers_per_block has lists",
        ),
        (
            {
                "layers_per_block": 3,
                "transformer_layers_per_block": [[1, 1], 1],
                "reverse_transformer_layers_per_block": [1, 1],
            },
            "transformer_layers_per_block has a list of 2 numbers for 3 layers",
        ),
        (
            {"reverse_transformer_layers_per_block": [1, [1, 1]], "layers_per_block": 2},
            "reverse_transformer_layers_per_block has a list of 2 numbers for 3 layers",
        ),
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim is required where encoder_hid_dim_type is text_proj"),
        (
            {"encoder_hid_dim": 7, "cross_attention_dim": [12, 12]},
            "cross_attention_dim must be one number where encoder_hid_dim is set",
        ),
        (
            {
                "down_block_types": ["DownBlock2D"] * 2,
                "up_block_types": ["UpBlock2D"] * 2,
                "mid_block_type": "UNetMidBlock2D",
            },
            "down_block_types, mid_block_type and up_block_types have no CrossAttn block for the text",
        ),
        (
            {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 50},
            "addition_time_embed_dim is required where addition_embed_type is text_time",
        ),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
            "projection_class_embeddings_input_dim is required where addition_embed_type is text_time",
        ),
        (
            {**XL, "projection_class_embeddings_input_dim": 48},
            "projection_class_embeddings_input_dim is 48, and must be more than 6 times addition_time_embed_dim: 48",
        ),
        ({**XL, "addition_time_embed_dim": 1}, "freq_shift is 0, which leaves no frequency of 1"),
        (
            {"layers_per_block": 64, "transformer_layers_per_block": 64},
            "transformer_layers_per_block makes more than 1024 transformer blocks",
        ),
    ],
    ids=str,
)
def test_networks_that_cannot_be_built_are_refused(changes: Fields, message: str | None) -> None:
    if message is None:
        UNet2DConditionConfig.model_validate({**BASE, **changes})
        return
    with pytest.raises(ValidationError) as refused:
        UNet2DConditionConfig.model_validate({**BASE, **changes})
    [error] = refused.value.errors()
    assert error["msg"] == f"Value error, {message}"


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"layers_per_block": "2"}, ("layers_per_block", 0)),
        ({"attention_head_dim": [True, 2]}, ("attention_head_dim", 0)),
        ({"only_cross_attention": [False, 1]}, ("only_cross_attention", 1)),
        ({"transformer_layers_per_block": [1, [1, 65]]}, ("transformer_layers_per_block", 1, 1)),
        ({"cross_attention_dim": None}, ("cross_attention_dim", 0)),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, ("mid_block_type",)),
        ({"block_out_channels": [8, 2**15]}, ("block_out_channels", 1)),
        ({"dual_cross_attention": True}, ("dual_cross_attention",)),
        ({"addition_embed_type": "text"}, ("addition_embed_type",)),
        ({"addition_time_embed_dim": 0}, ("addition_time_embed_dim",)),
        ({"time_cond_proj_dim": 3}, ("time_cond_proj_dim",)),  # which leaves no frequency
    ],
    ids=str,
)
def test_a_refusal_names_the_value(changes: Fields, place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        UNet2DConditionConfig.model_validate({**BASE, **changes})
    assert [error["loc"] for error in refused.value.errors()] == [place]


def test_the_sizes_that_a_network_takes() -> None:
    network = UNet2DCondition(UNet2DConditionConfig.model_validate({**BASE, **THREE_LEVELS, "downsample_padding": 0}))
    assert network.factor == 1
    network.check_size(4, 5)
    message = "image size 3x9: height and width must be at least 4"
    with pytest.raises(ValueError, match=message):
        network.check_size(3, 9)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros((1, 4, 3, 9)), torch.tensor([1]), torch.zeros((1, TOKENS, 12)))
