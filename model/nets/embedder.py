"""Timesteps, guidance, labels, prompts and sizes → what a U-Net takes beside x. Nothing else in it knows of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.nets.layers import guidance_embedding


@dataclass(frozen=True, slots=True)
class Embedder:
    """A U-Net's embeddings, without the rest of the network.

    Attributes:
        dim: D, the channels of the vectors.
        of_time: timesteps [B], and w [B] or None → [B, D]. Timesteps may be fractions, unless the network has learned a
            vector for each whole timestep. w is guidance_scale − 1, for networks that have guidance embedded.
        of_label: labels [B] → [B, D], to be added; None if the network has no labels.
        divides_output: whether the prediction is the network's output divided by the timestep.
        context_dim: channels of a context as the network takes it; None for a network without text.
        text_dim: channels of what the text encoders make of a prompt; None for a network without text.
        of_text: what the text encoders made of a prompt [B, tokens, text_dim] → its context [B, tokens, context_dim];
            None if they are the same.
        pooled_dim: P, the channels of a pooled text; None for a network that takes none.
        of_added: pooled texts [B, P] and sizes [B, 6] → [B, D], to be added; None for a network that takes none. The
            sizes are those of model.rows.Condition.time_ids.
    """

    dim: int
    of_time: Callable[[Tensor, Tensor | None], Tensor]
    of_label: Callable[[Tensor], Tensor] | None = None
    divides_output: bool = False
    context_dim: int | None = None
    text_dim: int | None = None
    of_text: Callable[[Tensor], Tensor] | None = None
    pooled_dim: int | None = None
    of_added: Callable[[Tensor, Tensor], Tensor] | None = None

    def of(self, t: Tensor, labels: Tensor | None, w: Tensor | None = None) -> Tensor:
        """The sum of the embeddings of timesteps [B] and labels, [B, D].

        Args:
            labels: integers [B], which a network without labels ignores; or vectors [B, D], added as they are; or None.
            w: [B], for a network that has guidance embedded; or None, which adds nothing.
        """
        emb = self.of_time(t, w)
        if labels is None:
            return emb
        if labels.ndim == 2:
            return emb + labels
        return emb if self.of_label is None else emb + self.of_label(labels)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoding, then layers. Holds no other part of a network.

    Attributes:
        encoding: numbers [B] → vectors.
        layers: of the encoding, and of that of guidance if there is one.
        guidance_dim: channels of the encoding of guidance; None if the layers take none.
    """

    encoding: Callable[[Tensor], Tensor]
    layers: nn.Module
    guidance_dim: int | None = None

    def __call__(self, numbers: Tensor, w: Tensor | None = None) -> Tensor:
        """Map numbers [B], and w [B] or None, to vectors [B, D].

        Raises:
            ValueError: there is w, and the layers take none.
        """
        dtype = next(self.layers.parameters()).dtype
        given = [self.encoding(numbers)]
        if w is not None:
            if self.guidance_dim is None:
                raise ValueError("the network has no guidance embedded, and is given w")
            given.append(guidance_embedding(w, self.guidance_dim))
        out: Tensor = self.layers(*(values.to(dtype) for values in given))
        return out


@dataclass(frozen=True, slots=True)
class Added:
    """Layers over the pooled text and the encodings of sizes. Holds no other part of a network."""

    encoding: Callable[[Tensor], Tensor]
    layers: nn.Module

    def __call__(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """Map pooled texts [B, P] and sizes [B, 6] to vectors [B, D]."""
        dtype = next(self.layers.parameters()).dtype
        encoded = self.encoding(sizes.flatten()).reshape(len(pooled), -1)
        out: Tensor = self.layers(torch.cat([pooled, encoded], dim=1).to(dtype))
        return out
