"""Squared errors of a head that reads a hidden state, and what their gradients need of that state.

A program has ROWS rows and goes over their channels in chunks of BLOCK, over the head's outputs in tiles of OUTPUTS.
C channels, D outputs; n: the normalised state. What is masked reads as 0. Sums, and all that comes from the host but h,
target and head_weight, are float32, to which Triton widens what meets them; products of float32 are not TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from biflow.ops._triton.norm import _place, place

ROWS = 16  # of a program: the least that tl.dot takes
BLOCK = 64  # channels
OUTPUTS = 32  # at most
PROGRAMS = 256  # of the sums over rows, about: as many partial sums are written


@triton.jit
def forward(
    h, target, norm_weight, norm_bias, head_weight, head_bias, offset, factor, error, grad, slope, moments,
    rows, inner, outer_stride, stride, eps,
    C: tl.constexpr, D: tl.constexpr, LAYERNORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """error (rows, tiles): the sum of (p - target)^2 over a tile; or, with factor (rows,), grad (rows, D): factor
    (p - target); slope (rows, tiles): the sum of grad (p - offset) / C; moments (rows, 2): mean and 1 / deviation."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    tile, tiles = tl.program_id(1), tl.num_programs(1)
    source = h + _place(row, inner, outer_stride, stride)
    mean = tl.zeros((ROWS, 1), tl.float32)
    square = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, C, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < C)
        value = tl.load(source + column, inside, 0.0).to(tl.float32)
        if LAYERNORM:  # Chan, Golub, LeVeque: the chunk's moments beside those of the `start` channels before it
            count = min(BLOCK, C - start)
            chunk = tl.sum(value, 1, keep_dims=True) / count
            value = tl.where(inside, value - chunk, 0.0)
            step = (chunk - mean) * (count / (start + count))
            square += (chunk - mean) * step * start
            mean += step
        square += tl.sum(value * value, 1, keep_dims=True)
    scale = tl.rsqrt(square / C + eps)

    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    p = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, C, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < C)
        value = (tl.load(source + column, inside, 0.0) - mean) * scale
        value *= tl.load(norm_weight + column, column < C, 0.0)
        if norm_bias is not None:
            value += tl.load(norm_bias + column, column < C, 0.0)
        channel = start + tl.arange(0, BLOCK)[:, None]
        inside = (channel < C) & (output < D)
        weight = tl.load(head_weight + output.to(tl.int64) * C + channel, inside, 0.0)
        p = tl.dot(value.to(weight.dtype), weight, p, input_precision="ieee")
    p += tl.load(head_bias + output, output < D, 0.0)
    inside = (row < rows) & (output < D)
    off = p - tl.load(target + row * D + output, inside, 0.0)
    if error is not None:
        tl.store(error + row * tiles + tile, tl.sum(off * off, 1, keep_dims=True), row < rows)
    else:
        off *= tl.load(factor + row, row < rows, 0.0)
        tl.store(grad + row * D + output, off, inside)
        p -= tl.load(offset + output, output < D, 0.0)
        tl.store(slope + row * tiles + tile, tl.sum(off * p, 1, keep_dims=True) / C, row < rows)
        if tile == 0:
            tl.store(moments + row * 2, mean, row < rows)
            tl.store(moments + row * 2 + 1, scale, row < rows)


