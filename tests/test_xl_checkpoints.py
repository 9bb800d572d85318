"""Checkpoints of SDXL and LCM: pipelines with two text encoders, and networks that are told the guidance."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model.checkpoints.config import parameters
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, find, load
from model.checkpoints.text_config import TextToImageConfig
from model.description import Recommended, TextDescription, VAEDescription
from model.lines import Column
from model.nets.clip import CLIPText
from model.samplers import sample_table
from tests.checkpoints import STEM, VALUES, Json, check_line, edit, refusal
from tests.pipelines import (
    KINDS,
    condition_network,
    load_pipeline,
    text_network,
    vae_network,
    write_pipeline,
    write_tokenizer,
)
from tests.properties import examples
from tests.reference import UNet2DConditionModel
from tests.test_tensors import PICKLE
from tests.test_text_checkpoints import CLIP_L, OF_SD1, close

INDEX = "model_index.json"
UNET_CONFIG = "unet/config.json"
TEXT_CONFIG = "text_encoder_2/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
UNET = f"unet/{STEM}.safetensors"
TEXT_2 = "text_encoder_2/model.safetensors"
PROMPTS = ("a fox in the snow!", "", "naïve café 🦊!!", "the " * 100)
XL = "StableDiffusionXLPipeline"
LCM = "LatentConsistencyModelPipeline"
SD = "StableDiffusionPipeline"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind, written once. No test changes it."""
    root = tmp_path_factory.mktemp("written")
    return cache(lambda kind: write_pipeline(root / kind, kind))


