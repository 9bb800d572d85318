"""Text to image at full size: starts, memory, seconds and precision, beside diffusers.

    python -m bench.text [--folder DIR] [--only sd15,sdxl] [--parts start,steps,ratio,precision]

Writes pipelines of the sizes of Stable Diffusion 1.5 and SDXL base with random weights in float16 (2 and 7 GB), and
measures them as published ones would be: an operation costs the same whatever its weights are. Stepwise is the real
server, over HTTP, in bfloat16 where the processor computes it. diffusers computes with torch, in float32 and bfloat16,
with as many threads. Each system has its own process. Only one computes at a time, and only in `ratio` are two loaded.

start: seconds and peak memory from the start of the process to ready, first with an empty cache, then with a full one;
    one size, passes of one row. diffusers is ready when its pipeline is loaded; Stepwise has also drawn a probe and
    measured its costs.
steps: seconds of a row's step, of a prompt, of decoding. Stepwise may make passes of two rows if they keep the bits of
    one; the table says what its start found. The server's own clock gives the seconds of requests of one step, whose
    two rows are those of guidance. diffusers' step is its U-Net alone.
ratio: a step of two rows of Stable Diffusion 1.5, in pairs. Both systems stay loaded and take turns, and the server is
    stopped while diffusers computes. Stepwise has its default settings; diffusers has its own, and then channels_last,
    in which torch may be faster.
precision: images of Stable Diffusion 1.5 at 256x256 in bfloat16 and in float32, with guidance 7.5. Random weights draw
    textures. Writes docs/text-precision.png.

Results are kept in DIR/text.json after each case, so a run goes on where it stopped. A case that fails, as for want of
memory, is tried again by the next run. Delete the file after a change of the code. The weights were just written or
read, so they are in the system's cache. Nothing else may compute meanwhile: torch's threads wait for each other, and
lose more by it than Stepwise's. Writes bench/figures/text.json, which bench/TEXT.md shows. Takes up to an hour on two
cores, and 30 GB of disk.
"""

import argparse
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from time import perf_counter
from typing import ParamSpec, TypeVar

import numpy as np
from PIL import Image

from bench import record, text_precision, text_tables, text_weights
from bench.machine import machine
from bench.pairs import Pairs
from bench.peak import Held
from bench.servers import ROOT
from bench.text_systems import Diffusers, stepwise
from bench.text_tables import DTYPES, FORMATS, Found, Key, Model
from bench.text_weights import Architecture
from model.rows import Group
from service.build import BOX

ARCHITECTURES = {"sd15": text_weights.SD15, "sdxl": text_weights.SDXL}
MODELS = {
    "sd15": Model("SD 1.5", (Group(512, 512), Group(256, 256))),
    "sdxl": Model("SDXL base", (Group(1024, 1024), Group(512, 512))),
}
PARTS = ("start", "steps", "ratio", "precision")
STARTS = {"sd15": 3, "sdxl": 1}  # later starts at the larger size
ROUNDS = 5  # of a step
PAIRS = 12
SEEDS = 4
STEPS = 20  # of an image of `precision`
SHOWN = 2  # of its images
PICTURE = ROOT / "docs" / "text-precision.png"
_LONG = 45.0  # seconds, for the rounds of one operation
_AT_MOST = 3600.0  # seconds, after which no case begins
_FAILURE = 120  # characters

P = ParamSpec("P")
T = TypeVar("T")


class Cases:
    """Runs cases, and keeps what they find in a file.

    Args:
        path: the file; cases that it has are not run again.
        seconds: after which no case begins.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._deadline = perf_counter() + seconds
        self.results: dict[Key, Found] = {}
        if path.is_file():
            kept: Mapping[str, Found] = json.loads(path.read_text())
            self.results = {Key(*name.split("; ")): found for name, found in kept.items()}

    def run(self, key: Key, measure: Callable[P, Found], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run a case, unless its results are known."""
        if "failed" not in self.results.get(key, {"failed": ""}):
            return
        print(f"{key} …", flush=True)
        if perf_counter() > self._deadline:
            self.results[key] = {"failed": "there was no time left"}
        else:
            try:
                self.results[key] = measure(*args, **kwargs)
            except Exception as error:  # of any library: the table says it, and the other cases go on
                self.results[key] = {"failed": reason(error)}
        print(f"    {self.results[key]}", flush=True)
        self._path.write_text(json.dumps({str(key): found for key, found in self.results.items()}, indent=1))


