"""Norm, with or without the residual addition before it, and its gradients.

A program holds whole rows in registers, so every tensor is read once and written once; the gradients compute the
statistics again from the row that they read anyway. C: channels of a row; those that are masked are 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024  # elements of a program's tile, or one row: with 4 warps 8 a thread, 16 bytes of bf16
PROGRAMS = 512  # at most, of the gradients: each writes one row of partial sums


@triton.jit
def _place(row, inner, outer_stride, stride):
    """Offset of a row, where `inner` rows lie `stride` apart and so on from each multiple of outer_stride."""
    return row // inner * outer_stride + row % inner * stride


@triton.jit
def forward(
    x, residual, weight, bias, h, y, rows, inner, outer_stride, stride, eps,
    C: tl.constexpr, LAYERNORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < C)
    dense = row * C + column
    value = tl.load(x + _place(row, inner, outer_stride, stride) + column, inside, 0.0).to(tl.float32)
    if residual is not None:
        total = value + tl.load(residual + dense, inside, 0.0).to(tl.float32)
        rounded = total.to(h.dtype.element_ty)
        tl.store(h + dense, rounded, inside)
        value = rounded.to(tl.float32)  # what later layers and the gradients read
    if LAYERNORM:
        mean = tl.sum(value, 1, keep_dims=True) / C
        value = tl.where(inside, value - mean, 0.0)
    normed = value * tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / C + eps)
    normed *= tl.load(weight + column, column < C, 0.0).to(tl.float32)
    if bias is not None:
        normed += tl.load(bias + column, column < C, 0.0).to(tl.float32)
    tl.store(y + dense, normed.to(y.dtype.element_ty), inside)


@triton.jit
def backward(
    grad_y, grad_h, h, weight, grad_x, grad_narrow, partial, rows, inner, outer_stride, stride, eps,
    C: tl.constexpr, LAYERNORM: tl.constexpr, BIAS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """TILES tiles of ROWS rows; partial (programs, 1 or 2, C): the sums of a program for weight and bias."""
    first = tl.program_id(0).to(tl.int64) * (TILES * ROWS) + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    scale = tl.load(weight + column, column < C, 0.0).to(tl.float32)
    weight_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(TILES):
        row = first + tile * ROWS
        inside = (row < rows) & (column < C)
        dense = row * C + column
        value = tl.load(h + _place(row, inner, outer_stride, stride) + column, inside, 0.0).to(tl.float32)
        grad = tl.load(grad_y + dense, inside, 0.0).to(tl.float32)
        if grad_h is not None:  # here, so that it does not wait for the sums
            straight = tl.load(grad_h + dense, inside, 0.0).to(tl.float32)
        if LAYERNORM:
            mean = tl.sum(value, 1, keep_dims=True) / C
            value = tl.where(inside, value - mean, 0.0)
        factor = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / C + eps)
        value *= factor
        weight_sum += grad * value
        if BIAS:
            bias_sum += grad
        grad *= scale
        result = grad - value * (tl.sum(grad * value, 1, keep_dims=True) / C)
        if LAYERNORM:
            result -= tl.sum(grad, 1, keep_dims=True) / C
        result *= factor
        if grad_h is not None:
            result += straight
        tl.store(grad_x + dense, result.to(grad_x.dtype.element_ty), inside)
        if grad_narrow is not None:
            tl.store(grad_narrow + dense, result.to(grad_narrow.dtype.element_ty), inside)
    sums = partial + tl.program_id(0).to(tl.int64) * (C * (1 + BIAS)) + tl.arange(0, BLOCK)
    tl.store(sums, tl.sum(weight_sum, 0), tl.arange(0, BLOCK) < C)
    if BIAS:
        tl.store(sums + C, tl.sum(bias_sum, 0), tl.arange(0, BLOCK) < C)


@triton.jit
def add_partials(
    partial, grad_weight, grad_bias, programs, C: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The sums of all programs, always in the same order; grad_bias may be None."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    program = tl.arange(0, PROGRAMS)[:, None]
    width = C if grad_bias is None else 2 * C
    inside = (program < programs) & (column < C)[None, :]
    sums = partial + program * width + column[None, :]
    tl.store(grad_weight + column, tl.sum(tl.load(sums, inside, 0.0), 0).to(grad_weight.dtype.element_ty), column < C)
    if grad_bias is not None:
        bias_sum = tl.sum(tl.load(sums + C, inside, 0.0), 0)
        tl.store(grad_bias + column, bias_sum.to(grad_bias.dtype.element_ty), column < C)


def tile(width: int) -> dict:
    """Rows of a program, the power of two that holds a row, and warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(max(block * rows // 256, 4), 16)}


def tiles_per_program(rows: int, tile_rows: int) -> int:
    """Of the gradients: a power of two, for each is compiled, such that there are at most PROGRAMS programs."""
    return triton.next_power_of_2(triton.cdiv(triton.cdiv(rows, tile_rows), PROGRAMS))


def place(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x (..., C), or a contiguous copy if more than two strides lead to its rows; the arguments of `_place`."""
    if x.is_contiguous():
        return x, (1, x.shape[-1], 0)
    sizes, strides = [], []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size > 1 and strides and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        elif size > 1:
            sizes, strides = [*sizes, size], [*strides, stride]
    if x.stride(-1) != 1 or len(sizes) > 2:
        return place(x.contiguous())
    return x, (1, *strides, *[0] * (2 - len(strides))) if len(sizes) < 2 else (sizes[1], *strides)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float, dtype: torch.dtype | None) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    _forward(x, None, weight, bias, None, y, kind, eps)
    return y


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    y = x.new_empty(x.shape, dtype=dtype)
    _forward(x, residual.contiguous(), weight, bias, h, y, kind, eps)
    return y, h


def _forward(x, residual, weight, bias, h, y, kind, eps):
    if y.numel() == 0:
        return
    width, options = x.shape[-1], tile(x.shape[-1])
    rows = y.numel() // width
    x, where = place(x)
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        forward[(triton.cdiv(rows, options["ROWS"]),)](
            x, residual, weight.contiguous(), bias, h, y, rows, *where, eps,
            C=width, LAYERNORM=kind == "layernorm", **options,
        )  # fmt: skip


def norm_backward(
    grad_y: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    eps: float,
    narrow: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = h.new_empty(h.shape)
    grad_narrow = None if narrow is None else h.new_empty(h.shape, dtype=narrow)
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    grad_bias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
    if h.numel():
        width, options = h.shape[-1], tile(h.shape[-1])
        rows = h.numel() // width
        tiles = tiles_per_program(rows, options["ROWS"])
        programs = triton.cdiv(rows, options["ROWS"] * tiles)
        partial = weight.new_empty((programs, 1 if bias is None else 2, width), dtype=torch.float32)
        h, where = place(h)
        with torch.cuda.device_of(h):
            backward[(programs,)](
                grad_y.contiguous(), None if grad_h is None else grad_h.contiguous(), h, weight.contiguous(),
                grad_x, grad_narrow, partial, rows, *where, eps,
                C=width, LAYERNORM=kind == "layernorm", BIAS=bias is not None, TILES=tiles, **options,
            )  # fmt: skip
            add_partials[(triton.cdiv(width, 16),)](
                partial, grad_weight, grad_bias, programs,
                C=width, PROGRAMS=triton.next_power_of_2(programs), COLUMNS=16,
            )  # fmt: skip
    absent = h.new_empty(0)
    return (
        grad_x,
        absent if grad_narrow is None else grad_narrow,
        grad_weight,
        h.new_empty(0) if grad_bias is None else grad_bias,
    )
