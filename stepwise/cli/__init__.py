"""The program `stepwise`, with a module for each command. A command imports torch only when it runs."""

from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from stepwise.cli import exits
from stepwise.cli.convert import convert
from stepwise.cli.images import denoise, noise
from stepwise.cli.info import info
from stepwise.cli.sample import sample
from stepwise.cli.serve import WithSettings, serve
from stepwise.cli.verify import verify

_EPILOG = "Exit codes: " + "; ".join(f"{code}, {meaning}" for code, meaning in exits.MEANINGS.items()) + "."


class Commands(TyperGroup):
    """Ends every command as exits.py says."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        exits.end(lambda: super(Commands, self).main(*args, **options))


app = typer.Typer(
    cls=Commands, epilog=_EPILOG, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False
)
app.command(cls=WithSettings)(serve)
for command in (sample, denoise, noise, verify, info, convert):
    app.command()(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        import service

        print(f"stepwise {service.__version__}")
        raise typer.Exit


@app.callback()
def stepwise(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Draw and denoise images with diffusion U-Nets: serve a model, and ask a server, or none."""


def main() -> None:
    app(prog_name="stepwise")
