"""Images and masks on a server: the images of diffusers' pipelines, and the same bytes in a crowd."""

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from tests.local import LocalServer, serving_here
from tests.pipelines import Json, draw, load_pipeline, write_pipeline
from tests.reference import pipeline_class, scheduler_class
from tests.servers import read_png
from tests.test_diffusers_server import to_uint8
from tests.test_text_server import assert_alike

# diffusers' warning with NumPy 2.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]

SIDE, N = 64, 10
PROMPT = "a fox in the snow"
STRENGTHS = (0.2, 0.5, 0.8, 1.0)
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "pndm": "PNDMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
}
# Each at two strengths, with Stable Diffusion alone.
MORE: dict[str, tuple[str, Json]] = {
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
PIPELINES = {
    ("sd1", False): "StableDiffusionImg2ImgPipeline",
    ("sd1", True): "StableDiffusionInpaintPipeline",
    ("xl", False): "StableDiffusionXLImg2ImgPipeline",
    ("xl", True): "StableDiffusionXLInpaintPipeline",
    ("sd_inpaint", True): "StableDiffusionInpaintPipeline",
    ("xl_inpaint", True): "StableDiffusionXLInpaintPipeline",
    ("lcm", False): "LatentConsistencyModelImg2ImgPipeline",
}

RNG = np.random.default_rng(7)


def a_photo(width: int, height: int, small: int, channels: int) -> Any:
    shape = (small, small, channels)[: 2 + (channels > 1)]
    colours = PILImage.fromarray(RNG.integers(0, 256, shape, np.uint8))
    return colours.resize((width, height), PILImage.Resampling.BICUBIC)


def file_of(photo: Any) -> bytes:
    photo.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PHOTO = a_photo(SIDE, SIDE, 8, 3)
LARGE = a_photo(100, 84, 8, 3)  # the pipelines of inpainting fit it to height and width
MASK = a_photo(90, 120, 5, 1)  # soft, and with edges between the latents' pixels


def drawn(server: LocalServer, is_masked: bool, **fields: Any) -> NDArray[np.uint8]:
    files = {"image": file_of(LARGE), "mask_image": file_of(MASK)} if is_masked else {"image": file_of(PHOTO)}
    data = {"prompt": PROMPT, **{name: str(value) for name, value in fields.items()}}
    response = server.client.post("/sample", data=data, files=files)
    assert response.status_code == 200, response.text
    return read_png(response.content)


def serving(folder: Path) -> AbstractContextManager[LocalServer]:
    return serving_here(weights=str(folder), device="cpu", max_batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    for kind, _ in PIPELINES:
        write_pipeline(root / kind, kind)
    return root


@cache
def theirs(folder: Path, name: str) -> Any:
    return load_pipeline(folder, pipeline_class(name))


def expected(pipeline: Any, is_masked: bool, seed: int, **settings: Any) -> NDArray[np.uint8]:
    image = {"image": PHOTO}
    if is_masked:
        image = {"image": LARGE, "mask_image": MASK, "height": SIDE, "width": SIDE}
    return to_uint8(draw(pipeline, PROMPT, seed, **image, **settings))


def fields_of(strength: float) -> Json:
    guidance = 4.0 if strength != 0.5 else 1.0
    return {"num_inference_steps": N, "guidance_scale": guidance, "strength": strength}


@pytest.mark.parametrize(("kind", "is_masked"), [key for key in PIPELINES if key[0] != "lcm"])
def test_images_are_the_pipelines(folder: Path, kind: str, is_masked: bool) -> None:
    pipeline = theirs(folder / kind, PIPELINES[kind, is_masked])
    own = pipeline.scheduler
    images = []
    with serving(folder / kind) as server:
        for sampler, scheduler in SAMPLERS.items():
            # What the constructors of our pipelines of text-to-image set. Those of SDXL set nothing.
            clips = {} if kind.startswith("xl") else {"clip_sample": False}
            config = {**own.config, "skip_prk_steps": True, **clips}
            pipeline.scheduler = scheduler_class(scheduler).from_config(config)
            for seed, strength in enumerate(STRENGTHS):
                settings = fields_of(strength)
                image = drawn(server, is_masked, seed=seed, sampler=sampler, **settings)
                assert_alike(image, expected(pipeline, is_masked, seed, **settings), (kind, sampler, strength))
                images.append(image.tobytes())
    pipeline.scheduler = own
    assert len(set(images)) > len(images) * 0.8  # a few lines of some samplers are the same


@pytest.mark.parametrize("is_masked", [False, True], ids=["from an image", "into a part"])
def test_images_of_more_samplers_are_the_pipelines(folder: Path, is_masked: bool) -> None:
    pipeline = theirs(folder / "sd1", PIPELINES["sd1", is_masked])
    own = pipeline.scheduler
    with serving(folder / "sd1") as server:
        for sampler, (scheduler, fields) in MORE.items():
            pipeline.scheduler = scheduler_class(scheduler).from_config({**own.config, "clip_sample": False, **fields})
            for seed, strength in enumerate((0.5, 1.0)):
                settings = fields_of(strength)
                image = drawn(server, is_masked, seed=seed, sampler=sampler, **settings)
                assert_alike(image, expected(pipeline, is_masked, seed, **settings), (sampler, strength))
    pipeline.scheduler = own


def test_all_steps_of_lcm_go_over_the_last_part_of_its_grid(folder: Path) -> None:
    pipeline = theirs(folder / "lcm", PIPELINES["lcm", False])
    with serving(folder / "lcm") as server:
        for seed, strength in enumerate(STRENGTHS):
            settings = {"num_inference_steps": 4, "guidance_scale": 8.5, "strength": strength}
            image = drawn(server, False, seed=seed, **settings)
            assert_alike(image, expected(pipeline, False, seed, **settings), strength)


def test_rows_from_images_with_masks_and_from_noise_have_their_own_bytes_in_a_crowd(folder: Path) -> None:
    """40 of 40: requests of all three kinds, of different strengths, samplers and guidances, share passes."""
    samplers = list(SAMPLERS)

    def bytes_of(server: LocalServer, i: int) -> bytes:
        data: Json = {"prompt": f"a fox {i}", "seed": i, "num_inference_steps": 4 + i % 5, "guidance_scale": i % 3}
        files = {}
        if i % 3:
            data["strength"] = (0.3, 0.6, 0.9, 1.0)[i % 4]
            files = {"image": file_of(LARGE.rotate(10 * i))}
        if i % 3 == 2:
            data["paste_original"] = str(i % 2 == 0)
            files["mask_image"] = file_of(MASK.rotate(10 * i))
        data["sampler"] = samplers[i % 4]
        sent: Json = {"data": data, "files": files} if files else {"json": data}
        response = server.client.post("/sample", **sent)
        assert response.status_code == 200, response.text
        return response.content

    with serving(folder / "sd1") as server, ThreadPoolExecutor(20) as pool:
        alone = [bytes_of(server, i) for i in range(40)]
        crowd = list(pool.map(lambda i: bytes_of(server, i), reversed(range(40))))[::-1]
    assert [i for i in range(40) if alone[i] != crowd[i]] == []
    assert len(set(alone)) == 40
