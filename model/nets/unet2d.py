"""The DDPM-family U-Net: diffusers' UNet2DModel, and with it improved- and guided-diffusion (ADM) and latent diffusion.

Each level has several ResnetBlocks on the way down, each with its own skip, and one more on the way up. Only the
transitions between levels resample. Ho et al. 2020 (arXiv:2006.11239), appendix B; the variants of Dhariwal & Nichol
2021 (arXiv:2105.05233).
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from model.nets.blocks import DownBlock, FourierEncoding, MiddleBlock, SinusoidalEncoding, TimeEmbedding, UpBlock
from model.nets.embedder import Embedder, Encoded
from model.nets.layers import ACTIVATIONS, Attention, Downsample, ResnetBlock, Upsample, doubled, halved

Count = Annotated[int, Field(ge=1, le=16384)]
DownBlockType = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlockType = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
Resampling = Literal["conv", "resnet"]


class UNet2DConfig(BaseModel):
    """The arguments and defaults of diffusers' UNet2DModel, and two more: time_proj_dim and num_attention_heads.

    Raises:
        ValidationError: if the network cannot be built. The limits keep the network small enough to build on `meta`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    in_channels: int = Field(3, ge=1, le=1024)
    out_channels: int = Field(3, ge=1, le=2048)
    center_input_sample: bool = False  # maps 0 … 1 to −1 … 1
    time_embedding_type: Literal["positional", "fourier", "learned"] = "positional"
    time_embedding_dim: Count | None = None  # None: 4 × encoding_dim
    time_proj_dim: Count | None = None  # None: block_out_channels[0]. Only ADM-512 differs
    freq_shift: float = 0.0
    flip_sin_to_cos: bool = True
    num_train_timesteps: int | None = Field(None, ge=1, le=100_000)  # length of a learned encoding
    down_block_types: tuple[DownBlockType, ...] = Field(
        ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), strict=False
    )
    mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D"
    up_block_types: tuple[UpBlockType, ...] = Field(
        ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"), strict=False
    )
    block_out_channels: tuple[Count, ...] = Field((224, 448, 672, 896), min_length=1, max_length=12, strict=False)
    layers_per_block: int = Field(2, ge=1, le=64)
    mid_block_scale_factor: float = Field(1.0, gt=0)
    downsample_padding: int = Field(1, ge=0, le=1)
    downsample_type: Resampling | None = "conv"  # only AttnDownBlock2D uses this; None means conv
    upsample_type: Resampling | None = "conv"  # only AttnUpBlock2D uses this; None means conv
    act_fn: Literal["silu", "swish", "mish", "gelu", "relu"] = "silu"
    attention_head_dim: Count | None = 8  # None: one head
    num_attention_heads: Count | None = None  # overrides attention_head_dim
    norm_num_groups: Count = 32
    attn_norm_num_groups: Count | None = None  # for the middle attention
    norm_eps: float = Field(1e-5, gt=0)
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: bool = True  # in the middle block
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = Field(None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        levels = len(self.block_out_channels)
        for name, types in (("down_block_types", self.down_block_types), ("up_block_types", self.up_block_types)):
            if len(types) != levels:
                raise ValueError(f"{name} has {len(types)} blocks, and block_out_channels {levels} widths")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide a width of {width}")
        for width in self._attention_widths:
            if self.num_attention_heads is None and self.attention_heads(width) < 1:
                raise ValueError(f"attention_head_dim is {self.attention_head_dim}, and a width only {width}")
            if self.num_attention_heads is not None and width % self.num_attention_heads:
                raise ValueError(f"num_attention_heads is {self.num_attention_heads}, which does not divide {width}")
        groups = self.middle_norm_groups
        if groups is not None and self.block_out_channels[-1] % groups and self.has_middle_attention:
            raise ValueError(
                f"attn_norm_num_groups is {groups}, which does not divide a width of {self.block_out_channels[-1]}"
            )
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ValueError("num_train_timesteps is required where time_embedding_type is learned")
        if self.time_embedding_type == "positional" and self.encoding_dim // 2 == self.freq_shift:
            raise ValueError(f"freq_shift is {self.freq_shift:g}, which leaves no frequency of {self.encoding_dim}")
        return self

    @property
    def encoding_dim(self) -> int:
        """Channels of the timestep encoding that enters the MLP; a fourier encoding has twice as many."""
        return self.block_out_channels[0] if self.time_proj_dim is None else self.time_proj_dim

    @property
    def first_timestep(self) -> int:
        """The smallest valid timestep."""
        return 1 if self.time_embedding_type == "fourier" else 0  # a fourier encoding takes the logarithm

    @property
    def has_middle_attention(self) -> bool:
        return self.mid_block_type is not None and self.add_attention

    @property
    def middle_norm_groups(self) -> int | None:
        """Groups of the middle attention's norm. With scale_shift and no attn_norm_num_groups there is no norm."""
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "default":
            return self.norm_num_groups
        return self.attn_norm_num_groups

    @property
    def _attention_widths(self) -> set[int]:
        downs = zip(self.down_block_types, self.block_out_channels, strict=True)
        ups = zip(self.up_block_types, reversed(self.block_out_channels), strict=True)
        widths = {width for kind, width in (*downs, *ups) if kind.startswith("Attn")}
        return widths | ({self.block_out_channels[-1]} if self.has_middle_attention else set())

    def attention_heads(self, width: int) -> int:
        if self.num_attention_heads is not None:
            return self.num_attention_heads
        return 1 if self.attention_head_dim is None else width // self.attention_head_dim

    def attention_head_width(self, width: int) -> int:
        if self.num_attention_heads is not None:
            return width // self.num_attention_heads
        return width if self.attention_head_dim is None else self.attention_head_dim


class UNet2D(nn.Module):
    """Predicts ε, v or x_0 of noisy images; with twice the output channels, also a variance.

    State-dict keys are diffusers', except inside ResnetBlock and Attention.
    """

    outside = "time_proj", "time_embedding", "class_embedding"  # see model.nets.precision

    def __init__(self, config: UNet2DConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_emb_dim = config.time_embedding_dim or 4 * config.encoding_dim
        resnet = partial(
            ResnetBlock,
            time_emb_dim=time_emb_dim,
            norm_groups=config.norm_num_groups,
            eps=config.norm_eps,
            activation=ACTIVATIONS[config.act_fn],
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )

        def attention(
            ch: int, norm_groups: int | None = config.norm_num_groups, residual_scale: float = 1
        ) -> Attention:
            heads, head_dim = config.attention_heads(ch), config.attention_head_width(ch)
            return Attention(
                ch, norm_groups, eps=config.norm_eps, heads=heads, head_dim=head_dim, residual_scale=residual_scale
            )

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj = _time_proj(config)
        encoding_dim = config.encoding_dim * (2 if config.time_embedding_type == "fourier" else 1)
        self.time_embedding = TimeEmbedding(encoding_dim, time_emb_dim)
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimeEmbedding(encoding_dim, time_emb_dim)
        elif config.class_embed_type is None and config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_emb_dim)

        last = len(widths) - 1
        ch = widths[0]
        skips = [ch]  # channels of each skip
        self.down_blocks = nn.ModuleList()
        for level, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            resnets = [resnet(ch if i == 0 else width, width) for i in range(config.layers_per_block)]
            attentions = [attention(width) for _ in resnets] if kind == "AttnDownBlock2D" else []
            ch = width
            skips += [ch] * len(resnets)
            downsampler = None
            if level != last:
                by_resnet = _by_resnet(kind, config.downsample_type)
                downsampler = (
                    resnet(ch, ch, resample=halved) if by_resnet else Downsample(ch, config.downsample_padding)
                )
                skips.append(ch)
            self.down_blocks.append(DownBlock(resnets, attentions, downsampler))

        self.mid_block: MiddleBlock | None = None
        if config.mid_block_type is not None:
            scale = config.mid_block_scale_factor
            resnets = [resnet(ch, ch, residual_scale=scale) for _ in range(2)]
            attentions = [attention(ch, config.middle_norm_groups, scale)] if config.add_attention else []
            self.mid_block = MiddleBlock(resnets, attentions)

        self.up_blocks = nn.ModuleList()
        for level, (up_kind, width) in enumerate(zip(config.up_block_types, reversed(widths), strict=True)):
            resnets = []
            for _ in range(config.layers_per_block + 1):
                resnets.append(resnet(ch + skips.pop(), width))
                ch = width
            attentions = [attention(ch) for _ in resnets] if up_kind == "AttnUpBlock2D" else []
            upsampler = None
            if level != last:
                by_resnet = _by_resnet(up_kind, config.upsample_type)
                upsampler = resnet(ch, ch, resample=doubled) if by_resnet else Upsample(ch)
            self.up_blocks.append(UpBlock(resnets, attentions, upsampler))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, ch, config.norm_eps)
        self.conv_out = nn.Conv2d(ch, config.out_channels, 3, padding=1)

    @property
    def embedder(self) -> Embedder:
        """The embeddings of timesteps and labels."""
        encoding: Callable[[Tensor], Tensor] = self.time_proj
        if self.config.time_embedding_type == "learned":
            encoding = partial(_looked_up, self.time_proj)
        of_label: Callable[[Tensor], Tensor] | None = self.class_embedding
        if self.config.class_embed_type == "timestep" and self.class_embedding is not None:
            of_label = Encoded(encoding, self.class_embedding)
        return Embedder(
            dim=self.time_embedding.linear_2.out_features,
            of_time=Encoded(encoding, self.time_embedding),
            of_label=of_label,
            divides_output=self.config.time_embedding_type == "fourier",
        )

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map x [B, C, H, W], t [B] and labels to the prediction, [B, out_channels, H, W].

        Args:
            labels: integers [B]. With class_embed_type identity: vectors [B, time_embedding_dim], which are added to
                the time embedding. None adds nothing. A network without classes ignores them.
        """
        self.check_size(x.shape[-2], x.shape[-1])
        embedder = self.embedder
        out = self.denoise(x, embedder.of(t, labels))
        return out / t[:, None, None, None] if embedder.divides_output else out

    def denoise(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map x [B, C, H, W] and its embeddings [B, time_embedding_dim] to the output, [B, out_channels, H, W].

        With a fourier encoding, the prediction is this output divided by the timestep.
        """
        if self.config.center_input_sample:
            x = 2 * x - 1
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            skips += block(h, emb)
            h = skips[-1]
        if self.mid_block is not None:
            h = self.mid_block(h, emb)
        for block in self.up_blocks:
            h = block(h, emb, skips)

        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out

    @property
    def factor(self) -> int:
        """Height and width must be multiples of this."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless each level can halve height and width."""
        factor = self.factor
        if height % factor or width % factor or not height or not width:
            raise ValueError(
                f"image size {height}x{width} cannot be halved {len(self.config.block_out_channels) - 1} times: "
                f"height and width must be multiples of {factor}"
            )


def _time_proj(config: UNet2DConfig) -> nn.Module:
    match config.time_embedding_type:
        case "positional":
            return SinusoidalEncoding(config.encoding_dim, config.flip_sin_to_cos, config.freq_shift)
        case "fourier":
            return FourierEncoding(config.encoding_dim)
        case "learned":
            assert config.num_train_timesteps is not None
            return nn.Embedding(config.num_train_timesteps, config.encoding_dim)


def _looked_up(table: nn.Module, numbers: Tensor) -> Tensor:
    found: Tensor = table(numbers.long())
    return found


def _by_resnet(kind: str, resampling: Resampling | None) -> bool:
    """Whether a block resamples with a ResnetBlock. Only blocks with attention read `resampling`."""
    return kind.startswith("Resnet") or (kind.startswith("Attn") and resampling == "resnet")
