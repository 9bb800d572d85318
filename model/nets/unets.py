"""Every U-Net here, as one type."""

from model.nets.unet import DiffusionUNet
from model.nets.unet2d import UNet2D

UNet = DiffusionUNet | UNet2D
