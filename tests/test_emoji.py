"""The recipe of the emoji: data in colour, an autoencoder, a U-Net on its latents, and their quality measures.

Trains only networks of a few kilobytes.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.checkpoints import native
from model.checkpoints.load import load, load_autoencoder
from model.description import Recommended
from model.nets.autoencoder import Autoencoder, AutoencoderConfig
from tests.networks import fill
from weights import autoencode, classifier, data, descent, drawing, exam, pictures, quality, train
from weights.emoji import prepare

EMOJI = Path(prepare.__file__).parent

AUTOENCODER = {
    "kind": "kl",
    "latent_channels": 2,
    "block_out_channels": [4, 8],
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
CONFIG = {
    "architecture": "diffusion_unet",
    "in_channels": 2,
    "model_channels": 8,
    "channel_multipliers": [1, 2],
    "norm_groups": 4,
    "num_classes": 3,
    "class_names": ["bars", "fields", "dots"],
    "image_size": [32, 32],
    "autoencoder": AUTOENCODER,
    "schedule": {"prediction_type": "v_prediction"},
    "recommended": {"sampler": "ddim", "num_inference_steps": 1},
}
AUTOENCODING = """
data = "work/tiny.npz"
seed = 0
images = 48
batch_size = 8
learning_rate = 1e-3
warmup_steps = 3
weight_decay = 0.01
kl_weight = 1e-3
ema_decay = 0.9
"""
TRAINING = """
data = "work/tiny.npz"
seed = 3
images = 64
batch_size = 8
learning_rate = 2e-3
warmup_steps = 3
weight_decay = 0.01
class_power = 0.5
label_dropout = 0.1
max_shift = 0
min_snr_gamma = 5.0
ema_decay = 0.9
"""


def tiny_emoji() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """A hundred blurred images of three classes, most of the second."""
    rng = np.random.default_rng(0)
    y = np.array(([1] * 3 + [0, 2]) * 20)
    colours = rng.integers(0, 256, (100, 4, 4, 3)) // (1 + y[:, None, None, None])
    return colours.repeat(8, 1).repeat(8, 2).astype(np.uint8), y


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], Path]:
    """Makes folders by name, each with the same recipe for tiny networks."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        (folder / "work").mkdir(parents=True)
        (folder / native.CONFIG).write_text(json.dumps(CONFIG))
        (folder / autoencode.RECIPE).write_text(AUTOENCODING)
        (folder / "training.toml").write_text(TRAINING)
        x, y = tiny_emoji()
        np.savez(folder / "work" / "tiny.npz", x=x, y=y)
        return folder

    return make


# The data.


def png(colour: tuple[int, ...], mode: str) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (64, 64), colour).save(file, "PNG")
    return file.getvalue()


