"""Judge the digits that the weights in the box draw.

    python -m weights.quality weights/digits [--precision bfloat16]

Draws three times 1,000 digits, 100 a class, at the recommended settings or at others, and compares the 8-bit pixels
that a client would get with the 2,000 held-out digits, in two spaces: the features of a classifier that is trained on
the training digits, and pixels, which nothing was trained for. Prints, for each 1,000 and for as many training digits,
which show where a measure bottoms out:

- accuracy: how often the classifier sees the digit that was asked for;
- the Fréchet distance to the held-out, in distances between the two halves of the held-out;
- coverage: the share of the held-out that have one of the 1,000 within the distance of their 5th neighbour;
- whether training digits were learnt by heart: the distance to the nearest of them, and the share that is nearer than
  all but 1 % of the held-out are.

At the recommended settings the command fails where a figure is worse than it should be. The classifier is kept in
FOLDER/work for the next time.
"""

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from model.backends.backend import Backend, Precision
from model.backends.choose import choose
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import load
from model.description import ModelDescription, Recommended
from model.rows import Forward, Row
from model.runner import SlotRunner
from model.samplers import SAMPLERS, GridError, sample_table
from service.config import available_cores
from service.images import UInt8, to_uint8
from weights import classifier, data
from weights.classifier import Classifier
from weights.measures import Float64, coverage, frechet_distance, nearest
from weights.train import Training

CLASSES, PER_CLASS, TIMES = 10, 100, 3
SIDE = 8  # pixels; the Fréchet distance of images is taken of so small ones, for want of images
SHEET_COLUMNS = 16
WIDTH = 64  # rows of one forward pass


def draw(backend: Backend, model: ModelDescription, settings: Recommended, seed: int) -> UInt8:
    """Draw digits as the service does, [CLASSES * PER_CLASS, H, W]; digit i has the label i % 10 and seed + i."""
    table = sample_table(model.schedule, settings.sampler, settings.num_inference_steps)
    runner = SlotRunner(backend, model.image_shape, no_label=CLASSES, slots=WIDTH)
    rows = [
        Row(table, seed + i, label=i % CLASSES, guidance_scale=settings.guidance_scale)
        for i in range(CLASSES * PER_CLASS)
    ]
    branches = range(rows[0].forwards_per_step)
    at_once = WIDTH // len(branches)

    pixels = []
    with tqdm(desc="drawing", total=len(rows), unit="digit") as bar:
        for first in range(0, len(rows), at_once):
            slots = [runner.admit(row) for row in rows[first : first + at_once]]
            for _ in range(len(table)):
                runner.step([Forward(slot, branch) for slot in slots for branch in branches])
            for slot in slots:
                pixels.append(to_uint8(runner.read(slot).x)[:, :, 0])
                runner.release(slot)
            bar.update(len(slots))
    return np.stack(pixels)


def trained_judge(folder: Path, data_file: Path, split: data.Split, seed: int) -> Classifier:
    """The classifier of a seed: from FOLDER/work where it was trained before, on the same data and in the same way."""
    path = folder / "work" / "classifier.pt"
    parts = (Path(classifier.__file__).read_bytes(), data_file.read_bytes(), str(seed).encode())
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            print(f"classifier: trained before with seed {seed}, read from {path}")
            judge = Classifier()
            judge.load_state_dict(saved["classifier"])
            return judge.requires_grad_(False).eval()
    judge = classifier.train(split, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"classifier": judge.state_dict(), "key": key}, path)
    print(f"classifier: trained with seed {seed}, kept in {path}")
    return judge


def accuracy(judge: Classifier, x: Tensor, labels: Tensor) -> float:
    """The share of digits x [N, 1, H, W] that are seen as their labels [N]."""
    with torch.inference_mode():
        return float((judge(x).argmax(1) == labels).double().mean())


class Figures(NamedTuple):
    """Of digits beside the held-out: two distances in halves, two coverages; and beside the training digits.

    Attributes:
        accuracy: the share that the classifier sees as their labels.
        nearest: the median distance, in pixels, to the nearest training digit.
        copies: the share that is nearer to one than all but 1 % of the held-out are.
    """

    accuracy: float
    in_features: float
    in_pixels: float
    coverage_in_features: float
    coverage_in_pixels: float
    nearest: float
    copies: float


TITLES = {
    "accuracy": "seen as asked for",
    "in_features": "Fréchet distance of features, in halves",
    "in_pixels": f"Fréchet distance of {SIDE}×{SIDE} pixels, in halves",
    "coverage_in_features": "coverage in features",
    "coverage_in_pixels": "coverage in pixels",
    "nearest": "distance to the nearest training digit",
    "copies": "nearer to one than 99 % of the held-out",
}
SHARES = ("accuracy", "coverage_in_features", "coverage_in_pixels", "copies")


class Limit(NamedTuple):
    """What a figure must reach."""

    value: float
    at_most: bool
    text: str

    def allows(self, figure: float) -> bool:
        return figure <= self.value if self.at_most else figure >= self.value


LIMITS = {
    "accuracy": Limit(0.98, False, "at least 98.0%"),
    "in_features": Limit(1.5, True, "at most 1.5"),
    "copies": Limit(0.01, True, "at most 1%"),
}


