"""Errors for light installations. They have the client and the command line, and lack the server's packages."""

from collections.abc import Iterator
from contextlib import contextmanager

from stepwise.cli.exits import Unusable

_OURS = ("stepwise", "service", "model")
_HOW = (
    "in a checkout of Stepwise, pip install '.[cpu]', or '.[server]' where there is a GPU; "
    "from a wheel, pip install 'FILE.whl[cpu]'"
)


@contextmanager
def server_for(what: str) -> Iterator[None]:
    """Guard imports that need the extra `server`.

    Args:
        what: the command or option that needs the extra; the message begins with its name.

    Raises:
        Unusable: a package of the extra is missing. The message says how to install the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        raise Unusable(f"{what} needs the extra `server`, and {error.name} is not installed: {_HOW}") from None
