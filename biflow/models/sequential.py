"""The sequential inverse of a block on a GPU: `ops.decode_block`, with what is kept from one decode to the next."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biflow import ops
from biflow.models.iterate import Caches, States, Workspace, workspace
from biflow.models.passes import CudaGraph
from biflow.ops.decode_block import (
    Condition,
    block_weights,
    call_options,
    check_block_call,
    condition,
    gpu_plan,
    packed_weights,
)

if TYPE_CHECKING:
    from biflow.models.block import Block


class State:
    """One kind of decode whose phases are launches of their own: its buffers, and all of them as one graph."""

    def __init__(self, name: tuple, weights: ops.BlockWeights, z: Tensor, given: Condition, caches: Caches):
        self.name, self.weights, self.caches = name, weights, caches
        self.z, self.x = z.new_empty(z.shape), z.new_empty(z.shape)
        self.tensors = [None if t is None else torch.empty_like(t) for t in given.tensors]
        self._options = call_options(weights, given)
        self._graph: CudaGraph | None = None

    def run(self, space: Workspace, z: Tensor, given: Condition, plan: list[int]) -> Tensor:
        for own, new in zip((self.z, *self.tensors), (z, *given.tensors), strict=True):
            if own is not None:
                own.copy_(new)
        if self._graph is None:
            self._graph = space.recorder.record(lambda: self._decode(plan))
        self._graph.replay()
        return self.x.clone()

    def _decode(self, plan: list[int]) -> None:
        tensors = (self.z, self.weights.packed, *self.tensors, self.x)
        torch.ops.biflow.decode_block_(*tensors, plan=plan, workspace=self.caches.tensors[0], **self._options)


@dataclass(eq=False)
class Sequential(States):
    """What a block keeps for its sequential decodes on a GPU: packed weights, and graphs.

    A decode is one launch, or all launches of its phases as one CUDA graph. Weights are packed anew, in place, by every
    decode; inside `frozen` once (docs/decisions/0012). Safe with streams and threads: decodes take turns on the GPU.
    """

    _weights: dict[str, ops.BlockWeights] = field(default_factory=dict)  # by precision
    _packed_in: dict[str, int | None] = field(default_factory=dict)  # which `frozen` they were packed in

    def forget(self) -> None:
        """Drop every copy of the weights, and every graph."""
        for device in {w.device for w in self._weights.values()}:
            space = workspace(device)
            with space.lock:
                space.recorder.wait()
                self.states = []
        self._weights, self._packed_in = {}, {}

    def decode(self, block: "Block", z: Tensor, precision: str, options: dict, period: int | None) -> Tensor:
        """x (B,T,D) with encode(x) = z, both in data order.

        options: the keyword arguments of `ops.decode_block`. period: counts the `frozen` that this is called in; None:
        in none.
        """
        if any(weights.device != z.device for weights in self._weights.values()):
            self.forget()  # the block has moved
        space = workspace(z.device)
        with torch.inference_mode(False), torch.no_grad(), space.lock, space.recorder.turn(z.device):
            weights, table = self._current(space, block, precision, period), block.class_embed
            live = replace(weights, class_embed=table, class_mean=None if table is None else table.mean(0))
            check_block_call("z", z, live, block.config, **options)
            if z.numel() == 0:
                return z.new_empty(z.shape)
            given = condition(live, z.shape[0], **options)
            plan, words = gpu_plan(weights, z.shape[0], given)
            if plan[0]:
                memory, x = space.allocate(lambda: (z.new_empty(words), z.new_empty(z.shape)))
                tensors = (z.contiguous(), weights.packed, *given.tensors, x)
                torch.ops.biflow.decode_block_(*tensors, plan=plan, workspace=memory, **call_options(weights, given))
                return x
            shapes = tuple(None if t is None else t.shape for t in given.tensors)
            name = (z.shape[0], precision, shapes, tuple(sorted(given.options.items())))
            state = self.take(space, name, lambda: _make_state(space, name, weights, z, given, words))
            try:
                return state.run(space, z, given, plan)
            finally:
                state.caches.give_back()

    def _current(self, space: Workspace, block: "Block", precision: str, period: int | None) -> ops.BlockWeights:
        kept = self._weights.get(precision)
        if kept is None or period is None or self._packed_in[precision] != period:
            tensors, c = block.weights(), block.config
            packed = space.allocate(lambda: packed_weights(tensors, c, precision))
            if kept is None:
                kept = self._weights[precision] = block_weights(tensors, c, precision, packed, None)
            else:
                kept.packed.copy_(packed)  # graphs read it there
            self._packed_in[precision] = period
        return kept


def _make_state(
    space: Workspace, name: tuple, weights: ops.BlockWeights, z: Tensor, given: Condition, words: int
) -> State:
    caches = space.caches((words,), (torch.float32,))
    try:
        return State(name, weights, z, given, caches)
    except BaseException:
        caches.give_back()
        raise
