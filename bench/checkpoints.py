"""Measure loading checkpoints of published sizes, and a step of each.

    python -m bench.checkpoints [--rounds 5]

Writes pipelines of the diffusers library with random weights into a temporary folder: the networks of
google/ddpm-cifar10-32 and google/ddpm-*-256, and a tiny one. Each is loaded in a fresh process, in turn, so that a slow
moment of the machine meets all of them. Measures seconds from file to network, with the file in the system's cache;
peak resident memory above the process with the tiny network; and seconds a step. Writes
bench/figures/checkpoints.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import record
from bench.architectures import CELEBAHQ, CIFAR10, TINY, write
from bench.bare import random_inputs
from bench.machine import machine
from bench.peak import peak_bytes
from model.backends.choose import choose
from model.backends.network import denoiser
from model.checkpoints.load import load
from service.config import available_cores

ROOT = Path(__file__).parent.parent
NAMES = {"tiny": TINY, "google/ddpm-cifar10-32": CIFAR10, "google/ddpm-*-256": CELEBAHQ}


def measure(folder: Path, with_step: bool) -> None:
    """Load one checkpoint in this process, and print seconds and memory."""
    began = time.perf_counter()
    checkpoint = load(folder)
    seconds = time.perf_counter() - began
    model = checkpoint.description
    figures: dict[str, float] = {
        "seconds": seconds,
        "peak": peak_bytes(),
        "parameters": model.num_parameters,
        "file": sum(file.stat().st_size for file in folder.glob("unet/*.safetensors")),
    }
    if with_step:
        network = denoiser(checkpoint.network, model)
        make = choose(network, torch.device("cpu"), "auto", available_cores(), 1, cache_dir=None)
        backend, inputs = make(model.sample_shape), random_inputs(network, 1)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            backend.start(inputs)()
            times.append(time.perf_counter() - began)
        figures["step"] = statistics.median(times[1:])
    print(json.dumps(figures))


def measured(folder: Path, with_step: bool) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.checkpoints", "--measure", str(folder), *(["--step"] if with_step else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="fresh processes for each checkpoint")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="measure this one, here and now")
    parser.add_argument("--step", action="store_true", help="also its seconds per step")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.step)
        return
    with tempfile.TemporaryDirectory() as work:
        folders = {name: Path(work) / str(i) for i, name in enumerate(NAMES)}
        for name, folder in folders.items():
            write(folder, NAMES[name])
        rounds = [{name: measured(folder, False) for name, folder in folders.items()} for _ in range(args.rounds)]
        steps = {name: measured(folder, True)["step"] for name, folder in folders.items() if name != "tiny"}

    rows = {}
    for name in steps:
        own = [figures[name] for figures in rounds]
        above = statistics.median(figures[name]["peak"] - figures["tiny"]["peak"] for figures in rounds)
        file = own[0]["file"]
        seconds = statistics.median(figures["seconds"] for figures in own)
        rows[name] = [own[0]["parameters"] / 1e6, file / 1e6, seconds, above / 1e6, above / file, steps[name]]
    columns = {
        "parameters": "{:.1f} M",
        "file": "{:.0f} MB",
        "load": "{:.2f} s",
        "peak memory": "{:.0f} MB",
        "of the file": "{:.2f}",
        "seconds per step, one image": "{:.3f}",
    }
    record.save("checkpoints", machine(), args.rounds, {"checkpoints": record.Table("checkpoint", columns, rows)})


if __name__ == "__main__":
    main()
