"""The exact inverse: microseconds a token step and milliseconds an image, beside what bounds it and what others need.

Flows of benchmarks/flows.py, random weights with a mild coupling: every block converges, so jacobi and auto are at
their best; a trained flow has a block that needs the sequential solver, which `ms_image_mixed` of auto allows for.

Ours: `flow.decode(z)` as users call it, on frozen weights. Where two of those would take more than LIMIT, one block
stands for all; where that would, the sequential solver's first steps do ("steps_timed" of "steps"). A step is one
network evaluation of one block by the sequential solver, whatever the solver ("us_step"). auto: calibrated here on one
block. Others (others.py): on the first steps of a block, whose cost does not fall with the cache's length: that
flatters them. Nothing is timed before its result was found right ("error", subject.py).

The limit of a step is the longer of

    bytes of a block's weight matrices, and of the keys and values over half of the tokens, in that precision / rate
    2 FLOPs a weight and sample, attention over half of the tokens / GEMM rate of that precision

with the copy's rate ("percent_of_limit"), and with that at which all multiprocessors read a set of that size again and
again ("percent_of_read"; from `machine`): a block of B/2 may stay in the L2. A sample that is iterated reads weights
once for many tokens, so that jacobi and auto may pass 100%.
"""

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_decode import step_flops, weight_bytes
from biflow import solvers
from biflow.calibration import calibrate
from biflow.models import TarFlow
from biflow.models.block import Block
from biflow.solvers import Condition, Method, Policy

from .limits import Case, bound, share
from .others import CONTESTANTS, seconds_a_step
from .subject import Subject
from .timing import Timer

LIMIT = 4.0  # seconds of a row, about: a call that warms up and is checked, and at least one that is timed
CALIBRATION = 10.0  # seconds
TOL = 1e-5  # of the iterative solvers, as in TarFlow.decode
KERNELS = 12  # rows of a split by kernel
BYTES = {"fp32": 4, "bf16": 2}

DECIDING = (("B/2", 1), ("B/2", 64), ("B/2", 256), ("TARFlow-64", 1), ("TARFlow-64", 64))
REST = (
    *(("B/2", batch) for batch in (8, 16)),
    *(("S", batch) for batch in (1, 64, 256, 8, 16)),
    *(("TARFlow-64", batch) for batch in (256, 8, 16)),
    *(("AFHQ", batch) for batch in (1, 64, 256, 8, 16)),
)
OURS = ("sequential", "jacobi", "auto")
# what is measured, the most important first: flows, and for each of them who, in which precision
PLAN = (
    (DECIDING, (("sequential", "bf16"), ("auto", "bf16"), ("eager", "bf16"))),
    (DECIDING[:2], (("phases", "bf16"),)),
    (DECIDING, (("sequential", "fp32"), ("graph", "bf16"))),
    (DECIDING[:1], (("compiled", "bf16"), ("ml-tarflow", "bf16"))),
    (REST, (("sequential", "bf16"), ("auto", "bf16"))),
    (DECIDING, (("auto", "fp32"), ("jacobi", "bf16"))),
    (DECIDING[3:4], (("ml-tarflow", "bf16"),)),
    (REST, (("eager", "bf16"),)),
    (DECIDING, (("static", "bf16"), ("eager", "fp32"))),
    (DECIDING[3:4], (("phases", "bf16"), ("compiled", "bf16"))),
    (REST, (("sequential", "fp32"), ("auto", "fp32"), ("jacobi", "bf16"), ("graph", "bf16"))),
    (DECIDING[1:2], (("ml-tarflow", "bf16"), ("compiled", "bf16"))),
    (DECIDING, (("jacobi", "fp32"), ("graph", "fp32"))),
)
NEEDS = {"compiled": 45.0, "ml-tarflow": 20.0}  # seconds; others may begin as long as there are any


@dataclass
class Bench:
    """What the rows share: the flows, and what earlier rows told (`known`: us_step by flow, batch, precision, who)."""

    timer: Timer
    limits: list[dict]
    machine: list[dict]
    dry: bool
    ml_tarflow: str | None
    known: dict[tuple, float] = field(default_factory=dict)
    subjects: dict[str, Subject] = field(default_factory=dict)

    def subject(self, name: str) -> Subject:
        if name not in self.subjects:
            self.subjects[name] = Subject(name, self.timer.device, self.dry)
        return self.subjects[name]


def cases(
    timer: Timer, limits: list[dict], machine: list[dict], dry: bool, ml_tarflow: str | None, before: list[dict]
) -> Iterator[Case]:
    """before: rows of a process that could not go on."""
    bench = Bench(timer, limits, machine, dry, ml_tarflow)
    for row in before:
        if "us_step" in row and "who" in row:
            bench.known[row["decode"], row["batch"], row["precision"], row["who"]] = row["us_step"]
    seen = set()
    for flows, ways in PLAN:
        for name, batch in flows:
            for who, precision in ways:
                key = (name, min(batch, 2) if dry else batch, precision, who)
                if key in seen or (who == "ml-tarflow" and ml_tarflow is None):
                    continue
                if dry and batch > 1 and name != "B/2":
                    continue
                seen.add(key)
                yield case(bench, *key)


