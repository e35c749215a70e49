"""What both transformers share: the layer, its norms and gates, rotary tables, patches, class tables, input checks."""

import contextlib
import functools
import math
import numbers
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from biflow import ops
from biflow.config import check_number
from biflow.ops._checks import DEVICES, no_kernels

NORM_EPS = {"layernorm": 1e-5, "rmsnorm": 1e-6}
ROPE_THETA = 1e4


class Norm(nn.Module):
    """LayerNorm (weight, bias; eps 1e-5) or RMSNorm (weight; eps 1e-6) over the last dimension.

    x (..., width) any float dtype -> the same shape in `dtype` (None: x's); computed in fp32 (fp64 for fp64).
    """

    def __init__(self, kind: str, width: int):
        super().__init__()
        if kind not in NORM_EPS:
            raise ValueError(f"norm: expected one of {', '.join(NORM_EPS)}, got {kind!r}")
        self.kind, self.eps = kind, NORM_EPS[kind]
        self.weight = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if kind == "layernorm" else None)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return ops.norm(x, self.weight, self.bias, kind=self.kind, eps=self.eps, dtype=dtype)

    def add(self, x: Tensor, h: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The norm of x + h, and x + h, in one pass where there is a kernel."""
        return ops.add_norm(x, h, self.weight, self.bias, kind=self.kind, eps=self.eps, dtype=dtype)


class Layer(nn.Module):
    """Pre-norm transformer layer: h + proj(attention(norm1 h)), then h + fc2(gate(fc1(norm2 h))).

    Args:
        width, head_dim: C and d; width must be a multiple of head_dim.
        mlp_hidden: F, the hidden width of the MLP.
        norm: "layernorm" | "rmsnorm".
        gate: "gelu" (exact) | "swiglu" (silu(first half) * second half; fc1 writes 2F).
        qk_norm: RMSNorm over each head's channels of q and k, before the rotary embedding.
    """

    def __init__(self, width: int, head_dim: int, mlp_hidden: int, norm: str, gate: str, qk_norm: bool):
        super().__init__()
        self.heads = width // head_dim
        self.head_dim = head_dim
        self.gate = gate
        self.norm1 = Norm(norm, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = Norm("rmsnorm", head_dim) if qk_norm else None
        self.k_norm = Norm("rmsnorm", head_dim) if qk_norm else None
        self.proj = nn.Linear(width, width)
        self.norm2 = Norm(norm, width)
        self.fc1 = nn.Linear(width, 2 * mlp_hidden if gate == "swiglu" else mlp_hidden)
        self.fc2 = nn.Linear(mlp_hidden, width)

    def forward(
        self,
        h: Tensor,
        delta: Tensor | None,
        rope: tuple[Tensor, Tensor] | None,
        *,
        causal: bool,
        prefix: int = 0,
        attn_temp: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream h (B,N,C) and what is yet to be added to it, delta (None: nothing) -> both after it.

        Their sum is the layer's result: the next layer's first norm adds them in the pass in which it reads them.
        rope: tables (N - prefix, d/2), or None; the first `prefix` tokens are not rotated. attn_temp divides the
        attention logits.
        """
        dtype = input_dtype(self.qkv)  # in bf16 passes and under autocast not the residual stream's
        if delta is None:
            x = self.norm1(h, dtype)
        else:
            x, h = self.norm1.add(delta, h, dtype)
        q_norm, k_norm = (None, None) if self.q_norm is None else (self.q_norm.weight, self.k_norm.weight)
        o = ops.attention_qkv(
            self.qkv(x),
            heads=self.heads,
            causal=causal,
            scale=self.head_dim**-0.5 / attn_temp,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=NORM_EPS["rmsnorm"],
            rope=rope,
            prefix=prefix,
        )
        x, h = self.norm2.add(self.proj(o), h, dtype)
        x = self.fc1(x)
        x = ops.gate(x, self.gate)
        return h, self.fc2(x)


def layers_in(dtype: torch.dtype | None, device: torch.device) -> contextlib.AbstractContextManager:
    """Within, layers multiply in `dtype` whatever their weights' is; None: as they would."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype, cache_enabled=False)


def input_dtype(linear: nn.Linear) -> torch.dtype:
    """The dtype in which a linear layer multiplies what it gets: its weight's, or autocast's."""
    own, kind = linear.weight.dtype, linear.weight.device.type
    return torch.get_autocast_dtype(kind) if own != torch.float64 and torch.is_autocast_enabled(kind) else own


def mlp_width(ratio: float, width: int) -> int:
    """Hidden width of the MLP: ratio * width rounded to a multiple of 8, which vector loads divide; at least 8."""
    return max(8 * round(ratio * width / 8), 8)


def check_size(name: str, value: int, least: int = 1) -> None:
    """ValueError unless least <= value < 2^24: products of two sizes stay far from the limits of 64-bit counts."""
    if value < least:
        raise ValueError(f"{name}: expected {'at least 1' if least else '0 or more'}, got {value}")
    if value >= 2**24:
        raise ValueError(f"{name}: expected less than 2^24, got {value}")


def check_grid(img_size: int, in_channels: int, patch_size: int) -> None:
    """Raises ValueError unless images (in_channels, img_size, img_size) split into patches."""
    for name, value in (("img_size", img_size), ("in_channels", in_channels), ("patch_size", patch_size)):
        check_size(name, value)
    if img_size % patch_size:
        raise ValueError(f"img_size: expected a multiple of patch_size {patch_size}, got {img_size}")
    check_size("(img_size / patch_size)^2", (img_size // patch_size) ** 2)
    check_size("in_channels patch_size^2", in_channels * patch_size**2)


def check_transformer(
    width: int, head_dim: int, mlp_ratio: float, norm: str, gate: str, *, largest_head: int | None = None
) -> None:
    """Raises ValueError on a width, head_dim, mlp_ratio, norm or gate that `Layer` does not take.

    largest_head: largest head_dim; None: any.
    """
    check_size("width", width)
    check_size("head_dim", head_dim)
    if width % head_dim:
        raise ValueError(f"width: expected a multiple of head_dim {head_dim}, got {width}")
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, got {head_dim}")
    if largest_head is not None and head_dim > largest_head:
        raise ValueError(f"head_dim: expected at most {largest_head}, the limit of exact decoding, got {head_dim}")
    check_number("mlp_ratio", mlp_ratio, above=0)
    check_size("mlp_ratio * width", mlp_width(mlp_ratio, width))
    if norm not in NORM_EPS:
        raise ValueError(f"norm: expected one of {', '.join(NORM_EPS)}, got {norm!r}")
    if gate not in ("gelu", "swiglu"):
        raise ValueError(f"gate: expected 'gelu' or 'swiglu', got {gate!r}")


def rope_tables(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (side * side, head_dim / 2): axial rotary angles of a square token grid, row-major.

    The first half of the channel pairs turns with the row, the rest with the column; frequencies theta^(-i/n), theta
    = 1e4, n pairs an axis (RoFormer, arXiv 2104.09864; axial form as in STARFlow, arXiv 2506.06276).
    """
    pairs = head_dim // 2
    by_row = (pairs + 1) // 2
    position = torch.arange(side, dtype=torch.float64)

    def angles(n: int) -> Tensor:
        return position[:, None] * ROPE_THETA ** (-torch.arange(n, dtype=torch.float64) / max(n, 1))

    rows = angles(by_row)[:, None, :].expand(side, side, by_row)
    columns = angles(pairs - by_row)[None, :, :].expand(side, side, pairs - by_row)
    angle = torch.cat([rows, columns], dim=-1).reshape(side * side, pairs)
    return angle.cos().float(), angle.sin().float()


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images (B,C,H,W) -> tokens (B, (H/P)(W/P), C P^2); features ordered (channel, row, column), tokens row-major.

    Square images; H = W a multiple of P.
    """
    batch, channels, side = x.shape[0], x.shape[1], x.shape[2] // patch
    grid = x.reshape(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    return grid.reshape(batch, side * side, channels * patch**2)


def unpatchify(tokens: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square images."""
    batch, length, width = tokens.shape
    side, channels = math.isqrt(length), width // patch**2
    grid = tokens.reshape(batch, side, side, channels, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(batch, channels, side * patch, side * patch)


def class_rows(table: Tensor, y: Tensor | None, batch: int) -> Tensor:
    """Rows (batch, K, C) of a class table (N, K, C); y (B,) int64, negative or None: the mean over classes."""
    mean = table.mean(dim=0, keepdim=True)
    if y is None:
        return mean.expand(batch, -1, -1)
    return torch.where((y < 0).view(-1, 1, 1), mean, table[y.clamp_min(0)])


@functools.cache
def device_name(device: torch.device) -> str:
    """The name that the maker gave the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def device_clock(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """`clock`, read when the device has done all that it was given: a call to a GPU returns before its work is done."""
    if device.type != "cuda":
        return clock

    def read() -> float:
        torch.cuda.synchronize(device)
        return clock()

    return read


# --- checks at the models' entry points. Those of values wait for the GPU: they are skipped while a graph is recorded.


def recording() -> bool:
    """Whether torch.compile traces this code or a CUDA graph records it."""
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def check_range(name: str, value: int, end: int, start: int = 0) -> None:
    """TypeError, ValueError unless `value` is an int in [start, end)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if not start <= value < end:
        raise ValueError(f"{name}: expected {start} to {end - 1}, got {value}")


def check_pairs(
    name: str, pairs: Iterable[tuple[int, int]], blocks: Sequence[nn.Module], start: int = 0
) -> list[tuple[int, int]]:
    """(block, layer) pairs of a flow's blocks from `start` on; TypeError, ValueError where there is none."""
    pairs = list(pairs)
    for block, layer in pairs:
        check_range(f"{name}: block", block, len(blocks), start)
        check_range(f"{name}: layer of block {block}", layer, len(blocks[block].layers))
    return pairs


def check_count(name: str, n: int) -> int:
    """n as an int: an integer of Python or NumPy, 0 or more."""
    if not isinstance(n, numbers.Integral) or isinstance(n, bool):
        raise TypeError(f"{name}: expected an int, got {type(n).__name__} {n!r}")
    if n < 0:
        raise ValueError(f"{name}: expected 0 or more, got {n}")
    return int(n)


def check_generator(generator: torch.Generator | None) -> None:
    """generator: a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__} {generator!r}")


def check_kernels(weight: Tensor) -> None:
    """The model (by one of its parameters) is on a device that the ops of a flow have kernels for."""
    if weight.device.type not in DEVICES:
        raise ValueError(f"expected a model on {' or '.join(DEVICES)}: {no_kernels(weight.device.type)}")


def check_labels(y: Tensor | None, num_classes: int, batch: int, device: torch.device) -> None:
    """y: None, or (batch,) int64 on `device` with values in [-1, num_classes)."""
    if y is None:
        return
    if num_classes == 0:
        raise ValueError("y: expected None for a model without classes (num_classes=0), got labels")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y: expected an int64 tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    if y.shape != (batch,):
        raise ValueError(f"y: expected shape ({batch},), got {tuple(y.shape)}")
    if y.device != device:
        raise ValueError(f"y: expected a tensor on {device}, got one on {y.device}")
    if batch == 0 or recording():
        return
    low, high = torch.stack(torch.aminmax(y)).tolist()
    if low < -1 or high >= num_classes:
        raise ValueError(
            f"y: expected labels in [0, {num_classes}) or -1 (unconditional), got values in [{low}, {high}]"
        )


def check_floats(name: str, x: Tensor, shape: tuple[int | None, ...], weight: Tensor) -> None:
    """x: a finite floating-point tensor of the given shape (None: any size), of the model's dtype and device.

    weight: a parameter of the model. Under autocast x may have any dtype but float64.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if x.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        want = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape ({want}), got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{name}: expected a tensor on {weight.device}, where the model is; got one on {x.device}")
    autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not autocast:
        raise TypeError(f"{name}: expected {weight.dtype}, the model's dtype; got {x.dtype}")
    if not recording() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name}: expected finite values, got {bad} NaN or infinite of {x.numel()}")


def check_decoding(precision: str, available: tuple[str, ...], weight: Tensor) -> None:
    """The precision is one of those available, and the model (by one of its parameters) is fp32."""
    if precision not in available:
        raise ValueError(f"precision: expected one of {', '.join(available)}, got {precision!r}")
    if weight.dtype != torch.float32:
        raise TypeError(f"decode: expected a model of torch.float32 weights, got {weight.dtype}; convert by .float()")
