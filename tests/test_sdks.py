"""The libraries that people's programs draw with, unchanged: OpenAI's SDKs for Python and JavaScript, and webuiapi."""

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import webuiapi
from openai import AsyncOpenAI, OpenAI
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImageGenPartialImageEvent,
)
from PIL import Image, ImageOps

from tests.local import serving_fake
from tests.servers import (
    PATIENCE,
    ROOT,
    START,
    Json,
    Reachable,
    ServerProcess,
    eventually,
    needs,
)
from tests.test_pictures import RGB, file

pytestmark = pytest.mark.slow

PROMPTS = {"digits": "a 7", "text": "a fox in the snow"}
FEW: Json = {"seed": 7, "num_inference_steps": 4}  # what the SDKs do not know goes through `extra_body`
MODEL = "any-model"

each_model = pytest.mark.parametrize("weights", PROMPTS)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")  # the libraries would ask proxies of the environment for this machine


def sdk(server: Reachable, key: str = "none", **settings: Any) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=PATIENCE, **settings)


def sampled(server: Reachable, weights: str, seed: int, **more: Any) -> bytes:
    """The PNG that /sample draws."""
    told = {"prompt": PROMPTS["text"]} if weights == "text" else {"class_label": "7"}
    answer = server.client.post("/sample", json={**FEW, **told, "seed": seed, **more})
    assert answer.status_code == 200, answer.text
    return answer.content


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decoded(text: str | None) -> bytes:
    assert text is not None
    return base64.b64decode(text, validate=True)


# OpenAI's Python SDK.


@each_model
def test_the_sdk_finds_the_model_and_draws_the_bytes_of_sample(
    digits_and_text: dict[str, ServerProcess], weights: str
) -> None:
    server = digits_and_text[weights]
    with sdk(server) as client:
        [model] = client.models.list()
        assert client.models.retrieve(model.id) == model
        drawn = client.images.generate(model=model.id, prompt=PROMPTS[weights], n=3, extra_body=FEW)
    assert drawn.data is not None
    assert [(image.model_extra or {})["seed"] for image in drawn.data] == [7, 8, 9]
    assert [decoded(image.b64_json) for image in drawn.data] == [sampled(server, weights, 7 + i) for i in range(3)]
    assert drawn.output_format == "png"
    assert drawn.size == ("32x32" if weights == "digits" else "64x64")
    assert drawn.usage is not None
    assert drawn.usage.total_tokens == drawn.usage.input_tokens + drawn.usage.output_tokens


@each_model
def test_links_lead_to_the_same_bytes(digits_and_text: dict[str, ServerProcess], weights: str) -> None:
    with sdk(digits_and_text[weights]) as client:
        drawn = client.images.generate(prompt=PROMPTS[weights], n=2, response_format="url", extra_body=FEW)
    assert drawn.data is not None
    for i, image in enumerate(drawn.data):
        assert image.url is not None
        assert image.b64_json is None
        assert httpx.get(image.url, trust_env=False).content == sampled(digits_and_text[weights], weights, 7 + i)


@each_model
def test_a_raw_response_says_what_was_ignored(digits_and_text: dict[str, ServerProcess], weights: str) -> None:
    with sdk(digits_and_text[weights]) as client:
        raw = client.images.with_raw_response.generate(
            model=MODEL, prompt=PROMPTS[weights], quality="high", user="somebody", moderation="low", extra_body=FEW
        )
    ignored = raw.headers["x-ignored-fields"].split(", ")
    assert sorted(ignored) == ["model", "moderation", "quality", "user"]
    assert raw.headers["x-request-id"]
    assert raw.headers["server-timing"]
    assert raw.parse().data


@each_model
def test_a_stream_gives_partial_images_and_then_the_bytes(
    digits_and_text: dict[str, ServerProcess], weights: str
) -> None:
    with sdk(digits_and_text[weights]) as client:
        asked = client.images.generate(
            prompt=PROMPTS[weights], n=2, stream=True, partial_images=2, size="1024x1024", extra_body=FEW
        )
        events = list(asked)
    rough = [event for event in events if isinstance(event, ImageGenPartialImageEvent)]
    completed = {(event.model_extra or {})["seed"]: event for event in events if event not in rough}
    assert all(isinstance(event, ImageGenCompletedEvent) for event in completed.values())
    assert {seed: decoded(event.b64_json) for seed, event in completed.items()} == {
        seed: sampled(digits_and_text[weights], weights, seed) for seed in (7, 8)
    }
    for event in completed.values():
        assert event.output_format == "png"
        assert isinstance(event, ImageGenCompletedEvent)
        assert event.usage.total_tokens >= 0
    for event in rough:  # fewer than asked for where the server is quicker than the reader
        assert event.partial_image_index in (0, 1)
        assert decoded(event.b64_json).startswith(b"\x89PNG")


