"""POST /denoise on a running server, as API.md specifies it."""

import base64
import hashlib
import io
import itertools
import json
import re
import socket
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import PngImagePlugin

from model.samplers import SAMPLERS
from tests.latents import LatentServer, decoded, encoded, serving_latents
from tests.servers import (
    Float32,
    Json,
    Reachable,
    ServerProcess,
    invalid,
    problem,
    read_npy,
    read_parameters,
    read_png,
    write_npy,
)

NPY, JSON = "application/x-npy", "application/json"

# ᾱ of the two models, from the formulas.
_s = np.arange(1001) / 1000
_cosine = np.cos((_s + 0.008) / 1.008 * np.pi / 2) ** 2
GREY_ALPHA_BAR = np.cumprod(1 - np.minimum(1 - _cosine[1:] / _cosine[:-1], 0.999))
RGB_ALPHA_BAR = np.cumprod(1 - np.linspace(0.01, 0.3, 20))


def noisy(shape: tuple[int, int, int], seed: int = 0) -> Float32:
    """An image with the range of a half-noisy one."""
    return np.random.default_rng(seed).normal(0, 0.7, shape).astype(np.float32)


GREY, RGB = noisy((1, 16, 16)), noisy((3, 8, 16))


def post(server: Reachable, image: bytes, accept: str = "*/*", **fields: object) -> httpx.Response:
    return server.client.post(
        "/denoise",
        files={"image": ("image", image)},
        data={name: str(value) for name, value in fields.items()},
        headers={"Accept": accept},
    )


