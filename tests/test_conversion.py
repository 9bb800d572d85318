"""The cache of converted models: a model is converted once, and a broken folder never prevents a start."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.backends import conversion
from model.backends.conversion import MODEL, SUMS, WEIGHTS, Converted, at_size, converted
from model.backends.network import decoder, denoiser, encoder
from model.backends.openvino import OpenVINOBackend
from model.description import ModelDescription
from model.nets.unet import DiffusionUNet
from tests.autoencoders import latent_description, small_autoencoder
from tests.networks import fill
from tests.servers import PATIENCE, ROOT
from tests.trajectories import description_of

SHAPE = (1, 4, 4)
T = 10


class Small(DiffusionUNet):
    def __init__(self) -> None:
        super().__init__(1, 4, (1,), norm_groups=2)
        fill(self)


class CannotBeConverted(Small):
    """Make conversion fail, so that models can only come from the cache."""

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        raise AssertionError("it is converted")


def described(digest: str = "0" * 64) -> ModelDescription:
    return description_of(Small(), SHAPE, T, digest)


def output(made: Converted) -> Tensor:
    model = made.model
    rng = torch.Generator().manual_seed(0)
    shapes = {"x": SHAPE, "emb": (16,)}
    shapes = {port.any_name: shapes[port.any_name] for port in model.inputs}
    backend = OpenVINOBackend(at_size(model, shapes), shapes, "float32", 1, 1, lambda: 0, made.release)
    return backend.start({name: torch.randn((1, *shape), generator=rng) for name, shape in shapes.items()})().clone()


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """The output without a cache."""
    return output(converted(denoiser(Small(), described()), None))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the network's entry."""
    cache = tmp_path_factory.mktemp("cache")
    converted(denoiser(Small(), described()), cache)
    return cache


@pytest.fixture
def filled(original: Path, tmp_path: Path) -> Path:
    """A cache with the network's entry, for one test."""
    return shutil.copytree(original, tmp_path / "filled")


def kept(cache: Path) -> Tensor:
    """The output of the cached model. Nothing is converted."""
    return output(converted(denoiser(CannotBeConverted(), described()), cache))


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "openvino").iterdir() if not path.name.startswith("."))


