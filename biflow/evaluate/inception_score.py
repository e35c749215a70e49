"""Inception Score: how sure a classifier is of each sample, and how many classes the samples have."""

import torch
from torch import Tensor

from biflow.evaluate.features import check_features

PART = 5000


def inception_score(logits: Tensor) -> tuple[float, float | None]:
    """exp(mean_n KL(p(c | x_n) || p(c))) with p(c) = mean_n p(c | x_n) (Salimans et al. 2016, arXiv 1606.03498, 4).

    Computed in float64 for each 5,000 rows in their order (the last part may be smaller), as ADM's evaluator does.
    Samples in the order of their classes give too low a score.

    Args:
        logits: (N,C), any floating dtype.

    Returns:
        Mean and (population) standard deviation over the parts; None with one part. In [1, C].

    Raises:
        TypeError: not a floating-point tensor. ValueError: another shape, NaN or infinite values, no rows.
    """
    check_features(logits=logits)
    if not len(logits):
        raise ValueError("logits: expected at least one row, got none")
    scores = []
    for part in logits.detach().split(PART):
        log_p = part.double().log_softmax(1)
        log_mean = log_p.logsumexp(0) - torch.tensor(len(part), dtype=torch.float64, device=part.device).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0)) if len(found) > 1 else None