@pytest.fixture
def copied(written: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of a kind that the test may change."""
    return lambda kind: shutil.copytree(written(kind), tmp_path / kind)


@pytest.fixture(scope="module")
def saved(written: Callable[[str], Path]) -> Path:
    return written("xl")


@pytest.fixture(scope="module")
def whole(saved: Path) -> Checkpoint:
    return load(saved)


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    """A pipeline that the test may change."""
    return shutil.copytree(saved, tmp_path / "pipeline")


@pytest.fixture
def lcm(copied: Callable[[str], Path]) -> Path:
    return copied("lcm")


# Loading.


@pytest.mark.parametrize("kind", ["xl", "lcm_xl", "ssd1b", "vega", "lcm"])
@torch.inference_mode()
def test_a_pipeline_is_its_networks(kind: str, written: Callable[[str], Path]) -> None:
    theirs, checkpoint = load_pipeline(written(kind)), load(written(kind))
    is_xl, takes_w = kind != "lcm", kind.startswith("lcm")
    encoders = [theirs.text_encoder, theirs.text_encoder_2] if is_xl else [theirs.text_encoder]
    tokenizers = [theirs.tokenizer, theirs.tokenizer_2] if is_xl else [theirs.tokenizer]
    assert checkpoint.tokenizer is not None
    tokens = [checkpoint.tokenizer(prompt) for prompt in PROMPTS]
    arguments = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    ids = [tokenizer(list(PROMPTS), **arguments).input_ids for tokenizer in tokenizers]
    assert ids[0].tolist() == [list(one.ids) for one in tokens]
    assert ids[-1].tolist() == [list(one.ids_2 or one.ids) for one in tokens]
    for ours, their, numbers in zip(checkpoint.text_encoders, encoders, ids, strict=True):
        assert ours.config.num_hidden_layers == their.config.num_hidden_layers
        states = their(numbers, output_hidden_states=True).hidden_states
        close(ours.encoder(ours.embeddings(numbers)), torch.stack(states[1:], dim=1))
    assert theirs.unet.num_parameters() == parameters(checkpoint.network)
    values = {diffusers_key(name): mine for name, mine in checkpoint.network.state_dict().items()}
    assert all(torch.equal(values[key], their) for key, their in theirs.unet.state_dict().items())

    model = checkpoint.description
    assert (model.architecture, model.embeds_sizes, model.embeds_guidance) == ("unet_2d_condition", is_xl, takes_w)
    assert (model.image_shape, model.sample_shape, model.factor) == ((3, 64, 64), (4, 8, 8), 8)
    scale = 0.13025 if is_xl else 0.18215
    assert model.vae == VAEDescription("kl", 8, scale, theirs.vae.num_parameters())
    count = sum(parameters(encoder) for encoder in encoders)
    assert model.text == TextDescription(
        77, 3 if is_xl else 4, count, encoders=2 if is_xl else 1, force_zeros_for_empty_prompt=is_xl
    )
    networks = (checkpoint.network, checkpoint.autoencoder, *checkpoint.text_encoders)
    assert not any(parameter.requires_grad for network in networks if network for parameter in network.parameters())


def diffusers_key(name: str) -> str:
    return name.replace(".time_mlp.", ".time_emb_proj.").replace(".shortcut.", ".conv_shortcut.")


def test_the_larger_number_of_tokens_that_did_not_fit_is_told(pipeline: Path) -> None:
    """Here the second tokenizer has no merges: each letter is a token."""
    write_tokenizer(pipeline / "tokenizer_2", pad="!", merges=())
    tokenize = load(pipeline).tokenizer
    assert tokenize is not None
    assert [tokenize("the " * n).cut for n in (25, 26, 75, 100)] == [0, 3, 150, 225]
    write_tokenizer(pipeline / "tokenizer")
    shutil.rmtree(pipeline / "tokenizer_2")
    shutil.move(pipeline / "tokenizer", pipeline / "tokenizer_2")
    write_tokenizer(pipeline / "tokenizer", merges=())
    tokenize = load(pipeline).tokenizer
    assert tokenize is not None
    assert tokenize("the " * 26).cut == 3


# Layouts.


def write(folder: Path, part: str, network: Any, **saving: Any) -> None:
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    network.save_pretrained(folder / part, **saving)


def xl_text_network(seed: int, **fields: Any) -> Any:
    own = {"hidden_size": 48, "num_hidden_layers": 3, "hidden_act": "gelu", "projection_dim": 24}
    return text_network(seed, "CLIPTextModelWithProjection", **{**own, **fields})


def xl_unet(folder: Path, seed: int, **fields: Any) -> Any:
    config = {key: value for key, value in json.loads((folder / UNET_CONFIG).read_text()).items() if key[0] != "_"}
    return condition_network(seed, **{**config, **fields})


def resaved(folder: Path, **saving: Any) -> Path:
    """All networks are saved again, in some way."""
    networks = {
        "unet": xl_unet(folder, 0),
        "vae": vae_network(1, scaling_factor=0.13025, force_upcast=True),
        "text_encoder": text_network(2),
        "text_encoder_2": xl_text_network(3),
    }
    for part, network in networks.items():
        write(folder, part, network, **saving)
    return folder


def as_pickles(folder: Path) -> Path:
    for part in ("text_encoder", "text_encoder_2"):
        [file] = (folder / part).glob("*.safetensors")
        torch.save(
            (text_network(2) if part == "text_encoder" else xl_text_network(3)).state_dict(),
            folder / part / "pytorch_model.bin",
        )
        file.unlink()
    return folder


def wrapped(folder: Path) -> Path:
    compiled = ["torch._dynamo.eval_frame", "OptimizedModule"]
    edit(folder / INDEX, dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), compiled))
    return folder


def of_image_to_image(folder: Path) -> Path:
    edit(folder / INDEX, {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": False})
    return folder


def with_flags_left_out(folder: Path) -> Path:
    edit(folder / INDEX, {}, without="force_zeros_for_empty_prompt")
    edit(folder / INDEX, {}, without="add_watermarker")
    return folder


def with_a_watermark(folder: Path) -> Path:
    edit(folder / INDEX, {"add_watermarker": True, "tokenizer_2": ["transformers", "CLIPTokenizerFast"]})
    return folder


def unchanged(folder: Path) -> Path:
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "by its index": (unchanged, INDEX),
    "by the U-Net's weights": (unchanged, UNET),
    "by the second text encoder's folder": (unchanged, "text_encoder_2"),
    "by the second text encoder's weights": (unchanged, TEXT_2),
    "by the second tokenizer's folder": (unchanged, "tokenizer_2"),
    "fp16": (lambda folder: resaved(folder, variant="fp16"), ""),
    "fp16, by the second text encoder": (
        lambda folder: resaved(folder, variant="fp16"),
        "text_encoder_2/model.fp16.safetensors",
    ),
    "sharded": (lambda folder: resaved(folder, max_shard_size="60KB"), ""),
    "fp16, sharded": (lambda folder: resaved(folder, variant="fp16", max_shard_size="60KB"), ""),
    "pickles": (as_pickles, ""),
    "wrapped": (wrapped, ""),
    "of image-to-image": (of_image_to_image, ""),
    "without flags": (with_flags_left_out, ""),
    "with a watermark": (with_a_watermark, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_model(
    layout: str, pipeline: Path, whole: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    make, name = LAYOUTS[layout]
    make(pipeline)
    caplog.clear()
    checkpoint = load(pipeline / name, allow_pickle="pickles" in layout)
    assert checkpoint.description == replace(whole.description, name="pipeline")
    assert caplog.messages == []


@pytest.mark.parametrize("fields", [{}, {"time_cond_proj_dim": 32}], ids=str)
@pytest.mark.parametrize("saving", [{}, {"variant": "fp16"}], ids=str)
def test_another_unet_in_the_same_folder(pipeline: Path, whole: Checkpoint, fields: Json, saving: Json) -> None:
    """So are turbo, Lightning, Hyper-SD, DMD2 and LCM published: as a U-Net to put in the place of the base model's."""
    network = xl_unet(pipeline, 9, **fields)
    write(pipeline, "unet", network, **saving)
    checkpoint = load(pipeline)
    model = checkpoint.description
    assert model.digest != whole.description.digest
    assert replace(model, digest="", name="") == replace(
        whole.description,
        digest="",
        name="",
        embeds_guidance=bool(fields),
        num_parameters=whole.description.num_parameters + 16 * fields.get("time_cond_proj_dim", 0),
    )
    assert torch.equal(checkpoint.network.state_dict()["conv_in.weight"], network.state_dict()["conv_in.weight"])


def test_a_unet_with_another_name_in_its_folder(pipeline: Path, whole: Checkpoint) -> None:
    other = pipeline / "unet/sdxl_lightning_4step_unet.safetensors"
    (pipeline / UNET).rename(other)
    assert load(other).description == replace(whole.description, name="pipeline")


# Published configs, in their own size. Numbers of parameters in millions.

OF_XL: Json = {
    **OF_SD1,
    "_diffusers_version": "0.19.0.dev0",
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "upcast_attention": None,
}
OF_SSD: Json = {
    **OF_XL,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
OF_VEGA: Json = {
    **OF_SSD,
    "transformer_layers_per_block": [1, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
}
CLIP_BIG_G: Json = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


@pytest.mark.parametrize(
    ("unet", "side", "tensors", "millions"),
    [
        (OF_XL, 1024, 1680, 2567.5),
        ({**OF_XL, "time_cond_proj_dim": 256}, 1024, 1681, 2567.5),
        (OF_SSD, 1024, 944, 1331.3),
        (OF_VEGA, 1024, 564, 745.2),
    ],
    ids=["XL", "LCM XL", "SSD-1B", "Vega"],
)
def test_published_networks(pipeline: Path, unet: Json, side: int, tensors: int, millions: float) -> None:
    edit(pipeline / UNET_CONFIG, unet)
    edit(pipeline / "text_encoder/config.json", CLIP_L)
    edit(pipeline / TEXT_CONFIG, CLIP_BIG_G)
    source = find(pipeline)
    config = source.config
    assert isinstance(config, TextToImageConfig)
    assert config.image_size == (side, side)
    with torch.device("meta"):
        network, clips = config.build(), [CLIPText(text) for text in config.texts]
        theirs = UNet2DConditionModel.from_config(json.loads((pipeline / UNET_CONFIG).read_text()))
    stored = {
        there.key: there.shape
        for key, values in network.state_dict().items()
        for there in source.network.naming.stored(key, tuple(values.shape))
    }
    assert stored == {key: tuple(values.shape) for key, values in theirs.state_dict().items()}
    assert len(stored) == tensors
    assert tuple(round(parameters(one) / 1e6, 1) for one in (network, *clips)) == (millions, 123.1, 694.7)


# Digests.


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", TEXT_CONFIG, INDEX, UNET_CONFIG])
def test_everything_that_decides_an_image_is_in_the_digest(part: str, pipeline: Path, whole: Checkpoint) -> None:
    match part:
        case "text_encoder_2":
            write(pipeline, part, xl_text_network(7))
        case "tokenizer_2":
            edit(pipeline / "tokenizer_2/special_tokens_map.json", {"pad_token": "<|endoftext|>"})
        case _:
            edit(pipeline / part, {"eos_token_id": 7, "force_zeros_for_empty_prompt": False, "flip_sin_to_cos": False})
    assert load(pipeline).description.digest != whole.description.digest


OLD_DIGESTS = {
    "sd1": "848154592014ef275c3421c94e9ffc7634b52e28a9a16d61582ad90b6c3f8d2d",
    "sd2": "0f9ef54d14a8fed4449fa479005fcb535b1163108b4ee04678b22d236d1c43dc",
    "tiny_sd": "25e4065b77dcb08fb474d6e333cf87fe2149baad099903055425f6d717ff4920",
    "small_sd": "f00b7aa6cbb7e165238b91d165e301a5eb3e4bbb4284506855b917ff945d4f7e",
}


@pytest.mark.parametrize("kind", KINDS)
def test_digests_of_pipelines_with_one_text_encoder_are_what_they_were(kind: str, tmp_path: Path) -> None:
    """They are in recipes."""
    assert load(write_pipeline(tmp_path, kind)).description.digest == OLD_DIGESTS[kind]


def test_a_new_sampler_moves_no_digest(tmp_path: Path) -> None:
    """As of LCM-LoRA merged into Stable Diffusion: served before there was `lcm`, which is recommended since."""
    model = load(write_pipeline(tmp_path, scheduler="LCMScheduler")).description
    assert model.recommended.sampler == "lcm"
    assert model.digest == "f1b722b30a693233e4d2e288ae500e287eb98b92308f2cc3d3eae01c15044f8c"


# What a pipeline's class decides.


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("xl", XL, Recommended("euler", 50, 5.0)),
        ("xl", "StableDiffusionXLImg2ImgPipeline", Recommended("euler", 50, 5.0)),
        ("xl", "FlaxStableDiffusionXLPipeline", Recommended("euler", 50, 5.0)),
        ("xl_turbo", XL, Recommended("euler_a", 50, 5.0)),
        ("lcm_xl", XL, Recommended("lcm", 50, 5.0)),
        ("lcm", LCM, Recommended("lcm", 4, 8.5)),
        ("lcm", "LatentConsistencyModelImg2ImgPipeline", Recommended("lcm", 4, 8.5)),
        ("lcm", SD, Recommended("lcm", 50, 7.5)),
    ],
)
def test_the_pipelines_own_settings_are_recommended(
    copied: Callable[[str], Path], kind: str, name: str, expected: Recommended
) -> None:
    folder = copied(kind)
    edit(folder / INDEX, {"_class_name": name})
    assert find(folder).config.recommended_settings == expected


@pytest.mark.parametrize(
    ("kind", "name", "sets"),
    [("xl", XL, False), ("lcm", LCM, False), ("lcm", SD, True)],
)
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_pipelines_of_stable_diffusion_alone_set_fields_of_the_scheduler(
    copied: Callable[[str], Path], kind: str, name: str, sets: bool, scheduler: str
) -> None:
    """The others take DDIM's own default, which clips latents."""
    folder = copied(kind)
    edit(folder / INDEX, {"_class_name": name, "scheduler": ["diffusers", scheduler]})
    edit(folder / SCHEDULER_CONFIG, {"_class_name": scheduler, "steps_offset": 0}, without="clip_sample")
    theirs = load_pipeline(folder).scheduler.config
    schedule = find(folder).config.schedule
    assert schedule.steps_offset == theirs["steps_offset"] == int(sets)
    if scheduler == "DDIMScheduler":
        assert schedule.clip_sample == theirs["clip_sample"] == (not sets)
    unclipped = schedule.with_fields(clip_sample=False)
    for sampler in ("lcm", "euler", "dpmpp_2m"):  # as the default of their schedulers
        assert np.array_equal(sample_table(schedule, sampler, 4).lines, sample_table(unclipped, sampler, 4).lines)
    assert np.array_equal(sample_table(schedule, "ddim", 4).lines, sample_table(unclipped, "ddim", 4).lines) == sets


@pytest.mark.parametrize(("kind", "name", "side"), [("xl", XL, 64), ("lcm", LCM, 64), ("lcm", SD, 512)])
def test_pipelines_of_stable_diffusion_alone_correct_old_sizes(
    copied: Callable[[str], Path], kind: str, name: str, side: int
) -> None:
    folder = copied(kind)
    edit(folder / INDEX, {"_class_name": name})
    edit(folder / UNET_CONFIG, {"_diffusers_version": "0.8.0"})
    assert find(folder).config.image_size == (side, side)


@pytest.mark.parametrize("fields", [{"original_inference_steps": 1001}, {"num_train_timesteps": 40}], ids=str)
def test_a_sampler_without_any_grid_is_not_recommended(
    lcm: Path, fields: Json, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers' pipeline cannot draw at all with such a LCMScheduler."""
    edit(lcm / SCHEDULER_CONFIG, fields)
    assert find(lcm).config.recommended_settings == Recommended("dpmpp_2m", 4, 8.5)
    [message] = caplog.messages
    assert message == (
        f"{lcm / SCHEDULER_CONFIG}: lcm takes no number of steps with this schedule: dpmpp_2m is recommended in its "
        "place"
    )


@pytest.mark.parametrize(
    ("name", "clip", "bound"), [(LCM, True, 1.5), (LCM, False, np.inf), (LCM, None, np.inf), (SD, True, np.inf)]
)
def test_lcm_clips_latents_where_its_scheduler_says_so(lcm: Path, name: str, clip: bool | None, bound: float) -> None:
    edit(lcm / INDEX, {"_class_name": name})
    edit(lcm / SCHEDULER_CONFIG, {"clip_sample": clip, "clip_sample_range": 1.5})
    lines = sample_table(find(lcm).config.schedule, "lcm", 4).lines
    assert (lines[:, Column.BOUND] == bound).all()


@pytest.mark.parametrize("force", [True, False, None])
def test_zeros_in_the_place_of_no_negative_prompt(pipeline: Path, force: bool | None) -> None:
    """null counts as false, as in diffusers."""
    edit(pipeline / INDEX, {"force_zeros_for_empty_prompt": force})
    text = load(pipeline).description.text
    assert text is not None
    assert text.force_zeros_for_empty_prompt is bool(force)


def test_other_pipelines_have_no_zeros(lcm: Path) -> None:
    edit(lcm / INDEX, {"force_zeros_for_empty_prompt": True, "requires_aesthetics_score": True})
    text = load(lcm).description.text
    assert text is not None
    assert text.force_zeros_for_empty_prompt is False


# Errors.

REFINER = "this is SDXL's refiner, which only redraws the images of a base model: name the base model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requires_aesthetics_score": True}, f"requires_aesthetics_score is true: {REFINER}"),
        (
            {
                "_class_name": "StableDiffusionXLImg2ImgPipeline",
                "text_encoder": [None, None],
                "tokenizer": [None, None],
            },
            f"names text_encoder_2 and no text_encoder: {REFINER}",
        ),
        ({"requires_aesthetics_score": "yes"}, "requires_aesthetics_score is yes, and must be true or false"),
        ({"force_zeros_for_empty_prompt": 1}, "force_zeros_for_empty_prompt is 1, and must be true or false"),
        ({"text_encoder_2": [None, None]}, f"names no text_encoder_2, which a {XL} needs"),
        ({"tokenizer_2": [None, None]}, f"names no tokenizer_2, which a {XL} needs"),
        ({"tokenizer": [None, None]}, f"names no tokenizer, which a {XL} needs"),
        (
            {"text_encoder_2": ["transformers", "CLIPTextModel"]},
            "text_encoder_2 is CLIPTextModel, and must be CLIPTextModelWithProjection",
        ),
        (
            {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
            "text_encoder is CLIPTextModelWithProjection, and must be CLIPTextModel",
        ),
        (
            {"tokenizer_2": ["transformers", "T5Tokenizer"]},
            "tokenizer_2 is T5Tokenizer, and must be CLIPTokenizer or CLIPTokenizerFast",
        ),
        (
            {"text_encoder_2": ["my_code", "CLIPTextModelWithProjection"]},
            (
                "text_encoder_2 is my_code.CLIPTextModelWithProjection, and must be a class of transformers: other "
                "code is never run"
            ),
        ),
        (
            {"_class_name": SD},
            "has the part text_encoder_2, which this version does not serve in a StableDiffusionPipeline",
        ),
        (
            {"_class_name": "StableDiffusionXLControlNetPipeline"},
            (
                "_class_name is StableDiffusionXLControlNetPipeline, and must be a pipeline of Stable Diffusion, SDXL "
                "or LCM, or of a U-Net and a scheduler, with or without a VAE"
            ),
        ),
        (
            {"controlnet": ["diffusers", "ControlNetModel"]},
            f"has the part controlnet, which this version does not serve in a {XL}",
        ),
    ],
    ids=str,
)
def test_pipelines_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / INDEX, changes)
    assert refusal(pipeline) == f"{INDEX}: {message}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"addition_embed_type": None},
            "addition_embed_type is null, and must be text_time in a pipeline of SDXL",
        ),
        (
            {"addition_embed_type": "text_image"},
            "addition_embed_type is text_image, and must be null or text_time: others are IF's and Kandinsky's",
        ),
        (
            {"projection_class_embeddings_input_dim": 64},
            (
                "projection_class_embeddings_input_dim is 64, and must be 72: 6 times addition_time_embed_dim, "
                "which is 8, and text_encoder_2's projection_dim, 24"
            ),
        ),
        (
            {"addition_time_embed_dim": 4},
            (
                "projection_class_embeddings_input_dim is 72, and must be 48: 6 times addition_time_embed_dim, "
                "which is 4, and text_encoder_2's projection_dim, 24"
            ),
        ),
        (
            {"addition_time_embed_dim": None},
            "addition_time_embed_dim is required where addition_embed_type is text_time",
        ),
        (
            {"projection_class_embeddings_input_dim": None},
            "projection_class_embeddings_input_dim is required where addition_embed_type is text_time",
        ),
        (
            {"cross_attention_dim": 32},
            "cross_attention_dim is 32, and must be 80, the sum of both text encoders' hidden_size, 32 + 48",
        ),
        ({"class_embed_type": "timestep"}, "class_embed_type is timestep, and must be null: the pipeline gives the"),
        ({"time_cond_proj_dim": 0}, "time_cond_proj_dim is 0, and must be greater than or equal to"),
    ],
    ids=str,
)
def test_networks_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / UNET_CONFIG, changes)
    assert refusal(pipeline).startswith(f"{UNET_CONFIG}: {message}")


