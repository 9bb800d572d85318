"""The Diffusion U-Net: ResnetBlock(t) → Downsample on the way down, Concat → ResnetBlock(t) → Upsample on the way up.

Each decoder block works before its Upsample, so one level lower than in the original U-Net; docs/unet.md measures what
follows. With every extra off, the network is the bare skeleton, state-dict keys included.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from model.nets.embedder import Embedder, Encoded
from model.nets.layers import Attention, Downsample, ResnetBlock, Upsample, sinusoidal_embedding


class DiffusionUNet(nn.Module):
    """Predicts ε, v or x_0 of noisy images.

    Args:
        in_ch: channels of the image, in and out.
        model_ch: channels after `input_conv`, and of the sinusoidal encoding; even.
        ch_mult: channels of each level, as multiples of `model_ch`. Each level halves H and W.
        norm_groups: groups of the GroupNorm before each SiLU on images; None for no norm.
        attention_levels: levels with attention after their ResnetBlocks. Level 0 has the highest resolution.
        middle_attention: adds attention after the middle block.
        num_classes: adds a label embedding to the time embedding. Entry `num_classes` means "no label".
        input_skip: adds a skip from `input_conv` to `final_conv`.

    Raises:
        ValueError: if the network cannot be built; the message names the argument.
    """

    outside = "time_embed", "label_embed"  # see model.nets.precision

    def __init__(
        self,
        in_ch: int,
        model_ch: int,
        ch_mult: Sequence[int],
        *,
        norm_groups: int | None = None,
        attention_levels: Sequence[int] = (),
        middle_attention: bool = False,
        num_classes: int | None = None,
        input_skip: bool = False,
    ) -> None:
        super().__init__()
        _check(model_ch, ch_mult, norm_groups, attention_levels, input_skip)
        time_emb_dim = 4 * model_ch
        self.model_ch = model_ch
        self.levels = len(ch_mult)
        self.num_classes = num_classes
        self.input_skip = input_skip

        self.time_embed = nn.Sequential(
            nn.Linear(model_ch, time_emb_dim), nn.SiLU(), nn.Linear(time_emb_dim, time_emb_dim)
        )
        if num_classes is not None:
            self.label_embed = nn.Embedding(num_classes + 1, time_emb_dim)
        self.input_conv = nn.Conv2d(in_ch, model_ch, 3, padding=1)

        # `downs` and `ups` alternate ResnetBlock and resampling. Attention has its own dicts, keyed by level, so that
        # it does not change the skeleton's state-dict keys.
        self.downs = nn.ModuleList()
        self.down_attentions = nn.ModuleDict()
        ch = model_ch
        for level, mult in enumerate(ch_mult):
            self.downs.append(ResnetBlock(ch, mult * model_ch, time_emb_dim, norm_groups))
            ch = mult * model_ch
            if level in attention_levels:
                self.down_attentions[str(level)] = Attention(ch, norm_groups)
            self.downs.append(Downsample(ch))

        self.middle = ResnetBlock(ch, ch, time_emb_dim, norm_groups)
        self.middle_attention = Attention(ch, norm_groups) if middle_attention else None

        self.ups = nn.ModuleList()
        self.up_attentions = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(ch_mult))):
            self.ups.append(ResnetBlock(ch + mult * model_ch, mult * model_ch, time_emb_dim, norm_groups))
            ch = mult * model_ch
            if level in attention_levels:
                self.up_attentions[str(level)] = Attention(ch, norm_groups)
            self.ups.append(Upsample(ch))
        self.final_conv = nn.Conv2d(ch + model_ch if input_skip else ch, in_ch, 3, padding=1)

    @property
    def embedder(self) -> Embedder:
        """The embeddings of timesteps and labels."""
        return Embedder(
            dim=4 * self.model_ch,
            of_time=Encoded(partial(sinusoidal_embedding, dim=self.model_ch), self.time_embed),
            of_label=None if self.num_classes is None else self.label_embed,
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x [B, C, H, W], t [B] and labels [B] to the prediction, [B, C, H, W].

        Args:
            labels: `num_classes` means "no label", and so does None.
        """
        self.check_size(x.shape[-2], x.shape[-1])
        emb = self.embedder.of_time(t, None)
        if self.num_classes is not None:
            if labels is None:
                labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            emb = emb + self.label_embed(labels)
        return self.denoise(x, emb)

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [B, C, H, W] and its embeddings [B, 4·model_ch] to the prediction, [B, C, H, W]."""
        h = first = self.input_conv(x)
        skips = []
        for level in range(self.levels):
            h = self.downs[2 * level](h, emb)
            if str(level) in self.down_attentions:
                h = self.down_attentions[str(level)](h)
            h = self.downs[2 * level + 1](h)
            skips.append(h)

        h = self.middle(h, emb)
        if self.middle_attention is not None:
            h = self.middle_attention(h)

        for i, level in enumerate(reversed(range(self.levels))):
            h = self.ups[2 * i](torch.cat([h, skips.pop()], dim=1), emb)
            if str(level) in self.up_attentions:
                h = self.up_attentions[str(level)](h)
            h = self.ups[2 * i + 1](h)

        if self.input_skip:
            h = torch.cat([h, first], dim=1)
        out: Tensor = self.final_conv(h)
        return out

    @property
    def factor(self) -> int:
        """Height and width must be multiples of this."""
        return int(2**self.levels)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless each level can halve height and width."""
        factor = self.factor
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"image size {height}x{width} cannot be halved {self.levels} times: "
                f"height and width must be multiples of {factor}"
            )


def _check(
    model_ch: int,
    ch_mult: Sequence[int],
    norm_groups: int | None,
    attention_levels: Sequence[int],
    input_skip: bool,
) -> None:
    if model_ch < 2 or model_ch % 2:
        raise ValueError(f"model_channels is {model_ch}, and must be even, for its sines and cosines")
    if not ch_mult or min(ch_mult) < 1:
        raise ValueError(f"channel_multipliers is {list(ch_mult)}, and must be one or more positive integers")
    if ch_mult[0] != 1 and not input_skip:
        raise ValueError(
            f"the first of channel_multipliers is {ch_mult[0]}, and must be 1: "
            "without input_skip, final_conv takes model_channels channels"
        )
    if norm_groups is not None:
        # The decoder concatenates these widths. If norm_groups divides each, it divides the sums.
        for ch in {model_ch, *(mult * model_ch for mult in ch_mult)}:
            if norm_groups < 1 or ch % norm_groups:
                raise ValueError(f"norm_groups is {norm_groups}, which does not divide a width of {ch} channels")
    wrong = [level for level in attention_levels if not 0 <= level < len(ch_mult)]
    if wrong:
        raise ValueError(f"attention_levels names level {wrong[0]}; the levels are 0 to {len(ch_mult) - 1}")
