"""Affine coupling in plain torch; formulas and shapes: biflow.ops.affine."""

import torch
from torch import Tensor


def _split(params: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Raw scale and raw shift, each (B, T, D)."""
    if layout == "interleaved":
        return params[..., 0::2], params[..., 1::2]
    first, second = params.chunk(2, dim=-1)
    return (first, second) if layout == "scale_shift" else (second, first)


def _previous(raw: Tensor, flip: bool) -> Tensor:
    """Moves params by one token in block order: the first token's are 0."""
    zero = torch.zeros_like(raw[:, :1])
    return torch.cat((raw[:, 1:], zero), dim=1) if flip else torch.cat((zero, raw[:, :-1]), dim=1)


def _clip(raw: Tensor, clip: tuple[str, float] | None) -> Tensor:
    if clip is None:
        return raw
    kind, c = clip
    return raw.clamp(-c, c) if kind == "hard" else c * torch.tanh(raw / c)


def _sigma(a: Tensor, scale: str) -> Tensor:
    if scale == "exp":
        return torch.exp(a)
    if scale == "softplus":
        return torch.logaddexp(a + 0.541324854612918, torch.zeros_like(a))
    return torch.sigmoid(a + 2) + 1e-3


def _coefficients(x, params, layout, scale, clip, clip_on, causal, flip, mask):
    """sigma, shift and log sigma per element, in the dtype of the arithmetic."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    a, b = _split(params.to(compute), layout)
    if causal:
        a, b = _previous(a, flip), _previous(b, flip)
    if mask is not None:  # before any arithmetic: what a masked token's params hold must not matter
        a, b = (raw.masked_fill(~mask[..., None], 0) for raw in (a, b))
    a = _clip(a, clip)
    b = _clip(b, clip) if clip_on == "both" else b
    sigma = _sigma(a, scale)
    log_sigma = a if scale == "exp" else torch.log(sigma)
    if mask is not None:
        log_sigma = log_sigma.masked_fill(~mask[..., None], 0)
    return sigma, b, log_sigma


def affine_encode(
    x, params, *, layout="scale_shift", scale="exp", clip=None, clip_on="both", causal=True, flip=False, mask=None
):
    sigma, b, log_sigma = _coefficients(x, params, layout, scale, clip, clip_on, causal, flip, mask)
    z = ((x.to(b.dtype) - b) / sigma).to(x.dtype)
    if mask is not None:
        z = torch.where(mask[..., None], z, x)
    return z, -log_sigma.sum(dim=(1, 2))


def affine_decode(
    z,
    params,
    *,
    layout="scale_shift",
    scale="exp",
    clip=None,
    clip_on="both",
    causal=True,
    flip=False,
    mask=None,
    return_logdet=False,
):
    sigma, b, log_sigma = _coefficients(z, params, layout, scale, clip, clip_on, causal, flip, mask)
    x = (z.to(b.dtype) * sigma + b).to(z.dtype)
    if mask is not None:
        x = torch.where(mask[..., None], x, z)
    return (x, -log_sigma.sum(dim=(1, 2))) if return_logdet else x
