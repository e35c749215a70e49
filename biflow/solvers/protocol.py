"""What the solvers ask of a flow block, and what a decode is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from biflow.config import check_fields, check_number

SOLVERS = ("sequential", "jacobi", "windowed", "auto")
PRECISIONS = ("fp32", "bf16")
TOL = 1e-5  # of a decode, unless told otherwise
WINDOW = 16  # tokens a window, unless told otherwise: the fewest for which the pass that confirms a window is no waste
# The least tolerance that each precision can meet. Passes in bf16 never come to rest: a change of x far below the
# spacing of bf16 moves some roundings, and those move x by 2e-3 to 4e-3 (docs/measured.md).
TOL_FLOORS = {"fp32": 0.0, "bf16": 1e-2}


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
        check_number("guidance", self.scale, minimum=0, single=True)  # the name it has in decode
        check_fields(self)
        if self.guide not in ("a", "b", "ab"):
            raise ValueError(f"guide: expected 'a', 'b' or 'ab', got {self.guide!r}")
        check_number("attn_temp", self.attn_temp, above=0, single=True)


@dataclass(frozen=True)
class Condition:
    """All that a decode is conditioned on.

    y: (B,) int64 or None; context: (B,S,context_dim) or None; guidance; precision: of the decode, in `PRECISIONS`.
    """

    y: Tensor | None = None
    context: Tensor | None = None
    guidance: Guidance = Guidance()
    precision: str = "fp32"

    def rows(self, index: Tensor) -> Condition:
        """The condition of the samples `index` (n,) int64."""
        y, context = (None if t is None else t[index] for t in (self.y, self.context))
        return replace(self, y=y, context=context)


class Iterate(Protocol):
    """A fixed-point iteration towards the inverse of one block for one batch; it owns its buffers.

    look_every: passes after which a host that reads the result of `update` does not hold up the device: 1 on a CPU.
    has_draft: whether passes in a lower, faster precision are worth making before those that count.
    """

    look_every: int
    has_draft: bool

    @property
    def x(self) -> Tensor:
        """(B,T,D) in data order, the current iterate; z before the first pass. The solver may write into it."""

    def update(self, start: int, stop: int, *, draft: bool = False) -> Tensor:
        """One Jacobi pass over the tokens start .. stop-1 in BLOCK order, 0 <= start < stop <= T; (2,B) fp32.

        raw = the network's parameters of these tokens for x as it was before this pass; keys and values of the tokens
        before start may be those of their own last pass. x becomes x_new = z sigma(raw) + b on these tokens and is
        left alone elsewhere.

        Row 0: max |x_new - x_old| / max(1, |x_new|) over these tokens and their channels. Row 1: max |G(x_old) - z| /
        max(1, |z|) with the same raw. NaN where one of them is not finite. The next pass may overwrite the result.
        draft: in the lower precision; keys and values before start are then those of the last draft pass.
        """

    def result(self) -> Tensor:
        """x, the caller's own. The last call: buffers may then serve another iteration."""


class InvertibleBlock(Protocol):
    """What the solvers need of a flow block; x and z (B,T,D) in data order."""

    @property
    def tokens(self) -> int:
        """T."""

    @property
    def sequential_passes(self) -> int:
        """Network evaluations of `decode_sequential`, one a token."""

    def decode_sequential(self, z: Tensor, condition: Condition) -> Tensor:
        """x with G(x) = z, token by token. On a CPU a sample's bits do not depend on the batch."""

    def residual(self, x: Tensor, z: Tensor, condition: Condition) -> Tensor:
        """(B,) max |G(x) - z| over tokens and channels, by one parallel pass in fp32 with the guided parameters."""

    def iterate(self, z: Tensor, condition: Condition) -> Iterate: ...


def effective_tol(tol: float, precision: str) -> float:
    """The tolerance that an iterative solver works to: `tol`, or the least that the precision can meet (bf16: 1e-2)."""
    return max(tol, TOL_FLOORS[precision])
