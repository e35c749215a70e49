"""Mean and covariance of features that come in batches, on one machine or several."""

from dataclasses import dataclass

import torch
from torch import Tensor

from biflow.evaluate.features import check_features

BLOCK = 1024  # rows that are centred and multiplied at once, whatever batches they came in


@dataclass(frozen=True)
class Moments:
    """What a Gaussian fitted to features (N,F) depends on.

    mean: (F,). covariance: (F,F), unbiased (divided by N - 1; zeros for one row). Both float64.
    count: N; None: unknown, as in the reference files of other projects.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    def __post_init__(self):
        size = self.mean.shape[0] if self.mean.dim() == 1 else 0
        if not size or self.covariance.shape != (size, size):
            raise ValueError(
                f"moments: expected a mean (F,) and a covariance (F,F), got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}"
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("moments: expected finite values, got NaN or infinite ones")

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features (N,F), N >= 1, any floating dtype. Errors as `check_features`."""
        check_features(features=features)
        wide = features.detach().double()
        mean = wide.mean(0)
        centred = wide - mean
        return cls(mean, centred.T @ centred / max(len(wide) - 1, 1), len(wide))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets of rows together, from their moments alone (Chan, Golub and LeVeque 1979, eq. 2.1).

        With d the difference of the means, (N - 1) S = (N_a - 1) S_a + (N_b - 1) S_b + N_a N_b / N d d^T: nothing
        large is subtracted. Any order of merging gives the same up to rounding. ValueError: a count is unknown, or
        the features are not as many.
        """
        if self.count is None or other.count is None:
            raise ValueError("moments: expected two with a count to merge, got one from a file without")
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments: expected {len(self.mean)} features to merge, got {len(other.mean)}")
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = (self.count - 1) * self.covariance + (other.count - 1) * other.covariance
        scatter = scatter + self.count * other.count / count * torch.outer(shift, shift)
        return Moments(self.mean + shift * (other.count / count), scatter / max(count - 1, 1), count)


class StreamingMoments:
    """Moments of rows that are added in batches; the same bits however they are divided into batches.

    Rows are held until there are BLOCK of them, whose moments are merged into those so far.
    """

    def __init__(self):
        self._waiting: list[Tensor] = []
        self._rows = 0
        self._merged: Moments | None = None

    def add(self, features: Tensor) -> None:
        """Rows (n,F), any floating dtype. Errors as `check_features`."""
        check_features(features=features)
        self._waiting.append(features.detach())
        self._rows += len(features)
        if self._rows >= BLOCK:
            blocks = torch.cat(self._waiting).split(BLOCK)
            full = self._rows // BLOCK
            for block in blocks[:full]:
                self._merged = self._with(block)
            self._waiting = [block.clone() for block in blocks[full:]]
            self._rows -= full * BLOCK

    def result(self) -> Moments:
        """Of all rows so far. ValueError: none."""
        if self._rows:
            return self._with(torch.cat(self._waiting))
        if self._merged is None:
            raise ValueError("moments: expected at least one row of features, got none")
        return self._merged

    def _with(self, block: Tensor) -> Moments:
        moments = Moments.of(block)
        return moments if self._merged is None else self._merged.merge(moments)
