"""A model's pass without gradients: in fp32 or bf16, and on a GPU as one CUDA graph per shape of its inputs."""

import contextlib
import copy
import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from biflow.models.layers import Layer, recording
from biflow.ops._weights import weights_key

PRECISIONS = ("fp32", "bf16")
_RECORDING = threading.Lock()  # torch records one graph at a time in a process
MAX_GRAPHS = 16  # of one model; the one used longest ago goes first


class CudaGraph:
    """One call, recorded: static copies of its inputs, its kernels as one launch, its outputs in the graph's memory."""

    def __init__(self, call: Callable, inputs: tuple[Tensor | None, ...], stream: torch.cuda.Stream, pool: object):
        self.inputs = [None if t is None else t.clone() for t in inputs]
        self.graph = torch.cuda.CUDAGraph()
        for _ in range(2):  # libraries and Triton set themselves up outside the recording, and on another stream:
            call(*self.inputs)  # cuBLAS keeps a workspace a stream, and that of `stream` is to come from `pool`
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.outputs = call(*self.inputs)

    def replay(self) -> None:
        self.graph.replay()


_POOLS: weakref.WeakValueDictionary[tuple, "_Pool"] = weakref.WeakValueDictionary()  # by stream


class _Pool:
    """Memory that graphs share, and the stream that they are recorded on.

    Nobody else works on the stream, so that what cuBLAS keeps for it lies in this memory. torch has 32 streams of a
    priority and hands them out in turn; hardly anybody asks for one of high priority.
    """

    def __init__(self):
        self.handle = torch.cuda.graph_pool_handle()
        for _ in range(32):
            self.stream = torch.cuda.Stream(priority=-1)
            if _POOLS.setdefault((self.stream.device, self.stream.cuda_stream), self) is self:
                break


class CudaRecorder:
    """Records calls into one pool of memory; `turn` puts the calls of all streams one after the other."""

    def __init__(self):
        self._pool: _Pool | None = None
        self._graphs: weakref.WeakSet[CudaGraph] = weakref.WeakSet()  # those in the pool
        self._done: torch.cuda.Event | None = None  # the last turn's work

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            if self._done is not None:
                stream.wait_event(self._done)  # static buffers may be in use on another stream
            try:
                yield
            finally:
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def record(self, call: Callable, inputs: tuple[Tensor | None, ...] = ()) -> CudaGraph:
        with _RECORDING:
            if not self._graphs:  # torch refuses a pool whose graphs have all gone
                self._pool = _Pool()
            graph = CudaGraph(call, inputs, self._pool.stream, self._pool.handle)
            self._graphs.add(graph)
            return graph

    def wait(self) -> None:
        """Until the graphs' memory may go."""
        if self._done is not None:
            self._done.synchronize()


