"""The one error of unreadable checkpoints."""

from pathlib import Path


class CheckpointError(Exception):
    """Weights that cannot be loaded. The message is one line: which file, which key or field, what was expected."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(" ".join(f"{path}: {problem}".splitlines()))
