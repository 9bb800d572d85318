"""Checkpoints of text-to-image: folders of StableDiffusionPipeline, as diffusers and transformers write them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from model.checkpoints.config import parameters
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, convert, find, load, load_autoencoder
from model.checkpoints.text_config import TextToImageConfig
from model.checkpoints.tokenizer import Tokenizer
from model.description import Recommended, TextDescription, VAEDescription
from model.lines import Column, R
from model.nets.clip import CLIPText
from model.nets.unet_condition import UNet2DCondition
from model.samplers import sample_table
from model.update import guided, update
from tests.checkpoints import STEM, VALUES, Json, check_line, edit, refusal
from tests.pipelines import KINDS, condition_network, draw, load_pipeline, text_network, vae_network, write_pipeline
from tests.properties import examples
from tests.reference import UNet2DConditionModel, scheduler_class
from tests.test_diffusers import cached, old_key
from tests.test_tensors import PICKLE, POINTER, moved

SAFE = f"{STEM}.safetensors"
INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
TEXT_CONFIG = "text_encoder/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
TEXT = "text_encoder/model.safetensors"
SHARD = "100KB"
CHECKER = ["stable_diffusion", "StableDiffusionSafetyChecker"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def whole(saved: Path) -> Checkpoint:
    return load(saved)


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    """A pipeline that the test may change."""
    return shutil.copytree(saved, tmp_path / "pipeline")


def parts(checkpoint: Checkpoint) -> tuple[CLIPText, Tokenizer]:
    [text_encoder] = checkpoint.text_encoders
    assert isinstance(checkpoint.tokenizer, Tokenizer)
    return text_encoder, checkpoint.tokenizer


# Loading.


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_pipeline_is_its_networks(kind: str, tmp_path: Path) -> None:
    theirs = load_pipeline(write_pipeline(tmp_path / "it", kind, sample_size=[8, 6]))
    checkpoint = load(tmp_path / "it")
    text_encoder, tokenizer = parts(checkpoint)
    prompts = ["a fox in the snow!", ""]
    ids = theirs.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert ids.tolist() == [list(tokenizer(prompt).ids) for prompt in prompts]
    context = theirs.text_encoder(ids)[0]
    close(text_encoder(ids), context)
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn((2, 4, 8, 6), generator=rng), torch.tensor([3, 900])
    close(checkpoint.network(x, t, context), theirs.unet(x, t, context).sample)
    assert checkpoint.autoencoder is not None
    close(checkpoint.autoencoder.decode(x), theirs.vae.decode(x / theirs.vae.config.scaling_factor).sample)

    model = checkpoint.description
    assert isinstance(checkpoint.network, UNet2DCondition)
    assert (model.name, model.architecture, model.safety_checker) == ("it", "unet_2d_condition", "none")
    assert (model.image_shape, model.sample_shape, model.factor) == ((3, 64, 48), (4, 8, 6), 8)
    assert (model.num_classes, model.no_label, model.first_timestep) == (None, None, 0)
    assert model.num_parameters == theirs.unet.num_parameters()
    assert model.vae == VAEDescription("kl", 8, 0.18215, theirs.vae.num_parameters())
    layers = theirs.text_encoder.config.num_hidden_layers
    count = sum(parameter.numel() for parameter in theirs.text_encoder.parameters())
    assert model.text == TextDescription(77, layers, count)
    assert model.recommended == Recommended("ddim" if kind == "sd2" else "pndm", 50, 7.5)
    config = theirs.scheduler.config
    assert model.schedule.prediction_type == config.prediction_type
    np.testing.assert_allclose(
        model.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-9
    )
    networks = (checkpoint.network, checkpoint.autoencoder, text_encoder)
    assert not any(parameter.requires_grad for network in networks for parameter in network.parameters())


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("factor", [2, 4])
def test_images_are_larger_by_the_vaes_factor(tmp_path: Path, factor: int) -> None:
    model = load(write_pipeline(tmp_path, factor=factor)).description
    assert (model.image_shape, model.factor) == ((3, 8 * factor, 8 * factor), factor)


@pytest.mark.parametrize("kind", ["sd_inpaint", "xl_inpaint"])
def test_a_network_of_nine_channels_inpaints(tmp_path: Path, kind: str) -> None:
    model = load(write_pipeline(tmp_path, kind)).description
    assert model.inpaints
    assert (model.sample_shape, model.out_channels) == ((4, 8, 8), 4)
    assert model.input_shape_of(model.group) == (9, 8, 8)
    assert model.recommended.guidance_scale == 7.5


def test_a_pipeline_of_inpainting_has_its_own_constructor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It sets steps_offset and skip_prk_steps, and not clip_sample. Its U-Net of 4 channels draws anything."""
    index = {"_class_name": "StableDiffusionInpaintPipeline"}
    for scheduler, own in (("DDIMScheduler", {"clip_sample": True}), ("PNDMScheduler", {"skip_prk_steps": False})):
        config = {"steps_offset": 0, **own}
        write_pipeline(tmp_path / scheduler, scheduler=scheduler, scheduler_config=config, index=index)
        model, theirs = load(tmp_path / scheduler).description, load_pipeline(tmp_path / scheduler).scheduler.config
        assert not model.inpaints
        assert model.schedule.steps_offset == theirs.steps_offset == 1
        assert model.schedule.clip_sample == theirs.get("clip_sample", True)
    assert not [record for record in caplog.records if "skip_prk_steps" in record.message]


