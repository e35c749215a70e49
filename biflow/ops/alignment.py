"""Squared errors of a head (a norm and a linear layer) that reads a hidden state: checks, dispatch, autograd.

The maths: alignment_error. Nothing of the hidden state's size is kept or written but its gradient: all that the
gradients need of the normalised state n follows from p, from the errors and from one product, D by C.
"""

import torch
from torch import Tensor

from biflow.ops._arrays import takes_arrays
from biflow.ops._checks import FLOATS, check_choice, check_floats_beside, check_number, check_tensor
from biflow.ops._triton import kernels
from biflow.ops.norm import KINDS

_WIDEST = 8192  # channels that the Triton kernels are tested for
_CHUNK = 1 << 20  # bytes of hidden state a core works on at a time: with what is made of them they stay in its cache


@takes_arrays
def alignment_error(
    h: Tensor,
    target: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    head_weight: Tensor,
    head_bias: Tensor | None,
    *,
    scale: Tensor | None = None,
    kind: str,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """E_b = sum_t scale_bt sum_d (p_btd - target_btd)^2, p = norm(h; norm_weight, norm_bias) head_weight^T + head_bias.

    Hidden alignment (BiFlow, arXiv 2512.10953): how far what a head reads from a state h is from the trajectory. The
    norm is as in norm, by kind and eps. Neither norm(h) nor p is kept for the gradients: all is computed again from h.

    A mixture with a branch u that gets no gradient needs no op of its own, for ((p + w u) / (1 + w) - t)^2 is
    (p - target)^2 scale with target = (1 + w) t - w u and scale = 1 / (1 + w)^2.

    Args:
        h: (B,T,C), float32, bfloat16, float16 or float64, any strides, such as the tokens behind a prefix.
        target: (B,T,D), any of these dtypes; float64, here and below, beside float64 h only.
        norm_weight, norm_bias: (C,); the bias may be None.
        head_weight: (D,C). head_bias: (D,) or None.
        scale: (B,T), or (B,) for all tokens of a sample, or None: 1.
        kind: "layernorm" | "rmsnorm".
        eps: added to the norm's variance or mean square, > 0.
        dtype: what norm(h) and head_weight are rounded to before they are multiplied, as autocast does, any of these;
            None: not at all. Sums are float32 (float64 for float64 h), p is not rounded.

    Returns:
        E: (B,) float32, float64 for float64 h.

    Gradients: to h, norm_weight, norm_bias, head_weight and head_bias, each in its own dtype, with roundings to `dtype`
    taken for what has the derivative 1; the same bits in every run with as many threads. target and scale get none. Of
    first order, without the transforms of torch.func; a second derivative raises RuntimeError.

    Raises:
        TypeError: a dtype not listed, an eps that is no number. ValueError: a shape, device, kind or eps that does not
            fit, a target or scale that requires a gradient. RuntimeError: CUDA tensors without Triton, which torch's
            CUDA wheels for Linux bring.
    """
    _check(h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype)
    if torch.is_grad_enabled():
        for name, t in (("target", target), ("scale", scale)):
            if t is not None and t.requires_grad:
                raise ValueError(f"{name}: expected a tensor that requires no gradient, for it gets none; detach it")
    return torch.ops.biflow.alignment_error(
        h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype
    )


def _check(h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype):
    check_tensor("h", h)
    if h.dtype not in FLOATS:
        raise TypeError(f"h: expected float32, bfloat16, float16 or float64, got {h.dtype}")
    if h.dim() != 3 or h.shape[2] == 0:
        raise ValueError(f"h: expected (B, T, C) with at least one channel, got shape {tuple(h.shape)}")
    batch, tokens, width = h.shape
    check_floats_beside("target", target, h, "h")
    if target.dim() != 3 or target.shape[:2] != h.shape[:2] or target.shape[2] == 0:
        raise ValueError(f"target: expected shape ({batch}, {tokens}, D) with D >= 1, got {tuple(target.shape)}")
    outputs = target.shape[2]
    for name, t, shape in (
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
        ("head_weight", head_weight, (outputs, width)),
        ("head_bias", head_bias, (outputs,)),
    ):
        if t is None and name.endswith("bias"):
            continue
        check_floats_beside(name, t, h, "h")
        if t.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(t.shape)}")
    if scale is not None:
        check_floats_beside("scale", scale, h, "h")
        if scale.shape != h.shape[:2] and scale.shape != h.shape[:1]:
            raise ValueError(f"scale: expected shape ({batch}, {tokens}) or ({batch},), got {tuple(scale.shape)}")
    if dtype is not None and (dtype not in FLOATS or (dtype == torch.float64 and h.dtype != dtype)):
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or None beside h {h.dtype}, got {dtype}")
    check_choice("kind", kind, KINDS)
    check_number("eps", eps, above=0)


