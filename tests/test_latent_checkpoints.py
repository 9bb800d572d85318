"""Checkpoints of latent diffusion: a U-Net and its VAE, in diffusers' format and in ours."""

import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, convert, find, load, load_autoencoder
from model.checkpoints.native import AUTOENCODER, CONFIG, WEIGHTS
from model.description import Recommended, VAEDescription
from model.nets.autoencoder import Autoencoder, AutoencoderConfig
from model.nets.unet2d import UNet2D
from model.rows import Forward
from model.samplers import sample_table
from model.schedule import Schedule
from tests.checkpoints import (
    STEM,
    Json,
    edit,
    refusal,
    same_values,
    save_latent_pipeline,
    save_pipeline,
    small_autoencoder,
    small_unet,
    without_folder,
)
from tests.reference import AutoencoderKL, DDIMScheduler, DDPMScheduler, LDMPipeline, UNet2DModel, VQModel
from tests.test_diffusers import cached, old_key
from tests.test_tensors import GIGABYTE, PICKLE, POINTER, memory, moved, payload
from tests.trajectories import labelled, runner_of

SAFE = f"{STEM}.safetensors"
BIN = f"{STEM}.bin"
SHARD = "20KB"  # a dozen shards of a small network
INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
VQVAE_CONFIG = "vqvae/config.json"
VQVAE = f"vqvae/{SAFE}"
VQVAE_BIN = f"vqvae/{BIN}"
KINDS = {"vq": VQModel, "kl": AutoencoderKL}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with a VQModel."""
    return save_latent_pipeline(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def saved_kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with an AutoencoderKL."""
    return save_latent_pipeline(tmp_path_factory.mktemp("saved"), small_autoencoder(AutoencoderKL))


@pytest.fixture(scope="module")
def whole(saved: Path) -> Checkpoint:
    """The networks loaded from their pipeline."""
    return load(saved)


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    """A pipeline with a VQModel that the test may change."""
    return shutil.copytree(saved, tmp_path / "pipeline")


@pytest.fixture
def kl_pipeline(saved_kl: Path, tmp_path: Path) -> Path:
    """A pipeline with an AutoencoderKL that the test may change."""
    return shutil.copytree(saved_kl, tmp_path / "kl_pipeline")


# Loading.


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_pipeline_is_its_networks(kind: str, tmp_path: Path) -> None:
    vae = small_autoencoder(KINDS[kind], block_out_channels=(8, 8, 12))
    unet = small_unet(sample_size=(8, 12), num_class_embeds=5)
    checkpoint = load(save_latent_pipeline(tmp_path / "it", vae, unet))
    rng = torch.Generator().manual_seed(0)
    z, t, labels = torch.randn((2, 3, 8, 12), generator=rng), torch.tensor([3, 900]), torch.tensor([4, 1])
    out, expected = checkpoint.network(z, t, labels), unet(z, t, class_labels=labels).sample
    assert isinstance(checkpoint.network, UNet2D)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()

    autoencoder = autoencoder_of(checkpoint)
    image, decoded = autoencoder.decode(z), vae.decode(z / 0.7).sample
    assert (image - decoded).abs().max() <= 1e-5 * decoded.abs().max()
    x = torch.randn((2, 3, 32, 48), generator=rng)
    encoded = vae.encode(x)
    latents = 0.7 * (encoded.latents if kind == "vq" else encoded.latent_dist.mean)
    assert (autoencoder.encode(x) - latents).abs().max() <= 1e-5 * latents.abs().max()
    assert not autoencoder.training
    assert not any(parameter.requires_grad for parameter in autoencoder.parameters())

    model = checkpoint.description
    assert (model.image_shape, model.sample_shape) == ((3, 32, 48), (3, 8, 12))
    assert (model.out_channels, model.num_classes, model.needs_label) == (3, 5, True)
    assert model.num_parameters == unet.num_parameters()
    assert model.vae == VAEDescription(kind, 4, 0.7, vae.num_parameters())
    assert (model.name, model.architecture) == ("it", "unet_2d")
    assert (model.schedule.beta_schedule, model.schedule.clip_sample) == ("scaled_linear", False)


def autoencoder_of(checkpoint: Checkpoint) -> Autoencoder:
    assert checkpoint.autoencoder is not None
    return checkpoint.autoencoder


def test_pixels_have_no_vae(tmp_path: Path) -> None:
    checkpoint = load(save_pipeline(tmp_path))
    assert checkpoint.autoencoder is None
    assert checkpoint.description.vae is None
    assert checkpoint.description.sample_shape == checkpoint.description.image_shape == (3, 8, 8)


