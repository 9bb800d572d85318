"""The error of checkpoints that cannot be loaded."""

from collections.abc import Sequence
from pathlib import Path

_LONGEST = 299  # characters of a message
_ROOM = 60  # characters that its path may always take
_LONGEST_PATH = 140  # the most that it may take


class CheckpointError(Exception):
    """Weights that cannot be loaded.

    The message is one line of less than 300 characters: the file, the key or field and its value, then what was
    expected. Of a long path it keeps the end, and of a very long problem the beginning.
    """

    def __init__(self, path: Path, problem: str) -> None:
        room = min(_LONGEST_PATH, max(_ROOM, _LONGEST - len(f": {problem}")))
        place = str(path) if len(str(path)) <= room else f"…{str(path)[1 - room :]}"
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
