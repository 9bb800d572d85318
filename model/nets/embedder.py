"""Timesteps, labels and prompts → what a U-Net takes beside x. The only part of a U-Net that knows of them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Embedder:
    """A U-Net's embeddings, without the rest of the network.

    Attributes:
        dim: D, the channels of the vectors.
        of_time: timesteps [B] → [B, D]. They may be fractions, unless the network has learned a vector for each whole
            timestep.
        of_label: labels [B] → [B, D], to be added; None if the network has no labels.
        divides_output: whether the prediction is the network's output divided by the timestep.
        context_dim: channels of a context as the network takes it; None for a network without text.
        of_text: what the text encoder made of a prompt [B, tokens, channels] → its context [B, tokens, context_dim];
            None if they are the same.
    """

    dim: int
    of_time: Callable[[Tensor], Tensor]
    of_label: Callable[[Tensor], Tensor] | None = None
    divides_output: bool = False
    context_dim: int | None = None
    of_text: Callable[[Tensor], Tensor] | None = None

    def of(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """The sum of the embeddings of timesteps [B] and labels, [B, D].

        Args:
            labels: integers [B], which a network without labels ignores; or vectors [B, D], added as they are; or None.
        """
        emb = self.of_time(t)
        if labels is None:
            return emb
        if labels.ndim == 2:
            return emb + labels
        return emb if self.of_label is None else emb + self.of_label(labels)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoding, then layers. Holds no other part of a network."""

    encoding: Callable[[Tensor], Tensor]
    layers: nn.Module

    def __call__(self, numbers: Tensor) -> Tensor:
        """Map numbers [B] to vectors [B, D]."""
        dtype = next(self.layers.parameters()).dtype
        out: Tensor = self.layers(self.encoding(numbers).to(dtype))
        return out