SEEDS = [0, 7]
N = 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
@torch.inference_mode()
def test_images_are_the_pipelines(kind: str, tmp_path: Path) -> None:
    theirs = LDMPipeline(
        small_autoencoder(KINDS[kind]),
        small_unet(),
        DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False),
    )
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path)
    rngs = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = theirs(batch_size=len(SEEDS), generator=rngs, num_inference_steps=N, output_type="np").images
    assert expected.std() > 0.05

    checkpoint = load(tmp_path)
    model = checkpoint.description
    runner = runner_of(checkpoint.network, model.sample_shape, width=len(SEEDS))
    table = sample_table(model.schedule, "ddim", N)
    slots = [runner.admit(labelled(table, seed)) for seed in SEEDS]
    for line in range(len(table)):
        runner.step([Forward(slot, 0, line) for slot in slots])
    latents = torch.from_numpy(np.stack([runner.read(slot).x for slot in slots]))
    images = autoencoder_of(checkpoint).decode(latents).permute(0, 2, 3, 1) / 2 + 0.5
    assert np.abs(images.clamp(0, 1).numpy() - expected).max() <= 1e-4


# Layouts.


def resaved(folder: Path, seed: int = 1, part: str = "vqvae", **saving: Any) -> Path:
    """Save a VAE again, in some way. `seed` 1 is the pipeline's."""
    if seed == 1:
        (folder / part / SAFE).unlink(missing_ok=True)
    small_autoencoder(seed=seed).save_pretrained(folder / part, **saving)
    return folder


def both_resaved(folder: Path, seeds: tuple[int, int] = (0, 1), **saving: Any) -> Path:
    """Save both networks again. The seeds 0 and 1 are the pipeline's."""
    if seeds == (0, 1):
        (folder / "unet" / SAFE).unlink(missing_ok=True)
    small_unet(seed=seeds[0]).save_pretrained(folder / "unet", **saving)
    return resaved(folder, seeds[1], **saving)


def two_variants(folder: Path, **saving: Any) -> Path:
    """fp16 has the networks; ema has others."""
    both_resaved(folder, variant="fp16", **saving)
    return both_resaved(folder, (2, 3), variant="ema", **saving)


def beside_variants(folder: Path) -> Path:
    return both_resaved(both_resaved(folder, (2, 3), variant="ema"), (4, 5), variant="fp16")


def as_vae(folder: Path) -> Path:
    """The part has the name of later pipelines."""
    (folder / "vqvae").rename(folder / "vae")
    edit(folder / INDEX, {"vae": ["diffusers", "VQModel"]}, without="vqvae")
    return folder


def with_old_keys(folder: Path) -> Path:
    weights = {f"module.{old_key(key)}": tensor for key, tensor in load_file(folder / VQVAE).items()}
    assert "module.decoder.mid_block.attentions.0.proj_attn.weight" in weights
    save_file(weights, folder / VQVAE)
    return folder


def linked_inside(folder: Path) -> Path:
    for name in (VQVAE, VQVAE_CONFIG):
        moved(folder / name, folder / "store" / Path(name).name)
    return folder


def published(folder: Path) -> Path:
    """Like CompVis/ldm-celebahq-256: pickles, and the names of that time."""
    for part in ("unet", "vqvae"):
        weights = {old_key(key): tensor for key, tensor in load_file(folder / part / SAFE).items()}
        torch.save(weights, folder / part / BIN)
        (folder / part / SAFE).unlink()
    return folder


