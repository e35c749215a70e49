"""No speed of a wrong result: what a contestant computes, held against a reference before it is timed."""

import torch
from torch import Tensor

# largest ||got - want|| / ||want||, by the dtype of what was computed: a few roundings, far from what a defect does
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}


class WrongResult(Exception):
    """A result that is off by more than rounding: its time would mean nothing."""


def error(got: object, want: object, bound: float | None = None) -> float:
    """The largest relative error of the tensors `got`, one or a tuple; WrongResult if it exceeds the bound, or is NaN.

    want: as many, or more where a contestant computes only the first of them. bound: None: BOUNDS.
    """
    got, want = (x if isinstance(x, tuple | list) else (x,) for x in (got, want))
    if not 0 < len(got) <= len(want):
        raise WrongResult(f"expected up to {len(want)} results, got {len(got)}: not timed")
    return max(_error(i, g, w, bound or BOUNDS[g.dtype]) for i, (g, w) in enumerate(zip(got, want, strict=False)))


def _error(index: int, got: Tensor, want: Tensor, bound: float) -> float:
    if got.shape != want.shape:
        raise WrongResult(f"expected result {index} of shape {tuple(want.shape)}, got {tuple(got.shape)}: not timed")
    wide = want.double()
    off = ((got.double() - wide).norm() / wide.norm()).item()
    if not off <= bound:
        raise WrongResult(f"expected result {index} within {bound:g} of the reference, got {off:.3g}: not timed")
    return off
