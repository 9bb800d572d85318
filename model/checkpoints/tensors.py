"""Files of tensors → a network's parameters, strictly, one tensor at a time. All shapes are checked before memory is
allocated."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import check_file
from model.nets.precision import HALVES

_MAPPED_BYTES = 16 * 2**20
# safetensors' dtypes → those of parameters.
_FLOATS = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """A tensor in a file: its key and its shape."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Naming:
    """A family's names for a network's parameters.

    Attributes:
        stored: maps a parameter's key and shape to the tensors of the file whose concatenation along the first
            dimension is the parameter.
        canonical: maps a key to its current name; None for a key that is not needed.
    """

    stored: Callable[[str, tuple[int, ...]], Sequence[Stored]] = lambda key, shape: [Stored(key, shape)]
    canonical: Callable[[str], str | None] = lambda key: key


class _TensorFile(Protocol):
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """By key, the dtypes of the parameters that tensors are copied to."""

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]: ...


def load_strictly(
    network: nn.Module, files: Sequence[Path], root: Path, naming: Naming, config: str, allow_pickle: bool
) -> None:
    """Load the parameters of a network that is on the meta device: on the CPU, in the precision of the files.

    float16 and bfloat16 stay so; all else becomes float32.

    Args:
        files: the files that together hold the tensors.
        root: the folder that must contain them.
        config: the name of the network's config file, for messages.
        allow_pickle: whether files other than safetensors may be opened.

    Raises:
        CheckpointError: naming the file, the key and what was expected. Nothing has been allocated then.
    """
    expected = {
        stored.key: _Place(key, n, stored.shape)
        for key, parameter in network.state_dict().items()
        for n, stored in enumerate(naming.stored(key, tuple(parameter.shape)))
    }
    opened = {path: _open(path, root, naming.canonical, allow_pickle) for path in files}
    found = _matched(opened, expected, naming.canonical, config)

    _allocate(network, _dtypes(opened, found))
    parameters = network.state_dict()
    with torch.no_grad():
        for path in files:
            for key, tensor in opened.pop(path).read(list(found[path])):
                parameter, n, shape = found[path][key]
                target = parameters[parameter].narrow(0, n * shape[0], shape[0])
                target.copy_(tensor.reshape(target.shape))


def _dtypes(opened: Mapping[Path, _TensorFile], found: Mapping[Path, Mapping[str, "_Place"]]) -> dict[str, torch.dtype]:
    """The dtype of each parameter: the narrowest that holds all of its parts exactly."""
    dtypes: dict[str, torch.dtype] = {}
    for path, file in opened.items():
        for raw_key, place in found[path].items():
            dtype = file.dtypes[raw_key]
            dtypes[place.parameter] = torch.promote_types(dtypes.get(place.parameter, dtype), dtype)
    return dtypes


def _allocate(network: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Bring the parameters of a network from the meta device to the CPU, without values."""
    for key, parameter in [*network.named_parameters()]:
        owner, _, name = key.rpartition(".")
        empty = torch.empty(parameter.shape, dtype=dtypes[key])
        setattr(network.get_submodule(owner), name, nn.Parameter(empty, requires_grad=False))


class _Place(NamedTuple):
    """The place of a file's tensor: the n-th part of a parameter along the first dimension."""

    parameter: str
    n: int
    shape: tuple[int, ...]


def _matched(
    opened: Mapping[Path, _TensorFile],
    expected: Mapping[str, _Place],
    canonical: Callable[[str], str | None],
    config: str,
) -> dict[Path, dict[str, _Place]]:
    """The place of each key, by file. The files must have every expected tensor once, and no others."""
    found: dict[Path, dict[str, _Place]] = {path: {} for path in opened}
    seen: dict[str, str] = {}
    for path, file in opened.items():
        for raw_key, shape in file.shapes.items():
            key = canonical(raw_key)
            if key is None:
                continue
            if key not in expected:
                raise CheckpointError(path, f"has the key {shown(raw_key)}, which the network of {config} lacks")
            if key in seen:
                raise CheckpointError(path, f"has the key {shown(raw_key)}, which {seen[key]}")
            if shape != expected[key].shape:
                raise CheckpointError(
                    path, f"{shown(raw_key)} is {shown(list(shape))}, and must be {list(expected[key].shape)}"
                )
            seen[key] = f"{path.name} has as {shown(raw_key)}"
            found[path][raw_key] = expected[key]
    for key, place in expected.items():
        if key not in seen:
            [*others, last] = opened
            raise CheckpointError(last.parent if others else last, f"lacks the key {key}, {list(place.shape)}")
    return found


def _open(path: Path, root: Path, canonical: Callable[[str], str | None], allow_pickle: bool) -> _TensorFile:
    check_file(path, root)
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path, canonical)
    if not allow_pickle:
        raise CheckpointError(
            path,
            "is a pickle, which can run code when it is opened: set STEPWISE_ALLOW_PICKLE=1 if you trust it, "
            "best for `stepwise convert` alone",
        )
    return _PickleFile(path, canonical)


