"""Prompts for people: the client, the command line and the operator's check.

Most tests ask a fake text model, whose tokens are letters: tests/texts.py. The slow ones ask a tiny Stable Diffusion.
The operator's check refuses one prompt, fails at another, and says of images what a test tells it to.
"""

import asyncio
import hashlib
import io
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PillowImage

from service.http.png import encode_png
from stepwise import AsyncClient, Client, ImageDone, Invalid, Queued, read_recipe
from stepwise.cli import exits
from tests.latents import serving_latents
from tests.local import FakeServer, LocalServer, serving_here
from tests.pipelines import write_pipeline
from tests.programs import done, refused, stepwise
from tests.servers import Json, problem, write_npy
from tests.test_events import watched
from tests.texts import serving_text

FOX, OX = "a fox", "an ox"
LONG = "a fox in the snow"
CUT = "the prompt has 17 tokens, and 6 fit: the last 11 were cut"
NOISY = np.zeros((1, 1, 2), np.float32)
CHECK = """
answer = None  # for images
seen = []

def check(*, prompt=None, negative_prompt=None, image=None):
    if prompt == "refused" or negative_prompt == "refused too":
        return "not on this server"
    if prompt == "secret that fails":
        raise ValueError(prompt)
    if image is not None:
        seen.append((image.mode, image.size))
        if isinstance(answer, Exception):
            raise answer
        return answer
"""
NAME = "checks_of_text_clients"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving_text() as running:
        yield running


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The module of the check. A test may set its `answer` for images."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / f"{NAME}.py").write_text(CHECK)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        __import__(NAME)
        yield sys.modules[NAME]


@pytest.fixture(scope="module")
def strict(check: ModuleType) -> Iterator[FakeServer]:
    """A server with the check."""
    with serving_text(check=f"{NAME}:check") as running:
        yield running


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.url, patience_s=0) as client:
        yield client


@pytest.fixture
def told(check: ModuleType) -> Iterator[ModuleType]:
    """As `check`. At the end of the test, its answer is None again."""
    yield check
    check.answer = None  # type: ignore[attr-defined]


def asked(server: LocalServer, **fields: object) -> bytes:
    answer = server.client.post("/sample", json={"num_inference_steps": 3, **fields})
    assert answer.status_code == 200, answer.text
    return answer.content


# The client


def test_a_prompt_is_in_the_recipe_of_its_image(client: Client) -> None:
    drawn = client.sample(prompt=FOX, negative_prompt=OX, seed=7, clip_skip=1)
    recipe = read_recipe(drawn.images[0].png)
    assert (recipe["prompt"], recipe["negative_prompt"], recipe["clip_skip"]) == (FOX, OX, 1)
    assert drawn.parameters["prompt"] == FOX
    assert drawn.warnings == ()
    several = client.sample(prompt=[FOX, OX], num_images=2)
    assert [read_recipe(image.png)["prompt"] for image in several.images] == [FOX, OX]
    clean = client.denoise(NOISY, 300, prompt=FOX, guidance_scale=3)
    assert read_recipe(clean.images[0].png)["prompt"] == FOX


def test_what_was_cut_is_told_by_every_method(client: Client, server: FakeServer) -> None:
    wanted: dict[str, Any] = {"prompt": LONG, "seed": 1}
    assert client.sample(**wanted).warnings == (CUT,)
    assert client.sample_array(**wanted).warnings == (CUT,)
    assert client.sample_picture(kind="jpeg", **wanted).warnings == (CUT,)
    assert client.denoise(NOISY, 300, prompt=LONG).warnings == (CUT,)
    first, *others = client.stream(**wanted)
    assert isinstance(first, Queued)
    assert first.warnings == (CUT,)
    assert any(isinstance(event, ImageDone) for event in others)
    two = (CUT, CUT.replace("prompt", "negative prompt"))
    assert client.sample_array(prompt=LONG, negative_prompt=LONG).warnings == two

    async def ask() -> None:
        async with AsyncClient(server.url) as client:
            assert (await client.sample(**wanted)).warnings == (CUT,)
            [first, *_] = [event async for event in client.stream(**wanted)]
            assert isinstance(first, Queued)
            assert first.warnings == (CUT,)

    asyncio.run(ask())


# The command line


def test_a_prompt_on_the_command_line(server: FakeServer, tmp_path: Path) -> None:
    options = ["--negative", OX, "--guidance-rescale", "0.5", "--clip-skip", "1", "-g", "5", "--steps", "3", "-s", "7"]
    assert done(stepwise(server, tmp_path, "sample", FOX, *options, "-o", "fox.png")) == "fox.png\n"
    wanted = {"negative_prompt": OX, "guidance_rescale": 0.5, "clip_skip": 1, "guidance_scale": 5}
    assert (tmp_path / "fox.png").read_bytes() == asked(server, prompt=FOX, seed=7, **wanted)
    assert done(stepwise(server, tmp_path, "verify", "fox.png")) == "fox.png: the same bytes\n"


