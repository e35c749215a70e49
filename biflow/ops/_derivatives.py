"""Derivatives of a gradient that a kernel computes: those of the same gradient in torch's functions."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def of_gradient(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Differentiates J^T grads, J the Jacobian of function(*inputs), in the direction of `cotangents`.

    Args:
        function: of the inputs, made of torch's functions.
        inputs, grads: what the gradient was computed from; None: absent, as an input or as a zero gradient.
        cotangents: one for each input, of the gradient with respect to it; None: zero.

    Returns:
        the derivatives with respect to inputs and grads; with a graph where the caller builds one.
    """
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs, grads = ([_leaf(t, further) for t in ts] for ts in (inputs, grads))
        results = function(*inputs)
        present = [t for t in inputs if t is not None]
        pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        first = torch.autograd.grad(
            [r for r, _ in pairs], present, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
        cotangents = [c for t, c in zip(inputs, cotangents, strict=True) if t is not None]
        known = [(f, c) for f, c in zip(first, cotangents, strict=True) if f is not None and c is not None]
        wanted = present + [g for g in grads if g is not None]
        found = iter(
            torch.autograd.grad(
                [f for f, _ in known], wanted, [c for _, c in known], create_graph=further, allow_unused=True
            )
        )
    return tuple([None if t is None else next(found) for t in ts] for ts in (inputs, grads))


def _leaf(t: Tensor | None, further: bool) -> Tensor | None:
    if t is None:
        return None
    return t.view_as(t) if further and t.requires_grad else t.detach().requires_grad_()