class _SafetensorsFile:
    """A safetensors file, without the keys that are not needed. The library checks the header's sizes."""

    def __init__(self, path: Path, canonical: Callable[[str], str | None]) -> None:
        self._path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        try:
            with safe_open(path, "pt") as file:
                for key in filter(canonical, file.keys()):
                    view = file.get_slice(key)
                    dtype = _FLOATS.get(view.get_dtype())
                    if dtype is None:
                        raise CheckpointError(path, f"{shown(key)} is {view.get_dtype()}, and must be floating point")
                    self.shapes[key], self.dtypes[key] = tuple(view.get_shape()), dtype
        except (OSError, SafetensorError) as error:
            raise CheckpointError(path, f"cannot be read: {error}") from error

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors. Each is valid until the next is read.

        The pages of a mapped file stay in memory as long as the mapping, so it is renewed after _MAPPED_BYTES.
        """
        left = list(reversed(keys))
        while left:
            mapped = 0
            with safe_open(self._path, "pt") as file:
                while left and mapped < _MAPPED_BYTES:
                    key = left.pop()
                    tensor = file.get_tensor(key)
                    mapped += tensor.nbytes
                    yield key, tensor
                    del tensor


class _PickleFile:
    """A file of torch.save, without the keys that are not needed.

    It is always opened with weights_only, so that no code of it runs.
    """

    def __init__(self, path: Path, canonical: Callable[[str], str | None]) -> None:
        _check_archive(path)
        values = _unpickled(path)
        if not isinstance(values, dict):
            raise CheckpointError(path, f"holds a {type(values).__name__}, and must hold a dict of tensors")
        values = {key: value for key, value in values.items() if not isinstance(key, str) or canonical(key)}
        for key, value in values.items():
            _check_tensor(path, key, value)
        claimed, held = sum(tensor.nbytes for tensor in values.values()), path.stat().st_size
        if claimed > held:
            raise CheckpointError(path, f"claims {claimed} bytes of values, and has only {held}")
        self._tensors: dict[str, Tensor] = values
        self.shapes = {key: tuple(tensor.shape) for key, tensor in values.items()}
        self.dtypes = {key: tensor.dtype if tensor.dtype in HALVES else torch.float32 for key, tensor in values.items()}

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor once, and release it."""
        for key in keys:
            yield key, self._tensors.pop(key)


def _unpickled(path: Path) -> object:
    try:
        unsafe = [*torch.serialization.get_unsafe_globals_in_checkpoint(path), *_constructors(path)]
        values = None if unsafe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise CheckpointError(path, f"cannot be read: {type(error).__name__}: {error}") from error
    if unsafe:
        raise CheckpointError(path, f"would run {shown(', '.join(sorted(set(unsafe))))}, and is not opened")
    return values


def _constructors(path: Path) -> list[str]:
    """The tensor classes that a pickle would call. torch allows them, and they would return uninitialised memory."""
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")]
    names = (str(argument) for pickle in pickles for op, argument, _ in genops(pickle) if op.name == "GLOBAL")
    return [name.replace(" ", ".") for name in names if name.startswith("torch") and name.endswith("Tensor")]


def _check_archive(path: Path) -> None:
    """Refuse files that torch.save has not written, and files that grow when they are decompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises nearly anything for a damaged file
        raise CheckpointError(
            path, "is not a file of torch.save in its format since torch 1.6: save it again, as safetensors"
        ) from error
    compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(path, "is compressed, which torch.save never does")


def _check_tensor(path: Path, key: object, value: object) -> None:
    """Refuse everything but dense tensors of floats. Strides can claim far more values than the file has."""
    if not isinstance(key, str) or not isinstance(value, Tensor):
        raise CheckpointError(path, f"{shown(key)} is a {type(value).__name__}, and must be a tensor")
    dense = value.layout == torch.strided and not value.is_nested and value.device.type == "cpu"
    if not dense or not value.is_floating_point() or value.dtype.itemsize == 1:
        raise CheckpointError(path, f"{shown(key)} is {value.dtype}, {value.layout}, and must be dense floating point")
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    if not value.is_contiguous() and not channels_last:
        raise CheckpointError(
            path, f"{shown(key)}, {list(value.shape)}, has strides {list(value.stride())}: it is not dense"
        )