def test_several_prompts_are_an_image_each(server: FakeServer, tmp_path: Path) -> None:
    options = ["-p", FOX, "-p", OX, "--steps", "3", "-s", "7", "-o", "two/"]
    assert done(stepwise(server, tmp_path, "sample", *options)) == "two/7.png\ntwo/8.png\n"
    assert (tmp_path / "two" / "8.png").read_bytes() == asked(server, prompt=OX, seed=8)
    line = refused(stepwise(server, tmp_path, "sample", FOX, *options), exits.UNUSABLE)
    assert line == "PROMPT and --prompt are the same: give one of them"


def test_a_prompt_without_quotes_is_refused_in_a_sentence(server: FakeServer, tmp_path: Path) -> None:
    line = refused(stepwise(server, tmp_path, "sample", "a", "fox", "--negative", OX), exits.UNUSABLE)
    assert line == 'a prompt of several words must be in quotes: stepwise sample "a fox in the snow"'


@pytest.mark.parametrize("name", ["fox.png", "fox.jpg", "fox.npy"])
def test_what_was_cut_is_said_on_standard_error(server: FakeServer, tmp_path: Path, name: str) -> None:
    ended = stepwise(server, tmp_path, "sample", LONG, "-o", name)
    assert (ended.returncode, ended.stdout.decode()) == (0, f"{name}\n")
    assert ended.stderr.decode() == f"stepwise: warning: {CUT}\n"


SHEETS: dict[str, Json] = {
    "one.png": {"prompt": FOX, "num_images": 2},
    "prompts.png": {"prompt": [FOX, OX, FOX], "num_images": 3},
    "negatives.png": {"prompt": FOX, "negative_prompt": [OX, None], "num_images": 2},
    "unguided.png": {"prompt": [FOX, OX], "guidance_scale": 0, "num_images": 2},
}


def test_sheets_of_texts_are_verified(server: FakeServer, tmp_path: Path) -> None:
    for name, fields in SHEETS.items():
        (tmp_path / name).write_bytes(asked(server, seed=5, **fields))
    printed = done(stepwise(server, tmp_path, "verify", *SHEETS))
    assert printed.splitlines() == [f"{name}: the same bytes" for name in SHEETS]
    command = ["sample", FOX, "--negative", OX, "--negative", "", "-s", "5", "--steps", "3", "--sheet"]
    done(stepwise(server, tmp_path, *command, "-o", "drawn.png"))
    expected = asked(server, prompt=FOX, negative_prompt=[OX, ""], num_images=2, seed=5)
    assert (tmp_path / "drawn.png").read_bytes() == expected
    command = ["sample", FOX, "-n", "2", "-g", "0", "-s", "5", "--steps", "3", "--sheet"]
    done(stepwise(server, tmp_path, *command, "-o", "none.png"))
    expected = asked(server, prompt=FOX, num_images=2, guidance_scale=0, seed=5)
    assert (tmp_path / "none.png").read_bytes() == expected


def test_a_secret_prompt_is_needed_to_verify(server: FakeServer, tmp_path: Path) -> None:
    with serving_text(recipe_prompts=False) as secretive:
        png = asked(secretive, prompt=FOX, negative_prompt=OX, seed=7)
        (tmp_path / "a.png").write_bytes(png)
        (tmp_path / "sheet.png").write_bytes(asked(secretive, **SHEETS["prompts.png"]))
        recipe = read_recipe(png)
        assert not {"prompt", "negative_prompt"} & recipe.keys()
        assert recipe["prompt_sha256"] == hashlib.sha256(FOX.encode()).hexdigest()
        for options, line in (
            ([], "its recipe has only the SHA-256 of the prompt: give it with --prompt"),
            (["--prompt", FOX], "its recipe has only the SHA-256 of the negative prompt: give it with --negative"),
            (["--prompt", OX, "--negative", OX], "--prompt is another prompt than that of its recipe"),
            (["--prompt", FOX, "--negative", ""], "--negative is another prompt than that of its recipe"),
        ):
            ended = stepwise(secretive, tmp_path, "verify", "a.png", *options)
            assert refused(ended, exits.UNUSABLE) == f"a.png: {line}"
        given = ["--prompt", FOX, "--negative", OX]
        assert done(stepwise(secretive, tmp_path, "verify", "a.png", *given)) == "a.png: the same bytes\n"
        line = refused(stepwise(secretive, tmp_path, "verify", "sheet.png", *given), exits.UNUSABLE)
        assert line == "sheet.png: its images have several prompts, and its recipe has only their SHA-256"
    ended = stepwise(server, tmp_path, "verify", "a.png", *given)
    assert ended.returncode == exits.DIFFERENT  # this server writes prompts
    assert ended.stdout.decode().rstrip().endswith("; the pixels are the same")