def denoise(server: ServerProcess, image: Float32 | bytes, **fields: object) -> Float32:
    """The answer as a float32 array."""
    data = image if isinstance(image, bytes) else write_npy(image)
    response = post(server, data, NPY, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == NPY
    assert response.headers["cache-control"] == "no-store"
    return read_npy(response.content)


# Results.


def test_one_step_is_the_estimate_of_x0_by_epsilon(rgb_server: ServerProcess) -> None:
    for t in (0, 7, 19):
        epsilon = denoise(rgb_server, RGB, timestep=t, output="model_output")
        expected = (RGB - np.sqrt(1 - RGB_ALPHA_BAR[t]) * epsilon) / np.sqrt(RGB_ALPHA_BAR[t])
        x0 = denoise(rgb_server, RGB, timestep=t)
        np.testing.assert_allclose(x0, expected.clip(-1, 1), atol=2e-5)
        for sampler in SAMPLERS:
            np.testing.assert_array_equal(denoise(rgb_server, RGB, timestep=t, sampler=sampler), x0)


def test_one_step_is_the_estimate_of_x0_by_v(server: ServerProcess) -> None:
    for t in (0, 500, 999):
        v = denoise(server, GREY, timestep=t, output="model_output")
        expected = np.sqrt(GREY_ALPHA_BAR[t]) * GREY - np.sqrt(1 - GREY_ALPHA_BAR[t]) * v
        np.testing.assert_allclose(denoise(server, GREY, timestep=t), expected.clip(-1, 1), atol=2e-5)
        assert np.abs(v).max() > 1  # no clip, no quantisation


def test_a_label_moves_the_estimate_and_guidance_is_off_unless_asked(server: ServerProcess) -> None:
    def predict(**fields: object) -> Float32:
        return denoise(server, GREY, timestep=500, output="model_output", **fields)

    plain, with_label = predict(), predict(class_label="dog")
    assert (plain != with_label).any()
    np.testing.assert_array_equal(with_label, predict(class_label=1, guidance_scale=1))
    np.testing.assert_allclose(predict(class_label=1, guidance_scale=4), plain + 4 * (with_label - plain), atol=2e-5)
    estimate = np.sqrt(GREY_ALPHA_BAR[500]) * GREY - np.sqrt(1 - GREY_ALPHA_BAR[500]) * with_label
    np.testing.assert_allclose(denoise(server, GREY, timestep=500, class_label="dog"), estimate.clip(-1, 1), atol=2e-5)


def test_an_interval_guides_the_steps_in_it_alone(server: ServerProcess) -> None:
    """A walk of four steps is a step without guidance, a walk with guidance, and a step without."""
    common = {"sampler": "ddim", "class_label": 1}

    def walked(x: Float32, t: int, steps: int, guidance_scale: int, **fields: object) -> Float32:
        settings = {**common, "timestep": t, "num_inference_steps": steps, "guidance_scale": guidance_scale, **fields}
        return denoise(server, x, **settings)

    after_one = walked(GREY, 400, 4, 1, output="previous")
    after_two = walked(after_one, 300, 3, 4, output="previous")
    after_three = walked(after_two, 200, 2, 4, output="previous")
    by_hand = walked(after_three, 100, 1, 1)
    np.testing.assert_array_equal(walked(GREY, 400, 4, 4, guidance_interval="0.25,0.75"), by_hand)
    assert (walked(GREY, 400, 4, 4) != by_hand).any()
    parameters = post(server, write_npy(GREY), JSON, timestep=400, **common, guidance_interval="0.25,0.75")
    assert parameters.json()["parameters"]["guidance_interval"] == [0.25, 0.75]
    with_json = {
        "image": base64.b64encode(write_npy(GREY)).decode(),
        "timestep": 400,
        "seed": 1,
        **common,
        "guidance_scale": 4,
    }
    recipes = []
    for interval in ([0.25, 0.75], [0, 1], None):
        answer = server.client.post("/denoise", json={**with_json, "guidance_interval": interval})
        recipes.append(read_parameters(answer.content))
    assert recipes[0].pop("guidance_interval") == [0.25, 0.75]
    assert recipes[0] == recipes[1] == recipes[2]


def walk(t: int, N: int) -> list[int]:
    return [int(np.floor(t * (N - i) / N + 0.5)) for i in range(N)]


@pytest.mark.parametrize(("t", "N"), [(15, 3), (7, 4), (19, 19), (1, 1), (19, 2)])
def test_more_steps_walk_from_the_timestep_down(rgb_server: ServerProcess, t: int, N: int) -> None:
    """DDIM by hand at the timesteps floor(t·(N−i)/N + ½), with the service as its U-Net."""
    timesteps = [*walk(t, N), None]
    assert timesteps[0] == t
    x: NDArray[np.float64] = RGB.astype(np.float64)
    for now, after in itertools.pairwise(timesteps):
        epsilon = denoise(rgb_server, x.astype(np.float32), timestep=now, output="model_output")
        alpha_bar, alpha_bar_next = RGB_ALPHA_BAR[now], 1.0 if after is None else RGB_ALPHA_BAR[after]
        x0 = ((x - np.sqrt(1 - alpha_bar) * epsilon) / np.sqrt(alpha_bar)).clip(-1, 1)
        x = np.sqrt(alpha_bar_next) * x0 + np.sqrt(1 - alpha_bar_next) * epsilon
        if now == t and N > 1:
            previous = denoise(rgb_server, RGB, timestep=t, num_inference_steps=N, sampler="ddim", output="previous")
            np.testing.assert_allclose(previous, x, atol=1e-4)
    np.testing.assert_allclose(
        denoise(rgb_server, RGB, timestep=t, num_inference_steps=N, sampler="ddim"), x, atol=1e-3
    )


def test_each_sampler_walks(rgb_server: ServerProcess) -> None:
    """To an image of its own. Without eta, TCD walks as DDIM does."""
    walk = {"timestep": 10, "num_inference_steps": 5, "seed": 1}
    ends = {
        name: denoise(rgb_server, RGB / np.float32(4), **walk, sampler=name, eta=0.5 if sampler.takes_eta else 0)
        for name, sampler in SAMPLERS.items()
    }
    assert all(np.isfinite(end).all() for end in ends.values())
    assert len({end.tobytes() for end in ends.values()}) == len(SAMPLERS)


def test_previous_of_one_step_is_x0(rgb_server: ServerProcess) -> None:
    np.testing.assert_array_equal(
        denoise(rgb_server, RGB, timestep=9, output="previous"), denoise(rgb_server, RGB, timestep=9)
    )


def test_the_steps_noise_is_the_seeds_second_draw(rgb_server: ServerProcess) -> None:
    """The first draw is dropped, so the noise differs from that of /noise."""
    t, after = 16, 8
    fields = {"timestep": t, "num_inference_steps": 2, "sampler": "ddim", "output": "previous", "seed": 5}
    a, b = RGB_ALPHA_BAR[t], RGB_ALPHA_BAR[after]
    sigma = np.sqrt((1 - b) / (1 - a) * (1 - a / b))
    epsilon = denoise(rgb_server, RGB, timestep=t, output="model_output")
    x0 = ((RGB - np.sqrt(1 - a) * epsilon) / np.sqrt(a)).clip(-1, 1)
    mean = np.sqrt(b) * x0 + np.sqrt(1 - b - sigma**2) * epsilon
    generator = torch.Generator().manual_seed(5)
    _, second = (torch.randn((1, 3, 8, 16), generator=generator).numpy()[0] for _ in range(2))
    np.testing.assert_allclose(denoise(rgb_server, RGB, eta=1, **fields), mean + sigma * second, atol=1e-4)
    first = rgb_server.client.post(
        "/noise",
        files={"image": write_npy(np.zeros_like(RGB))},
        data={"timestep": 19, "seed": 5},
        headers={"Accept": NPY},
    )
    unit = read_npy(first.content) / np.sqrt(1 - RGB_ALPHA_BAR[19])
    assert np.abs(unit - second).max() > 0.1


def test_a_seed_decides_the_noise(rgb_server: ServerProcess) -> None:
    def ddpm(**fields: object) -> Float32:
        return denoise(rgb_server, RGB, timestep=15, num_inference_steps=3, sampler="ddpm", **fields)

    np.testing.assert_array_equal(ddpm(seed=1), ddpm(seed=1))
    assert (ddpm(seed=1) != ddpm(seed=2)).any()
    assert (ddpm() != ddpm()).any()  # the server draws the seed


def test_additive_is_scaled_first(rgb_server: ServerProcess) -> None:
    t = 12
    additive = (RGB / np.sqrt(RGB_ALPHA_BAR[t])).astype(np.float32)
    for output in ("x0", "model_output"):
        np.testing.assert_allclose(
            denoise(rgb_server, additive, timestep=t, scaling="additive", output=output),
            denoise(rgb_server, RGB, timestep=t, scaling="variance_preserving", output=output),
            atol=2e-5,
        )


@pytest.mark.parametrize("scaling", ["variance_preserving", "additive"])
def test_noise_and_denoise_share_their_levels(server: ServerProcess, scaling: str) -> None:
    """/noise makes the same x_t of an image in either scaling."""
    t, clean = 300, np.tanh(GREY)
    response = server.client.post(
        "/noise",
        files={"image": write_npy(clean)},
        data={"timestep": t, "seed": 3, "scaling": scaling},
        headers={"Accept": NPY},
    )
    epsilon = torch.randn((1, 1, 16, 16), generator=torch.Generator().manual_seed(3)).numpy()[0]
    x_t = (np.sqrt(GREY_ALPHA_BAR[t]) * clean + np.sqrt(1 - GREY_ALPHA_BAR[t]) * epsilon).astype(np.float32)
    np.testing.assert_allclose(
        denoise(server, response.content, timestep=t, scaling=scaling),
        denoise(server, x_t, timestep=t),
        atol=2e-5,
    )


# Media types.


def test_the_estimate_comes_as_png_json_or_npy(server: ServerProcess) -> None:
    array = denoise(server, GREY, timestep=500, seed=1)
    assert array.shape == (1, 16, 16)
    pixels = ((array[0].astype(np.float64) / 2 + 0.5).clip(0, 1) * 255).round()
    for accept in ("*/*", "image/png", "image/*"):
        response = post(server, write_npy(GREY), accept, timestep=500, seed=1)
        assert response.headers["content-type"] == "image/png"
        assert np.abs(read_png(response.content) - pixels).max() <= 1
        assert response.headers["x-seed"] == "1"
        assert "denoise;dur=" in response.headers["server-timing"]
        assert read_parameters(response.content)["timestep"] == 500
    document = post(server, write_npy(GREY), JSON, timestep=500, seed=1).json()
    assert document.keys() == {"images", "parameters", "model", "warnings", "timings"}
    [image] = document["images"]
    assert image["seed"] == 1
    assert base64.b64decode(image["b64_json"]) == response.content


def test_defaults_are_filled_in(server: ServerProcess) -> None:
    parameters = post(server, write_npy(GREY), JSON, timestep=500).json()["parameters"]
    seed = parameters.pop("seed")
    assert isinstance(seed, int)
    assert parameters == {
        "timestep": 500,
        "value_range": 1.0,
        "scaling": "variance_preserving",
        "num_inference_steps": 1,
        "output": "x0",
        "sampler": "dpmpp_2m",
        "eta": 0.0,
        "class_label": None,
        "guidance_scale": 1.0,
        "guidance_rescale": 0.0,
        "guidance_interval": [0.0, 1.0],
        "timeout_s": 300.0,
    }
    with_label = post(server, write_npy(GREY), JSON, timestep=500, class_label="cat").json()["parameters"]
    assert with_label["guidance_scale"] == 1.0


@pytest.mark.parametrize("output", ["model_output", "previous"])
def test_intermediate_results_are_arrays(server: ServerProcess, output: str) -> None:
    for accept in ("*/*", NPY, "image/png, */*;q=0.1"):
        response = post(server, write_npy(GREY), accept, timestep=500, output=output)
        assert response.headers["content-type"] == NPY
    for accept in ("image/png", JSON):
        problem(post(server, write_npy(GREY), accept, timestep=500, output=output), 406)


def test_only_images_are_answered(server: ServerProcess) -> None:
    for accept in ("text/html", "application/zip", "image/png;q=0"):
        assert NPY in problem(post(server, write_npy(GREY), accept, timestep=500), 406)["detail"]


def test_json_and_forms_are_one_request(server: ServerProcess) -> None:
    fields = {"timestep": 400, "num_inference_steps": 3, "seed": 9, "sampler": "ddim", "eta": 0.5, "class_label": 1}
    for image in (write_npy(GREY), png(grey_pixels(8))):
        by_form = post(server, image, "image/png", **fields)
        body = {"image": base64.b64encode(image).decode(), **fields}
        by_json = server.client.post("/denoise", json=body, headers={"Accept": "image/png"})
        assert by_json.status_code == 200
        assert by_json.content == by_form.content


# Uploaded images.


def png(pixels: NDArray[Any], text: PngImagePlugin.PngInfo | None = None) -> bytes:
    """A PNG of uint8 or uint16 [H, W] or [H, W, C], C being grey + alpha, RGB or RGBA."""
    if pixels.dtype == np.uint8 or pixels.ndim == 2:
        file = io.BytesIO()
        PillowImage.fromarray(pixels).save(file, "PNG", pnginfo=text)
        return file.getvalue()
    if pixels.shape[2] == 2:  # neither library writes grey with alpha
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        return raw_png(pixels.shape[1], pixels.shape[0], 16, 4, zlib.compress(rows))
    _, data = cv2.imencode(".png", pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]])
    return data.tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, depth: int, colour: int, idat: bytes, *others: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def grey_pixels(depth: int) -> NDArray[Any]:
    values = np.random.default_rng(1).integers(0, 2**depth, (16, 16))
    return values.astype(np.uint8 if depth == 8 else np.uint16)


