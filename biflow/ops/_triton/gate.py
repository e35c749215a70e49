"""Gates and their gradients: one pass; the gradients compute the activation again. F: channels of the result."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # results of a program of 4 warps: 16 a thread, two loads of 16 bytes in bf16


@triton.jit
def forward(
    m, y, rows, stride, F: tl.constexpr, SWIGLU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < F)
    a = tl.load(m + row * stride + column, inside, 0.0).to(tl.float32)
    if SWIGLU:
        b = tl.load(m + row * stride + F + column, inside, 0.0).to(tl.float32)
        value = a / (1 + tl.exp(-a)) * b
    else:
        value = 0.5 * a * (1 + tl.erf(a * 0.7071067811865476))
    tl.store(y + row * F + column, value.to(y.dtype.element_ty), inside)


@triton.jit
def backward(
    grad_y, m, grad_m, rows, stride, F: tl.constexpr, SWIGLU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < F)
    grad = tl.load(grad_y + row * F + column, inside, 0.0).to(tl.float32)
    a = tl.load(m + row * stride + column, inside, 0.0).to(tl.float32)
    if SWIGLU:
        b = tl.load(m + row * stride + F + column, inside, 0.0).to(tl.float32)
        s = 1 / (1 + tl.exp(-a))
        to = grad_m + row * (2 * F) + column
        tl.store(to, (grad * b * s * (1 + a * (1 - s))).to(grad_m.dtype.element_ty), inside)
        tl.store(to + F, (grad * a * s).to(grad_m.dtype.element_ty), inside)
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        slope = 0.5 * (1 + tl.erf(a * 0.7071067811865476)) + a * density
        tl.store(grad_m + row * F + column, (grad * slope).to(grad_m.dtype.element_ty), inside)


def tile(width: int) -> dict:
    """Rows and columns of a program, and warps."""
    block = min(triton.next_power_of_2(width), 1024)
    return {"ROWS": TILE // block, "BLOCK": block, "num_warps": 4}


def rows_of(m: Tensor) -> Tensor:
    """m as (rows, channels), its channels next to each other; copied only if they are not, or no stride leads to all
    rows."""
    m = m.reshape(-1, m.shape[-1])
    return m if m.stride(1) == 1 else m.contiguous()


def gate(m: Tensor, kind: str) -> Tensor:
    width = m.shape[-1] // (2 if kind == "swiglu" else 1)
    y = m.new_empty((*m.shape[:-1], width))
    if y.numel():
        _launch(forward, (rows_of(m), y), m, width, kind)
    return y


def gate_backward(grad_y: Tensor, m: Tensor, kind: str) -> Tensor:
    width = grad_y.shape[-1]
    grad_m = m.new_empty(m.shape)
    if grad_m.numel():
        _launch(backward, (grad_y.contiguous(), rows_of(m), grad_m), m, width, kind)
    return grad_m


def _launch(kernel, tensors, m, width, kind):
    options = tile(width)
    rows = m.numel() // m.shape[-1]
    grid = (triton.cdiv(rows, options["ROWS"]), triton.cdiv(width, options["BLOCK"]))
    stride = tensors[-2].stride(0)
    with torch.cuda.device_of(m):
        kernel[grid](*tensors, rows, stride, F=width, SWIGLU=kind == "swiglu", **options)