def test_info_tells_of_texts(server: FakeServer, tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in done(stepwise(server, tmp_path, "info")).splitlines()]
    assert "prompts 6 tokens fit, the rest is cut; at most 8192 bytes" in lines
    assert "text encoder 4 layers, 9 parameters" in lines
    assert "recommended ddim, 4 steps, guidance scale 3" in lines


# The operator's check


def test_a_refused_prompt_is_not_drawn(strict: FakeServer, tmp_path: Path) -> None:
    accepted = strict.metric("stepwise_accepted_total")
    several: list[Json] = [
        {"prompt": "refused"},
        {"prompt": [FOX, "refused"], "num_images": 2},
        {"negative_prompt": "refused too"},
        {"prompt": "[re]fu[sed|]", "emphasis": "original"},
        {"negative_prompt": "(re)fused [too::0.8]", "emphasis": "original"},
    ]
    for fields in several:
        for accept in ("image/png", "application/json", "text/event-stream"):
            answer = strict.client.post("/sample", json=fields, headers={"Accept": accept})
            assert problem(answer, 422)["detail"] == "the prompt is refused: not on this server"
    assert problem(strict.client.get("/sample?prompt=refused"), 422)["detail"].startswith("the prompt is refused")
    with Client(strict.url) as client:
        with pytest.raises(Invalid, match="the prompt is refused: not on this server"):
            client.sample(prompt="refused")
        with pytest.raises(Invalid, match="the prompt is refused"):
            client.denoise(NOISY, 300, prompt="refused")
    line = refused(stepwise(strict, tmp_path, "sample", "refused", "-o", "a.png"), exits.UNUSABLE)
    assert line.startswith("the prompt is refused: not on this server")
    assert strict.metric("stepwise_accepted_total") == accepted