def test_a_vae_with_another_scale_of_latents_is_refused(pipeline: Path) -> None:
    """As Playground 2.5's."""
    edit(pipeline / "vae/config.json", {"latents_mean": [-1.6, 1.1, -0.1, 0.2]})
    assert refusal(pipeline) == (
        "vae/config.json: latents_mean is [-1.6, 1.1, -0.1, 0.2], and must be null: other scales of latents are not "
        "supported"
    )


def test_sizes_in_a_pipeline_with_one_text_encoder_are_refused(lcm: Path) -> None:
    edit(
        lcm / UNET_CONFIG,
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    )
    assert refusal(lcm) == (
        f"{UNET_CONFIG}: addition_embed_type is text_time, and must be null in a pipeline with one text encoder: "
        "it belongs to SDXL's, which have two"
    )


def test_lcm_without_guidance_in_the_network_is_refused(lcm: Path) -> None:
    edit(lcm / UNET_CONFIG, {"time_cond_proj_dim": None})
    assert refusal(lcm) == (
        f"{UNET_CONFIG}: time_cond_proj_dim is null, and must be a number: a {LCM} tells the network the guidance"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection_dim": 0}, "projection_dim is 0, and must be greater than"),
        ({"projection_dim": None}, "projection_dim is None, and must be a valid integer"),
        ({"eos_token_id": [2]}, "eos_token_id is [2], and must be a valid integer"),
        ({"use_attention_mask": True}, "use_attention_mask is true, and must be false: the U-Net attends to padding"),
        ({"quantization_config": {"bits": 4}}, "has a quantization_config, and quantized weights are not supported"),
    ],
    ids=str,
)
def test_second_text_encoders_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / TEXT_CONFIG, changes)
    assert refusal(pipeline).startswith(f"{TEXT_CONFIG}: {message}")


