"""A training step of both stages in mixed precision, as bench_training has it: ours beside the same network in plain
torch (eager) and, of flows, ml-tarflow's own Model; in a part of its own both under torch.compile.

Nothing is timed before its gradients were found within BOUND of the plain network's in fp32 ("error").
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.bench_training import gradients, sides, step
from biflow.train import flops

from .limits import Case, bound, share
from .models import SMALL
from .parity import error
from .timing import Call, Timer

STEPS = (("flow", "B/2", 128), ("inverse", "B/2", 128), ("flow", "TARFlow-64", 32))  # stage, flow, images
BOUND = 0.1  # of bf16, relative to the norm
NEEDS = {"needs": 60.0, "limit": 240.0}  # seconds: forward and backward graph, twice


def cases(timer: Timer, limits: list[dict], dry: bool, ml_tarflow: str | None) -> Iterator[Case]:
    for stage, name, batch in STEPS:
        run = functools.partial(_row, timer, limits, dry, stage, name, batch, ml_tarflow)
        yield Case({"item": f"training step, {stage} {name}", "batch": 2 if dry else batch}, run, limit=120.0)


def compiled(timer: Timer, limits: list[dict], dry: bool) -> Iterator[Case]:
    for stage, name, batch in STEPS[:2]:
        run = functools.partial(_row, timer, limits, dry, stage, name, batch, None, compiles=True)
        yield Case({"item": f"training step, {stage} {name}, compiled", "batch": 2 if dry else batch}, run, **NEEDS)


def _row(
    timer: Timer, limits: list[dict], dry: bool, stage: str, name: str, batch: int, ml_tarflow: str | None,
    compiles: bool = False,
) -> dict:  # fmt: skip
    """The limit: the products' FLOPs, forward and twice that backward, at the GEMM's rate."""
    images = 2 if dry else batch
    found = sides(stage, name, images, timer.device, ml_tarflow, **(SMALL | {"img_size": 32} if dry else {}))
    model = found["ours"].module
    want = gradients(found["eager"], "fp32", model)
    if compiles:
        how = {"backend": "eager"} if dry else {}  # a dry run has of the compiler what is before the code generator
        compiled = {
            who: replace(side, loss=torch.compile(side.loss, fullgraph=True, **how)) for who, side in found.items()
        }
        found = {"ours": compiled["ours"], "compile": compiled["eager"]}
    calls = {
        who: Call(step(side, "bf16"), graph=False, result=functools.partial(gradients, side, "bf16", model))
        for who, side in found.items()
    }
    times = timer(calls, cold=True, seconds=6, check=lambda got: error(got, want, BOUND))
    work = 3 * images * (flops.flow(model.config) if stage == "flow" else flops.inverse(model.config, states=False))
    limit = bound(limits, {"bf16 GEMM": work})
    return times.row(lambda s: {"ms_step": 1e3 * s, "images_s": images / s} | share(s, limit))
