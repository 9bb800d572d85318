"""Pictures of docs/weights.md, and the figures under them.

    python -m weights.pictures weights/digits weights/digits-4step docs

Draws a digit of each class along its steps; the teacher's digits beside the student's, of the same seeds; and, 1,000
digits a point, how accuracy and Fréchet distance depend on the number of steps, for each sampler. Prints the last as a
Markdown table.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from model.samplers import SAMPLERS
from service.images import UInt8
from weights.drawing import CLASSES, Pen, draw, draw_along, pen, save
from weights.quality import Figures, Held, exam, origin

STEPS = (1, 2, 4, 8, 15)
DIGITS = 1_000  # a point
PAIRS = 8  # of each class
ENLARGED = 2

Curves = Mapping[str, Mapping[int, Figures]]  # by sampler and number of steps


def along(by: Pen) -> UInt8:
    """A digit of each class, a row, from noise to its last step."""
    images = draw_along(by, by.model.recommended, 0, CLASSES)
    return np.concatenate([np.concatenate(list(row), axis=1) for row in images.swapaxes(0, 1)])


def side_by_side(teacher: Pen, student: Pen) -> UInt8:
    """Digits of each class, two rows a class: the teacher's above the student's."""
    rows = []
    drawn = [draw(by, by.model.recommended, 0, PAIRS * CLASSES) for by in (teacher, student)]
    for label in range(CLASSES):
        rows += [np.concatenate(list(digits[label::CLASSES]), axis=1) for digits in drawn]
    return np.concatenate(rows)


def curves(teacher: Pen, student: Pen, held: Held) -> Curves:
    """How digits at each sampler's steps compare with the held-out."""

    def judged(by: Pen, sampler: str, steps: int) -> Figures:
        settings = replace(by.model.recommended, sampler=sampler, num_inference_steps=steps)
        return held.compare_drawn(draw(by, settings, 0, DIGITS))

    found = {sampler: {steps: judged(teacher, sampler, steps) for steps in STEPS} for sampler in SAMPLERS}
    assert student.model.distilled is not None
    sampler, counts = student.model.distilled.sampler, student.model.distilled.num_inference_steps
    return {**found, f"{sampler}, {student.model.name}": {steps: judged(student, sampler, steps) for steps in counts}}


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
    """Accuracy, distance and coverage of each point."""
    lines = [f"| | {' | '.join(f'{n} steps' for n in STEPS)} |".replace("| 1 steps", "| 1 step")]
    lines.append(f"|---|{'---|' * len(STEPS)}")
    for name, by_steps in found.items():
        cells = [
            f"{f.accuracy:.1%}, {f.in_features:.2f}, {f.coverage_in_features:.1%}" if (f := by_steps.get(n)) else ""
            for n in STEPS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.pictures", description="Draw the pictures of the docs.")
    parser.add_argument("teacher", type=Path, help="a folder of weights, such as weights/digits")
    parser.add_argument("student", type=Path, help="those distilled from them, such as weights/digits-4step")
    parser.add_argument("target", type=Path, help="the folder for the pictures")
    args = parser.parse_args()
    teacher, student = (pen(folder, "auto") for folder in (args.teacher, args.student))
    split, judge = exam(origin(args.student), seed=0)
    for by in (teacher, student):
        save(args.target / f"{by.model.name}-along.png", along(by), ENLARGED)
    save(args.target / "teacher-student.png", side_by_side(teacher, student), ENLARGED)
    found = curves(teacher, student, Held(judge, split))
    plot(found, args.target / "steps.png")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