# Images.

PROMPT, SEED, N, GUIDANCE = "a fox in the snow!", 3, 10, 7.5
DRAWN: dict[str, tuple[str, Json]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "DDIM, old fields": (
        "sd1",
        {"scheduler": "DDIMScheduler", "scheduler_config": {"steps_offset": 0, "clip_sample": True}},
    ),
    "DDIM as in Stable Diffusion 2.1": (
        "sd2",
        {
            "scheduler_config": {
                "timestep_spacing": "leading",
                "rescale_betas_zero_snr": False,
                "skip_prk_steps": True,
                "trained_betas": None,
            }
        },
    ),
    "Euler as in sd-turbo": (
        "sd1",
        {"scheduler": "EulerDiscreteScheduler", "scheduler_config": {"timestep_spacing": "trailing"}},
    ),
    "Euler for SDXL-Lightning's one step": (
        "sd1",
        {
            "scheduler": "EulerDiscreteScheduler",
            "scheduler_config": {"timestep_spacing": "trailing", "prediction_type": "sample"},
        },
    ),
    "DDPM": ("sd1", {"scheduler": "DDPMScheduler", "scheduler_config": {"clip_sample": True}}),
    "Euler": ("sd1", {"scheduler": "EulerDiscreteScheduler"}),
    "Euler, Karras": ("sd2", {"scheduler": "EulerDiscreteScheduler", "scheduler_config": {"use_karras_sigmas": True}}),
    "Euler a": ("tiny_sd", {"scheduler": "EulerAncestralDiscreteScheduler"}),
    "DPM-Solver++": ("small_sd", {"scheduler": "DPMSolverMultistepScheduler"}),
    "DPM-Solver++ SDE, Karras": (
        "sd1",
        {
            "scheduler": "DPMSolverMultistepScheduler",
            "scheduler_config": {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
        },
    ),
    "Heun": ("tiny_sd", {"scheduler": "HeunDiscreteScheduler", "scheduler_config": {"use_exponential_sigmas": True}}),
    "UniPC": ("sd2", {"scheduler": "UniPCMultistepScheduler", "scheduler_config": {"solver_type": "midpoint"}}),
    "TCD": ("small_sd", {"scheduler": "TCDScheduler"}),
    "factor 2": ("sd1", {"factor": 2, "sample_size": [12, 8]}),
    "factor 4": ("sd2", {"factor": 4, "vae": {"scaling_factor": 0.5}}),
}


@pytest.mark.parametrize("name", DRAWN)
def test_images_are_the_pipelines(name: str, tmp_path: Path) -> None:
    """With the sampler of its own scheduler."""
    kind, settings = DRAWN[name]
    theirs = load_pipeline(write_pipeline(tmp_path, kind, **settings))
    checkpoint = load(tmp_path)
    height, width = checkpoint.description.image_shape[1:]
    size = {"height": height, "width": width, "num_inference_steps": N, "guidance_scale": GUIDANCE}
    expected = draw(theirs, PROMPT, SEED, output_type="latent", **size)
    latents = denoised(checkpoint)
    assert np.abs(latents.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()

    assert checkpoint.autoencoder is not None
    image = to_levels(checkpoint.autoencoder.decode(latents[None])[0].permute(1, 2, 0).numpy() / 2 + 0.5)
    differences = np.abs(image - to_levels(draw(theirs, PROMPT, SEED, **size)))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 1e-3


@torch.inference_mode()
def denoised(checkpoint: Checkpoint) -> torch.Tensor:
    """The latents of PROMPT, [C, h, w], line by line."""
    model, (text_encoder, tokenizer) = checkpoint.description, parts(checkpoint)
    contexts = [text_encoder(torch.tensor([tokenizer(prompt).ids])) for prompt in (PROMPT, "")]
    table = sample_table(model.schedule, model.recommended.sampler, N)
    rng = torch.Generator().manual_seed(SEED)
    x = table.init * torch.randn((1, *model.sample_shape), generator=rng)
    memories = [torch.zeros_like(x)] * 3
    for t, values in zip(table.timesteps, table.lines, strict=True):
        line = torch.tensor(values).float()
        own, negative = (checkpoint.network(x, torch.tensor([t]).float(), context) for context in contexts)
        out = guided([own, negative], torch.tensor([GUIDANCE]))
        noise = torch.randn(x.shape, generator=rng) if line[Column.D] else torch.zeros_like(x)
        after, x0 = update(x, out, memories, noise, line[None])
        if line[list(R)].any():
            memories = [line[Column.R_X] * x + line[Column.R_0] * x0 + line[Column.R_E] * out, *memories[:2]]
        x = after
    return x[0]


def to_levels(image: NDArray[Any]) -> NDArray[Any]:
    levels: NDArray[Any] = np.round(np.clip(image, 0, 1) * 255)
    return levels


# Layouts.


def write(folder: Path, part: str, network: Any, **saving: Any) -> None:
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    network.save_pretrained(folder / part, **saving)


def resaved(folder: Path, **saving: Any) -> Path:
    """All networks are saved again, in some way."""
    networks = {"unet": condition_network(0), "vae": vae_network(1), "text_encoder": text_network(2)}
    for part, network in networks.items():
        write(folder, part, network, **saving)
    return folder


def in_old_spelling(folder: Path) -> Path:
    """Indexes and shards of fp16 as diffusers wrote them before 0.32."""
    resaved(folder, variant="fp16", max_shard_size=SHARD)
    for index in folder.glob("*/*.index.fp16.json"):
        values = json.loads(index.read_text())
        names = {
            name: name.replace(".fp16-", "-").replace(".safetensors", ".fp16.safetensors")
            for name in values["weight_map"].values()
        }
        for name, old in names.items():
            (index.parent / name).rename(index.parent / old)
        values["weight_map"] = {key: names[name] for key, name in values["weight_map"].items()}
        stem = index.name.removesuffix(".safetensors.index.fp16.json")
        (index.parent / f"{stem}.safetensors.fp16.index.json").write_text(json.dumps(values))
        index.unlink()
    return folder


def as_pickles(folder: Path) -> Path:
    """As the first versions were published: pickles, the VAE's old names, positions beside the parameters."""
    for part, stem in (("unet", STEM), ("vae", STEM), ("text_encoder", "pytorch_model")):
        [file] = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        if part == "text_encoder":
            tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
            tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        elif part == "vae":
            tensors = {old_key(key): tensor for key, tensor in tensors.items()}
        torch.save(tensors, folder / part / f"{stem}.bin")
        file.unlink()
    return folder


def with_prefix(folder: Path) -> Path:
    """As transformers before 5.6 writes it."""
    tensors = {f"text_model.{key}": tensor for key, tensor in load_file(folder / TEXT).items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**tensors, **positions}, folder / TEXT)
    return folder


def with_projection(folder: Path) -> Path:
    """As CLIPTextModelWithProjection, whose projection the pipeline does not use."""
    tensors = load_file(with_prefix(folder) / TEXT)
    save_file({**tensors, "text_projection.weight": torch.ones(32, 32)}, folder / TEXT)
    return folder


def beside_others(folder: Path) -> Path:
    """Plain files go before variants."""
    condition_network(5).save_pretrained(folder / "unet", variant="non_ema")
    condition_network(6).save_pretrained(folder / "unet", variant="fp16")
    text_network(7).save_pretrained(folder / "text_encoder", variant="fp16")
    return folder


def fp16_of_the_unet(folder: Path) -> Path:
    """Another U-Net is the plain one; the other parts have no variant."""
    network = condition_network(0)
    condition_network(5).save_pretrained(folder / "unet")
    network.save_pretrained(folder / "unet", variant="fp16")
    return folder


def of_flax(folder: Path) -> Path:
    names = {
        "unet": ["diffusers", "FlaxUNet2DConditionModel"],
        "vae": ["diffusers", "FlaxAutoencoderKL"],
        "text_encoder": ["transformers", "FlaxCLIPTextModel"],
        "scheduler": ["diffusers", "FlaxPNDMScheduler"],
    }
    edit(folder / INDEX, {"_class_name": "FlaxStableDiffusionPipeline", **names})
    edit(folder / UNET_CONFIG, {"_class_name": "FlaxUNet2DConditionModel"})
    edit(folder / "vae/config.json", {"_class_name": "FlaxAutoencoderKL"})
    edit(folder / SCHEDULER_CONFIG, {"_class_name": "FlaxPNDMScheduler"})
    return folder


def wrapped(folder: Path) -> Path:
    compiled = ["torch._dynamo.eval_frame", "OptimizedModule"]
    edit(folder / INDEX, {"unet": compiled, "vae": compiled, "text_encoder": compiled})
    return folder


def linked_inside(folder: Path) -> Path:
    for name in (TEXT, TEXT_CONFIG, "tokenizer/vocab.json"):
        moved(folder / name, folder / "store" / name.replace("/", "_"))
    return folder


def of_image_to_image(folder: Path) -> Path:
    edit(folder / INDEX, {"_class_name": "StableDiffusionImg2ImgPipeline"})
    return folder


def with_the_fast_tokenizer(folder: Path) -> Path:
    edit(folder / INDEX, {"tokenizer": ["transformers", "CLIPTokenizerFast"]})
    return folder


def unchanged(folder: Path) -> Path:
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "by its index": (unchanged, INDEX),
    "by the U-Net's folder": (unchanged, "unet"),
    "by the U-Net's weights": (unchanged, f"unet/{SAFE}"),
    "by the VAE's weights": (unchanged, f"vae/{SAFE}"),
    "by the text encoder's folder": (unchanged, "text_encoder"),
    "by the text encoder's weights": (unchanged, TEXT),
    "by the tokenizer's folder": (unchanged, "tokenizer"),
    "fp16": (lambda folder: resaved(folder, variant="fp16"), ""),
    "fp16 of the U-Net": (fp16_of_the_unet, f"unet/{STEM}.fp16.safetensors"),
    "fp16, sharded": (lambda folder: resaved(folder, variant="fp16", max_shard_size=SHARD), ""),
    "fp16, sharded, by an index": (
        lambda folder: resaved(folder, variant="fp16", max_shard_size=SHARD),
        f"unet/{SAFE}.index.fp16.json",
    ),
    "fp16, sharded, in the old spelling": (in_old_spelling, ""),
    "fp16, in the old spelling, by an index": (in_old_spelling, f"unet/{STEM}.safetensors.fp16.index.json"),
    "sharded": (lambda folder: resaved(folder, max_shard_size=SHARD), ""),
    "beside variants": (beside_others, ""),
    "pickles": (as_pickles, ""),
    "with the prefix": (with_prefix, ""),
    "with a projection": (with_projection, ""),
    "of Flax": (of_flax, ""),
    "wrapped": (wrapped, ""),
    "links inside": (linked_inside, ""),
    "of image-to-image": (of_image_to_image, ""),
    "with the fast tokenizer": (with_the_fast_tokenizer, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_model(layout: str, pipeline: Path, whole: Checkpoint) -> None:
    make, name = LAYOUTS[layout]
    checkpoint = load(make(pipeline) / name, allow_pickle="pickles" in layout)
    assert checkpoint.description == replace(whole.description, name="pipeline")
    ours, theirs = parts(checkpoint)[0].state_dict(), parts(whole)[0].state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_training_checkpoint_has_the_other_parts_of_its_pipeline(pipeline: Path, whole: Checkpoint) -> None:
    condition_network(9).save_pretrained(pipeline / "checkpoint-500" / "unet")
    for named in ("checkpoint-500", "checkpoint-500/unet"):
        model = load(pipeline / named).description
        assert (model.text, model.vae) == (whole.description.text, whole.description.vae)
        assert model.digest != whole.description.digest


def test_a_cache_of_huggingface_hub(tmp_path: Path, whole: Checkpoint) -> None:
    model = load(cached(tmp_path, write_pipeline)).description
    assert (model.digest, model.name) == (whole.description.digest, "google/ddpm-tiny-8")


def test_the_vae_alone(pipeline: Path, whole: Checkpoint) -> None:
    for name in (TEXT, f"unet/{SAFE}"):
        (pipeline / name).write_bytes(b"not there yet")
    assert whole.autoencoder is not None
    ours, expected = load_autoencoder(pipeline).state_dict(), whole.autoencoder.state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


# Published configs, in their own size. Numbers of parameters in millions.

CROSS = ["CrossAttnDownBlock2D"] * 3, ["CrossAttnUpBlock2D"] * 3
OF_SD1: Json = {
    "_diffusers_version": "0.6.0",
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": [*CROSS[0], "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *CROSS[1]],
    "norm_num_groups": 32,
    "sample_size": 64,
}
OF_SD2: Json = {
    **OF_SD1,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
}
SMALLER: Json = {**OF_SD1, "_diffusers_version": "0.19.0.dev0", "layers_per_block": 1}
TINY: Json = {
    **SMALLER,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": CROSS[0],
    "up_block_types": CROSS[1],
    "mid_block_type": None,
}
CLIP_L: Json = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
}
OPEN_CLIP_H: Json = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize(
    ("unet", "text", "side", "tensors", "millions"),
    [
        (OF_SD1, CLIP_L, 512, 686, (859.5, 123.1)),
        (OF_SD2, OPEN_CLIP_H, 768, 686, (865.9, 340.4)),
        (SMALLER, CLIP_L, 512, 442, (579.4, 123.1)),
        (TINY, CLIP_L, 512, 358, (323.4, 123.1)),
    ],
    ids=["SD 1.5", "SD 2.1", "small-sd", "tiny-sd"],
)
def test_published_networks(
    pipeline: Path, unet: Json, text: Json, side: int, tensors: int, millions: tuple[float, float]
) -> None:
    edit(pipeline / UNET_CONFIG, unet)
    edit(pipeline / TEXT_CONFIG, text)
    source = find(pipeline)
    config = source.config
    assert isinstance(config, TextToImageConfig)
    assert config.image_size == (side, side)
    with torch.device("meta"):
        network, clip = config.build(), CLIPText(config.text)
        theirs = UNet2DConditionModel.from_config(json.loads((pipeline / UNET_CONFIG).read_text()))
    stored = {
        there.key: there.shape
        for key, values in network.state_dict().items()
        for there in source.network.naming.stored(key, tuple(values.shape))
    }
    assert stored == {key: tuple(values.shape) for key, values in theirs.state_dict().items()}
    assert len(stored) == tensors
    assert tuple(round(parameters(one) / 1e6, 1) for one in (network, clip)) == millions


