"""The config of a text-to-image model: a U-Net of latents that attends to a prompt, its text encoders and its VAE."""

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import nn

from model.checkpoints.config import ModelConfig
from model.description import ModelDescription
from model.nets.clip import CLIPTextConfig, CLIPTextWithProjectionConfig
from model.nets.unet_condition import UNet2DCondition
from model.nets.unet_condition_config import SIZES, UNet2DConditionConfig
from model.nets.unets import UNet


class TextToImageConfig(ModelConfig):
    """model.nets.unet_condition.UNet2DCondition. With a second text encoder, the network is one of SDXL's."""

    architecture: Literal["unet_2d_condition"] = "unet_2d_condition"
    network: UNet2DConditionConfig
    text: CLIPTextConfig = Field(description="the text encoder")
    text_2: CLIPTextWithProjectionConfig | None = Field(None, description="the second text encoder")
    force_zeros_for_empty_prompt: bool = Field(False, description="whether no negative prompt means zeros")

    @property
    def texts(self) -> tuple[CLIPTextConfig, ...]:
        """The text encoders: one or two."""
        return (self.text,) if self.text_2 is None else (self.text, self.text_2)

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        field = "cross_attention_dim" if self.network.encoder_hid_dim is None else "encoder_hid_dim"
        channels = self.network.encoder_hid_dim or self.network.context_dim
        widths = [text.hidden_size for text in self.texts]
        if channels != sum(widths):
            whose = "the text encoder's hidden_size"
            if len(widths) > 1:
                whose = f"the sum of both text encoders' hidden_size, {' + '.join(map(str, widths))}"
            raise ValueError(f"{field} is {channels}, and must be {sum(widths)}, {whose}")
        return self

    @model_validator(mode="after")
    def _check_addition(self) -> Self:
        network = self.network
        if self.text_2 is None:
            if network.addition_embed_type is not None:
                raise ValueError(
                    f"addition_embed_type is {network.addition_embed_type}, and must be null in a pipeline with one "
                    "text encoder: it belongs to SDXL's, which have two"
                )
            return self
        if network.addition_embed_type is None:
            raise ValueError("addition_embed_type is null, and must be text_time in a pipeline of SDXL")
        each, pooled = network.addition_time_embed_dim or 0, self.text_2.projection_dim
        if network.pooled_dim != pooled:
            raise ValueError(
                f"projection_class_embeddings_input_dim is {network.projection_class_embeddings_input_dim}, and must "
                f"be {SIZES * each + pooled}: {SIZES} times addition_time_embed_dim, which is {each}, and "
                f"text_encoder_2's projection_dim, {pooled}"
            )
        return self

    @property
    def channels(self) -> int:
        return self.network.in_channels // 2 if self.inpaints else self.network.in_channels

    @property
    def inpaints(self) -> bool:
        """Whether the network takes a mask and the latents of the masked image beside x."""
        return self.autoencoder is not None and self.network.in_channels == 2 * self.autoencoder.channels + 1

    @property
    def out_channels(self) -> int:
        return self.network.out_channels

    def build(self) -> UNet2DCondition:
        network = UNet2DCondition(self.network)
        network.check_size(*self.sample_shape[1:])
        return network

    def describe(self, network: UNet, autoencoder: nn.Module | None, digest: str, folder_name: str) -> ModelDescription:
        return replace(
            super().describe(network, autoencoder, digest, folder_name),
            embeds_sizes=self.text_2 is not None,
            embeds_guidance=self.network.time_cond_proj_dim is not None,
            inpaints=self.inpaints,
        )
