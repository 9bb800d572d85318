"""Stable Diffusion on a running server: the images of diffusers' own pipelines."""

import base64
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.pipelines import KINDS, draw, load_pipeline, write_pipeline
from tests.reference import scheduler_class
from tests.servers import Json, ServerProcess, read_npy, read_parameters, read_png, serving, side_by_side
from tests.test_diffusers_server import to_uint8

# diffusers' warning with NumPy 2.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

SIZES = ((64, 64), (72, 56))  # (height, width); the second makes latents that no level can halve evenly
PROMPTS = (
    "",
    "a fox in the snow",
    "THREE purple ghosts!  in the forest, at night",
    "naïve café 東京 🦊",
    "the " * 100,
    "<|endoftext|> a dog !",
)
# Pipelines as they are published, and pipelines whose other fields are moved away from the defaults.
VARIANTS: dict[str, Json] = {
    **{kind: {"kind": kind} for kind in KINDS},
    "euler": {"kind": "sd1", "scheduler": "EulerDiscreteScheduler", "seed": 5, "factor": 4},
    "euler_a": {
        "kind": "sd2",
        "scheduler": "EulerAncestralDiscreteScheduler",
        "scheduler_config": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        "tokenizer": "json",
        "seed": 6,
        "factor": 2,
    },
    "odd": {
        "kind": "small_sd",
        "scheduler": "DPMSolverMultistepScheduler",
        "unet": {
            "only_cross_attention": (True, False, False),
            "transformer_layers_per_block": (1, 2, 1),
            "attention_head_dim": (2, 3, 4),
            "mid_block_type": "UNetMidBlock2D",
            "norm_eps": 1e-6,
            "act_fn": "gelu",
            "encoder_hid_dim": 24,
            "encoder_hid_dim_type": "text_proj",
            "resnet_time_scale_shift": "scale_shift",
        },
        "text": {"hidden_size": 24, "num_hidden_layers": 5, "hidden_act": "gelu"},
        "pad": "!",
        "seed": 7,
    },
}


def sizes_of(name: str) -> tuple[tuple[int, int], ...]:
    """The sizes that are served. diffusers takes multiples of 8."""
    factor = VARIANTS[name].get("factor", 8)
    return SIZES if factor == 8 else ((8 * factor, 8 * factor), (16, 24))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for name, fields in VARIANTS.items():
        write_pipeline(root / name, **fields)
    return root


def serving_text(folder: Path, name: str) -> AbstractContextManager[ServerProcess]:
    sizes = ",".join(f"{width}x{height}" for height, width in sizes_of(name))
    return serving(WEIGHTS=folder / name, SIZES=sizes, MAX_BATCH=4)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[dict[str, ServerProcess]]:
    with side_by_side(*(serving_text(folder, name) for name in VARIANTS)) as servers:
        yield dict(zip(VARIANTS, servers, strict=True))


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> Any:
    return cache(lambda name: load_pipeline(folder / name))


def request_of(name: str, i: int) -> Json:
    """A request, all of which differ in everything."""
    height, width = sizes_of(name)[i % 2]
    return {
        "seed": 100 + i,
        "prompt": PROMPTS[i % len(PROMPTS)],
        "negative_prompt": (None, "", "blurry, ugly")[i % 3],
        "num_inference_steps": (10, 2 if name == "euler" else 1, 7, 4, 20)[i % 5],  # Euler's linspace takes no 1
        "guidance_scale": (7.5, 0, 1, 3, 1.5)[i % 5],
        "guidance_rescale": (0, 0.7)[i % 4 == 3],
        "height": height,
        "width": width,
    }


def asked(server: ServerProcess, body: Json) -> NDArray[np.uint8]:
    response = server.client.post("/sample", json=body, headers={"Accept": "application/json"})
    assert response.status_code == 200, response.text
    [image] = response.json()["images"]
    return read_png(base64.b64decode(image["b64_json"]))


