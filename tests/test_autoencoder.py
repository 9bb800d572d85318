"""The autoencoder, loaded from folders that diffusers wrote, computes what its VQModel and AutoencoderKL compute."""

import gc
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import load_autoencoder
from model.checkpoints.native import parse
from model.nets.autoencoder import Autoencoder, AutoencoderConfig, Codebook, DecoderOnly, EncoderOnly
from model.nets.layers import Attention
from tests.checkpoints import save_latent_pipeline, small_autoencoder
from tests.networks import fill
from tests.properties import examples
from tests.reference import AutoencoderKL, VQModel
from tests.test_tensors import GIGABYTE, memory

Fields = dict[str, Any]

KINDS = {"vq": VQModel, "kl": AutoencoderKL}
THREE_LEVELS: Fields = {"block_out_channels": (8, 12, 4)}


def images(channels: int, height: int, width: int) -> Tensor:
    return torch.randn((3, channels, height, width), generator=torch.Generator().manual_seed(5))


def assert_close(out: Tensor, expected: Tensor) -> None:
    """|difference| ≤ 1e-5 × max |out|, image by image."""
    assert out.dtype == expected.dtype == torch.float32
    assert out.shape == expected.shape
    assert expected.isfinite().all()
    for image, image_expected in zip(out, expected, strict=True):
        assert (image - image_expected).abs().max() <= 1e-5 * image_expected.abs().max()


@torch.inference_mode()
def check(kind: str, fields: Fields, size: tuple[int, int], folder: Path) -> None:
    """Write an autoencoder with diffusers, load it, and compare encoding and decoding of latents of `size`."""
    theirs = small_autoencoder(KINDS[kind], **fields)
    ours = load_autoencoder(save_latent_pipeline(folder, theirs))
    assert ours.config.kind == kind
    config = theirs.config
    assert ours.config.factor == 2 ** (len(config.block_out_channels) - 1)
    assert ours.config.channels == (config.get("vq_embed_dim") or config.latent_channels)

    x = images(config.in_channels, size[0] * ours.config.factor, size[1] * ours.config.factor)
    encoded = theirs.encode(x)
    mean = encoded.latents if kind == "vq" else encoded.latent_dist.mean
    moments = encoded.latents if kind == "vq" else encoded.latent_dist.parameters
    assert_close(ours.moments(x), moments)
    assert_close(ours.encode(x), mean * config.scaling_factor)
    if kind == "kl":
        assert_close(ours.distribution(x)[:, 1], encoded.latent_dist.std * config.scaling_factor)

    z = images(ours.config.channels, *size)
    decoded = theirs.decode(z / config.scaling_factor).sample
    assert_close(ours.decode(z), decoded)
    assert decoded.std() > 0.01  # not a flat grey


CASES: dict[str, Fields] = {
    "base": {},
    "layers 2": {"layers_per_block": 2},
    "layers 3": {"layers_per_block": 3, **THREE_LEVELS},
    "three levels": THREE_LEVELS,
    "one level": {"block_out_channels": (8,)},
    "no middle attention": {"mid_block_add_attention": False},
    "no middle attention, three levels": {**THREE_LEVELS, "mid_block_add_attention": False},
    "groups 1": {"norm_num_groups": 1},
    "groups 3": {"norm_num_groups": 3, "block_out_channels": (6, 15)},
    **{f"act {name}": {"act_fn": name} for name in ("silu", "swish", "mish", "gelu", "relu", "SiLU")},
    "grey": {"in_channels": 1, "out_channels": 1},
    "five latent channels": {"latent_channels": 5},
    "one latent channel": {"latent_channels": 1},
    "not scaled": {"scaling_factor": 1.0},
    "scaled up": {"scaling_factor": 3.5},
}
KL_CASES: dict[str, Fields] = {
    "no quant_conv": {"use_quant_conv": False},
    "no post_quant_conv": {"use_post_quant_conv": False},
    "neither": {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 2},
}
VQ_CASES: dict[str, Fields] = {
    "narrower codes": {"vq_embed_dim": 2},
    "wider codes": {"vq_embed_dim": 6},
    "as wide codes, named": {"vq_embed_dim": 3},
    "one code": {"num_vq_embeddings": 1},
    "many codes": {"num_vq_embeddings": 3000},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_fields(kind: str, fields: Fields, tmp_path: Path) -> None:
    check(kind, fields, (4, 6), tmp_path)


@pytest.mark.parametrize("fields", KL_CASES.values(), ids=KL_CASES)
def test_fields_of_kl(fields: Fields, tmp_path: Path) -> None:
    check("kl", fields, (4, 6), tmp_path)


@pytest.mark.parametrize("fields", VQ_CASES.values(), ids=VQ_CASES)
def test_fields_of_vq(fields: Fields, tmp_path: Path) -> None:
    check("vq", fields, (4, 6), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(2, 9), (9, 2), (7, 5), (16, 16)])