def archive_of(path: Path, members: dict[str, bytes]) -> Path:
    """An npm package in the format that prepare.py expects."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_prepare_reads_the_npm_package(tmp_path: Path) -> None:
    """Images are on white. Skin variations follow their emoji. Skin tones alone are left out."""
    tones = {"1F3FB": {"image": "hand-light.png"}, "1F3FF": {"image": "hand-dark.png"}}
    listed = [
        {"category": "Flags", "short_name": "flag", "image": "flag.png"},
        {"category": "Component", "short_name": "tone", "image": "tone.png"},
        {"category": "People & Body", "short_name": "hand", "image": "hand.png", "skin_variations": tones},
        {"category": "Symbols", "short_name": "grey", "image": "grey.png"},
    ]
    images = {
        "flag": png((255, 0, 0, 255), "RGBA"),
        "tone": png((1, 2, 3, 255), "RGBA"),
        "hand": png((0, 0, 0, 0), "RGBA"),
        "hand-light": png((0, 0, 255, 51), "RGBA"),
        "hand-dark": png((10, 20, 30, 255), "RGBA"),
        "grey": png((7, 255), "LA"),
    }
    members = {f"img/google/64/{name}.png": content for name, content in images.items()}
    others = {"img/google/sheets/64.png": b"not read", "categories.json": b"nor this"}
    path = archive_of(tmp_path / "emoji.tgz", others | members | {"emoji.json": json.dumps(listed).encode()})

    emoji = prepare.read(path)
    assert emoji.names.tolist() == ["flag", "hand", "hand", "hand", "grey"]
    assert [prepare.CATEGORIES[label] for label in emoji.y] == ["Flags", *["People & Body"] * 3, "Symbols"]
    assert emoji.x.shape == (5, 32, 32, 3)
    assert emoji.x.dtype == np.uint8
    assert emoji.y.dtype == np.int64
    seen = [{tuple(pixel) for pixel in image.reshape(-1, 3).tolist()} for image in emoji.x]
    assert seen == [{(255, 0, 0)}, {(255, 255, 255)}, {(204, 204, 255)}, {(10, 20, 30)}, {(7, 7, 7)}]


def test_prepare_writes_what_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [{"category": "Flags", "short_name": f"flag {i}", "image": f"{i}.png"} for i in range(5)]
    images = {f"img/google/64/{i}.png": png((i, 2 * i, 255, 255), "RGBA") for i in range(5)}
    members = {"emoji.json": json.dumps(listed).encode()} | images
    monkeypatch.setattr("weights.npm.download", lambda *_: archive_of(tmp_path / "emoji.tgz", members))
    prepare.main(tmp_path / "work" / "emoji.npz")

    split = data.load(tmp_path / "work" / "emoji.npz")
    assert (split.train_x.shape, split.held_out_x.shape) == ((4, 3, 32, 32), (1, 3, 32, 32))
    assert split.classes == 9
    pixels = drawing.to_pixels(torch.cat([split.train_x, split.held_out_x]).numpy())
    assert {tuple(image[0, 0].tolist()) for image in pixels} == {(i, 2 * i, 255) for i in range(5)}


def test_pixels_come_back_as_they_were() -> None:
    colour, _ = tiny_emoji()
    for pixels in (colour, colour[..., 0]):
        x = data.scaled(pixels)
        assert x.shape[2:] == (32, 32)
        np.testing.assert_array_equal(drawing.to_pixels(x.numpy()), pixels)


# The autoencoder.


def autoencoder(**changes: object) -> Autoencoder:
    network = Autoencoder(AutoencoderConfig.model_validate({**AUTOENCODER, **changes}))
    fill(network)
    return network


def images(number: int) -> Tensor:
    return data.scaled(tiny_emoji()[0][:number])


def autoencoding(folder: Path) -> autoencode.Autoencoding:
    return autoencode.Autoencoding.read(folder / autoencode.RECIPE)


def test_examples_are_images_mirrored_and_in_other_colours(recipe: Callable[[str], Path]) -> None:
    settings, x = autoencoding(recipe("a")), images(8)
    seen = set()
    for step in range(40):  # one batch each
        examples = autoencode.examples_at(step, x, settings, (2, 16, 16))
        assert examples.noise.shape == (8, 2, 16, 16)
        [turning] = [known for known, turned in turnings(x) if is_same_set(turned, examples.x)]
        seen.add(turning)
    assert len({colours for colours, _ in seen}) == 6
    assert len({axes for _, axes in seen}) == 4


def turnings(x: Tensor) -> Iterable[tuple[tuple[str, str], Tensor]]:
    """Images with all permutations of channels, mirrored in all ways."""
    for colours in ("012", "021", "102", "120", "201", "210"):
        for axes in ("", "2", "3", "23"):
            yield (colours, axes), x[:, [int(c) for c in colours]].flip([int(axis) for axis in axes])


def is_same_set(a: Tensor, b: Tensor) -> bool:
    return {image.numpy().tobytes() for image in a} == {image.numpy().tobytes() for image in b.contiguous()}


def test_noise_is_its_own_at_each_step_and_the_same_again(recipe: Callable[[str], Path]) -> None:
    settings, x = autoencoding(recipe("a")), images(16)
    first, second, again = (autoencode.examples_at(step, x, settings, (2, 16, 16)) for step in (0, 1, 0))
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.noise, second.noise)


class Plain:
    """An autoencoder with two latent numbers per image, which decodes latents unchanged."""

    def __init__(self, mean: float, log_variance: float) -> None:
        self.moments = lambda x: torch.tensor([mean, log_variance]).reshape(1, 2, 1, 1).expand(len(x), 2, 1, 1)
        self.decode_unscaled = lambda z: z


@pytest.mark.parametrize(
    ("mean", "variance", "divergence"),
    [(0.0, 1.0, 0.0), (3.0, 1.0, 4.5), (0.0, np.e, 0.5 * (np.e - 2)), (1.0, np.e**2, 0.5 * (1 + np.e**2 - 3))],
)
def test_the_loss_is_the_error_of_noisy_latents_and_their_divergence(
    mean: float, variance: float, divergence: float
) -> None:
    noise = torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1)
    plain: Autoencoder = Plain(mean, float(np.log(variance)))  # type: ignore[assignment]
    decoded = mean + variance**0.5 * noise
    examples = autoencode.Examples(decoded + torch.tensor([0.5, -1.5]).reshape(2, 1, 1, 1), noise)
    for weight in (0.0, 0.1):
        loss = autoencode.loss_of(plain, examples, weight)
        assert loss.item() == pytest.approx(1 + weight * divergence, rel=1e-5)


@pytest.mark.parametrize("scaling_factor", [1.0, 0.5])
@torch.inference_mode()
def test_standardised_latents_are_decoded_as_before(scaling_factor: float) -> None:
    network, x = autoencoder(scaling_factor=scaling_factor), images(60)
    latents, others = autoencode.encoded(network, x), images(100)[60:]
    decoded = network.decode(network.encode(others))
    assert latents.mean((0, 2, 3)).abs().min() > 0.01
    assert (latents.std((0, 2, 3)) - 1).abs().min() > 0.01

    autoencode.standardise(network, x)
    latents = autoencode.encoded(network, x)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(network.decode(network.encode(others)), decoded, rtol=0, atol=1e-4)


def test_latents_are_the_same_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = autoencoder(), images(20)
    whole = autoencode.encoded(network, x)
    monkeypatch.setattr(autoencode, "_AT_ONCE", 8)
    torch.testing.assert_close(autoencode.encoded(network, x), whole)


def test_what_is_no_autoencoder_of_kl_is_refused(recipe: Callable[[str], Path]) -> None:
    folder = recipe("a")
    (folder / native.CONFIG).write_text(json.dumps({**CONFIG, "autoencoder": None}))
    with pytest.raises(SystemExit, match="there is none"):
        autoencode.train(folder)


# Both trainings, one after the other.


def train_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (autoencode, train):
        monkeypatch.setattr("sys.argv", [stage.__name__, str(folder)])
        stage.main()


def test_both_trainings_go_on_after_a_break(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent, "CHECKPOINT_EVERY", 4)
    whole, broken = recipe("whole"), recipe("broken")
    train_both(whole, monkeypatch)
    network, vae = load(whole).network, load_autoencoder(whole)
    assert all(parameter.isfinite().all() for parameter in network.parameters())
    latents = autoencode.encoded(vae, data.load(whole / "work" / "tiny.npz").train_x)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), rtol=0, atol=1e-5)

    for stage, drawn, written in (
        (autoencode, "examples_at", native.AUTOENCODER),
        (train, "batch_at", native.WEIGHTS),
    ):
        seen: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(stage, drawn, interrupted(getattr(stage, drawn), seen))
            with pytest.raises(KeyboardInterrupt):
                stage.train(broken)
            assert not (broken / written).exists()
            stage.train(broken)
        assert seen[:7] == [0, 1, 2, 3, 4, 5, 4]  # resumed from the checkpoint after step 3
        assert (broken / written).read_bytes() == (whole / written).read_bytes()


def interrupted(draw: Callable[..., object], seen: list[int]) -> Callable[..., object]:
    """The numbers that each step draws. The first run is interrupted at step 5."""

    def once(step: int, *rest: object) -> object:
        seen.append(step)
        if seen.count(5) == 1 and step == 5:
            raise KeyboardInterrupt
        return draw(step, *rest)

    return once


def test_latents_of_another_autoencoder_begin_anew(
    recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe("a")
    train_both(folder, monkeypatch)
    (folder / "work" / "autoencoder.pt").unlink()
    (folder / autoencode.RECIPE).write_text(AUTOENCODING.replace("seed = 0", "seed = 1"))
    autoencode.train(folder)
    with pytest.raises(SystemExit, match="made by another recipe"):
        train.train(folder)


# Drawing and quality.


@pytest.fixture
def trained(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Barely trained weights."""
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(quality, "IMAGES", 100)
    folder = recipe("a")
    train_both(folder, monkeypatch)
    return folder