def rgb_pixels(depth: int) -> NDArray[Any]:
    values = np.random.default_rng(2).integers(0, 2**depth, (8, 16, 3))
    return values.astype(np.uint8 if depth == 8 else np.uint16)


def with_alpha(pixels: NDArray[Any]) -> NDArray[Any]:
    return np.dstack([pixels, np.full(pixels.shape[:2], np.iinfo(pixels.dtype).max, pixels.dtype)])


@pytest.mark.parametrize("value_range", [1, 3.5, 16])
@pytest.mark.parametrize("depth", [8, 16])
def test_png_values_stand_for_the_value_range(
    server: ServerProcess, rgb_server: ServerProcess, depth: int, value_range: float
) -> None:
    grey, rgb = grey_pixels(depth), rgb_pixels(depth)
    top = 2**depth - 1
    grey_values = ((grey[None] / top * 2 - 1) * value_range).astype(np.float32)
    rgb_values = ((rgb.transpose(2, 0, 1) / top * 2 - 1) * value_range).astype(np.float32)
    for where, t, values, forms in (
        (server, 500, grey_values, (grey, with_alpha(grey), np.dstack([grey] * 3), with_alpha(np.dstack([grey] * 3)))),
        (rgb_server, 10, rgb_values, (rgb, with_alpha(rgb))),
    ):
        expected = denoise(where, values, timestep=t, output="model_output")
        for pixels in forms:
            came = denoise(where, png(pixels), timestep=t, output="model_output", value_range=value_range)
            np.testing.assert_allclose(came, expected, atol=1e-4)


