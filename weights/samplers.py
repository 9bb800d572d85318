"""Compares the samplers: one seed side by side, and how far their images are from real ones for the same work.

    python -m weights.samplers weights/digits docs/samplers.png
    python -m weights.samplers weights/digits docs/samplers.png --images 200

Without guidance, a line of a sampler's table is one forward row. Each point has the largest number of steps whose lines
are not more than the given forward rows. The distance is the Fréchet distance between pixels, averaged to 8x8, of drawn
and held-out images, in distances between the halves of the held-out. It is printed as a Markdown table.
"""

import argparse
from contextlib import suppress
from pathlib import Path

import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from model.description import Recommended
from model.grids import GridError
from model.samplers import SAMPLERS, sample_table
from model.schedule import Float64, Schedule
from weights import data
from weights.drawing import Pen, draw, pen
from weights.exam import origin, split_of
from weights.measures import frechet_distance

ROWS = (4, 8, 16)  # forward rows of an image
LABEL, SEED = 7, 7  # of the picture
SIDE = 8  # pixels


def settings_of(schedule: Schedule, sampler: str, rows: int) -> Recommended | None:
    """The most steps whose lines are at most so many; None if the sampler has no such table."""
    for steps in range(rows, 0, -1):
        with suppress(GridError):
            if len(sample_table(schedule, sampler, steps)) <= rows:
                return Recommended(sampler, steps, guidance_scale=1.0)
    return None


def plot(by: Pen, path: Path) -> None:
    """A column for each sampler and a line for each number of forward rows, all from one seed."""
    figure = Figure(figsize=(1.02 * len(SAMPLERS), 1.1 * len(ROWS) + 0.4), layout="constrained", facecolor="white")
    panels = figure.subplots(len(ROWS), len(SAMPLERS))
    for line, rows in zip(panels, ROWS, strict=True):
        for panel, sampler in zip(line, SAMPLERS, strict=True):
            settings = settings_of(by.model.schedule, sampler, rows)
            if settings is not None:
                images = draw(by, settings, SEED - LABEL, LABEL + 1)
                panel.imshow(images[LABEL], cmap="gray", vmin=0, vmax=255)
            panel.set_xticks([])
            panel.set_yticks([])
            if rows == ROWS[0]:
                panel.set_title(sampler, fontsize=9)
        line[0].set_ylabel(f"{rows} rows", fontsize=9)
    figure.savefig(path, dpi=110)
    print(f"picture: {path}")


def measure(by: Pen, split: data.Split, images: int) -> None:
    """Print a line of the table for each sampler."""
    held_out = points(split.held_out_x)
    middle = len(held_out) // 2
    halves = frechet_distance(held_out[:middle], held_out[middle:])
    print(f"| | {' | '.join(f'{rows} rows' for rows in ROWS)} |\n|---|{'---:|' * len(ROWS)}")
    for sampler in SAMPLERS:
        cells = []
        for rows in ROWS:
            settings = settings_of(by.model.schedule, sampler, rows)
            if settings is None:
                cells.append("")
                continue
            drawn = points(data.scaled(draw(by, settings, 0, images)))
            cells.append(f"{frechet_distance(drawn, held_out) / halves:.1f}")
        print(f"| `{sampler}` | {' | '.join(cells)} |", flush=True)


def points(x: Tensor) -> Float64:
    """Images [N, C, H, W] as points [N, D]."""
    small: Float64 = F.adaptive_avg_pool2d(x, SIDE).flatten(1).double().numpy()
    return small


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.samplers", description="Compare the samplers.")
    parser.add_argument("folder", type=Path, help="a folder of weights, such as weights/digits")
    parser.add_argument("target", type=Path, help="the picture")
    parser.add_argument("--images", type=int, default=0, help="of each point of the table; 0: no table")
    args = parser.parse_args()
    by = pen(args.folder, "auto")
    plot(by, args.target)
    if args.images:
        measure(by, split_of(origin(args.folder)), args.images)


if __name__ == "__main__":
    main()
