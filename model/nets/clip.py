"""CLIPText: the text encoder of Stable Diffusion, transformers' CLIPTextModel.

A transformer over the tokens of a prompt, each of which sees those before it. Radford et al. 2021, arXiv:2103.00020.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=16384)]


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
    hidden_act: Literal["quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"] = "quick_gelu"
    layer_norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which does not divide hidden_size "
                f"{self.hidden_size}"
            )
        return self