def graphable(inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether a call with these inputs is recorded: on a GPU."""
    return all(t is None or (t.is_cuda and t.numel() > 0) for t in inputs)


class PassModule(nn.Module):
    """A module whose methods can be called through `passes`."""

    def __init__(self):
        super().__init__()
        self.passes = Passes(self)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Many calls with the same weights: `with model.frozen(): ...`.

        Outside, every call without gradients looks whether a weight has changed since the last one (`Passes`). Inside
        it looks once; weights must not change.
        """
        with self.passes.frozen():
            yield

    def _apply(self, fn, recurse=True):  # .to(), .cuda(): do not keep the old weights alive
        self.passes.forget()
        return super()._apply(fn, recurse)

    def __getstate__(self):  # a cache: not copied, not saved
        return {k: v for k, v in self.__dict__.items() if k != "passes"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.passes = Passes(self)


class Passes:
    """Calls methods of a module without gradients, through what it keeps for that: bf16 weights, CUDA graphs.

    Neither outlives a change of the weights. Every call compares the tensors' addresses with those that a graph has
    recorded, and rounds the weights to bf16 anew on a GPU, where that takes no longer than a look at them would; on a
    CPU a hash of their bytes says whether it must. Inside `frozen` each is done once. Hooks on modules run when a graph
    is recorded, not when it is replayed.

    In bf16 the weights of the layers' linear maps are rounded, and with them what they multiply, the keys and the
    values; norms, residual stream, embeddings, heads and sums stay fp32, as under autocast.

    Safe with streams and threads: calls of one module run one after the other on the GPU, whatever their streams.
    """

    def __init__(self, module: nn.Module):
        self._owner = weakref.ref(module)  # the module holds this: with a cycle its memory would outlive it
        self._lock = threading.RLock()
        self._frozen = 0
        self._period = 0  # counts what `frozen` opened
        self._recorder: CudaRecorder | None = None
        self.forget()

    @property
    def _module(self) -> nn.Module:
        module = self._owner()
        if module is None:
            raise ReferenceError("passes: expected the module that they belong to to live, and it does not")
        return module

    def forget(self) -> None:
        """Drop every copy of the weights and every graph."""
        with self._lock:
            if self._recorder is not None:
                self._recorder.wait()
            self._recorder = CudaRecorder()
            self._twin: nn.Module | None = None  # the module in bf16
            self._twin_key: tuple | None = None
            self._twin_period = 0
            self._graphs: OrderedDict[tuple, _Recorded] = OrderedDict()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the weights must not change: they are looked at once, not on every call."""
        with self._lock:
            if self._frozen == 0:
                self._period += 1
            self._frozen += 1
        try:
            yield
        finally:
            with self._lock:
                self._frozen -= 1

    def __call__(self, method: str, precision: str, *inputs: Tensor | None, **options: bool):
        """module.method(*inputs, **options) in `precision`; the outputs are the caller's own. options: hashable.

        Inside torch.compile, or while a CUDA graph is recorded, nothing is kept: the layers round their weights each
        time. A method takes their dtype as `layer_dtype`.
        """
        if recording():
            dtype = torch.bfloat16 if precision == "bf16" else None
            return getattr(self._module, method)(*inputs, layer_dtype=dtype, **options)
        if precision == "fp32" and not graphable(inputs):
            return getattr(self._module, method)(*inputs, **options)
        with torch.inference_mode(False), torch.no_grad():
            with self._lock:
                if graphable(inputs):
                    with self._recorder.turn(next(t.device for t in inputs if t is not None)):
                        network = self._module if precision == "fp32" else self._low_precision()
                        return self._replay(network, method, precision, inputs, options)
                network = self._low_precision()
            return getattr(network, method)(*inputs, **options)

    def replay_last(self) -> None:
        """The kernels of the last call alone, on its inputs: what a benchmark times. Only after a call on a GPU."""
        with self._lock:
            next(reversed(self._graphs.values())).graph.replay()

    def _replay(self, network: nn.Module, method: str, precision: str, inputs: tuple, options: dict):
        shapes = tuple(None if t is None else (tuple(t.shape), t.dtype, t.device) for t in inputs)
        products = torch.backends.cuda.matmul.fp32_precision  # TF32 or not: a graph keeps the kernels of then
        name = (method, precision, shapes, tuple(sorted(options.items())), products)
        recorded = self._graphs.pop(name, None)
        if recorded is None or not (self._frozen and recorded.period == self._period):
            places = places_of(_tensors(network))
            if recorded is None or recorded.places != places:
                call = functools.partial(getattr(network, method), **options)
                recorded = _Recorded(self._recorder.record(call, inputs), places)
            recorded.period = self._period
        self._graphs[name] = recorded
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        graph = recorded.graph
        for own, given in zip(graph.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given)
        graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, graph.outputs)

    def _low_precision(self) -> nn.Module:
        """The module in bf16. Only the layers' linear weights are copies; the other tensors are the module's own."""
        if self._twin is not None and self._frozen and self._twin_period == self._period:
            return self._twin
        key = (places_of(_tensors(self._module)), _hash(self._module))
        if self._twin is None or self._twin_key[0] != key[0]:
            self._recorder.wait()  # another stream may still read the twin that goes
            self._twin = _share(self._module)
            for linear in _linears(self._twin):
                linear.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
                linear.bias = nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        elif key[1] is None or self._twin_key[1] != key[1]:
            pairs = list(zip(_linears(self._twin), _linears(self._module), strict=True))
            rounded = [t for own, _ in pairs for t in (own.weight, own.bias)]
            torch._foreach_copy_(rounded, [t for _, given in pairs for t in (given.weight, given.bias)])
        self._twin_key, self._twin_period = key, self._period
        return self._twin


@dataclass
class _Recorded:
    graph: CudaGraph
    places: tuple  # of the weights that it reads
    period: int = 0  # when they were last compared, if that was inside `frozen`


def _linears(module: nn.Module) -> list[nn.Linear]:
    """The linear maps of the transformer's layers."""
    layers = (m for m in module.modules() if isinstance(m, Layer))
    return [m for layer in layers for m in layer.children() if isinstance(m, nn.Linear)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def places_of(tensors: Iterable[Tensor]) -> tuple:
    """Where weights lie: what a graph has recorded of them."""
    return tuple((t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors)


def _hash(module: nn.Module) -> int | None:
    """Of the weights on a CPU; None elsewhere: it would take as long as rounding them again."""
    tensors = _tensors(module)
    return weights_key(tensors) if all(t.device.type == "cpu" for t in tensors) else None


def _share(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors."""
    return copy.deepcopy(module, {id(t): t for t in _tensors(module)})
