"""Scaled dot-product attention over (B, H, T, d), and over a layer's packed projection (B, T, 3 H d).

Without gradients, bf16 and fp16 on a GPU take the kernel of csrc/cuda/attention.cuh where it has something to fuse:
norms, rotation, a mask. Everything else, and all of it in a build without CUDA kernels, is torch's own attention, which
training uses anyway and which is twice as fast on an H200 where it suffices; but for short sequences in bf16 on a CPU,
where torch's is slow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from biflow import _library  # noqa: F401
from biflow.ops._arrays import takes_arrays
from biflow.ops._attention_short import short_attention
from biflow.ops._checks import FLOATS, any_requires_grad, backwards_only, check_flag, check_number, check_tensor
from biflow.ops._derivatives import of_gradient

_HAS_KERNEL = torch._C._dispatch_has_kernel_for_dispatch_key("biflow::attention_forward", "CUDA")


@takes_arrays
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """o = softmax(scale q k^T) v per head (Vaswani et al., arXiv 1706.03762, section 3.2.1).

    Args:
        q: (B, H, Tq, d), float32, bfloat16, float16 or float64.
        k, v: (B, H, Tk, d), dtype and device of q.
        causal: query i attends to keys <= Tk - Tq + i: the last query to all keys, as where the first Tk - Tq keys were
            kept from earlier calls; needs Tq <= Tk.
        scale: factor of the logits; None: d^-0.5.
        mask: (B, Tk) bool over keys, True = attend. With `causal` both must allow a key. What masked keys and values
            hold, NaN included, does not matter. A query left without any key gives 0, with gradient 0.

    Returns:
        (B, H, Tq, d), dtype of q, any strides. Empty inputs give empty results; Tk = 0 gives 0.

    Raises:
        TypeError: a dtype not listed or not shared, a scale that is no number, a causal that is no bool. ValueError: a
            shape, device or scale that does not fit.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check_floats(name, t)
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: expected {q.dtype} like q, got {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} like q, got {t.device}")
        if t.dim() != 4:
            raise ValueError(f"{name}: expected (B, H, T, d), got shape {tuple(t.shape)}")
    expected = (q.shape[0], q.shape[1], k.shape[2], q.shape[3])
    for name, t in (("k", k), ("v", v)):
        if tuple(t.shape) != expected:
            raise ValueError(f"{name}: expected (B, H, Tk, d) = {expected}, got {tuple(t.shape)}")
    check_flag("causal", causal)
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"causal: expected at most as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    _check_mask("Tk", mask, (k.shape[0], k.shape[2]), "q", q.device)
    return torch.ops.biflow.attention(q, k, v, causal, _check_scale(scale, q.shape[3]), mask)


