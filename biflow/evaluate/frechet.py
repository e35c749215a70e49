"""Frechet distance between two sets of features."""

import torch
from torch import Tensor

from biflow.evaluate.features import check_features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared 2-Wasserstein distance between Gaussians fitted to two sets of features.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), mu and S being mean and unbiased covariance (Heusel et al.
    2017, arXiv 1706.08500, eq. 6). Computed in float64; the trace of the root comes from the eigenvalues of the
    symmetric S_a^(1/2) S_b S_a^(1/2), which has the spectrum of S_a S_b.

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
    mean_a, cov_a = _moments(a)
    mean_b, cov_b = _moments(b)
    root_a = _root(cov_a)
    product = root_a @ cov_b @ root_a
    spectrum = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * spectrum.sqrt().sum()
    return max(0.0, float(distance))


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    wide = features.detach().double()
    mean = wide.mean(0)
    centred = wide - mean
    return mean, centred.T @ centred / (wide.shape[0] - 1)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