class Held:
    """The held-out digits, as a judge sees them, and what is known of them."""

    def __init__(self, judge: Classifier, split: data.Split) -> None:
        self._judge = judge
        self._x = split.held_out_x
        self._train = _points(split.train_x)
        self._features, self._small = self._features_of(self._x), _points(_small(self._x))
        middle = len(self._x) // 2
        self._halves = [frechet_distance(points[:middle], points[middle:]) for points in (self._features, self._small)]
        self.nearest = nearest(_points(self._x), self._train)
        self.accuracy = accuracy(judge, self._x, split.held_out_y)

    def compare(self, x: Tensor, labels: Tensor) -> Figures:
        """Compare digits x [N, 1, H, W] with labels [N]."""
        features, small, pixels = self._features_of(x), _points(_small(x)), _points(x)
        near = nearest(pixels, self._train)
        return Figures(
            accuracy(self._judge, x, labels),
            frechet_distance(features, self._features) / self._halves[0],
            frechet_distance(small, self._small) / self._halves[1],
            coverage(self._features, features),
            coverage(_points(self._x), pixels),
            float(np.median(near)),
            float((near < np.quantile(self.nearest, 0.01)).mean()),
        )

    def _features_of(self, x: Tensor) -> Float64:
        with torch.inference_mode():
            return _points(self._judge.features(x))


def _points(x: Tensor) -> Float64:
    points: Float64 = x.flatten(1).double().numpy()
    return points


def _small(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, SIDE)


def save_sheet(path: Path, pixels: UInt8) -> None:
    """Save the first digits of each class, one class a row, as they were drawn: none is picked or left out."""
    N, H, W = pixels.shape
    by_class = pixels.reshape(N // CLASSES, CLASSES, H, W)[:SHEET_COLUMNS]
    sheet = by_class.transpose(1, 2, 0, 3).reshape(CLASSES * H, -1)
    PillowImage.fromarray(sheet).save(path)
    print(f"sheet: {path}")


def main() -> None:
    args = _arguments()
    folder: Path = args.folder
    data_file = folder / Training.read(folder / "training.toml").data
    if not data_file.exists():
        sys.exit(f"{data_file} is missing: run `make data` first")
    try:
        checkpoint = load(folder)
        model = checkpoint.description
        given = {name: getattr(args, name) for name in ("sampler", "num_inference_steps", "guidance_scale")}
        settings = replace(model.recommended, **{name: value for name, value in given.items() if value is not None})
        split = data.load(data_file)
        judge = trained_judge(folder, data_file, split, args.seed)
        cpu = torch.device("cpu")
        backend = choose(checkpoint.network, model, cpu, args.precision, available_cores(), WIDTH, cache_dir=None)
        seeds = [args.seed + i * CLASSES * PER_CLASS for i in range(TIMES)]
        pixels = [draw(backend, model, settings, seed) for seed in seeds]
    except (CheckpointError, GridError) as error:
        sys.exit(f"quality: {error}")
    if args.sheet:
        save_sheet(args.sheet, pixels[0])

    held = Held(judge, split)
    labels = torch.arange(CLASSES * PER_CLASS) % CLASSES
    drawn = [held.compare(torch.from_numpy(digits).float()[:, None] / 127.5 - 1, labels) for digits in pixels]
    chosen = [_some(split, len(labels), seed) for seed in seeds]
    real = _medians([held.compare(split.train_x[some], split.train_y[some]) for some in chosen])
    print(
        f"\n{backend.fingerprint['backend']}, {backend.fingerprint['precision']}, "
        f"{settings.sampler}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, "
        f"{TIMES} times {len(labels):,} digits, with the seeds from {', '.join(map(str, seeds))} on\n"
    )
    medians = _medians(drawn)
    print(f"| | {' | '.join(f'from {seed}' for seed in seeds)} | median | training digits | limit |")
    print(f"|---|{'---|' * len(seeds)}---|---|---|")
    for name, title in TITLES.items():
        form = "{:.1%}" if name in SHARES else "{:.2f}"
        values = [form.format(getattr(figures, name)) for figures in (*drawn, medians, real)]
        print(f"| {title} | {' | '.join(values)} | {LIMITS[name].text if name in LIMITS else ''} |")
    print(f"\nheld-out digits: accuracy {held.accuracy:.1%}, nearest {np.median(held.nearest):.2f}")
    worse = [TITLES[name] for name, limit in LIMITS.items() if not limit.allows(getattr(medians, name))]
    if settings == model.recommended and worse:
        sys.exit(f"worse than it should be: {', '.join(worse)}")


def _medians(figures: Sequence[Figures]) -> Figures:
    return Figures(*(float(np.median(values)) for values in zip(*figures, strict=True)))


def _some(split: data.Split, number: int, seed: int) -> Tensor:
    """So many training digits, by index."""
    order = torch.randperm(len(split.train_x), generator=torch.Generator().manual_seed(seed))
    return order[:number]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m weights.quality", description="Judge the digits drawn.")
    parser.add_argument("folder", type=Path, help="a folder of weights with training.toml, such as weights/digits")
    parser.add_argument("--seed", type=int, default=0, help="of the first digit, and of the classifier (0)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="instead of the recommended one")
    parser.add_argument("--steps", type=int, metavar="N", dest="num_inference_steps", help="instead of the recommended")
    parser.add_argument("--guidance", type=float, metavar="SCALE", dest="guidance_scale", help="likewise; 1 is off")
    parser.add_argument("--precision", choices=("auto", *get_args(Precision)), default="auto", help="as the server's")
    parser.add_argument("--sheet", type=Path, metavar="PATH.png", help="save 16 drawn digits of each class, unselected")
    args = parser.parse_args()
    for option, value in (("--steps", args.num_inference_steps), ("--guidance", args.guidance_scale)):
        if value is not None and not value >= 1:
            parser.error(f"{option} must be at least 1, and is {value}")
    return args


if __name__ == "__main__":
    main()
