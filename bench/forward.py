"""The picture in docs/how-it-works.md: noise levels, a digit that becomes noise, and estimates from one pass.

python -m bench.forward docs/forward.png
"""

import argparse
from math import sqrt
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, FigureBase

from model.noise import first_draw
from model.rows import Condition, Forward, Image, Row
from model.samplers import denoise_table, sample_table
from model.schedule import Schedule
from weights.drawing import Pen, draw, pen, sheet, to_pixels

WEIGHTS = Path("weights/digits")
TIMESTEPS = (0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999)
LABEL = 7


def noised(clean: Image, timestep: int, schedule: Schedule, seed: int) -> Image:
    """The noisy image at a timestep. Ho et al. 2020, arXiv:2006.11239, eq. 4."""
    alpha_bar = float(schedule.alphas_cumprod[timestep])
    noise = first_draw(seed, (clean.shape[0], clean.shape[1], clean.shape[2]))
    return np.float32(sqrt(alpha_bar)) * clean + np.float32(sqrt(1 - alpha_bar)) * noise


def estimates(by: Pen, noisy: list[Image]) -> list[Image]:
    """The network's x_0 of each noisy image, from one pass with rows at different timesteps."""
    runner = by.runner(slots=len(noisy))
    tables = [denoise_table(by.model.schedule, "ddim", timestep, 1) for timestep in TIMESTEPS]
    rows = [
        Row(table, seed=0, group=by.model.group, start=x, branches=(Condition(LABEL),))
        for table, x in zip(tables, noisy, strict=True)
    ]
    slots = [runner.admit(row) for row in rows]
    runner.step([Forward(slot, 0, 0) for slot in slots])
    return [runner.read(slot).x for slot in slots]


def levels(figure: FigureBase, by: Pen) -> None:
    """Draw the shares of signal and noise in x_t, and the recommended steps."""
    panel = figure.subplots()
    t = np.arange(by.model.schedule.num_train_timesteps)
    for schedule, name, style in (
        (by.model.schedule, "cosine, the digits'", "-"),
        (Schedule(beta_schedule="linear"), "linear, DDPM's", ":"),
    ):
        alpha_bar = schedule.alphas_cumprod
        panel.plot(t, np.sqrt(alpha_bar), style, color="C0", label=f"signal √ᾱ, {name}")
        panel.plot(t, np.sqrt(1 - alpha_bar), style, color="C3", label=f"noise √(1−ᾱ), {name}")
    recommended = by.model.recommended
    table = sample_table(by.model.schedule, recommended.sampler, recommended.num_inference_steps)
    marks = f"the {len(table)} steps of {recommended.sampler}"
    panel.plot(table.timesteps, np.zeros(len(table)), "|", color="black", markersize=12, label=marks)
    panel.set_xlabel("timestep t")
    panel.margins(x=0.01)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def strip(figure: FigureBase, by: Pen) -> None:
    """Draw a digit at each noise level, with the network's estimate below."""
    pixels = draw(by, by.model.recommended, seed=0, number=by.classes)[LABEL]
    clean = pixels[None].astype(np.float32) / 127.5 - 1
    noisy = [noised(clean, timestep, by.model.schedule, seed=1) for timestep in TIMESTEPS]
    rows = np.stack([to_pixels(noisy), to_pixels(estimates(by, noisy))])
    panel = figure.subplots()
    panel.imshow(sheet(rows), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    side = pixels.shape[0]
    panel.set_xticks([side * (i + 0.5) for i in range(len(TIMESTEPS))], [f"t = {t}" for t in TIMESTEPS])
    panel.set_yticks([side * 0.5, side * 1.5], ["noised", "one pass"])
    panel.tick_params(length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.forward", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    by = pen(WEIGHTS, "float32")
    figure = Figure(figsize=(9, 4.6), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 1, height_ratios=[1.35, 1])
    levels(figure.add_subfigure(grid[0]), by)
    strip(figure.add_subfigure(grid[1]), by)
    figure.savefig(args.picture, dpi=110)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
