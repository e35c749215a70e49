"""Scaled dot-product attention over (B, H, T, d)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow.ops._arrays import takes_arrays
from biflow.ops._checks import check_flag, check_number, check_tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        causal: query i attends to keys <= i; needs Tq = Tk.
        scale: factor of the logits; None: d^-0.5.
        mask: (B, Tk) bool over keys, True = attend. With `causal` both must allow a key. What masked keys and values
            hold, NaN included, does not matter. A query left without any key gives 0, with gradient 0.

    Returns:
        (B, H, Tq, d), dtype of q. Empty inputs give empty results; Tk = 0 gives 0.

    Raises:
        TypeError: a dtype not listed or not shared, a scale that is no number, a causal that is no bool. ValueError: a
            shape, device or scale that does not fit.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, t)
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {t.dtype}")
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
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal: expected as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool Tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if tuple(mask.shape) != (k.shape[0], k.shape[2]):
            raise ValueError(f"mask: expected (B, Tk) = {(k.shape[0], k.shape[2])}, got {tuple(mask.shape)}")
        if mask.device != q.device:
            raise ValueError(f"mask: expected device {q.device} like q, got {mask.device}")
    if scale is None:
        if q.shape[3] == 0:
            raise ValueError("scale: d = 0 has no default scale, got None")
        scale = q.shape[3] ** -0.5
    return torch.ops.biflow.attention(q, k, v, causal, check_number("scale", scale), mask)


@torch.library.impl("biflow::attention", "CompositeImplicitAutograd")
def _attention(q, k, v, causal, scale, mask):
    if k.shape[2] == 0:  # no key for any query
        return torch.zeros_like(q)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    # a weight of 0 does not silence a NaN, so masked keys and values are blanked
    k, v = (t.masked_fill(~mask[:, None, :, None], 0) for t in (k, v))
    allowed = mask[:, None, None, :]
    if causal:
        allowed = allowed & torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    empty = ~allowed.any(dim=-1, keepdim=True)  # these rows attend to everything, then become 0: never NaN
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed | empty, scale=scale).masked_fill(empty, 0)