def test_the_value_range_is_of_pngs_alone(server: ServerProcess) -> None:
    np.testing.assert_array_equal(
        denoise(server, GREY, timestep=500, value_range=4), denoise(server, GREY, timestep=500)
    )


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_is_widened_to_rgb(rgb_server: ServerProcess, depth: int) -> None:
    grey = rgb_pixels(depth)[:, :, 0]
    expected = denoise(rgb_server, png(np.dstack([grey] * 3)), timestep=10)
    np.testing.assert_array_equal(denoise(rgb_server, png(grey), timestep=10), expected)
    np.testing.assert_array_equal(denoise(rgb_server, png(with_alpha(grey)), timestep=10), expected)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"])
def test_an_npy_may_have_any_byte_and_memory_order(rgb_server: ServerProcess, dtype: str, order: Any) -> None:
    data = write_npy(np.asarray(RGB, dtype, order=order))
    np.testing.assert_array_equal(denoise(rgb_server, data, timestep=10), denoise(rgb_server, RGB, timestep=10))


def test_text_chunks_are_no_obstacle(server: ServerProcess) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "{}")
    text.add_text("long", "x" * 5000, zip=True)
    np.testing.assert_array_equal(
        denoise(server, png(grey_pixels(8), text), timestep=9), denoise(server, png(grey_pixels(8)), timestep=9)
    )


# Refusals, which must have no effect.


@pytest.fixture(scope="module")
def drawn(server: ServerProcess, rgb_server: ServerProcess) -> Mapping[ServerProcess, bytes]:
    """An image from each server, before any bad upload."""
    return {where: where.client.get("/sample?seed=1").content for where in (server, rgb_server)}


@pytest.fixture
def unharmed(drawn: Mapping[ServerProcess, bytes]) -> Iterator[None]:
    """After the test the engines hold nothing of its requests, and the servers draw the same images as before."""
    yield
    for where, image in drawn.items():
        where.wait_until_idle()
        assert where.client.get("/sample?seed=1").content == image
        assert where.client.get("/health/ready").status_code == 200


_PIXELS = zlib.compress(b"".join(b"\0" + bytes(range(16)) for _ in range(16)))
_BOMB = zlib.compress(bytes(50_000_000), 9)
_SIZE = "16x16 pixels"
_ARRAY = "float32 [1, 16, 16]"


def npy_header(text: str, body: bytes = bytes(1024), version: int = 1) -> bytes:
    header = text.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + struct.pack("<BBH" if version == 1 else "<BBI", version, 0, len(header)) + header + body


BAD_IMAGES: Mapping[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "jpeg": (b"\xff\xd8\xff\xe0" + bytes(100), "must be a PNG or an .npy file"),
    "text": (b"hello", "must be a PNG or an .npy file"),
    "too wide": (png(np.zeros((16, 17), np.uint8)), f"{_SIZE} (width x height), and is 17x16"),
    "too high": (png(np.zeros((8, 16), np.uint8)), f"{_SIZE} (width x height), and is 16x8"),
    "coloured": (png(np.stack([grey_pixels(8), *[np.zeros((16, 16), np.uint8)] * 2], 2)), "must be grey"),
    "coloured, 16 bit": (png(np.stack([grey_pixels(16), *[np.zeros((16, 16), np.uint16)] * 2], 2)), "must be grey"),
    "transparent": (png(np.dstack([grey_pixels(8), np.full((16, 16), 254, np.uint8)])), "opaque"),
    "transparent, 16 bit": (png(np.dstack([grey_pixels(16), np.full((16, 16), 65534, np.uint16)])), "opaque"),
    "a transparent colour": (raw_png(16, 16, 8, 0, _PIXELS, chunk(b"tRNS", b"\0\3")), "opaque"),
    "palette": (raw_png(16, 16, 8, 3, _PIXELS, chunk(b"PLTE", bytes(768))), "has a palette"),
    "1 bit": (raw_png(16, 16, 1, 0, zlib.compress(bytes(48))), "8 or 16 bits"),
    "huge": (raw_png(2**31 - 1, 2**31 - 1, 8, 0, _PIXELS), f"{_SIZE} (width x height), and is 2147483647x2147483647"),
    "no pixels": (raw_png(0, 0, 8, 0, _PIXELS), f"{_SIZE} (width x height), and is 0x0"),
    "no data": (raw_png(16, 16, 8, 0, b""), "read"),
    "too little data": (raw_png(16, 16, 8, 0, zlib.compress(bytes(17))), "read"),
    "no zlib": (raw_png(16, 16, 8, 0, b"garbage" * 9), "read"),
    "magic alone": (b"\x89PNG\r\n\x1a\n", "without a header"),
    "no IHDR": (b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", _PIXELS), "without a header"),
    "NaN": (write_npy(np.full((1, 16, 16), np.nan, np.float32)), "finite"),
    "infinite": (write_npy(np.full((1, 16, 16), np.inf, np.float32)), "finite"),
    "one infinity": (write_npy(np.where(np.arange(256).reshape(1, 16, 16) == 9, -np.inf, GREY)), "finite"),
    "huge values": (write_npy(np.full((1, 16, 16), 3e38, np.float32)), "at most 10000"),
    "float64": (write_npy(GREY.astype(np.float64)), f"{_ARRAY}, and is float64 [1, 16, 16]"),
    "float16": (write_npy(GREY.astype(np.float16)), f"{_ARRAY}, and is float16 [1, 16, 16]"),
    "uint8": (write_npy(np.zeros((1, 16, 16), np.uint8)), f"{_ARRAY}, and is uint8 [1, 16, 16]"),
    "no channels": (write_npy(GREY[0]), f"{_ARRAY}, and is float32 [16, 16]"),
    "channels last": (write_npy(GREY.transpose(1, 2, 0)), f"{_ARRAY}, and is float32 [16, 16, 1]"),
    "a batch": (write_npy(GREY[None]), f"{_ARRAY}, and is float32 [1, 1, 16, 16]"),
    "objects": (write_npy(np.array([[[{}] * 16] * 16], dtype=object)), "objects, which are never opened"),
    "a huge shape": (
        npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 99999999, 99999999), }"),
        f"{_ARRAY}, and is float32 [1, 99999999, 99999999]",
    ),
    "a body too short": (write_npy(GREY)[:-4], "1024"),
    "a body too long": (write_npy(GREY) + bytes(4), "1024"),
    "half a header": (write_npy(GREY)[:40], "header cannot be read"),
    "npy magic alone": (b"\x93NUMPY", "header cannot be read"),
    "code in a header": (npy_header("__import__('os').system('true')"), "header cannot be read"),
    "brackets": (npy_header("[" * 9000), "header cannot be read"),
    "minus signs": (npy_header("-" * 9000 + "1"), "header cannot be read"),
    "mixed keys": (npy_header("{1: 2, 'a': 3}"), "header cannot be read"),
    "a long header": (npy_header(" " * 1_000_000 + "{}", version=2), "header cannot be read"),
    "a negative shape": (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 16, 16), }"), ""),
}


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused(server: ServerProcess, name: str) -> None:
    data, named = BAD_IMAGES[name]
    assert named in invalid(post(server, data, timestep=500), "image")
    body = {"image": base64.b64encode(data).decode(), "timestep": 500}
    assert named in invalid(server.client.post("/denoise", json=body), "image")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("kind", ["grey", "grey 16", "rgb", "rgb 16", "npy"])
