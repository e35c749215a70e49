"""The reverse of a flow with a graph: all tokens at once (`biflow.pseudo_reverse`) against token by token.

Each makes x_0 from the z of an encode and, but for those marked "values", the gradient of |x_0|^2 / 2 in all weights.
"sequential" is `evaluate.eager_decode_block` with autograd on: plain PyTorch with a KV cache. "decode" is
`flow.decode`, which has no gradient. States and live gradients are checked first. The encode is not part of it:
training has it anyway. peak_mb: growth of the resident memory in one run, in a process of its own (Linux).

    python -m benchmarks.bench_pseudo_reverse [--quick] [--sides 32] [--batches 1,4] [--threads N] [--json PATH]
"""

import functools
import multiprocessing
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from biflow import pseudo_reverse
from biflow.evaluate import eager_decode_block
from biflow.models import TarFlow

from .flows import random_flow
from .timing import keep_memory, main, ratio, resident_bytes, turns

WAYS = ("sequential", "cached", "live", "sequential values", "decode values", "cached values")
BOUND = 1e-4  # of states and of gradients, relative to the largest: fp32 sums in another order, through all blocks


class Task:
    """A flow of config S's width and depth on images of some side, and the trajectory of a batch."""

    def __init__(self, side: int, batch: int):
        self.flow: TarFlow = random_flow("S", img_size=side)
        x = torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
        with torch.no_grad():
            self.states = self.flow.encode(x, return_states=True)[2]

    def reverse(self, way: str) -> Tensor:
        """x_0 (B,T,D)."""
        if way == "decode":
            return self.flow.decode(self.states[-1], solver="sequential")
        if way != "sequential":
            return pseudo_reverse(self.flow, self.states, context=way).states[0]
        x = self.states[-1]
        for block in reversed(self.flow.blocks):
            x = eager_decode_block.__wrapped__(block, x)  # the function inside of torch.no_grad()
        return x

    def gradient(self, way: str) -> list[Tensor]:
        return torch.autograd.grad(self.reverse(way).square().sum() / 2, list(self.flow.parameters()))

    def call(self, way: str) -> Callable[[], object]:
        way, *values = way.split()
        return (
            torch.no_grad()(functools.partial(self.reverse, way)) if values else functools.partial(self.gradient, way)
        )


def run(quick: bool = False, sides: list[int] | None = None, batches: list[int] | None = None) -> list[dict]:
    """A row a way, side and batch: ms, times as fast as sequential (with or without a gradient as it), peak memory."""
    keep_memory()
    rows = []
    for side in sides or ([8] if quick else [32]):
        for batch in batches or ([2] if quick else [1, 4]):
            task = Task(side, batch)
            errors = _errors(task)
            times = turns({way: task.call(way) for way in WAYS}, 3 if quick else 7)
            for way in WAYS:
                base = "sequential values" if way.endswith("values") else "sequential"
                rows.append(
                    {
                        "op": "pseudo_reverse",
                        "tokens": task.flow.config.tokens,
                        "batch": batch,
                        "way": way,
                        "ms": 1e3 * statistics.median(times[way]),
                        "x_sequential": ratio(times[way], times[base]),
                        "peak_mb": _peak(side, batch, way),
                        **errors.get(way, {}),
                    }
                )
    return rows


def _errors(task: Task) -> dict[str, dict[str, float]]:
    """By way, the largest error of x_0 against the encode's and of the live gradient against the sequential one."""
    want, scale = task.gradient("sequential"), task.states[0].abs().max()
    found = {}
    for way in ("sequential", "cached", "live"):
        off = float((task.reverse(way).detach() - task.states[0]).abs().max() / scale)
        found[way] = {"state_error": off}
        if not off <= BOUND:  # a wrong result has no speed
            raise RuntimeError(f"{way}: x_0 is {off} from that of the encode")
    size = max(float(g.abs().max()) for g in want)
    off = max(float((a - b).abs().max()) for a, b in zip(task.gradient("live"), want, strict=True)) / size
    found["live"]["gradient_error"] = off
    if not off <= BOUND:
        raise RuntimeError(f"live: the gradient is {off} from that of the sequential reverse")
    return found


def _peak(side: int, batch: int, way: str) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown, (side, batch, way, torch.get_num_threads()))


def _grown(side: int, batch: int, way: str, threads: int) -> float:
    """MB that the largest resident memory of this process grows by in one run."""
    torch.set_num_threads(threads)
    call = Task(side, batch).call(way)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of the imports, is forgotten
    before = resident_bytes("VmRSS")
    call()
    return (resident_bytes("VmHWM") - before) / 2**20


if __name__ == "__main__":
    main(run, __doc__, sides=int, batches=int)
