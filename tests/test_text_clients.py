"""Prompts for people: the client, the command line and the operator's check, on a tiny Stable Diffusion.

The operator's check refuses one prompt, fails at another, and says of images what a test tells it to.
"""

import asyncio
import hashlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from service.http.png import encode_png
from stepwise import AsyncClient, Client, ImageDone, Invalid, Queued, read_recipe
from stepwise.cli import exits
from tests.local import LocalServer, serving_here
from tests.pipelines import write_pipeline
from tests.programs import done, refused, stepwise
from tests.servers import Json, problem
from tests.test_events import watched

FOX = "a fox in the snow"
LONG = "fox " * 80  # 80 tokens; 75 fit
CHECK = """
answer = None  # for images

def check(*, prompt=None, negative_prompt=None, image=None):
    if prompt == "refused" or negative_prompt == "refused too":
        return "not on this server"
    if prompt == "secret that fails":
        raise ValueError(prompt)
    if image is not None:
        assert (image.mode, image.size) == ("RGB", (64, 64))
        if isinstance(answer, Exception):
            raise answer
        return answer
"""
NAME = "checks_of_text_clients"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("weights") / "foxes")


@pytest.fixture(scope="module")
def server(pipeline: Path) -> Iterator[LocalServer]:
    with serving_here(weights=str(pipeline), max_batch=4) as running:
        yield running


