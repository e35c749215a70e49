"""The error of a head that reads a hidden state, in plain torch; formula and shapes: biflow.ops.alignment."""

import torch
import torch.nn.functional as F

from biflow.reference.norm import norm


def alignment_error(
    h, target, norm_weight, norm_bias, head_weight, head_bias, *, scale=None, kind, eps, dtype=None
):  # fmt: skip
    wide = torch.float64 if h.dtype == torch.float64 else torch.float32
    y = norm(h, norm_weight, norm_bias, kind=kind, eps=eps, dtype=dtype or wide)
    p = F.linear(y.to(wide), head_weight.to(dtype or wide).to(wide), None if head_bias is None else head_bias.to(wide))
    square = (p - target.to(wide)).square().sum(-1)
    if scale is not None:
        square = square * scale.to(wide).view(len(scale), -1)
    return square.sum(-1)
