"""The program's end: one line for a person, one number for a script.

error
├── Unusable         the command cannot be done                  2
├── OSError          a file or a stream cannot be used           2
├── Invalid, …       the server refuses a field or an image      2
├── Unreachable      no server answers                           3
├── StepwiseError    the server refuses, is busy, or has failed  4
└── any other        a fault of the program's own, with a trace  70

Only `verify` ends with 1: an image differs.
"""

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

import typer

from stepwise import BadRequest, Invalid, StepwiseError, Unreachable

DIFFERENT = 1
UNUSABLE = 2
UNREACHABLE = 3
REFUSED = 4
FAULTY = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 128 + 2  # SIGINT
READER_LEFT = 128 + 13  # SIGPIPE

STANDARD_OUTPUT = "standard output"  # replaces a file's name in an OSError

MEANINGS = {
    0: "done",
    DIFFERENT: "verify: an image differs",
    UNUSABLE: "what was asked for cannot be done: options, files, fields, settings",
    UNREACHABLE: "no server answers",
    REFUSED: "the server refuses (its API key, a full queue, a deadline) or has failed",
    FAULTY: "stepwise itself is at fault; what it prints belongs into a report",
    INTERRUPTED: "Ctrl-C",
    READER_LEFT: "whoever read the output has left",
}


class Unusable(Exception):
    """An input of the command cannot be used. The message is a sentence that names the input."""


def code_of(error: Unusable | StepwiseError) -> int:
    """The exit code for an error."""
    if isinstance(error, Unusable | Invalid | BadRequest):
        return UNUSABLE
    return UNREACHABLE if isinstance(error, Unreachable) else REFUSED


def end(command: Callable[[], object]) -> NoReturn:
    """Run a command, and end the program with the command's code. Errors are printed in one line.

    Raises:
        SystemExit: always.
    """
    sys.exit(_code(command))


def _code(command: Callable[[], object]) -> int:
    try:
        _prepare_streams()
        return _finished(command)
    except (Unusable, StepwiseError) as error:
        hint = "; start one with `stepwise serve`, or do without: --local" if isinstance(error, Unreachable) else ""
        say(f"{error}{hint}")
        return code_of(error)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _give_up(sys.stdout)
        return READER_LEFT
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        if error.filename in (None, STANDARD_OUTPUT):
            _give_up(sys.stdout)
        return UNUSABLE
    except Exception as error:
        with contextlib.suppress(OSError):
            traceback.print_exception(error)
        say(f"a fault of its own, {type(error).__name__}: {error}")
        return FAULTY


def _finished(command: Callable[[], object]) -> int:
    """Run a command and flush its output. Returns the exit code that typer gives it."""
    code: object = 0
    try:
        command()
    except SystemExit as ending:
        # rich and typer end the program with 1 if they cannot write, or if the input ends amid a question.
        if isinstance(ending.__context__, BrokenPipeError | EOFError | typer.Abort):
            raise ending.__context__ from None
        code = ending.code
    if code == INTERRUPTED:  # typer prints nothing
        raise KeyboardInterrupt
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STANDARD_OUTPUT) from None
    return code if isinstance(code, int) else FAULTY if code else 0


def say(text: str) -> None:
    """Print a line on standard error, safe for a terminal. If standard error is closed, only the exit code speaks."""
    try:
        print(f"stepwise: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def printable(text: str) -> str:
    """Foreign text on one line, with escapes for control characters that a terminal would obey."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _prepare_streams() -> None:
    """Make standard output escape characters that its encoding lacks, and replace closed streams by empty ones.

    Raises:
        Unusable: standard output is closed, so that results would be lost.
    """
    for name, mode in ("stdin", "r"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123
    if sys.stdout is None:
        raise Unusable("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _give_up(stream: TextIO) -> None:
    """Discard the rest of a stream's output. Otherwise the flush at the program's end fails again."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), stream.fileno())
