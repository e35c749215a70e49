"""Checks of sets of features that are compared."""

import torch
from torch import Tensor


def check_features(**sets: Tensor) -> None:
    """Each a matrix (N, F) of finite numbers in a floating dtype, all of the F that the first one has.

    Raises:
        TypeError: not a floating-point tensor. ValueError: another shape, NaN or infinite values.
    """
    for name, features in sets.items():
        if not isinstance(features, Tensor) or not features.is_floating_point():
            kind = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
        if features.dim() != 2:
            raise ValueError(f"{name}: expected features (N, F), got shape {tuple(features.shape)}")
    (first, wanted), *rest = ((name, features.shape[1]) for name, features in sets.items())
    for name, count in rest:
        if count != wanted:
            raise ValueError(f"{name}: expected {wanted} features as in {first}, got {count}")
    for name, features in sets.items():
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{name}: expected finite features, got NaN or infinite values")