def test_a_second_text_encoder_without_its_projection_is_refused(pipeline: Path) -> None:
    tensors = load_file(pipeline / TEXT_2)
    del tensors["text_projection.weight"]
    save_file(tensors, pipeline / TEXT_2)
    assert refusal(pipeline) == f"{TEXT_2}: lacks the key text_projection.weight, [24, 48]"


def test_two_lengths_of_prompts_are_refused(pipeline: Path) -> None:
    edit(pipeline / "tokenizer_2/tokenizer_config.json", {"model_max_length": 40})
    assert refusal(pipeline) == (
        "tokenizer_2: makes 40 tokens of a prompt, and tokenizer makes 77: both must make the same number, because the "
        "network takes the contexts of both encoders side by side"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text_encoder_2", f"model_index.json: names text_encoder_2, and there is no {TEXT_CONFIG}"),
        ("tokenizer_2", "model_index.json: names tokenizer_2, and there is no tokenizer_2/"),
        (TEXT_2, "text_encoder_2: holds no model.safetensors"),
        ("tokenizer_2/vocab.json", "tokenizer_2: holds neither tokenizer.json nor vocab.json"),
    ],
)
def test_missing_parts_are_refused(pipeline: Path, name: str, message: str) -> None:
    if (pipeline / name).is_dir():
        shutil.rmtree(pipeline / name)
    else:
        (pipeline / name).unlink()
    assert refusal(pipeline) == message


