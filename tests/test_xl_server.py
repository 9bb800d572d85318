"""SDXL and LCM on a running server: the images of diffusers' own pipelines, each drawn in a batch of one."""

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.pipelines import draw, load_pipeline, write_pipeline
from tests.reference import scheduler_class
from tests.servers import Json, ServerProcess, read_npy, read_parameters, serving
from tests.test_diffusers_server import to_uint8
from tests.test_text_server import (
    EMPHASIZED,
    FRAGMENTS,
    NEGATIVE_FRAGMENTS,
    PROMPTS,
    SIZES,
    Fragments,
    asked,
    assert_alike,
    encoded,
)

# diffusers' warning with NumPy 2.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

# Pipelines as they are published, and pipelines whose other fields are moved away from the defaults.
VARIANTS: dict[str, Json] = {
    "xl": {"kind": "xl"},
    "xl_turbo": {"kind": "xl_turbo"},
    "ssd1b": {"kind": "ssd1b"},
    "lcm": {"kind": "lcm"},
    "lcm_xl": {"kind": "lcm_xl"},
    "lcm_in_sd": {"kind": "lcm", "index": {"_class_name": "StableDiffusionPipeline"}, "seed": 3},
    "ddim": {  # clips latents, because this pipeline leaves clip_sample as it is
        "kind": "xl",
        "scheduler": "DDIMScheduler",
        "text_2": {"eos_token_id": 521},
        "tokenizer": "json",
        "index": {"force_zeros_for_empty_prompt": False},
        "seed": 5,
    },
    "odd": {
        "kind": "vega",
        "scheduler": "EulerDiscreteScheduler",
        "scheduler_config": {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "use_karras_sigmas": True,
        },
        "unet": {
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 56,
            "encoder_hid_dim": 80,
            "encoder_hid_dim_type": "text_proj",
            "cross_attention_dim": 24,
            "act_fn": "gelu",
        },
        "text": {"num_hidden_layers": 2},
        "text_2": {"eos_token_id": 300, "projection_dim": 20, "hidden_act": "quick_gelu"},
        "seed": 7,
    },
}
LCM = ("lcm", "lcm_xl", "lcm_in_sd")
ONE_ENCODER = ("lcm", "lcm_in_sd")

Running = Callable[[str], ServerProcess]

