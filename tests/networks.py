"""Random weights for small networks in tests."""

import torch
from torch import nn


def fill(network: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Give every parameter random values, none of them 0 or 1. Activations keep their scale from layer to layer."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * gain / fan_in**0.5)
    network.requires_grad_(False).eval()
