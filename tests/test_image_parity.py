"""Images and masks: what diffusers' pipelines of image-to-image and inpainting draw, by the plan and the engine."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PILImage

from service.build import build
from service.config import Settings
from service.engine.engine import Engine
from service.engine.requests import Upload
from service.plan.fields import SampleRequest
from service.plan.pictures import Picture
from service.plan.plan import plan_sample
from service.plan.served import Served
from tests.pipelines import Json, draw, load_pipeline, write_pipeline
from tests.reference import pipeline_class, scheduler_class
from tests.servers import CACHE, PATIENCE
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
SMALL = PILImage.fromarray(RNG.integers(0, 256, (8, 8, 3), np.uint8))
PHOTO = SMALL.resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)
# Soft, and with edges between the latents' pixels.
MASK = PILImage.fromarray(RNG.integers(0, 256, (5, 5), np.uint8)).resize((SIDE, SIDE), PILImage.Resampling.BICUBIC)


def pixels(image: Any) -> NDArray[np.float32]:
    """float32 [C, H, W], −1 … 1."""
    levels: NDArray[np.float32] = np.asarray(image, np.float32) / np.float32(255)
    return (levels * np.float32(2) - np.float32(1)).transpose(2, 0, 1)


PICTURE = Picture(pixels(PHOTO), "0" * 64)
MASKED = Picture(pixels(PHOTO), "0" * 64, np.asarray(MASK) / np.float32(255) >= 0.5, "1" * 64)


class Ours(NamedTuple):
    """A model in this process."""

    engine: Engine
    served: Served

    def drawn(self, is_masked: bool, **fields: Any) -> NDArray[np.uint8]:
        plan = plan_sample(SampleRequest(**fields), self.served, 300, picture=MASKED if is_masked else PICTURE)
        upload = Upload(plan.to_encode, lambda latents: (plan.begun(latents), None))
        accepted = self.engine.submit(plan.rows, plan.timeout_s, "test", upload=upload)
        [image] = accepted.future.result(PATIENCE).images
        return to_uint8(np.clip(image.transpose(1, 2, 0) / np.float32(2) + np.float32(0.5), 0, 1))


@contextmanager
def running(folder: Path) -> Iterator[Ours]:
    engine, served, _ = build(
        Settings(weights=str(folder), device="cpu", threads=1, precision="float32", max_batch=4, cache_dir=CACHE)
    )
    engine.start()
    try:
        assert engine.wait_loaded(PATIENCE)
        yield Ours(engine, served)
    finally:
        engine.close()


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
    mask = {"mask_image": MASK, "height": SIDE, "width": SIDE} if is_masked else {}
    return to_uint8(draw(pipeline, PROMPT, seed, image=PHOTO, **mask, **settings))


def fields_of(strength: float) -> Json:
    guidance = 4.0 if strength != 0.5 else 1.0
    return {"num_inference_steps": N, "guidance_scale": guidance, "strength": strength}


@pytest.mark.parametrize(("kind", "is_masked"), [key for key in PIPELINES if key[0] != "lcm"])
def test_images_are_the_pipelines(folder: Path, kind: str, is_masked: bool) -> None:
    pipeline = theirs(folder / kind, PIPELINES[kind, is_masked])
    own = pipeline.scheduler
    images = []
    with running(folder / kind) as ours:
        for sampler, scheduler in SAMPLERS.items():
            # What the constructors of our pipelines of text-to-image set. Those of SDXL set nothing.
            clips = {} if kind.startswith("xl") else {"clip_sample": False}
            config = {**own.config, "skip_prk_steps": True, **clips}
            pipeline.scheduler = scheduler_class(scheduler).from_config(config)
            for seed, strength in enumerate(STRENGTHS):
                settings = fields_of(strength)
                image = ours.drawn(is_masked, prompt=PROMPT, seed=seed, sampler=sampler, **settings)
                assert_alike(image, expected(pipeline, is_masked, seed, **settings), (kind, sampler, strength))
                images.append(image.tobytes())
    pipeline.scheduler = own
    assert len(set(images)) > len(images) * 0.8  # a few lines of some samplers are the same


def test_all_steps_of_lcm_go_over_the_last_part_of_its_grid(folder: Path) -> None:
    pipeline = theirs(folder / "lcm", PIPELINES["lcm", False])
    with running(folder / "lcm") as ours:
        for seed, strength in enumerate(STRENGTHS):
            settings = {"num_inference_steps": 4, "guidance_scale": 8.5, "strength": strength}
            image = ours.drawn(False, prompt=PROMPT, seed=seed, **settings)
            assert_alike(image, expected(pipeline, False, seed, **settings), strength)