MICRO: tuple[Json, ...] = (
    {},
    {"original_size": [1001, 777], "crops_coords_top_left": [3, 5], "target_size": [128, 96]},
    {
        "negative_original_size": [33, 44],
        "negative_crops_coords_top_left": [7, 0],
        "negative_target_size": [1024, 1023],
    },
    {
        "original_size": [512, 2048],
        "crops_coords_top_left": [0, 9],
        "target_size": [64, 65],
        "negative_original_size": [8, 2049],
        "negative_crops_coords_top_left": [100, 1],
        "negative_target_size": [7, 11],
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for name, fields in VARIANTS.items():
        write_pipeline(root / name, **fields)
    return root


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    """The server of a variant, started when it is first needed: two cores would start all of them for minutes."""
    sizes = ",".join(f"{width}x{height}" for height, width in SIZES)
    with ExitStack() as stack:
        yield cache(lambda name: stack.enter_context(serving(WEIGHTS=folder / name, SIZES=sizes, MAX_BATCH=4)))


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> Any:
    return cache(lambda name: load_pipeline(folder / name))


def request_of(name: str, i: int) -> Json:
    """A request, all of which differ in everything. Those to LCM have no negative side."""
    height, width = SIZES[i % 2]
    body = {
        "seed": 100 + i,
        "prompt": PROMPTS[i % len(PROMPTS)],
        "num_inference_steps": (4, 1, 2, 8)[i % 4] if name in LCM or name == "xl_turbo" else (10, 2, 7, 4, 20)[i % 5],
        "guidance_scale": (7.5, 0, 1, 3, 1.5)[i % 5],
        "height": height,
        "width": width,
    }
    if name not in ONE_ENCODER:
        body |= {"clip_skip": (0, 0, 1)[i % 3], **MICRO[i % 4]}
    if name not in LCM:
        return {**body, "negative_prompt": (None, "", "blurry, ugly")[i // 2 % 3], "guidance_rescale": (0, 0.7)[i > 8]}
    return {field: value for field, value in body.items() if not field.startswith("negative")}


def expected(pipeline: Any, body: Json, **arguments: Any) -> NDArray[np.float32]:
    """Here guidance of 1 and less is off, also where the network is told it. diffusers would tell it what is below."""
    settings = {
        field: tuple(value) if isinstance(value, list) and field != "timesteps" else value
        for field, value in body.items()
        if field not in ("seed", "prompt", "sampler")
    }
    settings["guidance_scale"] = max(1, body["guidance_scale"])
    return draw(pipeline, body["prompt"], body["seed"], **settings, **arguments)


def assert_drawn(server: ServerProcess, pipeline: Any, body: Json, sampler: Json) -> None:
    assert_alike(asked(server, {**body, **sampler}), to_uint8(expected(pipeline, body)), (sampler, body))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_pipelines_images(running: Running, pipelines: Any, name: str) -> None:
    """Each at the pipeline's own scheduler. Requests run together, and the pipeline draws them one by one."""
    server, bodies = running(name), [request_of(name, i) for i in range(24)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda body: asked(server, body), bodies))
    for body, ours in zip(bodies, drawn, strict=True):
        assert_alike(ours, to_uint8(expected(pipelines(name), body)), body)
    assert len({image.tobytes() for image in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_the_images_of_another_scheduler(running: Running, pipelines: Any, sampler: str, scheduler: str) -> None:
    """As people change it: `from_config` of the pipeline's own scheduler.

    Guidance is weak: with clipped latents and guidance 5, one rounding in the first noise moves 30 steps by half of the
    range in diffusers itself.
    """
    pipeline = pipelines("xl")
    own = pipeline.scheduler
    try:
        pipeline.scheduler = scheduler_class(scheduler).from_config(own.config)
        for steps in (2, 9, 30):
            body = {**request_of("xl", steps), "num_inference_steps": steps, "guidance_scale": 2}
            assert_drawn(running("xl"), pipeline, body, {"sampler": sampler})
    finally:
        pipeline.scheduler = own


@pytest.mark.parametrize("guidance", [0, 1, 1.7, 4, 8.5])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_lcm_is_told_the_guidance(running: Running, pipelines: Any, steps: int, guidance: float) -> None:
    body = {**request_of("lcm", 1), "num_inference_steps": steps, "guidance_scale": guidance}
    assert_drawn(running("lcm"), pipelines("lcm"), body, {})


def test_what_a_request_to_lcm_leaves_out(running: Running, pipelines: Any) -> None:
    """4 steps and guidance 8.5, as of the pipeline."""
    image = draw(pipelines("lcm"), "a fox", 3, height=64, width=64)
    assert_alike(asked(running("lcm"), {"prompt": "a fox", "seed": 3}), to_uint8(image), "defaults")


@pytest.mark.parametrize(
    ("name", "sampler"), [("lcm", "lcm"), ("lcm_xl", "lcm"), ("xl", "lcm"), ("xl", "euler"), ("ssd1b", "euler")]
)
def test_timesteps_of_ones_own(running: Running, pipelines: Any, name: str, sampler: str) -> None:
    """Those of DMD2."""
    pipeline = pipelines(name)
    own = pipeline.scheduler
    try:
        if (name, sampler) == ("xl", "lcm"):
            pipeline.scheduler = scheduler_class("LCMScheduler").from_config(own.config)
        body = {**request_of(name, 5), "timesteps": [999, 749, 499, 249], "guidance_scale": 2}
        del body["num_inference_steps"]
        assert_drawn(running(name), pipeline, body, {"sampler": sampler})
    finally:
        pipeline.scheduler = own


@pytest.mark.parametrize("name", ["xl", "lcm_xl"])
def test_latents_are_the_pipelines(running: Running, pipelines: Any, name: str) -> None:
    body = request_of(name, 3)
    response = running(name).client.post("/sample", json=body, headers={"Accept": "application/x-npy"})
    latents = expected(pipelines(name), body, output_type="latent")
    np.testing.assert_allclose(read_npy(response.content), latents, rtol=0, atol=1e-5 * np.abs(latents).max())


# Negative prompts and recipes.


def test_no_negative_prompt_is_not_the_empty_one(running: Running) -> None:
    """Unless the pipeline makes no zeros of it."""
    body = {**request_of("xl", 0), "guidance_scale": 5}
    for name, differ in (("xl", True), ("ddim", False)):
        null, empty = (asked(running(name), {**body, "negative_prompt": negative}) for negative in (None, ""))
        assert (null != empty).any() == differ


@pytest.mark.parametrize("negative", [None, "", "blurry"])
@pytest.mark.parametrize("name", ["xl", "lcm_xl"])
def test_a_recipe_draws_its_image_again(running: Running, name: str, negative: str | None) -> None:
    server = running(name)
    body = {**request_of(name, 3), "num_images": 2, "prompt": ["a fox", "an ox"], "guidance_scale": 4}
    if name not in LCM:
        body["negative_prompt"] = negative
    response = server.client.post("/sample", json=body, headers={"Accept": "application/json"})
    for image, prompt in zip(response.json()["images"], ("a fox", "an ox"), strict=True):
        png = base64.b64decode(image["b64_json"])
        recipe = read_parameters(png)
        assert recipe["prompt"] == prompt
        assert recipe["original_size"] == [512, 2048]
        assert ("negative_original_size" in recipe) == (name not in LCM)
        again = {key: value for key, value in recipe.items() if key not in ("model", "fingerprint")}
        assert server.client.post("/sample", json=again).content == png


# Emphasis


def test_weights_of_words(running: Running, pipelines: Any) -> None:
    """Each encoder has its own tokens and its own mean. Contexts by transformers, weighed here."""
    pipeline, body = pipelines("xl"), {**request_of("xl", 3), **EMPHASIZED, "clip_skip": 0}

    def embedded(fragments: Fragments) -> tuple[torch.Tensor, torch.Tensor]:
        encoders = (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)
        (first, _), (second, output) = (
            encoded(tokenizer, encoder, fragments, lambda output: output.hidden_states[-2])
            for tokenizer, encoder in encoders
        )
        return torch.cat([first, second], dim=-1), output.text_embeds

    (own, pooled), (negative, negative_pooled) = embedded(FRAGMENTS), embedded(NEGATIVE_FRAGMENTS)
    without = {**body, "prompt": None}
    for field in ("negative_prompt", "emphasis", "clip_skip"):
        del without[field]
    theirs = expected(
        pipeline,
        without,
        prompt_embeds=own,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
    )
    ours = asked(running("xl"), body)
    assert_alike(ours, to_uint8(theirs), body)
    assert not np.array_equal(ours, asked(running("xl"), {**body, "emphasis": "none"}))
