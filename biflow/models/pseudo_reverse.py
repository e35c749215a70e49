"""The reverse direction of a flow in parallel, and the features of its layers, for losses on what a flow computes.

Source: FlowBack (arXiv 2511.22345, section 4.2; the accelerated reverse: appendix A.2). Decoding token by token gives
back the states that the encode came by, so the parameters of all tokens can be computed at once from those. Which
weights a loss then reaches depends on how: docs/flowback.md has the table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from biflow.models.layers import check_floats, check_pairs, check_range
from biflow.models.tarflow import TarFlow
from biflow.solvers import solve_adjoint

CONTEXTS = ("cached", "live")


@dataclass(frozen=True)
class ReverseTrajectory:
    """What `pseudo_reverse` came by.

    states: by i, x_i (B,T,D) in data order: x_B = z, then x_{B-1}, ..., x_until. The numbers of the encode.
    features: by (block, layer) as asked, the residual stream (B,T,C) after that layer, in data order, without the
        tokens of class and context. Row t is where the network read token t; with a start token, where it read the one
        before t in the block's order.
    """

    states: dict[int, Tensor]
    features: dict[tuple[int, int], Tensor]


def pseudo_reverse(
    flow: TarFlow,
    x: Tensor | Sequence[Tensor],
    y: Tensor | None = None,
    context_tokens: Tensor | None = None,
    *,
    context: str = "cached",
    features: Iterable[tuple[int, int]] = (),
    until: int = 0,
) -> ReverseTrajectory:
    """From z back to x with a graph, all tokens at once: x_{t-1} = mu_t(c) + sigma_t(c) x_t, from x_B = sg(z) down.

    sg stops the gradient; mu_t, sigma_t are what block t's network makes of the tokens before each one in c, which is

    - context="cached": sg(x_{t-1}) of the encode (arXiv 2511.22345, appendix A.2). Features are functions of c and
      block t's weights, so a loss on them reaches those weights only. States reach the blocks from t on.
    - context="live": x_{t-1} itself, the state that this equation is solved for. Its value is known, so nothing is
      iterated on the way down; its derivative is that of the true inverse, dx = (I - dg/dx)^-1 (dg/du du + dg/dw dw)
      with g(x, u, w) = mu(x) + sigma(x) u, whose transposed system the backward pass solves by at most T - 1
      vector-Jacobian products (`solvers.solve_adjoint`). Features are those of a second pass of the layers, over
      x_{t-1}, so a loss on them reaches the blocks from t on, by the gradient that differentiating a decode token by
      token would give. Under autocast the series of products ends at the rounding of autocast's dtype.

    Args:
        flow: the model, in fp32 or fp64 (others work, but each affine step rounds the state anew), also under autocast.
        x: images (B,C,H,W), which are encoded first, without a graph; or x_0, ..., x_B as
            `flow.encode(x, y, return_states=True)` returned them, whose own graph is left alone.
        y, context_tokens: labels and context, as `y` and `context` of the encode, and the same.
        context: "cached" or "live", see above.
        features: pairs (block, layer) of which to return the features, both from 0, blocks in encode order.
        until: the last block to go through; the blocks before it are not run.

    Returns:
        `ReverseTrajectory`. Under torch.no_grad() values only. First derivatives only.

    Raises:
        TypeError, ValueError: as `encode`; an unknown context; a block or layer that is not there; a wrong number of
            states.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context: expected one of {', '.join(CONTEXTS)}, got {context!r}")
    check_range("until", until, len(flow.blocks))
    wanted = _by_block(check_pairs("features", features, flow.blocks, until))
    cached = _trajectory(flow, x, y, context_tokens)
    states, kept = {len(flow.blocks): cached[-1]}, {}
    u = cached[-1] * flow.var.sqrt().to(cached[-1].dtype)
    for index in reversed(range(until, len(flow.blocks))):
        block, layers = flow.blocks[index], wanted.get(index, ())
        flip, given, live = block.config.flip, cached[index], context == "live"
        u, given = (u.flip(1), given.flip(1)) if flip else (u, given)
        if live and torch.is_grad_enabled():
            given = given.detach().requires_grad_()
        prefix = block.project_context(context_tokens, len(given))
        raw, found = block.features(given, y, prefix, () if live else layers)
        u = block.affine_inverse(u, raw)
        if live:
            u = _Inverse.apply(u, given)
            if layers:
                _, found = block.features(u, y, prefix, layers, alone=True)
        u = u.flip(1) if flip else u
        states[index] = u
        kept |= {(index, layer): h.flip(1) if flip else h for layer, h in found.items()}
    return ReverseTrajectory(states, kept)


def detached_features(
    flow: TarFlow,
    states: Sequence[Tensor],
    y: Tensor | None = None,
    context_tokens: Tensor | None = None,
    *,
    features: Iterable[tuple[int, int]],
) -> dict[tuple[int, int], Tensor]:
    """Features (B,T,C), by (block, layer), of blocks whose inputs are detached: a loss on them reaches its block only.

    The bits of `pseudo_reverse(context="cached")` without the reverse: of each block the layers up to the last one that
    is asked for. Arguments, order and errors as there, states x_0, ..., x_B as `flow.encode` returned them.
    """
    kept = {}
    wanted = _by_block(check_pairs("features", features, flow.blocks))
    given = _trajectory(flow, list(states), y, context_tokens)
    for index, layers in wanted.items():
        block, flip = flow.blocks[index], flow.blocks[index].config.flip
        prefix = block.project_context(context_tokens, len(given[index]))
        _, found = block.features(given[index].flip(1) if flip else given[index], y, prefix, layers, alone=True)
        kept |= {(index, layer): h.flip(1) if flip else h for layer, h in found.items()}
    return kept


def _by_block(pairs: Iterable[tuple[int, int]]) -> dict[int, set[int]]:
    """Block -> its layers."""
    found: dict[int, set[int]] = {}
    for block, layer in pairs:
        found.setdefault(block, set()).add(layer)
    return found


class _Inverse(torch.autograd.Function):
    """x = g(x, u, w) as a function of u and w, from g(c, u, w) at c = x: the identity, with the inverse's gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, given: Tensor) -> Tensor:
        ctx.save_for_backward(x, given)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.eps = max(torch.finfo(dtype).eps, torch.finfo(x.dtype).eps)  # of the products that made x, and its own
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        x, given = ctx.saved_tensors  # x with the graph that made it of `given`, u and w

        def transposed(v: Tensor) -> Tensor:
            return torch.autograd.grad(x, given, v, retain_graph=True)[0]

        return solve_adjoint(transposed, grad, given.shape[1] - 1, ctx.eps), None


def _trajectory(flow: TarFlow, x: Tensor | Sequence[Tensor], y: Tensor | None, context: Tensor | None) -> list[Tensor]:
    """x_0, ..., x_B (B,T,D) without a graph."""
    if isinstance(x, Tensor):
        with torch.no_grad():
            return flow.encode(x, y, context, return_states=True)[2]
    if not isinstance(x, list | tuple):
        raise TypeError(f"x: expected images or the states of an encode, got {type(x).__name__}")
    c, weight = flow.config, flow.blocks[0].proj_in.weight
    if len(x) != len(flow.blocks) + 1:
        raise ValueError(f"x: expected {len(flow.blocks) + 1} states (num_blocks + 1), got {len(x)}")
    for index, state in enumerate(x):
        check_floats(f"x[{index}]", state, (len(x[0]) if index else None, c.tokens, c.channels), weight)
    flow._check_condition(y, context, len(x[0]))
    return [state.detach() for state in x]
