"""LayerNorm and RMSNorm, alone or after the residual addition: checks, dispatch, autograd. The maths: norm.

CUDA tensors go to the Triton kernels of this stem, but for rows longer than these take, CPU tensors to
csrc/cpu/norm.cpp; to torch's functions float64, LayerNorm on a CPU in float32 alone (torch's is as fast), and CPU
tensors under the transforms of torch.func.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow.ops._arrays import takes_arrays
from biflow.ops._checks import FLOATS, backwards_only, check_choice, check_floats_beside, check_number, check_tensor
from biflow.ops._derivatives import of_gradient
from biflow.ops._triton import kernels

KINDS = ("layernorm", "rmsnorm")
_WIDEST = 8192  # channels: the kernels hold a row in registers


@takes_arrays
def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = (x - m) / sqrt(s + eps) weight + bias over the last dimension.

    kind "layernorm" (Ba et al., arXiv 1607.06450): m the mean, s the variance; "rmsnorm" (Zhang and Sennrich, arXiv
    1910.07467): m = 0, s the mean of the squares. Computed in float32, float64 for float64 x, and rounded once.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64, any strides.
        weight: (C,), any of these dtypes; float64 beside float64 x only.
        bias: (C,) or None, as weight.
        kind: "layernorm" | "rmsnorm".
        eps: added to s, > 0.
        dtype: of y, any of these but float64 beside another x; None: that of x. Under autocast the dtype in which the
            next layer reads y spares a conversion.

    Returns:
        y: (..., C), contiguous.

    Gradients: to x, weight and bias, each in its own dtype, the same bits in every run and, on a CPU, for any number of
    threads. Of first and second order; further ones are torch's, whose layer_norm has wrong ones (docs/measured.md).
    On CUDA, but for float64, of first order, without the transforms of torch.func; a second derivative raises
    RuntimeError.

    Raises:
        TypeError: a dtype not listed, an eps that is no number. ValueError: a shape, device, kind or eps that does not
            fit. RuntimeError: CUDA tensors without Triton, which torch's CUDA wheels for Linux bring.
    """
    _check(x, weight, bias, kind, eps, dtype)
    if _has_kernel(kind, x, x.dtype, dtype):
        return torch.ops.biflow.norm(x, *_vectors(x, weight, bias), kind, eps, dtype)
    return _composed(x, weight, bias, kind, eps, dtype)


@takes_arrays
def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + residual and y = norm(h): where a residual stream takes up a branch and the next branch reads it.

    Arguments, errors and gradients as in norm, and:

    Args:
        residual: shape and device of x, any of the dtypes; float64 beside float64 only. Where x is a branch's result in
            bfloat16 beside a float32 stream, y is bfloat16 too, and h is float32.

    Returns:
        y: (..., C), norm of h as rounded to its dtype.
        h: (..., C), x + residual in the dtype that torch's addition has. Both contiguous if x and residual are.
    """
    _check(x, weight, bias, kind, eps, dtype)
    _check_beside("residual", residual, x, x.shape)
    if _has_kernel(kind, x, residual.dtype, dtype):
        return torch.ops.biflow.add_norm(x, residual, *_vectors(x, weight, bias), kind, eps, dtype)
    h = x + residual
    return _composed(h, weight, bias, kind, eps, dtype or x.dtype), h


def _composed(x, weight, bias, kind, eps, dtype):
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, weight = _to(x, compute), _to(weight, compute)
    bias = None if bias is None else _to(bias, compute)
    if kind == "layernorm":
        y = F.layer_norm(wide, wide.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(wide, wide.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    return _to(y, dtype or x.dtype)


def _to(t, dtype):
    return t if t.dtype == dtype else t.to(dtype)  # what changes nothing costs as much as half a small norm


def _has_kernel(kind, x, residual_dtype, dtype):
    if torch.float64 in (x.dtype, residual_dtype):
        return False
    if x.is_cuda:
        return x.shape[-1] <= _WIDEST
    plain = kind == "layernorm" and x.dtype == residual_dtype == (dtype or x.dtype) == torch.float32
    return x.device.type == "cpu" and not plain and backwards_only()


def _vectors(x, weight, bias):
    """weight and bias as the kernels of x's device read them."""
    if x.is_cuda:
        return weight, bias
    return (t if t is None else _to(t, torch.float32).contiguous() for t in (weight, bias))


