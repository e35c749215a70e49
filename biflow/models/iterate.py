"""The fixed-point iteration of one block, for `biflow.solvers`: two ops a pass, over buffers that are made once.

On a GPU both are one CUDA graph for each window, kept with their buffers from one decode to the next.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from biflow import ops
from biflow.models.passes import CudaGraph, CudaRecorder, places_of
from biflow.ops._block_pass import DTYPES, BlockPass, cache_shape
from biflow.ops.decode_block import block_weights, check_block_call, condition, plain_weights

if TYPE_CHECKING:
    from biflow.models.block import Block

MAX_STATES = 4  # of one block; the one used longest ago goes first
MAX_GRAPHS = 512  # of one state: later windows are called without; at T = 1024 windows of one token would be 2048


def _affine_options(config: ops.BlockConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("shift_only", "layout", "scale", "clip", "clip_on", "flip")}


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
        self._affine = _affine_options(c)

    @torch.no_grad()
    def update(self, start: int, stop: int, *, draft: bool = False) -> Tensor:
        """One pass over the tokens start .. stop-1 in block order; (2,B): relative update and residual.

        The tensor is overwritten by the next pass.
        """
        raw = (self._drafts if draft else self._windows)(self.x, start, stop)
        ops.jacobi_update_(self.x, self._z, raw, self._moved, start=start, stop=stop, **self._affine)
        return self._moved

    def result(self) -> Tensor:
        return self.x


# --- on a GPU -------------------------------------------------------------------------------------------------------


class Caches:
    """Memory for keys and values, one tensor a precision: of many blocks, and of one iteration at a time."""

    def __init__(self, name: tuple, tensors: list[Tensor]):
        self.name, self.tensors, self.taken = name, tensors, True

    def give_back(self) -> None:
        self.taken = False


class Workspace:
    """What all iterations on a device share: the recorder, whose calls take turns on the GPU, and the caches."""

    def __init__(self, device: torch.device):
        self.device, self.lock, self.recorder = device, threading.RLock(), CudaRecorder()
        self._caches: weakref.WeakSet[Caches] = weakref.WeakSet()  # those of the blocks' states
        self.users: weakref.WeakSet[States] = weakref.WeakSet()

    def caches(self, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Caches:
        """Caches that no iteration has, now taken."""
        name = (shape, dtypes)
        for caches in self._caches:
            if caches.name == name and not caches.taken:
                caches.taken = True
                return caches
        caches = Caches(name, [torch.zeros(shape, dtype=dtype, device=self.device) for dtype in dtypes])
        self._caches.add(caches)
        return caches

    def allocate(self, make: Callable):
        """make(), once more without the memory of all states that nobody uses if there is not enough."""
        try:
            return make()
        except torch.OutOfMemoryError:  # other kinds of decode may hold it
            pass
        for user in self.users:
            user.keep(self, [s for s in user.states if s.caches.taken])
        torch.cuda.empty_cache()
        return make()


_WORKSPACES: dict[torch.device, Workspace] = {}
_MAKING = threading.Lock()


def workspace(device: torch.device) -> Workspace:
    with _MAKING:
        if device not in _WORKSPACES:
            _WORKSPACES[device] = Workspace(device)
        return _WORKSPACES[device]


class State:
    """The buffers of one batch size and kind of condition, and the graphs recorded over them."""

    def __init__(self, name: tuple, weights: tuple[ops.BlockWeights, ...], z: Tensor, given, caches: Caches):
        self.name, self.weights, self.caches = name, weights, caches
        self.z, self.x = z.new_empty(z.shape), z.new_empty(z.shape)
        self.moved = z.new_empty(2, z.shape[0])
        self.passes = [BlockPass(w, given, z.shape[0], cache) for w, cache in zip(weights, caches.tensors, strict=True)]
        self.graphs: dict[tuple, CudaGraph] = {}
        self._affine = _affine_options(weights[0].config)

    def begin(self, z: Tensor, given) -> None:
        self.z.copy_(z)
        self.x.copy_(z)
        for run in self.passes:
            run.fill(given)

    def reads(self, weights: ops.BlockWeights) -> bool:
        """Whether its graphs do."""
        return any(own is weights for own in self.weights)

    def prefill(self, k: int) -> None:
        self.passes[k].prefill()

    def step(self, start: int, stop: int, draft: bool) -> None:
        """What `Iterate.update` does."""
        run = self.passes[draft]
        run(self.x, start, stop)
        ops.jacobi_update_(self.x, self.z, run.raw, self.moved, start=start, stop=stop, **self._affine)

    def call(self, recorder: CudaRecorder, name: tuple, call: Callable) -> None:
        """call(*name) as a graph; it changes x alone of what it starts from."""
        graph = self.graphs.get(name)
        if graph is None and len(self.graphs) >= MAX_GRAPHS:
            return call(*name)
        if graph is None:
            before = self.x.clone()  # recording calls it, to warm up
            graph = self.graphs[name] = recorder.record(lambda: call(*name))
            self.x.copy_(before)
        graph.replay()
        return None


class GraphIterate:
    """`biflow.solvers.Iterate` of a flow block on a GPU: `BlockIterate`'s passes as CUDA graphs.

    Has the state's caches until it is deleted: what then becomes of x does not matter.
    """

    look_every = 2  # a look costs the host's launches and a wait, a pass too many the GPU's time

    def __init__(self, space: Workspace, state: State):
        self.has_draft = len(state.passes) > 1
        self._space, self._state = space, state
        weakref.finalize(self, state.caches.give_back).atexit = False

    @property
    def x(self) -> Tensor:
        return self._state.x

    def update(self, start: int, stop: int, *, draft: bool = False) -> Tensor:
        self._call((start, stop, draft), self._state.step)
        return self._state.moved

    def prefill(self) -> None:
        """Keys and values of the prefix tokens."""
        for k in range(len(self._state.passes)):
            self._call((k,), self._state.prefill)

    def result(self) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), self._space.lock, self._space.recorder.turn(self.x.device):
            return self.x.clone()

    def _call(self, name: tuple, call: Callable) -> None:
        space = self._space
        with torch.inference_mode(False), torch.no_grad(), space.lock, space.recorder.turn(space.device):
            self._state.call(space.recorder, name, call)


@dataclass
class _Weights:
    """A block's weights in one precision, made from those that lie at `places`."""

    own: ops.BlockWeights
    places: tuple
    period: int | None = None  # when they were last compared, if that was inside `frozen`


