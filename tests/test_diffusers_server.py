"""Checkpoints of the diffusers library on a running server, which gives the pipelines' images."""

import base64
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from model.checkpoints.errors import CheckpointError
from service.build import build
from service.config import Settings
from stepwise.cli import app
from tests.checkpoints import without_folder
from tests.local import serving_here
from tests.networks import fill
from tests.reference import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from tests.servers import ROOT, Json, Reachable, invalid, read_npy, read_parameters, read_png, write_npy

# diffusers' warning with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SEEDS = range(7, 23)
SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}


def write(folder: Path, scheduler: Any, **config: object) -> Path:
    """A pipeline's folder, with random weights."""
    unet = UNet2DModel(**{**SMALL, **config})
    fill(unet, gain=0.5)
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write(
        folder / "rgb",  # like google's first DDPMs
        DDPMScheduler(variance_type="fixed_large"),
        sample_size=16,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    write(
        folder / "classes",  # like OpenAI's
        DDPMScheduler(variance_type="learned_range", beta_schedule="squaredcos_cap_v2", timestep_spacing="linspace"),
        sample_size=(8, 16),
        in_channels=1,
        out_channels=2,
        num_class_embeds=5,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    write(folder / "fourier", DDPMScheduler(), sample_size=8, time_embedding_type="fourier")
    return folder


@pytest.fixture(scope="module")
def native(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`classes`, converted to native weights."""
    target = tmp_path_factory.mktemp("converted") / "other name"
    assert f"serve it: stepwise serve --weights {target}" in run_convert(checkpoints / "classes", target)
    return target


def run_convert(source: Path, target: Path) -> str:
    """Run `stepwise convert` in this process, and return its output."""
    ended = CliRunner().invoke(app, ["convert", str(source), str(target)])
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def running(checkpoints: Path, native: Path) -> Iterator[dict[str, Reachable]]:
    """A server of each."""
    with (
        serving_here(weights=str(checkpoints / "rgb"), max_batch=4) as rgb,
        serving_here(weights=str(checkpoints / "classes"), max_batch=4) as classes,
        serving_here(weights=str(checkpoints / "fourier"), max_batch=2) as fourier,
        serving_here(weights=str(native), max_batch=4) as converted,
    ):
        yield {"rgb": rgb, "classes": classes, "fourier": fourier, "converted": converted}


def images(server: Reachable, **body: object) -> NDArray[np.uint8]:
    """The images of a request, [N, H, W] or [N, H, W, 3]."""
    answer = server.client.post("/sample", json=body, headers={"accept": "application/json"})
    assert answer.status_code == 200, answer.text
    return np.array([read_png(base64.b64decode(image["b64_json"])) for image in answer.json()["images"]])


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def to_uint8(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """diffusers' numpy_to_pil."""
    values: NDArray[np.uint8] = (images * 255).round().astype("uint8")
    return values


def assert_same(drawn: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    """Check that less than 0.1 % of the values differ, by one level."""
    assert drawn.shape == expected.shape
    difference = np.abs(drawn.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference != 0).mean() < 1e-3
    assert all(len(np.unique(image)) > 50 for image in expected)  # not flat colours


@pytest.mark.parametrize("num_inference_steps", [10, 25])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7)])
def test_the_pipelines_images(
    running: dict[str, Reachable], checkpoints: Path, sampler: str, eta: float, num_inference_steps: int
) -> None:
    unet = UNet2DModel.from_pretrained(checkpoints / "rgb" / "unet", low_cpu_mem_usage=False)
    kind, scheduler = (DDIMPipeline, DDIMScheduler) if sampler == "ddim" else (DDPMPipeline, DDPMScheduler)
    pipeline = quiet(kind(unet, scheduler.from_pretrained(checkpoints / "rgb" / "scheduler")))
    call = {"eta": eta} if sampler == "ddim" else {}
    expected = pipeline(
        batch_size=len(SEEDS),
        generator=generators(),
        num_inference_steps=num_inference_steps,
        output_type="np",
        **call,
    ).images
    drawn = images(
        running["rgb"],
        seed=SEEDS[0],
        num_images=len(SEEDS),
        sampler=sampler,
        eta=eta,
        num_inference_steps=num_inference_steps,
    )
    assert_same(drawn, to_uint8(expected))


@torch.inference_mode()
@pytest.mark.parametrize("num_inference_steps", [10, 25])
def test_class_conditional_images_with_a_learned_variance(
    running: dict[str, Reachable], checkpoints: Path, num_inference_steps: int
) -> None:
    """diffusers' pipelines have no labels, so the test has their loop."""
    unet = UNet2DModel.from_pretrained(checkpoints / "classes" / "unet", low_cpu_mem_usage=False)
    scheduler = DDPMScheduler.from_pretrained(checkpoints / "classes" / "scheduler")
    labels = [i % 5 for i in range(len(SEEDS))]
    rngs = generators()
    x = torch.cat([torch.randn((1, 1, 8, 16), generator=rng) for rng in rngs])
    scheduler.set_timesteps(num_inference_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, torch.tensor(labels)).sample, t, x, generator=rngs).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1)[:, 0].numpy()
    drawn = images(
        running["classes"],
        seed=SEEDS[0],
        num_images=len(SEEDS),
        class_label=labels,
        sampler="ddpm",
        num_inference_steps=num_inference_steps,
    )
    assert_same(drawn, to_uint8(expected))


