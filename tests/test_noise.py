"""POST /noise on a running server."""

import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor

import cv2
import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.latents import LatentServer, decoded, encoded, serving_latents
from tests.local import serving_fake
from tests.servers import Float32, Json, Reachable, ServerProcess, invalid, problem, read_npy, write_npy
from tests.test_denoise import ALPHA_BAR as FAKE_ALPHA_BAR
from tests.test_denoise import LATENTS, PIXELS, VALUES, calls, png, upload

NPY = "application/x-npy"
ALPHA_BAR = np.cumprod(1 - np.linspace(0.01, 0.3, 20))  # the rgb model's

CLEAN = np.tanh(np.random.default_rng(0).normal(0, 1, (3, 8, 16))).astype(np.float32)
GREY = np.tanh(np.random.default_rng(0).normal(0, 1, (1, 16, 16))).astype(np.float32)


def post(server: Reachable, image: bytes, accept: str = "*/*", **fields: object) -> httpx.Response:
    return server.client.post(
        "/noise",
        files={"image": ("image", image)},
        data={name: str(value) for name, value in fields.items()},
        headers={"Accept": accept},
    )


def noise(server: Reachable, image: Float32, **fields: object) -> Float32:
    """The answer as an array, without rounding."""
    response = post(server, write_npy(image), NPY, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NPY
    return read_npy(response.content)


def unit_noise(seed: int, shape: tuple[int, int, int]) -> Float32:
    drawn: Float32 = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed)).numpy()[0]
    return drawn


def read_png16(data: bytes) -> NDArray[np.float64]:
    """A 16-bit PNG as [C, H, W], 0 … 65535 mapped to −1 … 1."""
    depth, colour = data[24], data[25]
    assert (depth, colour) in ((16, 0), (16, 2))
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    assert pixels.dtype == np.uint16
    channels = pixels[None] if pixels.ndim == 2 else pixels[:, :, ::-1].transpose(2, 0, 1)
    return channels / 65535 * 2 - 1


@pytest.mark.parametrize("t", [0, 7, 19])
@pytest.mark.parametrize("seed", [0, 2**53 - 1])
def test_variance_preserving_noise(rgb_server: ServerProcess, t: int, seed: int) -> None:
    expected = np.sqrt(ALPHA_BAR[t]) * CLEAN + np.sqrt(1 - ALPHA_BAR[t]) * unit_noise(seed, CLEAN.shape)
    came = noise(rgb_server, CLEAN, timestep=t, seed=seed)
    np.testing.assert_allclose(came, expected, atol=1e-6)
    np.testing.assert_array_equal(noise(rgb_server, CLEAN, timestep=t, seed=seed, scaling="variance_preserving"), came)


@pytest.mark.parametrize("t", [0, 7, 19])
def test_additive_noise(rgb_server: ServerProcess, t: int) -> None:
    sigma = np.sqrt((1 - ALPHA_BAR[t]) / ALPHA_BAR[t])
    came = noise(rgb_server, CLEAN, timestep=t, seed=3, scaling="additive")
    np.testing.assert_allclose(came, CLEAN + sigma * unit_noise(3, CLEAN.shape), rtol=1e-6, atol=1e-6)
    preserving = noise(rgb_server, CLEAN, timestep=t, seed=3)
    np.testing.assert_allclose(came * np.sqrt(ALPHA_BAR[t]), preserving, atol=1e-6)


def test_a_seed_is_drawn_where_none_is_given(rgb_server: ServerProcess) -> None:
    first, second = (post(rgb_server, write_npy(CLEAN), NPY, timestep=9) for _ in range(2))
    assert first.content != second.content
    again = post(rgb_server, write_npy(CLEAN), NPY, timestep=9, seed=int(first.headers["x-seed"]))
    assert again.content == first.content
    assert again.headers["x-seed"] == first.headers["x-seed"]


@pytest.mark.parametrize("value_range", [1, 2.5, 16])
@pytest.mark.parametrize("model", ["grey", "rgb"])
def test_the_png_is_the_array_within_half_a_step(
    server: ServerProcess, rgb_server: ServerProcess, model: str, value_range: float
) -> None:
    where, clean, t = (server, GREY, 400) if model == "grey" else (rgb_server, CLEAN, 12)
    exact = noise(where, clean, timestep=t, seed=4)
    response = post(where, write_npy(clean), timestep=t, seed=4, value_range=value_range)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    read = read_png16(response.content) * value_range
    half_a_step = value_range / 65535
    np.testing.assert_allclose(read, exact.clip(-value_range, value_range), atol=half_a_step * 1.001)
    clipped = np.mean(np.abs(exact) > value_range)
    assert float(response.headers["x-clipped"]) == pytest.approx(clipped, abs=1e-6)
    assert (clipped > 0.01) == (value_range == 1)


