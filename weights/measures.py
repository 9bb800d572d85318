"""How like real images drawn ones are: distances between sets of points, features or pixels. Pure functions."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]

NEIGHBOURS = 5


def frechet_distance(a: Float64, b: Float64) -> float:
    """The Fréchet distance between Gaussians fitted to points a [N, D] and b [M, D].

    |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2·(Σ_a Σ_b)^½), Heusel et al. 2017, arXiv:1706.08500, eq. 6. The product under the
    root has the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric.
    """
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    of_product = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(of_product).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def coverage(real: Float64, drawn: Float64) -> float:
    """The share of real points [N, D] that have a drawn one [M, D] no farther than their 5th real neighbour.

    Naeem et al. 2020, arXiv:2002.09797, eq. 6.
    """
    among_real = _distances(real, real)
    among_real.fill_diagonal_(torch.inf)
    reach = among_real.kthvalue(NEIGHBOURS, dim=1).values
    return float((_distances(real, drawn).amin(dim=1) <= reach).double().mean())


def nearest(points: Float64, known: Float64) -> Float64:
    """The distance of each point [N, D] to the nearest known one [M, D], [N]."""
    found: Float64 = _distances(points, known).amin(dim=1).numpy()
    return found


def _distances(a: Float64, b: Float64) -> Tensor:
    return torch.cdist(torch.from_numpy(a), torch.from_numpy(b))
