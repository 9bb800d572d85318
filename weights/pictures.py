"""Draws the pictures of docs/weights.md.

    python -m weights.pictures weights/digits weights/digits-4step docs
    python -m weights.pictures weights/emoji docs

For weights and weights distilled from them: an image of each class after each step; the teacher's and the student's
images with the same seeds; and accuracy and Fréchet distance by sampler and number of steps, with 1,000 images for each
point. Prints the latter as a Markdown table.

For other weights, with one class in each line of a picture: unselected images; images and the nearest training image of
each; and for a latent model held-out images and their reconstructions.
"""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from model.grids import GridError
from model.samplers import SAMPLERS
from service.http.png import UInt8
from weights import data
from weights.drawing import Pen, by_class, draw, draw_along, pen, reconstructed, save, sheet, to_pixels
from weights.exam import Exam, Figures, Held, exam, nearest_training, origin, split_of

STEPS = (1, 2, 4, 8, 15)
IMAGES = 1_000  # per point of the curves
PAIRS = 8  # per class
COLUMNS = 16  # of a sheet
GAP = 8  # pixels between pairs
ENLARGED = 2

Curves = Mapping[str, Mapping[int, Figures]]  # by sampler and number of steps


def along(by: Pen) -> UInt8:
    """One line for each class: an image from its noise to its last step."""
    return sheet(draw_along(by, by.model.recommended, 0, by.classes).swapaxes(0, 1))


def side_by_side(teacher: Pen, student: Pen) -> UInt8:
    """Two lines for each class: the teacher's images above the student's."""
    drawn = [draw(by, by.model.recommended, 0, PAIRS * by.classes) for by in (teacher, student)]
    return sheet(np.stack([images[label :: teacher.classes] for label in range(teacher.classes) for images in drawn]))


def of_each_class(by: Pen) -> UInt8:
    """One line for each class: unselected images."""
    return by_class(draw(by, by.model.recommended, 0, COLUMNS * by.classes), by.classes, COLUMNS)


def beside_nearest(by: Pen, split: data.Split) -> UInt8:
    """One line for each class: images, each to the left of the nearest training image."""
    drawn = draw(by, by.model.recommended, 0, PAIRS * by.classes)
    return pairs(drawn, nearest_training(split, drawn), by.classes)


def beside_reconstructions(by: Pen, split: data.Split) -> UInt8:
    """One line for each class: the first held-out images, each to the left of its reconstruction."""
    assert by.vae is not None
    of_class = [(split.held_out_y == label).nonzero()[:PAIRS, 0] for label in range(by.classes)]
    columns = min(map(len, of_class))
    chosen = split.held_out_x[torch.stack([which[:columns] for which in of_class], dim=1).flatten()]
    return pairs(to_pixels(chosen.numpy()), reconstructed(by.vae, chosen), by.classes)


def pairs(left: UInt8, right: UInt8, classes: int) -> UInt8:
    """A sheet of pairs of images, with white between pairs. Pair i has the class i % classes."""
    both = np.concatenate([left, right], axis=2)
    gap = [(0, 0), (0, 0), (0, GAP), *((0, 0) for _ in both.shape[3:])]
    return by_class(np.pad(both, gap, constant_values=255), classes, PAIRS)


def curves(teacher: Pen, student: Pen, held: Held) -> Curves:
    """The figures for each sampler and each number of steps that it takes."""

    def judged(by: Pen, sampler: str, counts: Sequence[int]) -> dict[int, Figures]:
        found = {}
        for steps in counts:
            settings = replace(by.model.recommended, sampler=sampler, num_inference_steps=steps)
            with suppress(GridError):
                found[steps] = held.compare_drawn(draw(by, settings, 0, IMAGES))
        return found

    found = {sampler: judged(teacher, sampler, STEPS) for sampler in SAMPLERS}
    assert student.model.distilled is not None
    sampler, counts = student.model.distilled.sampler, student.model.distilled.num_inference_steps
    return {**found, f"{sampler}, {student.model.name}": judged(student, sampler, counts)}


def plot(found: Curves, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained", facecolor="white")
    accuracy, distance = figure.subplots(1, 2)
    for name, by_steps in found.items():
        steps = list(by_steps)
        accuracy.plot(steps, [100 * by_steps[n].accuracy for n in steps], marker="o", label=name)
        distance.plot(steps, [by_steps[n].in_features for n in steps], marker="o", label=name)
    accuracy.set_ylabel("seen as asked for, %")
    distance.set_ylabel("Fréchet distance of features, halves")
    distance.set_yscale("log")
    for panel in (accuracy, distance):
        panel.set_xscale("log")
        panel.set_xticks(STEPS, map(str, STEPS))
        panel.minorticks_off()
        panel.set_xlabel("steps")
        panel.grid(alpha=0.3)
    accuracy.legend(frameon=False)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def table(found: Curves) -> str:
    """A Markdown table of accuracy, distance and coverage at each point."""
    lines = [f"| | {' | '.join(f'{n} steps' for n in STEPS)} |".replace("| 1 steps", "| 1 step")]
    lines.append(f"|---|{'---|' * len(STEPS)}")
    for name, by_steps in found.items():
        cells = [
            f"{f.accuracy:.1%}, {f.in_features:.2f}, {f.coverage_in_features:.1%}" if (f := by_steps.get(n)) else ""
            for n in STEPS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_distilled(teacher: Pen, student: Pen, by: Exam, target: Path) -> None:
    for one in (teacher, student):
        save(target / f"{one.model.name}-along.png", along(one), ENLARGED)
    save(target / "teacher-student.png", side_by_side(teacher, student), ENLARGED)
    found = curves(teacher, student, Held(by.judge, by.split))
    plot(found, target / "steps.png")
    print(f"\n{table(found)}")


def draw_alone(by: Pen, split: data.Split, target: Path) -> None:
    name = by.model.name
    save(target / f"{name}.png", of_each_class(by), ENLARGED)
    save(target / f"{name}-neighbours.png", beside_nearest(by, split), ENLARGED)
    if by.vae is not None:
        save(target / f"{name}-reconstructions.png", beside_reconstructions(by, split), ENLARGED)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.pictures", description="Draw the pictures of the docs.")
    parser.add_argument("folder", type=Path, help="a folder of weights, such as weights/digits")
    parser.add_argument("student", type=Path, nargs="?", help="those distilled from them, such as weights/digits-4step")
    parser.add_argument("target", type=Path, help="the folder for the pictures")
    args = parser.parse_args()
    by, first = pen(args.folder, "auto"), origin(args.folder)
    if args.student is None:
        draw_alone(by, split_of(first), args.target)
    else:
        draw_distilled(by, pen(args.student, "auto"), exam(first, seed=0), args.target)


if __name__ == "__main__":
    main()
