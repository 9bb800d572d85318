"""Writes results to a folder, a ZIP, one file, or standard output. Existing files are safe."""

import io
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stepwise.cli.exits import STANDARD_OUTPUT, Unusable

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)  # constant, as in the server's ZIPs


@dataclass(frozen=True)
class Output:
    """The place for results.

    Attributes:
        path: of a folder or of one file; None for standard output.
        is_folder: `path` is a folder, with a file for each result.
        force: files with other bytes may be overwritten.
    """

    path: Path | None
    is_folder: bool
    force: bool

    @classmethod
    def of(cls, option: str | None, force: bool, piped: bool = False) -> "Output":
        """The output of an option -o. Default: standard output for `piped` input, else the current folder.

        Raises:
            Unusable: image bytes would go to a terminal.
        """
        if option == "-" or (option is None and piped):
            if sys.stdout.isatty():
                raise Unusable("-o - would write an image to this terminal: name a file, or pipe the output on")
            return cls(None, False, force)
        path = Path(option or ".")
        return cls(path, path.is_dir() or (option or ".").endswith("/"), force)

    @property
    def suffix(self) -> str | None:
        """The suffix of the one file, in lower case, with its dot. None for a folder or standard output."""
        return None if self.path is None or self.is_folder else self.path.suffix.lower()

    def check_kind(self, *suffixes: str) -> None:
        """Refuse a file name with another suffix.

        Raises:
            Unusable: names the suffixes.
        """
        if self.suffix is not None and self.suffix not in suffixes:
            kinds = " or ".join(suffixes)
            raise Unusable(f"-o {self.path}: a file must end in {kinds}, a folder in /, and - is standard output")

    def check_new(self) -> None:
        """Refuse an existing file, before a new seed draws another image.

        Raises:
            Unusable: names the file.
        """
        if self.suffix is not None and self.path is not None and self.path.exists() and not self.force:
            raise Unusable(_in_the_way(self.path))

    def write(self, files: Mapping[str, bytes]) -> list[Path]:
        """Write results by their names, and return the written paths. One place takes only one result.

        Existing files with other bytes are found before the first write, so either all results are written or none.

        Raises:
            Unusable: a file exists with other bytes, or cannot be written.
        """
        if self.path is None:
            [content] = files.values()
            _write_out(content)
            return []
        if self.is_folder:
            targets = {self.path / name: content for name, content in files.items()}
        elif self.suffix == ".zip":
            targets = {self.path: _archive(files)}
        else:
            [content] = files.values()
            targets = {self.path: content}
        try:
            if not self.force:
                for path, content in targets.items():
                    if path.exists() and path.read_bytes() != content:
                        raise Unusable(_in_the_way(path))
            for path, content in targets.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(path, content)
        except OSError as error:
            raise Unusable(f"{error.filename}: cannot be written: {error.strerror or error}") from None
        return list(targets)


def npy(array: NDArray[np.float32]) -> bytes:
    """An .npy file."""
    np.save(file := io.BytesIO(), array, allow_pickle=False)
    return file.getvalue()


def refuse_json_beside(output: Output, as_json: bool) -> None:
    """Refuse both JSON and an image on standard output.

    Raises:
        Unusable: says how to get both.
    """
    if as_json and output.path is None:
        raise Unusable("--json and the image cannot both go to standard output: name a file with -o")


def _write_out(content: bytes) -> None:
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, STANDARD_OUTPUT) from None


def _in_the_way(path: Path) -> str:
    return f"{path} is there, and is another image: --force writes over it"


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _archive(files: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), content)
    return file.getvalue()
