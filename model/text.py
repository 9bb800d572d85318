"""The text encoders at work: texts → contexts, one at a time."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.backends.backend import Backend, own_stream
from model.backends.choose import choose
from model.backends.network import text_encoder
from model.description import ModelDescription
from model.nets.clip import CLIPText, Pooler
from model.rows import Context, Text

_MOST = 1000.0  # times: how far weights may take a mean from where it was


class Clip:
    """Runs a CLIPText. Its layers run on the backend, and all else on the CPU.

    Args:
        embeddings: CLIPText.embeddings, on the CPU.
        backend: of CLIPText.encoder, which takes embedded tokens and returns the outputs of all layers.
    """

    def __init__(self, embeddings: nn.Module, backend: Backend) -> None:
        self._embeddings = embeddings
        self._backend = backend
        self._on_its_stream = own_stream(backend.device)

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything that can change a bit of the layers' outputs, by name."""
        return self._backend.fingerprint

    def prepare(self) -> None:
        """Compile what is not compiled yet. See model.backends.backend.Backend.prepare."""
        self._backend.prepare()

    def hidden_states(self, ids: Tensor) -> list[Tensor]:
        """Map tokens [1, N] to their embeddings and the outputs of all layers, [1, N, hidden_size] each, on the CPU.

        All but the embeddings are valid until the next call.
        """
        x: Tensor = self._embeddings(ids)
        with self._on_its_stream():
            states = self._backend.start({"x": self._backend.send(x)})().cpu()
        return [x, *states.unbind(dim=1)]


class ClipEncoder:
    """Runs the CLIPText of Stable Diffusion, or the two of SDXL. Implements model.rows.TextEncoder.

    Stable Diffusion takes the normed output of a layer. SDXL takes the outputs of a layer of each encoder, one earlier
    and not normed, side by side; and the second's pooled text, whatever clip_skip is.

    Args:
        clips: one, or two.
        last: what follows the layers, on the CPU: CLIPText.final_layer_norm of the only encoder, or
            CLIPText.pooler of the second.
    """

    def __init__(self, clips: Sequence[Clip], last: nn.Module | Pooler) -> None:
        self._clips = clips
        self._last = last

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything in encoding that can change a bit of a context, by name. The second adds what differs."""
        first, *others = (clip.fingerprint for clip in self._clips)
        parts = {f"text_{name}": value for name, value in first.items()}
        for other in others:
            parts |= {f"text_2_{name}": value for name, value in other.items() if first.get(name) != value}
        return parts

    def prepare(self) -> None:
        """Compile what is not compiled yet. See model.backends.backend.Backend.prepare."""
        for clip in self._clips:
            clip.prepare()

    @torch.inference_mode()
    def encode(self, text: Text) -> Context:
        """Map a text to its context. Each text is a pass of its own.

        The context is not finite where the text's weights leave no mean to restore.
        """
        ids = [torch.tensor([each]) for each in (text.ids, text.ids_2)[: len(self._clips)]]
        states = [clip.hidden_states(its_ids) for clip, its_ids in zip(self._clips, ids, strict=True)]
        if isinstance(self._last, Pooler):
            weights = text.weights, text.weights_2
            parts = [_weighted(each[-2 - text.clip_skip], its) for each, its in zip(states, weights, strict=True)]
            [tokens] = torch.cat(parts, dim=-1)
            [pooled] = self._last(states[-1][-1], ids[-1])
            return Context(tokens.numpy(), pooled.numpy())
        [tokens] = _weighted(self._last(states[0][-1 - text.clip_skip]), text.weights)
        return Context(tokens.numpy())


def _weighted(context: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply the context of each token, [1, N, C], by its weight, and restore the mean of all values.

    This is AUTOMATIC1111's emphasis "Original", for one text at a time. Pooled texts have no weights there. Where the
    mean cannot be restored, all values are NaN.
    """
    if not weights:
        return context
    heavier = context * torch.tensor(weights).unsqueeze(-1)
    # By NumPy: the order of torch's sums depends on its threads.
    before, after = (float(values.numpy().mean(dtype=np.float64)) for values in (context, heavier))
    is_restored = abs(before) <= _MOST * abs(after) and abs(after) <= _MOST * abs(before) and after != 0
    return heavier * (before / after if is_restored else math.nan)


def choose_text_encoder(
    clips: Sequence[CLIPText], model: ModelDescription, device: torch.device, threads: int, cache_dir: Path | None
) -> ClipEncoder:
    """Choose the best backend for each text encoder, in float32. The arguments and errors are those of `choose`.

    Args:
        clips: the one of Stable Diffusion; or SDXL's two, of which the second has a pooler. The backends take over the
            modules' layers.
    """

    def at_work(clip: CLIPText, number: int) -> Clip:
        network = text_encoder(clip, model, number)
        return Clip(clip.embeddings, choose(network, device, "float32", threads, 1, cache_dir)(network.inputs["x"]))

    last = clips[0].final_layer_norm if len(clips) == 1 else clips[-1].pooler
    assert last is not None
    return ClipEncoder([at_work(clip, i + 1) for i, clip in enumerate(clips)], last)
