"""stepwise denoise and stepwise noise: a file in, a file out."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.plan import fields
from stepwise import DEFAULT_URL, AsyncClient, Noisy, NoisyArray
from stepwise.cli import options, progress
from stepwise.cli.connect import Server, run
from stepwise.cli.exits import Unusable, say
from stepwise.cli.output import Output, npy, refuse_json_beside
from stepwise.recipe import PNG_MAGIC

VALUE_RANGE = 4.0  # of noisy PNGs: noise seldom exceeds four times its standard deviation

_NPY_MAGIC = b"\x93NUMPY"
_PLACE_OF_DEPTH = 24  # the byte of a PNG with the bits of a value

File = Annotated[str, typer.Argument(metavar="IMAGE", help="A .png or an .npy; - is standard input.")]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="PATH",
        help="A .png; an .npy, which is exact; a folder; - is standard output. Default: a name like that of the image, "
        "in the current folder; or standard output, where the image comes from standard input.",
        rich_help_panel=options.OUTPUT,
    ),
]


@options.of(fields.DenoiseRequest)
def denoise(
    given: options.Given,
    image: File,
    value_range: options.ReadRange = None,
    out: Out = None,
    force: options.Force = False,
    url: options.Url = DEFAULT_URL,
    patience: options.Patience = options.PATIENCE_S,
    local: options.Local = False,
    weights: options.Weights = None,
) -> None:
    """Denoise an image that is as noisy as a timestep says.

    One step, the default, is the model's estimate from one evaluation; more walk down to a clean image.
    """
    wanted = given.pop("output", "x0")
    target = Output.of(out, force, piped=image == "-")
    target.check_kind(".png", ".npy")
    suffix = target.suffix or (".png" if wanted == "x0" else ".npy")
    if wanted != "x0" and suffix != ".npy":
        raise Unusable(f"--output {wanted} is no image: it goes to an .npy, and not to {target.path}")
    content = read(image)
    given["value_range"] = range_of(content, value_range)

    async def work(client: AsyncClient) -> bytes:
        if suffix == ".npy":
            return npy(await client.denoise_array(content, output=wanted, **given))
        [clean], _ = await progress.drawn(client.stream_denoise(content, **given), 1)
        return clean.png

    answer = run(Server(url, patience, local, weights), work)
    for path in target.write({f"{_stem(image)}-{'clean' if wanted == 'x0' else wanted}{suffix}": answer}):
        print(path)


@options.of(fields.NoiseRequest)
def noise(
    given: options.Given,
    image: File,
    value_range: Annotated[
        float,
        typer.Option(
            help="Of the noisy PNG, of 16 bits: its values stand for −r … r, and what is beyond is clipped.",
            rich_help_panel=options.DRAWING,
        ),
    ] = VALUE_RANGE,
    out: Out = None,
    force: options.Force = False,
    as_json: options.Json = False,
    url: options.Url = DEFAULT_URL,
    patience: options.Patience = options.PATIENCE_S,
    local: options.Local = False,
    weights: options.Weights = None,
) -> None:
    """Add noise to a clean image, as much as a timestep says."""
    target = Output.of(out, force, piped=image == "-")
    target.check_kind(".png", ".npy")
    refuse_json_beside(target, as_json)
    if "seed" not in given:
        target.check_new()
    content = read(image)
    suffix = target.suffix or (".npy" if content.startswith(_NPY_MAGIC) else ".png")

    async def work(client: AsyncClient) -> Noisy | NoisyArray:
        if suffix == ".npy":
            return await client.noise_array(content, **given)
        return await client.noise(content, value_range=value_range, **given)

    noisy = run(Server(url, patience, local, weights), work)
    clipped = noisy.clipped if isinstance(noisy, Noisy) else 0.0
    answer = noisy.png if isinstance(noisy, Noisy) else npy(noisy.array)
    paths = target.write({f"{_stem(image)}-noisy{suffix}": answer})
    if clipped:
        hint = "a larger --value-range keeps them, and an .npy keeps all"
        say(f"{clipped:.2%} of the values are beyond ±{value_range:g} and were clipped: {hint}")
    if as_json:
        print(json.dumps({"file": str(paths[0]), "seed": noisy.seed, "clipped": clipped}))
    else:
        for path in paths:
            print(path)


def read(image: str) -> bytes:
    """The bytes of a file or of standard input.

    Raises:
        Unusable: the input cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if image == "-" else Path(image).read_bytes()
    except OSError as error:
        raise Unusable(f"{image}: cannot be read: {error.strerror or error}") from None


def range_of(content: bytes, given: float | None) -> float | None:
    """The `value_range` of an image: for PNGs, the given one or the default for the bit depth; else None."""
    if not content.startswith(PNG_MAGIC):
        return None
    if given is not None:
        return given
    return VALUE_RANGE if content[_PLACE_OF_DEPTH : _PLACE_OF_DEPTH + 1] == b"\x10" else 1.0


def _stem(image: str) -> str:
    return "image" if image == "-" else Path(image).stem
