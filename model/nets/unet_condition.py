"""UNet2DCondition: the U-Net of Stable Diffusion, diffusers' UNet2DConditionModel.

The skeleton of model.nets.unet2d, with a transformer after each ResnetBlock of a CrossAttn block. The transformers
attend to the context. Rombach et al. 2022, arXiv:2112.10752.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from model.nets.blocks import DownBlock, FourierEncoding, MiddleBlock, SinusoidalEncoding, TimeEmbedding, UpBlock
from model.nets.embedder import Added, Embedder, Encoded
from model.nets.layers import ACTIVATIONS, Downsample, ResnetBlock, Upsample
from model.nets.transformer import Transformer2D
from model.nets.unet_condition_config import UNet2DConditionConfig


class UNet2DCondition(nn.Module):
    """Predicts ε, v or x_0 of noisy latents for a prompt. Any height and width are possible.

    State-dict keys are diffusers', except inside ResnetBlock.
    """

    # See model.nets.precision.
    outside = "time_proj", "time_embedding", "class_embedding", "add_embedding", "encoder_hid_proj"

    def __init__(self, config: UNet2DConditionConfig) -> None:
        super().__init__()
        self.config = config
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        activation = ACTIVATIONS[config.act_fn]
        resnet = partial(
            ResnetBlock,
            time_emb_dim=config.time_emb_dim,
            norm_groups=config.norm_num_groups,
            eps=config.norm_eps,
            activation=activation,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
        )
        heads, only_cross = config.by_level(config.attention_head_dim), config.by_level(config.only_cross_attention)

        def transformer(level: int, depth: int, only_cross_attention: bool) -> Transformer2D:
            return Transformer2D(
                widths[level],
                depth,
                heads=heads[level],
                context_dim=config.context_dim,
                norm_groups=config.norm_num_groups,
                only_cross_attention=only_cross_attention,
                linear=config.use_linear_projection,
            )

        self.conv_in = nn.Conv2d(
            config.in_channels, widths[0], config.conv_in_kernel, padding=config.conv_in_kernel // 2
        )
        encoding_dim, flip = widths[0], config.flip_sin_to_cos
        self.time_proj: nn.Module = SinusoidalEncoding(encoding_dim, flip, config.freq_shift)
        if config.time_embedding_type == "fourier":
            encoding_dim = config.time_emb_dim
            self.time_proj = FourierEncoding(encoding_dim // 2, logarithm=False, flip_sin_to_cos=flip)
        post = None if config.timestep_post_act is None else ACTIVATIONS[config.timestep_post_act]
        self.time_embedding = TimeEmbedding(
            encoding_dim, config.time_emb_dim, activation, post, config.time_cond_proj_dim
        )
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "timestep":
            self.class_embedding = TimeEmbedding(encoding_dim, config.time_emb_dim, activation)
        elif config.class_embed_type is None and config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_emb_dim)
        self.add_embedding: nn.Module | None = None
        if config.addition_embed_type == "text_time":
            assert config.projection_class_embeddings_input_dim is not None
            self.add_embedding = TimeEmbedding(config.projection_class_embeddings_input_dim, config.time_emb_dim)
        self.encoder_hid_proj: nn.Module | None = None
        if config.encoder_hid_dim is not None:
            self.encoder_hid_proj = nn.Linear(config.encoder_hid_dim, config.context_dim)

        ch = widths[0]
        skips = [ch]  # channels of each skip
        self.down_blocks = nn.ModuleList()
        for level, (width, depths) in enumerate(zip(widths, config.down_transformers, strict=True)):
            resnets = [resnet(ch if i == 0 else width, width) for i in range(config.layers[level])]
            attentions = [transformer(level, depth, only_cross[level]) for depth in depths]
            ch = width
            skips += [ch] * len(resnets)
            downsampler = None
            if level != last:
                downsampler = Downsample(ch, config.downsample_padding)
                skips.append(ch)
            self.down_blocks.append(DownBlock(resnets, attentions, downsampler))

        self.mid_block: MiddleBlock | None = None
        if config.mid_block_type is not None:
            attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
            resnets = [resnet(ch, ch, residual_scale=config.mid_block_scale_factor) for _ in range(2 if attends else 1)]
            attentions = [transformer(last, config.middle_transformer, False)] if attends else []
            self.mid_block = MiddleBlock(resnets, attentions)

        self.up_blocks = nn.ModuleList()
        for level, depths in zip(range(last, -1, -1), config.up_transformers, strict=True):
            resnets = []
            for _ in range(config.layers[level] + 1):
                resnets.append(resnet(ch + skips.pop(), widths[level]))
                ch = widths[level]
            attentions = [transformer(level, depth, only_cross[level]) for depth in depths]
            self.up_blocks.append(UpBlock(resnets, attentions, Upsample(ch) if level else None))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, ch, config.norm_eps)
        self.conv_out = nn.Conv2d(ch, config.out_channels, config.conv_out_kernel, padding=config.conv_out_kernel // 2)

    @property
    def embedder(self) -> Embedder:
        """What the network takes beside x."""
        of_label: Callable[[Tensor], Tensor] | None = self.class_embedding
        if self.config.class_embed_type == "timestep" and self.class_embedding is not None:
            of_label = Encoded(self.time_proj, self.class_embedding)
        of_added: Added | None = None
        if self.add_embedding is not None:
            assert self.config.addition_time_embed_dim is not None
            encoding = SinusoidalEncoding(
                self.config.addition_time_embed_dim, self.config.flip_sin_to_cos, self.config.freq_shift
            )
            of_added = Added(encoding, self.add_embedding)
        return Embedder(
            dim=self.config.time_emb_dim,
            of_time=Encoded(self.time_proj, self.time_embedding, self.config.time_cond_proj_dim),
            of_label=of_label,
            context_dim=self.config.context_dim,
            text_dim=self.config.encoder_hid_dim or self.config.context_dim,
            of_text=self.encoder_hid_proj,
            pooled_dim=self.config.pooled_dim,
            of_added=of_added,
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        labels: Tensor | None = None,
        *,
        w: Tensor | None = None,
        added: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map x [B, C, H, W], t [B], prompts and labels to the prediction, [B, out_channels, H, W].

        Args:
            context: what the text encoders made of the prompts, [B, tokens, channels].
            labels: integers [B]. With class_embed_type identity: vectors [B, time_emb_dim], which are added to the
                time embedding. None adds nothing. A network without classes ignores them.
            w: guidance_scale − 1, [B], for a network with time_cond_proj_dim. None adds nothing.
            added: pooled texts [B, P] and sizes [B, 6], which a network with addition_embed_type needs.
        """
        self.check_size(x.shape[-2], x.shape[-1])
        embedder = self.embedder
        context = context if embedder.of_text is None else embedder.of_text(context)
        emb = embedder.of(t, labels, w)
        if embedder.of_added is not None:
            if added is None:
                raise ValueError("the network is told pooled texts and sizes, and is given none")
            emb = emb + embedder.of_added(*added)
        return self.denoise(x, emb, context)

    def denoise(self, x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Map x [B, C, H, W], its embeddings and its contexts to the prediction, [B, out_channels, H, W].

        Args:
            emb: the sum of the embeddings of timestep and condition, [B, time_emb_dim].
            context: [B, tokens, context_dim].
        """
        config = self.config
        if config.center_input_sample:
            x = 2 * x - 1
        if config.time_embedding_act_fn is not None:
            emb = ACTIVATIONS[config.time_embedding_act_fn](emb)
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            skips += block(h, emb, context)
            h = skips[-1]
        if self.mid_block is not None:
            h = self.mid_block(h, emb, context)
        for block in self.up_blocks:
            h = block(h, emb, skips, context)
        out: Tensor = self.conv_out(ACTIVATIONS[config.act_fn](self.conv_norm_out(h)))
        return out

    @property
    def factor(self) -> int:
        """Height and width must be multiples of this."""
        return 1

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError unless something is left of height and width at the lowest level."""
        levels = len(self.config.block_out_channels)
        least = 1 if self.config.downsample_padding else int(2 ** (levels - 1))
        if min(height, width) < least:
            raise ValueError(f"image size {height}x{width}: height and width must be at least {least}")
