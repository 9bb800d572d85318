"""Tiny pipelines on the server: the same bytes in any company of prompts, guidance, samplers and sizes."""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engines import PATIENCE
from tests.pipelines import write_pipeline
from tests.servers import ServerProcess, serving

pytestmark = pytest.mark.slow

WATCHED = 40
WEIGHTED = "a (fox:1.4) in [the] snow"
PROMPTS = ("", "a fox in the snow", "a fox in the rain", "ein Fuchs, 2 Füchse 🦊", "snow " * 100, WEIGHTED)
SAMPLERS = ("ddim", "pndm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "heun", "unipc", "lcm", "tcd")

SIZES = ([64, 64], [512, 1001], [1024, 1024])
CROPS = ([0, 0], [3, 128])

Asked = dict[str, object]


def a_request(kind: str, seed: int) -> Asked:
    """A request to a pipeline of a kind. LCM is told the guidance, and takes nothing negative."""
    draw = random.Random(seed)
    guidance = draw.choice((0.0, 1.0, 1.5, 7.5, 30.0))
    asked = {
        "seed": seed,
        "prompt": draw.choice(PROMPTS),
        "emphasis": draw.choice(("none", "original")),
        "guidance_scale": guidance,
        "clip_skip": draw.choice((0, 0, 1)),
        "sampler": draw.choice(SAMPLERS),
        "num_inference_steps": draw.randint(2, 9),
        "height": 64,
        "width": draw.choice((64, 96)),
    }
    if guidance > 1 and kind != "lcm":
        asked["negative_prompt"] = draw.choice((None, *PROMPTS))
        asked["guidance_rescale"] = draw.choice((0.0, 0.7))
    if kind == "xl":
        for side in ("", "negative_") if guidance > 1 else ("",):
            asked[f"{side}original_size"] = draw.choice((None, *SIZES))
            asked[f"{side}target_size"] = draw.choice((None, *SIZES))
            asked[f"{side}crops_coords_top_left"] = draw.choice((None, *CROPS))
    return asked


@pytest.fixture(scope="module", params=["sd1", "xl", "lcm"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def server(
    request: pytest.FixtureRequest, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("pipeline") / "tiny"
    write_pipeline(folder, kind)
    with serving(WEIGHTS=str(folder), SIZES="64x64,96x64", PRECISION=request.param) as running:
        yield running


def drawn(server: ServerProcess, asked: Asked) -> bytes:
    answer = server.client.post("/sample", json=asked, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.content


def test_forty_of_forty_have_the_same_bytes_alone_and_in_a_crowd(server: ServerProcess, kind: str) -> None:
    watched = [a_request(kind, seed) for seed in range(WATCHED)]
    crowd = [*watched, *(a_request(kind, seed) for seed in range(1000, 1080))]
    random.Random(0).shuffle(crowd)
    alone = {str(asked): drawn(server, asked) for asked in watched}
    assert len(set(alone.values())) == WATCHED
    with ThreadPoolExecutor(24) as pool:
        images = dict(zip(map(str, crowd), pool.map(lambda asked: drawn(server, asked), crowd), strict=True))
    assert [asked for asked in alone if images[asked] != alone[asked]] == []


def test_each_prompt_of_the_crowd_was_encoded_once(server: ServerProcess) -> None:
    """The empty prompt is known from the start. Other layers make other contexts of a prompt, and so do weights."""
    forget = {"num_inference_steps": 1, "guidance_scale": 1.0}
    for prompt in PROMPTS:
        for clip_skip in (0, 1, 0):
            for emphasis in ("none", "original"):
                drawn(server, {**forget, "seed": 1, "prompt": prompt, "emphasis": emphasis, "clip_skip": clip_skip})
    texts = len(PROMPTS) + 1  # one with and without its weights
    assert server.metric("stepwise_texts_total", source="encoder") == 2 * texts - 1
    assert server.metric("stepwise_text_seconds_count") == 2 * texts - 1
