"""Stepwise: diffusion U-Nets over HTTP."""

__version__ = "0.1.0"
