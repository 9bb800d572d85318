"""Latent diffusion on a running server: the same as diffusers' unchanged LDMPipeline, with either VAE."""

import base64
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.checkpoints import save_latent_pipeline, small_autoencoder
from tests.reference import AutoencoderKL, DDIMScheduler, LDMPipeline, VQModel
from tests.servers import (
    Float32,
    Json,
    ServerProcess,
    invalid,
    read_npy,
    read_parameters,
    read_png,
    serving,
    side_by_side,
    write_npy,
)
from tests.test_bytes import NPY, PNG, ZIP, Asked, answer, differing, needs_bfloat16, sha256
from tests.test_denoise import png, walk
from tests.test_diffusers_server import assert_same, images, quiet, run_convert, to_uint8
from tests.test_events import images_of, watched
from tests.test_noise import read_png16, unit_noise

# diffusers' warning with NumPy 2.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

KINDS = ("vq", "kl")
LATENT_SHAPE = {"vq": (3, 8, 8), "kl": (4, 8, 8)}
IMAGE_SHAPE = (3, 16, 16)
SCALING_FACTOR = 0.7
SEEDS = range(7, 15)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4**0.5, 0.02**0.5, 1000) ** 2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines with random weights. Latents have half the size of images in each dimension."""
    folder = tmp_path_factory.mktemp("latent")
    save_latent_pipeline(
        folder / "vq",
        small_autoencoder(VQModel, num_vq_embeddings=64, vq_embed_dim=3),
        scheduler=DDIMScheduler(  # so that latents stay near the codes
            beta_schedule="scaled_linear", clip_sample=False, prediction_type="v_prediction"
        ),
    )
    save_latent_pipeline(folder / "kl", small_autoencoder(AutoencoderKL, latent_channels=4))
    return folder


@pytest.fixture(scope="module")
def running(checkpoints: Path) -> Iterator[dict[str, ServerProcess]]:
    with side_by_side(*(serving(WEIGHTS=checkpoints / kind, MAX_BATCH=4) for kind in KINDS)) as servers:
        yield dict(zip(KINDS, servers, strict=True))


@pytest.fixture(scope="module")
def pipelines(checkpoints: Path) -> dict[str, Any]:
    return {kind: quiet(LDMPipeline.from_pretrained(checkpoints / kind)) for kind in KINDS}


def post(server: ServerProcess, path: str, image: bytes, accept: str = NPY, **fields: Any) -> httpx.Response:
    data = {name: str(value) for name, value in fields.items()}
    response = server.client.post(path, files={"image": image}, data=data, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == accept
    return response


def denoise(server: ServerProcess, image: bytes, **fields: Any) -> Float32:
    return read_npy(post(server, "/denoise", image, **fields).content)


def latents_of(kind: str, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).normal(0, 0.7, LATENT_SHAPE[kind]).astype(np.float32)


@torch.inference_mode()
def encode(pipeline: Any, image: Float32) -> Float32:
    """The mean latents of an image, as the U-Net takes them, by diffusers."""
    encoded = pipeline.vqvae.encode(torch.from_numpy(image[None]))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
    found: Float32 = (latents[0] * SCALING_FACTOR).numpy()
    return found


@torch.inference_mode()
def decode(pipeline: Any, latents: Float32) -> Float32:
    """The image of latents, by diffusers."""
    found: Float32 = pipeline.vqvae.decode(torch.from_numpy(latents[None]) / SCALING_FACTOR).sample[0].numpy()
    return found


@torch.inference_mode()
def predict(pipeline: Any, latents: Float32, timestep: int) -> Float32:
    """The U-Net's prediction, by diffusers."""
    found: Float32 = pipeline.unet(torch.from_numpy(latents[None]), timestep).sample[0].numpy()
    return found


def pixels_of(image: Float32) -> NDArray[np.uint8]:
    return to_uint8((image.transpose(1, 2, 0) / 2 + 0.5).clip(0, 1))


# Images of the pipeline.


