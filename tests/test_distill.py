"""Distilling: the student learns its teacher's steps. Trains only networks of a few kB."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints import native
from model.checkpoints.config import DiffusionUNetConfig
from model.checkpoints.load import load
from model.samplers import sample_table
from model.schedule import Schedule
from tests.networks import fill
from weights import descent, distill

CPU = torch.device("cpu")
STEPS = 4
CONFIG = {
    "architecture": "diffusion_unet",
    "in_channels": 1,
    "model_channels": 8,
    "channel_multipliers": [1, 2],
    "norm_groups": 4,
    "num_classes": 3,
    "image_size": [8, 8],
    "schedule": {
        "prediction_type": "v_prediction",
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "timestep_spacing": "trailing",
    },
    "recommended": {"sampler": "ddim", "num_inference_steps": STEPS},
}
RECIPE = {
    "teacher": "../teacher",
    "teacher_sampler": "ddim",
    "teacher_steps": STEPS,
    "guidance_scale": 1.0,
    "trajectories": 12,
    "unlabelled": 0.3,
    "own_states": 0.5,
    "seed": 0,
    "images": 16,
    "batch_size": 8,
    "learning_rate": 0.0,
    "warmup_steps": 1,
    "weight_decay": 0.0,
    "ema_decay": 0.9,
}


@pytest.fixture
def student(tmp_path: Path) -> Callable[..., Path]:
    """Makes a student's folder, and beside it a teacher's with random weights."""

    def make(prediction_type: str = "v_prediction", **changes: object) -> Path:
        config = {**CONFIG, "schedule": {**CONFIG["schedule"], "prediction_type": prediction_type}}  # type: ignore[dict-item]
        for name in ("teacher", "student"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        network = native.read_config(tmp_path / "teacher").build()
        fill(network)
        save_file(network.state_dict(), tmp_path / "teacher" / native.WEIGHTS)
        lines = (f"{name} = {json.dumps(value)}" for name, value in (RECIPE | changes).items())
        (tmp_path / "student" / "distillation.toml").write_text("\n".join(lines))
        return tmp_path / "student"

    return make


def losses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Distil, and return the loss of each step."""
    seen: list[float] = []

    def run(
        _: descent.Descent, batch_at: Callable[[int], distill.Example], loss_of: Callable[[distill.Example], Tensor]
    ) -> None:
        seen.extend(loss_of(batch_at(step)).item() for step in range(2))

    with monkeypatch.context() as patch:
        patch.setattr(descent, "autocast", lambda device: torch.autocast(device.type, enabled=False))
        patch.setattr(descent.Descent, "run", run)
        distill.distil(folder)
    return seen


def test_a_student_of_as_many_steps_has_nothing_to_learn(
    student: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student starts as its teacher. With the same steps it is right from the start."""
    assert max(losses(student(), monkeypatch)) < 1e-5  # trajectories are float16


@pytest.mark.parametrize(
    "changes",
    [{"teacher_steps": 8}, {"guidance_scale": 3.0}, {"teacher_sampler": "dpmpp_2m"}],
    ids=lambda changes: "".join(changes),
)
def test_it_learns_from_finer_steps_from_guidance_and_from_another_sampler(
    student: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    assert min(losses(student(**changes), monkeypatch)) > 1e-4


def a_student() -> tuple[distill.Student, torch.nn.Module, DiffusionUNetConfig]:
    config = DiffusionUNetConfig.model_validate(CONFIG)
    network = config.build()
    fill(network)
    return distill.Student(network, sample_table(config.schedule, "ddim", STEPS), CPU), network, config


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_what_is_wanted_leads_to_the_target(prediction_type: str) -> None:
    schedule = Schedule.model_validate({**CONFIG["schedule"], "prediction_type": prediction_type})  # type: ignore[dict-item]
    student = distill.Student(torch.nn.Identity(), sample_table(schedule, "ddim", STEPS), CPU)
    rng = torch.Generator().manual_seed(0)
    x, target = (torch.randn((STEPS, 1, 8, 8), generator=rng) for _ in range(2))
    steps = torch.arange(STEPS)
    torch.testing.assert_close(student.next(x, student.wanted(x, target, steps), steps), target, rtol=0, atol=1e-3)


@torch.inference_mode()
def test_its_own_states_are_those_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    student, network, config = a_student()
    noise = torch.randn((6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    table = sample_table(config.schedule, "ddim", STEPS)
    walked = distill.walk(network, table, noise, labels, no_label=3, guidance_scale=1.0, every=1)
    assert len(walked) == STEPS + 1
    steps = torch.tensor([0, 1, 2, 3, 3, 0])
    expected = torch.stack([walked[step][i] for i, step in enumerate(steps.tolist())])
    torch.testing.assert_close(student.own_states(noise, steps, labels), expected)
    fewer = distill.walk(network, table, noise, labels, no_label=3, guidance_scale=1.0, every=2)
    torch.testing.assert_close(torch.stack(fewer), torch.stack(walked[::2]))


def test_distilling_writes_weights_that_load_and_draws_trajectories_once(
    student: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = student(learning_rate=1e-2, guidance_scale=2.0)
    monkeypatch.setattr("sys.argv", ["distill", str(folder)])
    distill.main()
    checkpoint = load(folder)
    assert checkpoint.description.recommended.num_inference_steps == STEPS
    teacher = load(folder.parent / "teacher").network.state_dict()
    assert any(not torch.equal(value, teacher[name]) for name, value in checkpoint.network.state_dict().items())

    first = (folder / native.WEIGHTS).read_bytes()
    (folder / "work" / "training.pt").unlink()
    monkeypatch.setattr(distill, "drawn_by", lambda *_: pytest.fail("they are kept"))
    distill.main()
    assert (folder / native.WEIGHTS).read_bytes() == first


def test_steps_that_do_not_divide_are_refused(student: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="teacher_steps must be a multiple of 4"):
        distill.distil(student(teacher_steps=6))


def test_predictions_of_noise_are_refused(student: Callable[..., Path]) -> None:
    with pytest.raises(SystemExit, match="prediction_type must not be epsilon"):
        distill.distil(student(prediction_type="epsilon"))
