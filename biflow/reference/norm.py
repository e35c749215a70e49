"""LayerNorm and RMSNorm in plain torch; formulas and shapes: biflow.ops.norm."""

import torch


def norm(x, weight, bias=None, *, kind, eps, dtype=None):
    wide = x if x.dtype == torch.float64 else x.float()
    if kind == "layernorm":
        wide = wide - wide.mean(dim=-1, keepdim=True)
    y = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(dtype or x.dtype)


def add_norm(x, residual, weight, bias=None, *, kind, eps, dtype=None):
    h = x + residual
    return norm(h, weight, bias, kind=kind, eps=eps, dtype=dtype or x.dtype), h
