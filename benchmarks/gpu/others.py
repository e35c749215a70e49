"""Other ways to decode a block, each timed on as many of its first steps as fit.

eager: keys and values in a cache that grows by concatenation (biflow.evaluate.eager), in bf16 with weights and
activations in bf16, which is faster than autocast. static: one token step over a static cache, as eager torch runs it;
graph: the same as one CUDA graph a step; compiled: under torch.compile, and then as one CUDA graph a step
(benchmarks/peers/compiled.py). launches: ours with a launch for each phase, whatever `decode_plan` chooses, as one CUDA
graph (phases.py). ml-tarflow: its own block, unmodified, in bf16 under autocast, as its authors run it.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.compiled import BACKEND, static_cache
from benchmarks.peers.ml_tarflow import load_model
from biflow.evaluate.eager import eager_decode_block

from .phases import recorded
from .subject import Subject
from .timing import Timer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SECONDS = 1.5  # of the timed call: as many steps as take that long

# tokens -> a call that decodes the first so many of the subject's block: x (B,P,D)
Decoder = Callable[[int], Callable[[], Tensor]]


def without_plans(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call with torch's own attention kernels: cuDNN's builds a plan for every length of a growing cache, 40 ms
    each."""
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

    def wrapped() -> Tensor:
        with sdpa_kernel(kernels):
            return call()

    return wrapped


def eager(subject: Subject, batch: int, precision: str) -> Decoder:
    dtype = DTYPES[precision]

    def decoder(tokens: int) -> Callable[[], Tensor]:
        block = subject.first(tokens)
        if dtype != torch.float32:
            block = copy.deepcopy(block).to(dtype)
        return without_plans(functools.partial(eager_decode_block, block, subject.z(batch, tokens).to(dtype)))

    return decoder


def static(subject: Subject, batch: int, precision: str, *, backend: str | None = None, graph: bool = False) -> Decoder:
    """A dry run has no graph, and of the compiler what is before the code generator."""
    if subject.device.type != "cuda":
        backend, graph = (None if backend is None else "eager"), False
    peer = static_cache(subject.flow, None, batch, backend=backend, graph=graph, dtype=DTYPES[precision])
    return lambda tokens: functools.partial(peer.decode_block, 0, subject.z(batch, tokens))


def ml_tarflow(subject: Subject, batch: int, precision: str, *, path: str) -> Decoder:
    block = load_model(subject.flow, path).to(subject.device).blocks[0]

    def decoder(tokens: int) -> Callable[[], Tensor]:
        z = subject.z(batch, tokens)

        def call() -> Tensor:
            with torch.autocast(subject.device.type, torch.bfloat16, enabled=precision == "bf16"):
                return block.reverse(z.clone())  # it may write into its argument

        return without_plans(call)

    return decoder


CONTESTANTS: dict[str, Callable[..., Decoder]] = {
    "eager": eager,
    "static": static,
    "graph": functools.partial(static, graph=True),
    "compiled": functools.partial(static, backend=BACKEND, graph=True),
    "launches": recorded,
    "ml-tarflow": ml_tarflow,
}


@torch.inference_mode()
def seconds_a_step(timer: Timer, subject: Subject, decoder: Decoder, precision: str) -> tuple[float, int, float]:
    """Seconds a step, the steps that were timed, the error. First `short` tokens, which also show that it is right."""
    call = decoder(subject.short)
    error = subject.check_first(call(), precision)
    steps = subject.short - 1
    seconds = timer.few(call, seconds=SECONDS / 4) / steps
    tokens = min(subject.block.tokens, 1 + int(SECONDS / seconds))
    if tokens > 2 * subject.short:
        call, steps = decoder(tokens), tokens - 1
        seconds = timer.few(call, seconds=SECONDS) / steps  # one call, unless the whole block takes half the time
    return seconds, steps, error
