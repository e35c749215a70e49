"""The gradient of an inverse without differentiating the iteration or the steps that found it."""

from collections.abc import Callable

import torch
from torch import Tensor


def solve_adjoint(transposed: Callable[[Tensor], Tensor], grad: Tensor, limit: int, eps: float | None = None) -> Tensor:
    """v with v = grad + J^T v: what turns a gradient with respect to x = g(x, u) into one with respect to g's output.

    v = (I - J^T)^-1 grad by its Neumann series, the implicit function theorem at a fixed point (Bai et al. 2019, arXiv
    1909.01377, theorem 1). In a block of a flow token t of g depends on the tokens before t only: J is strictly
    triangular, and after as many terms as there are tokens less one the series is exact. It ends earlier when the last
    term is below the rounding of the sum in every sample: |last| <= eps |sum|, both as largest entries.

    Args:
        transposed: v -> J^T v, J = dg/dx (B,T,D) x (B,T,D), sample by sample.
        grad: (B,T,D), any float dtype.
        limit: terms after the first, at most; T - 1 is exact.
        eps: the rounding of what `transposed` computes, where that is coarser than grad's; None: that of grad's dtype.

    Returns:
        v (B,T,D). Not finite where terms overflow.
    """
    total = term = grad
    eps = torch.finfo(grad.dtype).eps if eps is None else eps
    for _ in range(limit):
        term = transposed(term)
        total = total + term
        size, bound = (t.abs().flatten(1).amax(1) for t in (term, total))
        if bool((size <= eps * bound).all()):
            break
    return total
