"""stepwise sample: images by seed."""

import json
from typing import Annotated

import typer

from stepwise import DEFAULT_URL, AsyncClient, Done, Image
from stepwise.cli import options, progress
from stepwise.cli.connect import Server, run
from stepwise.cli.exits import Unusable
from stepwise.cli.extras import server_for
from stepwise.cli.output import Output, refuse_json_beside


def sample(
    num_images: Annotated[
        int | None,
        typer.Option(
            "--num-images",
            "-n",
            help="Image i is the image of seed + i. Default: 1, or as many as class labels.",
            rich_help_panel=options.DRAWING,
        ),
    ] = None,
    class_label: Annotated[
        list[str] | None,
        typer.Option(
            "--class-label",
            "-c",
            metavar="CLASS",
            help="By name or index. Several times: one an image.",
            rich_help_panel=options.DRAWING,
        ),
    ] = None,
    seed: options.Seed = None,
    steps: options.Steps = None,
    sampler: options.Sampler = None,
    eta: options.Eta = None,
    guidance_scale: options.Guidance = None,
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
    timeout: options.Timeout = None,
    url: options.Url = DEFAULT_URL,
    patience: options.Patience = options.PATIENCE_S,
    local: options.Local = False,
    weights: options.Weights = None,
) -> None:
    """Draw images.

    Prints the path of each file. The same seed draws the same bytes again.
    """
    labels = class_label or []
    count = num_images if num_images is not None else max(1, len(labels))
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
    if seed is None:
        target.check_new()

    async def draw(client: AsyncClient) -> tuple[list[Image], Done]:
        events = client.stream(
            num_images=count,
            seed=seed,
            sampler=sampler,
            num_inference_steps=steps,
            eta=eta,
            class_label=labels[0] if len(labels) == 1 else labels or None,
            guidance_scale=guidance_scale,
            timeout_s=timeout,
        )
        return await progress.drawn(events, count)

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