# --- the head, and the gradients of its parameters -------------------------------------------------------------------


class _Head:
    """The parameters in the dtype of the sums, and what follows from them. n: the normalised state.

    p = n folded^T + offset, but for roundings of norm(h).
    """

    def __init__(self, norm_weight, norm_bias, head_weight, head_bias, kind, eps, dtype, wide):
        self.kind, self.eps, self.wide = kind, eps, wide
        self.dtype = None if dtype == wide else dtype
        self.norm_weight = norm_weight.to(wide)
        self.norm_bias = None if norm_bias is None else norm_bias.to(wide)
        self.weight = head_weight.to(dtype or wide).to(wide)
        self.bias = self.weight.new_zeros(len(self.weight)) if head_bias is None else head_bias.to(wide)
        exact = self.weight.double()  # these round alike in every row
        self.folded = (exact * self.norm_weight).to(wide)
        self.offset = self.bias
        if norm_bias is not None:
            self.offset = (self.bias + (exact * self.norm_bias).sum(1)).to(wide)

    def to_h(self):
        """(D,C): the gradient to h is (g to_h - n s) r, with g that to p, s the mean of n (g to_h), r as in _read."""
        if self.kind == "rmsnorm":
            return self.folded
        return self.folded - self.folded.mean(1, keepdim=True)

    def gradients(self, product, total):
        """Of norm_weight, norm_bias, head_weight, head_bias, from product = g^T n (D,C) and total (D,), g's sum.

        In float64, as both are: they are sums over rows, which may cancel each other in the sums over outputs.
        """
        head_weight = product * self.norm_weight
        if self.norm_bias is not None:
            head_weight += total[:, None] * self.norm_bias
        return (self.weight * product).sum(0), (self.weight * total[:, None]).sum(0), head_weight, total


def _wide(h):
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _scale(scale, h):
    """(B, T), or (B, 1)."""
    return h.new_ones((h.shape[0], 1), dtype=_wide(h)) if scale is None else scale.to(_wide(h)).view(len(h), -1)


# --- chunks of rows: what runs on a CPU, in float64 and for very long rows -------------------------------------------


