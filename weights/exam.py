"""Compares drawn images with held-out images, by a classifier and by pixels. weights/quality.py explains the figures.

Each class has the same weight: data.evened repeats the held-out images of small classes.
"""

import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from service.http.png import UInt8
from weights import classifier, data, distill
from weights.classifier import Classifier
from weights.data import evened
from weights.distill import Distillation
from weights.drawing import to_pixels
from weights.measures import Bool, Float64, covered, frechet_distance, levels_apart, nearest, psnr
from weights.train import Training

SIDES = {1: 8, 3: 4}  # by channels: image size for the Fréchet distance of pixels; small, because images are few


class Exam(NamedTuple):
    """The data and the classifier that drawn images are judged by."""

    split: data.Split
    judge: Classifier


def origin(folder: Path) -> Path:
    """The folder of the weights that were trained: this one, or its teacher's. Exits if it has no data."""
    while (distillation := folder / distill.RECIPE).exists():
        folder = folder / Distillation.read(distillation).teacher
    if not _data_file(folder).exists():
        sys.exit(f"{_data_file(folder)} is missing: run `make data` first")
    return folder


def split_of(folder: Path) -> data.Split:
    """The data of a folder with training.toml."""
    return data.load(_data_file(folder))


def exam(folder: Path, seed: int) -> Exam:
    """The data of a folder with training.toml, and the classifier of a seed."""
    split = split_of(folder)
    return Exam(split, _trained_judge(folder / "work" / "classifier.pt", _data_file(folder), split, seed))


def _data_file(folder: Path) -> Path:
    return folder / Training.read(folder / "training.toml").data


def _trained_judge(path: Path, data_file: Path, split: data.Split, seed: int) -> Classifier:
    """The classifier of a seed, from its file if the data and the code are the same."""
    files = (Path(classifier.__file__), Path(data.__file__), data_file)
    parts = (*(file.read_bytes() for file in files), str(seed).encode())
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["key"] == key:
            print(f"classifier: trained before with seed {seed}, read from {path}")
            judge = Classifier(split.train_x.shape[1], split.classes)
            judge.load_state_dict(saved["classifier"])
            return judge.requires_grad_(False).eval()
    judge = classifier.train(split, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"classifier": judge.state_dict(), "key": key}, path)
    print(f"classifier: trained with seed {seed}, kept in {path}")
    return judge


def nearest_training(split: data.Split, pixels: UInt8) -> UInt8:
    """The nearest training image for each image of [N, H, W] or [N, H, W, C]."""
    found = nearest(_points(data.scaled(pixels)), _points(split.train_x)).which
    return to_pixels(split.train_x[torch.from_numpy(found)].numpy())


def seen(judge: Classifier, x: Tensor, labels: Tensor) -> Bool:
    """Whether the judge sees each image of x [N, C, H, W] as its label, [N]."""
    with torch.inference_mode():
        right: Bool = (judge(x).argmax(1) == labels).numpy()
    return right


class Figures(NamedTuple):
    """Figures of drawn images.

    Attributes:
        accuracy: the share that the classifier sees as their labels.
        in_features, in_pixels: Fréchet distances to the held-out, in distances between the halves of the held-out.
        coverage_in_features, coverage_in_pixels: shares of the held-out that are covered.
        nearest: the median pixel distance to the nearest training image.
        copies: the share that is nearer to a training image than all but 1 % of the held-out.
    """

    accuracy: float
    in_features: float
    in_pixels: float
    coverage_in_features: float
    coverage_in_pixels: float
    nearest: float
    copies: float


class ClassFigures(NamedTuple):
    """Figures of the drawn images of one class, and of its held-out images.

    Attributes:
        nearer: the share that is nearer to a training image than nine tenths of the held-out of this class.
    """

    label: int
    held_out: int
    accuracy: float
    held_out_accuracy: float
    nearest: float
    held_out_nearest: float
    nearer: float


class Reconstruction(NamedTuple):
    """Held-out images after the autoencoder, compared with the originals.

    Attributes:
        levels: the mean absolute difference, in 8-bit levels.
        psnr: in decibels.
        in_features: the Fréchet distance of features, in distances between the halves of the held-out.
    """

    levels: float
    psnr: float
    in_features: float


