"""The error of checkpoints that cannot be loaded."""

from collections.abc import Sequence
from pathlib import Path

_LONGEST = 299  # characters of a message
_LONGEST_PATH = 140  # characters of its path


class CheckpointError(Exception):
    """Weights that cannot be loaded.

    The message is one line of less than 300 characters: the file, the key or field and its value, then what was
    expected. It keeps the end of a long path, and the beginning of a long problem.
    """

    def __init__(self, path: Path, problem: str) -> None:
        place = str(path) if len(str(path)) <= _LONGEST_PATH else f"…{str(path)[1 - _LONGEST_PATH :]}"
        line = " ".join(f"{place}: {problem}".splitlines())
        super().__init__(line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…")


def listed(names: Sequence[object], most: int) -> str:
    """The first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def shown(value: object) -> str:
    """A value for a message: one line of at most 60 characters."""
    text = " ".join(str(value).splitlines())
    return text if len(text) <= 60 else f"{text[:59]}…"
