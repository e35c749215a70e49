"""One step of the fixed-point inverse in plain torch; formulas and shapes: biflow.ops.jacobi_update."""

from __future__ import annotations

import torch
from torch import Tensor

from biflow.reference.affine import affine_decode, affine_encode


def _full(raw: Tensor, shift_only: bool, options: dict) -> tuple[Tensor, dict]:
    """Parameters of both kinds and the affine op's options: a shift alone is exp(0) = 1 beside it."""
    if shift_only:
        raw, options = torch.cat([torch.zeros_like(raw), raw], -1), dict(options, layout="scale_shift", scale="exp")
    return raw, dict(options, causal=False)


def inverse(z: Tensor, raw: Tensor, *, shift_only: bool, **options) -> Tensor:
    """x = z sigma + b of every token from the raw parameters that belong to it."""
    raw, options = _full(raw, shift_only, options)
    return affine_decode(z, raw, **options)


def jacobi_update_(
    x: Tensor,
    z: Tensor,
    raw: Tensor,
    moved: Tensor,
    *,
    start: int,
    stop: int,
    shift_only: bool = False,
    layout: str = "scale_shift",
    scale: str = "exp",
    clip: tuple[str, float] | None = None,
    clip_on: str = "both",
    flip: bool = False,
) -> None:
    tokens = x.shape[1]
    window = slice(tokens - stop, tokens - start) if flip else slice(start, stop)
    old, z, raw = x[:, window].clone(), z[:, window], raw[:, window]
    options = dict(layout=layout, scale=scale, clip=clip, clip_on=clip_on)
    new = inverse(z, raw, shift_only=shift_only, **options)
    params, options = _full(raw, shift_only, options)
    back, _ = affine_encode(old, params, **options)

    def largest(difference: Tensor, value: Tensor) -> Tensor:
        ratio = difference.abs() / value.abs().clamp(min=1)
        return ratio.flatten(1).amax(1) if ratio.numel() else ratio.new_zeros(ratio.shape[0])

    finite = (new.isfinite() & back.isfinite()).all(2).all(1)
    both = torch.stack([largest(new - old, new), largest(back - z, z)])
    moved.copy_(torch.where(finite, both, float("nan")))
    x[:, window] = new
