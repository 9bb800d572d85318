"""Our images equal those of diffusers' schedulers and pipelines with the same network and seeds."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from model.rows import Row
from model.samplers import sample_table
from model.schedule import Schedule
from service.http.png import to_uint8
from tests.networks import fill
from tests.reference import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from tests.trajectories import Model, Told, forwards, labelled, runner_of, small_network

# diffusers' warning with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SHAPE = (3, 16, 16)
SEEDS = [0, 1, 2**63 + 5]
LABELS = [3, None, 0]
GAIN = 0.8  # of networks; larger ones amplify the rounding of diffusers' float32 ᾱ from step to step
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "pndm": partial(PNDMScheduler, skip_prk_steps=True),
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "lcm": partial(LCMScheduler, beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
}
BOUNDING = ("ddim", "ddpm", "dpmpp_2m", "lcm")  # those that know thresholding
TRAINED_BETAS = np.random.default_rng(0).uniform(1e-4, 0.03, 400).tolist()


class Trajectory(NamedTuple):
    """Images after each step, and estimates of x_0 at each step: [N, rows, C, H, W]."""

    x: Tensor
    x0: Tensor


def ours(network: Model, rows: list[Row]) -> Trajectory:
    """All rows together, in passes of one width."""
    runner = runner_of(network, SHAPE, width=sum(max(row.forwards) for row in rows))
    slots = [runner.admit(row) for row in rows]
    states = []
    for line in range(len(rows[0].table)):
        runner.step([forward for row, slot in zip(rows, slots, strict=True) for forward in forwards(row, slot, line)])
        states.append([runner.read(slot) for slot in slots])
    x, x0 = (np.array([[state[part] for state in step] for step in states]) for part in range(2))
    return Trajectory(torch.from_numpy(x), torch.from_numpy(x0))


@torch.inference_mode()
def theirs(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, grid: int | tuple[int, ...], **step: Any
) -> Trajectory:
    """The loop of diffusers' pipelines, with a generator for each image."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    if not isinstance(scheduler, PNDMScheduler | EulerDiscreteScheduler):
        step = {**step, "generator": generators}
    x: Tensor = randn_tensor((len(SEEDS), *SHAPE), generator=generators)
    scheduler.set_timesteps(**{"num_inference_steps": grid} if isinstance(grid, int) else {"timesteps": [*grid]})
    x = x * scheduler.init_noise_sigma
    states = []
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        out = scheduler.step(predict(scaled, t.expand(len(x))), t, x, **step)
        x = out.prev_sample
        # The multistep solvers do not return their estimates of x_0.
        x0 = out.get("pred_original_sample", getattr(scheduler, "model_outputs", [torch.zeros(())])[-1])
        euler = isinstance(scheduler, EulerDiscreteScheduler | EulerAncestralDiscreteScheduler)
        scale = (1 + scheduler.sigmas[i + 1] ** 2) ** 0.5 if euler else 1.0  # ours is in variance-preserving form
        states.append((x / scale, x0.expand_as(x)))
    return Trajectory(*(torch.stack([state[part] for state in states]) for part in range(2)))


def assert_parity(trajectory: Trajectory, expected: Trajectory) -> None:
    """|difference| ≤ 1e-4 × max(1, max |x|) at every step, for x and x_0."""
    for images, images_expected in zip(trajectory, expected, strict=True):
        if not images_expected.any():
            continue  # PNDM and LCM tell no x_0
        assert images.shape == images_expected.shape
        for x, x_expected in zip(images, images_expected, strict=True):
            assert x_expected.isfinite().all()
            assert (x - x_expected).abs().max() <= 1e-4 * max(1, x_expected.abs().max())


def rows(
    schedule: Schedule, sampler: str, grid: int | tuple[int, ...], eta: float, guidance_scale: float = 1.0
) -> list[Row]:
    table = sample_table(schedule, sampler, grid, eta)
    return [labelled(table, seed, label, guidance_scale) for seed, label in zip(SEEDS, LABELS, strict=True)]


def labels() -> Tensor:
    return torch.tensor([5 if label is None else label for label in LABELS])