def test_latents_are_drawn_along_their_steps_and_decoded(trained: Path) -> None:
    by, settings = drawing.pen(trained, "float32"), Recommended("ddim", 2, 1.5)
    drawn = drawing.draw_along(by, settings, 5, 34)  # more than one pass
    assert drawn.shape == (3, 34, 32, 32, 3)
    np.testing.assert_array_equal(drawn[-1], drawing.draw(by, settings, 5, 34))
    assert (drawn[0] != drawn[-1]).any()


@torch.inference_mode()
def test_reconstructions_are_those_of_the_autoencoder(trained: Path) -> None:
    by, vae, x = drawing.pen(trained, "float32"), load_autoencoder(trained), images(20)
    assert by.vae is not None
    expected = drawing.to_pixels(vae.decode(vae.encode(x)).numpy())
    found = drawing.reconstructed(by.vae, x)
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_weights_without_classes_are_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (trained / native.CONFIG).write_text(json.dumps({**CONFIG, "num_classes": None, "class_names": []}))
    (trained / "work" / "training.pt").unlink()
    train.train(trained)
    with pytest.raises(SystemExit, match="num_classes"):
        run_quality(trained, monkeypatch)


def run_quality(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr("sys.argv", ["quality", str(folder), *options])
    quality.main()


def criteria(text: str = "", without: str = "") -> str:
    return f"copies_without = [{without}]\n[at_least]\n[at_most]\n{text}"


@pytest.mark.slow
@pytest.mark.slow
def test_quality_tells_of_classes_and_of_the_autoencoder(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / quality.CRITERIA).write_text(criteria(without='"fields"'))
    sheet = trained / "sheet.png"
    capsys.readouterr()
    run_quality(trained, monkeypatch, "--sheet", str(sheet))  # without limits
    said = capsys.readouterr().out
    assert "3 times 99 images, with the seeds from 0, 99, 198 on" in said
    assert "Fréchet distance of 4×4 pixels" in said
    assert "the last two without fields" in said
    assert "through the autoencoder and back: " in said
    *_, bars, fields, dots = said.strip().splitlines()
    counts = np.bincount(data.load(trained / "work" / "tiny.npz").held_out_y)
    for row, name, count in zip((bars, fields, dots), ("bars", "fields", "dots"), counts, strict=True):
        assert row.startswith(f"| {name} | {count} | ")
    assert pixels_of(sheet).shape == (3 * 32, 16 * 32, 3)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [(criteria("sharpness = 1"), "sharpness"), (criteria().replace("[at_least]", ""), "at_least")],
)
def test_criteria_name_wrong_fields(tmp_path: Path, text: str, wrong: str) -> None:
    (tmp_path / quality.CRITERIA).write_text(text)
    with pytest.raises(SystemExit, match=f"missing or unknown: {wrong}"):
        quality.Criteria.read(tmp_path / quality.CRITERIA)


