"""The container image, as far as its files show. `make image-test` builds it and draws with it."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from service.config import PREFIX, Settings
from tests.servers import ROOT

LOCKS = ("service", "cpu", "cuda")
IMAGES = {"cpu": ("service", "cpu"), "cuda": ("service", "cuda")}  # what each target installs
PYTHONS = ("3.11", "3.12", "3.13")
TESTED_TORCH = ROOT / "requirements" / "torch.txt"  # `make` uses it as a constraint

# Files that the images need, and files that they must not contain.
NEEDED = (
    "service/__main__.py",
    "service/http/playground/index.html",
    "stepwise/cli/verify.py",
    "model/runner.py",
    "weights/digits/model.safetensors",
    "requirements/cuda.lock",
    "LICENSE",
)
UNNEEDED = (
    ".git/config",
    ".venv/bin/python",
    "tests/conftest.py",
    "weights/train.py",
    "weights/digits/prepare.py",
    "weights/digits/work/digits32.npz",
    "service/__pycache__/app.pyc",
    "stepwise.egg-info/PKG-INFO",
)


@dataclass
class Locked:
    requirement: Requirement
    hashes: list[str]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        [specifier] = self.requirement.specifier
        assert specifier.operator == "=="
        return specifier.version


def lock(name: str) -> list[Locked]:
    """The lines of a lock file, each with its hashes. The file may contain nothing else."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words, *hashes = re.split(r"\s+--hash=", line.strip())
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash_) for hash_ in hashes), line
        found.append(Locked(Requirement(words), hashes))
    return found


def project() -> list[Requirement]:
    """The requirements in pyproject.toml, with those of the extra `cpu`, which includes `server`."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    server, cpu = (list(map(Requirement, table["optional-dependencies"][name])) for name in ("server", "cpu"))
    [itself] = [requirement for requirement in cpu if requirement.name == table["name"]]
    assert itself.extras == {"server"}
    cpu.remove(itself)
    return [*map(Requirement, table["dependencies"]), *server, *cpu]


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions and their arguments. Variables are not expanded."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, arguments = line.partition(" ")
        yield name, " ".join(arguments.split())


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, without its FROM. "" has those before the first stage."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for name, arguments in instructions():
        if name == "FROM":
            found[arguments.rpartition(" AS ")[2]] = []
        else:
            found[list(found)[-1]].append((name, arguments))
    return found


def is_sent(path: str) -> bool:
    """Whether .dockerignore lets a file through. The last pattern that matches the file or a parent folder decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            steps = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*"}
            words = re.split(r"(\*\*/|\*\*|\*)", line.removeprefix("!").strip("/"))
            pattern = "".join(steps.get(word) or re.escape(word) for word in words)
            if re.fullmatch(f"{pattern}(/.*)?", path):
                sent = line.startswith("!")
    return sent


def test_the_locks_hold_what_the_project_asks_for() -> None:
    locked = {entry.name: entry for name in LOCKS for entry in lock(name)}
    for wanted in project():
        entry = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(entry.version), f"{wanted}, but {entry.version} is locked: make lock"


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("target", IMAGES)
def test_an_image_gets_each_package_once_and_all_that_is_asked_for(target: str, python: str) -> None:
    here = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    installed = [
        entry.name
        for name in IMAGES[target]
        for entry in lock(name)
        if entry.requirement.marker is None or entry.requirement.marker.evaluate(here)
    ]
    assert len(installed) == len(set(installed))
    wanted = {canonicalize_name(requirement.name) for requirement in project()}
    assert wanted - set(installed) == {"cpu": {"torch"}, "cuda": {"openvino"}}[target]  # torch has its own step


@pytest.mark.parametrize("name", LOCKS)
def test_all_that_is_locked_has_hashes_and_no_address(name: str) -> None:
    entries = lock(name)
    assert entries
    assert [entry.name for entry in entries if not entry.hashes or entry.requirement.url] == []
    text = (ROOT / "requirements" / f"{name}.lock").read_text()
    assert not re.search(r"://|^-|(^|\s)[/~]|@ ", text, re.M)


def test_torch_has_one_version() -> None:
    """The images and `make` install the same version. The CPU image takes it from PyTorch's index."""
    [of_lock] = [entry for name in LOCKS for entry in lock(name) if entry.name == "torch"]
    assert TESTED_TORCH.read_text() == f"torch=={of_lock.version}\n"
    commands = [arguments for name, arguments in stages()["cpu-build"] if name == "RUN" and "TORCH_INDEX" in arguments]
    assert "\"$(grep -o '^torch==[0-9.]*' /requirements/cuda.lock)+cpu\"" in commands[0]
    assert not [arguments for _, arguments in instructions() if re.search(r"torch==\d", arguments)]


