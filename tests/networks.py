"""Small networks with random weights, for tests."""

from torch import nn
import torch


def fill(network: nn.Module, seed: int = 0, gain: float = 1.0) -> nn.Module:
    """Give every parameter random values: none is 0 or 1, and signals keep their size from layer to layer."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * gain * fan_in**-0.5)
    return network.requires_grad_(False).eval()