def test_the_png_goes_on_to_denoise(server: ServerProcess) -> None:
    """Without clipping, a 16-bit PNG is as exact as an array."""

    def estimate(image: bytes, value_range: int) -> Float32:
        response = server.client.post(
            "/denoise",
            files={"image": image},
            data={"timestep": "300", "value_range": str(value_range)},
            headers={"Accept": NPY},
        )
        return read_npy(response.content)

    clipped, wide = (
        post(server, write_npy(GREY), timestep=300, seed=1, value_range=value_range) for value_range in (1, 4)
    )
    exact = post(server, write_npy(GREY), NPY, timestep=300, seed=1)
    assert wide.headers["x-clipped"] == "0"
    np.testing.assert_allclose(estimate(wide.content, 4), estimate(exact.content, 1), atol=1e-3)
    assert np.abs(estimate(clipped.content, 1) - estimate(exact.content, 1)).max() > 0.01


def test_a_clean_png_has_the_clean_range_whatever_the_answers_is(rgb_server: ServerProcess) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (8, 16, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    values = (pixels.transpose(2, 0, 1) / 255 * 2 - 1).astype(np.float32)
    by_png = post(rgb_server, file.getvalue(), NPY, timestep=5, seed=1, value_range=3)
    np.testing.assert_allclose(read_npy(by_png.content), noise(rgb_server, values, timestep=5, seed=1), atol=1e-6)


def test_json_and_forms_are_one_request(rgb_server: ServerProcess) -> None:
    fields: Json = {"timestep": 5, "seed": 1, "value_range": 3, "scaling": "additive"}
    by_form = post(rgb_server, write_npy(CLEAN), **fields)
    body = {"image": base64.b64encode(write_npy(CLEAN)).decode(), **fields}
    by_json = rgb_server.client.post("/noise", json=body)
    assert by_json.content == by_form.content
    assert by_json.headers["x-clipped"] == by_form.headers["x-clipped"]


def test_the_answer_is_not_kept_and_costs_no_pass(rgb_server: ServerProcess) -> None:
    passes = rgb_server.metric("stepwise_step_seconds_count")
    response = post(rgb_server, write_npy(CLEAN), timestep=5, seed=1)
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["vary"] == "Accept"
    assert rgb_server.metric("stepwise_step_seconds_count") == passes


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [("", "image/png"), ("*/*", "image/png"), ("image/*", "image/png"), (NPY, NPY), (f"image/png;q=0.5, {NPY}", NPY)],
)
def test_accept_chooses_the_answer(rgb_server: ServerProcess, accept: str, media_type: str) -> None:
    response = post(rgb_server, write_npy(CLEAN), accept, timestep=5)
    assert response.headers["content-type"] == media_type
    assert ("x-clipped" in response.headers) == (media_type == "image/png")


@pytest.mark.parametrize("accept", ["application/json", "application/zip", "text/html", "image/png;q=0"])
def test_anything_else_is_406(rgb_server: ServerProcess, accept: str) -> None:
    problem(post(rgb_server, write_npy(CLEAN), accept, timestep=5), 406)