def test_partial_images_come_while_the_rest_is_drawn() -> None:
    with serving_fake() as server, ThreadPoolExecutor() as pool, sdk(server) as client:
        server.runner.hold()
        events: list[Any] = []

        def read() -> None:
            body = {"seed": 1, "num_inference_steps": 6}
            for event in client.images.generate(prompt="one", stream=True, partial_images=2, extra_body=body):
                events.append(event)

        def has(count: int) -> bool | None:
            return len(events) >= count or None

        reading = pool.submit(read)
        server.wait_for_metric("stepwise_rows_running", lambda rows: rows == 1)
        for wanted in (0, 0, 1, 1, 2):  # the estimate of a step is told during the next one
            server.runner.next_pass()
            eventually(partial(has, wanted))
        assert [event.partial_image_index for event in events] == [0, 1]
        server.runner.let_go()
        reading.result(PATIENCE)
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]


@each_model
def test_the_asynchronous_sdk_draws_side_by_side(digits_and_text: dict[str, ServerProcess], weights: str) -> None:
    server = digits_and_text[weights]

    async def draw() -> list[bytes]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=PATIENCE) as client:

            async def one(seed: int) -> bytes:
                body = {**FEW, "seed": seed}
                if seed % 2:
                    drawn = await client.images.generate(prompt=PROMPTS[weights], extra_body=body)
                    assert drawn.data
                    return decoded(drawn.data[0].b64_json)
                stream = await client.images.generate(prompt=PROMPTS[weights], stream=True, extra_body=body)
                [event] = [event async for event in stream]
                return decoded(event.b64_json)

            return list(await asyncio.gather(*map(one, range(12))))

    assert asyncio.run(draw()) == [sampled(server, weights, seed) for seed in range(12)]


def test_errors_are_the_exceptions_of_the_sdk(digits_and_text: dict[str, ServerProcess]) -> None:
    with sdk(digits_and_text["digits"]) as client:
        with pytest.raises(openai.UnprocessableEntityError, match="must name one class") as refused:
            client.images.generate(prompt="a fox")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("no-such-model")
    error = refused.value
    assert (error.param, error.type) == ("prompt", "invalid_request_error")
    assert error.request_id


def test_keys_and_errors_after_acceptance_are_exceptions_too(strict_server: ServerProcess) -> None:
    with sdk(strict_server) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with sdk(strict_server, "alpha", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError):
            client.images.generate(prompt="a dog")  # its values are not finite
        with pytest.raises(openai.APIError, match="finite"):
            list(client.images.generate(prompt="a dog", stream=True))


@each_model
def test_the_sdk_edits(digits_and_text: dict[str, ServerProcess], weights: str) -> None:
    server = digits_and_text[weights]
    photo = ("photo.png", file(RGB.resize((64, 64))))
    half = Image.new("L", (64, 64))
    half.paste(255, (32, 0, 64, 64))
    clear = Image.new("RGBA", half.size)
    clear.putalpha(ImageOps.invert(half))
    sent = {"image": encoded(photo[1]), "mask_image": encoded(file(half))}
    with sdk(server) as client:
        drawn = client.images.edit(
            image=photo,
            prompt=PROMPTS[weights],
            n=2,
            size="64x64",
            input_fidelity="high",
            extra_body={**FEW, "strength": 0.5, "guidance_interval": [0, 0.5]},
        )
        assert drawn.data is not None
        for seed, image in enumerate(drawn.data, 7):
            more = {"image": sent["image"], "strength": 0.5, "guidance_interval": [0, 0.5]}
            assert decoded(image.b64_json) == sampled(server, weights, seed, **more)
        stream = client.images.edit(
            image=[photo],
            mask=("mask.png", file(clear)),
            prompt=PROMPTS[weights],
            stream=True,
            partial_images=2,
            extra_body=FEW,
        )
        *rough, completed = list(stream)
        assert all(isinstance(event, ImageEditPartialImageEvent) for event in rough)
        assert isinstance(completed, ImageEditCompletedEvent)
        assert decoded(completed.b64_json) == sampled(server, weights, 7, **sent)
        with pytest.raises(openai.BadRequestError, match="must be one image, and 2 came"):
            client.images.edit(image=[photo, photo], prompt=PROMPTS[weights])


