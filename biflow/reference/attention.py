"""Attention in plain torch; formulas and shapes: biflow.ops.attention and attention_qkv."""

import torch


def attention(q, k, v, *, causal=False, scale=None, mask=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
    if causal:
        allowed = allowed.tril(k.shape[-2] - q.shape[-2])
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
        k, v = (t.masked_fill(~mask[:, None, :, None], 0) for t in (k, v))
    logits = (q @ k.transpose(-1, -2)) * scale
    # rows without a key: softmax over finite logits, then 0, so that neither value nor gradient is NaN
    empty = ~allowed.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~(allowed | empty), float("-inf"))
    return (logits.softmax(dim=-1) @ v).masked_fill(empty, 0)


def attention_qkv(
    qkv, *, heads, causal=False, scale=None, mask=None, q_norm=None, k_norm=None, eps=1e-6, rope=None, prefix=0
):
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    if mask is not None:
        k, v = (t.masked_fill(~mask[:, None, :, None], 0) for t in (k, v))
    q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    if rope is not None:
        q, k = _rotated(q, *rope, prefix), _rotated(k, *rope, prefix)
    o = attention(q, k, v, causal=causal, scale=scale, mask=mask)
    return o.transpose(1, 2).reshape(batch, tokens, width // 3)


def _normed(x, weight, eps):
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)


def _rotated(x, cos, sin, prefix):
    angle = torch.complex(*(t.double() if x.dtype == torch.float64 else t.float() for t in (cos, sin)))
    pairs = x[:, :, prefix:].to(angle.real.dtype).unflatten(-1, (-1, 2))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angle).flatten(-2)
    return torch.cat([x[:, :, :prefix], turned.to(x.dtype)], dim=2)
