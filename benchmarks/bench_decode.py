"""Exact decoding of whole flows: every solver and precision of biflow against eager PyTorch and others.

What a user calls is timed: `flow.decode(z)`, checks and images included, on frozen weights (`flow.frozen()`): the peers
do not look for changed weights either. Contestants: biflow; the eager loop
(biflow.evaluate.eager_decode); a static-cache step under torch.compile (opt-in); a checkout of apple/ml-tarflow
(opt-in). docs/benchmarks.md says how each number comes about.

    biflow bench --op decode [--quick] [--configs S,M] [--batches 1,16] [--json FILE] [--plot FILE]
"""

import copy
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from biflow import solvers
from biflow.calibration import calibrate
from biflow.checkpoint import load
from biflow.models import TarFlow
from biflow.models.layers import patchify

from . import limits
from .flows import BATCHES, CONFIGS, check_configs, random_flow
from .peers import Peer, eager, ml_tarflow
from .peers.compiled import compiled
from .timing import keep_memory, ratio, turns

TRUNCATE_S = 5.0  # where the eager decode takes longer, peers are timed on one block, unless full
FP64_S = 3.0  # where it takes at most this long, an fp64 decode is the reference
# Largest error of a decode whose time is reported. fp32: as a share of the largest |x|, or AMPLIFIED times the eager
# loop's own error where fp64 tells it, since a flow may amplify any rounding; iterative solvers stop at a tolerance.
# bf16: root mean square of the error, as a share of that of x.
FP32_BOUND, ITERATIVE_BOUND, AMPLIFIED = 1e-5, 1e-3, 10
EPS = torch.finfo(torch.float32).eps
BF16_BOUND = 0.1


class WrongResult(Exception):
    """A decode that is off by more than rounding: its time would mean nothing."""


@dataclass(frozen=True)
class Plan:
    """What is run in every case. ways: (solver, window)."""

    precisions: list[str]
    ways: list[tuple[str, int | None]]
    compile_step: bool
    ml_tarflow_path: str | None
    full: bool
    rounds: int


@dataclass(frozen=True)
class Reference:
    """What decodes are compared with.

    after: tokens (B,T,D) after each block, in decode order. kind: "fp64", the eager loop in fp64, or "eager", the same
    in fp32: it shares the modules with ours and nothing else. rounding: error of the latter where the former is known.
    """

    after: list[Tensor]
    kind: str
    rounding: float = 0.0


@dataclass(frozen=True)
class Contestant:
    """Who decodes how. blocks: how many of the flow's blocks `call` decodes; row: what is known before the times."""

    name: str
    solver: str
    precision: str
    blocks: int
    call: Callable[[], Tensor]
    row: dict


def run(
    quick: bool = False,
    *,
    configs: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    precisions: Sequence[str] | None = None,
    solver_names: Sequence[str] | None = None,
    model: str | Path | None = None,
    compile_step: bool = False,
    ml_tarflow_path: str | None = None,
    full: bool = False,
) -> dict[str, list]:
    """{"limits": those of the machine, "rows": one per flow, batch and contestant, "wrong": sentences}.

    A contestant whose result is wrong has no row but a sentence that says so.

    Args:
        quick: config S at batches 1 and 16, few repetitions.
        configs, batches: names in `flows.CONFIGS`, and batches for each. None: all, and what `flows.BATCHES` says.
        precisions, solver_names: None: all of this build, without "windowed", which needs a window: "windowed:32".
        model: a checkpoint of a TarFlow, in place of the configs.
        compile_step: also the compiled peer. ml_tarflow_path: also that checkout.
        full: time all blocks of the peers, however long it takes.

    Raises:
        ValueError, FileNotFoundError: unknown names, no checkout, a model that a peer cannot decode.
    """
    check_configs(configs)
    if configs and model is not None:
        raise ValueError("model: expected without configs, which it replaces")
    names = list(solvers.SOLVERS) if solver_names is None else list(solver_names)
    plan = Plan(
        precisions=list(solvers.PRECISIONS if precisions is None else precisions),
        ways=[_solver(name) for name in names if solver_names is not None or name != "windowed"],
        compile_step=compile_step,
        ml_tarflow_path=ml_tarflow_path,
        full=full,
        rounds=3 if quick else 7,
    )
    unknown = [name for name in plan.precisions if name not in solvers.PRECISIONS]
    if unknown:
        raise ValueError(f"precisions: expected some of {', '.join(solvers.PRECISIONS)}, got {unknown[0]!r}")
    if any(batch < 1 for batch in batches or []):
        raise ValueError(f"batches: expected numbers of at least 1, got {min(batches)}")
    if ml_tarflow_path is not None:
        ml_tarflow.load(ml_tarflow_path)  # now, not after minutes
    keep_memory()
    if model is not None:
        flows = {Path(model).stem: _checkpoint(model)}
    else:
        flows = {name: random_flow(name) for name in configs or (["S"] if quick else CONFIGS)}
    kinds = {"fp32", *plan.precisions}
    sizes = [weight_bytes(block, kind) for flow in flows.values() for block in flow.blocks for kind in kinds]
    _say("limits of the machine")
    first = limits.measure(sizes, quick=quick)
    rows, wrong, work = [], [], {}
    for name in list(flows):
        flow = flows.pop(name)  # the largest is freed before the next one is packed
        for batch in batches or ((1, 16) if quick else BATCHES.get(name, (1, 16, 64))):
            _say(f"{name}, batch {batch}")
            with flow.frozen():
                if ("auto", None) in plan.ways and model is None:  # a checkpoint may bring its own policy
                    calibrate(flow, batches=(batch,), precisions=plan.precisions, repetitions=3)
                rows += _case(plan, name, flow, batch, wrong)
            work |= {(name, batch, kind): steps_work(flow, batch, kind) for kind in kinds}
    _say("limits of the machine, again")
    measured = limits.best(first, limits.measure(sizes, quick=quick))
    for row in rows:
        parts = work[row["config"], row["batch"], row["precision"]]
        least = sum(passes * measured.step_seconds(size, flops, row["precision"]) for passes, size, flops in parts)
        row["limit_us_step"] = least * 1e6 / row["steps"]
        row["percent_of_limit"] = 100 * row["limit_us_step"] / row["us_step"]
    return {"limits": measured.rows, "rows": rows, "wrong": wrong}


