"""Hostile and damaged files of a checkpoint: none runs code, leads elsewhere, takes more memory than its bytes, or is
mistaken for something else. Also conversion, which must write exactly the loaded values."""

import io
import json
import os
import pickle
import random
import resource
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoints import native
from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.load import Checkpoint, convert, load
from model.description import ModelDescription
from model.schedule import Schedule
from tests.checkpoints import STEM, Json, edit, refusal, same_values, save_pipeline, small_unet
from tests.reference import DDPMScheduler
from tests.servers import write_weights

SAFE = f"{STEM}.safetensors"
BIN = f"{STEM}.bin"
UNET = f"unet/{SAFE}"
UNET_BIN = f"unet/{BIN}"
UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
INDEX = f"unet/{SAFE}.index.json"

KEY = "conv_in.weight"
SHAPE = [8, 3, 3, 3]
GIGABYTE = 2**30

Values = dict[Any, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def whole(saved: Path) -> Checkpoint:
    return load(saved)


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    """A nested pipeline that the test may change."""
    return shutil.copytree(saved, tmp_path / "pipeline")


@pytest.fixture
def pickled(pipeline: Path) -> Path:
    """The same without weights, for tests that write them as a pickle."""
    (pipeline / UNET).unlink()
    return pipeline


@pytest.fixture
def weights(saved: Path) -> Values:
    return dict(load_file(saved / UNET))


@contextmanager
def memory(more: int) -> Iterator[None]:
    """Limit the bytes that may still be allocated, touched or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_is_really_limited() -> None:
    with memory(GIGABYTE), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2 * GIGABYTE, dtype=torch.uint8)
    torch.empty(2 * GIGABYTE, dtype=torch.uint8)


# Pickles.

PICKLE = (
    "is a pickle, which can run code when it is opened: set STEPWISE_ALLOW_PICKLE=1 if you trust it, "
    "best for `stepwise convert` alone"
)
NO_ARCHIVE = "is not a file of torch.save in its format since torch 1.6: save it again, as safetensors"
PACKED = "is compressed, which torch.save never does"


class Call:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists once a payload has run."""
    return tmp_path / "it ran"


def payload(marker: Path) -> Call:
    return Call(os.system, f"touch '{marker}'")


def test_payloads_do_run_where_pickles_are_trusted(tmp_path: Path, marker: Path) -> None:
    torch.save({KEY: payload(marker)}, tmp_path / "trusted")
    torch.load(tmp_path / "trusted", weights_only=False)
    assert marker.exists()


def test_pickles_are_refused(pickled: Path, weights: Values) -> None:
    torch.save(weights, pickled / UNET_BIN)
    assert refusal(pickled) == f"{UNET_BIN}: {PICKLE}"
    assert refusal(pickled / UNET_BIN, pickled) == f"{UNET_BIN}: {PICKLE}"


def test_pickles_of_other_names_are_only_looked_for_where_they_are_named(pickled: Path, weights: Values) -> None:
    file = pickled / "unet" / "weights.bin"
    torch.save(weights, file)
    assert refusal(pickled) == f"unet: holds no {SAFE}"
    assert refusal(file, pickled) == f"unet/weights.bin: {PICKLE}"


def test_pickled_shards_are_refused(pickled: Path) -> None:
    small_unet().save_pretrained(pickled / "unet", max_shard_size="20KB", safe_serialization=False)
    assert refusal(pickled) == f"unet/{STEM}-00001-of-00012.bin: {PICKLE}"


def test_pickles_are_allowed(pickled: Path, weights: Values, whole: Checkpoint) -> None:
    torch.save(weights, pickled / UNET_BIN)
    assert same_values(load(pickled, allow_pickle=True), whole)


@pytest.mark.parametrize(
    "hide",
    [
        lambda weights, call: {**weights, KEY: call},
        lambda weights, call: {**weights, "extra": call},
        lambda weights, call: {**weights, "extra": {"deep": [(1, {"deeper": call})]}},
        lambda weights, call: {**weights, call: torch.zeros(1)},
        lambda weights, call: {**weights, KEY: [weights[KEY], call]},
        lambda weights, call: [weights, call],
        lambda weights, call: call,
    ],
    ids=["value", "extra value", "nested", "key", "list", "beside", "root"],
)
def test_code_is_refused_by_name_and_not_run(
    pickled: Path, weights: Values, marker: Path, hide: Callable[[Values, Call], object]
) -> None:
    torch.save(hide(weights, payload(marker)), pickled / UNET_BIN)
    assert refusal(pickled) == f"{UNET_BIN}: {PICKLE}"
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: would run posix.system, and is not opened"
    assert not marker.exists()


def test_all_code_is_named(pickled: Path, weights: Values, marker: Path) -> None:
    calls = [payload(marker), Call(eval, f"open({str(marker)!r}, 'w')"), Call(getattr, "", "join")]
    torch.save({**weights, "calls": calls}, pickled / UNET_BIN)
    message = "would run builtins.eval, builtins.getattr, posix.system, and is not opened"
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {message}"
    assert not marker.exists()


def test_whole_modules_are_refused(pickled: Path) -> None:
    """Unpickling a module runs code of its class."""
    torch.save(torch.nn.Linear(1, 1), pickled / UNET_BIN)
    message = refusal(pickled, allow_pickle=True)
    assert message.startswith(f"{UNET_BIN}: would run ")
    assert "torch.nn.modules.linear.Linear" in message


def test_code_in_other_protocols_is_not_run(pickled: Path, weights: Values, marker: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        torch.save({**weights, KEY: payload(marker)}, pickled / UNET_BIN, pickle_protocol=protocol)
        message = refusal(pickled, allow_pickle=True)
        assert message.startswith((f"{UNET_BIN}: would run posix.system", f"{UNET_BIN}: cannot be read: "))
        assert not marker.exists()


def test_code_outside_archives_is_not_run(pickled: Path, marker: Path) -> None:
    (pickled / UNET_BIN).write_bytes(pickle.dumps(payload(marker)))
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {NO_ARCHIVE}"
    torch.save(payload(marker), pickled / UNET_BIN, _use_new_zipfile_serialization=False)
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {NO_ARCHIVE}"
    assert not marker.exists()


def test_pickles_named_safetensors_are_not_run(pipeline: Path, weights: Values, marker: Path) -> None:
    torch.save({**weights, KEY: payload(marker)}, pipeline / UNET)
    assert refusal(pipeline, allow_pickle=True).startswith(f"{UNET}: cannot be read: ")
    assert not marker.exists()


@pytest.mark.parametrize("named", ["", "checkpoint-500", "checkpoint-500/unet", "checkpoint-500/unet_ema"])
def test_what_else_training_leaves_is_never_opened(pipeline: Path, marker: Path, named: str) -> None:
    step = pipeline / "checkpoint-500"
    for name in ("unet", "unet_ema"):
        shutil.copytree(pipeline / "unet", step / name)
        torch.save(payload(marker), step / name / "optimizer.bin")
    for name in ("optimizer.bin", "scheduler.bin", "scaler.pt"):
        torch.save({KEY: payload(marker)}, step / name)
    (step / "random_states_0.pkl").write_bytes(pickle.dumps(payload(marker)))
    (step / "random_states_1.pkl").symlink_to("/nowhere")
    load(pipeline / named, allow_pickle=True)
    assert not marker.exists()
    pickle.loads((step / "random_states_0.pkl").read_bytes())
    assert marker.exists()


def test_what_training_leaves_is_not_run_where_it_is_named(pipeline: Path, marker: Path) -> None:
    torch.save(payload(marker), pipeline / "optimizer.bin")
    assert refusal(pipeline / "optimizer.bin", pipeline) == f"optimizer.bin: {PICKLE}"
    message = "optimizer.bin: would run posix.system, and is not opened"
    assert refusal(pipeline / "optimizer.bin", pipeline, allow_pickle=True) == message
    (pipeline / "random_states_0.pkl").write_bytes(pickle.dumps(payload(marker)))
    load(pipeline / "random_states_0.pkl", allow_pickle=True)  # stands for its folder
    assert not marker.exists()


def test_code_beside_a_checkpoint_is_never_imported(
    pipeline: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pipeline.py", "unet/my_code.py", "my_code.py"):
        (pipeline / name).write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.chdir(pipeline)
    edit(pipeline / "model_index.json", {"_class_name": ["my_code", "MyPipeline"]})
    load(pipeline)
    edit(pipeline / UNET_CONFIG, {"_class_name": "my_code.MyUNet"})
    assert refusal(pipeline) == f"{UNET_CONFIG}: _class_name is my_code.MyUNet, and must be UNet2DModel"
    assert not marker.exists()


# Values in pickles.


def expanded(*shape: int) -> Tensor:
    """One number, expanded to any size."""
    return torch.zeros(1).expand(shape)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (expanded(10**11), f"{KEY}, [100000000000], has strides [0]: it is not dense"),
        (expanded(*SHAPE), f"{KEY}, {SHAPE}, has strides [0, 0, 0, 0]: it is not dense"),
        (torch.zeros(8, 1, 1, 1).expand(SHAPE), f"{KEY}, {SHAPE}, has strides [1, 0, 0, 0]: it is not dense"),
        (torch.zeros(3, 3, 3, 8).permute(3, 0, 1, 2), f"{KEY}, {SHAPE}, has strides [1, 72, 24, 8]: it is not dense"),
        (torch.zeros(8, 3, 3, 6)[..., ::2], f"{KEY}, {SHAPE}, has strides [54, 18, 6, 2]: it is not dense"),
        (
            torch.zeros(SHAPE).to_sparse(),
            f"{KEY} is torch.float32, torch.sparse_coo, and must be dense floating point",
        ),
        (
            torch.zeros(SHAPE, dtype=torch.int64),
            f"{KEY} is torch.int64, torch.strided, and must be dense floating point",
        ),
        (torch.zeros(SHAPE).bool(), f"{KEY} is torch.bool, torch.strided, and must be dense floating point"),
        (
            torch.zeros(SHAPE, dtype=torch.complex64),
            f"{KEY} is torch.complex64, torch.strided, and must be dense floating point",
        ),
        (
            torch.zeros(SHAPE).to(torch.float8_e4m3fn),
            f"{KEY} is torch.float8_e4m3fn, torch.strided, and must be dense floating point",
        ),
        (5, f"{KEY} is a int, and must be a tensor"),
        (None, f"{KEY} is a NoneType, and must be a tensor"),
        ({"a": torch.zeros(1)}, f"{KEY} is a dict, and must be a tensor"),
        ([torch.zeros(1)], f"{KEY} is a list, and must be a tensor"),
        (torch.zeros(8, 3, 3), f"{KEY} is [8, 3, 3], and must be {SHAPE}"),
        (torch.zeros(0), f"{KEY} is [0], and must be {SHAPE}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_refused(pickled: Path, weights: Values, value: object, message: str) -> None:
    torch.save({**weights, KEY: value}, pickled / UNET_BIN)
    with memory(GIGABYTE // 4):
        assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {message}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1), "holds a Tensor, and must hold a dict of tensors"),
        ([torch.zeros(1)], "holds a list, and must hold a dict of tensors"),
        ({3: torch.zeros(1)}, "3 is a Tensor, and must be a tensor"),
        ({"state_dict": {KEY: torch.zeros(1)}}, "state_dict is a dict, and must be a tensor"),
        ({"k" * 1000: 1}, f"{'k' * 59}… is a int, and must be a tensor"),
        ({}, f"lacks the key {KEY}, {SHAPE}"),
    ],
    ids=["tensor", "list", "key", "nested", "long", "empty"],
)
def test_pickles_of_something_else_are_refused(pickled: Path, value: object, message: str) -> None:
    torch.save(value, pickled / UNET_BIN)
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {message}"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor,
        lambda tensor: tensor.half(),
        lambda tensor: tensor.double(),
        torch.nn.Parameter,
        lambda tensor: torch.cat([torch.zeros(5), tensor.flatten()])[5:].view(tensor.shape),
    ],
    ids=["channels_last", "half", "double", "parameters", "offset"],
)
def test_tensors_accepted(
    pickled: Path, weights: Values, whole: Checkpoint, change: Callable[[Tensor], Tensor]
) -> None:
    torch.save(OrderedDict((key, change(tensor)) for key, tensor in weights.items()), pickled / UNET_BIN)
    assert same_values(load(pickled, allow_pickle=True), whole)


