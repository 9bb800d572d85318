"""stepwise convert: any checkpoint → native weights."""

from pathlib import Path
from typing import Annotated

import typer

from stepwise.cli import progress
from stepwise.cli.exits import Unusable
from stepwise.cli.extras import server_for


def convert(
    source: Annotated[str, typer.Argument(help="A folder or a file, or a name in the box: as STEPWISE_WEIGHTS.")],
    target: Annotated[Path, typer.Argument(help="The folder to write, new or empty.")],
) -> None:
    """Write a checkpoint as native weights, config.json and model.safetensors.

    They load alone, are safe to open and draw the same bytes. Pickles are opened only with STEPWISE_ALLOW_PICKLE=1.
    """
    with progress.waiting("converting"):
        with server_for("stepwise convert"):
            from model.checkpoints import load
            from service import config
            from service.build import START_ERRORS, find_weights

        try:
            converted = load.convert(find_weights(source), target, config.read().allow_pickle).description
        except START_ERRORS as error:
            raise Unusable(str(error)) from None
        except OSError as error:
            raise Unusable(f"{error.filename}: {error.strerror}" if error.strerror else str(error)) from None
    shape = "x".join(map(str, converted.image_shape[1:]))
    print(f"{target}: {converted.num_parameters:,} parameters, draws images of {shape}")
    print(f"serve it: stepwise serve --weights {target}")
