"""Which backend computes, in which precision, and how wide its passes are."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from model.backends import openvino
from model.backends.backend import Backend, Precision
from model.backends.choose import choose, default_width
from model.backends.openvino import OpenVINOBackend
from model.backends.padded import PaddedBackend
from tests.trajectories import CPU, description_of, small_network

SHAPE = (3, 4, 4)
DESCRIPTION = description_of(small_network(), SHAPE)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Choosing changes torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chosen(
    precision: Precision | Literal["auto"], max_batch: int | None = 2, cache_dir: Path | None = None, threads: int = 1
) -> Backend:
    return choose(small_network(), DESCRIPTION, CPU, precision, threads, max_batch, cache_dir)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.usefixtures("without_openvino")
def test_torch_computes_where_openvino_is_not_installed(
    precision: Precision | Literal["auto"], expected: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    backend = chosen(precision)
    assert isinstance(backend, PaddedBackend)
    assert backend.fingerprint["precision"] == expected
    assert list(backend.widths) == [2]
    assert warnings(caplog) == [
        "OpenVINO is not installed, so torch computes, several times slower: pip install 'stepwise[cpu]'"
    ]


@pytest.mark.parametrize(
    ("native", "precision", "expected"),
    [
        (True, "auto", "bfloat16"),
        (True, "float32", "float32"),
        (True, "bfloat16", "bfloat16"),
        (False, "auto", "float32"),
        (False, "float32", "float32"),
    ],
)
def test_openvino_computes_on_the_cpu(
    native: bool,
    precision: Precision | Literal["auto"],
    expected: Precision,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(openvino, "computes_bfloat16", lambda: native)
    backend = chosen(precision, threads=2)
    assert isinstance(backend, OpenVINOBackend)
    assert backend.fingerprint["precision"] == expected
    assert backend.fingerprint["threads"] == 2
    assert list(backend.widths) == [1, 2]
    assert torch.get_num_threads() == 1
    assert warnings(caplog) == []


def test_torch_computes_bfloat16_without_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OpenVINO would compute in float32, without a word."""
    monkeypatch.setattr(openvino, "computes_bfloat16", lambda: False)
    backend = chosen("bfloat16")
    assert isinstance(backend, PaddedBackend)
    assert backend.fingerprint["precision"] == "bfloat16"
    assert warnings(caplog) == ["this processor has no instructions for bfloat16, so torch computes it, slowly"]


def test_converted_models_are_kept_in_the_cache(tmp_path: Path) -> None:
    chosen("float32", cache_dir=tmp_path)
    assert len(list((tmp_path / "openvino").iterdir())) == 1


def test_sizes_are_compiled_when_passes_need_them() -> None:
    """With the memory that this machine has."""
    backend = chosen("float32", max_batch=2)
    assert isinstance(backend, OpenVINOBackend)
    assert backend.sizes == [1]
    x, numbers = torch.zeros((2, *SHAPE)), torch.zeros(2, dtype=torch.int64)
    out = backend.start(x, numbers, numbers)().clone()
    assert backend.sizes == [1, 2]
    alone = backend.start(x[:1], numbers[:1], numbers[:1])()
    assert torch.equal(out[:1], alone)


def test_passes_of_large_networks_are_narrow_by_default() -> None:
    small = DESCRIPTION
    large = replace(small, num_parameters=35_746_307, image_shape=(3, 32, 32))
    huge = replace(large, image_shape=(3, 256, 256))
    assert [default_width(model, "cuda") for model in (small, large, huge)] == [32, 32, 32]
    middling = replace(large, num_parameters=4_000_000)
    assert [default_width(model, "openvino") for model in (small, middling, large, huge)] == [16, 8, 4, 1]
    assert [default_width(model, "padded") for model in (small, large, huge)] == [8, 1, 1]


@pytest.mark.usefixtures("without_openvino")
def test_the_default_width_is_that_of_the_backend_without_openvino() -> None:
    assert list(chosen("float32", max_batch=None).widths) == [8]


def test_the_default_width_is_that_of_the_backend() -> None:
    assert list(chosen("float32", max_batch=None).widths) == list(range(1, 17))
