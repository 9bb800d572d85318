"""Transformer2D: the positions of an image attend to each other and to a context.

State-dict keys are diffusers'. Shapes: images are [B, C, H, W], tokens [B, N, C], contexts [B, M, channels].
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Transformer2D(nn.Module):
    """Transformer blocks over the H·W positions, between two projections, added to the input.

    Args:
        channels: in and out.
        depth: number of blocks.
        heads: of each attention. They need not divide `channels`: the blocks are heads · (channels // heads) wide.
        context_dim: channels of the context.
        norm_groups: of the GroupNorm before the first projection.
        only_cross_attention: the positions attend to the context alone, twice, and not to each other.
        linear: the projections are Linear layers. Otherwise they are 1×1 convolutions, which compute the same.
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        *,
        heads: int,
        context_dim: int,
        norm_groups: int,
        only_cross_attention: bool,
        linear: bool,
    ) -> None:
        super().__init__()
        width = heads * (channels // heads)
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width) if linear else nn.Conv2d(channels, width, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, heads, context_dim, only_cross_attention) for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, channels) if linear else nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = _projected(self.proj_in, self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + _projected(self.proj_out, h).transpose(1, 2).reshape(x.shape)


class TransformerBlock(nn.Module):
    """Attention of tokens to each other, attention to the context, and a feed-forward network, each with its norm."""

    def __init__(self, channels: int, heads: int, context_dim: int, only_cross_attention: bool) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = TokenAttention(channels, heads, context_dim if only_cross_attention else channels)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = TokenAttention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(tokens)
        tokens = tokens + self.attn1(h, context if self.only_cross_attention else h)
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        out: Tensor = tokens + self.ff(self.norm3(tokens))
        return out


class TokenAttention(nn.Module):
    """Attention of tokens [B, N, C] to others, [B, M, source_dim]."""

    def __init__(self, channels: int, heads: int, source_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = channels // heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_dim, channels, bias=False)
        self.to_v = nn.Linear(source_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, tokens: Tensor, source: Tensor) -> Tensor:
        q, k, v = (self._by_head(h) for h in (self.to_q(tokens), self.to_k(source), self.to_v(source)))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.to_out[0](h.reshape(tokens.shape))
        return out

    def _by_head(self, h: Tensor) -> Tensor:
        """[B, N, C] → [B, heads, N, head_dim]."""
        return h.reshape(h.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """A gated layer to four times the width, and a layer back. Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.net:
            h = layer(h)
        return h


class GEGLU(nn.Module):
    """One half of a Linear's output, times the GELU of the other half."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, h: Tensor) -> Tensor:
        value, gate = self.proj(h).chunk(2, dim=-1)
        out: Tensor = value * F.gelu(gate)
        return out


def _projected(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    """Apply a Linear layer or a 1×1 convolution to tokens [B, N, C]."""
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)