def test_a_file_cut_anywhere_is_refused(server: ServerProcess, rgb_server: ServerProcess, kind: str) -> None:
    depth = 16 if kind.endswith("16") else 8
    where = rgb_server if kind.startswith("rgb") else server
    data = png(rgb_pixels(depth) if where is rgb_server else grey_pixels(depth))
    if kind == "npy":
        data = write_npy(GREY)
    assert denoise(where, data, timestep=9).any()
    cuts = {*range(1, 60, 7), *range(60, len(data), len(data) // 12), *range(len(data) - 25, len(data), 3)}
    for cut in sorted(cuts):
        invalid(post(where, data[:cut], timestep=9), "image")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "data",
    [
        raw_png(16, 16, 8, 0, _PIXELS, chunk(b"zTXt", b"a\0\0" + _BOMB)),
        raw_png(16, 16, 8, 0, _PIXELS, chunk(b"iTXt", b"a\0\1\0\0\0" + _BOMB)),
        raw_png(16, 16, 8, 0, _PIXELS, chunk(b"iCCP", b"a\0\0" + _BOMB)),
        raw_png(16, 16, 8, 0, _BOMB),
        raw_png(16, 16, 8, 0, _PIXELS, chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0))),
        raw_png(16, 16, 8, 0, _PIXELS, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    ],
    ids=["zTXt", "iTXt", "iCCP", "IDAT", "second header", "animation"],
)
def test_a_bomb_does_not_go_off(server: ServerProcess, data: bytes) -> None:
    """The file is refused, or read without its optional parts. Either way it takes no more memory than one image."""
    before = peak_memory(server)
    response = post(server, data, timestep=500)
    assert response.status_code in (200, 422)
    assert peak_memory(server) - before < 30_000_000


