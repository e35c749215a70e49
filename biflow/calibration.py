"""Which solver is fastest for which block of a flow, on this machine: what `solver="auto"` follows."""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from biflow import solvers
from biflow.config import check_number
from biflow.models import TarFlow
from biflow.models.layers import check_decoding, check_kernels, device_clock, device_name
from biflow.solvers import Condition, Entry, Guidance, Measurement, Method, Policy

WINDOWS = (16, 32, 64, 128)
HOPELESS = 3.0  # times the best of the first runs: not worth a second one
FIRST_IS_SLOW = ("cuda",)  # where graphs are recorded, kernels compiled and memory found at the first call
NEARLY = 1.05  # a sequential decode within 5% of the fastest is preferred: it needs no tolerance


@torch.no_grad()
def calibrate(
    flow: TarFlow,
    *,
    batches: Sequence[int] = (1, 16, 64),
    precisions: Sequence[str] = solvers.PRECISIONS,
    guidances: Sequence[float] = (0.0,),
    tol: float = 1e-5,
    repetitions: int = 7,
    seed: int = 0,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Policy:
    """Measure the solvers on every block of the flow and keep the fastest of each in `flow.policy`.

    For every batch size, precision and guidance z ~ N(0, I) is decoded block by block. On what a block really gets to
    invert, the candidates (sequential; jacobi; windowed with W = 16, 32, 64, 128 < T) run once; those that took more
    than three times the fastest are not run again, the others take turns, so that a slow moment of the machine hits all
    of them, and their medians are compared. On a GPU each runs once before that. A candidate that fell back for any
    sample is out. The sequential solver is chosen if it is within 5% of the fastest, since it needs no tolerance.

    Args:
        flow: the model, fp32, on the device that it is to be used on. Entries of `flow.policy` for other devices,
            precisions, batch sizes and guidances are kept.
        batches, precisions, guidances: as in decode; each combination is measured.
        tol: as in decode.
        repetitions: timed runs of a candidate.
        seed: of z. Labels are 0, 1, ... in turn; context is one token of standard normal numbers.
        progress: show a progress bar with the time left, on stderr.
        clock: seconds, as a function; on a GPU it is read when the GPU has done its work.

    Returns:
        The new policy, which `flow.policy` now is. `biflow.save` keeps it in the file.

    Raises:
        TypeError, ValueError: another kind of model, an empty list or a value in it that decode does not take, guidance
            for a model without a condition.
    """
    if not isinstance(flow, TarFlow):
        raise TypeError(f"flow: expected a TarFlow, got {type(flow).__name__}")
    _check_counts("batches", batches)
    _check_counts("repetitions", (repetitions,))
    check_number("tol", tol, above=0)
    c, weight = flow.config, flow.blocks[0].proj_in.weight
    check_kernels(weight)
    for precision in precisions:
        check_decoding(precision, solvers.PRECISIONS, weight)
    old = Policy(()) if flow.policy is None else flow.policy.fitting(c.num_blocks)
    situations = [
        (precision, batch, Guidance(guidance))
        for precision in dict.fromkeys(precisions)
        for batch in dict.fromkeys(batches)
        for guidance in dict.fromkeys(guidances)
    ]
    if not situations:
        raise ValueError("precisions, guidances: expected at least one of each, got none")
    if not (c.num_classes or c.context_dim) and any(guidance.scale for _, _, guidance in situations):
        raise ValueError("guidances: expected 0 for a model without classes and context, got more")
    device, entries = weight.device, []
    clock = device_clock(device, clock)
    with (
        torch.autocast(device.type, enabled=False),
        tqdm(total=len(situations) * c.num_blocks, desc="calibrate", unit="block", disable=not progress) as bar,
    ):
        for precision, batch, guidance in situations:
            generator = torch.Generator().manual_seed(seed)
            z = torch.randn(batch, c.tokens, c.channels, generator=generator).to(device)
            y = torch.arange(batch, device=device) % c.num_classes if c.num_classes else None
            context = torch.randn(batch, 1, c.context_dim, generator=generator).to(device) if c.context_dim else None
            condition = Condition(y, context, guidance, precision)
            x, found = z * flow.var.sqrt(), []
            for block in reversed(flow.blocks):
                x, measurement = _fastest(block, x, condition, tol, repetitions, clock)
                found.append(measurement)
                bar.update()
            situation = (device.type, device_name(device), torch.get_num_threads(), precision, batch, guidance.scale)
            entries.append(Entry(*situation, tuple(reversed(found))))
    flow.policy = old.replacing(tuple(entries))
    return flow.policy


def _fastest(
    block: solvers.InvertibleBlock, z: Tensor, condition: Condition, tol: float, repetitions: int, clock: Callable
) -> tuple[Tensor, Measurement]:
    """The exact x of this block, and the fastest method."""
    sequential = Method("sequential")
    candidates = [Method("jacobi"), *(Method("windowed", w) for w in WINDOWS if w < block.tokens)]
    x, count, _ = solvers.solve(block, z, condition, sequential, tol)  # also packs the weights, which is not timed
    for method in candidates if z.device.type in FIRST_IS_SLOW else ():
        solvers.solve(block, z, condition, method, tol)
    passes: dict[Method, int] = {sequential: count}

    def run(method: Method) -> float | None:
        """Seconds; None if a sample fell back."""
        start = clock()
        _, passes[method], fallbacks = solvers.solve(block, z, condition, method, tol)
        seconds = clock() - start
        return None if fallbacks else seconds

    first = {method: run(method) for method in (sequential, *candidates)}
    best = min(seconds for seconds in first.values() if seconds is not None)
    times = {m: [] for m, seconds in first.items() if seconds is not None and seconds <= HOPELESS * best}
    for _ in range(repetitions):
        for method, taken in times.items():
            taken.append(run(method))
    medians = {m: statistics.median(taken) for m, taken in times.items() if None not in taken}
    fastest = min(medians, key=medians.get)
    if medians.get(sequential, math.inf) <= NEARLY * medians[fastest]:
        fastest = sequential
    return x, Measurement(fastest.solver, fastest.window, passes[fastest], 1e3 * medians[fastest])


def _check_counts(name: str, values: Sequence[int]) -> None:
    if not values:
        raise ValueError(f"{name}: expected at least one, got none")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
