"""Attention in plain torch; formulas and shapes: biflow.ops.attention."""

import torch


def attention(q, k, v, *, causal=False, scale=None, mask=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
        k, v = (t.masked_fill(~mask[:, None, :, None], 0) for t in (k, v))
    logits = (q @ k.transpose(-1, -2)) * scale
    # rows without a key: softmax over finite logits, then 0, so that neither value nor gradient is NaN
    empty = ~allowed.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~(allowed | empty), float("-inf"))
    return (logits.softmax(dim=-1) @ v).masked_fill(empty, 0)