# The digest.


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", TEXT_CONFIG, SCHEDULER_CONFIG])
def test_everything_that_decides_an_image_is_in_the_digest(part: str, pipeline: Path, whole: Checkpoint) -> None:
    match part:
        case "unet":
            write(pipeline, part, condition_network(7))
        case "vae":
            write(pipeline, part, vae_network(7))
        case "text_encoder":
            write(pipeline, part, text_network(7))
        case "tokenizer":
            edit(pipeline / "tokenizer/special_tokens_map.json", {"pad_token": "!"})
        case _:
            edit(pipeline / part, {"layer_norm_eps": 1e-6, "prediction_type": "v_prediction"})
    model = load(pipeline).description
    assert model.digest != whole.description.digest
    assert model.recipe_name == f"unet_2d_condition-{model.digest[:8]}"


# The scheduler.


@pytest.mark.parametrize(
    ("name", "fields", "sampler"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, "pndm"),
        ("DDIMScheduler", {}, "ddim"),
        ("DDPMScheduler", {}, "ddpm"),
        ("EulerDiscreteScheduler", {}, "euler"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, "euler"),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler_a"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}, "dpmpp_2m"),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun"),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}, "unipc"),
        ("LCMScheduler", {}, "lcm"),
        ("TCDScheduler", {}, "tcd"),
    ],
    ids=str,
)
def test_the_pipelines_own_settings_are_recommended(
    tmp_path: Path, name: str, fields: Json, sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pipeline(tmp_path, scheduler=name, scheduler_config=fields)
    caplog.clear()
    assert load(folder).description.recommended == Recommended(sampler, 50, 7.5)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "fields", "sampler", "message"),
    [
        (
            "PNDMScheduler",
            {"skip_prk_steps": False},
            "pndm",
            "skip_prk_steps is False, which pndm does not follow: images differ from the pipeline's",
        ),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 3},
            "dpmpp_2m",
            "solver_order is 3, which dpmpp_2m does not follow: images differ from the pipeline's",
        ),
        (
            "UniPCMultistepScheduler",
            {"lower_order_final": False},
            "unipc",
            "lower_order_final is False, which unipc does not follow: images differ from the pipeline's",
        ),
        (
            "KDPM2DiscreteScheduler",
            {},
            "dpmpp_2m",
            "KDPM2DiscreteScheduler has no sampler here: dpmpp_2m is recommended in its place",
        ),
    ],
    ids=str,
)
def test_what_differs_from_the_pipeline_is_told(
    tmp_path: Path, name: str, fields: Json, sampler: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_pipeline(tmp_path, scheduler=name, scheduler_config=fields)
    caplog.clear()
    assert load(folder).description.recommended == Recommended(sampler, 50, 7.5)
    assert caplog.messages == [f"{folder / SCHEDULER_CONFIG}: {message}"]


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("pipeline_class", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_the_pipeline_sets_two_fields_of_its_scheduler(tmp_path: Path, name: str, pipeline_class: str) -> None:
    """As its constructor does in diffusers, whatever the file says."""
    fields = {"steps_offset": 0} | ({"clip_sample": True} if name in ("DDIMScheduler", "DDPMScheduler") else {})
    folder = write_pipeline(tmp_path, scheduler=name, scheduler_config=fields, index={"_class_name": pipeline_class})
    theirs = load_pipeline(folder).scheduler.config
    schedule = load(folder).description.schedule
    assert (schedule.steps_offset, schedule.clip_sample) == (1, False)
    assert theirs.steps_offset == 1
    assert not theirs.get("clip_sample", False)


def test_the_index_names_the_schedulers_class(pipeline: Path) -> None:
    """The file's fields count, as in diffusers."""
    edit(pipeline / INDEX, {"scheduler": ["diffusers", "EulerDiscreteScheduler"]})
    theirs = load_pipeline(pipeline).scheduler
    assert isinstance(theirs, scheduler_class("EulerDiscreteScheduler"))
    model = load(pipeline).description
    assert model.recommended.sampler == "euler"
    np.testing.assert_allclose(model.schedule.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4)


# Sizes.


@pytest.mark.parametrize(
    ("version", "size", "side"),
    [
        ("0.8.1", 8, 64),
        ("0.6.0", 32, 64),
        ("0.6.0.dev0", 32, 64),
        ("0.8.0", 96, 96),
        ("0.9.0", 32, 32),
        ("0.9.0.dev0", 32, 32),
        ("0.42.1", 8, 8),
        (None, 8, 8),
    ],
)
def test_sizes_of_old_files_are_64(pipeline: Path, version: str | None, size: int, side: int) -> None:
    edit(pipeline / UNET_CONFIG, {"sample_size": size}, without="_diffusers_version")
    if version is not None:
        edit(pipeline / UNET_CONFIG, {"_diffusers_version": version})
    assert find(pipeline).config.sample_shape == (4, side, side)
    theirs = load_pipeline(pipeline)
    assert theirs.unet.config.sample_size == side


def test_a_size_of_two_sides_stays(pipeline: Path) -> None:
    edit(pipeline / UNET_CONFIG, {"sample_size": [32, 16], "_diffusers_version": "0.6.0"})
    assert find(pipeline).config.image_size == (256, 128)


# The safety checker and other parts.


UNUSED = ["safety_checker/config.json", "feature_extractor/preprocessor_config.json", "image_encoder/config.json"]


def test_the_safety_checker_is_not_run(pipeline: Path, whole: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    extractor = ["transformers", "CLIPImageProcessor"]
    encoder = ["transformers", "CLIPVisionModelWithProjection"]
    edit(
        pipeline / INDEX,
        {"safety_checker": CHECKER, "feature_extractor": extractor, "image_encoder": encoder},
    )
    for name in UNUSED:
        (pipeline / name).parent.mkdir()
        (pipeline / name).write_text("{}")
    model = load(pipeline).description
    assert caplog.messages == ["pipeline: the safety checker of this pipeline is not run: see docs/security.md"]
    assert caplog.records[0].levelname == "WARNING"
    assert model.safety_checker == "not run"
    assert model.digest == whole.description.digest


@pytest.mark.parametrize(
    "file", ["pytorch_lora_weights.safetensors", "unet/my_lora.safetensors", "image_encoder/config.json", "config.json"]
)
def test_files_that_are_not_used_are_named(pipeline: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    (pipeline / file).parent.mkdir(exist_ok=True)
    (pipeline / file).write_text("{}")
    load(pipeline)
    assert caplog.messages == [f"pipeline: not used: {file}"]


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (UNET_CONFIG, {"upcast_attention": True, "dropout": 0.1, "addition_embed_type_num_heads": 8}),
        (UNET_CONFIG, {"upcast_attention": None, "mid_block_only_cross_attention": None, "addition_time_embed_dim": 8}),
        (UNET_CONFIG, {"dual_cross_attention": None, "resnet_skip_time_act": None, "num_attention_heads": None}),
        (UNET_CONFIG, {"act_fn": "SiLU", "resnet_out_scale_factor": 1}),
        (TEXT_CONFIG, {"eos_token_id": 7, "projection_dim": 3, "torch_dtype": "float16", "architectures": ["X"]}),
        (TEXT_CONFIG, {"use_attention_mask": False, "dropout": 0.1, "initializer_range": 9, "_name_or_path": "x"}),
        (INDEX, {"requires_safety_checker": True, "_module": "x", "force_zeros": 3}),
    ],
    ids=str,
)
def test_fields_that_change_nothing(
    pipeline: Path, whole: Checkpoint, file: str, changes: Json, caplog: pytest.LogCaptureFixture
) -> None:
    edit(pipeline / file, changes)
    assert load(pipeline).description.digest == whole.description.digest
    assert caplog.messages == []


def test_fields_of_networks_are_read(pipeline: Path) -> None:
    edit(pipeline / UNET_CONFIG, {"attention_head_dim": [4, 2], "norm_eps": 1e-4})
    edit(pipeline / TEXT_CONFIG, {"hidden_act": "gelu"})
    config = find(pipeline).config
    assert isinstance(config, TextToImageConfig)
    assert (config.network.attention_head_dim, config.network.norm_eps, config.text.hidden_act) == (
        (4, 2),
        1e-4,
        "gelu",
    )


# Errors.

OTHER = (
    "_class_name is {}, and must be a pipeline of Stable Diffusion, SDXL or LCM, or of a U-Net and a "
    "scheduler, with or without a VAE"
)
IF = "it belongs to IF, which is not supported"
ALONE = "this version serves networks of text-to-image and of inpainting alone"
CLASSES = "the pipeline gives the network no class"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionXLPipeline"},
            "names no text_encoder_2, which a StableDiffusionXLPipeline needs",
        ),
        (
            {"_class_name": "StableDiffusionUpscalePipeline"},
            OTHER.format("StableDiffusionUpscalePipeline"),
        ),
        (
            {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]},
            "has the part text_encoder_2, which this version does not serve in a StableDiffusionPipeline",
        ),
        (
            {"controlnet": ["diffusers", "ControlNetModel"]},
            "has the part controlnet, which this version does not serve in a StableDiffusionPipeline",
        ),
        *(
            ({part: [None, None]}, f"names no {part}, which a StableDiffusionPipeline needs")
            for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
        ),
        (
            {"text_encoder": ["transformers", "T5EncoderModel"]},
            "text_encoder is T5EncoderModel, and must be CLIPTextModel",
        ),
        (
            {"tokenizer": ["transformers", "T5Tokenizer"]},
            "tokenizer is T5Tokenizer, and must be CLIPTokenizer or CLIPTokenizerFast",
        ),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae is AutoencoderTiny, and must be AutoencoderKL"),
        ({"unet": ["diffusers", "UNet2DModel"]}, "unet is UNet2DModel, and must be UNet2DConditionModel"),
        (
            {"text_encoder": ["my_code", "CLIPTextModel"]},
            "text_encoder is my_code.CLIPTextModel, and must be a class of transformers: other code is never run",
        ),
        (
            {"tokenizer": ["diffusers", "CLIPTokenizer"]},
            "tokenizer is diffusers.CLIPTokenizer, and must be a class of transformers: other code is never run",
        ),
        ({"tokenizer": ["transformers"]}, "tokenizer is ['transformers'], and must be a library and a class"),
    ],
    ids=str,
)
def test_pipelines_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / INDEX, changes)
    assert refusal(pipeline) == f"{INDEX}: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 8}, f"in_channels is 8, which InstructPix2Pix and x2 upscalers have: {ALONE}"),
        ({"in_channels": 7}, f"in_channels is 7, which x4 upscalers have: {ALONE}"),
        ({"in_channels": 5}, f"in_channels is 5, which depth-to-image networks have: {ALONE}"),
        ({"in_channels": 3}, "autoencoder has latents of 4 channels, and the network denoises 3"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, and must be null: diffusers refuses any other, and"),
        ({"addition_embed_type": "text_time"}, "addition_time_embed_dim is required where addition_embed_type is text"),
        ({"addition_embed_type": "image"}, "addition_embed_type is image, and must be null or text_time: others are"),
        ({"time_cond_proj_dim": 2}, "time_cond_proj_dim is 2, and must be greater than or equal to 4"),
        ({"class_embed_type": "projection"}, f"class_embed_type is projection, and must be null: {CLASSES}"),
        ({"class_embed_type": "timestep"}, f"class_embed_type is timestep, and must be null: {CLASSES}"),
        ({"num_class_embeds": 10}, f"num_class_embeds is 10, and must be null: {CLASSES}"),
        ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type is image_proj, and must"),
        ({"attention_type": "gated"}, "attention_type is gated, and must be default: GLIGEN is not supported"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True, and must be False: Versatile Diffusion is"),
        ({"cross_attention_norm": "group_norm"}, f"cross_attention_norm is group_norm, and must be null: {IF}"),
        ({"resnet_skip_time_act": True}, f"resnet_skip_time_act is True, and must be False: {IF}"),
        ({"resnet_out_scale_factor": 1.4}, f"resnet_out_scale_factor is 1.4, and must be 1.0: {IF}"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat is True, and must be False: it belongs to the"),
        (
            {"down_block_types": ["SimpleCrossAttnDownBlock2D", "DownBlock2D"]},
            "down_block_types has SimpleCrossAttnDownBlock2D, which belongs to IF, and that is not supported",
        ),
        (
            {"up_block_types": ["KUpBlock2D", "KCrossAttnUpBlock2D"]},
            "up_block_types has KUpBlock2D, which belongs to the upscaler of latents, and that is not supported",
        ),
        (
            {"down_block_types": ["CrossAttnDownBlock2D", "AttnDownBlock2D"]},
            "down_block_types has AttnDownBlock2D, which would read attention_head_dim as a width, and CrossAttn",
        ),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is UNetMidBlock2DSimpleCrossAttn, which"),
        ({"mid_block_type": "MyBlock"}, "mid_block_type is MyBlock, and must be 'UNetMidBlock2DCrossAttn' or"),
        ({"cross_attention_dim": 40}, "cross_attention_dim is 40, and must be 32, the text encoder's hidden_size"),
        ({"encoder_hid_dim": 40}, "encoder_hid_dim is 40, and must be 32, the text encoder's hidden_size"),
        ({"out_channels": 8}, "out_channels is 8, in_channels 4 and variance_type fixed_small: out_channels must be"),
        ({"sample_size": None}, "sample_size is None, and must be the latents' size or [height, width]"),
        ({"_class_name": "UNet2DModel"}, "_class_name is UNet2DModel, and must be UNet2DConditionModel"),
    ],
    ids=str,
)
def test_networks_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / UNET_CONFIG, changes)
    assert refusal(pipeline).startswith(f"{UNET_CONFIG}: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "model_type is clip, and must be clip_text_model"),
        ({"use_attention_mask": True}, "use_attention_mask is true, and must be false: the U-Net attends to padding"),
        ({"hidden_act": "tanh"}, "hidden_act is tanh, and must be 'quick_gelu', 'gelu'"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide hidden_size 32"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and must be less than or equal to 256"),
    ],
    ids=str,
)
def test_text_encoders_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / TEXT_CONFIG, changes)
    assert refusal(pipeline).startswith(f"{TEXT_CONFIG}: {message}")


