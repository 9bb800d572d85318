"""The text encoder at work: texts → contexts, one at a time."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model.backends.backend import Backend, own_stream
from model.backends.choose import choose
from model.backends.network import text_encoder
from model.description import ModelDescription
from model.nets.clip import CLIPText
from model.rows import Context, Text


class ClipEncoder:
    """Runs a CLIPText. Implements model.rows.TextEncoder.

    Args:
        embeddings: CLIPText.embeddings, on the CPU.
        backend: of CLIPText.encoder, which takes embedded tokens and returns the outputs of all layers.
        final_norm: CLIPText.final_layer_norm, on the CPU.
    """

    def __init__(
        self, embeddings: Callable[[Tensor], Tensor], backend: Backend, final_norm: Callable[[Tensor], Tensor]
    ) -> None:
        self._embeddings = embeddings
        self._backend = backend
        self._final_norm = final_norm
        self._on_its_stream = own_stream(backend.device)

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything in encoding that can change a bit of a context, by name."""
        return {f"text_{name}": value for name, value in self._backend.fingerprint.items()}

    def prepare(self) -> None:
        """Compile what is not compiled yet. See model.backends.backend.Backend.prepare."""
        self._backend.prepare()

    @torch.inference_mode()
    def encode(self, text: Text) -> Context:
        """Map a text to its context. Each text is a pass of its own."""
        x = self._embeddings(torch.tensor([text.ids]))
        with self._on_its_stream():
            states = self._backend.start({"x": self._backend.send(x)})().cpu()
        [context] = self._final_norm(states[:, -1 - text.clip_skip])
        return Context(context.numpy())


def choose_text_encoder(
    clip: CLIPText, model: ModelDescription, device: torch.device, threads: int, cache_dir: Path | None
) -> ClipEncoder:
    """Choose the best backend for the text encoder, in float32. The arguments and errors are those of `choose`.

    The backend takes over the module's layers.
    """
    network = text_encoder(clip, model)
    backend = choose(network, device, "float32", threads, 1, cache_dir)(network.inputs["x"])
    return ClipEncoder(clip.embeddings, backend, clip.final_layer_norm)
