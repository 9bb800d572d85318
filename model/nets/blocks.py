"""The parts of UNet2D and UNet2DCondition: ResnetBlocks with attention and resampling, and encodings of timesteps.

Attribute names are diffusers' state-dict keys. Shapes: images are [B, C, H, W], time embeddings [B, D]. With a context
attentions are transformers, which attend to it: [B, tokens, channels].
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.layers import ResnetBlock, Upsample, sinusoidal_embedding


class DownBlock(nn.Module):
    """ResnetBlocks, each with its attention if there is any, then a Downsample."""

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, h: Tensor, t_emb: Tensor, context: Tensor | None = None) -> list[Tensor]:
        """Return all skips; the last is also the output."""
        states = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, t_emb)
            if self.attentions:
                h = _attended(self.attentions[i], h, context)
            states.append(h)
        for downsampler in self.downsamplers:
            h = downsampler(h, t_emb) if isinstance(downsampler, ResnetBlock) else downsampler(h)
            states.append(h)
        return states


class MiddleBlock(nn.Module):
    """A ResnetBlock, attention if there is any, and the other ResnetBlocks."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, h: Tensor, t_emb: Tensor | None, context: Tensor | None = None) -> Tensor:
        h = self.resnets[0](h, t_emb)
        for attention in self.attentions:
            h = _attended(attention, h, context)
        for resnet in self.resnets[1:]:
            h = resnet(h, t_emb)
        return h


class UpBlock(nn.Module):
    """ResnetBlocks, each on its input and a skip and with its attention if there is any, then an Upsample.

    The Upsample maps to the size of the next skip: twice the size, unless a Downsample met an odd one.
    """

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], upsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, h: Tensor, t_emb: Tensor, skips: list[Tensor], context: Tensor | None = None) -> Tensor:
        """Remove this block's skips from the end of the list and use them."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), t_emb)
            if self.attentions:
                h = _attended(self.attentions[i], h, context)
        for upsampler in self.upsamplers:
            h = upsampler(h, skips[-1].shape[2:]) if isinstance(upsampler, Upsample) else upsampler(h, t_emb)
        return h


class TimeEmbedding(nn.Module):
    """Linear, activation, Linear, and a second activation if there is one.

    Args:
        cond_proj_dim: channels of a condition, which is mapped and added to the input; None for no condition.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        activation: Callable[[Tensor], Tensor] = F.silu,
        second_activation: Callable[[Tensor], Tensor] | None = None,
        cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.second_activation = second_activation
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_dim, bias=False)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map x [B, in_dim] and conditions [B, cond_proj_dim], if there are any, to [B, out_dim]."""
        if condition is not None:
            assert self.cond_proj is not None
            x = x + self.cond_proj(condition)
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out if self.second_activation is None else self.second_activation(out)


class SinusoidalEncoding(nn.Module):
    """layers.sinusoidal_embedding as a module."""

    def __init__(self, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> None:
        super().__init__()
        self.dim = dim
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, t: Tensor) -> Tensor:
        return sinusoidal_embedding(t, self.dim, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift)


class FourierEncoding(nn.Module):
    """[sin(2π·w·ln t), cos(2π·w·ln t)] for t > 0, with w [dim] from the checkpoint.

    Song et al. 2021, arXiv:2011.13456, C.2.

    Args:
        dim: of w. An encoding has twice as many channels.
        logarithm: False encodes t itself.
        flip_sin_to_cos: the cosines come first.
    """

    def __init__(self, dim: int, *, logarithm: bool = True, flip_sin_to_cos: bool = False) -> None:
        super().__init__()
        self.logarithm = logarithm
        self.flip_sin_to_cos = flip_sin_to_cos
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, t: Tensor) -> Tensor:
        t = t.float().log() if self.logarithm else t.float()
        angles = t[:, None] * self.weight * 2 * math.pi
        parts = [angles.cos(), angles.sin()] if self.flip_sin_to_cos else [angles.sin(), angles.cos()]
        return torch.cat(parts, dim=1)


def _attended(attention: nn.Module, h: Tensor, context: Tensor | None) -> Tensor:
    out: Tensor = attention(h) if context is None else attention(h, context)
    return out
