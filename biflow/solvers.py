"""Exact decoding: how the blocks of a flow are inverted, and a certificate of how exact the result is.

Knows blocks by the protocol `InvertibleBlock` only; models and devices are behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from biflow.config import check_fields, check_number

SOLVERS = ("sequential", "auto")
PRECISIONS = ("fp32",)


@dataclass(frozen=True)
class Guidance:
    """Guidance of a decode (arXiv 2412.06329, section 3.5).

    scale: g >= 0; 0 means none. guide: which raw parameters it moves, "a" (scale), "b" (shift) or "ab".
    anneal: g t / max(T - 1, 1) for the token of index t in block order. attn_temp: > 0, divides the attention logits
    of the unconditional pass.
    """

    scale: float = 0.0
    guide: str = "ab"
    anneal: bool = True
    attn_temp: float = 1.0

    def __post_init__(self):
        check_number("guidance", self.scale, minimum=0)  # the name it has in decode
        check_fields(self)
        if self.guide not in ("a", "b", "ab"):
            raise ValueError(f"guide: expected 'a', 'b' or 'ab', got {self.guide!r}")
        check_number("attn_temp", self.attn_temp, above=0)


@dataclass(frozen=True)
class DecodeInfo:
    """What a decode did.

    residual: (B,) fp32, max over blocks, tokens and channels of |G_i(x_{i-1}) - x_i|: x_i is what block i was asked to
        invert, x_{i-1} what it returned, G_i one parallel pass of that block with the same (guided) parameters. NaN
        or infinite where the decode overflowed.
    solver, passes: per block in encode order, the solver used and how often it evaluated the network (each time twice
        under guidance: conditionally and not).
    """

    residual: Tensor
    solver: tuple[str, ...]
    passes: tuple[int, ...]


class InvertibleBlock(Protocol):
    """What the solvers need of a flow block; x and z (B,T,D) in data order."""

    @property
    def sequential_passes(self) -> int:
        """Network evaluations of `decode_sequential`."""

    def decode_sequential(self, z: Tensor, y: Tensor | None, context: Tensor | None, guidance: Guidance) -> Tensor: ...

    def residual(
        self, x: Tensor, z: Tensor, y: Tensor | None, context: Tensor | None, guidance: Guidance
    ) -> Tensor: ...


def check_options(solver: str, window: int | None, tol: float) -> str:
    """The solver to run ("auto" resolved). ValueError on what this build does not have."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    if window is not None:
        raise ValueError(f"window: expected None with solver={solver!r}, which uses no windows; got {window!r}")
    check_number("tol", tol, above=0)
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
    """Invert `blocks` (encode order), last block first: z (B,T,D) -> x (B,T,D); with certify also a `DecodeInfo`.

    solver: a resolved name, from `check_options`. The certificate costs one parallel pass (two under guidance) a block.
    """
    residual = z.new_zeros(z.shape[0])
    for block in reversed(blocks):
        x = block.decode_sequential(z, y, context, guidance)
        if certify:
            residual = residual.maximum(block.residual(x, z, y, context, guidance))
        z = x
    if not certify:
        return z, None
    return z, DecodeInfo(residual, (solver,) * len(blocks), tuple(block.sequential_passes for block in blocks))
