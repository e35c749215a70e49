"""The fixed-point iteration of one block, for `biflow.solvers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biflow.solvers import Condition

if TYPE_CHECKING:
    from biflow.models.block import Block


class BlockIterate:
    """`biflow.solvers.Iterate` of a flow block; see there.

    A pass computes the parameters of the tokens before the window anew, from their present values.
    """

    look_every = 1  # the result of a pass is there when it returns

    def __init__(self, block: Block, z: Tensor, condition: Condition):
        """z (B,T,D) in data order, fp32."""
        self._block, self._condition = block, condition
        self._prefix = block.project_context(condition.context, z.shape[0])
        self._z = z.flip(1) if block.config.flip else z  # block order, as all tensors of this class
        self._x = self._z.clone()

    @property
    def x(self) -> Tensor:
        """(B,T,D) in data order."""
        return self._x.flip(1) if self._block.config.flip else self._x

    @torch.no_grad()
    def update(self, start: int, stop: int) -> Tensor:
        """One pass over the tokens start .. stop-1 in block order; (2,B): relative update and residual."""
        old, z = self._x[:, :stop], self._z[:, :stop]
        raw = self._block.guided_params(old, self._condition, self._prefix)
        new = self._block.affine_inverse(z, raw)[:, start:]
        back = self._block.affine(old, raw)[0][:, start:]
        old, z = old[:, start:], z[:, start:]
        update = (new - old).abs() / new.abs().clamp_min(1)
        residual = (back - z).abs() / z.abs().clamp_min(1)
        measured = torch.stack([update.flatten(1).amax(1), residual.flatten(1).amax(1)])
        self._x[:, start:stop] = new
        return measured.masked_fill(~measured.isfinite(), torch.nan)
