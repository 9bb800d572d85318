"""The config of a text-to-image model: a U-Net of latents that attends to a prompt, its text encoder and its VAE."""

from typing import Literal, Self

from pydantic import Field, model_validator

from model.checkpoints.config import ModelConfig
from model.nets.clip import CLIPTextConfig
from model.nets.unet_condition import UNet2DCondition
from model.nets.unet_condition_config import UNet2DConditionConfig


class TextToImageConfig(ModelConfig):
    """model.nets.unet_condition.UNet2DCondition."""

    architecture: Literal["unet_2d_condition"] = "unet_2d_condition"
    network: UNet2DConditionConfig
    text: CLIPTextConfig = Field(description="the text encoder")

    @model_validator(mode="after")
    def _check_context(self) -> Self:
        field = "cross_attention_dim" if self.network.encoder_hid_dim is None else "encoder_hid_dim"
        channels = self.network.encoder_hid_dim or self.network.context_dim
        if channels != self.text.hidden_size:
            raise ValueError(f"{field} is {channels}, and the text encoder's hidden_size {self.text.hidden_size}")
        return self

    @property
    def channels(self) -> int:
        return self.network.in_channels

    @property
    def out_channels(self) -> int:
        return self.network.out_channels

    def build(self) -> UNet2DCondition:
        network = UNet2DCondition(self.network)
        network.check_size(*self.sample_shape[1:])
        return network