def case(bench: Bench, name: str, batch: int, precision: str, who: str) -> Case:
    labels = {"phases" if who == "phases" else "decode": name, "batch": batch, "precision": precision}
    if who == "phases":
        return Case(labels, functools.partial(phases, bench, name, batch, precision))
    measure = ours if who in OURS else other
    run = functools.partial(measure, bench, name, batch, precision, who)
    return Case(labels | {"who": who}, run, needs=NEEDS.get(who, 0.0), limit=90.0 if who in NEEDS else 60.0)


# --- what bounds a step


def step_bytes(block: Block, batch: int, precision: str) -> float:
    """What a step reads: the block's weights, and the keys and values of half of the tokens."""
    c = block.config
    return weight_bytes(block, precision) + BYTES[precision] * batch * c.layers * 2 * c.width * c.tokens / 2


def read_rate(machine: list[dict], size: float) -> float | None:
    """Bytes/s at which all multiprocessors read a set of `size` again and again: the least larger one that was
    measured, else the largest. None: not measured."""
    sets = [(row["mb"] * 1e6, row["gb_s"] * 1e9) for row in machine if "mb" in row and "gb_s" in row]
    if not sets:
        return None
    fits = min((mb for mb, _ in sets if mb >= size), default=max(mb for mb, _ in sets))
    return max(rate for mb, rate in sets if mb == fits)


def limit_columns(bench: Bench, block: Block, batch: int, precision: str, seconds: float) -> dict:
    """Of a step that takes so many seconds."""
    size, gemm = step_bytes(block, batch, precision), {f"{precision} GEMM": step_flops(block, batch)}
    limit, compute = bound(bench.limits, {"copy": size} | gemm), bound(bench.limits, gemm)
    if limit is None:
        return {}
    row = {"limit_us": limit * 1e6, "bound_by": "GEMM" if limit == compute else "memory"} | share(seconds, limit)
    rate = read_rate(bench.machine, size)
    return row | ({} if rate is None else {"percent_of_read": 100 * max(size / rate, compute) / seconds})


def decode_row(
    bench: Bench, subject: Subject, batch: int, precision: str, step_seconds: float, timed: int, error: float
) -> dict:
    """The columns that all rows have. timed: how many of the flow's steps were."""
    steps = sum(block.sequential_passes for block in subject.flow.blocks)
    return {
        "us_step": step_seconds * 1e6,
        "ms_image": step_seconds * steps / batch * 1e3,
        **limit_columns(bench, subject.block, batch, precision, step_seconds),
        "steps_timed": timed,
        "steps": steps,
        "error": error,
    }


# --- ours


@torch.inference_mode()
def ours(bench: Bench, name: str, batch: int, precision: str, who: str) -> dict:
    """A row of `flow.decode(z, solver=who)`."""
    subject, timer, more = bench.subject(name), bench.timer, {}
    flow, block, condition = subject.flow, subject.block, Condition(precision=precision)
    method = Method(who) if who != "auto" else None
    with flow.frozen():
        if method is None:
            entry = calibrated(bench, subject, batch, precision)
            if entry is None:
                return {"left_out": f"no calibration within {CALIBRATION:g} s"}
            best = entry.blocks[0]
            method = Method(best.solver, best.window)
            more = {"method": best.solver + (f" {best.window}" if best.window else ""), "calibrated_at": entry.batch}
        seconds, error = first_tokens(timer, subject, batch, condition, method)
        passes, blocks, z = block.sequential_passes, len(flow.blocks), subject.z(batch)
        guess = expected(bench, block, batch, precision, method, seconds, subject.short)
        if guess > LIMIT and method.solver != "sequential":  # its first tokens tell nothing of the others
            return {"left_out": f"one block would take about {guess:.0f} s"}
        if 2 * guess * blocks <= LIMIT:
            decode = functools.partial(flow.decode, z, solver=who, precision=precision, tol=TOL)
            error = max(error, subject.check_flow(decode(), z, precision))
            step, timed = timer.few(decode, seconds=LIMIT / 3) / (passes * blocks), passes * blocks
        elif guess <= LIMIT:
            solve = solving(block, z, condition, method)
            error = max(error, subject.check_block(solve(), z, precision))
            step, timed = timer.few(solve, seconds=LIMIT / 3) / passes, passes
        else:
            step = seconds / (subject.short - 1)
            timed = subject.short - 1
    bench.known[name, batch, precision, who] = step * 1e6
    sequential = bench.known.get((name, batch, precision, "sequential"))
    if who == "auto" and method.solver != "sequential" and sequential is not None:
        mixed = (blocks - 1) * step + sequential * 1e-6
        more["ms_image_mixed"] = mixed * passes / batch * 1e3  # one block is decoded sequentially
    return decode_row(bench, subject, batch, precision, step, timed, error) | more


