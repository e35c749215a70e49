"""The exact inverse of one flow block in plain torch; formulas and shapes: biflow.ops.decode_block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biflow.reference.block_params import Weights, block_params
from biflow.reference.jacobi_update import inverse

if TYPE_CHECKING:
    from biflow.ops.decode_block import BlockConfig


def decode_block(
    z: Tensor,
    weights: Weights,
    config: BlockConfig,
    *,
    y: Tensor | None = None,
    context: Tensor | None = None,
    null_context: Tensor | None = None,
    guidance: float = 0.0,
    guide: str = "ab",
    anneal: bool = True,
    attn_temp: float = 1.0,
) -> Tensor:
    """T whole parallel passes: token n from the pass over the tokens before it."""
    x = torch.zeros_like(z)
    for n in range(config.tokens):
        raw = block_params(
            x,
            weights,
            config,
            y=y,
            context=context,
            null_context=null_context,
            guidance=guidance,
            guide=guide,
            anneal=anneal,
            attn_temp=attn_temp,
        )
        t = config.tokens - 1 - n if config.flip else n
        new = inverse(
            z[:, t : t + 1],
            raw[:, t : t + 1],
            shift_only=config.shift_only,
            layout=config.layout,
            scale=config.scale,
            clip=config.clip,
            clip_on=config.clip_on,
        )
        x = torch.cat([x[:, :t], new, x[:, t + 1 :]], 1)
    return x