@pytest.mark.parametrize("file", [UNET_CONFIG, TEXT_CONFIG, "vae/config.json"])
def test_quantized_networks_are_refused(pipeline: Path, file: str) -> None:
    edit(pipeline / file, {"quantization_config": {"bits": 4}})
    assert refusal(pipeline) == f"{file}: has a quantization_config, and quantized weights are not supported"


def test_a_vocabulary_beyond_the_text_encoder_is_refused(pipeline: Path) -> None:
    edit(pipeline / TEXT_CONFIG, {"vocab_size": 500})
    assert "must be from 0 to 499: the text encoder's vocab_size is 500" in refusal(pipeline)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unet", "model_index.json: exists, but neither unet/config.json nor config.json does"),
        ("vae", "model_index.json: names vae, and there is no vae/config.json"),
        ("text_encoder", f"model_index.json: names text_encoder, and there is no {TEXT_CONFIG}"),
        ("tokenizer", "model_index.json: names tokenizer, and there is no tokenizer/"),
        ("scheduler", f"model_index.json: names scheduler, and there is no {SCHEDULER_CONFIG}"),
        (f"unet/{SAFE}", f"unet: holds no {SAFE}"),
        (TEXT, "text_encoder: holds no model.safetensors"),
        ("tokenizer/vocab.json", "tokenizer: holds neither tokenizer.json nor vocab.json"),
    ],
)
def test_missing_parts_are_refused(pipeline: Path, name: str, message: str) -> None:
    if (pipeline / name).is_dir():
        shutil.rmtree(pipeline / name)
    else:
        (pipeline / name).unlink()
    assert refusal(pipeline) == message


