"""How the program ends: one line for a person, one number for a script.

error
├── Unusable         what was asked for cannot be done           2
├── Invalid, …       the server refuses a field or an image      2
├── Unreachable      no server answers                           3
└── StepwiseError    the server refuses, is busy, or has failed  4
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from stepwise import BadRequest, Invalid, StepwiseError, Unreachable

DIFFERENT = 1
UNUSABLE = 2
UNREACHABLE = 3
REFUSED = 4
INTERRUPTED = 128 + 2  # SIGINT
READER_LEFT = 128 + 13  # SIGPIPE

MEANINGS = {
    0: "done",
    DIFFERENT: "verify: an image differs",
    UNUSABLE: "what was asked for cannot be done: options, files, fields, settings",
    UNREACHABLE: "no server answers",
    REFUSED: "the server refuses (its API key, a full queue, a deadline) or has failed",
    INTERRUPTED: "Ctrl-C",
    READER_LEFT: "whoever read the output has left",
}


class Unusable(Exception):
    """What the command was given cannot be used. The message is a sentence that names it."""


def code_of(error: Unusable | StepwiseError) -> int:
    """The exit code that an error ends the program with."""
    if isinstance(error, Unusable | Invalid | BadRequest):
        return UNUSABLE
    return UNREACHABLE if isinstance(error, Unreachable) else REFUSED


@contextmanager
def explained() -> Iterator[None]:
    """Have errors end the program with their line on standard error, and their code."""
    try:
        yield
        sys.stdout.flush()
    except (Unusable, StepwiseError) as error:
        hint = "; start one with `stepwise serve`, or do without: --local" if isinstance(error, Unreachable) else ""
        print(f"stepwise: {error}{hint}", file=sys.stderr)
        raise typer.Exit(code_of(error)) from None
    except KeyboardInterrupt:
        print("stepwise: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else flushing at the end fails once more
        raise typer.Exit(READER_LEFT) from None