def test_criteria_name_unknown_classes() -> None:
    found = quality.Criteria(["dots"], {}, {})
    assert found.labels_without(["bars", "fields", "dots"]) == (2,)
    with pytest.raises(SystemExit, match="no class is called dots"):
        found.labels_without(["bars", "fields"])


def test_criteria_are_what_figures_must_reach(tmp_path: Path) -> None:
    path = tmp_path / quality.CRITERIA
    path.write_text("copies_without = []\n[at_least]\naccuracy = 0.987\n[at_most]\nin_features = 0.8\ncopies = 0.01\n")
    found = quality.Criteria.read(path)
    good = exam.Figures(0.987, 0.8, 9.0, 0.0, 0.0, 0.0, 0.01)
    assert found.worse(good) == []
    assert found.worse(good._replace(accuracy=0.9869)) == ["accuracy"]
    assert found.worse(good._replace(in_features=0.81, copies=0.02)) == ["in_features", "copies"]
    assert found.worse(good._replace(in_features=np.nan)) == ["in_features"]
    texts = [found.text(name) for name in ("accuracy", "in_features", "copies", "nearest")]
    assert texts == ["at least 98.7%", "at most 0.8", "at most 1%", ""]
    assert quality.Criteria.read(tmp_path / "none.toml").worse(good._replace(copies=1.0)) == []