def expected(pipeline: Any, body: Json) -> NDArray[np.uint8]:
    settings = {key: value for key, value in body.items() if key not in ("seed", "prompt")}
    return to_uint8(draw(pipeline, body["prompt"], body["seed"], **settings))


def assert_alike(ours: NDArray[np.uint8], theirs: NDArray[np.uint8], what: object) -> None:
    """Within one level on 99.9 % of the values."""
    assert ours.shape == theirs.shape, what
    beyond = np.abs(ours.astype(int) - theirs.astype(int)) > 1
    assert beyond.mean() <= 0.001, (what, beyond.mean())
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 0.1, what


@pytest.mark.parametrize("name", VARIANTS)
def test_the_pipelines_images(running: dict[str, ServerProcess], pipelines: Any, name: str) -> None:
    """Each at the pipeline's own scheduler. Requests run together, and the pipeline draws them one by one."""
    bodies = [request_of(name, i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda body: asked(running[name], body), bodies))
    for body, ours in zip(bodies, drawn, strict=True):
        assert_alike(ours, expected(pipelines(name), body), body)
    assert len({image.tobytes() for image in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("dpmpp_2m", "DPMSolverMultistepScheduler"),
        ("pndm", "PNDMScheduler"),
        ("euler", "EulerDiscreteScheduler"),
        ("euler_a", "EulerAncestralDiscreteScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
@pytest.mark.parametrize("name", ["small_sd", "sd2"])
def test_the_images_of_another_scheduler(
    running: dict[str, ServerProcess], pipelines: Any, name: str, sampler: str, scheduler: str
) -> None:
    """As people change it: `from_config` of the pipeline's own scheduler, with what its constructor sets for each."""
    if (name, sampler) == ("sd2", "pndm"):
        pytest.skip("diffusers' PNDMScheduler passes over rescale_betas_zero_snr")
    pipeline = pipelines(name)
    own = pipeline.scheduler
    try:
        config = {**own.config, "clip_sample": False, "skip_prk_steps": True}
        pipeline.scheduler = scheduler_class(scheduler).from_config(config)
        for steps in (2, 9, 30):
            body = {**request_of(name, steps), "num_inference_steps": steps, "guidance_scale": 5}
            ours = asked(running[name], {**body, "sampler": sampler})
            assert_alike(ours, expected(pipeline, body), (sampler, steps))
    finally:
        pipeline.scheduler = own


def test_latents_are_the_pipelines(running: dict[str, ServerProcess], pipelines: Any) -> None:
    body = request_of("sd1", 0)
    response = running["sd1"].client.post("/sample", json=body, headers={"Accept": "application/x-npy"})
    settings = {key: value for key, value in body.items() if key not in ("seed", "prompt")}
    latents = draw(pipelines("sd1"), body["prompt"], body["seed"], output_type="latent", **settings)
    np.testing.assert_allclose(read_npy(response.content), latents, rtol=0, atol=1e-5 * np.abs(latents).max())


# Emphasis

# Prompts, and what AUTOMATIC1111 makes of them: fragments with weights.
WEIGHTED = r"a (fox:1.4) in [the] snow, ((dark)) \(the 2nd\)! [[THREE" + " ghosts" * 90
NEGATIVE = "(blurry, (ugly:-0.5):1.2)"
FRAGMENTS = (
    ("a ", 1.0),
    ("fox", 1.4),
    (" in ", 1.0),
    ("the", 1 / 1.1),
    (" snow, ", 1.0),
    ("dark", 1.1 * 1.1),
    (" (the 2nd)! ", 1.0),
    ("THREE" + " ghosts" * 90, 1 / 1.1**2),
)
NEGATIVE_FRAGMENTS = (("blurry, ", 1.2), ("ugly", -0.6))
EMPHASIZED: Json = {"prompt": WEIGHTED, "negative_prompt": NEGATIVE, "emphasis": "original", "guidance_scale": 4}

Fragments = Sequence[tuple[str, float]]


@torch.inference_mode()
def encoded(
    tokenizer: Any, encoder: Any, fragments: Fragments, state_of: Callable[[Any], torch.Tensor]
) -> tuple[torch.Tensor, Any]:
    """A context, [1, N, C], by transformers, weighed as AUTOMATIC1111 does; and all that the encoder gives.

    Args:
        state_of: the part of it that the network is given.
    """
    pairs = [(token, weight) for text, weight in fragments for token in tokenizer(text).input_ids[1:-1]][:75]
    rest = 75 - len(pairs)
    ids = [
        tokenizer.bos_token_id,
        *(token for token, _ in pairs),
        tokenizer.eos_token_id,
        *[tokenizer.pad_token_id] * rest,
    ]
    weights = torch.tensor([1.0, *(weight for _, weight in pairs), *[1.0] * (1 + rest)])
    output = encoder(torch.tensor([ids]), output_hidden_states=True)
    state = state_of(output)
    heavier = state * weights[None, :, None]
    return heavier * (state.mean() / heavier.mean()), output


@pytest.mark.parametrize("clip_skip", [0, 1])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_weights_of_words(running: dict[str, ServerProcess], pipelines: Any, name: str, clip_skip: int) -> None:
    """Contexts by transformers, weighed here, in diffusers' pipeline."""
    pipeline, body = pipelines(name), {**request_of(name, 3), **EMPHASIZED, "clip_skip": clip_skip}
    encoder = pipeline.text_encoder

    def embedded(fragments: Fragments, clip_skip: int = 0) -> torch.Tensor:
        norm = encoder.final_layer_norm
        context, _ = encoded(
            pipeline.tokenizer, encoder, fragments, lambda output: norm(output.hidden_states[-1 - clip_skip])
        )
        return context

    of_prompts = ("prompt", "negative_prompt", "emphasis", "clip_skip", "seed")
    theirs = draw(
        pipeline,
        None,
        body["seed"],
        prompt_embeds=embedded(FRAGMENTS, clip_skip),
        negative_prompt_embeds=embedded(NEGATIVE_FRAGMENTS),
        **{field: value for field, value in body.items() if field not in of_prompts},
    )
    ours = asked(running[name], body)
    assert_alike(ours, to_uint8(theirs), (name, clip_skip))
    assert not np.array_equal(ours, asked(running[name], {**body, "emphasis": "none"}))


def test_a_recipe_with_weights_draws_its_image_again(running: dict[str, ServerProcess]) -> None:
    response = running["sd1"].client.post("/sample", json={**EMPHASIZED, "seed": 3, "num_inference_steps": 3})
    assert response.headers["x-warnings"].startswith("the prompt has ")
    recipe = read_parameters(response.content)
    assert recipe["emphasis"] == "original"
    again = {key: value for key, value in recipe.items() if key not in ("model", "fingerprint")}
    assert running["sd1"].client.post("/sample", json=again).content == response.content


# Recipes


def test_a_recipe_draws_its_image_again(running: dict[str, ServerProcess]) -> None:
    server = running["sd1"]
    body = {**request_of("sd1", 1), "num_images": 2, "prompt": ["a fox", "an ox"], "guidance_scale": 4, "clip_skip": 1}
    response = server.client.post("/sample", json=body, headers={"Accept": "application/json"})
    for image, prompt in zip(response.json()["images"], ("a fox", "an ox"), strict=True):
        png = base64.b64decode(image["b64_json"])
        recipe = read_parameters(png)
        assert recipe["prompt"] == prompt
        again = {key: value for key, value in recipe.items() if key not in ("model", "fingerprint")}
        assert server.client.post("/sample", json=again).content == png


def test_all_that_reads_a_prompt_is_in_the_fingerprint(running: dict[str, ServerProcess]) -> None:
    parts = running["sd1"].client.get("/info").json()["fingerprint_parts"]
    assert {"text_backend", "text_backend_version", "text_precision", "tokenizers"} <= parts.keys()
    assert parts["text_precision"] == "float32"