def test_the_sdk_comes_again_to_a_server_that_is_full() -> None:
    """Once: its first request finds the only place of the queue taken."""
    statuses: list[int] = []
    with serving_fake(max_queue=1) as server, ThreadPoolExecutor() as pool:
        server.runner.hold()
        first = pool.submit(server.client.post, "/sample", json={"num_inference_steps": 2})
        server.wait_for_metric("stepwise_rows_running", lambda rows: rows == 1)

        def answered(response: Any) -> None:
            statuses.append(response.status_code)
            if response.status_code != 200:
                server.runner.let_go()
                assert first.result(PATIENCE).status_code == 200

        hooks = openai.DefaultHttpxClient(trust_env=False, event_hooks={"response": [answered]})
        with sdk(server, http_client=hooks) as client:
            drawn = client.images.generate(prompt="one", extra_body={"seed": 7, "num_inference_steps": 2})
    assert drawn.data
    assert len(statuses) == 2
    assert statuses[0] in (429, 503)
    assert statuses[1] == 200


# OpenAI's JavaScript SDK.


@pytest.fixture(scope="module")
def javascript(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the SDK, as its lock file says. At the end its 20 MB are removed."""
    known = subprocess.run(
        ["npm", "view", "openai", "version"], capture_output=True, text=True, timeout=START, check=False
    )
    if known.returncode != 0:
        pytest.skip(f"npm's registry cannot be reached: {' '.join(known.stderr.split())}")
    folder = tmp_path_factory.mktemp("javascript") / "sdk"
    shutil.copytree(ROOT / "tests" / "javascript", folder)
    subprocess.run(
        ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True, timeout=START
    )
    yield folder
    shutil.rmtree(folder)


@needs("npm")
@needs("node")
@each_model
def test_the_javascript_sdk(digits_and_text: dict[str, ServerProcess], weights: str, javascript: Path) -> None:
    server = digits_and_text[weights]
    command = ["node", "images.mjs", f"{server.url}/v1", "none", MODEL, PROMPTS[weights]]
    ran = subprocess.run(command, cwd=javascript, capture_output=True, text=True, timeout=START, check=False)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)

    assert said["models"] == [said["retrieved"]]
    drawn = said["drawn"]
    assert [image["seed"] for image in drawn["data"]] == [7, 8]
    assert [decoded(image["b64_json"]) for image in drawn["data"]] == [sampled(server, weights, 7 + i) for i in (0, 1)]
    assert sorted(said["ignored"].split(", ")) == ["model", "quality", "user"]
    assert said["request_id"]

    *rough, completed = said["events"]
    assert {event["type"] for event in rough} <= {"image_generation.partial_image"}
    assert [event["partial_image_index"] for event in rough] == list(range(len(rough)))
    assert completed["type"] == "image_generation.completed"
    assert decoded(completed["b64_json"]) == sampled(server, weights, 7)
    assert [decoded(image["b64_json"]) for image in said["crowd"]] == [
        sampled(server, weights, 20 + i) for i in range(6)
    ]

    edit, *streamed = said["edits"]
    begun = {"image": drawn["data"][0]["b64_json"], "strength": 0.5}
    assert [decoded(one["b64_json"]) for one in edit["data"]] == [
        sampled(server, weights, 7 + i, **begun) for i in (0, 1)
    ]
    assert {event["type"] for event in streamed[:-1]} <= {"image_edit.partial_image"}
    assert streamed[-1]["type"] == "image_edit.completed"
    assert streamed[-1]["b64_json"] == edit["data"][0]["b64_json"]

    refused, unknown, several = said["refused"], said["unknown"], said["several"]
    assert (refused["name"], refused["status"]) == ("UnprocessableEntityError", 422)
    assert (refused["param"], refused["type"]) == ("num_inference_steps", "invalid_request_error")
    assert refused["message"].startswith("422 num_inference_steps")
    assert refused["requestID"]
    assert (unknown["name"], unknown["status"]) == ("NotFoundError", 404)
    assert (several["name"], several["status"], several["param"]) == ("BadRequestError", 400, "image")


# webuiapi.


def webui(server: Reachable, **settings: Any) -> Any:
    host, port = server.address
    return webuiapi.WebUIApi(host=host, port=port, **settings)


def test_webuiapi_reads_what_there_is(digits_and_text: dict[str, ServerProcess]) -> None:
    api = webui(digits_and_text["text"])
    [name] = api.util_get_model_names()
    assert api.util_get_current_model() == name
    api.util_set_model(name)
    assert "DPM++ 2M" in api.util_get_sampler_names()
    assert "automatic" in api.util_get_scheduler_names()
    assert api.get_options()["sd_model_checkpoint"] == name
    for nothing in (api.get_upscalers, api.get_latent_upscale_modes, api.get_sd_vae, api.get_loras):
        assert nothing() == []
    api.util_wait_for_ready()
    assert api.get_progress()["progress"] == 0
    api.interrupt()


@each_model
def test_webuiapi_draws(digits_and_text: dict[str, ServerProcess], weights: str) -> None:
    server = digits_and_text[weights]
    api = webui(server)
    result = api.txt2img(
        prompt=PROMPTS[weights],
        seed=7,
        steps=4,
        cfg_scale=2.5,
        sampler_name="DPM++ 2M",
        batch_size=2,
        n_iter=2,
        width=64,
        height=64,
    )
    assert result.info["seed"] == 7
    assert result.info["all_seeds"] == [7, 8, 9, 10]
    assert result.parameters["prompt"] == PROMPTS[weights]
    assert [image.size for image in result.images] == [(result.info["width"], result.info["height"])] * 4
    told = {"sampler": "dpmpp_2m", "guidance_scale": 2.5}
    assert [decoded(image) for image in result.json["images"]] == [
        sampled(server, weights, 7 + i, **told) for i in range(4)
    ]


@each_model
def test_webuiapi_draws_into_a_part_of_an_image(digits_and_text: dict[str, ServerProcess], weights: str) -> None:
    server = digits_and_text[weights]
    photo, half = RGB.resize((64, 64)), Image.new("L", (64, 64))
    half.paste(255, (32, 0, 64, 64))
    result = webui(server).img2img(
        images=[photo],
        mask_image=half,
        prompt=PROMPTS[weights],
        seed=7,
        steps=6,
        cfg_scale=2.5,
        denoising_strength=0.5,
        sampler_name="DPM++ 2M",
        batch_size=2,
        width=64,
        height=64,
    )
    assert result.info["denoising_strength"] == 0.5
    assert result.info["all_seeds"] == [7, 8]
    in_a_mask = ["mask_blur", "inpainting_fill", "inpaint_full_res"]
    assert sorted(result.info["ignored"]) == sorted(["image_cfg_scale", *in_a_mask])
    told = {"sampler": "dpmpp_2m", "guidance_scale": 2.5, "num_inference_steps": 6, "strength": 0.5}
    sent = {"image": encoded(file(photo)), "mask_image": encoded(file(half)), "paste_original": True}
    assert [decoded(image) for image in result.json["images"]] == [
        sampled(server, weights, 7 + i, **told, **sent) for i in (0, 1)
    ]
    again = webui(server).img2img(images=[photo], prompt=PROMPTS[weights])
    same = webui(server).img2img(images=[photo], prompt=PROMPTS[weights], seed=again.info["seed"])
    assert same.json["images"] == again.json["images"]


def test_webuiapi_tells_a_seed_that_draws_the_same_again(digits_and_text: dict[str, ServerProcess]) -> None:
    api = webui(digits_and_text["text"])
    first = api.txt2img(prompt="a ((fox)) in the (snow:1.3)", width=96, height=64)
    again = api.txt2img(prompt="a ((fox)) in the (snow:1.3)", width=96, height=64, seed=first.info["seed"])
    assert first.json["images"] == again.json["images"]
    plain = api.txt2img(prompt="a fox in the snow", width=96, height=64, seed=first.info["seed"])
    assert plain.json["images"] != first.json["images"]


def test_webuiapi_raises_what_the_server_says(strict_server: ServerProcess) -> None:
    with pytest.raises(RuntimeError) as without:
        webui(strict_server).txt2img(prompt="a cat")
    assert without.value.args[0] == 401
    api = webui(strict_server, username="anyone", password="alpha")
    assert api.txt2img(prompt="a cat").images
    with pytest.raises(RuntimeError) as refused:
        api.txt2img(prompt="a horse")
    status, text = refused.value.args
    assert status == 422
    assert "must name one class" in text