@pytest.mark.parametrize(
    ("fields", "field", "named"),
    [
        ({}, "timestep", "is required"),
        ({"timestep": -1}, "timestep", "0 to 19, and is -1"),
        ({"timestep": 20}, "timestep", "0 to 19, and is 20"),
        ({"timestep": 1.5}, "timestep", "and is 1.5"),
        ({"timestep": 5, "seed": -1}, "seed", f"0 to {2**53 - 1}, and is -1"),
        ({"timestep": 5, "value_range": 0}, "value_range", "1 to 16, and is 0"),
        ({"timestep": 5, "value_range": 17}, "value_range", "1 to 16, and is 17"),
        ({"timestep": 5, "scaling": "linear"}, "scaling", "'variance_preserving' or 'additive', and is \"linear\""),
        ({"timestep": 5, "sampler": "ddim"}, "sampler", "there is no such field"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(rgb_server: ServerProcess, fields: Json, field: str, named: str) -> None:
    assert named in invalid(post(rgb_server, write_npy(CLEAN), **fields), field)
    body = {"image": base64.b64encode(write_npy(CLEAN)).decode(), **fields}
    assert named in invalid(rgb_server.client.post("/noise", json=body), field)


def test_bad_images_are_refused(rgb_server: ServerProcess) -> None:
    for data in (b"", b"hello", write_npy(GREY), write_npy(np.full_like(CLEAN, np.nan)), write_npy(CLEAN)[:-1]):
        invalid(post(rgb_server, data, timestep=5), "image")
    invalid(rgb_server.client.post("/noise", json={"timestep": 5}), "image")
    problem(rgb_server.client.post("/noise", content=b"x", headers={"Content-Type": "image/png"}), 415)


# Latent models: PNGs are pixels, arrays are latents.


def noisy_latents(clean: Float32, t: int, seed: int) -> Float32:
    """The formula with the fake server's noise, which equals the seed everywhere."""
    signal, sigma = np.sqrt(FAKE_ALPHA_BAR[t]), np.sqrt(1 - FAKE_ALPHA_BAR[t])
    noisy: Float32 = (signal * clean + sigma * seed).astype(np.float32)
    return noisy


def test_latents_come_back_noisy(latents: LatentServer) -> None:
    np.testing.assert_allclose(noise(latents, LATENTS, timestep=300, seed=2), noisy_latents(LATENTS, 300, 2), rtol=1e-5)
    assert calls(latents) == []
    response = post(latents, png(PIXELS), NPY, timestep=300, seed=2, value_range=3)
    expected = noisy_latents(encoded(VALUES), 300, 2)
    np.testing.assert_allclose(read_npy(response.content), expected, atol=1e-5)
    assert calls(latents) == ["encode"]


@pytest.mark.parametrize("value_range", [1, 2])
def test_a_png_shows_the_noisy_latents(latents: LatentServer, value_range: int) -> None:
    """The seed is too large for one image, but allowed for two."""
    for image, clean, asked in (
        (png(PIXELS), encoded(VALUES), ["encode", "decode"]),
        (write_npy(LATENTS), LATENTS, ["decode"]),
    ):
        latents.vae.calls.clear()
        response = post(latents, image, timestep=900, seed=20, value_range=value_range)
        shown = decoded(noisy_latents(clean, 900, 20))
        read = read_png16(response.content) * value_range
        np.testing.assert_allclose(read, shown.clip(-value_range, value_range), atol=value_range / 65535 * 1.1)
        assert float(response.headers["x-clipped"]) == (value_range == 1)
        assert calls(latents) == asked


def test_what_is_refused_is_not_encoded(latents: LatentServer) -> None:
    invalid(post(latents, png(PIXELS), timestep=1000), "timestep")
    said = invalid(post(latents, write_npy(VALUES), timestep=5), "image")
    assert said == "must be an .npy of float32 latents [1, 1, 2], and is float32 [3, 2, 4]"
    said = invalid(post(latents, png(PIXELS[:1]), timestep=5), "image")
    assert said == "must be 4x2 pixels (width x height), and is 4x1"
    assert calls(latents) == []


@pytest.mark.parametrize("stage", ["encode", "decode"])
def test_nothing_is_done_for_a_client_that_has_left(latents: LatentServer, stage: str) -> None:
    left = latents.metric("stepwise_requests_total", endpoint="/noise", code="499")
    latents.vae.hold()
    with upload(latents, "/noise"):
        while latents.vae.next_call().name != stage:
            pass
    latents.wait_for_metric("stepwise_requests_total", lambda n: n >= left + 1, endpoint="/noise", code="499")
    latents.vae.let_go()
    assert post(latents, write_npy(LATENTS), timestep=400).status_code == 200
    assert calls(latents) == {"encode": ["encode", "decode"], "decode": ["encode", "decode", "decode"]}[stage]


def test_encoding_that_fails_or_takes_too_long_is_told() -> None:
    with serving_latents(timeout=14) as server, ThreadPoolExecutor(1) as pool:
        server.vae.faults = 2
        assert "could not be encoded" in problem(post(server, png(PIXELS), timestep=5), 500)["detail"]
        for image in (png(PIXELS), write_npy(LATENTS)):
            server.vae.hold()
            late = pool.submit(post, server, image, timestep=5)
            server.vae.next_call()
            server.vae.clock.advance(14.5)
            assert problem(late.result(), 504)["detail"] == "not done within 14 s"
            server.vae.let_go()


def test_noise_is_a_request_with_a_promise(latents: LatentServer) -> None:
    names = ("stepwise_accepted_total", "stepwise_images_total")
    before = [latents.metric(name) for name in names]
    kept = latents.metric("stepwise_promises_total", outcome="kept")
    for image in (png(PIXELS), write_npy(LATENTS)):
        for accept in ("image/png", NPY):
            timing = post(latents, image, accept, timestep=5).headers["server-timing"]
            assert re.fullmatch(r"queue;dur=[\d.]+, denoise;dur=0.00, decode;dur=[\d.]+, encode;dur=[\d.]+", timing)
    assert [latents.metric(name) for name in names] == [count + 4 for count in before]
    assert latents.metric("stepwise_promises_total", outcome="kept") == kept + 4


def test_noise_of_pixels_has_a_place_in_the_queue() -> None:
    with serving_fake(max_queue=1) as server:
        server.runner.hold()
        with server.raw_request("POST", "/sample", {"Content-Length": "0"}):
            server.runner.next_pass()
            refused = post(server, write_npy(np.zeros((1, 1, 2), np.float32)), timestep=5)
            assert problem(refused, 503)["detail"] == "all 1 places of the queue are taken"
        server.runner.let_go()
