"""The one update of every sampler, vectorised over rows that may differ in everything."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.lines import Column


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


def rescaled(out: Tensor, own: Tensor, factor: Tensor) -> Tensor:
    """Guided predictions with the standard deviation of the rows' own ones, in part.

    Lin et al. 2023, arXiv:2305.08891, section 3.4.

    Args:
        out, own: [B, C, H, W].
        factor: φ of each row, [B].
    """
    # Row by row: a sum over one row has the same bits in any batch.
    deviations = [torch.stack([row.std() for row in images.unbind()]) for images in (own, out)]
    own_deviation, deviation = (each.view(-1, 1, 1, 1) for each in deviations)
    factor = factor.view(-1, 1, 1, 1)
    return factor * (out * (own_deviation / deviation)) + (1 - factor) * out


def update(
    x: Tensor, out: Tensor, memories: Sequence[Tensor], noise: Tensor, lines: Tensor, thresholded: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Take one line of each row.

    Args:
        x, noise: float32 [B, C, H, W]: the images, and unit noise. All tensors must be finite, even where a coefficient
            is 0.
        out: the network's predictions, likewise; or float32 [B, 2·C, H, W] with v of a learned variance after them.
        memories: m_1, m_2 and m_3 of each row, as many as the lines read, float32 [B, C, H, W] each.
        lines: each row's line of its step table, float32 [B, len(Column)].
        thresholded: the rows with dynamic thresholding, whose QUANTILE is not 0. Reading them from a device would
            wait for the device.

    Returns:
        The images after the line, and the estimates of x_0: float32 [B, C, H, W] each.
    """
    p, q, a, b, d, e, s, bound, *c = _columns(lines, Column.P, Column.BOUND + len(memories))
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
    x_next = a * x + b * x0
    for factor, memory in zip(c, memories, strict=True):
        x_next = x_next + factor * memory
    return x_next + d * noise + e * out, x0


def blended(x: Tensor, kept: Tensor, levels: Tensor) -> Tensor:
    """Give back to images what their masks keep, at the noise level of x: [B, C, H, W].

    Args:
        x: after a line, [B, C, H, W].
        kept: the masks, 1 where x stays and else 0; the latents of the images; and their noise: [B, 3, C, H, W].
        levels: √ᾱ and √(1−ᾱ) of x, [B, 2].
    """
    mask, image, noise = kept.unbind(1)
    signal, deviation = levels.view(-1, 2, 1, 1, 1).unbind(1)
    return torch.where(mask > 0, x, signal * image + deviation * noise)


def remembered(x: Tensor, x0: Tensor, out: Tensor, lines: Tensor) -> Tensor:
    """What lines leave as memories, float32 [B, C, H, W]. The arguments are those and the results of `update`."""
    of_x, of_x0, of_out = _columns(lines, Column.R_X, Column.R_E)
    return of_x * x + of_x0 * x0 + of_out * out.narrow(1, 0, x.shape[1])


def _columns(lines: Tensor, first: int, last: int) -> tuple[Tensor, ...]:
    """Columns of lines, [B, 1, 1, 1] each."""
    number = last - first + 1
    return lines.narrow(1, first, number).reshape(len(lines), number, 1, 1, 1).unbind(1)


def _thresholded(x0: Tensor, line: Tensor) -> Tensor:
    """Dynamic thresholding of one row: clip at a quantile of |x0|, and scale the quantile to 1."""
    s = torch.quantile(x0.abs(), line.select(0, Column.QUANTILE))
    s = torch.minimum(s.clamp(min=1.0), line.select(0, Column.MAXIMUM))
    return x0.clamp(-s, s) / s