def test_sizes(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    check(kind, {}, size, tmp_path)


def test_more_positions_than_attend_at_once(tmp_path: Path) -> None:
    check("kl", {"block_out_channels": (4,), "layers_per_block": 1}, (65, 64), tmp_path)


@st.composite
def autoencoders(draw: st.DrawFn) -> tuple[str, Fields, tuple[int, int]]:
    """Any small valid autoencoder, and a size of its latents."""
    kind = draw(st.sampled_from(sorted(KINDS)))
    groups = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(2, 4), min_size=1, max_size=3))
    channels = draw(st.integers(1, 4))
    own: Fields = (
        {
            "num_vq_embeddings": draw(st.sampled_from((1, 7, 300))),
            "vq_embed_dim": draw(st.none() | st.integers(1, 4)),
        }
        if kind == "vq"
        else {"use_quant_conv": draw(st.booleans()), "use_post_quant_conv": draw(st.booleans())}
    )
    return (
        kind,
        {
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": tuple(groups * width for width in widths),
            "norm_num_groups": groups,
            "layers_per_block": draw(st.integers(1, 2)),
            "act_fn": draw(st.sampled_from(("silu", "swish", "mish", "gelu", "relu"))),
            "latent_channels": draw(st.integers(1, 4)),
            "mid_block_add_attention": draw(st.booleans()),
            "scaling_factor": draw(st.sampled_from((0.18215, 1.0, 2.0))),
            **own,
        },
        (2 * draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))),
    )


