"""Judge the digits that the weights in the box draw.

    python -m weights.quality weights/digits [--precision bfloat16]

Draws three times 1,000 digits, 100 a class, at the recommended settings or at others, and compares the 8-bit pixels
that a client would get with the 2,000 held-out digits, in two spaces: the features of a classifier that is trained on
the training digits, and pixels, which nothing was trained for. Prints, for each 1,000 and for as many training digits,
which show where a measure bottoms out:

- accuracy: how often the classifier sees the digit that was asked for;
- the Fréchet distance to the held-out, in distances between the two halves of the held-out; of so few it is too large,
  also of real ones, so that of all 3,000 in features is told as well;
- coverage: the share of the held-out that have one of the 1,000 within the distance of their 5th neighbour;
- whether training digits were learnt by heart: the distance to the nearest of them, and the share that is nearer than
  all but 1 % of the held-out are.

At the recommended settings the command fails where a figure is worse than it should be. Distilled weights are judged by
their teacher's data and classifier. That is kept in FOLDER/work for the next time.
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
from torch import Tensor
from torch.nn import functional as F

from model.backends.backend import Precision
from model.checkpoints.errors import CheckpointError
from model.samplers import SAMPLERS, GridError
from service.images import UInt8
from weights import classifier, data, distill
from weights.classifier import Classifier
from weights.distill import Distillation
from weights.drawing import CLASSES, by_class, draw, pen, save
from weights.measures import Float64, coverage, frechet_distance, nearest
from weights.train import Training

PER_CLASS, TIMES = 100, 3
SIDE = 8  # pixels; the Fréchet distance of images is taken of so small ones, for want of images
SHEET_COLUMNS = 16


class Exam(NamedTuple):
    """What drawn digits are judged by."""

    split: data.Split
    judge: Classifier


def origin(folder: Path) -> Path:
    """The folder that weights go back to: their own, or their teacher's. Ends the program where it has no data."""
    while (distillation := folder / distill.RECIPE).exists():
        folder = folder / Distillation.read(distillation).teacher
    if not _data_file(folder).exists():
        sys.exit(f"{_data_file(folder)} is missing: run `make data` first")
    return folder


def exam(folder: Path, seed: int) -> Exam:
    """The data of a folder with training.toml, and the classifier of a seed."""
    split = data.load(_data_file(folder))
    return Exam(split, _trained_judge(folder / "work" / "classifier.pt", _data_file(folder), split, seed))


def _data_file(folder: Path) -> Path:
    return folder / Training.read(folder / "training.toml").data


def _trained_judge(path: Path, data_file: Path, split: data.Split, seed: int) -> Classifier:
    """The classifier of a seed: from its file where it was trained before, on the same data and in the same way."""
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
    "accuracy": Limit(0.987, False, "at least 98.7%"),
    "in_features": Limit(0.8, True, "at most 0.8"),
    "coverage_in_features": Limit(0.82, False, "at least 82%"),  # 0.95 of what training digits reach
    "copies": Limit(0.01, True, "at most 1%"),
}
STUDENT_LIMITS = {
    **LIMITS,
    "accuracy": Limit(0.982, False, "at least 98.2%"),  # a point less than its teacher's
    "in_features": Limit(1.0, True, "at most 1"),
    "coverage_in_features": Limit(0.76, False, "at least 76%"),  # 0.9 of its teacher's
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

    def compare_drawn(self, pixels: UInt8) -> Figures:
        """Compare digits [N, H, W], of which digit i was to be i % 10."""
        x = _images(pixels)
        return self.compare(x, torch.arange(len(x)) % CLASSES)

    def compare(self, x: Tensor, labels: Tensor) -> Figures:
        """Compare digits x [N, 1, H, W] with labels [N]."""
        features, small, pixels = self._features_of(x), _points(_small(x)), _points(x)
        near = nearest(pixels, self._train)
        return Figures(
            accuracy(self._judge, x, labels),
            self._distance(features),
            frechet_distance(small, self._small) / self._halves[1],
            coverage(self._features, features),
            coverage(_points(self._x), pixels),
            float(np.median(near)),
            float((near < np.quantile(self.nearest, 0.01)).mean()),
        )

    def distance(self, x: Tensor) -> float:
        """The Fréchet distance of digits x [N, 1, H, W] in features, in halves."""
        return self._distance(self._features_of(x))

    def _distance(self, features: Float64) -> float:
        return frechet_distance(features, self._features) / self._halves[0]

    def _features_of(self, x: Tensor) -> Float64:
        with torch.inference_mode():
            return _points(self._judge.features(x))


def _images(pixels: UInt8) -> Tensor:
    return torch.from_numpy(pixels).float()[:, None] / 127.5 - 1


def _points(x: Tensor) -> Float64:
    points: Float64 = x.flatten(1).double().numpy()
    return points


def _small(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, SIDE)


def main() -> None:
    args = _arguments()
    first = origin(args.folder)
    try:
        by = pen(args.folder, args.precision)
        model, fingerprint = by.model, by.backend.fingerprint
        given = {name: getattr(args, name) for name in ("sampler", "num_inference_steps", "guidance_scale")}
        settings = replace(model.recommended, **{name: value for name, value in given.items() if value is not None})
        split, judge = exam(first, args.seed)
        seeds = [args.seed + i * CLASSES * PER_CLASS for i in range(TIMES)]
        pixels = [draw(by, settings, seed, CLASSES * PER_CLASS) for seed in seeds]
    except (CheckpointError, GridError) as error:
        sys.exit(f"quality: {error}")
    if args.sheet:
        save(args.sheet, by_class(pixels[0], SHEET_COLUMNS))

    held = Held(judge, split)
    drawn = [held.compare_drawn(digits) for digits in pixels]
    chosen = [_some(split, CLASSES * PER_CLASS, seed) for seed in seeds]
    real = _medians([held.compare(split.train_x[some], split.train_y[some]) for some in chosen])
    print(
        f"\n{fingerprint['backend']}, {fingerprint['precision']}, "
        f"{settings.sampler}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, "
        f"{TIMES} times {CLASSES * PER_CLASS:,} digits, with the seeds from {', '.join(map(str, seeds))} on\n"
    )
    medians = _medians(drawn)
    limits = LIMITS if model.distilled is None else STUDENT_LIMITS
    print(f"| | {' | '.join(f'from {seed}' for seed in seeds)} | median | training digits | limit |")
    print(f"|---|{'---|' * len(seeds)}---|---|---|")
    for name, title in TITLES.items():
        form = "{:.1%}" if name in SHARES else "{:.2f}"
        values = [form.format(getattr(figures, name)) for figures in (*drawn, medians, real)]
        print(f"| {title} | {' | '.join(values)} | {limits[name].text if name in limits else ''} |")
    everything = _images(np.concatenate(pixels))
    as_many = split.train_x[_some(split, len(everything), args.seed)]
    print(
        f"\nall {len(everything):,} together: {held.distance(everything):.2f} halves in features; "
        f"as many training digits: {held.distance(as_many):.2f}"
    )
    print(f"held-out digits: accuracy {held.accuracy:.1%}, nearest {np.median(held.nearest):.2f}")
    worse = [TITLES[name] for name, limit in limits.items() if not limit.allows(getattr(medians, name))]
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