def compare(sampler: str, fields: dict[str, Any], grid: int | tuple[int, ...], eta: float = 0.0) -> Trajectory:
    """Run both, compare, and return ours."""
    network = small_network(gain=GAIN)
    trajectory = ours(network, rows(Schedule(**fields), sampler, grid, eta))
    step = {"eta": eta} if sampler == "ddim" else {}
    assert_parity(trajectory, theirs(lambda x, t: network(x, t, labels()), SCHEDULERS[sampler](**fields), grid, **step))
    return trajectory


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "N"), [("leading", 30), ("trailing", 10), ("linspace", 17)])
@pytest.mark.parametrize(
    ("sampler", "fields", "eta"),
    [
        ("ddpm", {"variance_type": "fixed_small"}, 0.0),
        ("ddpm", {"variance_type": "fixed_large"}, 0.0),
        ("ddim", {}, 0.0),
        ("ddim", {}, 0.5),
        ("ddim", {}, 1.0),
        ("dpmpp_2m", {}, 0.0),
        ("pndm", {}, 0.0),
        ("euler", {}, 0.0),
        ("euler_a", {}, 0.0),
        ("lcm", {"clip_sample": False}, 0.0),
        ("lcm", {"clip_sample": True, "timestep_scaling": 0.1}, 0.0),
    ],
)
def test_trajectories(
    sampler: str, fields: dict[str, Any], eta: float, spacing: str, N: int, prediction_type: str
) -> None:
    if prediction_type == "sample" and sampler in ("pndm", "euler_a"):
        pytest.skip("diffusers' scheduler does not know it")
    compare(sampler, {**fields, "timestep_spacing": spacing, "prediction_type": prediction_type}, N, eta)


@pytest.mark.parametrize(
    ("sampler", "fields", "N", "eta"),
    [
        ("ddpm", {}, 50, 0.0),  # each sampler's own spacing
        ("ddim", {}, 50, 0.0),
        ("dpmpp_2m", {}, 50, 0.0),
        ("dpmpp_2m", {}, 15, 0.0),  # diffusers treats "less than 15 steps" differently
        ("dpmpp_2m", {}, 14, 0.0),
        ("pndm", {}, 50, 0.0),
        ("euler", {}, 50, 0.0),
        ("euler_a", {}, 50, 0.0),
        ("ddpm", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}, 20, 0.0),
        ("ddim", {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}, 20, 0.3),
        ("dpmpp_2m", {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1}, 20, 0.0),
        ("dpmpp_2m", {"beta_schedule": "scaled_linear", "use_karras_sigmas": True}, 20, 0.0),
        ("euler", {"beta_schedule": "scaled_linear", "use_karras_sigmas": True}, 20, 0.0),
        ("pndm", {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": True}, 20, 0.0),
        ("ddpm", {"beta_schedule": "sigmoid"}, 20, 0.0),
        ("ddpm", {"trained_betas": TRAINED_BETAS, "num_train_timesteps": 400}, 30, 0.0),
        ("ddim", {"trained_betas": TRAINED_BETAS, "num_train_timesteps": 400}, 30, 1.0),
        ("dpmpp_2m", {"trained_betas": TRAINED_BETAS, "num_train_timesteps": 400}, 30, 0.0),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
)
def test_trajectories_of_other_schedules(sampler: str, fields: dict[str, Any], N: int, eta: float) -> None:
    compare(sampler, fields, N, eta)


@pytest.mark.parametrize(
    "timesteps", [(999, 800, 640, 555, 300, 299, 40, 0), (900, 500, 130), (750,), (*range(40),)[::-1]]
)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("sampler", "fields"),
    [
        ("ddpm", {"variance_type": "fixed_small"}),
        ("ddpm", {"variance_type": "fixed_large"}),
        ("dpmpp_2m", {}),
        ("lcm", {"clip_sample": False}),
    ],
)
def test_trajectories_through_listed_timesteps(
    sampler: str, fields: dict[str, Any], prediction_type: str, timesteps: tuple[int, ...]
) -> None:
    """DDIMScheduler takes no list: test_samplers.py has a loop for it."""
    compare(sampler, {**fields, "prediction_type": prediction_type}, timesteps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("sampler", BOUNDING)
def test_cosine_schedule_from_its_very_end(sampler: str, spacing: str, prediction_type: str) -> None:
    """The last ᾱ is 2e-9, not 0."""
    fields = {
        "beta_schedule": "squaredcos_cap_v2",
        "timestep_spacing": spacing,
        "prediction_type": prediction_type,
    }
    compare(sampler, fields, 10)


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5), ("dpmpp_2m", 0.0)])
def test_zero_terminal_snr(sampler: str, eta: float, beta_schedule: str) -> None:
    fields = {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "beta_schedule": beta_schedule,
    }
    compare(sampler, fields, 10, eta)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_clipping_that_bites(sampler: str, eta: float, prediction_type: str) -> None:
    """Only x_0 is clipped; ε stays the network's."""
    fields = {"clip_sample_range": 0.6, "prediction_type": prediction_type}
    x0 = compare(sampler, fields, 12, eta).x0
    assert 0.1 < (x0.abs() == torch.tensor(0.6)).float().mean() < 0.9


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.5)])
def test_no_clipping(sampler: str, eta: float, prediction_type: str) -> None:
    x0 = compare(sampler, {"clip_sample": False, "prediction_type": prediction_type}, 12, eta).x0
    assert x0.abs().max() > 1.5


