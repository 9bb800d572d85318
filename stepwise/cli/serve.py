"""stepwise serve: options → settings → the server."""

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from stepwise.cli.exits import Unusable
from stepwise.cli.extras import server_for


class WithSettings(TyperCommand):
    """A command whose --help ends with all settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        try:
            with server_for("the list of all settings"):
                from service import config
        except Unusable as lacking:
            print(f" {lacking}\n")
        else:
            print(f" All settings, read from the environment; options go before:\n\n{config.usage()}\n")


def serve(
    weights: Annotated[
        str | None, typer.Option(help="A name in the box, a folder or a file: native weights, or diffusers'.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads.")] = None,
) -> None:
    """Serve a model over HTTP, with a page to play with, until Ctrl-C or SIGTERM.

    Each option stands for the setting of its name.
    """
    options = {
        "WEIGHTS": weights,
        "HOST": host,
        "PORT": port,
        "DEVICE": device,
        "PRECISION": precision,
        "THREADS": threads,
    }
    with server_for("stepwise serve"):
        from service import __main__ as program
        from service import config
        from service.build import START_ERRORS

    os.environ.update({config.PREFIX + name: str(value) for name, value in options.items() if value is not None})
    try:
        program.serve(_show)
    except START_ERRORS as error:
        raise Unusable(str(error)) from None


def _show(url: str) -> None:
    host = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    print(f"stepwise: draw at {host}/ ; the API is shown at {host}/docs", file=sys.stderr, flush=True)