@pytest.fixture(scope="module")
def strict(pipeline: Path) -> Iterator[LocalServer]:
    """A server with the check."""
    (pipeline.parent / f"{NAME}.py").write_text(CHECK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(pipeline.parent)
        with serving_here(weights=str(pipeline), max_batch=4, check=f"{NAME}:check") as running:
            yield running


@pytest.fixture
def client(server: LocalServer) -> Iterator[Client]:
    with Client(server.url, patience_s=0) as client:
        yield client


@pytest.fixture
def check_module(strict: LocalServer) -> Iterator[ModuleType]:
    """The module of the check. A test may set its `answer` for images."""
    module = sys.modules[NAME]
    yield module
    module.answer = None  # type: ignore[attr-defined]


def asked(server: LocalServer, **fields: object) -> bytes:
    answer = server.client.post("/sample", json={"num_inference_steps": 3, **fields})
    assert answer.status_code == 200, answer.text
    return answer.content


def cut(*warnings: str) -> bool:
    [warning] = warnings
    return "has 80 tokens, and 75 fit" in warning and "fox" not in warning


# The client


def test_a_prompt_decides_the_image_and_is_in_its_recipe(client: Client) -> None:
    drawn = client.sample(prompt=FOX, negative_prompt="blurry", seed=7, num_inference_steps=3)
    [image] = drawn.images
    recipe = read_recipe(image.png)
    assert (recipe["prompt"], recipe["negative_prompt"]) == (FOX, "blurry")
    assert drawn.parameters["prompt"] == FOX
    assert drawn.warnings == ()
    others: list[dict[str, Any]] = [{}, {"prompt": FOX}, {"prompt": FOX, "negative_prompt": "blurry", "clip_skip": 1}]
    pngs = {client.sample(seed=7, num_inference_steps=3, **fields).images[0].png for fields in others}
    assert len({image.png, *pngs}) == 4


def test_what_was_cut_is_told_by_every_method(client: Client, server: LocalServer) -> None:
    wanted: dict[str, Any] = {"prompt": LONG, "seed": 1, "num_inference_steps": 2}
    assert cut(*client.sample(**wanted).warnings)
    assert cut(*client.sample_array(**wanted).warnings)
    assert cut(*client.sample_picture(kind="jpeg", **wanted).warnings)
    first, *others = client.stream(**wanted)
    assert isinstance(first, Queued)
    assert cut(*first.warnings)
    assert any(isinstance(event, ImageDone) for event in others)

    async def ask() -> None:
        async with AsyncClient(server.url) as client:
            assert cut(*(await client.sample(**wanted)).warnings)
            [first, *_] = [event async for event in client.stream(**wanted)]
            assert isinstance(first, Queued)
            assert cut(*first.warnings)

    asyncio.run(ask())
    two = client.sample_array(prompt=LONG, negative_prompt=LONG, num_inference_steps=2).warnings
    assert len(two) == 2


def test_a_prompt_guides_what_is_denoised(client: Client) -> None:
    latents = client.sample_array(prompt=FOX, seed=3, num_inference_steps=2).array
    noisy = client.noise_array(latents, 300, seed=1).array
    clean, other = (client.denoise(noisy, 300, prompt=prompt, seed=1).images[0] for prompt in (FOX, "an ox"))
    assert clean.png != other.png
    assert read_recipe(clean.png)["prompt"] == FOX


# The command line


def test_a_prompt_on_the_command_line(server: LocalServer, tmp_path: Path) -> None:
    options = [
        "--negative",
        "blurry",
        "--guidance-rescale",
        "0.5",
        "--clip-skip",
        "1",
        "-g",
        "5",
        "--steps",
        "3",
        "-s",
        "7",
    ]
    assert done(stepwise(server, tmp_path, "sample", FOX, *options, "-o", "fox.png")) == "fox.png\n"
    wanted = {"negative_prompt": "blurry", "guidance_rescale": 0.5, "clip_skip": 1, "guidance_scale": 5}
    assert (tmp_path / "fox.png").read_bytes() == asked(server, prompt=FOX, seed=7, **wanted)
    assert done(stepwise(server, tmp_path, "verify", "fox.png")) == "fox.png: the same bytes\n"


@pytest.mark.parametrize("name", ["fox.png", "fox.jpg", "fox.npy"])
def test_what_was_cut_is_said_on_standard_error(server: LocalServer, tmp_path: Path, name: str) -> None:
    ended = stepwise(server, tmp_path, "sample", LONG, "--steps", "2", "-o", name)
    assert (ended.returncode, ended.stdout.decode()) == (0, f"{name}\n")
    [line] = ended.stderr.decode().splitlines()
    assert line.startswith("stepwise: warning: the prompt has ")
    assert cut(line)


def test_sheets_of_texts_are_verified(server: LocalServer, tmp_path: Path) -> None:
    several: dict[str, Json] = {
        "one.png": {"prompt": FOX, "num_images": 2},
        "prompts.png": {"prompt": [FOX, "an ox", FOX], "num_images": 3},
        "negatives.png": {"prompt": FOX, "negative_prompt": ["blurry", None], "num_images": 2},
        "unguided.png": {"prompt": [FOX, "an ox"], "guidance_scale": 0, "num_images": 2},
    }
    for name, fields in several.items():
        (tmp_path / name).write_bytes(asked(server, seed=5, **fields))
    printed = done(stepwise(server, tmp_path, "verify", *several))
    assert printed.splitlines() == [f"{name}: the same bytes" for name in several]
    command = ["sample", FOX, "--negative", "blurry", "--negative", "people", "-s", "5", "--steps", "3", "--sheet"]
    done(stepwise(server, tmp_path, *command, "-o", "drawn.png"))
    expected = asked(server, prompt=FOX, negative_prompt=["blurry", "people"], num_images=2, seed=5)
    assert (tmp_path / "drawn.png").read_bytes() == expected


def without_prompts(png: bytes) -> bytes:
    """The PNG as a server with RECIPE_PROMPTS=0 would write it, but for the fingerprint."""
    recipe = read_recipe(png)
    hashes = {f"{name}_sha256": sha256(recipe.pop(name)) for name in ("prompt", "negative_prompt") if name in recipe}
    with PillowImage.open(io.BytesIO(png)) as image:
        values = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
    return encode_png(values, {**recipe, **hashes})


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_a_secret_prompt_is_needed_to_verify(server: LocalServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(without_prompts(asked(server, prompt=FOX, negative_prompt="blurry", seed=7)))
    for options, line in (
        ([], "its recipe has only the SHA-256 of the prompt: give it with --prompt"),
        (["--prompt", FOX], "its recipe has only the SHA-256 of the negative prompt: give it with --negative"),
        (["--prompt", "an ox", "--negative", "blurry"], "--prompt is another prompt than that of its recipe"),
        (["--prompt", FOX, "--negative", ""], "--negative is another prompt than that of its recipe"),
    ):
        assert refused(stepwise(server, tmp_path, "verify", "a.png", *options), exits.UNUSABLE) == f"a.png: {line}"
    ended = stepwise(server, tmp_path, "verify", "a.png", "--prompt", FOX, "--negative", "blurry")
    assert ended.returncode == exits.DIFFERENT  # this server writes prompts
    assert ended.stdout.decode().rstrip().endswith("; the pixels are the same")


@pytest.mark.slow
def test_images_without_prompts_are_verified_by_their_server(pipeline: Path, tmp_path: Path) -> None:
    with serving_here(weights=str(pipeline), recipe_prompts=False) as server:
        png = asked(server, prompt=FOX, negative_prompt="blurry", seed=7)
        (tmp_path / "a.png").write_bytes(png)
        recipe = read_recipe(png)
        assert (recipe["prompt_sha256"], recipe["negative_prompt_sha256"]) == (sha256(FOX), sha256("blurry"))
        assert not {"prompt", "negative_prompt"} & recipe.keys()
        command = ["verify", "a.png", "--prompt", FOX, "--negative", "blurry"]
        assert done(stepwise(server, tmp_path, *command)) == "a.png: the same bytes\n"
        several = asked(server, prompt=[FOX, "an ox"], num_images=2, seed=7)
        (tmp_path / "sheet.png").write_bytes(several)
        line = refused(stepwise(server, tmp_path, "verify", "sheet.png", "--prompt", FOX), exits.UNUSABLE)
        assert line == "sheet.png: its images have several prompts, and its recipe has only their SHA-256"


def test_info_tells_of_texts(server: LocalServer, tmp_path: Path) -> None:
    told = done(stepwise(server, tmp_path, "info"))
    assert "prompts         75 tokens fit, the rest is cut; at most 8192 bytes" in told
    assert "text encoder    4 layers, " in told


# The operator's check


def test_a_refused_prompt_is_not_drawn(strict: LocalServer, tmp_path: Path) -> None:
    accepted = strict.metric("stepwise_accepted_total")
    for fields in (
        {"prompt": "refused"},
        {"prompt": [FOX, "refused"], "num_images": 2},
        {"negative_prompt": "refused too"},
    ):
        for accept in ("image/png", "application/json", "text/event-stream"):
            answer = strict.client.post("/sample", json=fields, headers={"Accept": accept})
            assert problem(answer, 422)["detail"] == "the prompt is refused: not on this server"
    assert problem(strict.client.get("/sample?prompt=refused"), 422)["detail"].startswith("the prompt is refused")
    with Client(strict.url) as client:
        with pytest.raises(Invalid, match="the prompt is refused: not on this server"):
            client.sample(prompt="refused")
        with pytest.raises(Invalid, match="the prompt is refused"):
            client.denoise(np.zeros((4, 8, 8), np.float32), 300, prompt="refused")
    line = refused(stepwise(strict, tmp_path, "sample", "refused", "-o", "a.png"), exits.UNUSABLE)
    assert line.startswith("the prompt is refused: not on this server")
    assert strict.metric("stepwise_accepted_total") == accepted


def test_a_check_that_fails_refuses_and_tells_no_log_the_prompt(
    strict: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    failed = strict.metric("stepwise_checks_total", outcome="failed")
    with caplog.at_level(logging.DEBUG):
        answer = strict.client.post("/sample", json={"prompt": "secret that fails"})
    assert problem(answer, 500)["detail"] == "the check of a prompt failed"
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert strict.metric("stepwise_checks_total", outcome="failed") == failed + 1


def test_a_refused_image_is_not_sent(strict: LocalServer, check_module: ModuleType) -> None:
    check_module.answer = "it is no fox"  # type: ignore[attr-defined]
    refusals = strict.metric("stepwise_checks_total", outcome="refused")
    fields: Json = {"prompt": FOX, "num_inference_steps": 2}
    for accept in ("image/png", "image/webp", "application/json", "application/zip"):
        answer = strict.client.post("/sample", json=fields, headers={"Accept": accept})
        assert problem(answer, 422)["detail"] == "the image is refused: it is no fox"
    assert strict.metric("stepwise_checks_total", outcome="refused") == refusals + 4
    last = watched(strict, fields)[-1]
    assert (last.name, last.data["status"]) == ("error", 422)
    assert last.data["detail"] == "the image is refused: it is no fox"
    check_module.answer = None  # type: ignore[attr-defined]
    assert asked(strict, **fields)


def test_a_check_of_an_image_that_fails_refuses_this_request_alone(
    strict: LocalServer, check_module: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    check_module.answer = ValueError("secret")  # type: ignore[attr-defined]
    for _ in range(3):
        answer = strict.client.post("/sample", json={"prompt": FOX, "num_inference_steps": 2})
        assert problem(answer, 500)["detail"] == "the check of an image failed"
    check_module.answer = None  # type: ignore[attr-defined]
    assert asked(strict, prompt=FOX)
    assert strict.client.get("/health").status_code == 200
    assert "secret" not in caplog.text


def test_nothing_leaves_unchecked(strict: LocalServer) -> None:
    fields: Json = {"prompt": FOX, "num_inference_steps": 3, "seed": 1}
    answer = strict.client.post("/sample", json=fields, headers={"Accept": "application/x-npy"})
    assert "application/x-npy" not in problem(answer, 406)["detail"].partition(", and the request")[0]
    assert {event.name for event in watched(strict, {**fields, "preview_every": 1})} == {
        "queued",
        "progress",
        "image",
        "done",
    }
    noisy = {"image": asked(strict, **fields)}
    for output in ("model_output", "previous"):
        refusal = strict.client.post("/denoise", files=noisy, data={"timestep": 300, "output": output})
        assert problem(refusal, 422)["errors"][0]["loc"] == ["output"]
    assert strict.client.post("/denoise", files=noisy, data={"timestep": 300}).status_code == 200