def reason(error: Exception) -> str:
    """An error as a table can show it: the end of its last line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "failed: " + lines[-1].replace("|", "/")[-_FAILURE:]


def repeated(measure: Callable[[], T], most: int, seconds: float) -> list[T]:
    """Up to `most` results, one at least, for about so many seconds. The first does not count if there is a second."""
    found: list[T] = []
    began = perf_counter()
    while not found or (len(found) <= most and (perf_counter() - began) * (1 + 1 / len(found)) < seconds):
        found.append(measure())
    return found[1:] or found


# Parts.


class Bench:
    """The cases of one model.

    Args:
        name: of MODELS.
        model: its title and sizes.
        work: a folder for weights, caches and logs.
        picture: where the picture of `precision` goes.
    """

    def __init__(self, name: str, model: Model, work: Path, cases: Cases, picture: Path) -> None:
        self.name = name
        self.model = model
        self.weights = work / name
        self.cache = work / f"{name}-cache"
        self.log = work / f"{name}.log"
        self.cases = cases
        self.picture = picture

    def key(self, part: str, system: str = "", size: Group | str = "") -> Key:
        return Key(self.name, part, system, str(size))

    def write(self, architecture: Architecture) -> None:
        if not (self.weights / "model_index.json").is_file():  # the last file of a pipeline
            text_weights.write(self.weights, architecture)
        self.cases.run(self.key("weights"), self._weights)

    def _weights(self) -> Found:
        return {"resident": [text_weights.published_bytes(self.weights)]}

    def start(self) -> None:
        large, small = self.model.sizes
        self.cases.run(Key("empty", "start", "later", ""), started, self._empty, 1)
        self.cases.run(self.key("start", "first", large), self._first_start)
        for size, times in ((large, STARTS.get(self.name, 1)), (small, 1)):
            self.cases.run(self.key("start", "later", size), started, partial(self._start, size), times)
        for dtype in DTYPES:
            self.cases.run(self.key("start", dtype), started, partial(self._load, dtype), 1)

    def _first_start(self) -> Found:
        shutil.rmtree(self.cache, ignore_errors=True)
        return started(partial(self._start, self.model.sizes[0]), 1)

    def _start(self, size: Group) -> tuple[float, Held]:
        with stepwise(str(self.weights), self.cache, str(size), self.log, MAX_BATCH="1") as server:
            return server.seconds, server.held

    def _empty(self) -> tuple[float, Held]:
        """The smallest weights of the box. Their first start converts them, and does not count."""
        for _ in range(2):
            with stepwise(str(BOX / "digits-4step"), self.cache, None, self.log, MAX_BATCH="1") as server:
                found = server.seconds, server.held
        return found

    def _load(self, dtype: str) -> tuple[float, Held]:
        with Diffusers(self.weights, dtype, self.log) as pipeline:
            return pipeline.seconds, pipeline.held

    def steps(self) -> None:
        for size in reversed(self.model.sizes):
            self.cases.run(self.key("steps", "Stepwise", size), self._our_steps, size)
            for dtype in DTYPES:
                key = self.key("steps", f"diffusers, {dtype}", size)
                self.cases.run(key, self._their_steps, size, dtype)

    def _our_steps(self, size: Group) -> Found:
        with stepwise(str(self.weights), self.cache, str(size), self.log, MAX_BATCH="2") as server:
            warnings = server.warnings()
            one, two = (repeated(partial(server.step, size, rows), ROUNDS, _LONG) for rows in (1, 2))
            kept = "keep their bits" if server.pairs_keep_bits(size) else "have other bits"
            return {
                "one row": [times.step for times in one],
                "two rows": [times.step for times in two],
                "text": [times.text for times in one + two],
                "decode": [times.decode for times in one + two],
                "bits": f"refused: {'; '.join(warnings)}; images {kept}" if warnings else kept,
            }

    def _their_steps(self, size: Group, dtype: str) -> Found:
        sides = {"height": size.height, "width": size.width}
        with Diffusers(self.weights, dtype, self.log) as pipeline:

            def seconds(call: str, **fields: object) -> list[float]:
                return repeated(partial(pipeline.call, call, **fields), ROUNDS, _LONG)

            return {
                "one row": seconds("step", rows=1, **sides),
                "two rows": [two / 2 for two in seconds("step", rows=2, **sides)],
                "text": seconds("text", prompt="a fox in the snow"),
                "decode": seconds("decode", **sides),
            }

    def ratio(self) -> None:
        if self.name == "sd15":
            for size in reversed(self.model.sizes):
                for memory_format in FORMATS:
                    self.cases.run(self.key("ratio", memory_format, size), self._ratio, size, memory_format)

    def _ratio(self, size: Group, memory_format: str) -> Found:
        with (
            stepwise(str(self.weights), self.cache, str(size), self.log) as server,
            Diffusers(self.weights, "bfloat16", self.log.with_suffix(".diffusers"), memory_format) as pipeline,
        ):

            def ours() -> float:
                with server.server.awake():
                    return server.a_pass(size, 2) / 2

            def theirs() -> float:
                return pipeline.call("step", rows=2, height=size.height, width=size.width) / 2

            for warm_up in (ours, theirs) * 2:
                warm_up()
            pairs = Pairs()
            for _ in range(PAIRS):
                pairs.measure(theirs, ours)
        each = [own / other for other, own in zip(pairs.first, pairs.second, strict=True)]
        return {"ours": pairs.second, "theirs": pairs.first, "ratio": each}

    def precision(self) -> None:
        if self.name == "sd15":
            small = self.model.sizes[1]
            self.cases.run(self.key("precision", "", small), self._precision, small)

    def _precision(self, size: Group) -> Found:
        drawn = []
        for precision in DTYPES:
            with stepwise(str(self.weights), self.cache, str(size), self.log, PRECISION=precision) as server:
                drawn.append([decoded(server.png(size, seed=seed, **ASKED)) for seed in range(SEEDS)])
        pairs = list(zip(*drawn, strict=True))
        text_precision.draw(pairs[:SHOWN], self.picture)
        found = [text_precision.compared(exact, rough) for exact, rough in pairs]
        return {name: [one[name] for one in found] for name in found[0]}


ASKED: Mapping[str, object] = {
    "prompt": "a fox in the snow",
    "guidance_scale": 7.5,
    "num_inference_steps": STEPS,
}


def started(start: Callable[[], tuple[float, Held]], times: int) -> Found:
    """Seconds and memory of some starts, one after the other."""
    seconds, held = zip(*(start() for _ in range(times)), strict=True)
    return {"seconds": list(seconds), **{name: [getattr(one, name) for one in held] for name in Held._fields}}


def decoded(png: bytes) -> text_precision.Levels:
    return np.asarray(Image.open(BytesIO(png)).convert("RGB"))


def measure(
    work: Path, models: Mapping[str, Model], parts: Sequence[str], architectures: Mapping[str, Architecture]
) -> Mapping[str, record.Table]:
    """Run the parts of the models in a folder, and make the tables of all that the folder has results of."""
    cases = Cases(work / "text.json", _AT_MOST)
    for name, model in models.items():
        bench = Bench(name, model, work, cases, PICTURE)
        bench.write(architectures[name])
        for part in parts:
            getattr(bench, part)()
    return text_tables.tables(cases.results, MODELS)


def some(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A reader of names with commas, which must be known."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return names

    return read


@contextmanager
def folder(given: Path | None) -> Iterator[Path]:
    """The folder for weights, caches and results: the given one, or a temporary one."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
    else:
        with tempfile.TemporaryDirectory() as work:
            yield Path(work)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.text", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keeps weights and results, so that a run can go on")
    parser.add_argument("--only", type=some([*MODELS]), default=[*MODELS], help="models; default: all")
    parser.add_argument("--parts", type=some(PARTS), default=PARTS, help="parts; default: all")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that the systems are closed
    described = machine()
    with folder(args.folder) as work:
        chosen = {name: MODELS[name] for name in args.only}
        record.save("text", described, 1, measure(work, chosen, args.parts, ARCHITECTURES))


if __name__ == "__main__":
    main()