@triton.jit
def backward(
    h, grad, to_h, slope, moments, grad_h, rows, inner, outer_stride, stride,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """grad_h (rows, C) = (grad to_h - n slope) / deviation."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    tiles = (D + OUTPUTS - 1) // OUTPUTS
    result = tl.zeros((ROWS, BLOCK), tl.float32)
    tilt = tl.zeros((ROWS, 1), tl.float32)
    for tile in range(tiles):
        output = tile * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
        g = tl.load(grad + row * D + output, (row < rows) & (output < D), 0.0)
        line = tile * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
        weight = tl.load(to_h + line.to(tl.int64) * C + column, (line < D) & (column < C), 0.0)
        result = tl.dot(g, weight, result, input_precision="ieee")
        tilt += tl.load(slope + row * tiles + tile, row < rows, 0.0)
    inside = (row < rows) & (column < C)
    mean = tl.load(moments + row * 2, row < rows, 0.0)
    scale = tl.load(moments + row * 2 + 1, row < rows, 0.0)
    value = tl.load(h + _place(row, inner, outer_stride, stride) + column, inside, 0.0)
    result = (result - (value - mean) * scale * tilt) * scale
    tl.store(grad_h + row * C + column, result.to(grad_h.dtype.element_ty), inside)


@triton.jit
def products(
    h, grad, moments, partial, rows, inner, outer_stride, stride, steps,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """partial (splits, D, C): grad^T n over `steps` tiles of rows."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    first = tl.program_id(2).to(tl.int64) * steps * ROWS
    total = tl.zeros((OUTPUTS, BLOCK), tl.float32)
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)[:, None]
        mean = tl.load(moments + row * 2, row < rows, 0.0)
        scale = tl.load(moments + row * 2 + 1, row < rows, 0.0)
        inside = (column < C) & (row < rows)
        value = tl.load(h + _place(row, inner, outer_stride, stride) + column, inside, 0.0)
        line = first + step * ROWS + tl.arange(0, ROWS)[None, :]
        g = tl.load(grad + line * D + output, (line < rows) & (output < D), 0.0)
        total = tl.dot(g, (value - mean) * scale, total, input_precision="ieee")
    to = partial + (tl.program_id(2).to(tl.int64) * D + output) * C + column
    tl.store(to, total, (output < D) & (column < C))


def tile(outputs: int) -> dict:
    return {"ROWS": ROWS, "BLOCK": BLOCK, "OUTPUTS": min(max(triton.next_power_of_2(outputs), 16), OUTPUTS)}


def _read(h, target, head, factor, error, grad, slope, moments):
    options = tile(target.shape[2])
    rows = h.shape[0] * h.shape[1]
    weight = head.weight if head.dtype is None else head.weight.to(head.dtype)  # exactly: it has been rounded
    norm_bias = None if head.norm_bias is None else head.norm_bias.contiguous()
    h, where = place(h)
    grid = (triton.cdiv(rows, options["ROWS"]), triton.cdiv(target.shape[2], options["OUTPUTS"]))
    with torch.cuda.device_of(h):
        forward[grid](
            h, target.contiguous(), head.norm_weight.contiguous(), norm_bias, weight.contiguous(),
            head.bias.contiguous(), head.offset.contiguous(), factor, error, grad, slope, moments,
            rows, *where, head.eps,
            C=h.shape[2], D=target.shape[2], LAYERNORM=head.kind == "layernorm", **options,
        )  # fmt: skip


def squares(h: Tensor, target: Tensor, head) -> Tensor:
    """(B,T): the squared error of each token."""
    tiles = triton.cdiv(target.shape[2], tile(target.shape[2])["OUTPUTS"])
    error = h.new_empty((*h.shape[:2], tiles), dtype=torch.float32)
    if error.numel():
        _read(h, target, head, None, error, None, None, None)
    return error.sum(2)


def through(h: Tensor, target: Tensor, factor: Tensor, head) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient to h, and g^T n and the sum of g over all tokens in float64, with g = factor (p - target)."""
    width, outputs, options = h.shape[2], target.shape[2], tile(target.shape[2])
    h, where = place(h)
    grad_h, rows = h.new_empty(h.shape), h.shape[0] * h.shape[1]
    if not rows:
        return grad_h, *(torch.zeros_like(t, dtype=torch.float64) for t in (head.folded, head.bias))
    tiles = triton.cdiv(outputs, options["OUTPUTS"])
    grad, slope, moments = (h.new_empty((rows, n), dtype=torch.float32) for n in (outputs, tiles, 2))
    _read(h, target, head, factor.contiguous(), None, grad, slope, moments)
    chunks, row_tiles = triton.cdiv(width, options["BLOCK"]), triton.cdiv(rows, options["ROWS"])
    steps = triton.cdiv(row_tiles, triton.cdiv(PROGRAMS, chunks * tiles))
    splits = triton.cdiv(row_tiles, steps)
    partial = h.new_empty((splits, outputs, width), dtype=torch.float32)
    with torch.cuda.device_of(h):
        backward[(row_tiles, chunks)](
            h, grad, head.to_h().contiguous(), slope, moments, grad_h, rows, *where, C=width, D=outputs, **options
        )
        products[(chunks, tiles, splits)](h, grad, moments, partial, rows, *where, steps, C=width, D=outputs, **options)
    return grad_h, partial.sum(0, dtype=torch.float64), grad.sum(0, dtype=torch.float64)