def weight_bytes(block: torch.nn.Module, precision: str) -> int:
    """Bytes of a block's weight matrices: what one step reads at least."""
    return limits.PRECISIONS[precision].bytes * _matrix_elements(block)


def step_flops(block: torch.nn.Module, batch: int) -> float:
    """FLOPs of one step of a block, mean over its steps: linear layers, and attention over half of the tokens."""
    c = block.config
    return 2.0 * batch * (_matrix_elements(block) + 2 * c.layers * c.width * c.tokens / 2)


def steps_work(flow: TarFlow, batch: int, precision: str) -> list[tuple[int, int, float]]:
    """What a sequential decode does at least: per block the steps, and the bytes and FLOPs of one."""
    return [(b.sequential_passes, weight_bytes(b, precision), step_flops(b, batch)) for b in flow.blocks]


def _matrix_elements(block: torch.nn.Module) -> int:
    # the context is projected once, not in each step
    linear = [m for m in block.modules() if isinstance(m, torch.nn.Linear) and m is not block.context_proj]
    return sum(m.weight.numel() for m in linear)


def _solver(text: str) -> tuple[str, int | None]:
    """Solver and window of "windowed:32", or a solver and None."""
    name, colon, window = text.partition(":")
    if name not in solvers.SOLVERS or (colon and not window.isdecimal()):
        raise ValueError(f"solvers: expected some of {', '.join(solvers.SOLVERS)}, or name:window, got {text!r}")
    return name, int(window) if colon else None


def _checkpoint(path: str | Path) -> TarFlow:
    flow = load(path)
    if not isinstance(flow, TarFlow):
        raise ValueError(f"{path}: expected a TarFlow, got a {type(flow).__name__}")
    return flow.eval()


def _case(plan: Plan, name: str, flow: TarFlow, batch: int, wrong: list[str]) -> list[dict]:
    """The rows of one flow at one batch: parity of each contestant, then times of those that are right, in turns."""
    c, total = flow.config, len(flow.blocks)
    z = torch.randn(batch, c.tokens, c.channels, generator=torch.Generator().manual_seed(1))
    y = torch.arange(batch) % c.num_classes if c.num_classes else None
    reference, seconds = _reference(flow, z, y)
    # one block stands for the others where all are alike
    in_part = not plan.full and seconds > TRUNCATE_S and len({block.config.layers for block in flow.blocks}) == 1
    peers = [eager(flow, y)]
    if plan.compile_step:
        peers.append(compiled(flow, y, batch))
    if plan.ml_tarflow_path is not None:
        peers.append(ml_tarflow.ml_tarflow(flow, y, plan.ml_tarflow_path))
    entries = [functools.partial(_ours, flow, z, y, reference, p, *way) for p in plan.precisions for way in plan.ways]
    entries += [functools.partial(_theirs, peer, flow, z, 1 if in_part else total, reference) for peer in peers]
    contestants = []
    for enter in entries:
        try:
            contestants.append(enter())
        except WrongResult as error:
            wrong.append(f"{name}, batch {batch}, {error}")
            _say(wrong[-1])
    if not contestants:
        return []

    times = turns({f"{c.name} {c.solver} {c.precision}": c.call for c in contestants}, plan.rounds)
    whole = [[t * total / c.blocks for t in own] for c, own in zip(contestants, times.values(), strict=True)]
    bases = {c.name.replace("-", "_"): own for c, own in zip(contestants, whole, strict=True) if c.name != "biflow"}
    steps = sum(block.sequential_passes for block in flow.blocks)
    rows = []
    for contestant, own in zip(contestants, whole, strict=True):
        decode_s = statistics.median(own)
        rows.append(
            {
                "op": "decode",
                "config": name,
                "batch": batch,
                "contestant": contestant.name,
                "solver": contestant.solver,
                "precision": contestant.precision,
                "ms": decode_s * 1e3,
                "ms_image": decode_s * 1e3 / batch,
                "steps": steps,
                "us_step": decode_s * 1e6 / steps,
                "limit_us_step": None,  # known at the end of the run
                "percent_of_limit": None,
                **{f"x_{other}": ratio(own, base) for other, base in bases.items()},
                "blocks": total,
                "blocks_timed": contestant.blocks,
                **contestant.row,
            }
        )
    return rows