@takes_arrays
def attention_qkv(
    qkv: Tensor,
    *,
    heads: int,
    causal: bool = False,
    scale: float | None = None,
    mask: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    rope: tuple[Tensor, Tensor] | None = None,
    prefix: int = 0,
) -> Tensor:
    """Self-attention of a transformer layer, from its packed projection: o = softmax(scale q k^T) v per head.

    q and k first pass, per head and token, RMSNorm over the channels, x / sqrt(mean(x^2) + eps) * weight (arXiv
    1910.07467), where a weight is given, and then the rotary embedding, which turns the channel pairs (2i, 2i + 1) by
    the angles of the token (arXiv 2104.09864), where `rope` is given.

    Args:
        qkv: (B, T, 3 H d), the channels of a token ordered (q, k, v; head; channel); float32, bfloat16, float16 or
            float64; any strides.
        heads: H.
        causal: token i attends to tokens <= i.
        scale: factor of the logits; None: d^-0.5.
        mask: (B, T) bool over keys, True = attend; as in `attention`.
        q_norm, k_norm: (d,) weights of the norms, any float dtype, or None: no norm. The norms are computed in float32
            (float64 for float64 qkv).
        eps: of the norms, > 0.
        rope: (cos, sin), each (T - prefix, d / 2), of one float dtype; None: no rotary embedding. It is computed in the
            wider dtype of the tables and qkv.
        prefix: the first tokens, which are not rotated.

    Returns:
        (B, T, H d), dtype of qkv: the heads of a token side by side, as the projection after attention reads them.

    Raises:
        TypeError: a dtype not listed, options of a wrong type. ValueError: a shape, device, scale or eps that does not
            fit.
    """
    _check_floats("qkv", qkv)
    for name, value in (("heads", heads), ("prefix", prefix)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    if qkv.dim() != 3 or qkv.shape[2] % (3 * heads) != 0:
        raise ValueError(f"qkv: expected (B, T, 3 H d) with H = {heads}, got shape {tuple(qkv.shape)}")
    batch, tokens, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * heads)
    check_flag("causal", causal)
    _check_mask("T", mask, (batch, tokens), "qkv", qkv.device)
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix: expected 0 to T = {tokens}, got {prefix}")
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        if t is not None:
            _check_floats(name, t, "qkv", qkv.device, ("d",), (d,))
    cos = sin = None
    if rope is not None:
        if not isinstance(rope, (tuple, list)) or len(rope) != 2:
            raise TypeError(f"rope: expected (cos, sin) or None, got {type(rope).__name__}")
        if d % 2:
            raise ValueError(f"rope: expected an even d, got {d}")
        cos, sin = rope
        for name, t in (("rope cos", cos), ("rope sin", sin)):
            _check_floats(name, t, "qkv", qkv.device, ("T - prefix", "d / 2"), (tokens - prefix, d // 2))
        if cos.dtype != sin.dtype:
            raise TypeError(f"rope sin: expected {cos.dtype} like cos, got {sin.dtype}")
    eps = check_number("eps", eps, above=0)
    return torch.ops.biflow.attention_qkv(
        qkv, heads, causal, _check_scale(scale, d), mask, q_norm, k_norm, eps, cos, sin, prefix
    )


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, prefix: int = 0) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of x (B,H,N,d) by the tables (N - prefix, d/2); computed in the tables' dtype."""
    head, tail = x[:, :, :prefix], x[:, :, prefix:]
    even, odd = tail[..., 0::2], tail[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([head, turned], dim=2) if prefix else turned


def _check_floats(name, t, like=None, device=None, names=None, shape=None):
    """A tensor of floats; like, device, names, shape: of `like`'s device, with that shape, written as names."""
    check_tensor(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(f"{name}: expected ({', '.join(names)}) = {shape}, got {tuple(t.shape)}")
    if device is not None and t.device != device:
        raise ValueError(f"{name}: expected device {device} like {like}, got {t.device}")


def _check_mask(tokens, mask, shape, like, device):
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask: expected a bool Tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask: expected (B, {tokens}) = {shape}, got {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"mask: expected device {device} like {like}, got {mask.device}")


def _check_scale(scale, d):
    if scale is None:
        if d == 0:
            raise ValueError("scale: d = 0 has no default scale, got None")
        scale = d**-0.5
    return check_number("scale", scale)


# --- the ops ----------------------------------------------------------------------------------------------------------


def _kernel_takes(q: Tensor, scale: float, *inputs: Tensor | None) -> bool:
    """Whether attention_forward computes this: heads q, and everything that could want a gradient."""
    return (
        _HAS_KERNEL
        and q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in (32, 64, 128)
        and 1e-30 < scale < 1e30
        and not _wants_gradient(*inputs)
    )


def _heads_have_kernel(qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor | None) -> bool:
    """Whether attention_heads computes them, and there is more to do than to see qkv as heads."""
    return (
        qkv.device.type == "cpu"
        and qkv.dtype != torch.float64
        and not (q_norm is None and k_norm is None and cos is None)
        and (cos is None or (cos.dtype != torch.float64 and not cos.requires_grad))
        and backwards_only()
    )


def _wants_gradient(*inputs: Tensor | None) -> bool:
    if torch.is_grad_enabled() and any_requires_grad(*inputs):
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def _masked(mask: Tensor, *heads: Tensor) -> list[Tensor]:
    """Keys and values (B, H, Tk, d) with zeros where the mask is False: a weight of 0 does not silence a NaN."""
    return [t.masked_fill(~mask[:, None, :, None], 0) for t in heads]


def _attention(q, k, v, causal, scale, mask):
    # torch's is_causal aligns other shapes at the start
    torchs = mask is None and (not causal or q.shape[2] == k.shape[2])
    if not torchs and _kernel_takes(q, scale, q, k, v):
        o = torch.ops.biflow.attention_forward(q, k, v, causal, scale, mask, None, None, 0.0, None, None, 0, [])
        return o.transpose(1, 2)
    if k.shape[2] == 0:  # no key for any query
        return torch.zeros_like(q)
    queries, keys = q.shape[2], k.shape[2]
    if torchs:
        o = short_attention(q, k, v, causal, scale)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale) if o is None else o
    if mask is None and queries == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    earlier = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries) if causal else None
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=earlier, scale=scale)
    k, v = _masked(mask, k, v)
    allowed = mask[:, None, None, :]
    if causal:
        allowed = allowed & earlier
    empty = ~allowed.any(dim=-1, keepdim=True)  # these rows attend to everything, then become 0: never NaN
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | empty, scale=scale).masked_fill(empty, 0)