def peak_memory(server: ServerProcess) -> int:
    """The peak of the server's memory so far, in bytes."""
    with open(f"/proc/{server.process.pid}/status") as status:  # noqa: PTH123
        [line] = [line for line in status if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("fields", "field", "named"),
    [
        ({}, "timestep", "is required"),
        ({"timestep": -1}, "timestep", "0 to 999, and is -1"),
        ({"timestep": 1000}, "timestep", "0 to 999, and is 1000"),
        ({"timestep": 1.5}, "timestep", "and is 1.5"),
        ({"timestep": "half"}, "timestep", 'and is "half"'),
        ({"timestep": 500, "num_inference_steps": 0}, "num_inference_steps", "1 to 999, and is 0"),
        ({"timestep": 500, "num_inference_steps": 501}, "num_inference_steps", "1 to 500 at timestep 500, and is 501"),
        ({"timestep": 0, "num_inference_steps": 2}, "num_inference_steps", "1 to 1 at timestep 0, and is 2"),
        ({"timestep": 5, "value_range": 0.5}, "value_range", "1 to 16, and is 0.5"),
        ({"timestep": 5, "value_range": 16.5}, "value_range", "1 to 16, and is 16.5"),
        ({"timestep": 5, "scaling": "linear"}, "scaling", "'variance_preserving' or 'additive', and is \"linear\""),
        ({"timestep": 5, "output": "x1"}, "output", "'x0', 'model_output' or 'previous', and is \"x1\""),
        (
            {"timestep": 5, "sampler": "magic"},
            "sampler",
            f"one of {', '.join(SAMPLERS)}, and is 'magic'",
        ),
        ({"timestep": 5, "eta": 0.5}, "eta", "0 with dpmpp_2m"),
        ({"timestep": 5, "seed": 2**53}, "seed", f"0 to {2**53 - 1}, and is {2**53}"),
        ({"timestep": 5, "class_label": "cow"}, "class_label", "0 to 2, or one of cat, dog, 7, and is 'cow'"),
        ({"timestep": 5, "guidance_scale": 2}, "guidance_scale", "1 without a class_label, and is 2"),
        ({"timestep": 5, "guidance_scale": 31, "class_label": 0}, "guidance_scale", "0 to 30, and is 31"),
        ({"timestep": 5, "timeout_s": 301}, "timeout_s", "at most 300, and is 301"),
        ({"timestep": 5, "num_images": 2}, "num_images", "there is no such field"),
        ({"timestep": 5, "preview_every": 1}, "preview_every", "there is no such field"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(server: ServerProcess, fields: Json, field: str, named: str) -> None:
    assert named in invalid(post(server, write_npy(GREY), **fields), field)
    body = {"image": base64.b64encode(write_npy(GREY)).decode(), **fields}
    assert named in invalid(server.client.post("/denoise", json=body), field)


@pytest.mark.usefixtures("unharmed")
def test_json_types_are_strict(server: ServerProcess) -> None:
    image = base64.b64encode(write_npy(GREY)).decode()
    for field, value in (("timestep", "5"), ("timestep", True), ("value_range", "2"), ("class_label", True)):
        invalid(server.client.post("/denoise", json={"image": image, "timestep": 5} | {field: value}), field)


@pytest.mark.usefixtures("unharmed")
def test_bad_base64_is_refused(server: ServerProcess) -> None:
    for image in ("%%%", "é", "AAA", "QQ==QQ==", "Q=Q=", 5, None, ["AAAA"]):
        invalid(server.client.post("/denoise", json={"image": image, "timestep": 5}), "image")
    assert "is required" in invalid(server.client.post("/denoise", json={"timestep": 5}), "image")


_FILE = b'Content-Disposition: form-data; name="image"; filename="a.npy"\r\n\r\n' + write_npy(GREY)
_TEXT = b'Content-Disposition: form-data; name="image"\r\n\r\nhello'
_OTHER_FILE = b'Content-Disposition: form-data; name="picture"; filename="a.npy"\r\n\r\n' + write_npy(GREY)
_TIMESTEP = b'Content-Disposition: form-data; name="timestep"\r\n\r\n5'
_SEED = b'Content-Disposition: form-data; name="seed"\r\n\r\n5'


def form(*parts: bytes) -> bytes:
    return b"".join(b"--BOUNDARY\r\n" + part + b"\r\n" for part in parts) + b"--BOUNDARY--\r\n"


def post_form(server: ServerProcess, body: bytes, boundary: str = "; boundary=BOUNDARY") -> httpx.Response:
    return server.client.post("/denoise", content=body, headers={"Content-Type": f"multipart/form-data{boundary}"})


def test_the_form_of_these_tests_is_right(server: ServerProcess) -> None:
    assert post_form(server, form(_FILE, _TIMESTEP, _SEED)).status_code == 200
    assert post_form(server, form(_TIMESTEP, _FILE)).status_code == 200


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("parts", "field", "named"),
    [
        ([_TIMESTEP], "image", "is required, as a file part; the form has no file part"),
        ([_TEXT, _TIMESTEP], "image", "the field 'image' without a filename, and its content is neither a PNG nor"),
        ([_OTHER_FILE, _TIMESTEP], "image", "the form has the file part 'picture'"),
        ([_FILE, _TEXT, _TIMESTEP], "image", "is given twice"),
        ([_TEXT, _FILE, _TIMESTEP], "image", "is given twice"),
        ([_FILE, _FILE, _TIMESTEP], "body", "Too many files"),
        ([_FILE, _OTHER_FILE, _TIMESTEP], "body", "Too many files"),
        ([_FILE, _TIMESTEP, _TIMESTEP], "timestep", "is given twice"),
        ([_FILE, *[_TIMESTEP] * 100], "body", "Too many fields"),
        ([_FILE, _TIMESTEP, _SEED + b"5" * 70_000], "body", "is not a readable form"),
        ([b"no header", _FILE, _TIMESTEP], "body", "is not a readable form"),
    ],
    ids=[
        "none",
        "text",
        "other name",
        "file and text",
        "text and file",
        "two",
        "two names",
        "twice",
        "many",
        "long",
        "x",
    ],
)
def test_bad_forms_are_refused(server: ServerProcess, parts: list[bytes], field: str, named: str) -> None:
    assert named in invalid(post_form(server, form(*parts)), field)


@pytest.mark.usefixtures("unharmed")
def test_broken_forms_are_refused(server: ServerProcess) -> None:
    whole = form(_FILE, _TIMESTEP, _SEED)
    for body in (
        b"",
        b"hello",
        whole[:-100],
        whole[: -len(b"--BOUNDARY--\r\n")],
        whole[:30],
        whole.replace(b"\r", b""),
    ):
        invalid(post_form(server, body), "body")
    for boundary in ("", "; boundary=", "; boundary=OTHER", f"; boundary={'B' * 300}"):
        invalid(post_form(server, whole, boundary), "body")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("charset", ["undefined", "punycode", "idna", "utf-16", "utf-7", "latin-1", "none", '""'])
def test_forms_are_in_utf_8(server: ServerProcess, charset: str) -> None:
    """With some of Python's codecs, parsers of forms raise unexpected errors. One codec takes quadratic time."""
    response = post_form(server, form(_FILE, _TIMESTEP), f"; boundary=BOUNDARY; charset={charset}")
    assert "must be in UTF-8" in problem(response, 415)["detail"]
    for known in ("utf-8", '"UTF-8"', "us-ascii"):
        whole = form(_FILE, _TIMESTEP)
        assert post_form(server, whole, f"; boundary=BOUNDARY; charset={known}").status_code == 200


@pytest.mark.usefixtures("unharmed")
def test_json_of_very_many_values_is_refused(server: ServerProcess) -> None:
    """The server refuses such JSON before parsing, which takes 25 times its length in memory."""
    for values in (b"[]," * 70_000 + b"[]", b"{}," * 70_000 + b"{}", b"1," * 70_000 + b"1"):
        body = b'{"timestep": 5, "image": [%b]}' % values
        response = server.client.post("/denoise", content=body, headers={"Content-Type": JSON})
        assert invalid(response, "body") == "has more than 16384 values"
    long = base64.b64encode(write_npy(GREY) + bytes(1_000_000)).decode()  # a single value of any length is fine
    assert "1024" in invalid(server.client.post("/denoise", json={"image": long, "timestep": 5}), "image")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("media_type", ["image/png", "application/x-www-form-urlencoded", "multipart/mixed", NPY])
def test_other_bodies_are_not_read(server: ServerProcess, media_type: str) -> None:
    response = server.client.post("/denoise", content=write_npy(GREY), headers={"Content-Type": media_type})
    assert "multipart/form-data" in problem(response, 415)["detail"]


# Latent models: PNGs are pixels, arrays are latents.

LATENTS = np.array([[[0.25, -2.0]]], np.float32)
PIXELS = np.random.default_rng(3).integers(0, 256, (2, 4, 3)).astype(np.uint8)
VALUES = (PIXELS.transpose(2, 0, 1) / 255 * 2 - 1).astype(np.float32)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def calls(server: LatentServer) -> list[str]:
    """The names of the VAE's calls."""
    return [call.name for call in server.vae.calls]


@pytest.mark.parametrize(("scaling", "factor"), [("variance_preserving", 1), ("additive", np.sqrt(ALPHA_BAR[400]))])
@pytest.mark.parametrize("value_range", [1, 2.5])
def test_a_png_starts_from_its_latents(latents: LatentServer, value_range: float, scaling: str, factor: float) -> None:
    for pixels in (PIXELS, PIXELS[:, :, 0]):
        values = VALUES if pixels.ndim == 3 else VALUES[:1].repeat(3, axis=0)
        response = post(latents, png(pixels), timestep=400, value_range=value_range, scaling=scaling)
        assert response.status_code == 200, response.text
        expected = encoded(values * np.float32(value_range)) * factor
        start = latents.row.start
        assert start is not None
        np.testing.assert_allclose(start, expected, atol=1e-5)
        digest = hashlib.sha256(start.tobytes()).hexdigest()
        assert read_parameters(response.content)["image_sha256"] == digest
    assert calls(latents) == ["encode", "decode"] * 2


def test_an_array_has_the_latents_themselves(latents: LatentServer) -> None:
    assert post(latents, write_npy(LATENTS), timestep=400, value_range=2.5).status_code == 200
    np.testing.assert_array_equal(latents.row.start, LATENTS)
    assert post(latents, write_npy(LATENTS), timestep=400, scaling="additive").status_code == 200
    start = latents.row.start
    assert start is not None
    np.testing.assert_allclose(start, LATENTS * np.sqrt(ALPHA_BAR[400]), rtol=1e-6)
    assert calls(latents) == ["decode"] * 2


def test_the_estimate_is_pixels_as_png_and_latents_as_npy(latents: LatentServer) -> None:
    """FakeRunner's latents: the seed, and the number of steps taken."""
    fields: Json = {"timestep": 400, "num_inference_steps": 3, "seed": 5}
    made = np.array([[[5.0, 3.0]]], np.float32)
    as_png, as_json, as_npy = (
        post(latents, write_npy(LATENTS), accept, **fields) for accept in ("*/*", JSON, f"{NPY}, image/png;q=0.5")
    )
    pixels = ((decoded(made).transpose(1, 2, 0).astype(np.float64) / 2 + 0.5) * 255).round()
    np.testing.assert_array_equal(read_png(as_png.content), pixels)
    assert base64.b64decode(as_json.json()["images"][0]["b64_json"]) == as_png.content
    np.testing.assert_array_equal(read_npy(as_npy.content), made)
    assert calls(latents) == ["decode"] * 2


@pytest.mark.parametrize("output", ["model_output", "previous"])
def test_intermediate_results_are_latents(latents: LatentServer, output: str) -> None:
    fields: Json = {"timestep": 400, "num_inference_steps": 3, "seed": 5, "output": output}
    response = post(latents, write_npy(LATENTS), **fields)
    assert response.headers["content-type"] == NPY
    np.testing.assert_array_equal(read_npy(response.content), [[[5, 1]]])  # after one step
    problem(post(latents, write_npy(LATENTS), "image/png", **fields), 406)
    assert calls(latents) == []


def test_the_time_of_decoding_is_told(latents: LatentServer) -> None:
    as_json, as_npy = (post(latents, write_npy(LATENTS), accept, timestep=400) for accept in (JSON, NPY))
    timings = as_json.json()["timings"]
    assert timings.keys() == {"queue_s", "denoise_s", "decode_s", "encode_s"}
    assert (timings["denoise_s"], timings["decode_s"]) == (1.0, 1.0)  # seconds of the fake clock
    timing = r"queue;dur=[\d.]+, denoise;dur=1000\.00, decode;dur=%s, encode;dur=[\d.]+"
    assert re.fullmatch(timing % r"1000\.00", as_json.headers["server-timing"])
    assert re.fullmatch(timing % r"0\.00", as_npy.headers["server-timing"])


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (png(PIXELS[:, :2]), "must be 4x2 pixels (width x height), and is 2x2"),
        (write_npy(VALUES), "must be an .npy of float32 latents [1, 1, 2], and is float32 [3, 2, 4]"),
        (write_npy(LATENTS[0]), "must be an .npy of float32 latents [1, 1, 2], and is float32 [1, 2]"),
        (write_npy(LATENTS * 1e5), "must have values of at most 10000 in the model's own scale"),
        (b"hello", "must be a PNG or an .npy file, and is neither"),
    ],
    ids=["size", "pixels", "dimensions", "huge", "neither"],
)
def test_what_are_no_pixels_and_no_latents_is_refused(latents: LatentServer, image: bytes, named: str) -> None:
    assert invalid(post(latents, image, timestep=5), "image") == named
    assert calls(latents) == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"timestep": 1000}, "timestep"),
        ({"timestep": 5, "num_inference_steps": 6}, "num_inference_steps"),
        ({"timestep": 5, "class_label": 3}, "class_label"),
        ({"timestep": 5, "timeout_s": 301}, "timeout_s"),
    ],
)
def test_what_is_refused_is_not_encoded(latents: LatentServer, fields: Json, field: str) -> None:
    invalid(post(latents, png(PIXELS), **fields), field)
    assert calls(latents) == []


