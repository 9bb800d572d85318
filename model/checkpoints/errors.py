"""The one error of unreadable checkpoints."""

from collections.abc import Sequence
from pathlib import Path

_LONGEST = 299  # characters of a message
_LONGEST_PATH = 140  # of these


class CheckpointError(Exception):
    """Weights that cannot be loaded.

    The message is one line below 300 characters: the file; the key or field and what it is; then what was expected. Of
    a long path the end is told, of a long problem the beginning.
    """

    def __init__(self, path: Path, problem: str) -> None:
        place = str(path) if len(str(path)) <= _LONGEST_PATH else f"…{str(path)[1 - _LONGEST_PATH :]}"
        line = " ".join(f"{place}: {problem}".splitlines())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…")


def listed(names: Sequence[object], most: int) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def shown(value: object) -> str:
    """A value of a config in a message: on one line, and cut short where it is long."""
    text = " ".join(str(value).splitlines())
    return text if len(text) <= 60 else f"{text[:59]}…"