@dataclass(eq=False)
class States:
    """What a block keeps for its last few kinds of decode on a GPU: objects with a `name` and with `caches`."""

    states: list = field(default_factory=list)  # the one used longest ago first

    def keep(self, space: Workspace, states: list) -> None:
        """Drop the other states, whose memory may go when what is on its way to the GPU is done."""
        if len(states) < len(self.states):
            space.recorder.wait()
        self.states = states

    def take(self, space: Workspace, name: tuple, make: Callable):
        """A state of that name whose caches are free, or one that is made; its caches are taken."""
        space.users.add(self)
        state = next((s for s in self.states if s.name == name and not s.caches.taken), None)
        if state is not None:
            self.states.remove(state)
            state.caches.taken = True
        else:
            state = space.allocate(make)
        self.states.append(state)
        self.keep(space, self.states[-MAX_STATES:])
        return state


@dataclass(eq=False)
class Iterates(States):
    """What a block keeps for its iterations on a GPU: bf16 weights, and states with their graphs.

    None outlives a change of the weights. Every `start` compares the tensors' addresses with those recorded, and rounds
    the weights to bf16 anew, in place; inside `frozen` both are done once (docs/decisions/0012). Safe with streams and
    threads: the passes of all iterations take turns on the GPU, and each iteration has a state to itself.
    """

    _weights: dict[str, _Weights] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop every copy of the weights, and every state that no iteration uses."""
        for device in {w.own.device for w in self._weights.values()}:
            space = workspace(device)
            with space.lock:
                self.keep(space, [])
        self._weights = {}

    def start(self, block: "Block", z: Tensor, precisions: tuple[str, ...], options: dict, period: int | None):
        """A `GraphIterate` towards the inverse of z, with drafts if there are two precisions.

        options: the keyword arguments of `ops.BlockWindows`. period: counts the `frozen` that this is called in; None:
        in none.
        """
        space, batch = workspace(z.device), z.shape[0]
        with torch.inference_mode(False), torch.no_grad(), space.lock, space.recorder.turn(z.device):
            weights = tuple(self._current(space, block, precision, period) for precision in precisions)
            table = block.class_embed
            live = replace(weights[0], class_embed=table, class_mean=None if table is None else table.mean(0))
            check_block_call("z", z, live, block.config, **options)
            given = condition(live, batch, **options)
            shapes = tuple(None if t is None else t.shape for t in given.tensors)
            products = torch.backends.cuda.matmul.fp32_precision  # TF32 or not: a graph keeps the kernels of then
            name = (batch, precisions, shapes, tuple(sorted(given.options.items())), products)
            state = self.take(space, name, functools.partial(_make_state, space, name, weights, z, given))
            try:
                state.begin(z, given)
                iterate = GraphIterate(space, state)
            except BaseException:
                state.caches.give_back()
                raise
        if given.prefix_tokens:
            iterate.prefill()
        return iterate

    def _current(self, space: Workspace, block: "Block", precision: str, period: int | None) -> ops.BlockWeights:
        kept = self._weights.get(precision)
        if kept is not None and period is not None and kept.period == period:
            return kept.own
        tensors, c = block.weights(), block.config
        places = places_of(t for name, t in tensors.items() if name != "class_embed")  # no graph reads that
        if kept is None or kept.places != places:
            if kept is not None:
                self.keep(space, [s for s in self.states if not s.reads(kept.own)])
            plain = plain_weights(tensors, c, precision)
            kept = self._weights[precision] = _Weights(block_weights(tensors, c, precision, None, plain), places)
        else:
            rounded = [(own, tensors[name]) for name, own in kept.own.plain.items() if own.dtype != torch.float32]
            if rounded:
                torch._foreach_copy_(*map(list, zip(*rounded, strict=True)))
        kept.period = period
        return kept.own


def _make_state(space: Workspace, name: tuple, weights: tuple, z: Tensor, given) -> State:
    shape = cache_shape(weights[0].config, given, z.shape[0])
    caches = space.caches(shape, tuple(DTYPES[w.precision] for w in weights))
    try:
        return State(name, weights, z, given, caches)
    except BaseException:
        caches.give_back()
        raise
