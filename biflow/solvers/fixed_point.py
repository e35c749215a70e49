"""Windowed Gauss-Seidel-Jacobi: the fixed-point inverse of one block, over the abstract `Iterate`.

x = z sigma(x) + b(x), where sigma and b of a token depend on earlier tokens only. Windows of W tokens are solved one
after the other in block order (Gauss-Seidel); within a window all tokens are updated at once from the iterate before
(Jacobi). One window of T tokens is Jacobi, windows of one token are the sequential decode.
Source: GS-Jacobi, arXiv 2505.12849; SeJD, arXiv 2505.24791.

By causality token n of a window is final after pass n + 1, whatever the coupling: after W passes the window is exact,
and pass W + 1 finds nothing to change (and gives the next window keys and values of the final tokens). The cap
therefore never exceeds W + 1. (Without a start token, and with sigma(0) = 1, the first token of a block is right from
the beginning and its first window needs one pass less.)
"""

import torch
from torch import Tensor

from biflow.solvers.protocol import TOL_FLOORS, Condition, InvertibleBlock, Iterate

# Blocks that suit the iteration converge to 1e-5 in 8 to 15 passes whatever T is, with an error that shrinks from the
# first pass on. In the others a pass settles little more than one more token: there is nothing to wait for.
MAX_PASSES = 32
# A pass over W tokens costs at most the arithmetic of W token steps, that is, one sequential decode of the window. Past
# this many passes a sample stays only if at its present rate it would converge within MAX_PASSES: one whose error does
# not shrink is given up after PATIENCE + 1 passes; one that looks as if it would and then does not runs to the cap. So
# a fallback costs at most MAX_DRAFTS drafts and MAX_PASSES passes of each window, and the sequential decode.
PATIENCE = 6
# A sample whose update is a few roundings rests: its residual is then the rounding of (x - b) / sigma, which no pass
# makes smaller, and which a small sigma makes large.
RESTING = 4 * 2.0**-23
# Drafts that have not come to their floor by then belong to a block that does not suit the iteration.
MAX_DRAFTS = 8


def fixed_point(
    block: InvertibleBlock, z: Tensor, condition: Condition, window: int, tol: float
) -> tuple[Tensor, Tensor, int]:
    """Iterate the block to the inverse of z (B,T,D) in windows of `window` tokens.

    A sample has converged in a window when update and residual of the same pass, its last, are at most tol (in the
    units of `Iterate.update`), or when it rests (RESTING). The batch goes on until every sample has converged or is
    given up: because a value is not finite (what that does to other tokens no longer matters, and samples never meet),
    because its error shrinks too slowly to meet tol within MAX_PASSES, or at the cap.

    Returns:
        x (B,T,D); converged (B,) bool, False for samples given up, whose x is garbage; passes, calls of `update`.
    """
    iterate = block.iterate(z, condition)
    live = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
    passes = 0
    for start in range(0, block.tokens, window):
        live, used, any_left = _solve_window(iterate, start, min(start + window, block.tokens), tol, live)
        passes += used
        if not any_left:
            break
    return iterate.result(), live, passes


def _solve_window(iterate: Iterate, start: int, stop: int, tol: float, live: Tensor) -> tuple[Tensor, int, bool]:
    """Samples (B,) of `live` that converged in this window, the passes it took, and whether there is such a sample.

    The host waits for the device once in `look_every` passes.
    """
    drafts = _draft_window(iterate, start, stop, live) if iterate.has_draft else 0
    cap, patience = min(stop - start + 1, MAX_PASSES), -(-PATIENCE // iterate.look_every)
    best: list[Tensor] = []  # smallest error so far (B,), at each look
    passes, waiting = 0, True
    while passes < cap and waiting:
        for _ in range(min(iterate.look_every, cap - passes)):
            measured = iterate.update(start, stop)
            passes += 1
        update, residual = measured  # NaN stays NaN, and no comparison with NaN is true
        resting = (update <= RESTING) & residual.isfinite()
        error = torch.where(resting, update, torch.maximum(update, residual))
        converged = live & (error <= tol)
        live = live & error.isfinite()
        best.append(torch.minimum(best[-1], error) if best else error)
        if len(best) > patience:
            rate = best[-1] / best[-1 - patience]
            projected = best[-1] * rate ** ((MAX_PASSES - passes) / (patience * iterate.look_every))
            # one that has converged may flicker around tol while it waits for the others: it is not given up
            live = live & ((best[-1] <= tol) | (projected <= tol))
        waiting, any_left = torch.stack([(live & ~converged).any(), converged.any()]).tolist()
    return converged, drafts + passes, any_left


def _draft_window(iterate: Iterate, start: int, stop: int, live: Tensor) -> int:
    """Draft passes until they cannot bring the samples of `live` nearer: they only choose where the others begin."""
    before = iterate.x.clone()
    most, passes, near = min(stop - start, MAX_DRAFTS), 0, False
    while passes < most and not near:
        for _ in range(min(iterate.look_every, most - passes)):
            measured = iterate.update(start, stop, draft=True)
            passes += 1
        error = measured.amax(0)
        near = not bool((live & (error > TOL_FLOORS["bf16"])).any())
    lost = ~error.isfinite()  # by bf16 alone, perhaps
    iterate.x.copy_(torch.where(lost[:, None, None], before, iterate.x))  # an index of them would have to be counted
    return passes