@pytest.mark.parametrize(
    "claim",
    [
        lambda tensor: torch.empty(tensor.shape, device="meta"),
        lambda tensor: Call(torch.Tensor, *tensor.shape),
    ],
    ids=["meta", "uninitialised"],
)
def test_tensors_without_values_are_refused(pickled: Path, weights: Values, claim: Callable[[Tensor], object]) -> None:
    """Tensors with the right shapes, without bytes in the file."""
    torch.save({key: claim(tensor) for key, tensor in weights.items()}, pickled / UNET_BIN)
    assert (pickled / UNET_BIN).stat().st_size < 20_000
    refusal(pickled, allow_pickle=True)


def test_one_tensor_without_values_is_refused(pickled: Path, weights: Values) -> None:
    """One such tensor among normal ones. It would expose uninitialised memory."""
    tensor = weights[KEY]
    torch.save({**weights, KEY: Call(torch.Tensor, *tensor.shape)}, pickled / UNET_BIN)
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: would run torch.Tensor, and is not opened"


def test_tensors_that_share_their_values_are_refused(pickled: Path, weights: Values) -> None:
    """All tensors share the bytes of one."""
    shared = torch.zeros(max(tensor.numel() for tensor in weights.values()))
    torch.save(
        {key: shared[: tensor.numel()].view(tensor.shape) for key, tensor in weights.items()}, pickled / UNET_BIN
    )
    refusal(pickled, allow_pickle=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused(pickled: Path, weights: Values) -> None:
    value = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    torch.save({**weights, KEY: value}, pickled / UNET_BIN)
    refusal(pickled, allow_pickle=True)


def rewritten(path: Path, compression: int) -> None:
    """Write an archive again."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def test_packed_archives_are_refused(pickled: Path) -> None:
    torch.save({KEY: torch.zeros(10**6)}, pickled / UNET_BIN)
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        rewritten(pickled / UNET_BIN, compression)
        assert (pickled / UNET_BIN).stat().st_size < 20_000
        with memory(GIGABYTE // 4):
            assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {PACKED}"


def test_archives_are_refused_as_packed_even_where_that_saved_nothing(pickled: Path, weights: Values) -> None:
    torch.save(weights, pickled / UNET_BIN)
    stored = (pickled / UNET_BIN).stat().st_size
    with zipfile.ZipFile(pickled / UNET_BIN, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{STEM}/more", b"x")
    assert (pickled / UNET_BIN).stat().st_size > stored
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {PACKED}"


def test_archives_that_are_only_rewritten_are_not_packed(pickled: Path, weights: Values, whole: Checkpoint) -> None:
    torch.save(weights, pickled / UNET_BIN)
    rewritten(pickled / UNET_BIN, zipfile.ZIP_STORED)
    assert same_values(load(pickled, allow_pickle=True), whole)


def test_archives_with_overlapping_entries_are_refused(pickled: Path) -> None:
    """Many entries with the same bytes, which grow like compressed ones."""
    torch.save({KEY: torch.zeros(10**6)}, pickled / UNET_BIN)
    with zipfile.ZipFile(pickled / UNET_BIN, "a") as archive:
        [large] = [entry for entry in archive.infolist() if entry.file_size >= 4 * 10**6]
        for i in range(100):
            again = zipfile.ZipInfo(f"{large.filename}{i}")
            again.header_offset, again.CRC = large.header_offset, large.CRC
            again.compress_size = again.file_size = large.file_size
            archive.filelist.append(again)
        archive.writestr(f"{STEM}/more", b"")
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {PACKED}"


def claiming(path: Path, numel: int, size: int) -> None:
    """An archive with a tensor of `size` numbers, whose storage claims `numel` numbers and has 1."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Storage) else None

    values = io.BytesIO()
    rebuild = torch._utils._rebuild_tensor_v2
    tensor = Call(rebuild, Storage(), 0, (size,), (1,), False, OrderedDict())
    Pickler(values, 2).dump({KEY: tensor})
    with zipfile.ZipFile(path, "w") as archive:
        contents = {"data.pkl": values.getvalue(), "byteorder": b"little", "data/0": bytes(4), "version": b"3\n"}
        for name, content in contents.items():
            archive.writestr(f"{STEM}/{name}", content)


def test_tensors_larger_than_their_storage_are_refused(pickled: Path) -> None:
    claiming(pickled / UNET_BIN, 1, 1)
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {KEY} is [1], and must be {SHAPE}"
    for numel, size in ((GIGABYTE, GIGABYTE), (1, GIGABYTE), (2, 2), (1, 2)):
        claiming(pickled / UNET_BIN, numel, size)
        with memory(GIGABYTE // 4):
            assert refusal(pickled, allow_pickle=True).startswith(f"{UNET_BIN}: cannot be read: RuntimeError: ")


def test_old_pickles_are_refused(pickled: Path, weights: Values) -> None:
    torch.save(weights, pickled / UNET_BIN, _use_new_zipfile_serialization=False)
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {NO_ARCHIVE}"


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 100, random.Random(0).randbytes(1000), b"PK\x03\x04" + random.Random(1).randbytes(1000)],
    ids=["empty", "zeros", "random", "archive"],
)
def test_files_that_are_no_archives_are_refused(pickled: Path, content: bytes) -> None:
    (pickled / UNET_BIN).write_bytes(content)
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {NO_ARCHIVE}"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_pickles_cut_short_are_refused(pickled: Path, weights: Values, share: float) -> None:
    torch.save(weights, pickled / UNET_BIN)
    content = (pickled / UNET_BIN).read_bytes()
    (pickled / UNET_BIN).write_bytes(content[: int(len(content) * share)])
    assert refusal(pickled, allow_pickle=True) == f"{UNET_BIN}: {NO_ARCHIVE}"


