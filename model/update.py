"""The one update of every sampler, vectorised over rows that may differ in everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.samplers import Column


def guided(predictions: Sequence[Tensor], scale: Tensor) -> Tensor:
    """Classifier-free guidance.

    With two predictions: Ho & Salimans 2022, arXiv:2207.12598, eq. 6 with w + 1 = `scale`. More predictions go on in
    the same way: Brooks et al. 2023, arXiv:2211.09800, eq. 3, with one scale for all differences.

    Args:
        predictions: [B, C, H, W] each: the rows' own first, the unconditional ones last.
        scale: [B].
    """
    *others, guided = predictions
    for prediction, next_prediction in zip(others, predictions[1:], strict=True):
        guided = guided + scale.view(-1, 1, 1, 1) * (prediction - next_prediction)
    return guided


def update(
    x: Tensor, out: Tensor, x0_previous: Tensor, noise: Tensor, lines: Tensor, thresholded: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Take one step of each row.

    Args:
        x, x0_previous, noise: float32 [B, C, H, W]: the images, the estimates of x_0 at the previous step, and unit
            noise. All must be finite, even where a coefficient is 0.
        out: the network's predictions, likewise; or float32 [B, 2·C, H, W] with v of a learned variance after them.
        lines: each row's line of its step table, float32 [B, len(Column)].
        thresholded: the rows with dynamic thresholding, whose QUANTILE is not 0. Reading them from a device would
            wait for the device.

    Returns:
        The images at the next timestep, and the estimates of x_0: float32 [B, C, H, W] each.
    """
    p, q, a, b, c, d, e, s, bound, *_ = lines.view(len(lines), len(Column), 1, 1, 1).unbind(1)
    out, *v = torch.split(out, x.shape[1], dim=1)
    if v:
        d = d * torch.exp(s * v[0])
    x0 = p * x + q * out
    if thresholded:
        rows = list(x0.unbind())
        for row in thresholded:
            rows[row] = _thresholded(rows[row], lines.select(0, row))
        x0 = torch.stack(rows)
    x0 = x0.clamp(-bound, bound)
    return a * x + b * x0 + c * x0_previous + d * noise + e * out, x0


def _thresholded(x0: Tensor, line: Tensor) -> Tensor:
    """Dynamic thresholding of one row: clip at a quantile of |x0|, and scale the quantile to 1."""
    s = torch.quantile(x0.abs(), line.select(0, Column.QUANTILE))
    s = torch.minimum(s.clamp(min=1.0), line.select(0, Column.MAXIMUM))
    return x0.clamp(-s, s) / s
