"""The fixed-point iteration of one block, for `biflow.solvers`: two ops a pass, all buffers made once."""

import torch
from torch import Tensor

from biflow import ops


class BlockIterate:
    """`biflow.solvers.Iterate` of a flow block, over `ops.BlockWindows` and `ops.jacobi_update_`; see there."""

    look_every = 1  # the result of a pass is there when it returns

    def __init__(self, weights: ops.BlockWeights, draft: ops.BlockWeights | None, z: Tensor, condition: dict):
        """z (B,T,D) in data order, fp32. condition: the keyword arguments of `ops.BlockWindows`.

        draft: the same weights in a precision whose passes are faster, or None.
        """
        c, batch = weights.config, z.shape[0]
        self.has_draft = draft is not None
        self._z = z.contiguous()
        self.x = self._z.clone()
        self._windows = ops.BlockWindows(weights, c, batch, **condition)
        self._drafts = ops.BlockWindows(draft, c, batch, **condition) if draft else None
        self._moved = torch.empty(2, batch, dtype=z.dtype, device=z.device)
        names = ("shift_only", "layout", "scale", "clip", "clip_on", "flip")
        self._affine = {name: getattr(c, name) for name in names}

    @torch.no_grad()
    def update(self, start: int, stop: int, *, draft: bool = False) -> Tensor:
        """One pass over the tokens start .. stop-1 in block order; (2,B): relative update and residual.

        The tensor is overwritten by the next pass.
        """
        raw = (self._drafts if draft else self._windows)(self.x, start, stop)
        ops.jacobi_update_(self.x, self._z, raw, self._moved, start=start, stop=stop, **self._affine)
        return self._moved