def solving(block: Block, z: Tensor, condition: Condition, method: Method) -> Callable[[], Tensor]:
    return lambda: solvers.solve(block, z, condition, method, TOL)[0]


def first_tokens(
    timer: Timer, subject: Subject, batch: int, condition: Condition, method: Method
) -> tuple[float, float]:
    """Seconds and error of the inverse of a block's first tokens."""
    block = subject.first(subject.short)
    with block.frozen():
        solve = solving(block, subject.z(batch, subject.short), condition, method)
        error = subject.check_first(solve(), condition.precision)
        return timer.few(solve, seconds=0.1), error


def expected(
    bench: Bench, block: Block, batch: int, precision: str, method: Method, seconds: float, short: int
) -> float:
    """About how long the inverse of a block takes whose first `short` tokens take `seconds`."""
    c, steps = block.config, block.sequential_passes
    later = max(c.tokens - short, 0)
    if method.solver == "sequential":
        reads = BYTES[precision] * batch * c.layers * 2 * c.width * later / 2  # that the first tokens do not see
        slower = bound(bench.limits, {"copy": reads}) or 0.0
        return steps * (seconds / (short - 1) + 2 * slower)
    windows = 1 if method.window is None else c.tokens / max(method.window, short)
    passes = 16 * step_flops(block, batch) * c.tokens  # of tokens, not of steps: at half of the GEMM's rate
    computing = bound(bench.limits, {f"{precision} GEMM": passes}) or seconds * c.tokens / short
    return 2 * windows * seconds + 2 * (computing if later else 0.0)


def calibrated(bench: Bench, subject: Subject, batch: int, precision: str) -> solvers.Entry | None:
    """What `flow.policy` says of this batch, measured on one block now if that is a matter of seconds.

    Otherwise what was measured at the nearest batch; None: nothing was.
    """
    flow, block = subject.flow, subject.block
    sequential = bench.known.get((subject.name, batch, precision, "sequential"))
    seconds = None if sequential is None else sequential * 1e-6 * block.sequential_passes
    if seconds is None or 18 * seconds <= CALIBRATION:  # six candidates, three times
        with torch.device(subject.device):
            single = TarFlow(dataclasses.replace(flow.config, num_blocks=1)).eval()
        single.blocks[0] = block
        policy = calibrate(
            single, batches=(batch,), precisions=(precision,), tol=TOL, repetitions=3 if (seconds or 1) < 0.1 else 1
        )
        entries = [dataclasses.replace(e, blocks=e.blocks * len(flow.blocks)) for e in policy.entries]
        flow.policy = (flow.policy or Policy(())).replacing(tuple(entries))
    if flow.policy is None:
        return None
    return flow.policy.choose(bench.timer.device.type, precision, batch, 0.0)


# --- others


def other(bench: Bench, name: str, batch: int, precision: str, who: str) -> dict:
    """A row of one of CONTESTANTS; x_...: how many times as long as ours it takes."""
    subject, path = bench.subject(name), {"path": bench.ml_tarflow} if who == "ml-tarflow" else {}
    decoder = CONTESTANTS[who](subject, batch, precision, **path)
    step, timed, error = seconds_a_step(bench.timer, subject, decoder, precision)
    row = decode_row(bench, subject, batch, precision, step, timed, error)
    for solver in OURS:
        own = bench.known.get((name, batch, precision, solver))
        row |= {} if own is None else {f"x_{solver}": step * 1e6 / own}
    return row


# --- where the time goes


@torch.inference_mode()
def phases(bench: Bench, name: str, batch: int, precision: str) -> list[dict]:
    """The sequential inverse of one block, split by kernel; one row where it is one kernel."""
    subject = bench.subject(name)
    block, z, kind = subject.block, subject.z(batch), bench.timer.device.type
    with block.frozen():
        solve = solving(block, z, Condition(precision=precision), Method("sequential"))
        subject.check_block(solve(), z, precision)
        with profile(activities=[ProfilerActivity.CUDA if kind == "cuda" else ProfilerActivity.CPU]) as profiled:
            solve()
            if kind == "cuda":
                torch.cuda.synchronize()
    return split(profiled, kind, block.sequential_passes)


def split(profiled: profile, kind: str, steps: int) -> list[dict]:
    """By kernel, the longest first: microseconds and calls a step, share of the whole."""
    device = DeviceType.CUDA if kind == "cuda" else DeviceType.CPU
    spent, calls = defaultdict(float), defaultdict(int)
    for event in profiled.key_averages():
        if event.device_type == device:
            name = short_name(event.key)
            spent[name] += event.self_device_time_total if kind == "cuda" else event.self_cpu_time_total
            calls[name] += event.count
    total = sum(spent.values())
    if not total:
        raise RuntimeError(f"expected kernels in the profile, got none on {kind}")
    longest = sorted(spent, key=spent.get, reverse=True)
    rows = [(name, spent[name], calls[name]) for name in longest[:KERNELS]]
    if rest := longest[KERNELS:]:
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
