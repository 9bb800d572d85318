"""A network of torch's → OpenVINO's model, once, and then from a folder that servers share."""

import hashlib
import json
import logging
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn
from torch.jit import TracerWarning  # type: ignore[attr-defined]

from model.backends.backend import host, processor
from model.backends.network import Network
from model.nets import autoencoder, layers, unet, unet2d
from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D

log = logging.getLogger(__name__)

MODEL, WEIGHTS, SUMS = "model.xml", "model.bin", "sums.json"
_FEW_PIXELS = 16
_SOURCES = (
    layers.__file__,
    unet.__file__,
    unet2d.__file__,
    autoencoder.__file__,
    __file__,
)  # what decides the conversion


def convert(network: Network) -> ov.Model:
    """Convert a network, with any number of rows, float32.

    Its inputs are x [B, C, H, W] and, where it knows them, t [B] and labels [B].
    """
    module: nn.Module = network.module
    example = [torch.zeros(1, *network.input_shape)]
    if network.num_train_timesteps is not None:
        assert isinstance(module, DiffusionUNet | UNet2D)
        module = _Tabulated(module, network.num_train_timesteps).eval()
        example += [torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    # What ov.convert_model does too, which besides sends usage statistics to its makers.
    # It traces, which torch calls deprecated, and warns of in code of its own. To check the trace would be to run the
    # network three times more: tests do.
    with torch.inference_mode(), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        warnings.filterwarnings("ignore", category=TracerWarning, module="torch")
        decoder = TorchScriptPythonDecoder(module, example_input=tuple(example), trace_kwargs={"check_trace": False})
        frontend = FrontEndManager().load_by_framework("pytorch")
        model = frontend.convert(frontend.load(decoder))
    model.reshape({port: [-1, *network.input_shape] if i == 0 else [-1] for i, port in enumerate(model.inputs)})
    _rewrite_group_norms(model)
    return model


class _Tabulated(nn.Module):
    """The network with the time embeddings of all timesteps in a table.

    In bfloat16 OpenVINO would compute them so too, and 999 is no bfloat16: timesteps would be told apart by fours.
    """

    table: Tensor

    def __init__(self, network: DiffusionUNet | UNet2D, num_train_timesteps: int) -> None:
        super().__init__()
        self.network = network
        with torch.inference_mode():
            self.register_buffer("table", network.embed_time(torch.arange(num_train_timesteps)))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.network(x, t, labels, t_emb=self.table[t])
        return out


def _rewrite_group_norms(model: ov.Model) -> None:
    """Say each GroupNorm as a mean and variance normalization of [B, groups, values].

    OpenVINO makes it one of [B·groups, channels, H, W], whose sums are split over threads: slower by 5 to 10 % of a
    pass, and with bits that depend on how many threads there are.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization":
            continue
        x, weight, bias = node.input_values()
        _, channels, height, width = (d.get_max_length() for d in x.get_partial_shape())
        groups, eps = node.get_attributes()["num_groups"], node.get_attributes()["epsilon"]

        rows = ops.reshape(x, np.array([0, groups, -1]), special_zero=True)
        normal = ops.mvn(rows, np.array([2]), normalize_variance=True, eps=eps, eps_mode="inside_sqrt")
        normal = ops.reshape(normal, np.array([0, channels, height, width]), special_zero=True)
        if height * width <= _FEW_PIXELS:
            _scale_channels_last(node, normal, weight, bias)
        else:
            each = np.array([1, channels, 1, 1])
            weight, bias = (ops.reshape(p, each, special_zero=False) for p in (weight, bias))
            _put_in_place_of(node, ops.add(ops.multiply(normal, weight), bias))
    model.validate_nodes_and_infer_types()


def _scale_channels_last(norm: ov.Node, normal: ov.Node, weight: ov.Output, bias: ov.Output) -> None:
    """Say a GroupNorm's scale and shift, and a SiLU behind it, of [B, H, W, C].

    OpenVINO works along the last axis. Of few pixels that is slow: a tenth of the digits' pass.
    """
    out = ops.add(ops.multiply(ops.transpose(normal, np.array([0, 2, 3, 1])), weight), bias)
    consumers = [consumer.get_node() for consumer in norm.output(0).get_target_inputs()]
    if [consumer.get_type_name() for consumer in consumers] == ["Swish"]:
        out, norm = ops.swish(out), consumers[0]
    _put_in_place_of(norm, ops.transpose(out, np.array([0, 3, 1, 2])))


def _put_in_place_of(node: ov.Node, out: ov.Node) -> None:
    for consumer in node.output(0).get_target_inputs():
        consumer.replace_source_output(out.output(0))


def converted(network: Network, cache_dir: Path | None) -> ov.Model:
    """The converted network, from the cache where it is there; else it is put there.

    A cache that cannot be used costs a warning, and the time to convert again.
    """
    if cache_dir is None:
        return convert(network)
    entry = cache_dir / "openvino" / _key(network)
    try:
        if entry.exists():
            cached = _read(entry)
            if cached is not None:
                return cached
            _remove(entry)
            log.warning("a converted model in the cache is damaged, and is made again")
    except OSError as error:
        log.warning("a converted model in the cache is of no use, and every start converts it again: %s", error)
        return convert(network)
    model = convert(network)
    try:
        _write(model, entry)
        return _read(entry) or model  # mapped from the file, which servers share, and not held in memory
    except OSError as error:
        log.warning("the converted model is not kept, and every start converts it again: %s", error)
        return model


def _key(network: Network) -> str:
    """Of all that decides the converted model."""
    code = hashlib.sha256(b"".join(Path(source).read_bytes() for source in _SOURCES)).hexdigest()
    # The table of time embeddings has the bits of the processor that computed it, and machines may share the folder.
    computed = [processor(torch.device("cpu")), host()]
    facts = [network.name, network.digest, network.input_shape, ov.__version__, computed, code]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _read(entry: Path) -> ov.Model | None:
    """The model of a cache entry, or None where it is damaged."""
    try:
        sums = json.loads((entry / SUMS).read_text())
        if sums == {name: _sum(entry / name) for name in (MODEL, WEIGHTS)}:
            return ov.Core().read_model(entry / MODEL)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: OpenVINO's, and that of JSON nested too deep
        pass
    return None


def _remove(entry: Path) -> None:
    """Take an entry out of the cache, at once, so that no server sees it half removed."""
    with (
        tempfile.TemporaryDirectory(dir=entry.parent, prefix=".old-", ignore_cleanup_errors=True) as folder,
        suppress(FileNotFoundError),  # another server was faster
    ):
        entry.rename(Path(folder) / "entry")


def _write(model: ov.Model, entry: Path) -> None:
    """Put a model into the cache, whole or not at all, whoever else does so at the same time."""
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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