def _reference(flow: TarFlow, z: Tensor, y: Tensor | None) -> tuple[Reference, float]:
    """The reference of a case, and the seconds of an eager fp32 decode."""
    start = time.perf_counter()
    after = _trajectory(flow, z, y)
    seconds = time.perf_counter() - start
    if seconds > FP64_S:
        return Reference(after, "eager"), seconds
    exact = _trajectory(copy.deepcopy(flow).double(), z.double(), y)
    return Reference(exact, "fp64", (after[-1] - exact[-1]).abs().max().item()), seconds


def _trajectory(flow: TarFlow, z: Tensor, y: Tensor | None) -> list[Tensor]:
    """Tokens after each block of an eager decode."""
    peer, after = eager(flow, y), [z * flow.var.sqrt()]
    for i in reversed(range(len(flow.blocks))):
        after.append(peer.decode_block(i, after[-1]))
    return after[1:]


def _ours(
    flow: TarFlow, z: Tensor, y: Tensor | None, reference: Reference, precision: str, solver: str, window: int | None
) -> Contestant:
    def decode(**more):
        with torch.inference_mode():
            return flow.decode(z, y, solver=solver, window=window, precision=precision, **more)

    total, label = len(flow.blocks), solver if window is None else f"{solver}:{window}"
    x, info = decode(return_info=True)
    x = patchify(x, flow.config.patch_size)
    row = check(f"biflow {label} {precision}", x, reference, total, precision, iterative=solver != "sequential")
    for field in dataclasses.fields(info):  # what it says of each block, under its own names
        value = getattr(info, field.name)
        row |= {"residual": value.max().item()} if field.name == "residual" else {f"block_{field.name}": value}
    return Contestant("biflow", label, precision, total, decode, row)


def _theirs(peer: Peer, flow: TarFlow, z: Tensor, blocks: int, reference: Reference) -> Contestant:
    call = functools.partial(peer.decode, flow, z, blocks)
    start = time.perf_counter()
    x = call()
    first_call_s = time.perf_counter() - start  # with whatever is compiled
    if x.dim() == 4:
        x = patchify(x, flow.config.patch_size)
    row = check(peer.name, x, reference, blocks, "fp32")
    return Contestant(peer.name, "sequential", "fp32", blocks, call, row | {"first_call_s": first_call_s} | peer.notes)


def check(
    who: str, x: Tensor, reference: Reference, blocks: int, precision: str, *, iterative: bool = False
) -> dict[str, object]:
    """Errors of tokens x after `blocks` blocks; WrongResult where they are too large.

    error_over_allowed: the largest one over 2 x eager's + eps |x|, of fp32 decodes where fp64 tells eager's.
    """
    want = reference.after[blocks - 1].double()
    error = x.double() - want
    largest, rms = error.abs().max().item(), error.square().mean().sqrt().item()
    if precision == "bf16":
        got, bound, what = rms, BF16_BOUND * want.square().mean().sqrt().item(), "root mean square error"
    else:
        share = ITERATIVE_BOUND if iterative else FP32_BOUND
        got, bound, what = largest, share * want.abs().max().item(), "largest error"
        bound = max(bound, AMPLIFIED * reference.rounding)
    if not got <= bound:  # NaN too
        raise WrongResult(
            f"{who}: expected a {what} of at most {bound:.3g} against {reference.kind}, got {got:.3g}: not timed"
        )
    row = {"max_error": largest, "rms_error": rms, "error_against": reference.kind}
    if precision == "fp32" and reference.kind == "fp64" and blocks == len(reference.after):
        # what the tests allow on trained flows: twice eager's error and one rounding
        row["error_over_allowed"] = largest / (2 * reference.rounding + EPS * want.abs().max().item())
    return row


def _say(text: str) -> None:
    print(f"bench decode: {text}", file=sys.stderr, flush=True)
