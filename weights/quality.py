"""Measure the quality of the weights in the box.

    python -m weights.quality weights/digits [--precision bfloat16]

Draws three sets of about 1,000 images, with the same number of each class, at the recommended or at other settings.
Compares their 8-bit pixels with the held-out images, in two spaces: the features of a classifier trained on the
training images, and pixels. Each class has the same weight, whatever its number of held-out images. Prints for each
set, and for as many training images, which show the best possible value:

- accuracy: how often the classifier sees the requested class;
- the Fréchet distance to the held-out, in distances between the two halves of the held-out. For so few images it is
  too large, even for real images, so the distance of all 3,000 in features is printed too;
- coverage: the share of the held-out with one of the 1,000 images within the distance of their 5th neighbour;
- memorisation: the distance to the nearest training image, and the share nearer than all but 1 % of the held-out.
  Classes whose held-out images are almost copies of training images do not count; the table by class has them.

For a latent model this also prints the same figures for reconstructions of the held-out, the best that it can draw.

quality.toml beside the weights has limits. At the recommended settings the command fails if a figure is worse.
Distilled weights are judged with their teacher's data and classifier. The classifier is kept in FOLDER/work.
"""

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from model.backends.backend import Precision
from model.checkpoints.errors import CheckpointError
from model.grids import GridError
from model.samplers import SAMPLERS
from service.plan.guidance import ALL_STEPS
from weights.data import Split, evened, scaled
from weights.drawing import Pen, by_class, draw, pen, reconstructed, save
from weights.exam import SIDES, ClassFigures, Figures, Held, exam, origin

CRITERIA = "quality.toml"
IMAGES, TIMES = 1_000, 3  # IMAGES is rounded down to a multiple of the classes
SHEET_COLUMNS = 16

TITLES = {
    "accuracy": "seen as asked for",
    "in_features": "Fréchet distance of features, in halves",
    "in_pixels": "Fréchet distance of {side}×{side} pixels, in halves",
    "coverage_in_features": "coverage in features",
    "coverage_in_pixels": "coverage in pixels",
    "nearest": "distance to the nearest training image",
    "copies": "nearer to one than 99 % of the held-out",
}
SHARES = ("accuracy", "coverage_in_features", "coverage_in_pixels", "copies")


@dataclass(frozen=True)
class Criteria:
    """quality.toml: limits for figures, by name, and the classes that do not count in `nearest` and `copies`."""

    copies_without: Sequence[str]
    at_least: Mapping[str, float]
    at_most: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> "Criteria":
        """Read a file. It must have all fields, and no others. Without a file there are no limits."""
        if not path.exists():
            return cls((), {}, {})
        values = tomllib.loads(path.read_text())
        wrong = values.keys() ^ {field.name for field in fields(cls)}
        wrong |= {name for side in ("at_least", "at_most") for name in values.get(side, {}).keys() - TITLES.keys()}
        if wrong:
            raise SystemExit(f"{path}: missing or unknown: {', '.join(sorted(wrong))}")
        return cls(**values)

    def worse(self, figures: Figures) -> list[str]:
        """The names of figures outside their limits."""
        found = figures._asdict()
        too_low = [name for name, limit in self.at_least.items() if not found[name] >= limit]
        return too_low + [name for name, limit in self.at_most.items() if not found[name] <= limit]

    def text(self, name: str) -> str:
        """The limits of a figure, for people."""
        limits = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{side} {_brief(name, limit[name])}" for side, limit in limits if name in limit)

    def labels_without(self, class_names: Sequence[str]) -> tuple[int, ...]:
        """copies_without as labels."""
        if unknown := set(self.copies_without) - set(class_names):
            raise SystemExit(f"{CRITERIA}: copies_without: no class is called {', '.join(sorted(unknown))}")
        return tuple(class_names.index(name) for name in self.copies_without)


