"""stepwise sample: images by seed."""

import json
from collections.abc import Mapping
from typing import Annotated, Literal

import typer

from service.plan import fields
from stepwise import DEFAULT_URL, AsyncClient, Done, Image
from stepwise.cli import options, progress
from stepwise.cli.connect import Server, run
from stepwise.cli.exits import Unusable
from stepwise.cli.extras import server_for
from stepwise.cli.images import read
from stepwise.cli.output import Output, npy, refuse_json_beside

_PICTURES: Mapping[str, Literal["webp", "jpeg"]] = {".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_A_LIST_MAKES_IMAGES = ("prompt", "negative_prompt", "class_label")


@options.of(fields.Sample)
def sample(
    given: options.Given,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="What is drawn, for models with text: a sentence in quotes.", show_default=False
        ),
    ] = None,
    image: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .png, .jpg or .webp that is drawn anew; - is standard input.",
            show_default=False,
            rich_help_panel=options.DRAWING,
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            "--mask",
            "--mask-image",
            metavar="FILE",
            help="The same beside --image: what is white in it is drawn anew, and the rest is kept.",
            show_default=False,
            rich_help_panel=options.DRAWING,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="A folder, with SEED.png for each image; a .zip of the same; a .png, .webp or .jpg for one image; an "
            ".npy for all, exact; - is standard output. Default: the current folder.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    as_sheet: Annotated[
        bool,
        typer.Option(
            "--sheet", help="All images on one contact sheet, a .png, .webp or .jpg.", rich_help_panel=options.OUTPUT
        ),
    ] = False,
    force: options.Force = False,
    as_json: options.Json = False,
    url: options.Url = DEFAULT_URL,
    patience: options.Patience = options.PATIENCE_S,
    local: options.Local = False,
    weights: options.Weights = None,
) -> None:
    """Draw images.

    Prints the path of each file. The same seed draws the same bytes again.
    """
    if words:
        if len(words) > 1:
            raise Unusable('a prompt of several words must be in quotes: stepwise sample "a fox in the snow"')
        if "prompt" in given:
            raise Unusable("PROMPT and --prompt are the same: give one of them")
        [given["prompt"]] = words
    if image == "-" == mask:
        raise Unusable("--image - and --mask - are both standard input: name one of the files")
    several = (len(given[name]) for name in _A_LIST_MAKES_IMAGES if isinstance(given.get(name), list))
    count = given.setdefault("num_images", next(several, 1))
    target = Output.of(out, force)
    target.check_kind(".png", ".zip", *_PICTURES, ".npy")
    if as_sheet and (target.suffix in (".zip", ".npy") or out is None):
        raise Unusable("--sheet is one .png, .webp or .jpg: name it, -o sheet.png; or -o - for standard output")
    if count > 1 and not as_sheet and (target.path is None or target.suffix in (".png", *_PICTURES)):
        raise Unusable(
            f"-o {out} is one place, for {count} images: name a folder (-o sevens/) or a ZIP (-o sevens.zip), "
            "or put them on one sheet (--sheet)"
        )
    refuse_json_beside(target, as_json)
    if "seed" not in given:
        target.check_new()
    given |= {name: read(file) for name, file in (("image", image), ("mask_image", mask)) if file is not None}
    server = Server(url, patience, local, weights)
    if target.suffix in (*_PICTURES, ".npy"):
        _plain(given, count, target, server, as_json)
        return
    if as_sheet:
        with server_for("--sheet"):
            from stepwise.cli.sheets import sheet

    async def draw(client: AsyncClient) -> tuple[list[Image], Done]:
        return await progress.drawn(client.stream(**given), count)

    images, done = run(server, draw)
    pngs = {f"{image.seed}.png": image.png for image in images}
    if as_sheet:
        pngs = {"sheet.png": sheet(list(pngs.values()))}
    paths = target.write(pngs)
    if as_json:
        files = paths if len(paths) == len(images) else paths * len(images)
        told = [{"seed": image.seed, "file": str(path)} for image, path in zip(images, files, strict=True)]
        print(json.dumps({"images": told, "parameters": done.parameters, "timings": done.timings}))
    else:
        for path in paths:
            print(path)


def _plain(given: options.Given, count: int, target: Output, server: Server, as_json: bool) -> None:
    """Draw to one .npy, .webp or .jpg, as the server answers it: without events and without a recipe."""
    assert target.suffix is not None
    suffix = target.suffix

    async def draw(client: AsyncClient) -> tuple[bytes, int]:
        with progress.waiting("drawing"):
            if suffix == ".npy":
                drawn = await client.sample_array(**given)
                progress.warn(drawn.warnings)
                return npy(drawn.array), drawn.seed
            picture = await client.sample_picture(kind=_PICTURES[suffix], **given)
            progress.warn(picture.warnings)
            return picture.content, picture.seed

    content, seed = run(server, draw)
    [path] = target.write({suffix: content})
    if as_json:
        print(json.dumps({"images": [{"seed": seed + i, "file": str(path)} for i in range(count)]}))
    else:
        print(path)
