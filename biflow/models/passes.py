"""A model's pass without gradients: in fp32 or bf16, and on a GPU as one CUDA graph per shape of its inputs."""

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from biflow.models.layers import Layer
from biflow.ops._weights import weights_key

PRECISIONS = ("fp32", "bf16")
MAX_GRAPHS = 16  # of one model; the one used longest ago goes first


class CudaGraph:
    """One call, recorded: static copies of its inputs, its kernels as one launch, its outputs in the graph's memory."""

    def __init__(self, call: Callable, inputs: tuple[Tensor | None, ...], pool: object):
        device = next(t.device for t in inputs if t is not None)
        self.inputs = [None if t is None else t.clone() for t in inputs]
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # libraries and Triton set themselves up outside the recording
            for _ in range(2):
                call(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        # other threads may go on using the GPU meanwhile
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.outputs = call(*self.inputs)

    def replay(self) -> None:
        self.graph.replay()


class CudaRecorder:
    """Records calls into one pool of memory; `turn` puts the calls of all streams one after the other."""

    def __init__(self):
        self._pool = None
        self._done: torch.cuda.Event | None = None  # the last turn's work

    @contextlib.contextmanager
    def turn(self, device: torch.device) -> Iterator[None]:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device)
            if self._done is not None:
                stream.wait_event(self._done)  # static buffers may be in use on another stream
            yield
            self._done = torch.cuda.Event()
            self._done.record(stream)

    def record(self, network: nn.Module, method: str, inputs: tuple[Tensor | None, ...], options: dict) -> CudaGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(lambda *t: getattr(network, method)(*t, **options), inputs, self._pool)


def graphable(inputs: tuple[Tensor | None, ...]) -> bool:
    """Whether a call with these inputs is recorded: on a GPU, unless something else is being recorded."""
    return (
        all(t is None or (t.is_cuda and t.numel() > 0) for t in inputs) and not torch.cuda.is_current_stream_capturing()
    )


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

    Neither outlives a change of the weights that torch knows of. A parameter's replacement and every in-place
    operation are seen; on a GPU a write through `.data` or from another library is not: call `forget` after one. (On
    the CPU the weights' bytes are looked at.) Hooks on modules run when a graph is recorded, not when it is replayed.

    In bf16 the weights of the layers' linear maps are rounded, and with them what they multiply, the keys and the
    values; norms, residual stream, embeddings, heads and sums stay fp32, as under autocast.

    Safe with streams and threads: calls of one module run one after the other on the GPU, whatever their streams.
    """

    def __init__(self, module: nn.Module):
        self._module = module
        self._lock = threading.RLock()
        self._frozen = 0
        self.forget()

    def forget(self) -> None:
        """Drop every copy of the weights and every graph."""
        with self._lock:
            self._twin: nn.Module | None = None  # the module in bf16
            self._twin_key = None
            self._seen: set[str] = set()  # precisions whose weights were looked at since `frozen` began
            self._graphs: OrderedDict[tuple, tuple[tuple, CudaGraph]] = OrderedDict()
            self._recorder = CudaRecorder()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, the weights must not change: they are looked at once, not on every call."""
        with self._lock:
            if self._frozen == 0:
                self._seen.clear()
            self._frozen += 1
        try:
            yield
        finally:
            with self._lock:
                self._frozen -= 1

    def __call__(self, method: str, precision: str, *inputs: Tensor | None, **options: bool):
        """module.method(*inputs, **options) in `precision`; the outputs are the caller's own. options: hashable.

        Inside torch.compile nothing is kept: bf16 is then autocast's.
        """
        if torch.compiler.is_compiling():
            device = next(t.device.type for t in inputs if t is not None)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                return getattr(self._module, method)(*inputs, **options)
        if precision == "fp32" and not graphable(inputs):
            return getattr(self._module, method)(*inputs, **options)
        with torch.inference_mode(False), torch.no_grad():
            with self._lock:
                network = self._module if precision == "fp32" else self._low_precision()
                if graphable(inputs):
                    return self._replay(network, method, precision, inputs, options)
            return getattr(network, method)(*inputs, **options)

    def _replay(self, network: nn.Module, method: str, precision: str, inputs: tuple, options: dict):
        shapes = tuple(None if t is None else (tuple(t.shape), t.dtype, t.device) for t in inputs)
        name = (method, precision, shapes, tuple(sorted(options.items())))
        with self._recorder.turn(next(t.device for t in inputs if t is not None)):
            places, graph = self._graphs.pop(name, (None, None))
            if graph is None or (not self._looked(precision) and places != _places(network)):
                places = _places(network)
                graph = self._recorder.record(network, method, inputs, options)
            self._graphs[name] = (places, graph)
            if len(self._graphs) > MAX_GRAPHS:
                self._graphs.popitem(last=False)
            for own, given in zip(graph.inputs, inputs, strict=True):
                if own is not None:
                    own.copy_(given)
            graph.replay()
            self._seen.add(precision)
            return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, graph.outputs)

    def _looked(self, precision: str) -> bool:
        return self._frozen > 0 and precision in self._seen

    def _low_precision(self) -> nn.Module:
        """The module in bf16. Only the layers' linear weights are copies; the other tensors are the module's own."""
        if self._twin is not None and self._looked("bf16"):
            return self._twin
        places, values = _places(self._module), _values(self._module)
        if self._twin is None or self._twin_key[0] != places:
            self._twin = _share(self._module)
            for linear in _linears(self._twin):
                linear.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
                linear.bias = nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        elif self._twin_key[1] != values:
            for own, given in zip(_linears(self._twin), _linears(self._module), strict=True):
                own.weight.copy_(given.weight)  # in place: the graphs read them there
                own.bias.copy_(given.bias)
        self._twin_key = (places, values)
        self._seen.add("bf16")
        return self._twin


def _linears(module: nn.Module) -> list[nn.Linear]:
    """The linear maps of the transformer's layers."""
    layers = (m for m in module.modules() if isinstance(m, Layer))
    return [m for layer in layers for m in layer.children() if isinstance(m, nn.Linear)]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _places(module: nn.Module) -> tuple:
    """Where the weights lie: what a graph has recorded of them."""
    return tuple((t.data_ptr(), t.shape, t.dtype) for t in _tensors(module))


def _values(module: nn.Module) -> object:
    """Equal to an earlier result of this function if the weights are what they were then."""
    tensors = _tensors(module)
    if all(t.device.type == "cpu" for t in tensors):
        return weights_key(tensors)
    if any(t.is_inference() for t in tensors):  # these count no versions
        return object()
    return tuple(t._version for t in tensors)


def _share(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same tensors."""
    return copy.deepcopy(module, {id(t): t for t in _tensors(module)})