@pytest.mark.parametrize("names", [[], ["hello"], [f"{STEM}/data.pkl"], [f"{STEM}/version"]], ids=str)
def test_other_archives_are_refused(pickled: Path, names: list[str]) -> None:
    with zipfile.ZipFile(pickled / UNET_BIN, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    assert refusal(pickled, allow_pickle=True).startswith(f"{UNET_BIN}: cannot be read: ")


def test_scripts_are_refused(pickled: Path, weights: Values) -> None:
    """TorchScript contains code."""
    torch.save(weights, pickled / UNET_BIN)
    with zipfile.ZipFile(pickled / UNET_BIN, "a") as archive:
        archive.writestr(f"{STEM}/constants.pkl", pickle.dumps((), 2))
        archive.writestr(f"{STEM}/code/__torch__.py", b"")
    assert refusal(pickled, allow_pickle=True).startswith(f"{UNET_BIN}: cannot be read: ")


# safetensors.


def header(tensors: Json) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        random.Random(0).randbytes(1000),
        (10**9).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        header({KEY: entry(0, 864, SHAPE)}) + bytes(863),
        header({KEY: entry(0, 864, SHAPE)}) + bytes(865),
        header({KEY: entry(0, 4 * 10**12, [10**12])}),
        header({KEY: entry(0, 4, [10**12])}) + bytes(4),
        header({KEY: entry(0, 4, [2**62, 4])}) + bytes(4),
        header({KEY: entry(0, 4, [1]), "other": entry(0, 4, [1])}) + bytes(4),
        header({KEY: entry(4, 8, [1])}) + bytes(8),
        header({KEY: entry(0, 4, [-1])}) + bytes(4),
        header({KEY: entry(0, 4, [1], "F99")}) + bytes(4),
    ],
    ids=[
        "empty", "zeros", "random", "long header", "longer header", "short", "long", "no bytes", "shape", "overflow",
        "overlap", "hole", "negative", "dtype",
    ],
)  # fmt: skip
def test_safetensors_that_claim_what_they_lack_are_refused(pipeline: Path, content: bytes) -> None:
    (pipeline / UNET).write_bytes(content)
    with memory(GIGABYTE // 4):
        assert refusal(pipeline).startswith(f"{UNET}: cannot be read: ")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.99999])
