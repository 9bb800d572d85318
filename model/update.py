"""The one update of every sampler, vectorised over rows that may differ in everything."""

import torch
from torch import Tensor

from model.samplers import Column


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598, eq. 6 with w + 1 = `scale` [B]."""
    return unconditional + scale[:, None, None, None] * (conditional - unconditional)


def update(x: Tensor, out: Tensor, x0_previous: Tensor, noise: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of each row.

    Args:
        x, x0_previous, noise: float32 [B, C, H, W]: the images, the estimates of x_0 at the step before, and unit
            noise. Where a coefficient is 0 they must still be finite.
        out: the network's predictions, likewise; or float32 [B, 2·C, H, W] with v of a learned variance behind them.
        lines: each row's line of its step table, float32 [B, len(Column)].

    Returns:
        The images at the next timestep, and the estimates of x_0: float32 [B, C, H, W] each.
    """
    p, q, a, b, c, d, e, s, bound = (lines[:, column, None, None, None] for column in range(Column.QUANTILE))
    channels = x.shape[1]
    if out.shape[1] > channels:
        out, v = out[:, :channels], out[:, channels:]
        d = d * torch.exp(s * v)
    x0 = _thresholded(p * x + q * out, lines)
    x0 = x0.clamp(-bound, bound)
    return a * x + b * x0 + c * x0_previous + d * noise + e * out, x0


def _thresholded(x0: Tensor, lines: Tensor) -> Tensor:
    """Dynamic thresholding of the rows that ask for it: clip at a quantile of |x0|, and scale that to 1."""
    rows = lines[:, Column.QUANTILE].nonzero()[:, 0]
    if not len(rows):
        return x0
    x0 = x0.clone()
    for row in rows:
        s = torch.quantile(x0[row].abs(), lines[row, Column.QUANTILE])
        s = torch.minimum(s.clamp(min=1.0), lines[row, Column.MAXIMUM])
        x0[row] = x0[row].clamp(-s, s) / s
    return x0
