"""What an installation contains and can do: the wheel's client alone, and a server with the oldest dependencies.

The tests need the package index. If the index cannot be reached, they are skipped.
"""

import subprocess
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import service
from stepwise.cli import exits
from tests.installations import INSTALLING_S, Installation, lower_bounds, skip_without_index, uv
from tests.programs import done, refused
from tests.servers import ROOT, ServerProcess, environment, read_png, serving, side_by_side

pytestmark = pytest.mark.slow

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BASE = list(map(Requirement, PROJECT["dependencies"]))
SERVER = list(map(Requirement, PROJECT["optional-dependencies"]["server"]))
CPU = [wanted for wanted in map(Requirement, PROJECT["optional-dependencies"]["cpu"]) if wanted.name != PROJECT["name"]]
COMMANDS = ("serve", "sample", "denoise", "noise", "verify", "info", "convert")
EXTRA = "pip install '.[cpu]', or '.[server]' where there is a GPU; from a wheel, pip install 'FILE.whl[cpu]'"
# Each of these tests found a bound: for pydantic and python-multipart, httpx, typer, OpenVINO.
TELLING = ("test_parsing", "test_way", "test_cli_exits", "test_conversion")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_index()
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--out-dir", folder, ROOT)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel without extras."""
    installation = Installation(tmp_path_factory.mktemp("light"))
    installation.install(wheel)
    return installation


@pytest.fixture(scope="module")
def oldest(wheel: Path) -> Iterator[Installation]:
    """The wheel with the oldest dependencies that pyproject.toml allows."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # some tests become another user, who cannot read pytest's folders
        oldest = Installation(Path(folder))
        oldest.install("--resolution", "lowest-direct", "--requirements", ROOT / "pyproject.toml", "--extra", "cpu")
        oldest.install("--no-deps", wheel)
        oldest.link_torch()
        yield oldest


# The wheel's client


def test_the_wheel_is_small_and_has_no_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.stat().st_size < 1_000_000
    assert {name.partition("/")[0] for name in names} == {
        "stepwise",
        "service",
        "model",
        f"stepwise_diffusion-{service.__version__}.dist-info",
    }
    assert "service/http/playground/index.html" in names
    assert [name for name in names if name.endswith(".safetensors")] == []


def test_the_client_brings_nothing_that_serves(light: Installation) -> None:
    """Except for what httpx (anyio, h11) and typer (pydantic) need."""
    of_client, of_server = (
        {canonicalize_name(requirement.name) for requirement in of} for of in (BASE, (*SERVER, *CPU))
    )
    assert of_client <= light.versions.keys()
    assert {"torch", "fastapi", "openvino", "pillow"} <= of_server
    assert of_server & light.versions.keys() <= {"anyio", "h11", "pydantic"}


def test_every_command_shows_its_help(light: Installation, tmp_path: Path) -> None:
    for command in ((), *((name,) for name in COMMANDS)):
        shown = done(light.run("-m", "stepwise", *command, "--help", folder=tmp_path))
        assert "Usage: stepwise" in shown
    assert done(light.run("-m", "stepwise", "--version", folder=tmp_path)) == f"stepwise {service.__version__}\n"
    serve = " ".join(done(light.run("-m", "stepwise", "serve", "--help", folder=tmp_path)).split())
    assert "the list of all settings needs the extra `server`" in serve


def test_the_command_line_draws(light: Installation, server: ServerProcess, tmp_path: Path) -> None:
    def stepwise(*arguments: str) -> str:
        return done(light.run("-m", "stepwise", *arguments, folder=tmp_path, STEPWISE_URL=server.url))

    assert stepwise("sample", "-c", "cat", "-s", "5") == "5.png\n"
    asked = server.client.post("/sample", json={"class_label": "cat", "seed": 5}, headers={"Accept": "image/png"})
    assert (tmp_path / "5.png").read_bytes() == asked.content
    assert "grey" in stepwise("info")
    assert stepwise("verify", "5.png") == "5.png: the same bytes\n"
    assert stepwise("noise", "5.png", "-t", "40", "-s", "1") == "5-noisy.png\n"
    assert stepwise("denoise", "5-noisy.png", "-t", "40", "-o", "clean.npy") == "clean.npy\n"


def test_a_difference_is_told_without_pillow(light: Installation, server: ServerProcess, tmp_path: Path) -> None:
    png = server.client.post("/sample", json={"seed": 5}, headers={"Accept": "image/png"}).content
    (tmp_path / "other.png").write_bytes(png + b"more")
    ended = light.run("-m", "stepwise", "verify", "other.png", folder=tmp_path, STEPWISE_URL=server.url)
    assert ended.returncode == exits.DIFFERENT
    said = ended.stdout.decode()
    assert said == "other.png: different: its pixels are not compared, for Pillow is not installed\n"


def test_the_python_client_draws(light: Installation, server: ServerProcess, tmp_path: Path) -> None:
    program = f"""
