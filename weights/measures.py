"""Similarity of drawn and real images: distances between points, which are features or pixels. Pure functions."""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bool = NDArray[np.bool_]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]

NEIGHBOURS = 5


def frechet_distance(a: Float64, b: Float64) -> float:
    """The Fréchet distance between Gaussians fitted to points a [N, D] and b [M, D].

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½), Heusel et al. 2017, arXiv:1706.08500, eq. 6. Σ_a Σ_b has the same
    eigenvalues as Σ_a^½ Σ_b Σ_a^½, which is symmetric.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    of_product = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(of_product).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def covered(real: Float64, drawn: Float64) -> Bool:
    """Whether each real point [N, D] has a drawn point [M, D] no farther than its 5th real neighbour, [N].

    The share of such points is the coverage: Naeem et al. 2020, arXiv:2002.09797, eq. 6.
    """
    among_real = _distances(real, real)
    among_real.fill_diagonal_(torch.inf)
    reach = among_real.kthvalue(NEIGHBOURS, dim=1).values
    found: Bool = (_distances(real, drawn).amin(dim=1) <= reach).numpy()
    return found


class Nearest(NamedTuple):
    """Distance and index of the nearest points, [N] each."""

    distance: Float64
    which: NDArray[np.int64]


def nearest(points: Float64, known: Float64) -> Nearest:
    """For each point [N, D], the nearest known point of [M, D]."""
    return Nearest(*(values.numpy() for values in _distances(points, known).min(dim=1)))


def levels_apart(a: UInt8, b: UInt8) -> float:
    """The mean absolute difference of 8-bit pixels."""
    return float(np.abs(a.astype(np.float64) - b).mean())


def psnr(a: UInt8, b: UInt8) -> float:
    """The peak signal-to-noise ratio of 8-bit pixels, in decibels."""
    squared = float(((a.astype(np.float64) - b) ** 2).mean())
    return math.inf if squared == 0 else 10 * math.log10(255**2 / squared)


def _distances(a: Float64, b: Float64) -> Tensor:
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b))
