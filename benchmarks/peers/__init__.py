"""Other ways to decode the same flow: what ours is timed against."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from biflow.evaluate import eager_decode, eager_decode_block
from biflow.models import TarFlow


@dataclass(frozen=True)
class Peer:
    """A contestant, able to decode a flow in part.

    decode_block(i, z): the inverse of block i (encode order) of z (B,T,D), data order in and out; may overwrite z.
    decode_all(z): z (B,T,D) -> images; None: the blocks one after the other.
    notes: what its rows say about how it ran.
    """

    name: str
    decode_block: Callable[[int, Tensor], Tensor]
    decode_all: Callable[[Tensor], Tensor] | None = None
    notes: dict[str, object] = field(default_factory=dict)

    def decode(self, flow: TarFlow, z: Tensor, blocks: int) -> Tensor:
        """The first `blocks` blocks of `flow` in decode order: z (B,T,D) -> tokens (B,T,D), or images after all."""
        total = len(flow.blocks)
        with torch.inference_mode():
            if blocks == total and self.decode_all is not None:
                return self.decode_all(z)
            x = z * flow.var.sqrt()
            for i in range(total - 1, total - 1 - blocks, -1):
                x = self.decode_block(i, x)
            return x


def eager(flow: TarFlow, y: Tensor | None) -> Peer:
    """Plain eager PyTorch in the dtype of `flow`; every option of TarFlowConfig."""
    return Peer(
        "eager",
        lambda i, z: eager_decode_block(flow.blocks[i], z, y),
        lambda z: eager_decode(flow, z, y),
    )
