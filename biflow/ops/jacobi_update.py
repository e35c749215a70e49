"""K4: one step of the fixed-point inverse on a window of tokens, in place."""

from __future__ import annotations

import torch
from torch import Tensor

from biflow import _library  # noqa: F401
from biflow.ops._arrays import takes_arrays
from biflow.ops._checks import (
    CLIP_ON,
    LAYOUTS,
    SCALES,
    check_beside,
    check_buffer,
    check_choice,
    check_clip,
    check_flag,
    check_float32,
    check_shape,
    check_window,
)


@takes_arrays
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
    """x = z sigma(clip a) + clip b for the tokens start <= n < stop in block order, from raw parameters, in place.

    With G(x) = (x - b) / sigma of the x before the step, moved becomes, per sample, over the window's tokens and
    channels: row 0 max |x_new - x| / max(1, |x_new|), row 1 max |G(x) - z| / max(1, |z|). Both are NaN where an element
    of x_new or of G(x) is NaN or infinite, in that sample alone. A fixed point has both at 0, up to rounding.

    x, z: (B, T, D) float32 in data order. raw: (B, T, 2D), or (B, T, D) with shift_only (sigma = 1): row n belongs to
    token n, as `block_params` writes it. moved: (2, B) float32. All contiguous, on one device, x and moved apart from
    the others; allocates nothing, and a CUDA graph may record it.
    layout, scale, clip, clip_on: as in `affine_decode`. flip: block order is reversed data order.
    Raises TypeError for wrong types and dtypes, ValueError for wrong shapes, windows, options and devices, RuntimeError
    for tensors that overlap and where a gradient is wanted.

    Source: Jacobi decoding of flows: GS-Jacobi, arXiv 2505.12849.
    """
    check_float32("x", x)
    check_shape("x", x, ("B", "T", "D"))
    batch, tokens, channels = x.shape
    check_flag("shift_only", shift_only)
    for name, tensor, shape in (
        ("x", x, (batch, tokens, channels)),
        ("z", z, (batch, tokens, channels)),
        ("raw", raw, (batch, tokens, channels if shift_only else 2 * channels)),
        ("moved", moved, (2, batch)),
    ):
        check_buffer(name, tensor, shape)
        check_beside(name, tensor, x.device, "x")
    check_window(start, stop, tokens)
    check_choice("layout", layout, LAYOUTS)
    check_choice("scale", scale, SCALES)
    check_choice("clip_on", clip_on, CLIP_ON)
    check_flag("flip", flip)
    kind, bound = check_clip(clip) or ("none", 0.0)
    torch.ops.biflow.jacobi_update_(
        x, z, raw, moved, start=start, stop=stop, shift_only=shift_only, layout=layout, scale=scale, clip=kind,
        clip_value=bound, clip_on=clip_on, flip=flip,
    )  # fmt: skip


@torch.library.register_fake("biflow::jacobi_update_")
def _(x, z, raw, moved, **options):
    return None
