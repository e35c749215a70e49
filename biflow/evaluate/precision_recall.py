"""Precision and recall of samples in a space of features."""

import torch
from torch import Tensor

from biflow.evaluate.features import check_features

TILE = 4096  # rows of either set whose distances are held at once
COINCIDE = 1e-12  # squared distance, over that of the points to 0, that is rounding: fp32 features are coarser


def precision_recall(real: Tensor, samples: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Precision: the share of samples on the manifold of the real data; recall: that of real data on the samples'.

    The manifold of a set is the union of balls around its points, each as large as the distance to the k-th nearest
    other point of the set (Kynkaanniemi et al. 2019, arXiv 1904.06991, section 2). Distances are Euclidean, from matrix
    products in float64, in tiles: memory grows with N + M. Points closer than 1e-6 of their length coincide.

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
    radius = torch.cat([_kth_nearest(part, by, k + 1) for part in by.split(TILE)])  # itself is the first
    covered = points.new_zeros(len(points), dtype=torch.bool)
    for inside, part in zip(covered.split(TILE), points.split(TILE), strict=True):
        for centres, reach in zip(by.split(TILE), radius.split(TILE), strict=True):
            inside |= (_squares(part, centres) <= reach).any(1)
    return float(covered.double().mean())


def _kth_nearest(part: Tensor, by: Tensor, k: int) -> Tensor:
    """Squared distances (n,) of points to the k-th nearest of `by`."""
    nearest = part.new_empty(len(part), 0)
    for centres in by.split(TILE):
        found = torch.cat([nearest, _squares(part, centres)], 1)
        nearest = found.topk(min(k, found.shape[1]), largest=False).values
    return nearest.amax(1)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (n,m)."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = torch.addmm(lengths, a, b.T, alpha=-2)
    return squares.masked_fill_(squares <= COINCIDE * lengths, 0.0)
