"""The layers of all networks here.

Shapes: images are [B, C, H, W], time embeddings [B, D]. Convolutions are 3×3 with padding 1 unless noted.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


def sinusoidal_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = False, freq_shift: float = 0.0) -> Tensor:
    """Encode timesteps [B] as [sin(t·f), cos(t·f)], [B, dim].

    f_k = 10000^(−k/(dim/2 − freq_shift)), k = 0 … dim/2 − 1. Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    The result is float32, also under autocast. An odd dim ends in a zero. ADM and latent diffusion use
    flip_sin_to_cos; the first DDPMs use freq_shift 1.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    f = torch.exp(-math.log(10000.0) * k / (half - freq_shift))
    angles = t.to(torch.float32)[:, None] * f[None, :]
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """Encode w = guidance_scale − 1, [B], as [sin(1000·w·f), cos(1000·w·f)], float32 [B, dim].

    f is that of `sinusoidal_embedding` with freq_shift 1. Operations and their order are those of diffusers'
    LatentConsistencyModelPipeline: 1000·w·f is so large that the last bits of f count. Meng et al. 2023,
    arXiv:2210.03142.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=w.device)
    f = torch.exp(k * -(torch.log(torch.full((), 10000.0, device=w.device)) / (half - 1)))
    angles = (w.to(torch.float32) * 1000.0)[:, None] * f[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def norm(groups: int | None, channels: int, eps: float = 1e-5) -> nn.Module:
    """GroupNorm with `groups` groups; no norm for None."""
    return nn.Identity() if groups is None else nn.GroupNorm(groups, channels, eps)


class Downsample(nn.Module):
    """Halves H and W with a strided convolution.

    Args:
        channels: in and out.
        padding: 1 pads all sides. 0 pads the right and the bottom only, like the first DDPMs.
    """

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Doubles H and W, or maps them to `size`: nearest neighbour, then a convolution against aliasing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        out: Tensor = self.conv(doubled(x) if size is None else F.interpolate(x, size=tuple(size), mode="nearest"))
        return out


def doubled(x: Tensor) -> Tensor:
    """Double H and W, nearest neighbour."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halved(x: Tensor) -> Tensor:
    """Halve H and W by averaging."""
    return F.avg_pool2d(x, 2)


class ResnetBlock(nn.Module):
    """Two convolutions with the time embedding added between them, and a shortcut around both.

    Args:
        in_ch, out_ch: channels.
        time_emb_dim: channels of the time embedding; None for a block without time.
        norm_groups, eps: for the GroupNorms before the activations; None for no norm.
        activation: for images and for the time embedding.
        scale_shift: the time embedding scales and shifts the output of norm2 (Dhariwal & Nichol 2021,
            arXiv:2105.05233, eq. 1). Otherwise it is added before norm2.
        resample: `doubled` or `halved`. Applied to both branches, after the first activation.
        residual_scale: divides the output.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        time_emb_dim: int | None,
        norm_groups: int | None = None,
        *,
        eps: float = 1e-5,
        activation: Callable[[Tensor], Tensor] = F.silu,
        scale_shift: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.scale_shift = scale_shift
        self.resample = resample
        self.residual_scale = residual_scale
        self.norm1 = norm(norm_groups, in_ch, eps)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        if time_emb_dim is not None:
            self.time_mlp = nn.Linear(time_emb_dim, 2 * out_ch if scale_shift else out_ch)
        self.norm2 = norm(norm_groups, out_ch, eps)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.shortcut = nn.Identity() if in_ch == out_ch else nn.Conv2d(in_ch, out_ch, 1)

    def forward(self, x: Tensor, t_emb: Tensor | None) -> Tensor:
        h = self.activation(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        t = None if t_emb is None else self.time_mlp(self.activation(t_emb))[:, :, None, None]
        if t is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = t.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + t)
        h = self.conv2(self.activation(h))
        return scaled(h + self.shortcut(x), self.residual_scale)


class Attention(nn.Module):
    """Self-attention over the H·W positions, added to its input.

    Args:
        channels: in and out.
        norm_groups, eps: for the GroupNorm before it; None for no norm.
        heads: number of heads.
        head_dim: channels of one head. None: channels // heads.
        residual_scale: divides the output.
        at_once: queries per chunk, which limits the memory for the scores. None: one chunk.
    """

    def __init__(
        self,
        channels: int,
        norm_groups: int | None = None,
        *,
        eps: float = 1e-5,
        heads: int = 1,
        head_dim: int | None = None,
        residual_scale: float = 1.0,
        at_once: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = channels // heads if head_dim is None else head_dim
        self.residual_scale = residual_scale
        self.at_once = at_once
        inner = heads * self.head_dim
        self.norm = norm(norm_groups, channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * inner, 1)
        self.proj = nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, self.head_dim, height * width)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each [B, heads, H·W, head_dim]
        queries = (q,) if self.at_once is None else q.split(self.at_once, dim=2)
        parts = [F.scaled_dot_product_attention(part, k, v) for part in queries]
        h = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        h = h.transpose(2, 3).reshape(batch, self.heads * self.head_dim, height, width)
        return scaled(x + self.proj(h), self.residual_scale)


def scaled(x: Tensor, divisor: float) -> Tensor:
    return x if divisor == 1.0 else x / divisor