def test_safetensors_cut_short_are_refused(pipeline: Path, share: float) -> None:
    content = (pipeline / UNET).read_bytes()
    (pipeline / UNET).write_bytes(content[: int(len(content) * share)])
    assert refusal(pipeline).startswith(f"{UNET}: cannot be read: ")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int64, "I64"), (torch.uint8, "U8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
    ids=str,
)
def test_safetensors_of_other_types_are_refused(pipeline: Path, weights: Values, dtype: torch.dtype, name: str) -> None:
    save_file({**weights, KEY: weights[KEY].to(dtype)}, pipeline / UNET)
    assert refusal(pipeline) == f"{UNET}: {KEY} is {name}, and must be floating point"


def without(key: str) -> Callable[[Values], Values]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name != key}


NORM = "mid_block.attentions.0.group_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("conv_out.bias"), "lacks the key conv_out.bias, [3]"),
        (
            without("mid_block.attentions.0.to_v.bias"),
            "lacks the key mid_block.attentions.0.to_v.bias, [16]",
        ),
        (
            lambda weights: {**weights, "conv_more.bias": torch.zeros(1)},
            "has the key conv_more.bias, which the network of config.json lacks",
        ),
        (
            lambda weights: {**weights, "module.conv_more.bias": torch.zeros(1)},
            "has the key module.conv_more.bias, which the network of config.json lacks",
        ),
        (
            lambda weights: {**weights, "mid_block.resnets.0.shortcut.weight": torch.zeros(1)},
            "has the key mid_block.resnets.0.shortcut.weight, which the network of config.json lacks",
        ),
        (
            lambda weights: {**weights, f"module.{NORM}": torch.zeros(16)},
            f"has the key module.{NORM}, which {SAFE} has as {NORM}",
        ),
        (
            lambda weights: {**weights, "mid_block.attentions.0.query.bias": torch.zeros(16)},
            f"has the key mid_block.attentions.0.to_q.bias, which {SAFE} has as mid_block.attentions.0.query.bias",
        ),
        (lambda weights: {**weights, KEY: torch.zeros(8, 3, 3, 4)}, f"{KEY} is [8, 3, 3, 4], and must be {SHAPE}"),
        (lambda weights: {**weights, KEY: torch.zeros(216)}, f"{KEY} is [216], and must be {SHAPE}"),
        (lambda weights: {**weights, NORM: torch.zeros(())}, f"{NORM} is [], and must be [16]"),
        (
            lambda weights: {**weights, "mid_block.attentions.0.to_q.weight": torch.zeros(16, 16, 1)},
            "mid_block.attentions.0.to_q.weight is [16, 16, 1], and must be [16, 16]",
        ),
        (lambda weights: {}, f"lacks the key {KEY}, {SHAPE}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_keys_refused(pipeline: Path, weights: Values, change: Callable[[Values], Values], message: str) -> None:
    save_file(change(weights), pipeline / UNET)
    assert refusal(pipeline) == f"{UNET}: {message}"


HUGE = {"block_out_channels": [16384, 16384], "down_block_types": ["AttnDownBlock2D"] * 2}


@pytest.mark.parametrize(
    "changes",
    [
        HUGE,
        {**HUGE, "layers_per_block": 64, "sample_size": 4096},
        {"time_embedding_type": "learned", "num_train_timesteps": 100_000, "time_embedding_dim": 16384},
        {"num_class_embeds": 1_000_000, "time_embedding_dim": 16384},
    ],
    ids=["wide", "deep", "time", "classes"],
)
def test_huge_configs_allocate_nothing(pipeline: Path, weights: Values, changes: Json) -> None:
    """All shapes are checked before memory is allocated."""
    edit(pipeline / UNET_CONFIG, changes)
    with memory(GIGABYTE // 4):
        assert " and must be [" in refusal(pipeline)
        save_file({}, pipeline / UNET)
        assert refusal(pipeline).startswith(f"{UNET}: lacks the key {KEY}, ")


def test_the_last_key_is_looked_at_before_anything_is_allocated(pipeline: Path, weights: Values) -> None:
    """All tensors in the file are right, but one of 16 GB is missing."""
    edit(pipeline / UNET_CONFIG, {"num_class_embeds": 1_000_000, "time_embedding_dim": 4096})
    wide = dict(small_unet(time_embedding_dim=4096).state_dict())
    save_file(wide, pipeline / UNET)
    with memory(GIGABYTE // 4):
        assert refusal(pipeline) == f"{UNET}: lacks the key class_embedding.weight, [1000000, 4096]"


# Links and pointers.

POINTER = "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"


@pytest.mark.parametrize("name", [UNET, UNET_CONFIG, SCHEDULER_CONFIG, "model_index.json"])
def test_pointers_of_git_lfs_are_refused(pipeline: Path, name: str) -> None:
    (pipeline / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    assert refusal(pipeline) == f"{name}: {POINTER}"


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_pointers_of_git_lfs_to_pickles_are_refused(pickled: Path, allow_pickle: bool) -> None:
    (pickled / UNET_BIN).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    assert refusal(pickled, allow_pickle=allow_pickle) == f"{UNET_BIN}: {POINTER}"


def test_native_pointers_of_git_lfs_are_refused(tmp_path: Path) -> None:
    for name in (native.CONFIG, native.WEIGHTS):
        folder = write_digits(tmp_path / f"digits-{name}")
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        assert refusal(folder) == f"{name}: {POINTER}"


def moved(file: Path, target: Path) -> None:
    """Move a file, and put a link in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.rename(target)
    file.symlink_to(target)


@pytest.mark.parametrize("name", [UNET, UNET_CONFIG, SCHEDULER_CONFIG, "model_index.json", "unet", "scheduler"])
def test_links_that_leave_the_folder_are_refused(pipeline: Path, tmp_path: Path, name: str) -> None:
    moved(pipeline / name, tmp_path / "outside" / Path(name).name)
    file = {"unet": UNET_CONFIG, "scheduler": SCHEDULER_CONFIG}.get(name, name)
    assert refusal(pipeline) == f"{file}: is a link that leaves the checkpoint's folder"


@pytest.mark.parametrize("name", [UNET, UNET_CONFIG])
def test_links_that_leave_the_folder_are_refused_by_any_name(pipeline: Path, tmp_path: Path, name: str) -> None:
    moved(pipeline / name, tmp_path / "outside" / Path(name).name)
    for named in ("unet", name, "model_index.json"):
        message = refusal(pipeline / named, pipeline)
        assert message.startswith(f"{name}: is a link that leaves the checkpoint's folder")


def test_links_to_folders_whose_name_begins_alike_are_refused(pipeline: Path, tmp_path: Path) -> None:
    moved(pipeline / UNET, tmp_path / "pipeline-other" / SAFE)
    assert refusal(pipeline) == f"{UNET}: is a link that leaves the checkpoint's folder"


def test_links_to_links_that_leave_the_folder_are_refused(pipeline: Path, tmp_path: Path) -> None:
    moved(pipeline / UNET, pipeline / "inside")
    moved(pipeline / "inside", tmp_path / "outside")
    assert refusal(pipeline) == f"{UNET}: is a link that leaves the checkpoint's folder"


def test_shards_that_leave_the_folder_are_refused(pickled: Path, tmp_path: Path) -> None:
    small_unet().save_pretrained(pickled / "unet", max_shard_size="20KB")
    name = f"unet/{STEM}-00007-of-00012.safetensors"
    moved(pickled / name, tmp_path / "outside" / "shard")
    assert refusal(pickled) == f"{name}: is a link that leaves the checkpoint's folder"


@pytest.mark.parametrize("named", ["", "model_index.json", "unet", UNET])
def test_links_inside_the_folder_are_followed(pipeline: Path, whole: Checkpoint, named: str) -> None:
    for name in (UNET, UNET_CONFIG, SCHEDULER_CONFIG):
        moved(pipeline / name, pipeline / "store" / Path(name).name)
    assert load(pipeline / named).description.digest == whole.description.digest


def test_links_that_a_training_checkpoint_shares_with_its_root_are_followed(pipeline: Path, whole: Checkpoint) -> None:
    shutil.copytree(pipeline / "unet", pipeline / "checkpoint-1" / "unet")
    (pipeline / "checkpoint-1" / UNET).unlink()
    (pipeline / "checkpoint-1" / UNET).symlink_to("../../unet/" + SAFE)
    assert load(pipeline / "checkpoint-1").description.digest == whole.description.digest


def test_native_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    for name in (native.CONFIG, native.WEIGHTS):
        folder = write_digits(tmp_path / f"digits-{name}")
        moved(folder / name, tmp_path / "outside" / name)
        assert refusal(folder) == f"{name}: is a link that leaves the checkpoint's folder"


@pytest.mark.parametrize(
    ("snapshot", "target", "followed"),
    [
        ("models--a--b/snapshots/0", "models--a--b/blobs/0", True),
        ("models--a--b/snapshots/0", "models--a--other/blobs/0", False),
        ("models--a--b/snapshots/0", "models--a--b/blobs/deep/0", False),
        ("models--a--b/snapshots/0", "models--a--b/snapshots/1/0", False),
        ("models--a--b/snapshots/0", "blobs/0", False),
        ("datasets--a--b/snapshots/0", "datasets--a--b/blobs/0", False),
        ("models--a--b/other/0", "models--a--b/blobs/0", False),
    ],
)
def test_links_into_the_cache_of_huggingface_hub(
    saved: Path, tmp_path: Path, snapshot: str, target: str, followed: bool
) -> None:
    """Links may lead only to blobs of their own repository."""
    folder = shutil.copytree(saved, tmp_path / snapshot)
    moved(folder / UNET, tmp_path / target)
    if followed:
        assert load(folder).description.name == "a/b"
    else:
        assert refusal(folder) == f"{UNET}: is a link that leaves the checkpoint's folder"


@pytest.mark.parametrize("name", [UNET, UNET_BIN])
def test_folders_in_the_place_of_files_are_refused(pickled: Path, name: str) -> None:
    (pickled / name).mkdir()
    assert refusal(pickled, allow_pickle=True) == f"{name}: cannot be read: Is a directory"


def test_links_to_nothing_are_refused(pickled: Path) -> None:
    (pickled / UNET).symlink_to("nothing")
    assert refusal(pickled) == f"{UNET}: cannot be read: No such file or directory"


def test_pipes_are_refused(pipeline: Path) -> None:
    """Opening a pipe would wait for a writer."""
    (pipeline / UNET).unlink()
    os.mkfifo(pipeline / UNET)
    assert refusal(pipeline) == f"{UNET}: is not a regular file"


@pytest.mark.parametrize("name", [UNET, UNET_BIN])
def test_links_to_themselves_are_refused(pickled: Path, name: str) -> None:
    (pickled / name).symlink_to(Path(name).name)
    assert refusal(pickled).startswith(f"{name}: ")


# Shards.


@pytest.fixture
def sharded(pickled: Path) -> Path:
    """Weights in a dozen files."""
    small_unet().save_pretrained(pickled / "unet", max_shard_size="20KB")
    return pickled


def shard(number: int) -> str:
    return f"{STEM}-{number:05}-of-00012.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        f"../unet/{shard(1)}",
        f"./{shard(1)}",
        f"deeper/{shard(1)}",
        f"{shard(1)}/",
        f"/etc/{shard(1)}",
        "..",
        ".",
        "",
        "/",
        "../../../etc/passwd",
        "config.json",
        f"{shard(1)}.pkl",
        f"{shard(1)}\0",
        "weights.pt",
        5,
        None,
        [shard(1)],
        {"file": shard(1)},
        True,
    ],
    ids=repr,
)
def test_names_of_shards_refused(sharded: Path, name: object) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, {"weight_map": {**weight_map, KEY: name}})
    message = f"weight_map has {shown(repr(name))}, which is not the plain name of a .safetensors or .bin file"
    assert refusal(sharded) == f"{INDEX}: {message}"


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3], ids=repr)
def test_indexes_without_a_map_are_refused(sharded: Path, weight_map: object) -> None:
    edit(sharded / INDEX, {"weight_map": weight_map})
    message = "must be an object that names the file of each key"
    assert refusal(sharded) == f"{INDEX}: weight_map is {weight_map}, and {message}"
    edit(sharded / INDEX, {}, without="weight_map")
    assert refusal(sharded) == f"{INDEX}: weight_map is None, and {message}"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"], ids=repr)
def test_indexes_that_are_no_json_objects_are_refused(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    assert refusal(sharded).startswith(f"{INDEX}: ")


def test_missing_shards_are_refused(sharded: Path) -> None:
    (sharded / "unet" / shard(5)).unlink()
    assert refusal(sharded) == f"unet/{shard(5)}: cannot be read: No such file or directory"


def test_shards_that_the_index_leaves_out_are_not_read(sharded: Path) -> None:
    """A missing key belongs to no shard, so the error names the folder."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    last = sorted(set(weight_map.values()))[-1]
    edit(sharded / INDEX, {"weight_map": {key: name for key, name in weight_map.items() if name != last}})
    [first, *_] = [key for key in small_unet().state_dict() if weight_map[key] == last]
    assert refusal(sharded).startswith("unet: lacks the key ")
    assert first in load_file(sharded / "unet" / last)


def test_keys_in_two_shards_are_refused(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = shard(12 if weight_map[KEY] != shard(12) else 1)
    file = sharded / "unet" / other
    save_file({**load_file(file), KEY: torch.zeros(SHAPE)}, file)
    first, second = sorted([weight_map[KEY], other])
    assert refusal(sharded) == f"unet/{second}: has the key {KEY}, which {first} has as {KEY}"


def test_shards_cut_short_are_refused(sharded: Path) -> None:
    file = sharded / "unet" / shard(3)
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(sharded).startswith(f"unet/{shard(3)}: cannot be read: ")


# Random damage.


@pytest.mark.parametrize("name", [UNET, UNET_BIN, UNET_CONFIG, SCHEDULER_CONFIG, "model_index.json"])
def test_damage_is_refused_or_changes_nothing_but_values(pipeline: Path, weights: Values, name: str) -> None:
    """Whatever bytes change, loading gives a network of this shape or a one-line error."""
    if name == UNET_BIN:
        (pipeline / UNET).unlink()
        torch.save(weights, pipeline / UNET_BIN)
    whole = (pipeline / name).read_bytes()
    rng = random.Random(name)
    lines = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 30])):
            # Mostly at the beginning and the end, where sizes and names are.
            place = rng.choice([rng.randrange(len(whole)), rng.randrange(min(2000, len(whole)))])
            damaged[rng.choice([place, len(whole) - 1 - place])] = rng.randrange(256)
        (pipeline / name).write_bytes(damaged)
        with memory(GIGABYTE):
            try:
                checkpoint = load(pipeline, allow_pickle=True)
            except CheckpointError as error:
                lines.append(str(error))
            else:
                assert checkpoint.description.num_parameters > 0
    assert len(lines) > 5
    assert all(len(line.splitlines()) == 1 for line in lines)


# Conversion.


def write_digits(folder: Path) -> Path:
    """Native weights like those in the box."""
    return write_weights(
        folder,
        in_channels=1,
        model_channels=8,
        channel_multipliers=[1, 2],
        norm_groups=4,
        middle_attention=True,
        input_skip=True,
        image_size=[16, 16],
        num_classes=3,
        class_names=["a", "b", "c"],
        schedule={"prediction_type": "v_prediction", "clip_sample": True},
        recommended={"sampler": "dpmpp_2m", "num_inference_steps": 8, "guidance_scale": 2.0},
    )


def write_half(folder: Path) -> Path:
    save_pipeline(folder)
    (folder / UNET).unlink()
    small_unet(num_class_embeds=4).save_pretrained(folder / "unet", variant="fp16")
    return folder


def write_pickle(folder: Path) -> Path:
    scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range", timestep_spacing="trailing")
    save_pipeline(folder, small_unet(out_channels=6), scheduler)
    (folder / UNET).unlink()
    torch.save(small_unet(out_channels=6).state_dict(), folder / UNET_BIN)
    return folder


SOURCES: dict[str, Callable[[Path], Path]] = {
    "native": write_digits,
    "diffusers": save_pipeline,
    "half": write_half,
    "pickle": write_pickle,
}


def facts(description: ModelDescription) -> Json:
    values = {field.name: getattr(description, field.name) for field in fields(description)}
    return {**values, "schedule": description.schedule.model_dump()}


def output(checkpoint: Checkpoint) -> Tensor:
    x = torch.randn((2, *checkpoint.description.image_shape), generator=torch.Generator().manual_seed(0))
    labels = None if checkpoint.description.num_classes is None else torch.tensor([0, 2])
    with torch.inference_mode():
        out: Tensor = checkpoint.network(x, torch.tensor([3, 900]), labels)
    return out


@pytest.mark.parametrize("kind", SOURCES)
def test_conversion(tmp_path: Path, kind: str) -> None:
    source, target = SOURCES[kind](tmp_path / "my weights"), tmp_path / "deep" / "down" / "target"
    before = load(source, allow_pickle=True)
    converted = convert(source, target, allow_pickle=True)
    shutil.rmtree(source)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    after = load(target)
    assert facts(after.description) == {**facts(before.description), "name": "target"}
    assert after.description.digest == converted.description.digest
    assert after.description.schedule.clips_multistep == before.description.schedule.clips_multistep
    assert same_values(after, before)
    assert torch.equal(output(after), output(before))
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.float32}


def test_converted_config_has_the_fields_that_were_set(tmp_path: Path) -> None:
    source = write_digits(tmp_path / "digits")
    config = json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "target")
    text = (tmp_path / "target" / "config.json").read_text()
    assert json.loads(text) == config
    assert text.startswith('{\n  "architecture": "diffusion_unet",\n')
    assert text.endswith("}\n")


