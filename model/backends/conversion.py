"""Conversion of a torch network to an OpenVINO model, with a cache folder that servers share."""

import hashlib
import json
import logging
import mmap
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor
from torch.jit import TracerWarning  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode

from model.backends import network as networks
from model.backends.network import Network, Shapes
from model.backends.openvino import core
from model.nets import (
    autoencoder,
    blocks,
    clip,
    layers,
    transformer,
    unet,
    unet2d,
    unet_condition,
    unet_condition_config,
)
from model.nets.precision import HALVES

log = logging.getLogger(__name__)

MODEL, WEIGHTS, SUMS = "model.xml", "model.bin", "sums.json"
_FEW_PIXELS = 16
_TRACED = 32  # height and width of x in a trace, or a little more
_PAGE = 512  # words
_AT_ONCE = 2**22  # bytes of a file in memory
_SOURCES = (
    networks.__file__,
    layers.__file__,
    blocks.__file__,
    unet.__file__,
    unet2d.__file__,
    transformer.__file__,
    unet_condition.__file__,
    unet_condition_config.__file__,
    autoencoder.__file__,
    clip.__file__,
    __file__,
)  # the code that decides what the conversion gives


def convert(network: Network) -> ov.Model:
    """Convert a network to a model for any number of rows, and any height and width of x, which computes in float32.

    Its inputs are those of the network that the output depends on, [B, …] each, by name. Its constants are the
    network's parameters, in their precision. Those in half precision are widened where they are used.
    """
    example = tuple(torch.zeros(1, *shape) for shape in network.at(_small(network)).values())
    # This is ov.convert_model without its usage statistics. Tracing is deprecated in torch and warns about torch's own
    # code. check_trace would run the network three more times; tests compare the outputs instead.
    with torch.inference_mode(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        warnings.filterwarnings("ignore", category=TracerWarning, module="torch")
        with _WidenedAtUse():
            trace = TorchScriptPythonDecoder(network.module, example_input=example, trace_kwargs={"check_trace": False})
        frontend = FrontEndManager().load_by_framework("pytorch")
        return frontend.convert(frontend.load(trace))


def _small(network: Network) -> tuple[int, ...]:
    """The shape of a row of x for a trace, which computes with x on one thread: minutes for a large image."""
    channels, *sides = network.inputs["x"]
    if len(sides) < 2:
        return channels, *sides
    side = ceil(_TRACED / network.factor) * network.factor
    return channels, *(min(side, native) for native in sides)


class _WidenedAtUse(TorchFunctionMode):
    """Gives every function float32 in the place of half precision.

    So a trace has a conversion after each parameter in half precision, and no more. OpenVINO takes such conversions for
    the decompression of weights: it widens one constant at a time, and only while it compiles.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value


def at_size(model: ov.Model, shapes: Shapes) -> ov.Model:
    """A converted model for any number of rows of these shapes."""
    model = model.clone()
    model.reshape({port: [-1, *shapes[port.any_name]] for port in model.inputs})
    _rewrite_group_norms(model)
    return model


def activations(model: ov.Model) -> int:
    """The most bytes that intermediate results of one row take at once, in float32.

    Args:
        model: of `at_size`.
    """
    model = model.clone()
    model.reshape({port: [1, *list(port.get_partial_shape())[1:]] for port in model.inputs})
    nodes = _computed(model)
    last = {port.get_node().get_name(): i for i, node in enumerate(nodes) for port in node.input_values()}
    ending: dict[int, list[int]] = {}  # bytes that are free after a node
    now = most = 0
    for i, node in enumerate(nodes):
        size = sum(prod(port.get_shape()) * port.get_element_type().size for port in node.outputs())
        now += size
        most = max(most, now)
        ending.setdefault(last.get(node.get_name(), i), []).append(size)
        now -= sum(ending.pop(i, []))
    return most


def _computed(model: ov.Model) -> list[ov.Node]:
    """The nodes that a pass computes, in order. Those that depend on no input are computed when a model is compiled."""
    nodes: list[ov.Node] = []
    names: set[str] = set()
    for node in model.get_ordered_ops():
        sources = {port.get_node().get_name() for port in node.input_values()}
        if node.get_type_name() == "Parameter" or sources & names:
            nodes.append(node)
            names.add(node.get_name())
    return nodes


def _rewrite_group_norms(model: ov.Model) -> None:
    """Replace each GroupNorm by a mean-variance normalization of [B, groups, values].

    OpenVINO itself normalizes [B·groups, channels, H, W] and splits the sums over threads. That makes a pass 5 to 10 %
    slower, and the bits depend on the number of threads.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        x, weight, bias = node.input_values()
        _, channels, height, width = (d.get_max_length() for d in x.get_partial_shape())
        groups, eps = node.get_attributes()["num_groups"], node.get_attributes()["epsilon"]

        grouped = ops.reshape(x, np.array([0, groups, -1]), special_zero=True)
        normal = ops.mvn(grouped, np.array([2]), normalize_variance=True, eps=eps, eps_mode="inside_sqrt")
        normal = ops.reshape(normal, np.array([0, channels, height, width]), special_zero=True)
        if height * width <= _FEW_PIXELS:
            _scale_channels_last(node, normal, weight, bias)
        else:
            each = np.array([1, channels, 1, 1])
            weight, bias = (ops.reshape(p, each, special_zero=False) for p in (weight, bias))
            _replace(node, ops.add(ops.multiply(normal, weight), bias))
    model.validate_nodes_and_infer_types()


def _scale_channels_last(norm: ov.Node, normal: ov.Node, weight: ov.Output, bias: ov.Output) -> None:
    """Apply a GroupNorm's scale and shift, and a SiLU after it, in the layout [B, H, W, C].

    OpenVINO vectorizes the last axis. With few pixels in that axis this would take a tenth of the digits' pass.
    """
    out = ops.add(ops.multiply(ops.transpose(normal, np.array([0, 2, 3, 1])), weight), bias)
    consumers = [consumer.get_node() for consumer in norm.output(0).get_target_inputs()]
    if [consumer.get_type_name() for consumer in consumers] == ["Swish"]:
        out, norm = ops.swish(out), consumers[0]
    _replace(norm, ops.transpose(out, np.array([0, 3, 1, 2])))


def _replace(node: ov.Node, out: ov.Node) -> None:
    for consumer in node.output(0).get_target_inputs():
        consumer.replace_source_output(out.output(0))


class Converted(NamedTuple):
    """A converted network.

    Attributes:
        model: see `convert`.
        release: gives back the memory of constants that were read, if they are in a file. They may be read again. The
            constants are there as long as this function is.
    """

    model: ov.Model
    release: Callable[[], None]


def converted(network: Network, cache_dir: Path | None) -> Converted:
    """The converted network from the cache. A missing one is converted and cached.

    If the cache cannot be used, this warns and converts.
    """
    if cache_dir is None:
        return _held(convert(network))
    entry = cache_dir / "openvino" / _key(network)
    try:
        if entry.exists():
            cached = _read(entry)
            if cached is not None:
                return cached
            _remove(entry)
            log.warning("a converted model in the cache is damaged, and is converted again")
    except OSError as error:
        log.warning("a converted model cannot be read from the cache, and every start converts it again: %s", error)
        return _held(convert(network))
    model = convert(network)
    try:
        _write(model, entry)
        return _read(entry) or _held(model)  # the file's pages are mapped, and servers share them
    except OSError as error:
        log.warning("the converted model is not kept, and every start converts it again: %s", error)
        return _held(model)


def _held(model: ov.Model) -> Converted:
    """A model whose constants are the parameters of torch's network, and stay in memory."""
    return Converted(model, lambda: None)


def _key(network: Network) -> str:
    """A hash of everything that decides the converted model."""
    code = hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()
    dtypes = sorted({str(parameter.dtype) for parameter in network.module.parameters()})
    facts = [network.name, network.digest, dict(network.inputs), dtypes, ov.__version__, torch.__version__, code]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _read(entry: Path) -> Converted | None:
    """The model of a cache entry; None if the entry is damaged."""
    try:
        sums = json.loads((entry / SUMS).read_text())
        if sums == {name: _sum(entry / name) for name in (MODEL, WEIGHTS)}:
            return _mapped(entry)
    except (OSError, ValueError, RuntimeError):  # RuntimeError comes from OpenVINO, and from JSON nested too deep
        pass
    return None


def _mapped(entry: Path) -> Converted:
    """The model of a cache entry, with the file of its constants mapped into memory.

    A compiled model holds the model that it was made from, and reads no large constant of it again: it has laid them
    out anew. OpenVINO's own mapping keeps their pages resident, and so a second copy of all weights. We map the file
    ourselves, and tell the kernel that the pages are not needed.
    """
    with (entry / WEIGHTS).open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # ov.Tensor wants to write, but nobody does
    constants = ov.Tensor(np.frombuffer(mapping, np.uint8), shared_memory=True)
    model = core().read_model((entry / MODEL).read_bytes(), constants)
    return Converted(model, partial(mapping.madvise, mmap.MADV_DONTNEED))


def _remove(entry: Path) -> None:
    """Remove an entry with one rename, so that no server sees half of it."""
    with (
        tempfile.TemporaryDirectory(dir=entry.parent, prefix=".old-", ignore_cleanup_errors=True) as folder,
        suppress(FileNotFoundError),  # another server was faster
    ):
        entry.rename(Path(folder) / "entry")


def _write(model: ov.Model, entry: Path) -> None:
    """Add a model to the cache, whole or not at all, even if another server does the same."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-", ignore_cleanup_errors=True) as folder:
        ready = Path(folder) / "entry"
        ready.mkdir()
        try:
            ov.save_model(model, ready / MODEL, compress_to_fp16=False)
        except RuntimeError as error:  # a full disk
            raise OSError(str(error).strip()) from error
        (ready / SUMS).write_text(json.dumps({name: _sum(ready / name) for name in (MODEL, WEIGHTS)}))
        try:
            ready.rename(entry)
        except OSError:
            if not entry.exists():
                raise


def _sum(path: Path) -> str:
    """A hash of the sums of a file's pages, each of 512 words of 64 bits.

    It differs for a file that was cut, or has pages that are empty, old, of another file or in another place, or a
    changed bit anywhere. It misses words that moved within a page, and changes in a page that cancel each other. It is
    several times as fast as a hash of all bytes.
    """
    buffer = bytearray(_AT_ONCE)
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            size += count
            buffer[count:] = bytes(_AT_ONCE - count)
            digest.update(np.frombuffer(buffer, np.uint64).reshape(-1, _PAGE).sum(axis=1).data)
    digest.update(size.to_bytes(8, "little"))
    return digest.hexdigest()
