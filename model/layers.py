"""The blocks that the U-Nets of this package are built from.

Shapes: images are [B, C, H, W], time embeddings [B, D]. All convolutions are 3×3 with padding 1 unless said otherwise.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Encode timesteps [B] as [sin(t·f), cos(t·f)], [B, dim], with f_k = 10000^(−k/(dim/2)), k = 0 … dim/2 − 1.

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, sines ahead of cosines. float32, also under autocast.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    f = torch.exp(-math.log(10000.0) * k / half)
    angles = t.to(torch.float32)[:, None] * f[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def norm(groups: int | None, channels: int) -> nn.Module:
    """GroupNorm over `groups` groups, or nothing."""
    return nn.Identity() if groups is None else nn.GroupNorm(groups, channels)


class Downsample(nn.Module):
    """Halve H and W by a strided convolution, in the place of MaxPool."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Double H and W: nearest neighbour, then a convolution against aliasing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding added between them, and a shortcut around both."""

    def __init__(self, in_ch: int, out_ch: int, time_emb_dim: int, norm_groups: int | None = None) -> None:
        super().__init__()
        self.norm1 = norm(norm_groups, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.time_mlp = nn.Linear(time_emb_dim, out_ch)
        self.norm2 = norm(norm_groups, out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.shortcut = nn.Identity() if in_ch == out_ch else nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_mlp(F.silu(t_emb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = h + self.shortcut(x)
        return out


class Attention(nn.Module):
    """Self-attention with one head over the H·W positions, added to its input."""

    def __init__(self, channels: int, norm_groups: int | None = None) -> None:
        super().__init__()
        self.norm = norm(norm_groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, channels, height * width)
        q, k, v = qkv.transpose(2, 3).unbind(1)  # each [B, H·W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.proj(h.transpose(1, 2).reshape(batch, channels, height, width))
        return out
