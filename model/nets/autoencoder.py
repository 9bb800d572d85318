"""The VAE of latent diffusion, images → latents → images: diffusers' AutoencoderKL and VQModel.

Rombach et al. 2022 (arXiv:2112.10752), section 3.1. The network is that of Esser et al. 2021 (arXiv:2012.09841), with
attention only in the middle. A U-Net denoises the latents; then one pass of the decoder makes the image.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.blocks import MiddleBlock
from model.nets.layers import ACTIVATIONS, Attention, Downsample, ResnetBlock, Upsample
from model.nets.unet2d import Count

_EPS = 1e-6  # for all norms
_AT_ONCE = 4096  # attention queries per chunk; the scores of more would take most of the memory
_LEAST_LOG_VARIANCE, _MOST_LOG_VARIANCE = -30.0, 20.0  # diffusers' DiagonalGaussianDistribution
_DISTANCES = 2**24  # distances from latents to codes that are in memory at once


class AutoencoderConfig(BaseModel):
    """The arguments of diffusers' AutoencoderKL and VQModel.

    Attributes:
        kind: kl encodes each latent as a normal distribution. vq replaces each latent by the nearest entry of a
            codebook before decoding.
        scaling_factor: the U-Net sees latents multiplied by this, so that their variance is about 1.

    Raises:
        ValidationError: if the network cannot be built.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    kind: Literal["kl", "vq"]
    image_channels: int = Field(3, ge=1, le=1024)
    latent_channels: int = Field(ge=1, le=1024)
    block_out_channels: tuple[Count, ...] = Field((64,), min_length=1, max_length=10, strict=False)
    layers_per_block: int = Field(1, ge=1, le=32)
    norm_num_groups: int = Field(32, ge=1)
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    num_vq_embeddings: int | None = Field(None, ge=1, le=1_000_000)
    vq_embed_dim: int | None = Field(None, ge=1, le=1024, description="None: latent_channels")
    scaling_factor: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide a width of {width}")
        if self.kind == "kl" and (self.num_vq_embeddings is not None or self.vq_embed_dim is not None):
            raise ValueError("num_vq_embeddings and vq_embed_dim are for kind vq, and this is kl")
        if self.kind == "vq" and self.num_vq_embeddings is None:
            raise ValueError("num_vq_embeddings is required where kind is vq")
        if self.kind == "vq" and not (self.use_quant_conv and self.use_post_quant_conv):
            raise ValueError("kind is vq, and use_quant_conv and use_post_quant_conv must be true with it")
        return self

    @property
    def channels(self) -> int:
        """Channels of the latents that the U-Net denoises."""
        return self.vq_embed_dim or self.latent_channels

    @property
    def factor(self) -> int:
        """Image height divided by latent height; the same for widths."""
        return int(2 ** (len(self.block_out_channels) - 1))


class Autoencoder(nn.Module):
    """Encoder and decoder. State-dict keys are diffusers', except inside ResnetBlock and Attention."""

    outside = ("quantize",)  # see model.nets.precision

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.latent_channels * (2 if config.kind == "kl" else 1)
        embedded = width if config.kind == "kl" else config.channels
        self.encoder = Encoder(config, width)
        self.quant_conv = nn.Conv2d(width, embedded, 1) if config.use_quant_conv else None
        codes = config.num_vq_embeddings
        self.quantize = None if codes is None else Codebook(codes, config.channels)
        self.post_quant_conv = (
            nn.Conv2d(config.channels, config.latent_channels, 1) if config.use_post_quant_conv else None
        )
        self.decoder = Decoder(config)

    def moments(self, x: Tensor) -> Tensor:
        """Map images [B, image_channels, H, W] to unscaled latents.

        kl: means and logarithms of variances, [B, 2·channels, H/factor, W/factor]. vq: latents before the codebook,
        [B, channels, H/factor, W/factor].
        """
        h: Tensor = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def encode(self, x: Tensor) -> Tensor:
        """Map images to the means of their latents, scaled for the U-Net, [B, channels, H/factor, W/factor]."""
        return self.distribution(x)[:, 0]

    def distribution(self, x: Tensor) -> Tensor:
        """Map images to their latents, scaled for the U-Net.

        kl: means and standard deviations, [B, 2, channels, H/factor, W/factor]. vq: latents before the codebook,
        [B, 1, channels, H/factor, W/factor].
        """
        moments, channels, scale = self.moments(x), self.config.channels, self.config.scaling_factor
        mean = moments[:, :channels] * scale
        if self.config.kind == "vq":
            return mean.unsqueeze(1)
        std = torch.exp(0.5 * moments[:, channels:].clamp(_LEAST_LOG_VARIANCE, _MOST_LOG_VARIANCE)) * scale
        return torch.stack([mean, std], dim=1)

    @property
    def unscaled(self) -> Callable[[Tensor], Tensor]:
        """A function from scaled latents [B, channels, h, w] to the decoder's input; for vq, to the nearest codes.

        Always float32: rounding could pick another code. Captures only the codebook, not the whole autoencoder.
        """
        return partial(_unscaled, scaling_factor=self.config.scaling_factor, quantize=self.quantize)

    def decode_unscaled(self, z: Tensor) -> Tensor:
        """Map the output of `unscaled` to images, about −1 … 1, [B, image_channels, factor·h, factor·w]."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        out: Tensor = self.decoder(z)
        return out

    def decode(self, z: Tensor) -> Tensor:
        """Map scaled latents [B, channels, h, w] to images."""
        return self.decode_unscaled(self.unscaled(z))


class DecoderOnly(nn.Module):
    """Autoencoder.decode_unscaled as a network."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.decode_unscaled(x)