class Held:
    """The held-out images, to compare others with.

    Args:
        judge, split: of an exam.
        copies_without: classes that do not count in Figures.nearest and Figures.copies.

    Attributes:
        halves: the distance between the two halves of the held-out, in features.
        accuracy: the judge's, with the same weight for each class.
        nearest: the median pixel distance to the nearest training image.
    """

    def __init__(self, judge: Classifier, split: data.Split, copies_without: tuple[int, ...] = ()) -> None:
        self._judge = judge
        self._split = split
        self._deck = evened(split.held_out_y, 0).numpy()
        self._copies_without = copies_without
        self._pixels, self._train = _points(split.held_out_x), _points(split.train_x)
        self._features, self._small = self._features_of(split.held_out_x), _points(_small(split.held_out_x))
        self.halves, self._small_halves = (self._halves_of(points) for points in (self._features, self._small))
        self._seen = seen(judge, split.held_out_x, split.held_out_y)
        self._near = nearest(self._pixels, self._train).distance
        counted = self._near[self._counts(split.held_out_y)]
        self._copies_at = np.quantile(counted, 0.01)
        self.accuracy = float(self._seen[self._deck].mean())
        self.nearest = float(np.median(counted))

    def _halves_of(self, points: Float64) -> float:
        middle = len(points) // 2
        first, second = (evened(y, 0).numpy() for y in torch.tensor_split(self._split.held_out_y, (middle,)))
        return frechet_distance(points[:middle][first], points[middle:][second])

    def compare_drawn(self, pixels: UInt8) -> Figures:
        """Compare images [N, H, W] or [N, H, W, C]. Image i was drawn with the label i % classes."""
        return self.compare(*self._drawn(pixels))

    def _drawn(self, pixels: UInt8) -> tuple[Tensor, Tensor]:
        return data.scaled(pixels), torch.arange(len(pixels)) % self._split.classes

    def compare(self, x: Tensor, labels: Tensor) -> Figures:
        """Compare images x [N, C, H, W] with labels [N]."""
        features, pixels = self._features_of(x), _points(x)
        near = nearest(pixels[self._counts(labels)], self._train).distance
        return Figures(
            float(seen(self._judge, x, labels).mean()),
            self._distance(features),
            frechet_distance(_points(_small(x)), self._small[self._deck]) / self._small_halves,
            float(covered(self._features, features)[self._deck].mean()),
            float(covered(self._pixels, pixels)[self._deck].mean()),
            float(np.median(near)),
            float((near < self._copies_at).mean()),
        )

    def compare_classes(self, pixels: UInt8) -> list[ClassFigures]:
        """Compare drawn images class by class, for the classes in the held-out."""
        x, labels = self._drawn(pixels)
        right, near = seen(self._judge, x, labels), nearest(_points(x), self._train).distance
        found = []
        for label in np.unique(self._split.held_out_y.numpy()).tolist():
            drawn, held_out = (labels == label).numpy(), (self._split.held_out_y == label).numpy()
            figures = ClassFigures(
                label,
                int(held_out.sum()),
                float(right[drawn].mean()),
                float(self._seen[held_out].mean()),
                float(np.median(near[drawn])),
                float(np.median(self._near[held_out])),
                float((near[drawn] < np.quantile(self._near[held_out], 0.1)).mean()),
            )
            found.append(figures)
        return found

    def compare_reconstructed(self, pixels: UInt8) -> Reconstruction:
        """Compare the held-out with their reconstructions, [N, H, W] or [N, H, W, C]."""
        originals = to_pixels(self._split.held_out_x.numpy())
        features = self._features_of(data.scaled(pixels))[self._deck]
        return Reconstruction(levels_apart(pixels, originals), psnr(pixels, originals), self._distance(features))

    def distance(self, x: Tensor) -> float:
        """The Fréchet distance of images x [N, C, H, W] in features, in halves."""
        return self._distance(self._features_of(x))

    def _distance(self, features: Float64) -> float:
        return frechet_distance(features, self._features[self._deck]) / self.halves

    def _features_of(self, x: Tensor) -> Float64:
        with torch.inference_mode():
            return _points(self._judge.features(x))

    def _counts(self, labels: Tensor) -> Bool:
        """Whether images with these labels count in Figures.nearest and Figures.copies, [N]."""
        counted: Bool = ~np.isin(labels.numpy(), self._copies_without)
        return counted


def _points(x: Tensor) -> Float64:
    points: Float64 = x.flatten(1).double().numpy()
    return points


def _small(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, SIDES[x.shape[1]])
