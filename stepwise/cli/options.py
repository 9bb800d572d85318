"""Options that several commands share. The table of fields gives the options for requests."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from service.plan.entries import Field, table
from stepwise.cli.exits import Unusable

Given = dict[str, Any]  # the fields that a person gave, by name

PATIENCE_S = 120.0

_SERVER = "Which server"
DRAWING = "What is drawn"
OUTPUT = "Where it goes"

Url = Annotated[
    str,
    typer.Option(
        envvar="STEPWISE_URL",
        help="The server's. Its API key, where it wants one, is read from STEPWISE_API_KEY.",
        rich_help_panel=_SERVER,
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="How long to ask again while the server is full or loading.",
        rich_help_panel=_SERVER,
    ),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Compute in this process, without a server. What STEPWISE_* settings say of one holds here.",
        rich_help_panel=_SERVER,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="With --local: a name in the box, a folder or a file. Default: STEPWISE_WEIGHTS, or digits.",
        rich_help_panel=_SERVER,
    ),
]

ReadRange = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="A noisy PNG's values stand for −R … R. Default: 4 where it has 16 bits, as those of stepwise noise; "
        "1 where it has 8, as ordinary images.",
        rich_help_panel=DRAWING,
    ),
]

Force = Annotated[bool, typer.Option("--force", help="Write over other files.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]


def of(request: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the fields of a request as options, except those that the command declares itself.

    The command's argument `given` gets the fields that the person gave.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [one for name, one in inspect.signature(command).parameters.items() if name != "given"]
        rows = [row for name, row in table(request).items() if name not in {one.name for one in own}]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {row.name: _value(row, values.pop(row.name)) for row in rows}
            command(given={name: value for name, value in given.items() if value is not None}, **values)

        options = [_option(row) for row in rows]
        signature = inspect.Signature([*options, *(one.replace(kind=one.KEYWORD_ONLY) for one in own)])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
        return run

    return decorate


def _option(row: Field) -> inspect.Parameter:
    kind = row.annotation if row.kinds == {str} and not row.is_list else next(iter(row.kinds))
    if row.is_only_list or row.kinds == {int, str}:
        kind = str
    option = typer.Option(
        *_flags(row),
        metavar="N,N,…" if row.is_only_list else None,
        help=row.help.replace("[", r"\["),  # typer would read [word] as markup, and not show it
        show_default=False,
        rich_help_panel=DRAWING,
    )
    annotation = Annotated[(list[kind] if row.is_list else kind) | None, option]  # type: ignore[valid-type]
    default = inspect.Parameter.empty if row.is_required else None
    return inspect.Parameter(row.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(row: Field) -> Sequence[str]:
    return row.entry.flags or [f"--{row.name.replace('_', '-')}"]


def _value(row: Field, given: Any) -> Any:
    """The value of an option.

    Raises:
        Unusable: a list of numbers contains other text.
    """
    if not isinstance(given, list):
        return given
    if not row.is_only_list:  # the field also takes a single value
        return given if len(given) > 1 else next(iter(given), None)
    [kind], text = row.kinds, ",".join(given)
    try:
        return [kind(part) for part in text.split(",")] if given else None
    except ValueError:
        raise Unusable(f"{_flags(row)[0]} {text}: must be numbers with commas between them") from None