@pytest.mark.parametrize("num_inference_steps", [1, 4, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pipelines_images(
    running: dict[str, ServerProcess], pipelines: dict[str, Any], kind: str, num_inference_steps: int
) -> None:
    """With eta 0: otherwise LDMPipeline gives `step` no generator."""
    expected = pipelines[kind](
        batch_size=len(SEEDS),
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=num_inference_steps,
        output_type="np",
    ).images
    drawn = images(
        running[kind],
        seed=SEEDS[0],
        num_images=len(SEEDS),
        sampler="ddim",
        num_inference_steps=num_inference_steps,
    )
    assert_same(drawn, to_uint8(expected))
    assert (drawn[0] != drawn[1]).mean() > 0.5


# /denoise


@pytest.mark.parametrize("kind", KINDS)
def test_the_service_is_the_unet_of_latents(
    running: dict[str, ServerProcess], pipelines: dict[str, Any], kind: str
) -> None:
    x = latents_of(kind)
    for t in (0, 400, 999):
        output = denoise(running[kind], write_npy(x), timestep=t, output="model_output")
        expected = predict(pipelines[kind], x, t)
        np.testing.assert_allclose(output, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("t", "N"), [(300, 1), (500, 3), (401, 4)])
def test_latents_walk_down_as_the_unet_says(
    running: dict[str, ServerProcess], pipelines: dict[str, Any], t: int, N: int
) -> None:
    """DDIM by hand. The PNG is the decoded last latents. Latents are not clipped."""
    x: Float32 = latents_of("kl")
    fields: Json = {"timestep": t, "num_inference_steps": N, "sampler": "ddim"}
    start = write_npy(x)
    timesteps = walk(t, N)
    levels = [*ALPHA_BAR[timesteps], 1.0]
    for now, (alpha_bar, alpha_bar_next) in zip(timesteps, itertools.pairwise(levels), strict=True):
        epsilon = predict(pipelines["kl"], x, now)
        x0 = (x - np.sqrt(1 - alpha_bar) * epsilon) / np.sqrt(alpha_bar)
        x = (np.sqrt(alpha_bar_next) * x0 + np.sqrt(1 - alpha_bar_next) * epsilon).astype(np.float32)
        if now == t:
            np.testing.assert_allclose(denoise(running["kl"], start, output="previous", **fields), x, atol=1e-4)
    latents = denoise(running["kl"], start, **fields)
    np.testing.assert_allclose(latents, x, atol=1e-4)
    assert np.abs(latents).max() > 1
    image = post(running["kl"], "/denoise", start, PNG, **fields)
    assert np.abs(read_png(image.content).astype(int) - pixels_of(decode(pipelines["kl"], latents))).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_latents_go_on_where_they_were(running: dict[str, ServerProcess], kind: str) -> None:
    """The answer of `previous` starts the rest of the steps."""
    first, second = walk(600, 2)
    fields: Json = {"sampler": "ddim", "seed": 1}
    start = write_npy(latents_of(kind))
    whole = denoise(running[kind], start, timestep=first, num_inference_steps=2, **fields)
    between = denoise(running[kind], start, timestep=first, num_inference_steps=2, output="previous", **fields)
    np.testing.assert_allclose(
        denoise(running[kind], write_npy(between), timestep=second, **fields), whole, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_png_is_the_mean_of_its_latents(
    running: dict[str, ServerProcess], pipelines: dict[str, Any], kind: str
) -> None:
    pixels = np.random.default_rng(1).integers(0, 2**16, (16, 16, 3)).astype(np.uint16)
    image = ((pixels.transpose(2, 0, 1) / 65535 * 2 - 1) * 2).astype(np.float32)
    latents = encode(pipelines[kind], image)
    for output in ("model_output", "x0"):
        fields = {"timestep": 300, "output": output, "scaling": "additive"}
        by_png = denoise(running[kind], png(pixels), value_range=2, **fields)
        by_npy = denoise(running[kind], write_npy(latents), **fields)
        np.testing.assert_allclose(by_png, by_npy, atol=1e-4)


# /noise


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_added_to_latents(running: dict[str, ServerProcess], pipelines: dict[str, Any], kind: str) -> None:
    t, seed, value_range = 500, 3, 4
    pixels = np.random.default_rng(2).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    mean = encode(pipelines[kind], (pixels.transpose(2, 0, 1) / 255 * 2 - 1).astype(np.float32))
    for image, clean in ((png(pixels), mean), (write_npy(latents_of(kind)), latents_of(kind))):
        expected = np.sqrt(ALPHA_BAR[t]) * clean + np.sqrt(1 - ALPHA_BAR[t]) * unit_noise(seed, LATENT_SHAPE[kind])
        noisy = read_npy(post(running[kind], "/noise", image, timestep=t, seed=seed).content)
        np.testing.assert_allclose(noisy, expected, atol=1e-5)
        shown = post(running[kind], "/noise", image, PNG, timestep=t, seed=seed, value_range=value_range)
        assert shown.headers["x-clipped"] == "0"
        level = 2 * value_range / 65535
        read = read_png16(shown.content) * value_range
        np.testing.assert_allclose(read, decode(pipelines[kind], noisy), atol=1.01 * level)


# Recipes, previews and facts.


@pytest.mark.parametrize("kind", KINDS)
def test_previews_have_the_size_of_the_image(running: dict[str, ServerProcess], kind: str) -> None:
    body = {"seed": 7, "num_images": 2, "num_inference_steps": 5, "preview_every": 1}
    events = watched(running[kind], body)
    previews = [event.data for event in events if event.name == "preview"]
    assert {preview["index"] for preview in previews} == {0, 1}
    for preview in previews:
        assert preview["decoder"] == "linear"
        shown = read_png(base64.b64decode(preview["b64_json"]))
        assert shown.shape == (16, 16, 3)
        assert len(np.unique(shown)) > 10  # not flat
    document = running[kind].client.post("/sample", json=body, headers={"Accept": "application/json"}).json()
    drawn = {event.data["seed"]: event.data["b64_json"] for event in events if event.name == "image"}
    assert {seed: base64.b64decode(text) for seed, text in drawn.items()} == images_of(document)
    assert events[-1].data["timings"]["decode_s"] > 0


def test_the_time_of_decoding_is_told(running: dict[str, ServerProcess]) -> None:
    def timing(path: str, accept: str, **request: Any) -> list[str]:
        header = running["kl"].client.post(path, headers={"Accept": accept}, **request).headers["server-timing"]
        return [entry.split(";dur=")[0] for entry in header.split(", ") if float(entry.split(";dur=")[1]) > 0]

    body = {"image": base64.b64encode(write_npy(latents_of("kl"))).decode(), "timestep": 500}
    assert {"denoise", "decode"} <= set(timing("/sample", PNG, json={"num_inference_steps": 2}))
    assert {"denoise", "decode"} <= set(timing("/denoise", PNG, json=body))
    assert "decode" not in timing("/denoise", NPY, json=body)


@pytest.mark.parametrize("kind", KINDS)
def test_info_tells_the_vae(running: dict[str, ServerProcess], pipelines: dict[str, Any], kind: str) -> None:
    info = running[kind].client.get("/info").json()
    assert info["image_shape"] == list(IMAGE_SHAPE)
    assert info["latent_shape"] == list(LATENT_SHAPE[kind])
    assert info["first_stage"] == {
        "kind": kind,
        "factor": 2,
        "scaling_factor": SCALING_FACTOR,
        "num_parameters": sum(parameter.numel() for parameter in pipelines[kind].vqvae.parameters()),
    }
    assert info["model"]["num_parameters"] == sum(p.numel() for p in pipelines[kind].unet.parameters())
    assert (info["preview"], info["reproducible"]) == ("linear", True)
    assert all(seconds > 0 for seconds in info["seconds_per_decode"].values())
    assert info["seconds_per_decode"]


@pytest.mark.parametrize("path", ["/denoise", "/noise"])
def test_wrong_shapes_are_refused(running: dict[str, ServerProcess], path: str) -> None:
    for image, said in (
        (png(np.zeros((8, 8, 3), np.uint8)), "must be 16x16 pixels (width x height), and is 8x8"),
        (
            write_npy(np.zeros(IMAGE_SHAPE, np.float32)),
            "must be an .npy of float32 latents [4, 8, 8], and is float32 [3, 16, 16]",
        ),
        (
            write_npy(np.zeros(LATENT_SHAPE["kl"])),
            "must be an .npy of float32 latents [4, 8, 8], and is float64 [4, 8, 8]",
        ),
    ):
        answer = running["kl"].client.post(path, files={"image": image}, data={"timestep": 9})
        assert invalid(answer, "image") == said


# The same bytes.


def a_sample(i: int) -> Asked:
    """One to three images, of 1 to 20 steps. The first 60 all differ."""
    sampler = ("ddim", "ddpm", "dpmpp_2m")[i % 3]
    body: Json = {
        "seed": i * 2**47,
        "num_images": 1 + i // 3 % 3,
        "sampler": sampler,
        "num_inference_steps": 1 + 7 * i % 20,
        "eta": i % 5 / 4 if sampler == "ddim" else 0,
    }
    return Asked("/sample", ZIP if i % 2 else PNG, body)


def a_denoise(kind: str, i: int) -> Asked:
    """A request with latents or a picture, answered with latents or a picture."""
    pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    image = png(pixels) if i % 3 == 0 else write_npy(latents_of(kind, i))
    body: Json = {
        "image": base64.b64encode(image).decode(),
        "timestep": 150 + 97 * i % 800,
        "seed": i,
        "sampler": ("ddim", "ddpm", "dpmpp_2m")[i % 3],
        "num_inference_steps": [1, 6, 5, 1][i % 4],
        "output": ["x0", "x0", "previous", "model_output"][i % 4],
    }
    return Asked("/denoise", PNG if i % 4 == 1 else NPY, body)


def crowded(server: ServerProcess, requests: Sequence[Asked], order: int) -> list[str]:
    """The checksums of the answers to requests that run together, in random order."""
    names = ("batch_rows_sum", "batch_rows_count", "decode_images_sum", "decode_images_count")
    places = list(range(len(requests)))
    Random(order).shuffle(places)
    before = [server.metric(f"stepwise_{name}") for name in names]
    with ThreadPoolExecutor(16) as pool:
        sums = dict(zip(places, pool.map(lambda i: sha256(server, requests[i]), places), strict=True))
    counted = [server.metric(f"stepwise_{name}") - old for name, old in zip(names, before, strict=True)]
    rows, passes, decoded, batches = counted
    assert rows / passes > 1.5  # the passes were shared
    assert decoded > batches  # the batches were shared
    return [sums[i] for i in range(len(requests))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_the_same_seed_gives_the_same_bytes(checkpoints: Path, precision: str, kind: str) -> None:
    watched = [a_sample(i) for i in range(40)] + [a_denoise(kind, i) for i in range(12)]
    others = [a_sample(i)._replace(accept=PNG) for i in range(40, 60)]
    settings: dict[str, Any] = {"WEIGHTS": checkpoints / kind, "PRECISION": precision}
    with side_by_side(*(serving(None, "tests.steady", MAX_BATCH=width, **settings) for width in (8, 3))) as servers:
        facts = [server.client.get("/info").json() for server in servers]
        alone = [sha256(servers[0], asked) for asked in watched]
        crowds = [crowded(server, watched + others, order) for order, server in enumerate(servers)]
    assert len(set(alone)) == len(alone)
    for one in facts:
        assert (one["backend"], one["precision"], one["reproducible"]) == ("openvino", precision, True)
    assert facts[0]["fingerprint"] == facts[1]["fingerprint"]
    for crowd in crowds:
        assert differing(watched, crowd[: len(watched)], alone) == []
    assert crowds[0] == crowds[1]


def test_an_image_of_a_larger_request_has_the_bytes_of_its_own(running: dict[str, ServerProcess]) -> None:
    for server in running.values():
        archive = answer(server, Asked("/sample", ZIP, {"seed": 1, "num_images": 11, "num_inference_steps": 3}))
        with zipfile.ZipFile(BytesIO(archive)) as file:
            for seed in range(1, 12):
                alone = answer(server, Asked("/sample", PNG, {"seed": seed, "num_inference_steps": 3}))
                assert file.read(f"{seed}.png") == alone


@pytest.mark.parametrize("kind", KINDS)
def test_converted_weights_draw_the_same_bytes(
    running: dict[str, ServerProcess], checkpoints: Path, tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "native"
    assert "draws images of 16x16" in run_convert(checkpoints / kind, target)
    requests = [a_sample(i) for i in range(6)] + [a_denoise(kind, i) for i in range(4)]
    with side_by_side(serving(WEIGHTS=target, MAX_BATCH=4)) as [converted]:
        answers = [[answer(server, asked) for asked in requests] for server in (running[kind], converted)]
        infos = [server.client.get("/info").json() for server in (running[kind], converted)]
    assert answers[0] == answers[1]
    for fact in ("fingerprint", "first_stage", "latent_shape", "recommended"):
        assert infos[0][fact] == infos[1][fact]
    assert [info["model"]["name"] for info in infos] == [kind, "native"]  # names do not affect bytes
    assert read_parameters(answers[1][0])["model"] == f"unet_2d-{infos[0]['model']['digest'][:8]}"
