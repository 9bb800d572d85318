"""stepwise sample: images by seed."""

import json
from typing import Annotated

import typer

from service.plan import fields
from stepwise import DEFAULT_URL, AsyncClient, Done, Image
from stepwise.cli import options, progress
from stepwise.cli.connect import Server, run
from stepwise.cli.exits import Unusable
from stepwise.cli.extras import server_for
from stepwise.cli.output import Output, refuse_json_beside


@options.of(fields.Sample)
def sample(
    given: options.Given,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="A folder, with SEED.png for each image; a .zip of the same; a .png for one image; - is standard "
            "output. Default: the current folder.",
            rich_help_panel=options.OUTPUT,
        ),
    ] = None,
    as_sheet: Annotated[
        bool,
        typer.Option("--sheet", help="All images on one contact sheet, a .png.", rich_help_panel=options.OUTPUT),
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
    labels = given.get("class_label")
    count = given.setdefault("num_images", len(labels) if isinstance(labels, list) else 1)
    target = Output.of(out, force)
    target.check_kind(".png", ".zip")
    if as_sheet and (target.suffix == ".zip" or out is None):
        raise Unusable("--sheet is one .png: name it, -o sheet.png; or -o - for standard output")
    if count > 1 and not as_sheet and (target.path is None or target.suffix == ".png"):
        raise Unusable(
            f"-o {out} is one place, for {count} images: name a folder (-o sevens/) or a ZIP (-o sevens.zip), "
            "or put them on one sheet (--sheet)"
        )
    refuse_json_beside(target, as_json)
    if as_sheet:
        with server_for("--sheet"):
            from stepwise.cli.sheets import sheet
    if "seed" not in given:
        target.check_new()

    async def draw(client: AsyncClient) -> tuple[list[Image], Done]:
        return await progress.drawn(client.stream(**given), count)

    images, done = run(Server(url, patience, local, weights), draw)
    pngs = {f"{image.seed}.png": image.png for image in images}
    if as_sheet:
        pngs = {"sheet.png": sheet(list(pngs.values()), done.parameters)}
    paths = target.write(pngs)
    if as_json:
        files = paths if len(paths) == len(images) else paths * len(images)
        told = [{"seed": image.seed, "file": str(path)} for image, path in zip(images, files, strict=True)]
        print(json.dumps({"images": told, "parameters": done.parameters, "timings": done.timings}))
    else:
        for path in paths:
            print(path)
