"""CLIPText: the text encoder of Stable Diffusion, transformers' CLIPTextModel; and SDXL's second, with a projection.

A transformer over the tokens of a prompt, each of which sees those before it. Radford et al. 2021, arXiv:2103.00020.
On torch the bits are those of transformers. State-dict keys are those of transformers since version 5.6.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

Count = Annotated[int, Field(ge=1, le=16384)]
Activation = Literal["quick_gelu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish"]


class CLIPTextConfig(BaseModel):
    """The arguments and defaults of transformers' CLIPTextConfig that decide what CLIPTextModel computes.

    Raises:
        ValidationError: if the network cannot be built. The limits keep the network small enough to build on `meta`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    vocab_size: int = Field(49408, ge=1, le=1_000_000)
    hidden_size: Count = 512
    intermediate_size: Annotated[int, Field(ge=1, le=65536)] = 2048
    num_hidden_layers: int = Field(12, ge=1, le=256)
    num_attention_heads: Count = 8
    max_position_embeddings: int = Field(77, ge=1, le=4096)
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size "
                f"{self.hidden_size}"
            )
        return self


class CLIPTextWithProjectionConfig(CLIPTextConfig):
    """The same of CLIPTextModelWithProjection."""

    projection_dim: Count = 512  # channels of the pooled text
    eos_token_id: int = Field(49407, ge=-(2**31), lt=2**31)  # see Pooler


class CLIPText(nn.Module):
    """Maps tokens to hidden states, and to one vector if the config has a projection."""

    outside = "final_layer_norm", "text_projection"  # see model.nets.precision

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        if isinstance(config, CLIPTextWithProjectionConfig):
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids: Tensor, clip_skip: int = 0) -> Tensor:
        """Map tokens, integers [B, N], to contexts [B, N, hidden_size].

        Args:
            clip_skip: how many of the last layers are left out, less than num_hidden_layers.
        """
        states = self.encoder(self.embeddings(ids))
        out: Tensor = self.final_layer_norm(states[:, -1 - clip_skip])
        return out

    @property
    def pooler(self) -> "Pooler | None":
        """Makes one vector of a text; None without a projection."""
        if not isinstance(self.config, CLIPTextWithProjectionConfig):
            return None
        return Pooler(self.final_layer_norm, self.text_projection, self.config.eos_token_id)


@dataclass(frozen=True, slots=True)
class Pooler:
    """The last layer's output at the end of a text → one vector. Holds no other part of a network.

    Attributes:
        final_norm: of CLIPText.
        projection: of the vector.
        eos_token_id: the token of the end. Where it is 2, the end is the first place of the largest token: older
            configs say 2, whatever the token is. A text without the token is pooled at its first place.
    """

    final_norm: nn.Module
    projection: nn.Module
    eos_token_id: int

    def __call__(self, state: Tensor, ids: Tensor) -> Tensor:
        """Map the last layer's output [B, N, hidden_size] and tokens [B, N] to pooled texts [B, projection_dim]."""
        ids = ids.to(torch.int)
        at = ids.argmax(dim=-1) if self.eos_token_id == 2 else (ids == self.eos_token_id).int().argmax(dim=-1)
        normal = self.final_norm(state)
        out: Tensor = self.projection(normal[torch.arange(len(ids)), at])
        return out


class Embeddings(nn.Module):
    """Tokens [B, N] → the sum of the embeddings of token and position, [B, N, hidden_size], in float32.

    The parameters may stay in half precision, because what is looked up is little.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.token_embedding(ids).float() + self.position_embedding.weight[: ids.shape[1]].float()
        return out


class Encoder(nn.Module):
    """Embedded tokens [B, N, hidden_size] → the output of each layer, [B, num_hidden_layers, N, hidden_size]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return torch.stack(states, dim=1)


class Layer(nn.Module):
    """Attention of tokens to those before them, then a feed-forward network, each with its norm."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = CausalAttention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.self_attn(self.layer_norm1(h))
        out: Tensor = h + self.mlp(self.layer_norm2(h))
        return out


class CausalAttention(nn.Module):
    """Attention of tokens [B, N, C] to themselves and to those before them."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = channels // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (self._by_head(proj(h)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        out: Tensor = self.out_proj(mixed.reshape(h.shape))
        return out

    def _by_head(self, h: Tensor) -> Tensor:
        """[B, N, C] → [B, heads, N, head_dim]."""
        return h.reshape(h.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(h)))
        return out


# Three approximations of GELU that torch does not have. Each formula has the operations and the order of transformers'.


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _gelu_fast(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "quick_gelu": _quick_gelu,
    "gelu": F.gelu,
    "gelu_new": _gelu_new,
    "gelu_fast": _gelu_fast,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}
