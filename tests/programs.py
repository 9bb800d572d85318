"""Runs the program `stepwise`, in this process (faster) or in a new one."""

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

from stepwise import cli
from tests.servers import PATIENCE, ROOT, Reachable, environment

Ended = subprocess.CompletedProcess[bytes]

COMMAND = [sys.executable, "-W", "error", "-m", "stepwise"]


def surroundings(server: Reachable | None, **more: str) -> dict[str, str]:
    """The environment for a run: the tests' settings, and the server's address if any."""
    url = {} if server is None else {"STEPWISE_URL": server.url}
    return environment() | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | url | more


def stepwise(server: Reachable | None, folder: Path, *arguments: str, stdin: bytes = b"", **more: str) -> Ended:
    """Run the program in this process and in a folder, and return its result."""
    binaries = io.BytesIO(stdin), io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(binary, encoding="utf-8", write_through=True) for binary in binaries]
    with (
        _replaced(["stepwise", *arguments], streams, surroundings(server, **more)),
        contextlib.chdir(folder),
        pytest.raises(SystemExit) as ending,
    ):
        cli.main()
    code = ending.value.code
    assert isinstance(code, int)
    return subprocess.CompletedProcess(arguments, code, binaries[1].getvalue(), binaries[2].getvalue())


@contextmanager
def _replaced(argv: list[str], streams: Sequence[io.TextIOWrapper], variables: Mapping[str, str]) -> Iterator[None]:
    """Replace this process's arguments, standard streams and environment."""
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    environ = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv, (sys.stdin, sys.stdout, sys.stderr) = argv, streams
    try:
        yield
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
        os.environ.clear()
        os.environ.update(environ)


def process(server: Reachable | None, folder: Path, *arguments: str, stdin: bytes = b"", **more: str) -> Ended:
    """Run the program in a new process, to its end."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env=surroundings(server, **more),
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )


def done(ended: Ended) -> str:
    """The output of a successful run, which must write nothing to standard error."""
    assert ended.stderr == b"", ended.stderr.decode()
    assert ended.returncode == 0
    return ended.stdout.decode()


def refused(ended: Ended, code: int) -> str:
    """The one line of an error."""
    assert ended.returncode == code, ended
    assert ended.stdout == b""
    [line] = ended.stderr.decode().splitlines()
    assert line.startswith("stepwise: ")
    return line.removeprefix("stepwise: ")


@contextmanager
def running(
    server: Reachable | None,
    folder: Path,
    *arguments: str,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.PIPE,
    stderr: int | IO[Any] = subprocess.PIPE,
    **more: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the program in a new process. At the end it is killed, unless it has ended."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=surroundings(server, **more),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=_hear_ctrl_c,
    )
    with process:
        try:
            yield process
            process.wait(PATIENCE)
        finally:
            process.kill()


def read_terminal(terminal: int) -> str:
    """Everything written to a pseudo-terminal until all writers have closed it."""
    pieces = []
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # Linux's end of file
            break
        if not piece:
            break
        pieces.append(piece)
    return b"".join(pieces).decode()


def _hear_ctrl_c() -> None:
    """Restore the default of SIGINT, which a shell's background jobs and their children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
