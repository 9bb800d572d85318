"""A network on OpenVINO on the CPU: much faster than torch, and a row's bits do not depend on other rows."""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backends.backend import Inputs, Precision, check_fits, is_batch_invariant, processor
from model.backends.memory import resident
from model.backends.network import Shapes

log = logging.getLogger(__name__)


class OpenVINOBackend:
    """Splits a pass into pieces whose sizes are powers of two. Each size is compiled. Nothing is padded.

    Implements model.backends.backend.Backend. One row uses all threads. More rows run as two halves in parallel, with
    half of the threads each, because all threads of one request wait for each other at every layer. Size 1 is compiled
    at once. `prepare` compiles all larger sizes. Without `prepare`, the first pass that needs a size compiles it. A
    size is compiled only if memory allows. It is used only if its rows have the same bits as at size 1. Without a size,
    passes have more pieces.

    Args:
        model: the converted network at one size: model.backends.conversion.at_size.
        release: model.backends.conversion.Converted.release. Called after each compilation.
        shapes: what the network takes.
        precision: float32; or bfloat16, if `computes_bfloat16()`.
        threads: compute threads.
        max_batch: the largest width.
        free_memory: returns the number of free bytes.
    """

    device = torch.device("cpu")
    reproducible = True  # a size with other bits than size 1 is not used

    def __init__(
        self,
        model: ov.Model,
        shapes: Shapes,
        precision: Precision,
        threads: int,
        max_batch: int,
        free_memory: Callable[[], float],
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._model: ov.Model | None = model
        self._release = release
        self._shapes = shapes
        self._precision = precision
        self._threads = threads
        self._max_batch = max_batch
        self._free_memory = free_memory
        core().get_property("CPU", "FULL_DEVICE_NAME")  # loads the CPU plugin
        before = resident()
        self._size_1 = self._compile(1, streams=1)
        self._requests = {1: _Request(self._size_1, parts=1)}  # by size
        weights = _parameters(model) * (4 if precision == "float32" else 2)
        self._bytes = weights, max(0, resident() - before - weights)  # per size, and per row
        self._refused: set[int] = set()

    @property
    def widths(self) -> Sequence[int]:
        return range(1, self._max_batch + 1)

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {
            "backend": "openvino",
            "backend_version": ov.__version__,
            "precision": self._precision,
            "processor": processor(self.device),
            "threads": self._threads,
        }

    @property
    def sizes(self) -> list[int]:
        """The sizes in use, ascending."""
        return sorted(self._requests)

    def prepare(self) -> None:
        for i in range(self._max_batch.bit_length()):
            self._prepare(1 << i)
        self._model = None  # nothing is compiled any more

    def send(self, values: Tensor) -> Tensor:
        return values

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        rows = len(inputs["x"])
        check_fits(rows, self._max_batch)
        sizes = self._prepare(rows)
        self._requests[sizes[0]].start(inputs, 0)

        def finish() -> Tensor:
            outputs = [self._requests[sizes[0]].wait()]
            done = sizes[0]
            for size in sizes[1:]:
                outputs[-1] = outputs[-1].copy()  # the next piece may overwrite the same request's output
                self._requests[size].start(inputs, done)
                outputs.append(self._requests[size].wait())
                done += size
            return torch.from_numpy(outputs[0] if len(outputs) == 1 else np.concatenate(outputs))

        return finish

    def _prepare(self, rows: int) -> list[int]:
        """The sizes of a pass's pieces, after compiling what is missing."""
        while True:
            sizes = _pieces(rows, [size for i in range(rows.bit_length()) if (size := 1 << i) not in self._refused])
            new = set(sizes) - self._requests.keys()
            if not new:
                return sizes
            for size in new:
                self._add(size)

    def _compile(self, rows: int, streams: int) -> ov.CompiledModel:
        """Compile for `rows` rows in each of `streams` parallel requests, which share the threads."""
        assert self._model is not None
        model = self._model.clone()
        model.reshape({port: [rows, *list(port.get_partial_shape())[1:]] for port in model.inputs})
        compiled = core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "f32" if self._precision == "float32" else "bf16",
                "INFERENCE_NUM_THREADS": self._threads,
                "NUM_STREAMS": streams,
                "ENABLE_CPU_PINNING": False,  # it would pin several servers to the same cores
            },
        )
        self._release()
        return compiled

    def _add(self, size: int) -> None:
        """Compile a size and use it, or refuse it."""
        self._refused.add(size)
        try:
            per_size, per_row = self._bytes
            if per_size + size * per_row > self._free_memory() / 2:  # leave half to others
                log.warning("there is no memory to compile passes of %d rows; they run in smaller pieces", size)
                return
            parts = 2 if self._threads % 2 == 0 else 1
            together, alone = _Request(self._compile(size // parts, parts), parts), _Request(self._size_1, parts=1)
            if is_batch_invariant(together.run, alone.run, size, self._shapes, self.device):
                self._requests[size] = together
                self._refused.remove(size)
            else:
                log.warning("passes of %d rows have other bits than those of one; they run in smaller pieces", size)
        except Exception:
            log.exception("passes of %d rows could not be compiled; they run in smaller pieces", size)


class _Request:
    """A compiled model with fixed input and output arrays, whose rows are divided among `parts` parallel requests."""

    def __init__(self, compiled: ov.CompiledModel, parts: int) -> None:
        self._inputs = {port.any_name: _zeros(port, parts) for port in compiled.inputs}
        self._output: NDArray[np.float32] = _zeros(compiled.output(0), parts)
        self._parts = [compiled.create_infer_request() for _ in range(parts)]
        self._rows = len(self._output)
        rows = self._rows // parts
        for k, part in enumerate(self._parts):
            its_rows = slice(k * rows, (k + 1) * rows)
            for name, array in self._inputs.items():
                part.set_tensor(name, ov.Tensor(array[its_rows], shared_memory=True))
            part.set_output_tensor(ov.Tensor(self._output[its_rows], shared_memory=True))

    def start(self, inputs: Inputs, first: int) -> None:
        """Start a pass over this request's number of rows, from row `first` of the inputs on."""
        for name, place in self._inputs.items():
            np.copyto(place, inputs[name].numpy()[first : first + self._rows])
        for part in self._parts:
            part.start_async()

    def wait(self) -> NDArray[np.float32]:
        """Wait, and return the output, which is valid until the next start."""
        for part in self._parts:
            part.wait()
        return self._output

    def run(self, inputs: Inputs) -> Tensor:
        self.start(inputs, 0)
        return torch.from_numpy(self.wait())


def _parameters(model: ov.Model) -> int:
    """How many numbers a model's constants have, without sizes and indexes."""
    constants = [node.output(0) for node in model.get_ops() if node.get_type_name() == "Constant"]
    return sum(prod(port.get_shape()) for port in constants if port.get_element_type().is_real())


def _zeros(port: ov.ConstOutput, parts: int) -> NDArray[Any]:
    """An array for the port, with the rows of all parts."""
    rows, *shape = port.shape
    return np.zeros((parts * rows, *shape), port.get_element_type().to_dtype())


@cache
def core() -> ov.Core:
    """OpenVINO's runtime: one for the whole process, never destroyed.

    On processors with AMX, its CPU plugin gives the thread that loads it a stack for signals, and frees this stack when
    the plugin is destroyed. If another thread destroyed the plugin, the first thread would keep the freed stack. The
    next signal would then overwrite whatever memory has taken its place.
    """
    return ov.Core()


def computes_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions. Without them OpenVINO computes in float32."""
    return "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _pieces(rows: int, sizes: Sequence[int]) -> list[int]:
    """Divide rows into pieces, largest first. The sizes ascend and include 1."""
    pieces = []
    for size in reversed(sizes):
        pieces += [size] * (rows // size)
        rows %= size
    return pieces