def _chunks(h):
    """Places in (B,T) whose rows fit in the cores' caches: whole samples, or tokens of one."""
    batch, tokens, width = h.shape
    rows = max(1, _CHUNK * torch.get_num_threads() // (width * _wide(h).itemsize))
    if tokens > rows:
        step = -(-tokens // -(-tokens // rows))  # of equal size
        return [(slice(b, b + 1), slice(t, t + step)) for b in range(batch) for t in range(0, tokens, step)]
    step = max(1, rows // max(tokens, 1))
    return [(slice(b, b + step), slice(None)) for b in range(0, batch if tokens else 0, step)]


def _read(h, head):
    """Of rows of h: v (N,C), these or their distance from their mean; r (N,1) such that n = v r; p - offset (N,D)."""
    v = h.reshape(-1, h.shape[-1]).to(head.wide)
    if head.kind == "layernorm":
        v = v - v.mean(1, keepdim=True)
    r = torch.linalg.vector_norm(v, dim=1, keepdim=True).square_().div_(v.shape[1]).add_(head.eps).rsqrt_()
    if head.dtype is None:
        return v, r, torch.mm(v, head.folded.t()).mul_(r)  # n itself is not needed
    y = (v * r).mul_(head.norm_weight)
    y = y if head.norm_bias is None else y.add_(head.norm_bias)
    return v, r, torch.addmm(head.bias - head.offset, y.to(head.dtype).to(head.wide), head.weight.t())


def _squares(h, target, head):
    """(B,T): the squared error of each token."""
    squares = h.new_empty(h.shape[:2], dtype=head.wide)
    for place in _chunks(h):
        p = _read(h[place], head)[2].add_(head.offset)
        squares[place] = p.sub_(target[place].reshape(p.shape)).square_().sum(1).view(squares[place].shape)
    return squares


def _through(h, target, factor, head):
    """The gradient to h, and g^T n and the sum of g over all tokens in float64, with g = factor (p - target)."""
    to_h, grad_h = head.to_h(), h.new_empty(h.shape)
    product, total = (t.new_zeros(t.shape, dtype=torch.float64) for t in (to_h, head.bias))
    for place in _chunks(h):
        v, r, q = _read(h[place], head)
        g = (q + head.offset).sub_(target[place].reshape(q.shape)).mul_(factor[place].reshape(-1, 1))
        total += g.sum(0, dtype=torch.float64)
        s = q.mul_(g).sum(1, keepdim=True).div_(v.shape[1])
        g *= r
        product += torch.mm(g.t(), v)
        out = grad_h[place].view(v.shape)
        made = torch.mm(g, to_h, out=out) if out.dtype == head.wide else torch.mm(g, to_h)
        made.addcmul_(v, s.mul_(r).mul_(r), value=-1)
        if made is not out:
            out.copy_(made)
    return grad_h, product, total


# --- the torch ops ---------------------------------------------------------------------------------------------------


def _error(squares, h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype):
    _check(h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype)
    with torch.autocast(h.device.type, enabled=False):
        head = _Head(norm_weight, norm_bias, head_weight, head_bias, kind, eps, dtype, _wide(h))
        return (squares(h, target, head) * _scale(scale, h)).sum(1)


def _backward(
    through, grad_error, h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype
):  # fmt: skip
    with torch.autocast(h.device.type, enabled=False):
        head = _Head(norm_weight, norm_bias, head_weight, head_bias, kind, eps, dtype, _wide(h))
        factor = (2 * grad_error.to(head.wide)[:, None] * _scale(scale, h)).expand(h.shape[:2])
        grad_h, product, total = through(h, target, factor, head)
        given = (norm_weight, norm_bias, head_weight, head_bias)
        return grad_h, *(
            h.new_empty(0) if t is None else grad.to(t.dtype)
            for t, grad in zip(given, head.gradients(product, total), strict=True)
        )


def _in_triton(h):
    return h.dtype != torch.float64 and h.shape[2] <= _WIDEST


def _alignment_error(h, *args):
    return _error(kernels("alignment").squares if _in_triton(h) else _squares, h, *args)


def _alignment_error_backward(grad_error, h, *args):
    return _backward(kernels("alignment").through if _in_triton(h) else _through, grad_error, h, *args)


def _alignment_error_cpu(*args):
    return _error(_squares, *args)


def _alignment_error_backward_cpu(*args):
    return _backward(_through, *args)


torch.library.impl("biflow::alignment_error", "CUDA", _alignment_error)
torch.library.impl("biflow::alignment_error_backward", "CUDA", _alignment_error_backward)
torch.library.impl("biflow::alignment_error", "CPU", _alignment_error_cpu)
torch.library.impl("biflow::alignment_error_backward", "CPU", _alignment_error_backward_cpu)


@torch.library.register_fake("biflow::alignment_error")
def _(h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype):
    return h.new_empty(h.shape[:1], dtype=_wide(h))


@torch.library.register_fake("biflow::alignment_error_backward")
def _(grad_error, h, target, norm_weight, norm_bias, head_weight, head_bias, scale, kind, eps, dtype):
    given = (norm_weight, norm_bias, head_weight, head_bias)
    return h.new_empty(h.shape), *(h.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


def _save(ctx, inputs, output):
    *tensors, ctx.kind, ctx.eps, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_error):
    grad_h, *grads = torch.ops.biflow.alignment_error_backward(
        grad_error, *ctx.saved_tensors, ctx.kind, ctx.eps, ctx.dtype
    )
    grads = [None if t is None else grad for t, grad in zip(ctx.saved_tensors[2:6], grads, strict=True)]
    return grad_h, None, *grads, None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("biflow: alignment_error has first derivatives only (use biflow.reference)")


torch.library.register_autograd("biflow::alignment_error", _gradient, setup_context=_save)
torch.library.register_autograd("biflow::alignment_error_backward", _no_second_derivative)
