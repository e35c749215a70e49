"""How good the scores of `TarFlow.classify` are: accuracy, and whether the probabilities mean what they say."""

import math

import torch
from torch import Tensor

from biflow.models.classify import RULES

BINS = 15
TEMPERATURES = (1e-4, 1e6)  # where `fit_temperature` looks


def log_posterior(scores: Tensor, rule: str) -> Tensor:
    """log p(k | x) (N,K) of equally likely classes from the scores (N,K) of `TarFlow.classify` by `rule`.

    "bayes": the log-softmax of log p(x | k). "gradient": that of K g, the log-likelihood ratios to first order.
    ValueError: another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    _check(scores)
    return (scores.double() * (scores.shape[1] if rule == "gradient" else 1)).log_softmax(1)


def negative_log_likelihood(logits: Tensor, y: Tensor) -> float:
    """Mean of -log softmax(logits)_y over (N,K) logits and labels (N,) int64, in nats."""
    _check(logits, y)
    return float(-logits.double().log_softmax(1).gather(1, y[:, None]).mean())


def calibration_error(logits: Tensor, y: Tensor, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv 1706.04599, eq. 3): sum over bins of share |accuracy - mean
    confidence|.

    Confidence is the largest of softmax(logits); the bins are `bins` equally wide ones, (i / bins, (i + 1) / bins].

    Args:
        logits: (N,K), N >= 1. y: labels (N,) int64. bins: at least 1.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, labels out of range, values that are not finite.
    """
    _check(logits, y)
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    confidence, label = logits.double().softmax(1).max(1)
    edges = torch.arange(1, bins, dtype=torch.float64) / bins
    index = torch.bucketize(confidence, edges)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, (label == y).double() - confidence)
    return float(gap.abs().sum() / len(y))


def fit_temperature(logits: Tensor, y: Tensor) -> float:
    """The T in [1e-4, 1e6] for which softmax(logits / T) has the least `negative_log_likelihood`.

    Temperature scaling: arXiv 1706.04599, section 4.2. The likelihood is convex in 1 / T, so bisection of its
    derivative, in log T, finds it. Fitted on the data that it is judged by it flatters: see
    `describe_classification`. Arguments and errors as `calibration_error`.
    """
    _check(logits, y)
    wide = logits.double()
    right = wide.gather(1, y[:, None])[:, 0]

    def slope(log_t: float) -> float:
        """Of the mean NLL in 1 / T."""
        return float(((wide * (wide / math.exp(log_t)).softmax(1)).sum(1) - right).mean())

    low, high = (math.log(t) for t in TEMPERATURES)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def describe_classification(scores: Tensor, y: Tensor, rule: str, top_k: int = 5) -> dict:
    """Numbers of the scores (N,K) of images with labels y (N,), N >= 2, by `TarFlow.classify(rule=)`.

    accuracy, top_k_accuracy: share of the images whose label has the best score, one of the best top_k (k as said; at
        most K).
    nll, ece: `negative_log_likelihood` and `calibration_error` (15 bins) of `log_posterior`; nll_uniform = log K.
    temperature: `fit_temperature` of the images of even and of odd index.
    tempered_nll, tempered_ece: the same when each half is divided by the temperature of the other: no image is judged
        by a temperature that it helped to fit.
    """
    logits = log_posterior(scores, rule)
    _check(logits, y)
    if len(y) < 2:
        raise ValueError(f"y: expected at least 2 labels, one a half, got {len(y)}")
    top_k = min(top_k, scores.shape[1])
    odd = torch.arange(len(y)) % 2
    temperatures = [fit_temperature(logits[odd == half], y[odd == half]) for half in (0, 1)]
    tempered = logits / torch.tensor(temperatures[::-1], dtype=torch.float64)[odd, None]
    return {
        "count": len(y),
        "accuracy": float((scores.argmax(1) == y).double().mean()),
        f"top_{top_k}_accuracy": float((scores.topk(top_k).indices == y[:, None]).any(1).double().mean()),
        "nll": negative_log_likelihood(logits, y),
        "nll_uniform": math.log(scores.shape[1]),
        "ece": calibration_error(logits, y),
        "temperature": temperatures,
        "tempered_nll": negative_log_likelihood(tempered, y),
        "tempered_ece": calibration_error(tempered, y),
    }


def _check(logits: Tensor, y: Tensor | None = None) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"scores: expected a floating-point tensor, got {got}")
    if logits.dim() != 2 or 0 in logits.shape:
        raise ValueError(f"scores: expected shape (N,K), neither 0, got {tuple(logits.shape)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("scores: expected finite values, got NaN or infinite ones")
    if y is None:
        return
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y: expected an int64 tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.shape != logits.shape[:1]:
        raise ValueError(f"y: expected shape ({len(logits)},), got {tuple(y.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise ValueError(
            f"y: expected labels in [0, {logits.shape[1]}), got values in [{int(y.min())}, {int(y.max())}]"
        )
