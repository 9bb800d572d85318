"""Every U-Net here, as one type."""

from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D
from model.nets.unet_condition import UNet2DCondition

UNet = DiffusionUNet | UNet2D | UNet2DCondition
