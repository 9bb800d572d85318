"""The config of UNet2DCondition: the arguments of diffusers' UNet2DConditionModel, checked."""

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=16384)]
Layers = Annotated[int, Field(ge=1, le=64)]
Depth = Annotated[int, Field(ge=0, le=64)]  # transformer blocks of one transformer
Kernel = Annotated[int, Field(ge=1, le=31)]
DownBlockType = Literal["DownBlock2D", "CrossAttnDownBlock2D"]
UpBlockType = Literal["UpBlock2D", "CrossAttnUpBlock2D"]
MidBlockType = Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"]
Activation = Literal["silu", "swish", "mish", "gelu", "relu"]

Value = TypeVar("Value")


def _several(value: Any) -> Any:
    """A tuple of a list, or of one value."""
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# One value for each level or layer, or one value for all of them.
Each = Annotated[tuple[Value, ...], BeforeValidator(_several), Field(min_length=1)]

SIZES = 6  # numbers of text_time: original height and width, top and left of the crop, target height and width
_MOST_BLOCKS = 1024  # transformer blocks of a network. SDXL has 70


class UNet2DConditionConfig(BaseModel):
    """The arguments and defaults of diffusers' UNet2DConditionModel, as far as they are supported.

    "By level" means one value for each entry of block_out_channels, or one value for all of them.

    Raises:
        ValidationError: if the network cannot be built. The limits keep the network small enough to build on `meta`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    in_channels: int = Field(4, ge=1, le=1024)
    out_channels: int = Field(4, ge=1, le=2048)
    center_input_sample: bool = False  # maps 0 … 1 to −1 … 1
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_embedding_type: Literal["positional", "fourier"] = "positional"
    time_embedding_dim: Count | None = None  # None: 4 × block_out_channels[0], or twice that width with fourier
    time_embedding_act_fn: Activation | None = None  # on the sum of the embeddings of timestep and label
    timestep_post_act: Activation | None = None  # on the embedding of the timestep
    down_block_types: tuple[DownBlockType, ...] = Field(("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), strict=False)
    mid_block_type: MidBlockType | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[UpBlockType, ...] = Field(("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, strict=False)
    block_out_channels: tuple[Count, ...] = Field((320, 640, 1280, 1280), min_length=1, max_length=12, strict=False)
    layers_per_block: Each[Layers] = (2,)  # by level; up blocks have one more
    mid_block_scale_factor: float = Field(1.0, gt=0)
    downsample_padding: int = Field(1, ge=0, le=1)
    conv_in_kernel: Kernel = 3
    conv_out_kernel: Kernel = 3
    act_fn: Activation = "silu"
    norm_num_groups: Count = 32
    norm_eps: float = Field(1e-5, gt=0)  # of ResnetBlocks and conv_norm_out alone
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    attention_head_dim: Each[Count] = (8,)  # the number of heads, by level
    cross_attention_dim: Each[Count] = (1280,)  # channels of the context, by level
    only_cross_attention: Each[bool] = (False,)  # by level; the middle always has self-attention
    use_linear_projection: bool = False
    transformer_layers_per_block: Each[Each[Depth]] = ((1,),)  # by level, and there by layer
    reverse_transformer_layers_per_block: Each[Each[Depth]] | None = None  # of up_block_types; None: the same, reversed
    encoder_hid_dim: Count | None = None  # channels of the text encoder's output, if a layer maps it to the context
    encoder_hid_dim_type: Literal["text_proj"] | None = None  # encoder_hid_dim alone means text_proj
    class_embed_type: Literal["timestep", "identity"] | None = None
    num_class_embeds: int | None = Field(None, ge=1, le=1_000_000)
    addition_embed_type: Literal["text_time"] | None = None  # text_time: the pooled text and sizes (SDXL)
    addition_time_embed_dim: Count | None = None  # channels of the embedding of each of the SIZES
    projection_class_embeddings_input_dim: Count | None = None  # channels of the pooled text and of all sizes
    time_cond_proj_dim: int | None = Field(None, ge=4, le=16384)  # channels of the embedding of guidance (LCM)

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_levels()
        self._check_layers()
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if getattr(self, name) % 2 == 0:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be odd: the size would change")
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(f"norm_num_groups is {self.norm_num_groups}, which does not divide a width of {width}")
        self._check_attention()
        if self.encoder_hid_dim is None and self.encoder_hid_dim_type is not None:
            raise ValueError(f"encoder_hid_dim is required where encoder_hid_dim_type is {self.encoder_hid_dim_type}")
        if self.encoder_hid_dim is not None and len(self.cross_attention_dim) > 1:
            raise ValueError("cross_attention_dim must be one number where encoder_hid_dim is set")
        first = self.block_out_channels[0]
        if self.time_embedding_type == "positional" and first // 2 == self.freq_shift:
            raise ValueError(f"freq_shift is {self.freq_shift:g}, which leaves no frequency of {first}")
        if self.time_embedding_type == "fourier" and self.time_emb_dim % 2:
            raise ValueError(f"time_embedding_dim is {self.time_emb_dim}, and must be even with fourier")
        if self.addition_embed_type == "text_time":
            self._check_addition()
        return self

    def _check_addition(self) -> None:
        """Raise ValueError unless the pooled text and the sizes fit the layers that take them."""
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is required where addition_embed_type is text_time")
        each, whole = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        assert each is not None
        assert whole is not None
        if whole <= SIZES * each:
            raise ValueError(
                f"projection_class_embeddings_input_dim is {whole}, and must be more than {SIZES} times "
                f"addition_time_embed_dim: {SIZES * each}"
            )
        if each // 2 == self.freq_shift:
            raise ValueError(f"freq_shift is {self.freq_shift:g}, which leaves no frequency of {each}")

    def _check_levels(self) -> None:
        """Raise ValueError unless each field by level has one value for each level, or one for all."""
        levels = len(self.block_out_channels)
        for name, value in self:
            if isinstance(value, tuple) and len(value) != levels and (len(value) > 1 or name.endswith("_types")):
                raise ValueError(f"{name} has {len(value)} values, and block_out_channels {levels} widths")

    def _check_layers(self) -> None:
        """Raise ValueError unless each transformer has its number of blocks, and all together are not too many."""
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        if up is None and any(len(depths) > 1 for depths in down):
            raise ValueError(
                "reverse_transformer_layers_per_block is required where transformer_layers_per_block has lists"
            )
        for name, found, layers in (
            ("transformer_layers_per_block", down, self.layers),
            ("reverse_transformer_layers_per_block", up or (), [1 + n for n in reversed(self.layers)]),
        ):
            for depths, n in zip(self.by_level(found), layers, strict=False):
                if 1 < len(depths) < n:
                    raise ValueError(f"{name} has a list of {len(depths)} numbers for {n} layers")
        if sum(map(sum, (*self.down_transformers, *self.up_transformers))) > _MOST_BLOCKS:
            raise ValueError(f"transformer_layers_per_block makes more than {_MOST_BLOCKS} transformer blocks")

    def _check_attention(self) -> None:
        """Raise ValueError unless heads fit the widths and all transformers take the same context."""
        attending = self._attending_levels
        if not attending:
            raise ValueError("down_block_types, mid_block_type and up_block_types have no CrossAttn block for the text")
        for level in attending:
            heads, width = self.by_level(self.attention_head_dim)[level], self.block_out_channels[level]
            if heads > width:
                raise ValueError(f"attention_head_dim is {heads}, the number of heads, and a width only {width}")
        contexts = {self.by_level(self.cross_attention_dim)[level] for level in attending}
        if len(contexts) > 1:
            raise ValueError(f"cross_attention_dim has {sorted(contexts)}, and must be one number where it is used")

    def by_level(self, values: tuple[Value, ...]) -> tuple[Value, ...]:
        """One value for each level, from the highest resolution down."""
        return values * len(self.block_out_channels) if len(values) == 1 else values

    @property
    def layers(self) -> tuple[int, ...]:
        """ResnetBlocks of each level on the way down. On the way up there is one more."""
        return self.by_level(self.layers_per_block)

    @property
    def down_transformers(self) -> tuple[tuple[int, ...], ...]:
        """The number of blocks of each transformer, for each of down_block_types. Empty without transformers."""
        levels = self.by_level(self.transformer_layers_per_block)
        return tuple(
            _by_layer(depths, layers) if kind == "CrossAttnDownBlock2D" else ()
            for kind, depths, layers in zip(self.down_block_types, levels, self.layers, strict=True)
        )

    @property
    def up_transformers(self) -> tuple[tuple[int, ...], ...]:
        """The number of blocks of each transformer, for each of up_block_types. Empty without transformers."""
        levels = self.by_level(self.reverse_transformer_layers_per_block or self.transformer_layers_per_block[::-1])
        return tuple(
            _by_layer(depths, 1 + layers) if kind == "CrossAttnUpBlock2D" else ()
            for kind, depths, layers in zip(self.up_block_types, levels, reversed(self.layers), strict=True)
        )

    @property
    def middle_transformer(self) -> int:
        """The number of blocks of the middle's transformer, if it has one."""
        return self.transformer_layers_per_block[-1][0]

    @property
    def time_emb_dim(self) -> int:
        """Channels of the time embedding."""
        factor = 2 if self.time_embedding_type == "fourier" else 4
        return self.time_embedding_dim or factor * self.block_out_channels[0]

    @property
    def context_dim(self) -> int:
        """Channels of the context, as transformers take it."""
        return self.by_level(self.cross_attention_dim)[min(self._attending_levels)]

    @property
    def pooled_dim(self) -> int | None:
        """Channels of the pooled text; None for a network that takes none."""
        if self.addition_embed_type is None:
            return None
        assert self.addition_time_embed_dim is not None
        assert self.projection_class_embeddings_input_dim is not None
        return self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim

    @property
    def _attending_levels(self) -> set[int]:
        """The levels with transformers, numbered from the highest resolution down."""
        last = len(self.block_out_channels) - 1
        downs = {i for i, kind in enumerate(self.down_block_types) if kind == "CrossAttnDownBlock2D"}
        ups = {last - i for i, kind in enumerate(self.up_block_types) if kind == "CrossAttnUpBlock2D"}
        return downs | ups | ({last} if self.mid_block_type == "UNetMidBlock2DCrossAttn" else set())


def _by_layer(depths: tuple[int, ...], layers: int) -> tuple[int, ...]:
    return depths * layers if len(depths) == 1 else depths[:layers]