def test_pickles_are_opened_only_where_that_is_allowed(pipeline: Path) -> None:
    as_pickles(pipeline)
    assert refusal(pipeline) == f"text_encoder/pytorch_model.bin: {PICKLE}"


FILES = (INDEX, UNET_CONFIG, TEXT_CONFIG, SCHEDULER_CONFIG)
FLAGS = (
    "_class_name", "force_zeros_for_empty_prompt", "requires_aesthetics_score", "text_encoder", "tokenizer_2",
    "eos_token_id", "projection_dim", "time_cond_proj_dim", "addition_embed_type", "original_inference_steps",
)  # fmt: skip


@pytest.fixture(scope="module")
def changing(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the pipeline. Who changes a file puts it back."""
    return shutil.copytree(saved, tmp_path_factory.mktemp("changing") / "pipeline")


@given(data=st.data())
@examples(200)
def test_whatever_a_config_says_is_read_or_refused_in_a_line(saved: Path, changing: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FILES))
    values = json.loads((saved / name).read_text())
    field = data.draw(st.sampled_from(sorted({*values, *FLAGS})))
    (changing / name).write_text(json.dumps({**values, field: data.draw(VALUES)}))
    try:
        find(changing)
    except CheckpointError as error:
        check_line(error)
    finally:
        shutil.copy(saved / name, changing / name)
