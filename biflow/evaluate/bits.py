"""Bounds on the bits that a flow needs for quantised images."""

import math

from torch import Tensor

NAMES = ("", "_standard_error", "_importance_weighted", "_importance_weighted_standard_error")


def bounds(log_p: Tensor, dims: int, bin_width: float | None) -> dict[str, float | None]:
    """Upper bounds on mean_n -log2 P(x_n) / dims, P(x) the integral of the flow's density p over the bin of x.

    P(x) = w^dims E_u[p(x + w u)], u uniform in (-1/2, 1/2)^dims, w the bin width. From K draws of u each:

    "": mean_k -log2 p(x + w u_k) / dims - log2 w: uniform dequantisation (Theis et al. 2016, arXiv 1511.01844, 3.1).
    "_importance_weighted": -log2 mean_k p(x + w u_k) / dims - log2 w (Burda et al. 2016, arXiv 1509.00519, eq. 8; for
        dequantisation Ho et al. 2019, arXiv 1902.00275), in expectation an upper bound too. It is at most the first,
        image by image, equal with one draw, and falls to -log2 P / dims with many.
    "_standard_error", "_importance_weighted_standard_error": of the mean over images, std / sqrt(N); None of one image.

    Args:
        log_p: (K,N) float64, log p(x_n + w u_k) in nats. bin_width: w; None: no bins, all four are None.

    Raises:
        ValueError: another shape, or nothing in it.
    """
    if log_p.dim() != 2 or not log_p.numel():
        raise ValueError(f"log_p: expected a matrix (K,N) with values, got shape {tuple(log_p.shape)}")
    if bin_width is None:
        return dict.fromkeys(NAMES)
    found: list[float | None] = []
    for nats in (log_p.mean(0), log_p.logsumexp(0) - math.log(len(log_p))):
        bits = -nats / (dims * math.log(2)) - math.log2(bin_width)
        error = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else None
        found += [float(bits.mean()), error]
    return dict(zip(NAMES, found, strict=True))
