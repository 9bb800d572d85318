"""The documents' examples, unchanged: each block of sh, python and js, in order, on a real server.

The blocks of a document share a folder, so a block can use files of earlier ones. `sh emoji` and `js emoji` use the
emoji server; `sh text`, `python text` and `js text` a server of a tiny random Stable Diffusion, `sh xl` one
of a tiny random SDXL.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.pipelines import write_pipeline
from tests.servers import ROOT, START, ServerProcess, needs, serving, side_by_side

pytestmark = [pytest.mark.slow, needs("curl"), needs("node")]

DOCUMENTS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("quick-start", "api", "cli", "client", "clients", "text", "images")),
]
_BLOCK = re.compile(r"^```(sh|python|js)( emoji| text| xl)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ADDRESS = re.compile(r"(?:127\.0\.0\.1|localhost):8000")


class Block(NamedTuple):
    language: str
    weights: str
    code: str


def blocks(document: str) -> list[Block]:
    return [
        Block(language, weights.strip() or "digits", code)
        for language, weights, code in _BLOCK.findall((ROOT / document).read_text())
    ]


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The addresses of a server for each of the weights that examples use."""
    folder = tmp_path_factory.mktemp("weights")
    text, xl = write_pipeline(folder / "text"), write_pipeline(folder / "xl", kind="xl")
    weights = {"digits": "digits", "emoji": "emoji", "text": text, "xl": xl}
    with side_by_side(*(serving(WEIGHTS=of_one) for of_one in weights.values())) as servers:
        yield dict(zip(weights, map(address, servers), strict=True))


def address(server: ServerProcess) -> str:
    return "{}:{}".format(*server.address)


def run(block: Block, folder: Path, home: Path, server: str) -> None:
    code = _ADDRESS.sub(server, block.code).replace(".venv/bin/", "")
    match block.language:
        case "sh":
            command = ["bash", "-eu", "-o", "pipefail", "-c", code]
        case "python":
            command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", code]
        case _:
            command = ["node", "--input-type=module", "--eval", code]
    mine = {"HOME": str(home), "CURL_HOME": str(home), "STEPWISE_URL": f"http://{server}", "PYTHONPATH": str(ROOT)}
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **mine, "PATH": paths},
        capture_output=True,
        timeout=START,  # a block may run seven programs in sequence
    )
    assert done.returncode == 0, f"{code}\n{done.stdout.decode(errors='replace')}\n{done.stderr.decode()}"


def check(path: Path) -> None:
    """Check that a file's content fits its name."""
    match path.suffix:
        case ".png" | ".webp" | ".jpg":
            with Image.open(path) as image:
                image.load()
        case ".npy":
            assert np.isfinite(np.load(path)).all()
        case ".json":
            assert json.loads(path.read_text())
        case ".zip":
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None
                assert archive.namelist()
        case suffix:
            assert not suffix, f"{path.name}: nobody knows what it should be"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_do_what_they_say(
    document: str, addresses: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, home = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("home")
    (home / ".curlrc").write_text("fail-with-body\n")  # without it curl exits with 0 on errors
    found = blocks(document)
    assert found
    for block in found:
        run(block, folder, home, addresses[block.weights])
    made = [path for path in folder.rglob("*") if path.is_file()]
    assert made
    for path in made:
        check(path)
