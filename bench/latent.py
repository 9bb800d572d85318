"""The costs of latent diffusion: seconds and memory of steps, decoding and encoding.

    python -m bench.latent [--folder DIR] [--rounds 5]

Writes weights of the size of CompVis/ldm-celebahq-256 with random values, 1.3 GB, and loads them as the server does, in
a fresh process for each measurement of memory. Writes bench/figures/latent.json: seconds; an image of 50 steps with the
shares of its steps and its decoding; resident memory from the start to the first image, mapped files included; and the
autoencoder decoding images of several sizes. The memory of a large image is the difference to a process with a tiny
image.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from bench import record
from bench.bare import random_inputs
from bench.machine import machine
from bench.peak import peak_bytes
from model.backends.backend import Backend, Inputs, Precision
from model.backends.choose import choose
from model.backends.conversion import converted
from model.backends.memory import resident
from model.backends.network import Network, decoder, denoiser
from model.backends.openvino import computes_bfloat16
from model.checkpoints import native
from model.checkpoints.config import ModelConfig, UNet2DModelConfig
from model.checkpoints.load import find, load, load_autoencoder
from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder, AutoencoderConfig
from model.nets.unet2d import UNet2DConfig
from model.rows import Group
from model.schedule import Schedule
from model.vae import VAE, choose_vae
from service.config import available_cores

STEPS = 50  # of an image
SIDES = (128, 256, 512)  # of decoded images, in pixels
TINY_SIDE = 32  # of an image that takes almost no memory
CPU = torch.device("cpu")

CELEBAHQ = UNet2DModelConfig(  # the other fields are diffusers' defaults, which were made for this network
    architecture="unet_2d",
    name="ldm-celebahq-256",
    image_size=(256, 256),
    network=UNet2DConfig(attention_head_dim=32),
    autoencoder=AutoencoderConfig(
        kind="vq",
        latent_channels=3,
        num_vq_embeddings=8192,
        block_out_channels=(128, 256, 512),
        layers_per_block=2,
    ),
    schedule=Schedule(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False),
)

P = ParamSpec("P")
T = TypeVar("T")


def apart(measure: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call in a new process, so that nothing else adds to its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *args, **kwargs).result()


def write(config: ModelConfig, folder: Path) -> None:
    """Save random weights."""
    assert config.autoencoder is not None
    torch.manual_seed(0)
    native.save(config.build(), Autoencoder(config.autoencoder), config, folder)


class Loaded(NamedTuple):
    """Weights on their backends, and the inputs of a pass of two rows."""

    model: ModelDescription
    backend: Backend
    vae: VAE
    inputs: Inputs


def loaded(folder: Path, cache: Path, precision: Precision, max_batch: int | None) -> Loaded:
    """Weights, loaded as in the server."""
    threads = available_cores()
    torch.set_num_threads(threads)
    checkpoint = load(folder)
    model = checkpoint.description
    assert checkpoint.autoencoder is not None
    network = denoiser(checkpoint.network, model)
    backend = choose(network, CPU, precision, threads, max_batch, cache)(model.sample_shape)
    vae = choose_vae(checkpoint.autoencoder, model, CPU, precision, threads, cache)(model.group, None)
    return Loaded(model, backend, vae, random_inputs(network, 2))


def step(backend: Backend, inputs: Inputs, rows: int) -> None:
    backend.start({name: values[:rows] for name, values in inputs.items()})()


def medians(cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case, measured in turn. The first round compiles and does not count."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(1 + rounds):
        for name, run in cases.items():
            began = perf_counter()
            run()
            found[name].append(perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


# Seconds.


def times(folder: Path, cache: Path, precision: Precision, rounds: int) -> dict[str, float]:
    """Seconds of every operation that a request may need."""
    model, backend, vae, inputs = loaded(folder, cache, precision, max_batch=2)
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(model.sample_shape, generator=rng).numpy()
    image = torch.rand(model.image_shape, generator=rng).numpy()
    unscaled = load_autoencoder(folder).unscaled
    return medians(
        {
            "a step of 1 row": partial(step, backend, inputs, 1),
            "a step of 2 rows": partial(step, backend, inputs, 2),
            "decoding": lambda: vae.decode([latents]),
            "of it the search for codes, always in float32": lambda: unscaled(torch.from_numpy(latents)[None]),
            "encoding": lambda: vae.encode(image),
            "a preview": lambda: vae.preview(latents),
        },
        rounds,
    )


def times_table(found: Mapping[Precision, Mapping[str, float]]) -> record.Table:
    cases = next(iter(found.values()))
    rows = {case: [times[case] for times in found.values()] for case in cases}
    return record.Table("seconds", dict.fromkeys(found, "{:.3g}"), rows)


def image_table(found: Mapping[Precision, Mapping[str, float]]) -> record.Table:
    """The seconds of an image of STEPS steps, and the shares of its parts."""
    rows: dict[str, list[float]] = {}
    for precision, times in found.items():
        steps, decoding = STEPS * times["a step of 1 row"], times["decoding"]
        whole = steps + decoding
        rows[precision] = [whole, steps / whole, decoding / whole]
    columns = {"seconds": "{:.1f}", "of it steps": "{:.1%}", "of it decoding": "{:.1%}"}
    return record.Table(f"an image of {STEPS} steps", columns, rows)


# Memory.


class Memory(NamedTuple):
    """Resident bytes of a process from its start to its first image, and the seconds of loading."""

    before: int
    after_loading: int
    after_a_step: int
    after_decoding: int
    peak: int
    seconds: float


def memory(folder: Path, cache: Path, precision: Precision) -> Memory:
    before, began = resident(), perf_counter()
    model, backend, vae, inputs = loaded(folder, cache, precision, max_batch=None)
    after_loading, seconds = resident(), perf_counter() - began
    step(backend, inputs, 1)
    after_a_step = resident()
    vae.decode([torch.randn(model.sample_shape).numpy()])
    return Memory(before, after_loading, after_a_step, resident(), peak_bytes(), seconds)


def memory_table(found: Mapping[str, Memory]) -> record.Table:
    sizes = ("before loading", "loaded", "after a step", "after decoding", "peak")
    columns = {**dict.fromkeys(sizes, "{:.0f}"), "seconds to load": "{:.1f}"}
    rows = {name: [*(size / 1e6 for size in held), seconds] for name, (*held, seconds) in found.items()}
    return record.Table("resident, MB", columns, rows)


# Images of other sizes.


class Decoding(NamedTuple):
    """One decoded image: seconds, and the peak memory of the process."""

    seconds: float
    peak: int


def decoder_of(autoencoder: Autoencoder, config: ModelConfig) -> tuple[Network, ModelDescription]:
    with torch.device("meta"):
        unet = config.build()
    model = config.describe(unet, autoencoder, "latent", "latent")
    return decoder(autoencoder, model), model


def prepare(folder: Path, cache: Path) -> None:
    """Convert the decoder in advance, because conversion takes extra memory."""
    torch.set_num_threads(1)
    half, _ = decoder_of(load_autoencoder(folder), find(folder).config)
    converted(half, cache)


def decoding(folder: Path, cache: Path, precision: Precision, side: int, rounds: int) -> Decoding:
    autoencoder = load_autoencoder(folder)
    half, model = decoder_of(autoencoder, find(folder).config)
    shape, unscaled = model.sample_shape_of(Group(side, side)), autoencoder.unscaled
    backend = choose(half, CPU, precision, available_cores(), 1, cache)(shape)
    del autoencoder, half  # the server does not hold them either
    z = torch.randn(1, *shape)
    [seconds] = medians({"": lambda: backend.start({"x": unscaled(z)})()}, rounds).values()
    return Decoding(seconds, peak_bytes())


def sizes_table(found: Mapping[Precision, Mapping[int, Decoding]]) -> record.Table:
    """The first size of each precision is the tiny one, which is not shown."""
    tiny, *sides = next(iter(found.values()))
    forms = {"seconds": "{:.2f}", "MB": "{:.0f}", "bytes a pixel": "{:,.0f}"}
    columns = {f"{precision}: {what}": form for precision in found for what, form in forms.items()}
    rows: dict[str, list[float]] = {f"{side}×{side}": [] for side in sides}
    for of in found.values():
        for side in sides:
            above = of[side].peak - of[tiny].peak
            rows[f"{side}×{side}"] += [of[side].seconds, above / 1e6, above / side**2]
    return record.Table("decoding", columns, rows)


def tables(
    config: ModelConfig, work: Path, sides: Sequence[int], tiny_side: int, rounds: int
) -> dict[str, record.Table]:
    """Measure everything. Files stay in the folder `work`."""
    folder, cache = work / "weights", work / "cache"
    apart(write, config, folder)
    precisions: list[Precision] = ["float32", "bfloat16"] if computes_bfloat16() else ["float32"]
    held = {"the first start, which converts": apart(memory, folder, cache, precisions[0])}
    held |= {f"{precision}, later": apart(memory, folder, cache, precision) for precision in precisions}
    seconds = {precision: apart(times, folder, cache, precision, rounds) for precision in precisions}

    all_sides = [tiny_side, *sides]
    apart(prepare, folder, cache)
    decoded = {
        precision: {side: apart(decoding, folder, cache, precision, side, rounds) for side in all_sides}
        for precision in precisions
    }
    return {
        "times": times_table(seconds),
        "image": image_table(seconds),
        "memory": memory_table(held),
        "sizes": sizes_table(decoded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latent", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where 3 GB are kept for the while")
    parser.add_argument("--rounds", type=int, default=5, help="of which each time is the median; default: %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        record.save("latent", machine(), args.rounds, tables(CELEBAHQ, Path(work), SIDES, TINY_SIDE, args.rounds))


if __name__ == "__main__":
    main()