def upload(server: Reachable, path: str) -> socket.socket:
    """A connection that has sent a PNG and waits for the answer."""
    body = json.dumps({"image": base64.b64encode(png(PIXELS)).decode(), "timestep": 400}).encode()
    return server.raw_request("POST", path, {"Content-Type": JSON, "Content-Length": str(len(body))}, body)


def test_a_client_that_leaves_is_not_encoded_for(latents: LatentServer) -> None:
    left = latents.metric("stepwise_requests_total", endpoint="/denoise", code="499")
    cancelled = latents.metric("stepwise_cancelled_total", reason="disconnect")
    latents.vae.hold()
    with upload(latents, "/denoise"):
        assert latents.vae.next_call().name == "encode"
        accepted = latents.metric("stepwise_accepted_total")
        with upload(latents, "/denoise"):
            latents.wait_for_metric("stepwise_accepted_total", lambda n: n == accepted + 1)
    latents.wait_for_metric("stepwise_requests_total", lambda n: n >= left + 2, endpoint="/denoise", code="499")
    assert latents.metric("stepwise_cancelled_total", reason="disconnect") == cancelled + 2
    latents.vae.let_go()
    assert post(latents, png(PIXELS), timestep=400).status_code == 200
    assert calls(latents) == ["encode", "encode", "decode"]  # nothing was encoded for the request that waited