def _check(x, weight, bias, kind, eps, dtype):
    check_tensor("x", x)
    if x.dtype not in FLOATS:
        raise TypeError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected (..., C) with at least one channel, got shape {tuple(x.shape)}")
    _check_beside("weight", weight, x, x.shape[-1:])
    if bias is not None:
        _check_beside("bias", bias, x, x.shape[-1:])
    if dtype is not None and (dtype not in FLOATS or (dtype == torch.float64 and x.dtype != dtype)):
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or None beside x {x.dtype}, got {dtype}")
    check_choice("kind", kind, KINDS)
    check_number("eps", eps, above=0)


def _check_beside(name, t, x, shape):
    check_floats_beside(name, t, x, "x")
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")


# --- the torch ops -----------------------------------------------------------------------------------------------


def _norm(x, weight, bias, kind, eps, dtype):
    _check(x, weight, bias, kind, eps, dtype)
    return kernels("norm").norm(x, weight, bias, kind, eps, dtype)


def _add_norm(x, residual, weight, bias, kind, eps, dtype):
    _check(x, weight, bias, kind, eps, dtype)
    _check_beside("residual", residual, x, x.shape)
    return kernels("norm").add_norm(x, residual, weight, bias, kind, eps, dtype)


def _norm_backward(grad_y, grad_h, h, weight, bias, kind, eps, narrow):
    return kernels("norm").norm_backward(grad_y, grad_h, h, weight, bias, kind, eps, narrow)


for _name, _kernel in (("norm", _norm), ("add_norm", _add_norm), ("norm_backward", _norm_backward)):
    torch.library.impl(f"biflow::{_name}", "CUDA", _kernel)


@torch.library.register_fake("biflow::norm")
def _(x, weight, bias, kind, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("biflow::add_norm")
def _(x, residual, weight, bias, kind, eps, dtype):
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=dtype), h


@torch.library.register_fake("biflow::norm_backward")
def _(grad_y, grad_h, h, weight, bias, kind, eps, narrow):
    absent = (0,)
    return (
        h.new_empty(h.shape),
        h.new_empty(absent if narrow is None else h.shape, dtype=narrow),
        weight.new_empty(weight.shape),
        h.new_empty(absent) if bias is None else bias.new_empty(bias.shape),
    )


def _save_norm(ctx, inputs, output):
    x, weight, bias, ctx.kind, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight, bias)


def _norm_gradient(ctx, grad_y):
    x, weight, bias = ctx.saved_tensors
    grads = torch.ops.biflow.norm_backward(grad_y, None, x, weight, bias, ctx.kind, ctx.eps, None)
    return grads[0], grads[2], None if bias is None else grads[3], None, None, None


def _save_add_norm(ctx, inputs, output):
    x, residual, weight, bias, ctx.kind, ctx.eps, _ = inputs
    ctx.save_for_backward(output[1], weight, bias)
    ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype


def _add_norm_gradient(ctx, grad_y, grad_h):
    h, weight, bias = ctx.saved_tensors
    narrow = None if ctx.x_dtype == h.dtype else ctx.x_dtype
    grad, grad_x, grad_weight, grad_bias = torch.ops.biflow.norm_backward(
        grad_y, grad_h, h, weight, bias, ctx.kind, ctx.eps, narrow
    )
    grad_x = grad if narrow is None else grad_x
    grad_bias = None if bias is None else grad_bias
    return grad_x, grad.to(ctx.residual_dtype), grad_weight, grad_bias, None, None, None


def _save_gradient(ctx, inputs, output):
    grad_y, grad_h, h, weight, bias, ctx.kind, ctx.eps, ctx.narrow = inputs
    ctx.save_for_backward(grad_y, grad_h, h, weight, bias)


def _second_derivative(ctx, *cotangents):
    grad_y, grad_h, h, weight, bias = ctx.saved_tensors
    if h.is_cuda:
        raise RuntimeError("biflow: on CUDA norm and add_norm have first derivatives only (use biflow.reference)")
    to_h, to_narrow, to_weight, to_bias = cotangents
    if ctx.narrow is not None:
        to_h = to_h + to_narrow.to(h.dtype)
    (to_h, to_weight, to_bias), (to_grad_y, to_grad_h) = of_gradient(
        lambda h, weight, bias: (_composed(h, weight, bias, ctx.kind, ctx.eps, grad_y.dtype), h),
        [h, weight, bias],
        [grad_y, grad_h],
        [to_h, to_weight, to_bias],
    )
    return to_grad_y, to_grad_h, to_h, to_weight, to_bias, None, None, None


torch.library.register_autograd("biflow::norm", _norm_gradient, setup_context=_save_norm)
torch.library.register_autograd("biflow::add_norm", _add_norm_gradient, setup_context=_save_add_norm)
torch.library.register_autograd("biflow::norm_backward", _second_derivative, setup_context=_save_gradient)