@pytest.mark.parametrize("maximum", [0.8, 1.0, 3.0])
@pytest.mark.parametrize("sampler", BOUNDING)
def test_dynamic_thresholding(sampler: str, maximum: float) -> None:
    fields = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": maximum}
    x0 = compare(sampler, fields, 10).x0
    assert (x0.abs() == 1).float().mean() > 0.05


def test_dpmpp_2m_clips_where_the_native_config_says_so() -> None:
    """diffusers' solver has no clip_sample; its thresholding with a maximum of 1 is a clip to 1."""
    network = small_network(gain=GAIN)
    trajectory = ours(network, rows(Schedule(clip_sample=True), "dpmpp_2m", 20, 0.0))
    scheduler = DPMSolverMultistepScheduler(thresholding=True, sample_max_value=1.0)
    assert_parity(trajectory, theirs(lambda x, t: network(x, t, labels()), scheduler, 20))
    assert (trajectory.x0.abs() == 1).float().mean() > 0.05


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_guidance(sampler: str) -> None:
    """Classifier-free guidance as diffusers' pipelines write it."""
    network = small_network(gain=GAIN)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out_label, out_none = network(
            x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels(), torch.full((3,), 5)])
        ).chunk(2)
        guided: Tensor = out_none + 2.5 * (out_label - out_none)
        return guided

    trajectory = ours(network, rows(Schedule(), sampler, 20, 0.0, guidance_scale=2.5))
    assert_parity(trajectory, theirs(predict, SCHEDULERS[sampler](), 20))
    unguided = ours(network, rows(Schedule(), sampler, 20, 0.0))
    assert (trajectory.x[-1] - unguided.x[-1]).abs().max() > 0.01


class WithoutLabels(Told):
    """diffusers' network."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.network(x, t).sample
        return out


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "fields", "N", "call"),
    [
        (DDPMPipeline, DDPMScheduler, {}, 20, {}),
        (DDIMPipeline, DDIMScheduler, {"prediction_type": "v_prediction"}, 30, {"eta": 0.0}),
        (DDIMPipeline, DDIMScheduler, {"beta_schedule": "scaled_linear"}, 30, {"eta": 0.0}),
        (DDIMPipeline, DDIMScheduler, {}, 20, {"eta": 0.7}),
    ],
)
def test_images_are_the_pipelines_own(
    pipeline: Any, scheduler: Any, fields: dict[str, Any], N: int, call: dict[str, float]
) -> None:
    unet = UNet2DModel(
        sample_size=SHAPE[1:],
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    fill(unet, gain=0.5)
    sampler = "ddim" if pipeline is DDIMPipeline else "ddpm"
    made = ours(WithoutLabels(unet), rows(Schedule(**fields), sampler, N, call.get("eta", 0.0))).x[-1]
    pipe = pipeline(unet, scheduler(**fields))
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipe(batch_size=len(SEEDS), generator=generators, num_inference_steps=N, **call).images
    expected = np.array([np.asarray(image) for image in images])
    difference = np.array([to_uint8(x.numpy()) for x in made]).astype(int) - expected
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 1e-3
    assert all(len(np.unique(image)) > 100 for image in expected)  # not flat colours
