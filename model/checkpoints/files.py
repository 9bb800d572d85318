"""Files of a checkpoint, checked before they are read: inside its folder, no Git LFS pointer, not too large."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from model.checkpoints.errors import CheckpointError, shown

MAX_BYTES = 16 * 2**20  # of a config: trained_betas, an index of shards and a vocabulary can be long
_TOLD = 2  # wrong fields that one message names

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path: Path, root: Path) -> None:
    """Check that a regular file exists, inside `root`, with its own content.

    Raises:
        CheckpointError: if it does not.
    """
    try:
        resolved, root = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise CheckpointError(path, "is a link that leads nowhere") from error
    if not resolved.is_relative_to(root) and not _is_cached(resolved, root):
        raise CheckpointError(path, "is a link that leaves the checkpoint's folder")
    if resolved.exists() and not resolved.is_file() and not resolved.is_dir():
        raise CheckpointError(path, "is not a regular file")
    try:
        with resolved.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if start == _LFS_POINTER:
        raise CheckpointError(path, "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def _is_cached(resolved: Path, root: Path) -> bool:
    """Whether a link in huggingface_hub's cache leads to a blob of the same repository.

    The files of models--OWNER--NAME/snapshots/REVISION are links to models--OWNER--NAME/blobs.
    """
    for snapshot in (root, *root.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return resolved.parent == repository / "blobs"
    return False


def read_json(path: Path, root: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: if the file is not a JSON object, or larger than MAX_BYTES.
    """
    try:
        values = json.loads(_read(path, root))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(path, f"holds a {type(values).__name__}, and must hold a JSON object")
    return values


def read_text(path: Path, root: Path) -> str:
    """Read a file of text, in UTF-8.

    Raises:
        CheckpointError: if the file is not text, or larger than MAX_BYTES.
    """
    try:
        return _read(path, root).decode()
    except ValueError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error


def _read(path: Path, root: Path) -> bytes:
    check_file(path, root)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(path, f"has {path.stat().st_size} bytes, and must have at most {MAX_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error}") from error


def invalid(path: Path, error: ValidationError) -> CheckpointError:
    """One error for all wrong fields of a config. Names the first of them, and how many more there are."""
    sentences = list(dict.fromkeys(map(_sentence, error.errors())))
    told, more = sentences[:_TOLD], len(sentences) - _TOLD
    return CheckpointError(path, "; ".join([*told, f"and {more} more"] if more > 0 else told))


def _sentence(error: ErrorDetails) -> str:
    field = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            return f"{shown(field)}: there is no such field"
        case "missing":
            return f"{field}: is required"
        case "value_error":  # raised by our validators, as a sentence
            message = error["msg"].removeprefix("Value error, ")
            return f"{field}: {message}" if field else message
        case _:
            expected = error["msg"].replace("Input should be", "must be").replace("Tuple should", "must")
            return f"{field} is {shown(error['input'])}, and {expected}"
