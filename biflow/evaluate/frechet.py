"""Frechet distance between Gaussians, and between two sets of features."""

import torch
from torch import Tensor

from biflow.evaluate.features import check_features
from biflow.evaluate.moments import Moments


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """`gaussian_distance` between Gaussians fitted to two sets of features.

    Args:
        a, b: features (N_a, F) and (N_b, F), any floating dtype.

    Returns:
        The distance, in squared units of the features, >= 0. It is biased upwards by few samples (in the order of
        tr(S) / N): compare only values of equal N.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: not two matrices of equal F, NaN or infinite values, or fewer than F + 1 rows (a singular
            covariance).
    """
    check_features(a=a, b=b)
    for name, features in (("a", a), ("b", b)):
        if features.shape[0] < features.shape[1] + 1:
            raise ValueError(
                f"{name}: expected at least {features.shape[1] + 1} samples for {features.shape[1]} features, "
                f"got {features.shape[0]}"
            )
    return gaussian_distance(Moments.of(a), Moments.of(b))


def gaussian_distance(a: Moments, b: Moments) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, also of singular ones.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6), in float64. With
    S = R R^T the product S_a S_b has, but for zeros, the spectrum of M M^T, M = R_a^T R_b: the trace of its root is the
    sum of M's singular values, which keeps the digits that a root of rounded eigenvalues near 0 would lose. Eigenvalues
    of a covariance below its rounding error, F eps times the largest, are taken for 0.

    ValueError: not as many features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments: expected {len(a.mean)} features in both, got {len(b.mean)}")
    overlap = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def _factor(covariance: Tensor) -> Tensor:
    """R (F,r) with R R^T = S, r the rank of S."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    known = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, known] * values[known].sqrt()