def _attention_qkv(qkv, heads, causal, scale, mask, q_norm, k_norm, eps, cos, sin, prefix):
    q, k, v = qkv.unflatten(2, (3, heads, qkv.shape[2] // (3 * heads))).permute(2, 0, 3, 1, 4)
    fused = any(t is not None for t in (mask, q_norm, k_norm, cos))
    if fused and _kernel_takes(q, scale, qkv, q_norm, k_norm, cos, sin):
        small = [t if t is None else t.float() for t in (q_norm, k_norm, cos, sin)]
        o = torch.ops.biflow.attention_forward(q, k, v, causal, scale, mask, *small[:2], eps, *small[2:], prefix, [])
        return o.flatten(2)
    if mask is not None:
        k, v = _masked(mask, k, v)  # before the norm: its gradient would turn a NaN's 0 into NaN
    elif _heads_have_kernel(qkv, q_norm, k_norm, cos):
        small = [t if t is None else t.float().contiguous() for t in (q_norm, k_norm, cos, sin)]
        q, k, v = torch.ops.biflow.attention_heads(qkv, heads, *small[:2], eps, *small[2:], prefix)
        return _attention(q, k, v, causal, scale, mask).transpose(1, 2).flatten(2)
    q, k = _turned(q, k, q_norm, k_norm, eps, cos, sin, prefix)
    return _attention(q, k, v, causal, scale, mask).transpose(1, 2).flatten(2)


def _heads(qkv, heads, q_norm, k_norm, eps, cos, sin, prefix):
    """q, k, v (B, H, T, d) of a packed projection, made of torch's functions."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return *_turned(q, k, q_norm, k_norm, eps, cos, sin, prefix), v


def _turned(q, k, q_norm, k_norm, eps, cos, sin, prefix):
    q, k = _normed(q, q_norm, eps), _normed(k, k_norm, eps)
    return (q, k) if cos is None else (apply_rope(q, cos, sin, prefix), apply_rope(k, cos, sin, prefix))


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = x if x.dtype == torch.float64 else x.float()
    return F.rms_norm(wide, wide.shape[-1:], weight.to(wide.dtype), eps).to(x.dtype)


torch.library.impl("biflow::attention", "CompositeImplicitAutograd", _attention)
torch.library.impl("biflow::attention_qkv", "CompositeImplicitAutograd", _attention_qkv)


@torch.library.register_fake("biflow::attention_heads")
def _(qkv, heads, q_norm, k_norm, eps, cos, sin, prefix):
    batch, tokens, width = qkv.shape
    shape = (batch, tokens, heads, width // (3 * heads))
    return tuple(qkv.new_empty(shape).transpose(1, 2) for _ in range(3))


@torch.library.register_fake("biflow::attention_heads_backward")
def _(grad_q, grad_k, grad_v, qkv, heads, q_norm, k_norm, eps, cos, sin, prefix):
    d = qkv.shape[2] // (3 * heads)
    norms = (qkv.new_empty((0 if t is None else d,), dtype=torch.float32) for t in (q_norm, k_norm))
    return qkv.new_empty(qkv.shape), *norms


def _save_heads(ctx, inputs, output):
    qkv, ctx.heads, q_norm, k_norm, ctx.eps, cos, sin, ctx.prefix = inputs
    ctx.save_for_backward(qkv, q_norm, k_norm, cos, sin)


def _heads_gradient(ctx, *grads):
    qkv, q_norm, k_norm, cos, sin = ctx.saved_tensors
    grad_qkv, to_q, to_k = torch.ops.biflow.attention_heads_backward(
        *grads, qkv, ctx.heads, q_norm, k_norm, ctx.eps, cos, sin, ctx.prefix
    )
    return grad_qkv, None, None if q_norm is None else to_q, None if k_norm is None else to_k, None, None, None, None


def _save_heads_gradient(ctx, inputs, output):
    *grads, qkv, ctx.heads, q_norm, k_norm, ctx.eps, cos, sin, ctx.prefix = inputs
    ctx.save_for_backward(*grads, qkv, q_norm, k_norm, cos, sin)


def _heads_second_derivative(ctx, *cotangents):
    *grads, qkv, q_norm, k_norm, cos, sin = ctx.saved_tensors
    (to_qkv, to_q, to_k), to_grads = of_gradient(
        lambda qkv, q_norm, k_norm: _heads(qkv, ctx.heads, q_norm, k_norm, ctx.eps, cos, sin, ctx.prefix),
        [qkv, q_norm, k_norm],
        grads,
        cotangents,
    )
    return *to_grads, to_qkv, None, to_q, to_k, None, None, None, None


torch.library.register_autograd("biflow::attention_heads", _heads_gradient, setup_context=_save_heads)
torch.library.register_autograd(
    "biflow::attention_heads_backward", _heads_second_derivative, setup_context=_save_heads_gradient
)


@torch.library.register_fake("biflow::attention_forward")
def _(q, k, v, causal, scale, mask, q_norm, k_norm, eps, cos, sin, prefix, plan):
    batch, heads, tokens, d = q.shape
    return q.new_empty((batch, tokens, heads, d))
