"""Attention whose gradient is made of batched products, for short sequences in bf16 on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTER_THAN = 256  # tokens: from here on torch's own gradient is as fast (docs/measured.md)
_SCORES = 1 << 18  # at most so many at once, or those of one sample: they stay in a core's cache


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
