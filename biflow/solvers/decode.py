"""All blocks of a flow, each by its solver, with per-sample fallback and certificate."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from biflow.config import check_number
from biflow.solvers.fixed_point import fixed_point
from biflow.solvers.policy import Method
from biflow.solvers.protocol import SOLVERS, WINDOW, Condition, InvertibleBlock, effective_tol


@dataclass(frozen=True)
class DecodeInfo:
    """What a decode did. Tuples are per block in encode order.

    residual: (B,) fp32, max over blocks, tokens and channels of |G_i(x_{i-1}) - x_i|: x_i is what block i was asked to
        invert, x_{i-1} what it returned, G_i one parallel pass of that block with the same (guided) parameters. NaN
        or infinite where the decode overflowed.
    solver: "sequential", "jacobi" or "windowed".
    window: tokens a window; None unless windowed.
    passes: how often the network was evaluated, whatever the number of tokens in one evaluation: once a token by the
        sequential solver, once a pass over a window by the others (draft passes in bf16 included,
        docs/decisions/0009), and the sum of both where samples fell back.
        Guidance makes two passes of each (conditional and unconditional), which count once.
    fallbacks: indices of the samples that did not converge and were decoded sequentially, ascending.
    """

    residual: Tensor
    solver: tuple[str, ...]
    window: tuple[int | None, ...]
    passes: tuple[int, ...]
    fallbacks: tuple[tuple[int, ...], ...]


def check_options(solver: str, window: int | None, tol: float) -> Method | None:
    """The method that was asked for, None for "auto". TypeError or ValueError on options that do not fit."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    check_number("tol", tol, above=0, single=True)
    if solver == "auto":
        if window is not None:
            raise ValueError(f"window: expected None with solver='auto', which chooses the windows; got {window!r}")
        return None
    return Method(solver, WINDOW if solver == "windowed" and window is None else window)


def solve(
    block: InvertibleBlock, z: Tensor, condition: Condition, method: Method, tol: float
) -> tuple[Tensor, int, tuple[int, ...]]:
    """Invert one block: x (B,T,D) with G(x) = z, network evaluations and fallbacks as in `DecodeInfo`.

    Samples on which the iteration fails are decoded sequentially; on a CPU to the bits that the sequential solver gives
    the whole batch.
    """
    if method.solver == "sequential":
        return block.decode_sequential(z, condition), block.sequential_passes, ()
    window = block.tokens if method.window is None else method.window
    x, converged, passes = fixed_point(block, z, condition, window, effective_tol(tol, condition.precision))
    failed = (~converged).nonzero().flatten()
    if len(failed) == 0:
        return x, passes, ()
    exact = block.decode_sequential(z[failed], condition.rows(failed))
    return x.index_copy(0, failed, exact), passes + block.sequential_passes, tuple(failed.tolist())


def decode(
    blocks: Sequence[InvertibleBlock],
    z: Tensor,
    condition: Condition,
    plan: Sequence[Method],
    tol: float,
    *,
    certify: bool,
) -> tuple[Tensor, DecodeInfo | None]:
    """Invert `blocks` (encode order), last block first: z (B,T,D) -> x (B,T,D); with certify also a `DecodeInfo`.

    plan: the method of each block in encode order; windows of T tokens and more are Jacobi.
    tol: of the iterative solvers. The certificate costs one parallel pass (two under guidance) a block.
    """
    residual = z.new_zeros(z.shape[0])
    plan = [
        Method("jacobi") if method.window is not None and method.window >= block.tokens else method
        for method, block in zip(plan, blocks, strict=True)
    ]
    done = []
    for block, method in zip(reversed(blocks), reversed(plan), strict=True):
        x, passes, fallbacks = solve(block, z, condition, method, tol)
        done.append((method.solver, method.window, passes, fallbacks))
        if certify:
            residual = residual.maximum(block.residual(x, z, condition))
        z = x
    return z, DecodeInfo(residual, *zip(*reversed(done), strict=True)) if certify else None