import stepwise
with stepwise.Client({server.url!r}) as client:
    drawn = client.sample(num_images=2, seed=5)
    events = list(client.stream(seed=5))
    array = client.denoise_array(drawn.images[0].png, 40)
assert isinstance(events[-1], stepwise.Done)
assert events[-2].image == drawn.images[0]
assert array.shape == (1, 16, 16)
print(stepwise.read_recipe(drawn.images[1].png)["seed"])
"""
    assert done(light.run("-c", program, folder=tmp_path)) == "6\n"


def test_what_needs_an_extra_says_how_to_get_it(light: Installation, server: ServerProcess, tmp_path: Path) -> None:
    """The command does nothing else."""
    accepted = server.metric("stepwise_accepted_total")
    for name, arguments in (
        ("stepwise serve", ["serve", "--port", "0"]),
        ("--local", ["sample", "--local"]),
        ("--sheet", ["sample", "--sheet", "-o", "sheet.png"]),
        ("stepwise convert", ["convert", "digits", "new"]),
    ):
        line = refused(
            light.run("-m", "stepwise", *arguments, folder=tmp_path, STEPWISE_URL=server.url), exits.UNUSABLE
        )
        assert line.startswith(f"{name} needs the extra `server`, and ")
        assert line.endswith(EXTRA)
    assert list(tmp_path.iterdir()) == []
    assert server.metric("stepwise_accepted_total") == accepted


# The oldest dependencies


def test_the_oldest_dependencies_are_those_of_the_bounds(oldest: Installation) -> None:
    """A bound that another package's requirements exceed would stay untested."""
    bounds = lower_bounds(wanted for wanted in (*BASE, *SERVER, *CPU) if wanted.name != "torch")
    installed = {name: version for name, version in oldest.versions.items() if name in bounds}
    assert {name: Version(version) for name, version in installed.items()} == {
        name: Version(bound) for name, bound in bounds.items()
    }


@pytest.fixture(scope="module")
def digits() -> Iterator[ServerProcess]:
    """A server of the digits in this environment."""
    with side_by_side(serving(WEIGHTS=ROOT / "weights" / "digits")) as [server]:
        yield server


def test_the_oldest_dependencies_serve(oldest: Installation, digits: ServerProcess, tmp_path: Path) -> None:
    """The wheel has no weights in the box. Versions of OpenVINO may differ by a rounding."""
    with side_by_side(serving(python=oldest.python, WEIGHTS=ROOT / "weights" / "digits")) as [server]:
        shown = done(
            oldest.run("-m", "stepwise", "sample", "-n", "4", "-s", "7", folder=tmp_path, STEPWISE_URL=server.url)
        )
        assert shown.splitlines() == ["7.png", "8.png", "9.png", "10.png"]
        for name in shown.splitlines():
            png = digits.client.get("/sample", params={"seed": name.removesuffix(".png")}).content
            drawn = read_png((tmp_path / name).read_bytes()).astype(int)
            assert np.abs(drawn - read_png(png)).max() <= 1
        assert server.client.get("/").status_code == 200
        assert server.client.get("/openapi.json").json()["paths"].keys() >= {"/sample", "/denoise", "/noise", "/info"}
        assert server.metric("stepwise_accepted_total") == 1


def test_a_wheel_has_no_weights_in_the_box(oldest: Installation, tmp_path: Path) -> None:
    line = refused(oldest.run("-m", "stepwise", "serve", "--port", "0", folder=tmp_path), exits.UNUSABLE)
    assert line == (
        "STEPWISE_WEIGHTS=digits is neither a file nor a folder; "
        "this installation has no weights in the box: name a folder or a file, or use a checkout or the image"
    )


def test_the_oldest_dependencies_pass_tests(oldest: Installation) -> None:
    """The tests of this checkout. The test tools have their current versions."""
    oldest.install(*(f"{name}=={metadata.version(name)}" for name in ("pytest", "pytest-xdist", "hypothesis")))
    modules = [f"tests/{name}.py" for name in TELLING]
    ended = subprocess.run(
        [oldest.python[0], "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *modules],
        cwd=ROOT,
        env={name: value for name, value in environment().items() if not name.startswith("PYTEST_")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALLING_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    assert " passed" in ended.stdout
