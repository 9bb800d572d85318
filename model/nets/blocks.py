"""The parts of UNet2D: ResnetBlocks with attention and resampling, and encodings of timesteps.

Attribute names are diffusers' state-dict keys. Shapes: images are [B, C, H, W], time embeddings [B, D].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.layers import ResnetBlock, sinusoidal_embedding


class DownBlock(nn.Module):
    """ResnetBlocks, each with its attention if there is any, then a Downsample."""

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, h: Tensor, t_emb: Tensor) -> list[Tensor]:
        """Return all skips; the last is also the output."""
        states = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, t_emb)
            if self.attentions:
                h = self.attentions[i](h)
            states.append(h)
        for downsampler in self.downsamplers:
            h = _resampled(downsampler, h, t_emb)
            states.append(h)
        return states


class MiddleBlock(nn.Module):
    """Two ResnetBlocks, with attention between them if there is any."""

    def __init__(self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, h: Tensor, t_emb: Tensor | None) -> Tensor:
        h = self.resnets[0](h, t_emb)
        for attention in self.attentions:
            h = attention(h)
        out: Tensor = self.resnets[1](h, t_emb)
        return out


class UpBlock(nn.Module):
    """ResnetBlocks, each on its input and a skip and with its attention if there is any, then an Upsample."""

    def __init__(
        self, resnets: Sequence[nn.Module], attentions: Sequence[nn.Module], upsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, h: Tensor, t_emb: Tensor, skips: list[Tensor]) -> Tensor:
        """Remove this block's skips from the end of the list and use them."""
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), t_emb)
            if self.attentions:
                h = self.attentions[i](h)
        for upsampler in self.upsamplers:
            h = _resampled(upsampler, h, t_emb)
        return h


class TimeEmbedding(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


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
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float().log()[:, None] * self.weight * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def _resampled(module: nn.Module, h: Tensor, t_emb: Tensor) -> Tensor:
    out: Tensor = module(h, t_emb) if isinstance(module, ResnetBlock) else module(h)
    return out
