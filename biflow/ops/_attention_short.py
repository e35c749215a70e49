"""Attention for short sequences in bf16 on a CPU.

By tile products where the CPU has them (csrc/cpu/attention_short.cpp), else torch's, with a gradient of products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow import _library  # noqa: F401
from biflow.ops._checks import any_requires_grad, backwards_only
from biflow.ops._derivatives import of_gradient

SHORTER_THAN = 256  # tokens: from here on torch's own gradient is as fast (docs/measured.md)
_TILES = {"tokens": 512, "channels": (32, 64, 96, 128)}  # at most, and these: csrc/attention_short.h
_SCORES = 1 << 18  # at most so many at once, or those of one sample: they stay in a core's cache


def short_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor | None:
    """softmax(scale q k^T) v over (B, H, T, d), without a mask, where this is faster than torch's; else None."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape != k.shape or not backwards_only():
        return None
    tokens, channels = q.shape[2:]
    if 0 < tokens <= _TILES["tokens"] and channels in _TILES["channels"] and _has_tiles():
        return torch.ops.biflow.attention_short(q, k, v, causal, scale)[0]
    if tokens < SHORTER_THAN and torch.is_grad_enabled() and any_requires_grad(q, k, v):
        return AttentionByProducts.apply(q, k, v, causal, scale)
    return None


def _has_tiles() -> bool:
    return torch.ops.biflow.cpu_isa() == "amx"


class AttentionByProducts(torch.autograd.Function):
    """softmax(scale q k^T) v over (B, H, T, d) with torch's forward; the gradient computes the weights again.

    With P the weights, g the gradient of the result and D = P * (g v^T): dv = P^T g, ds = D - P sum_j D_j,
    dq = scale ds k, dk = scale ds^T q. Logits, softmax and g v^T are fp32; P and ds are rounded to the dtype of q.
    Nothing of size T^2 is kept. The gradient is made of torch's functions: it can be differentiated again.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.causal, ctx.scale = causal, scale
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        heads, tokens = q.shape[1:3]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1) if ctx.causal else None
        samples = max(_SCORES // max(heads * tokens * tokens, 1), 1)
        parts = zip(*(t.split(samples) for t in (q, k, v, grad)), strict=True)
        gradients = [_gradients(*part, later, ctx.scale) for part in parts]
        return *(torch.cat(g) for g in zip(*gradients, strict=True)), None, None


def _gradients(q, k, v, grad, later, scale):
    shape = q.shape
    q, k, v, grad = (t.reshape(-1, *shape[2:]) for t in (q, k, v, grad))
    logits = torch.bmm(q.float(), k.float().mT) * scale
    if later is not None:
        logits = logits.masked_fill(later, -torch.inf)
    p = logits.softmax(-1)
    grad_p = torch.bmm(grad.float(), v.float().mT)
    grad_logits = (scale * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))).to(q.dtype)
    grad_q, grad_k = torch.bmm(grad_logits, k), torch.bmm(grad_logits.mT, q)
    return [t.view(shape) for t in (grad_q, grad_k, torch.bmm(p.to(q.dtype).mT, grad))]


# --- the torch ops: CPUs with tile products only --------------------------------------------------------------------


@torch.library.register_fake("biflow::attention_short")
def _(q, k, v, causal, scale):
    batch, heads, tokens, d = q.shape
    o = q.new_empty((batch, tokens, heads, d)).transpose(1, 2)
    return o, q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.register_fake("biflow::attention_short_backward")
def _(grad_o, q, k, v, lse, causal, scale):
    batch, heads, tokens, d = q.shape
    return tuple(q.new_empty((batch, tokens, heads, d)).transpose(1, 2) for _ in range(3))


def _save(ctx, inputs, output):
    q, k, v, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad_o, grad_lse):
    grads = torch.ops.biflow.attention_short_backward(grad_o, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return *grads, None, None


def _save_gradient(ctx, inputs, output):
    grad_o, q, k, v, _, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(grad_o, q, k, v)


def _second_derivative(ctx, *cotangents):
    grad_o, q, k, v = ctx.saved_tensors

    def formula(q, k, v):
        logits = ctx.scale * (q.float() @ k.float().mT)
        if ctx.causal:
            later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(later, -torch.inf)
        return ((logits.softmax(-1) @ v.float()).to(q.dtype),)

    inputs, (to_grad,) = of_gradient(formula, [q, k, v], [grad_o], cotangents)
    return to_grad, *inputs, None, None, None


torch.library.register_autograd("biflow::attention_short", _gradient, setup_context=_save)
torch.library.register_autograd("biflow::attention_short_backward", _second_derivative, setup_context=_save_gradient)