@pytest.mark.parametrize(
    ("part", "old", "new"),
    [("unet", SAFE, "diffusion_flax_model.msgpack"), ("text_encoder", "model.safetensors", "model.onnx")],
)
def test_weights_of_other_libraries_are_named(pipeline: Path, part: str, old: str, new: str) -> None:
    (pipeline / part / old).rename(pipeline / part / new)
    assert refusal(pipeline) == f"{part}: holds no {old}, and {new} cannot be read"


def test_weights_in_a_single_file_are_refused(pipeline: Path, tmp_path: Path) -> None:
    """Published folders have such a file beside those of the parts."""
    refused = "and weights in a single file are not served: name"
    taken = "config.json and model.safetensors, or a folder of the diffusers library"
    for folder, message in (
        (pipeline, f"is not in the folder of a network, {refused} the folder"),
        (tmp_path, f"has no config beside it, {refused} {taken}"),
    ):
        save_file({"model.diffusion_model.out.0.bias": torch.ones(1)}, folder / "v1-5-pruned.safetensors")
        assert refusal(folder / "v1-5-pruned.safetensors", folder) == f"v1-5-pruned.safetensors: {message}"


def test_weights_that_do_not_fit_are_refused(pipeline: Path) -> None:
    tensors = load_file(pipeline / TEXT)
    key = "embeddings.token_embedding.weight"
    save_file({**tensors, key: tensors[key][:-1].clone()}, pipeline / TEXT)
    assert refusal(pipeline) == f"{TEXT}: {key} is [521, 32], and must be [522, 32]"
    save_file({other: tensor for other, tensor in tensors.items() if other != key}, pipeline / TEXT)
    assert refusal(pipeline) == f"{TEXT}: lacks the key {key}, [522, 32]"
    save_file({**tensors, "vision_model.x": torch.ones(1)}, pipeline / TEXT)
    assert refusal(pipeline) == f"{TEXT}: has the key vision_model.x, which the network of config.json lacks"
    save_file({**tensors, f"text_model.{key}": tensors[key].clone()}, pipeline / TEXT)
    assert refusal(pipeline).startswith(f"{TEXT}: has the key ")