@pytest.fixture(scope="module")
def shown(running: dict[str, Reachable], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the code of docs/checkpoints.md unchanged, and compare with the server of `rgb`."""
    [code] = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert "http://127.0.0.1:8000" in code
    made: dict[str, Any] = {}
    with contextlib.chdir(tmp_path_factory.mktemp("shown")):
        exec(code.replace("http://127.0.0.1:8000", running["rgb"].url), made)
        made["png"] = Path("remote.png").read_bytes()
    return made


def test_docs_draw_an_image_by_a_local_pipeline(shown: dict[str, Any]) -> None:
    assert read_png(shown["png"]).shape == (16, 16, 3)


@pytest.mark.parametrize(("pipeline", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_a_local_pipeline_with_the_service_as_its_unet(
    running: dict[str, Reachable], shown: dict[str, Any], checkpoints: Path, pipeline: Any, scheduler: Any
) -> None:
    local = UNet2DModel.from_pretrained(checkpoints / "rgb" / "unet", low_cpu_mem_usage=False)
    with shown["RemoteUNet"](running["rgb"].url) as remotely:
        remote, expected = (
            quiet(pipeline(unet, scheduler.from_pretrained(checkpoints / "rgb" / "scheduler")))(
                batch_size=2, generator=generators()[:2], num_inference_steps=10, output_type="np"
            ).images
            for unet in (remotely, local)
        )
    assert_same(to_uint8(remote), to_uint8(expected))


def test_model_output_has_the_learned_variance(running: dict[str, Reachable], checkpoints: Path) -> None:
    unet = UNet2DModel.from_pretrained(checkpoints / "classes" / "unet", low_cpu_mem_usage=False)
    x = np.random.default_rng(0).standard_normal((1, 8, 16)).astype(np.float32)
    fields = {"timestep": 700, "output": "model_output", "class_label": 3}
    answer = running["classes"].client.post("/denoise", data=fields, files={"image": write_npy(x)})
    output = read_npy(answer.content)
    with torch.inference_mode():
        expected = unet(torch.from_numpy(x[None]), 700, torch.tensor([3])).sample[0].numpy()
    assert output.shape == (2, 8, 16)
    assert np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()
    assert running["classes"].client.get("/info").json()["out_channels"] == 2


def test_a_converted_checkpoint_draws_the_same_bytes(running: dict[str, Reachable]) -> None:
    requests: list[Json] = [
        {"seed": 1},
        {"seed": 2, "sampler": "ddpm", "num_inference_steps": 7, "class_label": 4},
        {"seed": 3, "sampler": "dpmpp_2m", "num_inference_steps": 9, "num_images": 5},
        {"seed": 4, "sampler": "ddim", "eta": 1, "num_inference_steps": 4},
    ]
    for body in requests:
        answers = [running[name].client.post("/sample", json=body) for name in ("classes", "converted")]
        assert answers[0].status_code == 200
        assert answers[0].content == answers[1].content
    infos = [running[name].client.get("/info").json() for name in ("classes", "converted")]
    assert [info["model"]["name"] for info in infos] == ["classes", "other name"]  # names are not part of images
    assert infos[0]["model"]["digest"] == infos[1]["model"]["digest"]
    assert infos[0]["fingerprint"] == infos[1]["fingerprint"]


# A network trained only with labels.


def test_an_image_without_a_label_is_of_some_class(running: dict[str, Reachable]) -> None:
    client = running["classes"].client
    labels = set()
    for seed in range(30):
        png = client.get("/sample", params={"seed": seed, "num_inference_steps": 1}).content
        label = read_parameters(png)["class_label"]
        labels.add(label)
        if seed < 5:
            asked = {"seed": seed, "num_inference_steps": 1, "class_label": label}
            assert client.get("/sample", params=asked).content == png
    assert labels == {0, 1, 2, 3, 4}


def test_classes_that_are_drawn_are_told(running: dict[str, Reachable]) -> None:
    client = running["classes"].client
    body = {"seed": 0, "num_images": 8, "num_inference_steps": 1}
    answer = client.post("/sample", json=body, headers={"accept": "application/json"}).json()
    recipes = [read_parameters(base64.b64decode(image["b64_json"])) for image in answer["images"]]
    assert answer["parameters"]["class_label"] == [recipe["class_label"] for recipe in recipes]
    assert client.post("/sample", json={}).status_code == 200


def test_guidance_needs_images_without_a_label(running: dict[str, Reachable]) -> None:
    answer = running["classes"].client.post("/sample", json={"class_label": 1, "guidance_scale": 2})
    assert invalid(answer, "guidance_scale") == "must be at most 1: this model was trained with labels only; it is 2"


def test_denoising_needs_a_label(running: dict[str, Reachable]) -> None:
    image = write_npy(np.zeros((1, 8, 16), np.float32))
    client = running["classes"].client
    answer = client.post("/denoise", data={"timestep": 9}, files={"image": image})
    assert invalid(answer, "class_label") == "is required: this model was trained with labels only"
    answer = client.post("/denoise", data={"timestep": 9, "class_label": 0}, files={"image": image})
    assert answer.status_code == 200


# A network with a fourier encoding.


def test_timestep_0_is_refused_where_it_has_no_logarithm(running: dict[str, Reachable]) -> None:
    client = running["fourier"].client
    assert client.post("/sample", json={}).status_code == 200
    answer = client.post("/sample", json={"sampler": "ddim", "num_inference_steps": 10})
    assert invalid(answer, "num_inference_steps") == (
        "10 steps of ddim end at timestep 0, and this network knows those from 1 on"
    )
    image = write_npy(np.zeros((3, 8, 8), np.float32))
    answer = client.post("/denoise", data={"timestep": 0}, files={"image": image})
    assert invalid(answer, "timestep") == "must be 1 to 999, and is 0"
    fields = {"timestep": 3, "num_inference_steps": 3}
    assert client.post("/denoise", data=fields, files={"image": image}).status_code == 200


# Errors.


def test_an_unreadable_checkpoint_ends_the_start_with_one_line(checkpoints: Path, tmp_path: Path) -> None:
    unet = UNet2DModel(**SMALL, sample_size=8)
    unet.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(CheckpointError) as refusal:
        build(Settings(weights=str(tmp_path)))
    assert without_folder(refusal.value, tmp_path) == (
        "diffusion_pytorch_model.bin: is a pickle, which can run code when it is opened: "
        "set STEPWISE_ALLOW_PICKLE=1 if you trust it, best for `stepwise convert` alone"
    )
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as refusal:
        build(Settings(weights=str(tmp_path)))
    assert without_folder(refusal.value, tmp_path).startswith("config.json: cannot be read: ")