class Judge:
    """Its features are the mean colour. It sees an image as the class of its strongest channel."""

    def features(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    __call__ = features


def plain_images(counts: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Images of one colour, in random order. Class c has most of channel c."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.repeat(np.arange(3), counts))
    colours = rng.uniform(-1, 0, (len(y), 3))
    colours[np.arange(len(y)), y] += 1
    return torch.from_numpy(colours).float()[:, :, None, None].expand(-1, -1, 8, 8), torch.from_numpy(y)


def held(counts: tuple[int, ...], without: tuple[int, ...] = ()) -> exam.Held:
    judge: classifier.Classifier = Judge()  # type: ignore[assignment]
    return exam.Held(judge, data.Split(*plain_images((300, 300, 300), 0), *plain_images(counts, 1)), without)


def test_classes_count_alike_however_many_are_held_out() -> None:
    """Most held-out images have one class. A balanced mix of images is near them; an equally unbalanced one is not."""
    uneven = held((800, 80, 80))
    assert uneven.compare(*plain_images((100, 100, 100), 2)).in_features < 2
    assert uneven.compare(*plain_images((250, 25, 25), 2)).in_features > 20


def test_copies_are_told_of_some_classes_only() -> None:
    train_x, train_y = plain_images((300, 300, 300), 0)
    fresh_x, fresh_y = plain_images((100, 100, 100), 2)
    x = torch.where((fresh_y == 1)[:, None, None, None], train_x[train_y == 1][:300], fresh_x)  # class 1 is copied
    assert held((200,) * 3).compare(x, fresh_y).copies > 0.3
    assert held((200,) * 3, without=(1,)).compare(x, fresh_y).copies < 0.1
    assert held((200,) * 3, without=(1,)).compare(x, fresh_y).nearest > 0.05


def test_what_comes_back_as_it_was_is_no_distance_away() -> None:
    x, _ = plain_images((60, 60, 60), 1)
    unchanged = held((60,) * 3).compare_reconstructed(drawing.to_pixels(x.numpy()))
    assert (unchanged.levels, unchanged.psnr) == (0, np.inf)
    assert unchanged.in_features == pytest.approx(0, abs=1e-3)
    darker = held((60,) * 3).compare_reconstructed(drawing.to_pixels((x - 0.1).numpy()))
    assert darker.levels == pytest.approx(12.75, abs=1)
    assert darker.in_features > 0.1


def test_the_nearest_training_images_are_found() -> None:
    x, y = plain_images((5, 5, 5), 0)
    split = data.Split(x, y, x[:0], y[:0])
    wanted = torch.tensor([3, 0, 11])
    found = exam.nearest_training(split, drawing.to_pixels((x[wanted] + 0.01).numpy()))
    np.testing.assert_array_equal(found, drawing.to_pixels(x[wanted].numpy()))


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.slow
@pytest.mark.slow
def test_pictures_of_weights_alone(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = trained.parent
    monkeypatch.setattr("sys.argv", ["pictures", str(trained), str(target)])
    pictures.main()
    split = data.load(trained / "work" / "tiny.npz")
    assert pixels_of(target / "a.png").shape == (2 * 3 * 32, 2 * 16 * 32, 3)

    neighbours = pixels_of(target / "a-neighbours.png")[::2, ::2]
    assert neighbours.shape == (3 * 32, 8 * (64 + pictures.GAP), 3)
    known = {image.tobytes() for image in drawing.to_pixels(split.train_x.numpy())}
    for _, nearest in pairs_of(neighbours):
        assert nearest.tobytes() in known

    reconstructions = pixels_of(target / "a-reconstructions.png")[::2, ::2]
    held_out = drawing.to_pixels(split.held_out_x.numpy())
    columns = np.bincount(split.held_out_y).min()  # as many as the smallest class has
    expected = [held_out[(split.held_out_y == label).numpy()][:columns] for label in range(3)]
    found = [original for original, _ in pairs_of(reconstructions)]
    np.testing.assert_array_equal(found, np.concatenate(expected))


def pairs_of(picture: NDArray[np.uint8]) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The pairs of a picture, line by line."""
    wide = 64 + pictures.GAP
    return [
        (picture[row : row + 32, column : column + 32], picture[row : row + 32, column + 32 : column + 64])
        for row in range(0, len(picture), 32)
        for column in range(0, picture.shape[1], wide)
    ]


# The recipe in the box.


def test_the_recipe_in_the_box_can_be_read() -> None:
    config = native.read_config(EMOJI)
    assert config.class_names == prepare.CATEGORIES
    assert config.image_shape == (3, prepare.SIDE, prepare.SIDE)
    for pace in (autoencode.Autoencoding, train.Training):
        settings = pace.read(EMOJI / (autoencode.RECIPE if pace is autoencode.Autoencoding else "training.toml"))
        assert EMOJI / settings.data == prepare.TARGET
        assert settings.steps > settings.warmup_steps
    assert set(quality.Criteria.read(EMOJI / quality.CRITERIA).copies_without) <= set(config.class_names)