def unchanged(folder: Path) -> Path:
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "by its folder": (unchanged, ""),
    "by its index": (unchanged, INDEX),
    "by the U-Net's folder": (unchanged, "unet"),
    "by the U-Net's config": (unchanged, UNET_CONFIG),
    "by the U-Net's weights": (unchanged, f"unet/{SAFE}"),
    "by the VAE's folder": (unchanged, "vqvae"),
    "by the VAE's config": (unchanged, VQVAE_CONFIG),
    "by the VAE's weights": (unchanged, VQVAE),
    "vae": (as_vae, ""),
    "vae, by the U-Net's folder": (as_vae, "unet"),
    "vae, by its weights": (as_vae, f"vae/{SAFE}"),
    "old names": (with_old_keys, ""),
    "as published, of pickles": (published, ""),
    "pickle": (lambda folder: resaved(folder, safe_serialization=False), ""),
    "sharded": (lambda folder: resaved(folder, max_shard_size=SHARD), ""),
    "sharded, by its index": (lambda folder: resaved(folder, max_shard_size=SHARD), f"{VQVAE}.index.json"),
    "sharded pickle": (lambda folder: resaved(folder, max_shard_size=SHARD, safe_serialization=False), ""),
    "beside a pickle": (lambda folder: resaved(folder, seed=3, safe_serialization=False), ""),
    "fp16": (lambda folder: resaved(folder, variant="fp16"), ""),
    "fp16 of both": (lambda folder: both_resaved(folder, variant="fp16"), ""),
    "fp16 of both, sharded": (lambda folder: both_resaved(folder, variant="fp16", max_shard_size=SHARD), ""),
    "fp16, beside ema": (two_variants, f"unet/{STEM}.fp16.safetensors"),
    "fp16, beside ema, by the VAE": (two_variants, f"vqvae/{STEM}.fp16.safetensors"),
    "fp16, beside ema, sharded": (
        lambda folder: two_variants(folder, max_shard_size=SHARD),
        f"unet/{SAFE}.index.fp16.json",
    ),
    "beside variants": (beside_variants, ""),
    "beside variants, by the VAE": (beside_variants, VQVAE),
    "links inside": (linked_inside, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_networks(layout: str, pipeline: Path, whole: Checkpoint) -> None:
    make, name = LAYOUTS[layout]
    checkpoint = load(make(pipeline) / name, allow_pickle="pickle" in layout)
    assert same_values(checkpoint, whole)
    assert checkpoint.description == replace(whole.description, name="pipeline")


@pytest.mark.parametrize("name", ["", "unet", "vqvae", f"unet/{SAFE}", VQVAE])
def test_cache_of_huggingface_hub(name: str, tmp_path: Path, whole: Checkpoint) -> None:
    checkpoint = load(cached(tmp_path, save_latent_pipeline) / name)
    assert checkpoint.description.digest == whole.description.digest
    assert checkpoint.description.name == "google/ddpm-tiny-8"


@pytest.mark.parametrize(("here", "named"), [("", "unet"), ("unet", "."), ("vqvae", "."), ("vqvae", SAFE)])
def test_relative_paths(
    here: str, named: str, pipeline: Path, whole: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline / here)
    description = load(Path(named)).description
    assert (description.digest, description.name) == (whole.description.digest, "pipeline")


def test_a_named_variant_is_also_the_vaes_where_it_has_that(pipeline: Path) -> None:
    both_resaved(pipeline, (2, 3), variant="ema")
    small_unet(seed=4).save_pretrained(pipeline / "unet", variant="other")
    for variant, unet, vae in (("", 0, 1), (".ema", 2, 3), (".other", 4, 1)):
        checkpoint = load(pipeline / "unet" / f"{STEM}{variant}.safetensors")
        assert torch.equal(conv_in(checkpoint.network), conv_in(small_unet(seed=unet)))
        decoder, expected = autoencoder_of(checkpoint).decoder, small_autoencoder(seed=vae).decoder
        assert torch.equal(conv_in(decoder), conv_in(expected))


def conv_in(network: Any) -> torch.Tensor:
    weight: torch.Tensor = network.state_dict()["conv_in.weight"]
    return weight


def test_several_variants_of_the_vae_are_refused_by_name(pipeline: Path) -> None:
    resaved(pipeline, variant="fp16")
    resaved(pipeline, seed=3, variant="ema")
    names = f"{STEM}.ema.safetensors, {STEM}.fp16.safetensors"
    assert refusal(pipeline) == f"vqvae: holds the variants {names}: name one of these files"
    load(pipeline / "vqvae" / f"{STEM}.fp16.safetensors")


def test_a_training_checkpoint_has_the_vae_of_its_pipeline(pipeline: Path) -> None:
    """Without the VAE, latents would be mistaken for images."""
    small_unet(seed=2).save_pretrained(pipeline / "checkpoint-500" / "unet")
    for named in ("checkpoint-500", "checkpoint-500/unet"):
        checkpoint = load(pipeline / named)
        assert torch.equal(conv_in(checkpoint.network), conv_in(small_unet(seed=2)))
        assert autoencoder_of(checkpoint).config.kind == "vq"
        assert checkpoint.description.image_shape == (3, 16, 16)


@pytest.mark.parametrize("named", ["", "unet", UNET_CONFIG, "checkpoint-500", "checkpoint-500/unet"])
@pytest.mark.parametrize("vae", ["vqvae", "vae"])
def test_a_vae_that_no_index_names_is_refused_by_name(pipeline: Path, vae: str, named: str) -> None:
    """No file tells whether the U-Net denoises its latents."""
    shutil.copytree(pipeline / "unet", pipeline / "checkpoint-500" / "unet")
    (pipeline / "vqvae").rename(pipeline / vae)
    (pipeline / INDEX).unlink()
    message = f"{vae}: exists, but no {INDEX} names it: add that file, or move this folder away"
    assert refusal(pipeline / named, pipeline) == message


def test_a_vae_that_the_index_leaves_empty_is_not_taken(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(pipeline / INDEX, {"vqvae": [None, None]})
    assert load(pipeline).autoencoder is None
    assert caplog.messages == [f"pipeline: not used: {VQVAE_CONFIG}"]


def test_the_vae_alone(pipeline: Path, whole: Checkpoint) -> None:
    (pipeline / "unet" / SAFE).write_bytes(b"not trained yet")
    autoencoder = load_autoencoder(pipeline)
    expected = autoencoder_of(whole).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in autoencoder.state_dict().items())
    assert autoencoder.config == autoencoder_of(whole).config


def test_a_checkpoint_of_pixels_has_no_vae_to_load(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "pixels")
    with pytest.raises(CheckpointError) as error:
        load_autoencoder(tmp_path / "pixels")
    assert str(error.value) == f"{tmp_path}/pixels: has no autoencoder"


# Fields.


def config_of(folder: Path) -> AutoencoderConfig:
    config = find(folder).config.autoencoder
    assert config is not None
    return config


def test_the_scaling_factor_that_is_given_is_kept(pipeline: Path, kl_pipeline: Path) -> None:
    for folder in (pipeline, kl_pipeline):
        assert config_of(folder).scaling_factor == 0.7
        edit(folder / VQVAE_CONFIG, {"scaling_factor": 3})
        assert config_of(folder).scaling_factor == 3
        edit(folder / VQVAE_CONFIG, {"scaling_factor": 0.18215})
        assert config_of(folder).scaling_factor == 0.18215


@torch.inference_mode()
def test_vq_without_a_scaling_factor_was_never_scaled(pipeline: Path) -> None:
    """diffusers divides by its default, but these networks were trained without scaling."""
    edit(pipeline / VQVAE_CONFIG, {}, without="scaling_factor")
    checkpoint = load(pipeline)
    assert autoencoder_of(checkpoint).config.scaling_factor == 1.0
    assert checkpoint.description.vae is not None
    assert checkpoint.description.vae.scaling_factor == 1.0
    z = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    expected = small_autoencoder().decode(z).sample
    assert (autoencoder_of(checkpoint).decode(z) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert VQModel.from_pretrained(pipeline / "vqvae", low_cpu_mem_usage=False).config.scaling_factor == 0.18215


def test_kl_without_a_scaling_factor_has_diffusers_default(kl_pipeline: Path) -> None:
    edit(kl_pipeline / VQVAE_CONFIG, {}, without="scaling_factor")
    assert config_of(kl_pipeline).scaling_factor == 0.18215


@pytest.mark.parametrize("kind", KINDS)
def test_fields_left_out_are_diffusers_defaults(kind: str, tmp_path: Path) -> None:
    parameters = inspect.signature(KINDS[kind].__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    folder = save_latent_pipeline(tmp_path, KINDS[kind]())
    (folder / VQVAE_CONFIG).write_text(json.dumps({"_class_name": KINDS[kind].__name__}))
    shared = AutoencoderConfig.model_fields.keys() & defaults.keys()
    assert len(shared) >= 8
    assert config_of(folder).model_dump(include=shared) == {
        **{name: defaults[name] for name in shared},
        "scaling_factor": 1.0 if kind == "vq" else 0.18215,
    }
    assert config_of(folder).image_channels == defaults["in_channels"] == defaults["out_channels"]
    config = load(folder).config.autoencoder  # diffusers' default network
    assert config == config_of(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": 999},
        {"sample_size": [8, 8]},
        {"force_upcast": True},
        {"lookup_from_codebook": True},
        {"norm_type": "group"},
        {"tensor_format": "NCHW"},
        {"_name_or_path": "/somewhere"},
        {"vq_embed_dim": None},
        {"shift_factor": None, "latents_mean": None, "latents_std": None},
        {"act_fn": "SiLU"},
    ],
    ids=str,
)
def test_fields_that_change_nothing(pipeline: Path, whole: Checkpoint, changes: Json) -> None:
    edit(pipeline / VQVAE_CONFIG, changes)
    assert load(pipeline).description.digest == whole.description.digest


BLOCK_DOWN, BLOCK_UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": None}, "_class_name is None, and must be VQModel or AutoencoderKL"),
        (
            {"_class_name": "AsymmetricAutoencoderKL"},
            "_class_name is AsymmetricAutoencoderKL, and must be VQModel or AutoencoderKL",
        ),
        ({"_class_name": ["my", "VQModel"]}, "_class_name is ['my', 'VQModel'], and must be VQModel or AutoencoderKL"),
        ({"norm_type": "spatial"}, "norm_type is spatial, and must be group"),
        (
            {"down_block_types": [BLOCK_DOWN, "AttnDownEncoderBlock2D"]},
            (
                f"down_block_types is ['{BLOCK_DOWN}', 'AttnDownEncoderBlock2D'], "
                f"and must be a list of {BLOCK_DOWN} alone"
            ),
        ),
        (
            {"up_block_types": [BLOCK_UP, "AttnUpDecoderBlock2D"]},
            f"up_block_types is ['{BLOCK_UP}', 'AttnUpDecoderBlock2D'], and must be a list of {BLOCK_UP} alone",
        ),
        ({"up_block_types": BLOCK_UP}, f"up_block_types is {BLOCK_UP}, and must be a list of {BLOCK_UP} alone"),
        ({"down_block_types": None}, f"down_block_types is None, and must be a list of {BLOCK_DOWN} alone"),
        ({"down_block_types": [3, 3]}, f"down_block_types is [3, 3], and must be a list of {BLOCK_DOWN} alone"),
        (
            {"down_block_types": [BLOCK_DOWN]},
            "down_block_types has 1 blocks, and block_out_channels 2 widths",
        ),
        ({"up_block_types": [BLOCK_UP] * 3}, "up_block_types has 3 blocks, and block_out_channels 2 widths"),
        ({"block_out_channels": [8]}, "down_block_types has 2 blocks, and block_out_channels 1 widths"),
        ({"block_out_channels": [8, 14]}, "norm_num_groups is 4, which does not divide a width of 14"),
        ({"block_out_channels": 8}, "block_out_channels is 8, and must be a valid tuple"),
        ({"in_channels": 1}, "in_channels is 1 and out_channels 3, and they must be the same number"),
        ({"out_channels": 4}, "in_channels is 3 and out_channels 4, and they must be the same number"),
        (
            {"in_channels": "3", "out_channels": "3"},
            "in_channels is 3 and out_channels 3, and they must be the same number",
        ),
        ({"act_fn": "tanh"}, "act_fn is tanh, and must be 'silu', 'swish', 'mish', 'gelu' or 'relu'"),
        ({"act_fn": 3}, "act_fn is 3, and must be 'silu', 'swish', 'mish', 'gelu' or 'relu'"),
        ({"scaling_factor": None}, "scaling_factor is None, and must be a valid number"),
        ({"scaling_factor": "1"}, "scaling_factor is 1, and must be a valid number"),
        ({"scaling_factor": 0}, "scaling_factor is 0, and must be greater than 0"),
        ({"num_vq_embeddings": None}, "num_vq_embeddings is required where kind is vq"),
        ({"num_vq_embeddings": 10**9}, "num_vq_embeddings is 1000000000, and must be less than or equal to 1000000"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_vaes_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / VQVAE_CONFIG, changes)
    assert refusal(pipeline) == f"{VQVAE_CONFIG}: {message}"


@pytest.mark.parametrize(
    "changes", [{"shift_factor": 0.1}, {"latents_mean": [0.1] * 3}, {"latents_std": [1.1] * 3}], ids=str
)
def test_other_scales_of_kl_are_refused(kl_pipeline: Path, changes: Json) -> None:
    edit(kl_pipeline / VQVAE_CONFIG, changes)
    [(field, value)] = changes.items()
    message = f"{field} is {value}, and must be null: other scales of latents are not supported"
    assert refusal(kl_pipeline) == f"{VQVAE_CONFIG}: {message}"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("vq", {"use_quant_conv": False}),
        ("vq", {"shift_factor": 0.1, "latents_mean": [0.1] * 3}),
        ("vq", {"kind": "kl", "image_channels": 1}),  # fields of our config only
        ("vq", {"two\nlines": 1, "embed_dim": 4}),
        ("kl", {"num_vq_embeddings": 8}),
        ("kl", {"vq_embed_dim": 4, "norm_type": "spatial"}),
    ],
    ids=str,
)
def test_fields_that_the_class_does_not_know_are_passed_over_and_named(
    kind: str, changes: Json, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Like diffusers."""
    folder = save_latent_pipeline(tmp_path, small_autoencoder(KINDS[kind]))
    before = load(folder).description.digest
    assert caplog.messages == []
    edit(folder / VQVAE_CONFIG, changes)
    KINDS[kind].from_pretrained(folder / "vqvae")
    caplog.clear()
    assert load(folder).description.digest == before
    names = ", ".join(sorted(changes)).replace("\n", " ")
    assert caplog.messages == [f"{folder / VQVAE_CONFIG}: unknown fields are ignored: {names}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_of_other_latents_is_refused(kind: str, tmp_path: Path) -> None:
    fields: Json = {"vq_embed_dim": 4} if kind == "vq" else {"latent_channels": 4}
    save_latent_pipeline(tmp_path, small_autoencoder(KINDS[kind], **fields), small_unet())
    message = "autoencoder has latents of 4 channels, and the network denoises 3"
    assert refusal(tmp_path) == f"{UNET_CONFIG}: {message}"


@pytest.mark.parametrize(
    ("sample_size", "message"),
    [
        (None, f"{UNET_CONFIG}: sample_size is None, and must be the latents' size or [height, width]"),
        (5000, f"{UNET_CONFIG}: image_size is [10000, 10000], and must be from 1 to 8192"),
        (9, f"{UNET_CONFIG}: image size 9x9 cannot be halved 1 times: height and width must be multiples of 2"),
    ],
)
def test_sizes_of_latents_refused(pipeline: Path, sample_size: object, message: str) -> None:
    edit(pipeline / UNET_CONFIG, {"sample_size": sample_size})
    assert refusal(pipeline) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_encoder": ["transformers", "CLIPTextModel"]},
            "has the part text_encoder, and the parts must be unet, scheduler and vqvae or vae",
        ),
        (
            {"vqvae": ["my_code", "MyVQ"]},
            "vqvae is my_code.MyVQ, and must be a class of diffusers: other code is never run",
        ),
        ({"vqvae": ["diffusers"]}, "vqvae is ['diffusers'], and must be a library and a class"),
        ({"vae": ["diffusers", "AutoencoderKL"]}, "names vqvae and vae, and must name one of them"),
    ],
    ids=str,
)
def test_pipelines_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / INDEX, changes)
    for name in ("", "unet", "vqvae", VQVAE):
        assert refusal(pipeline / name, pipeline) == f"{INDEX}: {message}"


@pytest.mark.parametrize("name", [VQVAE_CONFIG, VQVAE])
def test_missing_files_are_named(pipeline: Path, name: str) -> None:
    (pipeline / name).unlink()
    expected = {
        VQVAE_CONFIG: f"{INDEX}: names vqvae, and there is no {VQVAE_CONFIG}",
        VQVAE: f"vqvae: holds no {SAFE}",
    }
    assert refusal(pipeline) == expected[name]


def test_a_missing_folder_is_named(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "vqvae")
    assert refusal(pipeline) == f"{INDEX}: names vqvae, and there is no {VQVAE_CONFIG}"


@pytest.mark.parametrize("text", [b"", b"[]", b'{"_class_name": "\xff"}'], ids=["empty", "list", "encoding"])
def test_configs_that_are_no_json_objects(pipeline: Path, text: bytes) -> None:
    (pipeline / VQVAE_CONFIG).write_bytes(text)
    assert refusal(pipeline).startswith(f"{VQVAE_CONFIG}: ")


def test_a_vae_alone_is_no_checkpoint(tmp_path: Path) -> None:
    for name in ("vae", "other"):
        small_autoencoder().save_pretrained(tmp_path / name)
        assert refusal(tmp_path / name) == "config.json: _class_name is VQModel, and must be UNet2DModel"


# Hostile files, as for the U-Net.

KEY = "quantize.embedding.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {**weights, KEY: torch.zeros(32, 4)}, f"{KEY} is [32, 4], and must be [32, 3]"),
        (lambda weights: {key: weights[key] for key in weights if key != KEY}, f"lacks the key {KEY}, [32, 3]"),
        (
            lambda weights: {**weights, "decoder.more": torch.zeros(1)},
            "has the key decoder.more, which the network of config.json lacks",
        ),
        (
            lambda weights: {**weights, KEY: torch.zeros((32, 3), dtype=torch.int64)},
            f"{KEY} is I64, and must be floating point",
        ),
        (
            lambda weights: {**weights, "encoder.mid_block.attentions.0.query.bias": torch.zeros(12)},
            (
                f"has the key encoder.mid_block.attentions.0.to_q.bias, "
                f"which {SAFE} has as encoder.mid_block.attentions.0.query.bias"
            ),
        ),
    ],
    ids=["shape", "missing", "extra", "integers", "twice"],
)
def test_tensors_refused(pipeline: Path, change: Callable[[Json], Json], message: str) -> None:
    save_file(change(load_file(pipeline / VQVAE)), pipeline / VQVAE)
    assert refusal(pipeline) == f"{VQVAE}: {message}"


def test_weights_of_the_other_kind_are_refused(pipeline: Path, saved_kl: Path) -> None:
    shutil.copy(saved_kl / VQVAE, pipeline / VQVAE)
    assert refusal(pipeline) == f"{VQVAE}: encoder.conv_out.bias is [6], and must be [3]"


def test_pickles_are_refused_unless_they_are_allowed(pipeline: Path, whole: Checkpoint) -> None:
    torch.save(load_file(pipeline / VQVAE), pipeline / VQVAE_BIN)
    (pipeline / VQVAE).unlink()
    assert refusal(pipeline) == f"{VQVAE_BIN}: {PICKLE}"
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_autoencoder(pipeline)
    assert same_values(load(pipeline, allow_pickle=True), whole)
    assert load_autoencoder(pipeline, allow_pickle=True).config == autoencoder_of(whole).config


def test_code_is_refused_by_name_and_not_run(pipeline: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    torch.save({**load_file(pipeline / VQVAE), KEY: payload(marker)}, pipeline / VQVAE_BIN)
    (pipeline / VQVAE).unlink()
    message = f"would run {os.system.__module__}.system, and is not opened"
    assert refusal(pipeline, allow_pickle=True) == f"{VQVAE_BIN}: {message}"
    assert not marker.exists()


@pytest.mark.parametrize("name", [VQVAE, VQVAE_CONFIG, "vqvae"])
def test_links_that_leave_the_folder_are_refused(pipeline: Path, tmp_path: Path, name: str) -> None:
    moved(pipeline / name, tmp_path / "outside" / Path(name).name)
    file = VQVAE_CONFIG if name == "vqvae" else name
    for named in ("", "unet", INDEX):
        message = refusal(pipeline / named, pipeline)
        assert message == f"{file}: is a link that leaves the checkpoint's folder"


@pytest.mark.parametrize("name", [VQVAE, VQVAE_CONFIG])
def test_pointers_of_git_lfs_are_refused(pipeline: Path, name: str) -> None:
    (pipeline / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    assert refusal(pipeline) == f"{name}: {POINTER}"


@pytest.mark.parametrize("name", ["../unet/x.safetensors", "/etc/x.safetensors", "config.json"])
def test_names_of_shards_refused(pipeline: Path, name: str) -> None:
    resaved(pipeline, max_shard_size=SHARD)
    index = f"{VQVAE}.index.json"
    edit(pipeline / index, {"weight_map": {KEY: name}})
    assert (
        refusal(pipeline)
        == f"{index}: weight_map has {name!r}, which is not the plain name of a .safetensors or .bin file"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [16384, 16384], "layers_per_block": 32},
        {"num_vq_embeddings": 1_000_000, "vq_embed_dim": 1024},
    ],
    ids=["wide", "codes"],
)
def test_huge_configs_allocate_nothing(pipeline: Path, changes: Json) -> None:
    edit(pipeline / VQVAE_CONFIG, changes)
    if channels := changes.get("vq_embed_dim"):
        edit(pipeline / UNET_CONFIG, {"in_channels": channels, "out_channels": channels})
        save_file(small_unet(in_channels=channels, out_channels=channels).state_dict(), pipeline / "unet" / SAFE)
    with memory(GIGABYTE // 4):
        assert " and must be [" in refusal(pipeline)


# Digests, and native weights.


def test_digest_is_also_of_the_vae(pipeline: Path, whole: Checkpoint) -> None:
    digests = {whole.description.digest}
    for changes in ({"scaling_factor": 0.8}, {"act_fn": "relu"}, {"scaling_factor": 0.7, "act_fn": "silu"}):
        edit(pipeline / VQVAE_CONFIG, changes)
        digests.add(load(pipeline).description.digest)
    assert len(digests) == 3  # the last equal the first
    for key in (KEY, "encoder.conv_in.bias", "decoder.conv_out.bias"):
        weights = load_file(pipeline / VQVAE)
        save_file({**weights, key: weights[key] + 1}, pipeline / VQVAE)
        digests.add(load(pipeline).description.digest)
    assert len(digests) == 6


@pytest.mark.parametrize("kind", KINDS)
def test_conversion(kind: str, tmp_path: Path) -> None:
    source = save_latent_pipeline(tmp_path / "my weights", small_autoencoder(KINDS[kind]))
    target = tmp_path / "target"
    before = load(source)
    convert(source, target)
    shutil.rmtree(source)
    assert sorted(path.name for path in target.iterdir()) == [AUTOENCODER, CONFIG, WEIGHTS]
    assert {tensor.dtype for tensor in load_file(target / AUTOENCODER).values()} == {torch.float32}
    for name in ("", CONFIG, WEIGHTS, AUTOENCODER):
        after = load(target / name)
        assert same_values(after, before)
        assert after.description == replace(before.description, name="target")
        assert autoencoder_of(after).config == autoencoder_of(before).config
    assert before.description.sample_shape == (3, 8, 8)
    assert before.description.image_shape == (3, 16, 16)


def test_converted_config_has_the_fields_that_were_set(pipeline: Path, tmp_path: Path) -> None:
    fields = json.loads((pipeline / VQVAE_CONFIG).read_text())
    kept = ("_class_name", "block_out_channels", "down_block_types", "up_block_types", "norm_num_groups")
    (pipeline / VQVAE_CONFIG).write_text(json.dumps({name: fields[name] for name in kept} | {"num_vq_embeddings": 32}))
    convert(pipeline, tmp_path / "target")
    config = json.loads((tmp_path / "target" / CONFIG).read_text())
    assert config["image_size"] == [16, 16]
    assert config["autoencoder"] == {
        "kind": "vq",
        "image_channels": 3,
        "latent_channels": 3,
        "block_out_channels": [8, 12],
        "norm_num_groups": 4,
        "num_vq_embeddings": 32,
        "scaling_factor": 1.0,
    }


@pytest.fixture
def native(pipeline: Path, tmp_path: Path) -> Path:
    convert(pipeline, tmp_path / "native")
    return tmp_path / "native"


def test_a_missing_native_vae_is_named(native: Path) -> None:
    (native / AUTOENCODER).unlink()
    message = f"{AUTOENCODER}: cannot be read: No such file or directory"
    assert refusal(native) == message
    with pytest.raises(CheckpointError) as error:
        load_autoencoder(native)
    assert without_folder(error.value, native) == message


def test_the_native_vae_alone(native: Path, whole: Checkpoint) -> None:
    (native / WEIGHTS).unlink()
    expected = autoencoder_of(whole).state_dict()
    state = load_autoencoder(native).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": [16, 17]}, "image_size is [16, 17], and must be a multiple of 2, the autoencoder's factor"),
        (
            {"image_size": [16, 18]},
            "image size 8x9 cannot be halved 1 times: height and width must be multiples of 2",
        ),
        ({"autoencoder": {"kind": "kl"}}, "autoencoder.latent_channels: is required"),
        (
            {"autoencoder": {"kind": "kl", "latent_channels": 4}},
            "autoencoder has latents of 4 channels, and the network denoises 3",
        ),
        (
            {"autoencoder": "vae"},
            "autoencoder is vae, and must be a valid dictionary or instance of AutoencoderConfig",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_native_configs_refused(native: Path, changes: Json, message: str) -> None:
    edit(native / CONFIG, changes)
    assert refusal(native) == f"{CONFIG}: {message}"


def test_native_weights_of_pixels_can_become_those_of_latents(native: Path, whole: Checkpoint, tmp_path: Path) -> None:
    """The VAE is one field of config.json and one file."""
    convert(save_pipeline(tmp_path / "pixels", small_unet(), DDPMScheduler()), tmp_path / "latents")
    fields = json.loads((native / CONFIG).read_text())
    edit(tmp_path / "latents" / CONFIG, {name: fields[name] for name in ("autoencoder", "image_size")})
    shutil.copy(native / AUTOENCODER, tmp_path / "latents")
    assert same_values(load(tmp_path / "latents"), whole)


# Published configs.

CELEBAHQ: dict[str, Json] = {
    INDEX: {
        "_class_name": "LDMPipeline",
        "_diffusers_version": "0.1.2",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
        "vqvae": ["diffusers", "VQModel"],
    },
    UNET_CONFIG: {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": 32,
        "block_out_channels": [224, 448, 672, 896],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", *["AttnDownBlock2D"] * 3],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 64,
        "time_embedding_type": "positional",
        "up_block_types": [*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": "0.0.4",
        "beta_end": 0.0195,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "trained_betas": None,
    },
    VQVAE_CONFIG: {
        "_class_name": "VQModel",
        "_diffusers_version": "0.1.2",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512],
        "down_block_types": [BLOCK_DOWN] * 3,
        "in_channels": 3,
        "latent_channels": 3,
        "layers_per_block": 2,
        "num_vq_embeddings": 8192,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": [BLOCK_UP] * 3,
    },
}


def test_ldm_celebahq_256_has_its_published_size(tmp_path: Path) -> None:
    """Count parameters on meta. diffusers builds as many from these configs."""
    for name, values in CELEBAHQ.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    for part in ("unet", "vqvae"):
        (tmp_path / part / BIN).touch()
    source = find(tmp_path)
    config = source.config
    assert config.autoencoder is not None
    assert source.autoencoder is not None
    assert source.autoencoder.weights == [tmp_path / VQVAE_BIN]
    with torch.device("meta"):
        networks = [config.build(), Autoencoder(config.autoencoder)]
        theirs = [
            UNet2DModel.from_config(CELEBAHQ[UNET_CONFIG]),
            VQModel.from_config(CELEBAHQ[VQVAE_CONFIG]),
        ]
    ours = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert ours == [274_056_163, 55_322_782] == [network.num_parameters() for network in theirs]
    assert config.autoencoder.scaling_factor == 1.0
    assert (config.sample_shape, config.image_shape) == ((3, 64, 64), (3, 256, 256))
    assert config.recommended_settings == Recommended("ddim", 50)
    assert config.schedule == Schedule(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False
    )
