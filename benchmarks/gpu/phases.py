"""Where the time of a sequential inverse goes, and what it takes with a launch for each phase.

On a GPU a block is one persistent kernel, or one launch a phase (docs/decisions/0015). The latter can be told apart
by the profiler: by their place in a step, since all are of one kernel.
"""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from biflow import ops
from biflow.models.block import Block
from biflow.ops.decode_block import call_options, condition, gpu_plan
from biflow.solvers import Condition

from .subject import Subject

KERNEL = "decode_block_kernel"  # of csrc/cuda/decode_block.cuh
LAYER = ("norm1", "qkv", "attention", "proj", "norm2", "fc1", "fc2")  # in order, csrc/cuda/decode_block_state.cuh
ROWS = 12  # of a split


def by_phase(block: Block, z: Tensor, precision: str) -> tuple[Callable[[], Tensor], list[str]]:
    """A call that inverts z (B,T,D) with a launch for each phase, on a GPU; the phases of a step in order."""
    weights = ops.pack_block(block.weights(), block.config, precision)
    given = condition(weights, len(z), None, None, None, 0.0, "ab", True, 1.0)
    (_, *plan), words = gpu_plan(weights, len(z), given)
    space, x = torch.empty(words, device=z.device), torch.empty_like(z)

    def call() -> Tensor:
        torch.ops.biflow.decode_block_(
            z, weights.packed, *given.tensors, x, plan=[0, *plan], workspace=space, **call_options(weights, given)
        )
        return x

    norm_in_place = plan[4]
    layer = [name for name in LAYER if not (norm_in_place and name.startswith("norm"))]
    return call, ["embed", *layer * block.config.layers, "head"]


def recorded(subject: Subject, batch: int, precision: str) -> Callable[[int], Callable[[], Tensor]]:
    """`others.Decoder` of `by_phase` as one CUDA graph; in a dry run the CPU's decode."""

    def decoder(tokens: int) -> Callable[[], Tensor]:
        block, z = subject.first(tokens), subject.z(batch, tokens)
        if subject.device.type != "cuda":
            return lambda: block.decode_sequential(z, Condition(precision=precision))
        call, _ = by_phase(block, z, precision)
        call()
        torch.cuda.synchronize(subject.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            x = call()

        def replay() -> Tensor:
            graph.replay()
            return x

        replay.graph_reads = call  # its workspace, weights and condition
        return replay

    return decoder


@torch.inference_mode()
def phases(subject: Subject, batch: int, precision: str) -> list[dict]:
    """Rows of the sequential inverse of one block: by phase on a GPU, by op in a dry run."""
    block, z, on_gpu = subject.block, subject.z(batch), subject.device.type == "cuda"
    call, names = by_phase(block, z, precision) if on_gpu else (None, [])
    if call is None:
        call = lambda: block.decode_sequential(z, Condition(precision=precision))  # noqa: E731
    with block.frozen():
        subject.check_block(call(), z, precision)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            call()
            if on_gpu:
                torch.cuda.synchronize(subject.device)
    return split(spans(profiled.events(), on_gpu), block.sequential_passes, names)


def spans(events: list, on_gpu: bool) -> list[tuple[str, float]]:
    """Name and microseconds of what ran on the device, in the order in which it began."""
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    own = sorted((e for e in events if e.device_type == kind), key=lambda e: e.time_range.start)
    return [
        (short_name(e.name), e.time_range.elapsed_us() if on_gpu else e.self_cpu_time_total) for e in own
    ]  # fmt: skip


def split(found: list[tuple[str, float]], steps: int, names: list[str]) -> list[dict]:
    """By name, the longest first: microseconds and calls a step, share of the whole.

    names: of a step's launches of KERNEL. If there are not as many as all steps have, and one after them for the last
    token, they stay together under the kernel's name.
    """
    spent, calls, place = defaultdict(float), defaultdict(int), 0
    told = sum(name == KERNEL for name, _ in found) == steps * len(names) + 1
    for kernel, us in found:
        name = kernel
        if kernel == KERNEL and told:
            name, place = names[place % len(names)], place + 1
        spent[name] += us
        calls[name] += 1
    total = sum(spent.values())
    if not total:
        raise RuntimeError("expected kernels in the profile, got none")
    longest = sorted(spent, key=spent.get, reverse=True)
    rows = [(name, spent[name], calls[name]) for name in longest[:ROWS]]
    if rest := longest[ROWS:]:
        rows.append(("others", sum(spent[n] for n in rest), sum(calls[n] for n in rest)))
    return [
        {"kernel": name, "us_step": us / steps, "percent": 100 * us / total, "calls_step": count / steps}
        for name, us, count in rows
    ]


def short_name(kernel: str) -> str:
    """A kernel's name without namespaces, template arguments and parameters."""
    name = kernel.replace("(anonymous namespace)::", "")
    while (inner := re.sub(r"<[^<>]*>", "", name)) != name:
        name = inner
    return name.split("(")[0].removeprefix("void ").split("::")[-1].strip() or kernel