def test_pickles_are_opened_only_where_that_is_allowed(pipeline: Path) -> None:
    as_pickles(pipeline)
    assert refusal(pipeline) == f"unet/{STEM}.bin: {PICKLE}"


@pytest.mark.parametrize("name", [TEXT, TEXT_CONFIG, "tokenizer/vocab.json", "tokenizer/merges.txt", SCHEDULER_CONFIG])
def test_links_that_leave_the_folder_and_pointers_are_refused(pipeline: Path, tmp_path: Path, name: str) -> None:
    moved(pipeline / name, tmp_path / "elsewhere")
    assert refusal(pipeline) == f"{name}: is a link that leaves the checkpoint's folder"
    (pipeline / name).unlink()
    (pipeline / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(pipeline) == f"{name}: {POINTER}"


@pytest.mark.parametrize("named", ["", "config.json", SAFE])
def test_a_unet_without_its_pipeline_is_refused(pipeline: Path, tmp_path: Path, named: str) -> None:
    alone = shutil.copytree(pipeline / "unet", tmp_path / "alone")
    message = (
        "config.json: _class_name is UNet2DConditionModel, which draws for prompts: "
        "it is served as a part of its pipeline, with model_index.json"
    )
    assert refusal(alone / named, alone) == message


def test_text_pipelines_are_not_converted(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="draws for prompts, and is not converted"):
        convert(pipeline, tmp_path / "target")
    assert not (tmp_path / "target").exists()


OTHER_FIELDS = [
    "_class_name", "_diffusers_version", "use_karras_sigmas", "sigma_min", "num_class_embeds", "addition_embed_type",
    "encoder_hid_dim", "encoder_hid_dim_type", "transformer_layers_per_block", "reverse_transformer_layers_per_block",
    "timestep_spacing", "use_attention_mask", "quantization_config", "model_type", "in_channels", "time_cond_proj_dim",
]  # fmt: skip


@pytest.fixture(scope="module")
def changing(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pipeline. Who changes a file puts it back."""
    return shutil.copytree(saved, tmp_path_factory.mktemp("changing") / "pipeline")


@given(data=st.data())
@examples(400)
def test_whatever_a_config_says_is_read_or_refused_in_a_line(saved: Path, changing: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([INDEX, UNET_CONFIG, TEXT_CONFIG, SCHEDULER_CONFIG, "vae/config.json"]))
    values = json.loads((saved / name).read_text())
    field = data.draw(st.sampled_from(sorted({*values, *OTHER_FIELDS})))
    (changing / name).write_text(json.dumps({**values, field: data.draw(VALUES)}))
    try:
        find(changing)
    except CheckpointError as error:
        check_line(error)
    finally:
        shutil.copy(saved / name, changing / name)
