"""Exact decoding: how the blocks of a flow are inverted, and a certificate of how exact the result is.

Knows blocks by `decode_sequential`, `residual` and their `config` only; models and devices are behind them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

SOLVERS = ("sequential", "auto")
PRECISIONS = ("fp32",)


@dataclass(frozen=True)
class Guidance:
    """Guidance of a decode (arXiv 2412.06329, section 3.5): scale g >= 0 (0: none), which parameters, annealing, and
    the temperature of the unconditional pass's attention."""

    scale: float = 0.0
    guide: str = "ab"
    anneal: bool = True
    attn_temp: float = 1.0

    def __post_init__(self):
        if not (self.scale >= 0 and math.isfinite(self.scale)):
            raise ValueError(f"guidance: expected a finite number >= 0, got {self.scale}")
        if self.guide not in ("a", "b", "ab"):
            raise ValueError(f"guide: expected 'a', 'b' or 'ab', got {self.guide!r}")
        if not (self.attn_temp > 0 and math.isfinite(self.attn_temp)):
            raise ValueError(f"attn_temp: expected a finite number > 0, got {self.attn_temp}")


@dataclass(frozen=True)
class DecodeInfo:
    """What a decode did.

    residual: (B,) fp32, max over blocks, tokens and channels of |G_i(x_{i-1}) - x_i|: x_i is what block i was asked to
        invert, x_{i-1} what it returned, G_i one parallel pass of that block with the same (guided) parameters.
    solver, passes: per block in encode order, the solver used and its network evaluations.
    """

    residual: Tensor
    solver: tuple[str, ...]
    passes: tuple[int, ...]


class InvertibleBlock(Protocol):
    """What the solvers need of a flow block; x and z (B,T,D) in data order."""

    def decode_sequential(self, z: Tensor, y: Tensor | None, context: Tensor | None, guidance: Guidance) -> Tensor: ...

    def residual(
        self, x: Tensor, z: Tensor, y: Tensor | None, context: Tensor | None, guidance: Guidance
    ) -> Tensor: ...


def check_options(solver: str, window: int | None, precision: str, tol: float) -> str:
    """The solver to run ("auto" resolved). ValueError on what this build does not have."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if window is not None:
        raise ValueError(f"window: expected None with solver={solver!r}, which uses no windows; got {window}")
    if not (tol > 0 and math.isfinite(tol)):
        raise ValueError(f"tol: expected a finite number > 0, got {tol}")
    return "sequential"


def decode(
    blocks: Sequence[InvertibleBlock],
    z: Tensor,
    y: Tensor | None,
    context: Tensor | None,
    guidance: Guidance,
    solver: str,
    *,
    certify: bool,
) -> tuple[Tensor, DecodeInfo | None]:
    """Invert `blocks` (encode order), last block first: z (B,T,D) -> x (B,T,D); with certify also a `DecodeInfo`."""
    residual = z.new_zeros(z.shape[0])
    for block in reversed(blocks):
        x = block.decode_sequential(z, y, context, guidance)
        if certify:
            residual = residual.maximum(block.residual(x, z, y, context, guidance))
        z = x
    if not certify:
        return z, None
    # a block without a start token leaves its first token as it is: T - 1 evaluations
    passes = tuple(b.config.tokens - (0 if b.config.start_token else 1) for b in blocks)
    return z, DecodeInfo(residual, (solver,) * len(blocks), passes)