@examples(30, derandomize=True)  # one network in thousands exceeds the tolerance for rounding
@given(autoencoders())
def test_any_autoencoder(drawn: tuple[str, Fields, tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(*drawn, Path(folder))


def test_activations_differ_by_more_than_parity_allows() -> None:
    """So the comparisons above can tell them apart."""
    z, outs = images(3, 4, 6), []
    for name in ("silu", "mish", "gelu", "relu"):
        autoencoder = Autoencoder(config_of("kl", act_fn=name))
        fill(autoencoder)
        outs.append(autoencoder.decode(z))
    for i, out in enumerate(outs):
        assert all((out - other).abs().max() > 1e-2 for other in outs[:i])


# Codes.


def codebook(codes: int, channels: int) -> Codebook:
    made = Codebook(codes, channels)
    fill(made)
    return made


def assert_nearest(quantize: Codebook, z: Tensor) -> None:
    """Each position has a code, and in float64 no other code is nearer by more than rounding."""
    codes = quantize.embedding.weight.double()
    for image, chosen in zip(z.double(), quantize(z).double(), strict=True):
        places, found = image.flatten(1).T, chosen.flatten(1).T
        distances = torch.cat([torch.cdist(part, codes).amin(1) for part in places.split(64)])
        to_codes = torch.cat([torch.cdist(part, codes).amin(1) for part in found.split(64)])
        assert to_codes.max() <= 1e-6
        torch.testing.assert_close((found - places).norm(dim=1), distances, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("codes", "channels"), [(1, 3), (2, 1), (32, 3), (500, 6), (9000, 3)])
def test_codes_are_the_nearest(codes: int, channels: int) -> None:
    assert_nearest(codebook(codes, channels), images(channels, 9, 14))


def test_codes_are_the_nearest_in_parts() -> None:
    """More distances than one chunk has."""
    codes, (height, width) = 2**14, (40, 50)
    assert codes * height * width > 2**24
    assert_nearest(codebook(codes, 3), images(3, height, width)[:1])


def test_codes_themselves_stay() -> None:
    quantize = codebook(32, 3)
    z = quantize.embedding.weight.T.reshape(1, 3, 4, 8).contiguous()
    assert torch.equal(quantize(z), z)


@pytest.mark.parametrize("codes", [7, 300, 9000])
@pytest.mark.parametrize("size", [(3, 3), (8, 8), (16, 24)])
def test_codes_of_an_image_do_not_depend_on_its_company(codes: int, size: tuple[int, int]) -> None:
    """Bit-equal even if rounding decides between two codes. torch rounds differently for few positions."""
    quantize = codebook(codes, 3)
    weight = quantize.embedding.weight
    some = torch.randint(0, codes, (3 * size[0] * size[1],), generator=torch.Generator().manual_seed(0))
    others = torch.cdist(weight[some], weight).topk(2, largest=False).indices[:, 1]
    halfway = (weight[some] + weight[others]) / 2
    z = halfway.reshape(3, *size, 3).permute(0, 3, 1, 2).contiguous()
    together = quantize(z)
    for i in range(len(z)):
        assert torch.equal(together[i : i + 1], quantize(z[i : i + 1]))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_codes_are_those_of_diffusers_to_the_bit(channels: int) -> None:
    theirs = small_autoencoder(VQModel, num_vq_embeddings=300, vq_embed_dim=channels).quantize
    ours = Codebook(300, channels)
    ours.load_state_dict(theirs.state_dict())
    for z in torch.split(images(channels, 9, 14), 1):
        assert torch.equal(ours(z), theirs(z)[0])


@torch.inference_mode()
def test_distances_to_codes_are_bounded() -> None:
    """Without chunks this would take 1 GB."""
    quantize = codebook(2**16, 1)
    z = images(1, 64, 64)[:1]
    with memory(GIGABYTE // 2):
        chosen = quantize(z)
    assert (chosen - z).abs().max() < 1


def config_of(kind: str, **changes: object) -> AutoencoderConfig:
    fields: Fields = {"kind": kind, "latent_channels": 3, "block_out_channels": (8, 12), "norm_num_groups": 4}
    return AutoencoderConfig(**{**fields, **({"num_vq_embeddings": 32} if kind == "vq" else {}), **changes})


def autoencoder_of(kind: str, **changes: object) -> Autoencoder:
    autoencoder = Autoencoder(config_of(kind, scaling_factor=0.7, **changes))
    fill(autoencoder)
    return autoencoder


@torch.inference_mode()
def test_codes_are_taken_in_float32_under_autocast() -> None:
    """Another code would give another image."""
    unscaled, z = autoencoder_of("vq", num_vq_embeddings=2000).unscaled, images(3, 8, 8)
    expected = unscaled(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(unscaled(z), expected)


# Encoder and decoder alone.


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_decoding_is_unscaling_and_then_the_decoder(kind: str) -> None:
    autoencoder = autoencoder_of(kind)
    z = images(3, 4, 6)
    unscaled = autoencoder.unscaled(z)
    if kind == "kl":
        assert torch.equal(unscaled, z / 0.7)
    else:
        assert_nearest(codebook_of(autoencoder), z / 0.7)
        assert torch.equal(unscaled, codebook_of(autoencoder)(z / 0.7))
    decoder = DecoderOnly(autoencoder)
    image = autoencoder.decode(z)
    assert image.shape == (3, 3, 8, 12)
    assert torch.equal(decoder(unscaled), image)


def codebook_of(autoencoder: Autoencoder) -> Codebook:
    assert autoencoder.quantize is not None
    return autoencoder.quantize


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_encoder_gives_the_means_and_deviations(kind: str) -> None:
    autoencoder = autoencoder_of(kind)
    encoder, x = EncoderOnly(autoencoder), images(3, 8, 12)
    expected = autoencoder.encode(x)
    assert expected.shape == (3, 3, 4, 6)
    mean, *std = encoder(x).unbind(1)
    assert torch.equal(mean, expected)
    assert len(std) == (kind != "vq")
    assert all((one > 0).all() for one in std)


@pytest.mark.parametrize("kind", KINDS)
def test_unscaling_outlives_the_autoencoder(kind: str) -> None:
    """Backends keep copies of the halves, so the autoencoder can be freed."""
    autoencoder = autoencoder_of(kind)
    unscaled, gone = autoencoder.unscaled, weakref.ref(autoencoder.decoder)
    del autoencoder
    gc.collect()
    assert gone() is None
    assert unscaled(images(3, 4, 6)).shape == (3, 3, 4, 6)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("at_once", [1, 5, 34, 35, 36, 4096])
@torch.inference_mode()
def test_attention_in_parts_is_attention(at_once: int, heads: int) -> None:
    whole, parts = Attention(12, 4, heads=heads), Attention(12, 4, heads=heads, at_once=at_once)
    fill(whole)
    parts.load_state_dict(whole.state_dict())
    x = images(12, 5, 7)
    assert_close(parts(x), whole(x))
    assert (whole(x) - x).abs().max() > 0.1


# Refused configs.

VQ: Fields = {"kind": "vq", "latent_channels": 3, "num_vq_embeddings": 32}
KL: Fields = {"kind": "kl", "latent_channels": 3}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {**KL, "block_out_channels": [8, 12], "norm_num_groups": 8},
            ": norm_num_groups is 8, which does not divide a width of 12",
        ),
        (
            {**KL, "num_vq_embeddings": 32},
            ": num_vq_embeddings and vq_embed_dim are for kind vq, and this is kl",
        ),
        ({**KL, "vq_embed_dim": 3}, ": num_vq_embeddings and vq_embed_dim are for kind vq, and this is kl"),
        ({**VQ, "num_vq_embeddings": None}, ": num_vq_embeddings is required where kind is vq"),
        (
            {**VQ, "use_quant_conv": False},
            ": kind is vq, and use_quant_conv and use_post_quant_conv must be true with it",
        ),
        (
            {**VQ, "use_post_quant_conv": False},
            ": kind is vq, and use_quant_conv and use_post_quant_conv must be true with it",
        ),
        ({"kind": "kl"}, ".latent_channels: is required"),
        ({"latent_channels": 3}, ".kind: is required"),
        ({**KL, "kind": "tiny"}, ".kind is tiny, and must be 'kl' or 'vq'"),
        ({**KL, "block_out_channels": []}, ".block_out_channels is [], and must have at least 1 item"),
        (
            {**KL, "block_out_channels": [32] * 11},
            ".block_out_channels is [32, 32, 32, 32, 32, 32, 32, 32, 32, 32, 32], and must have at most 10 items",
        ),
        (
            {**KL, "block_out_channels": [2**15]},
            ".block_out_channels.0 is 32768, and must be less than or equal to 16384",
        ),
        ({**KL, "layers_per_block": 0}, ".layers_per_block is 0, and must be greater than or equal to 1"),
        ({**KL, "layers_per_block": 33}, ".layers_per_block is 33, and must be less than or equal to 32"),
        ({**KL, "image_channels": 0}, ".image_channels is 0, and must be greater than or equal to 1"),
        ({**KL, "latent_channels": "3"}, ".latent_channels is 3, and must be a valid integer"),
        (
            {**VQ, "num_vq_embeddings": 10**9},
            ".num_vq_embeddings is 1000000000, and must be less than or equal to 1000000",
        ),
        ({**KL, "norm_num_groups": 0}, ".norm_num_groups is 0, and must be greater than or equal to 1"),
        ({**KL, "act_fn": "tanh"}, ".act_fn is tanh, and must be 'silu', 'swish', 'mish', 'gelu' or 'relu'"),
        ({**KL, "scaling_factor": 0}, ".scaling_factor is 0, and must be greater than 0"),
        ({**KL, "scaling_factor": float("nan")}, ".scaling_factor is nan, and must be a finite number"),
        ({**KL, "scaling": 2}, ".scaling: there is no such field"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_configs_refused(fields: Fields, message: str) -> None:
    values: Fields = {
        "architecture": "diffusion_unet",
        "in_channels": 3,
        "model_channels": 4,
        "channel_multipliers": [1, 2],
        "image_size": [8, 8],
        "schedule": {},
        "autoencoder": fields,
    }
    with pytest.raises(CheckpointError) as error:
        parse(Path("config.json"), values)
    assert str(error.value).startswith(f"config.json: autoencoder{message}")


def test_what_is_refused_is_what_was_changed() -> None:
    """The configs that these tests change are valid."""
    for fields in (VQ, KL):
        assert Autoencoder(AutoencoderConfig(**fields)).decode(torch.zeros(1, 3, 2, 2)).shape == (1, 3, 2, 2)
