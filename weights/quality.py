"""Judge the digits that the weights in the box draw.

    python -m weights.quality weights/digits [--precision bfloat16]

Draws 1,000 digits, 100 a class, at the recommended settings or at others, and shows a classifier the 8-bit pixels that
a client would get. Two figures come out: how often it sees the digit that was asked for, and the Fréchet distance
between the drawn and all held-out digits, as a multiple of the distance between the two halves of the held-out. At the
recommended settings the command fails where a figure is worse than it should be.

The classifier is trained on the training digits first, and kept in FOLDER/work for the next time.
"""

import argparse
import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor
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
from weights.train import Training

Float64 = NDArray[np.float64]

CLASSES, PER_CLASS = 10, 100
LEAST_ACCURACY = 0.98
MOST_HALVES = 1.5
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


def features(judge: Classifier, x: Tensor) -> Float64:
    """The classifier's features of digits x [N, 1, H, W], [N, 64]."""
    with torch.inference_mode():
        return judge.features(x).double().numpy()


def frechet_distance(a: Float64, b: Float64) -> float:
    """The Fréchet distance between Gaussians fitted to features a [N, D] and b [M, D].

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½), Heusel et al. 2017, arXiv:1706.08500, eq. 6. The product under the
    root has the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    of_product = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(of_product).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


class Figures(NamedTuple):
    """What the classifier sees: shares of digits seen as their labels, and Fréchet distances."""

    accuracy_on_held_out: float
    accuracy_on_drawn: float
    halves: float
    drawn_to_held_out: float


def compare(judge: Classifier, split: data.Split, pixels: UInt8) -> Figures:
    """Compare drawn digits [N, H, W] with the held-out, and the first half of the held-out with the second."""
    drawn = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1
    held_out = features(judge, split.held_out_x)
    middle = len(held_out) // 2
    return Figures(
        accuracy(judge, split.held_out_x, split.held_out_y),
        accuracy(judge, drawn, torch.arange(len(drawn)) % CLASSES),
        frechet_distance(held_out[:middle], held_out[middle:]),
        frechet_distance(features(judge, drawn), held_out),
    )


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
        pixels = draw(backend, model, settings, args.seed)
    except (CheckpointError, GridError) as error:
        sys.exit(f"quality: {error}")
    if args.sheet:
        save_sheet(args.sheet, pixels)

    figures = compare(judge, split, pixels)
    in_halves = figures.drawn_to_held_out / figures.halves
    print(
        f"\n{backend.fingerprint['backend']}, {backend.fingerprint['precision']}, "
        f"{settings.sampler}, {settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}, "
        f"{len(pixels):,} digits with the seeds {args.seed} to {args.seed + len(pixels) - 1}"
    )
    for name, figure, limit in (
        (f"accuracy on {len(split.held_out_x):,} held-out digits", f"{figures.accuracy_on_held_out:.2%}", ""),
        ("accuracy on the drawn digits", f"{figures.accuracy_on_drawn:.2%}", f"at least {LEAST_ACCURACY:.0%}"),
        ("Fréchet distance, two halves of the held-out", f"{figures.halves:.2f}", ""),
        ("Fréchet distance, drawn to held-out", f"{figures.drawn_to_held_out:.2f}", ""),
        ("  divided by that of the halves", f"{in_halves:.2f}", f"at most {MOST_HALVES}"),
    ):
        print(f"  {name:<46}{figure:>7}   {limit}".rstrip())
    if settings == model.recommended and (figures.accuracy_on_drawn < LEAST_ACCURACY or in_halves > MOST_HALVES):
        sys.exit("The digits drawn at the recommended settings are worse than they should be.")


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
