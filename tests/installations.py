"""Separate environments, made by uv from the package index, with the torch of the environment that runs the tests."""

import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.servers import ROOT, environment

UV = Path(sys.executable).with_name("uv")
INSTALLING_S = 600.0  # the largest package has 60 MB


class Installation:
    """An environment in a folder.

    Attributes:
        python: the interpreter, isolated: it sees neither this checkout nor this environment.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._interpreter = folder / "bin" / "python"
        self.python = (str(self._interpreter), "-I")
        uv("venv", "--python", sys.executable, folder)

    def install(self, *what: str | Path) -> None:
        """Install packages. torch is never one of them: its newest build is gigabytes."""
        no_torch = self._folder / "no-torch.txt"
        no_torch.write_text("torch\n")
        uv("pip", "install", "--python", self._interpreter, "--excludes", no_torch, *what)

    def link_torch(self) -> None:
        """Link the installed torch, and the packages that torch needs and the environment lacks."""
        [packages] = self._folder.glob("lib/python*/site-packages")
        for name in _with_all_it_needs("torch"):
            installed = metadata.distribution(name)
            for top in {path.parts[0] for path in installed.files or ()} - {"..", "__pycache__"}:
                if not (packages / top).exists():
                    (packages / top).symlink_to(str(installed.locate_file(top)))

    @property
    def versions(self) -> dict[str, str]:
        """The versions of the installed packages, by name."""
        lines = uv("pip", "freeze", "--python", self._interpreter).splitlines()
        found = {canonicalize_name(line.partition(" @ ")[0].partition("==")[0]): line for line in lines}
        return {name: line.rpartition("==")[2] for name, line in found.items()}

    def run(self, *arguments: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[bytes]:
        """Run the interpreter. Warnings are errors."""
        return subprocess.run(
            [*self.python, "-W", "error", *arguments],
            cwd=folder,
            env=environment() | {"COLUMNS": "100"} | settings,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=INSTALLING_S,
            check=False,
        )


def uv(*arguments: str | Path) -> str:
    """Run uv, and return its output."""
    ended = subprocess.run(
        [UV, "--quiet", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=INSTALLING_S, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def skip_without_index() -> None:
    """Skip the test where the package index cannot be reached."""
    asked = subprocess.run(
        [UV, "pip", "compile", "--no-cache", "--no-deps", "-"],
        input="httpx-sse",
        capture_output=True,
        text=True,
        timeout=INSTALLING_S,
        check=False,
    )
    if asked.returncode != 0:
        pytest.skip(f"the package index cannot be reached: {' '.join(asked.stderr.split())}")


def _with_all_it_needs(name: str, seen: Iterable[str] = ()) -> set[str]:
    """The names of an installed distribution and of everything that it needs."""
    found = {*seen, canonicalize_name(name)}
    for line in metadata.requires(name) or ():
        needed = Requirement(line)
        wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if wanted and canonicalize_name(needed.name) not in found and _is_installed(needed.name):
            found |= _with_all_it_needs(needed.name, found)
    return found


def _is_installed(name: str) -> bool:
    return any(metadata.distributions(name=name))


def lower_bounds(requirements: Iterable[Requirement]) -> dict[str, str]:
    """The version of each requirement's lower bound, by name."""
    return {
        canonicalize_name(requirement.name): re.findall(r">=([^,]+)", str(requirement.specifier))[0]
        for requirement in requirements
    }