class EncoderOnly(nn.Module):
    """Autoencoder.distribution as a network."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, x: Tensor) -> Tensor:
        return self.autoencoder.distribution(x)


class Encoder(nn.Module):
    """Images [B, image_channels, H, W] → [B, out_ch, H/factor, W/factor]."""

    def __init__(self, config: AutoencoderConfig, out_ch: int) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.image_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        ch = widths[0]
        for level, width in enumerate(widths):
            resnets = [_resnet(config, ch if i == 0 else width, width) for i in range(config.layers_per_block)]
            ch = width
            is_last = level == len(widths) - 1
            self.down_blocks.append(DownEncoderBlock(resnets, None if is_last else Downsample(ch, padding=0)))
        self.mid_block = _middle(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, ch, _EPS)
        self.conv_out = nn.Conv2d(ch, out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h, None)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out


class Decoder(nn.Module):
    """Latents [B, latent_channels, h, w] → images [B, image_channels, factor·h, factor·w]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _middle(config)
        self.up_blocks = nn.ModuleList()
        ch = widths[0]
        for level, width in enumerate(widths):
            resnets = [_resnet(config, ch if i == 0 else width, width) for i in range(config.layers_per_block + 1)]
            ch = width
            self.up_blocks.append(UpDecoderBlock(resnets, None if level == len(widths) - 1 else Upsample(ch)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, ch, _EPS)
        self.conv_out = nn.Conv2d(ch, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z), None)
        for block in self.up_blocks:
            h = block(h)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out


class DownEncoderBlock(nn.Module):
    """ResnetBlocks, then a Downsample."""

    def __init__(self, resnets: Sequence[nn.Module], downsampler: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, h: Tensor) -> Tensor:
        for resnet in self.resnets:
            h = resnet(h, None)
        for downsampler in self.downsamplers:
            h = downsampler(h)
        return h


class UpDecoderBlock(nn.Module):
    """ResnetBlocks, then an Upsample."""

    def __init__(self, resnets: Sequence[nn.Module], upsampler: nn.Module | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, h: Tensor) -> Tensor:
        for resnet in self.resnets:
            h = resnet(h, None)
        for upsampler in self.upsamplers:
            h = upsampler(h)
        return h


class Codebook(nn.Module):
    """The codebook of vq. van den Oord et al. 2017 (arXiv:1711.00937), eq. 1 and 2."""

    def __init__(self, codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)

    def forward(self, z: Tensor) -> Tensor:
        """Replace each latent by the nearest code, [B, channels, h, w], one image at a time."""
        return torch.stack([self._nearest(one) for one in z.unbind()])

    def _nearest(self, z: Tensor) -> Tensor:
        codes = self.embedding.weight
        places = z.flatten(1).T
        parts = [
            torch.cdist(part, codes).argmin(dim=1) for part in torch.split(places, max(1, _DISTANCES // len(codes)))
        ]
        nearest = codes[torch.cat(parts)].T.reshape(z.shape)
        return z + (nearest - z)  # as in diffusers, bit for bit


def _unscaled(z: Tensor, scaling_factor: float, quantize: Codebook | None) -> Tensor:
    z = z / scaling_factor
    if quantize is not None:
        z = quantize(z)
    return z


def _resnet(config: AutoencoderConfig, in_ch: int, out_ch: int) -> ResnetBlock:
    return ResnetBlock(in_ch, out_ch, None, config.norm_num_groups, eps=_EPS, activation=ACTIVATIONS[config.act_fn])


def _middle(config: AutoencoderConfig) -> MiddleBlock:
    ch = config.block_out_channels[-1]
    attention = partial(Attention, ch, config.norm_num_groups, eps=_EPS, at_once=_AT_ONCE)
    attentions = [attention()] if config.mid_block_add_attention else []
    return MiddleBlock([_resnet(config, ch, ch) for _ in range(2)], attentions)