def test_a_check_that_fails_refuses_and_tells_no_log_the_prompt(
    strict: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    failed = strict.metric("stepwise_checks_total", outcome="failed")
    with caplog.at_level(logging.DEBUG):
        answer = strict.client.post("/sample", json={"prompt": "secret that fails"})
    assert problem(answer, 500)["detail"] == "the check of a prompt failed"
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text
    assert strict.metric("stepwise_checks_total", outcome="failed") == failed + 1


def test_a_refused_image_is_not_sent(strict: FakeServer, told: ModuleType) -> None:
    told.answer = "it is no fox"  # type: ignore[attr-defined]
    refusals = strict.metric("stepwise_checks_total", outcome="refused")
    types = ("image/png", "image/webp", "application/json", "application/zip", "application/x-npy")
    for accept in types:
        answer = strict.client.post("/sample", json={"prompt": FOX}, headers={"Accept": accept})
        assert problem(answer, 422)["detail"] == "the image is refused: it is no fox"
    assert strict.metric("stepwise_checks_total", outcome="refused") == refusals + len(types)
    last = watched(strict, {"prompt": FOX})[-1]
    assert (last.name, last.data["status"]) == ("error", 422)
    assert last.data["detail"] == "the image is refused: it is no fox"
    told.answer = None  # type: ignore[attr-defined]
    assert asked(strict, prompt=FOX)


def test_a_check_of_an_image_that_fails_refuses_this_request_alone(
    strict: FakeServer, told: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    told.answer = ValueError("secret")  # type: ignore[attr-defined]
    for _ in range(3):
        answer = strict.client.post("/sample", json={"prompt": FOX})
        assert problem(answer, 500)["detail"] == "the check of an image failed"
    told.answer = None  # type: ignore[attr-defined]
    assert asked(strict, prompt=FOX)
    assert strict.client.get("/health").status_code == 200
    assert "secret" not in caplog.text


def test_nothing_leaves_unchecked(strict: FakeServer) -> None:
    events = {event.name for event in watched(strict, {"prompt": FOX, "preview_every": 1})}
    assert events == {"queued", "progress", "image", "done"}
    sent = {"image": write_npy(NOISY)}
    for output in ("model_output", "previous"):
        refusal = strict.client.post("/denoise", files=sent, data={"timestep": "300", "output": output})
        assert problem(refusal, 422)["errors"][0]["loc"] == ["output"]
    assert strict.client.post("/denoise", files=sent, data={"timestep": "300"}).status_code == 200


EVENTS = "text/event-stream"
ACCEPTED = ("image/png", "image/webp", "image/jpeg", "application/json", "application/zip", "application/x-npy", EVENTS)


def all_answers(server: LocalServer, uploads: Mapping[str, bytes]) -> Iterator[tuple[str, httpx.Response]]:
    """The answers to requests of each kind, each with its name."""
    fields = {"num_inference_steps": 2, "seed": 1}
    for accept, images in product(ACCEPTED, (1, 2)):
        given, headers = {**fields, "num_images": images}, {"Accept": accept}
        yield (
            f"POST {given} {accept}",
            server.client.post("/sample", json={**given, "preview_every": 1}, headers=headers),
        )
        yield f"GET {given} {accept}", server.client.get("/sample", params=given, headers=headers)
    outputs = [("/denoise", output) for output in ("x0", "model_output", "previous")]
    for accept, (kind, upload), (path, output) in product(ACCEPTED, uploads.items(), [*outputs, ("/noise", None)]):
        form = {"timestep": "0"} | ({} if output is None else {"output": output})
        answer = server.client.post(path, data=form, files={"image": upload}, headers={"Accept": accept})
        yield f"{path} {output} of {kind} as {accept}", answer


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_what_a_check_refuses_leaves_by_no_way(strict: FakeServer, told: ModuleType, kind: str) -> None:
    """Only an upload of the client's own may come back as latents, from /noise."""
    told.answer = "no"  # type: ignore[attr-defined]
    with ExitStack() as stack:
        server: LocalServer = strict
        uploads = {"a picture": encode_png(np.zeros((1, 1, 2), np.float32), {}), "an array": write_npy(NOISY)}
        if kind == "latents":
            server = stack.enter_context(serving_latents(check=f"{NAME}:check"))
            uploads = {"a picture": encode_png(np.zeros((3, 2, 4), np.float32), {}), "latents": write_npy(NOISY)}
        ways = list(all_answers(server, uploads))
    refused = 0
    for way, answer in ways:
        if way.startswith("/noise") and way.endswith("npy") and kind == "latents":
            continue
        assert "b64_json" not in answer.text, way
        if answer.headers["content-type"].startswith(EVENTS):
            assert "the image is refused: no" in answer.text, way
        else:
            assert answer.status_code in (406, 422), way
        refused += "the image is refused: no" in answer.text
    assert refused > 30


# A tiny Stable Diffusion


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("weights") / "foxes")


@pytest.mark.slow
def test_a_prompt_decides_the_image(pipeline: Path, tmp_path: Path) -> None:
    with serving_here(weights=str(pipeline), max_batch=4) as server, Client(server.url) as client:
        options: list[dict[str, Any]] = [
            {},
            {"prompt": FOX},
            {"prompt": FOX, "negative_prompt": OX},
            {"prompt": FOX, "negative_prompt": OX, "clip_skip": 1},
            {"prompt": FOX, "negative_prompt": OX, "guidance_rescale": 0.7},
        ]
        pngs = [client.sample(seed=7, num_inference_steps=3, **one).images[0].png for one in options]
        assert len(set(pngs)) == len(options)
        for i, png in enumerate(pngs):
            (tmp_path / f"{i}.png").write_bytes(png)
        (tmp_path / "sheet.png").write_bytes(asked(server, seed=5, **SHEETS["negatives.png"]))
        names = [path.name for path in sorted(tmp_path.iterdir())]
        printed = done(stepwise(server, tmp_path, "verify", *names))
        assert printed.splitlines() == [f"{name}: the same bytes" for name in names]
        noisy = client.noise_array(client.sample_array(prompt=FOX, seed=3, num_inference_steps=2).array, 300, seed=1)
        clean, other = (client.denoise(noisy.array, 300, prompt=prompt, seed=1).images[0] for prompt in (FOX, OX))
        assert clean.png != other.png


@pytest.mark.slow
def test_images_of_latents_are_checked_and_latents_are_not_answered(
    pipeline: Path, check: ModuleType, told: ModuleType
) -> None:
    with serving_here(weights=str(pipeline), check=f"{NAME}:check") as server:
        check.seen.clear()
        png = asked(server, prompt=FOX, seed=7)
        assert check.seen == [("RGB", (64, 64))]
        with PillowImage.open(io.BytesIO(png)) as image:
            assert image.size == (64, 64)
        answer = server.client.post("/sample", json={"prompt": FOX}, headers={"Accept": "application/x-npy"})
        offered, _, _ = problem(answer, 406)["detail"].partition(", and the request")
        assert "application/x-npy" not in offered
        answer = server.client.post("/denoise", files={"image": png}, data={"timestep": "300", "prompt": "refused"})
        assert problem(answer, 422)["detail"] == "the prompt is refused: not on this server"
        told.answer = "it is no fox"  # type: ignore[attr-defined]
        answer = server.client.post("/sample", json={"prompt": FOX, "num_inference_steps": 2})
        assert problem(answer, 422)["detail"] == "the image is refused: it is no fox"