def test_converted_config_of_diffusers_has_the_fields_that_were_set(tmp_path: Path) -> None:
    source = save_pipeline(tmp_path / "source")
    (source / SCHEDULER_CONFIG).write_text('{"_class_name": "DDPMScheduler", "clip_sample": true, "beta_end": 0.03}')
    network = {"_class_name": "UNet2DModel", "norm_num_groups": 4, "block_out_channels": [8, 16], "layers_per_block": 1}
    types = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    (source / UNET_CONFIG).write_text(json.dumps({**network, **types, "sample_size": 8, "dropout": 0.1, "decay": 0.9}))
    convert(source, tmp_path / "target")
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == {
        "architecture": "unet_2d",
        "num_classes": None,
        "image_size": [8, 8],
        "schedule": {"beta_end": 0.03},
        "recommended": {"sampler": "ddim", "num_inference_steps": 50},
        "network": {"norm_num_groups": 4, "block_out_channels": [8, 16], "layers_per_block": 1, **types},
    }
    assert load(tmp_path / "target").description.schedule == Schedule(beta_end=0.03)


def test_conversion_keeps_a_name_that_was_given(tmp_path: Path) -> None:
    source = write_digits(tmp_path / "digits")
    edit(source / "config.json", {"name": "owner/digits"})
    convert(source, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    assert facts(load(tmp_path / "twice").description) == facts(load(source).description)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()


def test_conversion_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    convert(write_digits(tmp_path / "digits"), tmp_path / "target")
    load(tmp_path / "target")


@pytest.mark.parametrize("kind", ["folder", "file", "itself"])
def test_targets_that_are_not_empty_are_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    source = write_digits(tmp_path / "digits")
    target = source if kind == "itself" else tmp_path / "target"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    elif kind == "file":
        target.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError) as error:
        convert(source, target)
    assert str(error.value) == f"{target} exists, and is not an empty folder"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_nothing_is_written_of_sources_that_cannot_be_loaded(tmp_path: Path, pipeline: Path) -> None:
    (pipeline / UNET).write_bytes((pipeline / UNET).read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        convert(pipeline, tmp_path / "deep" / "target")
    assert not (tmp_path / "deep").exists()


def test_conversion_is_whole_or_not_at_all(tmp_path: Path) -> None:
    """If the disk gets full half-way, no file stays."""
    source = write_digits(tmp_path / "digits")
    size = (source / "model.safetensors").stat().st_size
    (tmp_path / "deep").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            convert(source, tmp_path / "deep" / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "deep").iterdir()) == []


def test_pickles_are_converted_only_where_they_are_allowed(tmp_path: Path) -> None:
    source = write_pickle(tmp_path / "source")
    with pytest.raises(CheckpointError, match="is a pickle"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
