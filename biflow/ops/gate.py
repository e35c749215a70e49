"""Gates of an MLP: checks, dispatch, autograd. The maths: gate.

CUDA tensors go to the Triton kernels of this stem, "swiglu" on a CPU to csrc/cpu/gate.cpp; float64, "gelu" on a CPU
(torch's is as fast), and CPU tensors under the transforms of torch.func, to torch's functions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow.ops._arrays import takes_arrays
from biflow.ops._checks import FLOATS, backwards_only, check_choice, check_tensor
from biflow.ops._derivatives import of_gradient
from biflow.ops._triton import kernels

KINDS = ("swiglu", "gelu")


@takes_arrays
def gate(m: Tensor, kind: str) -> Tensor:
    """What an MLP does between its two linear layers.

    kind "gelu": m Phi(m) with the exact normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415);
    "swiglu": silu(a) b, silu(a) = a / (1 + exp(-a)), of the halves [a | b] of the channels (Shazeer, arXiv 2002.05202).

    Args:
        m: (..., C), float32, bfloat16, float16 or float64, any strides; C even for "swiglu".
        kind: "swiglu" | "gelu".

    Returns:
        (..., C), or (..., C / 2) for "swiglu", dtype of m, computed in float32 (float64 for float64) and rounded once.

    Gradients: of any order; on CUDA, but for float64, of first order, without the transforms of torch.func, and a
    second derivative raises RuntimeError.

    Raises:
        TypeError: a dtype not listed. ValueError: a kind or shape that does not fit. RuntimeError: CUDA tensors without
            Triton, which torch's CUDA wheels for Linux bring.
    """
    _check(m, kind)
    own = m.is_cuda or (m.device.type == "cpu" and kind == "swiglu" and backwards_only())
    if own and m.dtype != torch.float64:
        return torch.ops.biflow.gate(m, kind)
    return _composed(m, kind)


def _composed(m, kind):
    if kind == "gelu":
        return F.gelu(m)
    a, b = m.chunk(2, dim=-1)
    return F.silu(a) * b


def _check(m, kind):
    check_tensor("m", m)
    if m.dtype not in FLOATS:
        raise TypeError(f"m: expected float32, bfloat16, float16 or float64, got {m.dtype}")
    check_choice("kind", kind, KINDS)
    if m.dim() == 0 or (kind == "swiglu" and m.shape[-1] % 2):
        wanted = "an even number of channels" if kind == "swiglu" else "at least one dimension"
        raise ValueError(f"m: expected {wanted}, got shape {tuple(m.shape)}")


# --- the torch ops -----------------------------------------------------------------------------------------------


def _gate(m, kind):
    _check(m, kind)
    return kernels("gate").gate(m, kind)


def _gate_backward(grad_y, m, kind):
    return kernels("gate").gate_backward(grad_y, m, kind)


for _name, _kernel in (("gate", _gate), ("gate_backward", _gate_backward)):
    torch.library.impl(f"biflow::{_name}", "CUDA", _kernel)


@torch.library.register_fake("biflow::gate")
def _(m, kind):
    return m.new_empty((*m.shape[:-1], m.shape[-1] // (2 if kind == "swiglu" else 1)))


@torch.library.register_fake("biflow::gate_backward")
def _(grad_y, m, kind):
    return m.new_empty(m.shape)


def _save(ctx, inputs, output):
    m, ctx.kind = inputs
    ctx.save_for_backward(m)


def _gradient(ctx, grad_y):
    return torch.ops.biflow.gate_backward(grad_y, *ctx.saved_tensors, ctx.kind), None


def _save_gradient(ctx, inputs, output):
    grad_y, m, ctx.kind = inputs
    ctx.save_for_backward(grad_y, m)


def _second_derivative(ctx, cotangent):
    grad_y, m = ctx.saved_tensors
    if m.is_cuda:
        raise RuntimeError("biflow: on CUDA gate has a first derivative only (use biflow.reference)")
    (to_m,), (to_grad,) = of_gradient(lambda m: (_composed(m, ctx.kind),), [m], [grad_y], [cotangent])
    return to_grad, to_m, None


torch.library.register_autograd("biflow::gate", _gradient, setup_context=_save)
torch.library.register_autograd("biflow::gate_backward", _second_derivative, setup_context=_save_gradient)
