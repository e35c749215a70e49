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
    attn_temp: float = 1.0,
    tol: float = 1e-5,
    repetitions: int = 7,
    seed: int = 0,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Policy:
    """Measure the solvers on every block of the flow and keep the fastest of each in `flow.policy`.

    For every batch size, precision and guidance z ~ N(0, I) is decoded block by block. On what a block really gets to
    invert, the candidates (sequential; jacobi; windowed with W = 16, 32, 64, 128 < T) run once, on packed weights;
    those that took more than three times the fastest are not run again, the others take turns, so that a slow moment of
    the machine hits all of them, and their medians are compared. On a GPU each runs once before that. A candidate that
    fell back for any sample is out. The sequential solver is chosen if it is within 5% of the fastest, since it needs
    no tolerance.

    Args:
        flow: the model, fp32, on the device that it is to be used on. Entries of `flow.policy` for other devices,
            threads, precisions, batch sizes and guidances are kept.
        batches, precisions, guidances: as in decode; each combination is measured.
        attn_temp: of the guided ones, as in decode; guidance of a model without classes and context needs one other
            than 1. What is found is followed whatever the temperature of a decode.
        tol: as in decode. A decode to a tighter one does not follow what iterative solvers needed for this one.
        repetitions: timed runs of a candidate.
        seed: of z. Labels are 0, 1, ... in turn; context is one token of standard normal numbers.
        progress: show a progress bar with the time left, on stderr.
        clock: seconds, as a function; on a GPU it is read when the GPU has done its work.

    Returns:
        The new policy, which `flow.policy` now is. `biflow.save` keeps it in the file.

    Raises:
        TypeError, ValueError: another kind of model, no list, an empty one or a value in it that decode does not take,
            guidance that changes nothing, because the model has no condition and attn_temp is 1.
    """
    if not isinstance(flow, TarFlow):
        raise TypeError(f"flow: expected a TarFlow, got {type(flow).__name__}")
    for name, values, of in (
        ("batches", batches, "ints"), ("precisions", precisions, "names"), ("guidances", guidances, "numbers"),
    ):  # fmt: skip
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"{name}: expected a list of {of}, got {type(values).__name__} {values!r}")
        if not values:
            raise ValueError(f"{name}: expected at least one, got none")
    for batch in batches:
        _check_int("batches", batch, 1)
    _check_int("repetitions", repetitions, 1)
    _check_int("seed", seed, 0)
    check_number("tol", tol, above=0, single=True)
    c, weight = flow.config, flow.blocks[0].proj_in.weight
    check_kernels(weight)
    for precision in precisions:
        check_decoding(precision, solvers.PRECISIONS, weight)
    old = Policy(()) if flow.policy is None else flow.policy.fitting(c.num_blocks)
    situations = [
        (precision, batch, Guidance(guidance, attn_temp=attn_temp))
        for precision in dict.fromkeys(precisions)
        for batch in dict.fromkeys(batches)
        for guidance in dict.fromkeys(guidances)
    ]
    strongest = max(guidance.scale for _, _, guidance in situations)
    if strongest > 0 and not (c.num_classes or c.context_dim) and attn_temp == 1:
        raise ValueError(
            "guidances: expected 0, or attn_temp other than 1, for a model without classes and context, where guidance "
            f"acts through attn_temp alone; got {strongest:g}"
        )
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
            entries.append(Entry(*situation, tuple(reversed(found)), tol))
    flow.policy = old.replacing(tuple(entries))
    return flow.policy


def _fastest(
    block: solvers.InvertibleBlock, z: Tensor, condition: Condition, tol: float, repetitions: int, clock: Callable
) -> tuple[Tensor, Measurement]:
    """The exact x of this block, and the fastest method."""
    sequential = Method("sequential")
    candidates = [Method("jacobi"), *(Method("windowed", w) for w in WINDOWS if w < block.tokens)]
    # both pack weights, those of drafts too, which is not timed
    block.iterate(z, condition)
    x, count, _ = solvers.solve(block, z, condition, sequential, tol)
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


def _check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
