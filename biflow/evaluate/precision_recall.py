"""Precision and recall of samples in a space of features."""

import torch
from torch import Tensor

from biflow.evaluate.features import check_features

_ROWS = 512  # whose distances to all others are held at once


def precision_recall(real: Tensor, samples: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Precision: the share of samples on the manifold of the real data; recall: that of real data on the samples'.

    The manifold of a set is the union of balls around its points, each as large as the distance to the k-th nearest
    other point of the set (Kynkaanniemi et al. 2019, arXiv 1904.06991, section 2). Distances are Euclidean, float64.

    Args:
        real, samples: features (N, F) and (M, F), any floating dtype. Both numbers depend on N and M: compare only
            values of equal sizes.
        k: neighbours, at least 1.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        TypeError: not floating-point tensors.
        ValueError: not two matrices of equal F, NaN or infinite values, no more than k rows.
    """
    check_features(real=real, samples=samples)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k: expected an int of at least 1, got {k!r}")
    for name, features in (("real", real), ("samples", samples)):
        if len(features) <= k:
            raise ValueError(f"{name}: expected more than k = {k} rows, got {len(features)}")
    real, samples = real.detach().double(), samples.detach().double()
    return _share_covered(samples, real, k), _share_covered(real, samples, k)


def _share_covered(points: Tensor, by: Tensor, k: int) -> float:
    radius = torch.cat([_distances(part, by).kthvalue(k + 1, 1).values for part in by.split(_ROWS)])  # itself is first
    covered = [(_distances(part, by) <= radius).any(1) for part in points.split(_ROWS)]
    return float(torch.cat(covered).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