def leftovers(cache: Path) -> list[Path]:
    return [path for path in (cache / "openvino").iterdir() if path.name.startswith(".")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_is_converted_once(tmp_path: Path, expected: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "not" / "there yet"
    assert torch.equal(output(converted(denoiser(Small(), described()), cache)), expected)
    [entry] = entries(cache)
    assert {path.name for path in entry.iterdir()} == {MODEL, WEIGHTS, SUMS}
    assert leftovers(cache) == []
    times = {path: path.stat().st_mtime_ns for path in entry.iterdir()}
    assert torch.equal(kept(cache), expected)
    assert {path: path.stat().st_mtime_ns for path in entry.iterdir()} == times
    assert warnings(caplog) == []


def test_without_a_cache_each_model_is_converted() -> None:
    with pytest.raises(RuntimeError, match="it is converted"):
        converted(denoiser(CannotBeConverted(), described()), None)


def test_weights_keep_their_precision(tmp_path: Path) -> None:
    """OpenVINO's default would write float16."""
    model = converted(denoiser(Small(), described()), tmp_path).model
    types = {node.get_output_element_type(0).get_type_name() for node in model.get_ops() if node.get_output_size()}
    assert "f32" in types
    assert types <= {"f32", "i32", "i64"}


def test_other_weights_are_another_entry(filled: Path, expected: Tensor) -> None:
    other = Small()
    fill(other, seed=1)
    assert not torch.equal(output(converted(denoiser(other, described("1" * 64)), filled)), expected)
    assert len(entries(filled)) == 2
    assert torch.equal(kept(filled), expected)


class NotConvertible(nn.Module):
    """Has the parameters of a network, and cannot be converted."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        raise AssertionError("it is converted")


def test_each_network_of_a_model_has_its_entry(filled: Path) -> None:
    """The networks of a latent model have the same digest. Here two also have the same shape."""
    autoencoder = small_autoencoder("kl", block_out_channels=(8,), latent_channels=SHAPE[0], image_channels=SHAPE[0])
    model = latent_description(autoencoder, SHAPE, described().digest)
    halves = decoder(autoencoder, model), encoder(autoencoder, model)
    expected = [output(converted(half, filled)) for half in halves]
    assert not torch.equal(*expected)
    assert len(entries(filled)) == 3
    for half, one in zip(halves, expected, strict=True):
        assert torch.equal(output(converted(replace(half, module=NotConvertible(half.module)), filled)), one)
        with pytest.raises(RuntimeError, match="it is converted"):
            converted(replace(half, module=NotConvertible(half.module), digest="2" * 64), filled)


def test_another_program_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "unet.py"
    monkeypatch.setattr(conversion, "_SOURCES", (str(source),))
    for text in ("x = 1", "x = 2"):
        source.write_text(text)
        converted(denoiser(Small(), described()), tmp_path)
    assert len(entries(tmp_path)) == 2


def test_the_code_of_every_layer_counts() -> None:
    """A new version of a layer must not find the model of the old one. The others hold no layer."""
    names = {Path(source).name for source in conversion._SOURCES if Path(source).parent.name == "nets"}
    written = {path.name for path in (ROOT / "model" / "nets").glob("*.py")}
    assert written - names == {"__init__.py", "embedder.py", "precision.py", "unets.py"}


@pytest.mark.parametrize("version", ["ov", "torch"])
def test_another_library_is_another_entry(filled: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getattr(conversion, version), "__version__", "another")
    converted(denoiser(Small(), described()), filled)
    assert len(entries(filled)) == 2


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        whole = (entry / name).read_bytes()
        changed = change(whole)
        assert changed != whole
        (entry / name).write_bytes(changed)

    return damage


def whole_sums_of_nonsense(entry: Path) -> None:
    """A model that OpenVINO cannot read."""
    (entry / MODEL).write_text("<net/>")
    sums = {name: conversion._sum(entry / name) for name in (MODEL, WEIGHTS)}
    (entry / SUMS).write_text(json.dumps(sums))


def a_file_in_its_place(entry: Path) -> None:
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    entry.write_text("")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": rewrite(WEIGHTS, lambda whole: whole[:-1]),
    "weights empty": rewrite(WEIGHTS, lambda whole: b""),
    "a bit of the weights": rewrite(WEIGHTS, lambda whole: whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]),
    "model changed": rewrite(MODEL, lambda whole: whole + b" "),
    "wrong sum": rewrite(SUMS, lambda whole: whole.replace(b'": "', b'": "0')),
    "sums no JSON": rewrite(SUMS, lambda whole: whole[:-1]),
    "sums no text": rewrite(SUMS, lambda whole: b"\xff\xfe"),
    "sums nested too deep": rewrite(SUMS, lambda whole: b"[" * 100_000),
    "sums no object": rewrite(SUMS, lambda whole: b"[]"),
    "no sums": lambda entry: (entry / SUMS).unlink(),
    "no weights": lambda entry: (entry / WEIGHTS).unlink(),
    "no model": lambda entry: (entry / MODEL).unlink(),
    "cannot be read by OpenVINO": whole_sums_of_nonsense,
    "a file in its place": a_file_in_its_place,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_made_again(
    damage: Callable[[Path], None], filled: Path, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    [entry] = entries(filled)
    damage(entry)
    assert torch.equal(output(converted(denoiser(Small(), described()), filled)), expected)
    assert warnings(caplog) == ["a converted model in the cache is damaged, and is converted again"]
    assert entries(filled) == [entry]
    assert leftovers(filled) == []
    converted(denoiser(CannotBeConverted(), described()), filled)
    assert len(warnings(caplog)) == 1


# Writers.


def test_the_model_of_the_first_of_two_writers_is_kept(
    tmp_path: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another server converts the same model while this one converts it."""
    write = conversion._write
    first: list[tuple[Path, int]] = []

    def late(model: Any, entry: Path) -> None:
        monkeypatch.setattr(conversion, "_write", write)
        converted(denoiser(Small(), described()), tmp_path)
        first.extend((path, path.stat().st_ino) for path in entries(tmp_path)[0].iterdir())
        write(model, entry)

    monkeypatch.setattr(conversion, "_write", late)
    assert torch.equal(output(converted(denoiser(Small(), described()), tmp_path)), expected)
    assert len(first) == 3
    assert [(path, path.stat().st_ino) for path, _ in first] == first
    assert leftovers(tmp_path) == []
    assert warnings(caplog) == []
    assert torch.equal(kept(tmp_path), expected)


def test_a_damaged_entry_that_another_server_removes_does_no_harm(
    tmp_path: Path, expected: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another server may remove the entry at any time."""
    converted(denoiser(Small(), described()), tmp_path)
    [entry] = entries(tmp_path)

    def other_server(entry: Path) -> None:
        for path in entry.iterdir():
            path.unlink()
        entry.rmdir()

    monkeypatch.setattr(conversion, "_read", other_server)
    assert torch.equal(output(converted(denoiser(Small(), described()), tmp_path)), expected)
    monkeypatch.undo()
    converted(denoiser(Small(), described()), tmp_path)
    assert entries(tmp_path) == [entry]
    assert torch.equal(kept(tmp_path), expected)
    assert len(warnings(caplog)) == 1


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Limit the size of files, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_a_warning(tmp_path: Path, expected: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    with small_files(1000):
        model = converted(denoiser(Small(), described()), tmp_path)
    assert torch.equal(output(model), expected)
    assert len(warnings(caplog)) == 1
    assert warnings(caplog)[0].startswith("the converted model is not kept, and every start converts it again: ")
    assert list((tmp_path / "openvino").iterdir()) == []


def test_a_process_that_dies_while_it_writes_leaves_no_entry(
    tmp_path: Path, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed process leaves only a temporary folder. The system kills a process whose file exceeds the limit."""
    code = f"""
import resource, signal
from pathlib import Path
from model.backends.conversion import converted
from model.backends.network import denoiser
from tests.test_conversion import Small, described
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
converted(denoiser(Small(), described()), Path({str(tmp_path)!r}))
"""
    command = [sys.executable, "-B", "-c", code]
    ended = subprocess.run(command, cwd=ROOT, timeout=PATIENCE, check=False)
    assert ended.returncode < 0  # killed by a signal
    assert entries(tmp_path) == []
    assert len(leftovers(tmp_path)) == 1
    assert torch.equal(output(converted(denoiser(Small(), described()), tmp_path)), expected)
    assert torch.equal(kept(tmp_path), expected)
    assert warnings(caplog) == []


# Unusable folders.


def no_folder_can_be_there(tmp_path: Path) -> Path:
    return Path("/proc/stepwise")


def a_file_in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def a_file_inside_in_the_way(tmp_path: Path) -> Path:
    (tmp_path / "openvino").write_text("")
    return tmp_path


def a_link_to_itself(tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    return tmp_path / "link"


@pytest.mark.parametrize(
    "folder", [no_folder_can_be_there, a_file_in_the_way, a_file_inside_in_the_way, a_link_to_itself]
)
def test_a_folder_that_cannot_be_used_costs_a_warning(
    folder: Callable[[Path], Path], tmp_path: Path, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    assert torch.equal(output(converted(denoiser(Small(), described()), folder(tmp_path))), expected)
    assert len(warnings(caplog)) == 1
    assert "and every start converts it again: " in warnings(caplog)[0]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that all users can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextmanager
def only_rights(folder: Path, mode: int) -> Iterator[None]:
    """Limit a folder's permissions. root, who has all permissions, becomes another user meanwhile."""
    root = os.geteuid() == 0
    before = folder.stat().st_mode
    folder.chmod(mode)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(before)


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["cannot be removed", "cannot be looked at"])
def test_a_damaged_entry_that_stays_costs_one_warning(
    mode: int, open_folder: Path, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    converted(denoiser(Small(), described()), open_folder)
    [entry] = entries(open_folder)
    (entry / SUMS).write_text("")
    with only_rights(open_folder / "openvino", mode):
        model = converted(denoiser(Small(), described()), open_folder)
    assert torch.equal(output(model), expected)
    assert len(warnings(caplog)) == 1
    assert "and every start converts it again: " in warnings(caplog)[0]
    assert (entry / SUMS).read_text() == ""


def test_an_entry_of_another_user_is_read(open_folder: Path, expected: Tensor) -> None:
    converted(denoiser(Small(), described()), open_folder)
    with only_rights(open_folder / "openvino", 0o555):
        assert torch.equal(kept(open_folder), expected)


def test_a_folder_that_cannot_be_written_costs_a_warning(
    open_folder: Path, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with only_rights(open_folder, 0o555):
        model = converted(denoiser(Small(), described()), open_folder)
    assert torch.equal(output(model), expected)
    assert len(warnings(caplog)) == 1
    assert list(open_folder.iterdir()) == []