def main() -> None:
    args = _arguments()
    first, criteria = origin(args.folder), Criteria.read(args.folder / CRITERIA)
    try:
        by = pen(args.folder, args.precision)
        model, fingerprint = by.model, by.backend.fingerprint
        given = {name: getattr(args, name) for name in ("sampler", "num_inference_steps", "guidance_scale")}
        settings = replace(model.recommended, **{name: value for name, value in given.items() if value is not None})
        without = criteria.labels_without(by.class_names)
        split, judge = exam(first, args.seed)
        number = IMAGES // by.classes * by.classes
        seeds = [args.seed + i * number for i in range(TIMES)]
        pixels = [draw(by, settings, seed, number, args.interval) for seed in seeds]
    except (CheckpointError, GridError) as error:
        sys.exit(f"quality: {error}")
    if args.sheet:
        save(args.sheet, by_class(pixels[0], by.classes, SHEET_COLUMNS))

    held = Held(judge, split, without)
    drawn = [held.compare_drawn(images) for images in pixels]
    chosen = [_some(split, number, seed) for seed in seeds]
    real = _medians([held.compare(split.train_x[some], split.train_y[some]) for some in chosen])
    medians = _medians(drawn)
    first, last = args.interval
    within = "" if args.interval == ALL_STEPS else f" from {first:g} to {last:g} of the steps"
    print(
        f"\n{fingerprint['backend']}, {fingerprint['precision']}, "
        f"{settings.sampler}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}{within}, "
        f"{TIMES} times {number:,} images, with the seeds from {', '.join(map(str, seeds))} on\n"
    )
    print(f"| | {' | '.join(f'from {seed}' for seed in seeds)} | median | training images | limit |")
    print(f"|---|{'---|' * len(seeds)}---|---|---|")
    for name in TITLES:
        values = [_text(name, getattr(figures, name)) for figures in (*drawn, medians, real)]
        print(f"| {_title(name, by)} | {' | '.join(values)} | {criteria.text(name)} |")
    if without:
        print(f"\nthe last two without {', '.join(criteria.copies_without)}")
    everything = np.concatenate(pixels)
    as_many = split.train_x[_some(split, len(everything), args.seed)]
    print(
        f"\nall {len(everything):,} together: {held.distance(scaled(everything)):.2f} halves in features; "
        f"as many training images: {held.distance(as_many):.2f}"
    )
    print(
        f"{len(split.held_out_x):,} held-out images: accuracy {held.accuracy:.1%}, nearest {held.nearest:.2f}, "
        f"halves {held.halves:.2f} apart in features"
    )
    if by.vae is not None:
        levels, decibels, in_features = held.compare_reconstructed(reconstructed(by.vae, split.held_out_x))
        print(
            f"through the autoencoder and back: {levels:.2f} of 255 levels off, PSNR {decibels:.1f} dB, "
            f"{in_features:.2f} halves from themselves in features"
        )
    print(f"\n{_class_table(held.compare_classes(everything), by)}")
    worse = criteria.worse(medians)
    if settings == model.recommended and args.interval == ALL_STEPS and worse:
        sys.exit(f"worse than it should be: {', '.join(_title(name, by) for name in worse)}")


def _class_table(found: Sequence[ClassFigures], by: Pen) -> str:
    lines = [
        "| | held-out | seen as asked for | of these | nearest training image | of these | nearer than 90 % of these |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, count, *shares, near, held_out_near, nearer in found:
        cells = [*map("{:.1%}".format, shares), *map("{:.2f}".format, (near, held_out_near)), f"{nearer:.1%}"]
        lines.append(f"| {by.class_names[label]} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _title(name: str, by: Pen) -> str:
    return TITLES[name].format(side=SIDES[by.model.image_shape[0]])


def _text(name: str, figure: float) -> str:
    return f"{figure:.1%}" if name in SHARES else f"{figure:.2f}"


def _brief(name: str, limit: float) -> str:
    return f"{100 * limit:g}%" if name in SHARES else f"{limit:g}"


def _medians(figures: Sequence[Figures]) -> Figures:
    return Figures(*(float(np.median(values)) for values in zip(*figures, strict=True)))


def _some(split: Split, number: int, seed: int) -> Tensor:
    """`number` training images, by index, with the same weight for each class."""
    deck = evened(split.train_y, 0)
    order = torch.randperm(len(deck), generator=torch.Generator().manual_seed(seed))
    return deck[order[:number]]


def _interval(text: str) -> tuple[float, float]:
    begin, end = map(float, text.split(","))
    if not 0 <= begin <= end <= 1:
        raise ValueError
    return begin, end


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m weights.quality", description="Judge the images drawn.")
    parser.add_argument("folder", type=Path, help="a folder of weights with training.toml, such as weights/digits")
    parser.add_argument("--seed", type=int, default=0, help="of the first image, and of the classifier (0)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="instead of the recommended one")
    parser.add_argument("--steps", type=int, metavar="N", dest="num_inference_steps", help="instead of the recommended")
    parser.add_argument("--guidance", type=float, metavar="SCALE", dest="guidance_scale", help="likewise; 1 is off")
    parser.add_argument("--interval", type=_interval, default=ALL_STEPS, metavar="FROM,TO", help="guided steps (0,1)")
    parser.add_argument("--precision", choices=("auto", *get_args(Precision)), default="auto", help="as the server's")
    parser.add_argument("--sheet", type=Path, metavar="PATH.png", help="save 16 drawn images of each class, unselected")
    args = parser.parse_args()
    for option, value in (("--steps", args.num_inference_steps), ("--guidance", args.guidance_scale)):
        if value is not None and not value >= 1:
            parser.error(f"{option} must be at least 1, and is {value}")
    return args


if __name__ == "__main__":
    main()