def test_only_the_image_for_cuda_gets_cudas_libraries() -> None:
    for_cuda = [entry.name for entry in lock("cuda")]
    assert "nvidia-cublas" in for_cuda
    assert [name for name in for_cuda if not re.match(r"torch$|triton$|nvidia-|cuda-", name)] == []
    others = [entry.name for name in IMAGES["cpu"] for entry in lock(name)]
    assert [name for name in others if re.match(r"torch$|triton|nvidia|cuda", name)] == []


def test_installs_are_held_to_the_locks() -> None:
    installs = [
        arguments for name, arguments in instructions() if name == "RUN" and " install --no-cache-dir" in arguments
    ]
    assert len(installs) == 4
    for command in installs:
        assert "--no-deps" in command
        assert "--only-binary :all:" in command
        assert ("--require-hashes" in command) != ("TORCH_INDEX" in command)


def test_the_default_target_is_for_cuda_and_differs_from_the_other_in_its_stages_alone() -> None:
    by_name = stages()
    assert list(by_name)[-1] == "cuda"
    cpu = [(name, arguments.replace("cpu-build", "cuda-build")) for name, arguments in by_name["cpu"]]
    assert cpu == by_name["cuda"]
    assert by_name["cpu-python"] == by_name["cuda-python"]


def test_bases_are_pinned_by_a_tag() -> None:
    bases = [arguments for name, arguments in stages()[""] if name == "ARG"]
    assert [base.partition("=")[0] for base in bases] == ["BASE_IMAGE", "CPU_BASE_IMAGE"]
    for base in bases:
        assert re.search(r":(?!latest)[\w.-]*\d", base)


@pytest.mark.parametrize("target", IMAGES)
def test_an_image_has_what_an_engine_reads(target: str) -> None:
    of_stage = stages()[target]
    found = dict(of_stage)
    assert found["USER"] == "10001:10001"
    assert found["STOPSIGNAL"] == "SIGTERM"
    assert found["EXPOSE"] == str(Settings.model_fields["port"].default)
    assert found["ENTRYPOINT"].startswith("[")
    assert " CMD [" in found["HEALTHCHECK"]
    labels = {word.partition("=")[0].rpartition(".")[2] for word in shlex.split(found["LABEL"])}
    assert labels == {"title", "description", "licenses", "version", "revision"}
    given = {arguments.partition("=")[0] for name, arguments in of_stage if name == "ARG"}
    assert given == {"VERSION", "REVISION"}


def test_the_images_settings_are_settings() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    named = re.findall(rf"{PREFIX}[A-Z_]+", (ROOT / "Dockerfile").read_text())
    assert {f"{PREFIX}HOST", f"{PREFIX}CACHE_DIR", f"{PREFIX}PORT"} <= set(named) <= known


def test_what_is_copied_is_there_and_is_sent() -> None:
    sources = set()
    for name, arguments in instructions():
        if name == "COPY" and "--from=" not in arguments:
            *copied, _ = arguments.split()
            sources |= set(copied)
    assert {"service", "model", "weights", "requirements"} <= sources
    for source in sources:
        assert (ROOT / source).exists()
        assert is_sent(source)
    for path in NEEDED:
        assert (ROOT / path).exists()
        assert is_sent(path)
        assert any(path == source or path.startswith(f"{source}/") for source in sources), f"{path} is not copied"
    assert [path for path in UNNEEDED if is_sent(path)] == []


def test_every_module_is_sent() -> None:
    """All weights in the box are sent, too."""
    modules = [path for folder in ("stepwise", "service", "model") for path in (ROOT / folder).rglob("*.py")]
    weights = [path for name in ("config.json", "model.safetensors") for path in ROOT.glob(f"weights/*/{name}")]
    assert modules
    assert weights
    assert [path for path in (*modules, *weights) if not is_sent(str(path.relative_to(ROOT)))] == []


def test_lock_files_are_sorted_so_that_their_changes_can_be_read() -> None:
    for name in LOCKS:
        assert all(a <= b for a, b in pairwise(entry.name for entry in lock(name)))
    locks = [ROOT / "requirements" / f"{name}.lock" for name in LOCKS]
    assert sorted((ROOT / "requirements").iterdir()) == sorted([*locks, TESTED_TORCH])