def test_a_deadline_that_passes_while_an_upload_is_encoded_is_a_504(latents: LatentServer) -> None:
    missed = latents.metric("stepwise_promises_total", outcome="missed")
    latents.vae.hold()
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(post, latents, png(PIXELS), NPY, timestep=400, timeout_s=14)
        assert latents.vae.next_call().name == "encode"
        latents.vae.clock.advance(14.5)
        assert problem(late.result(), 504)["detail"] == "not done within 14 s"
    assert latents.metric("stepwise_promises_total", outcome="missed") == missed + 1
    latents.vae.let_go()


def test_what_could_not_be_done_in_time_is_not_encoded(latents: LatentServer) -> None:
    refused = latents.metric("stepwise_refused_total", reason="impossible")
    fields: Json = {"timestep": 400, "num_inference_steps": 9, "timeout_s": 5}  # nine passes take 9 s
    for image in (write_npy(LATENTS), png(PIXELS)):
        assert "even on an idle server" in invalid(post(latents, image, **fields), "timeout_s")
    assert latents.metric("stepwise_refused_total", reason="impossible") == refused + 2
    assert calls(latents) == []


def test_an_upload_that_cannot_be_encoded_fails_alone(latents: LatentServer) -> None:
    latents.vae.faults = 2  # it is tried twice
    assert "could not be encoded" in problem(post(latents, png(PIXELS), timestep=400), 500)["detail"]
    assert post(latents, png(PIXELS), timestep=400).status_code == 200


def test_an_upload_has_a_place_in_the_queue() -> None:
    with serving_latents(max_queue=1) as server, ThreadPoolExecutor(1) as pool:
        server.vae.hold()
        running = pool.submit(post, server, png(PIXELS), timestep=400)
        server.vae.next_call()
        for path in ("/denoise", "/noise", "/sample"):
            body: Json = {} if path == "/sample" else {"image": base64.b64encode(png(PIXELS)).decode(), "timestep": 4}
            refused = server.client.post(path, json=body)
            assert problem(refused, 503)["detail"] == "all 1 places of the queue are taken"
            assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
        server.vae.let_go()
        assert running.result().status_code == 200


def test_events_tell_of_an_upload_from_its_encoding_on(latents: LatentServer) -> None:
    body: Json = {"image": base64.b64encode(png(PIXELS)).decode(), "timestep": 400, "seed": 3, "value_range": 2}
    with latents.client.stream("POST", "/denoise", json=body, headers={"Accept": "text/event-stream"}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    fractions = [event["fraction"] for event in events if "fraction" in event]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    [image] = [event for event in events if event.keys() == {"index", "seed", "b64_json"}]
    answer = post(latents, png(PIXELS), timestep=400, seed=3, value_range=2)
    assert base64.b64decode(image["b64_json"]) == answer.content
    assert 0 < events[0]["eta_s"] <= events[0]["promise_s"]
