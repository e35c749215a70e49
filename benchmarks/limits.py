"""What the machine can do, measured in the run that is judged by it: read bandwidth and GEMM rate.

Read bandwidth: every thread reads its share (working set / threads) of memory again and again, in calls that run long
enough to hide their start: the sum of fp32 values, the maximum of int32 values, and, for sets that leave the caches, a
vector-matrix product. The rates of threads that run at the same time are added; the best way and turn counts. That is
the rate at which weights can come from whichever cache holds a set of that size.

GEMM rate: `x @ w.T` of torch on its own threads, the best of a few shapes.

A limit is what the machine could do, so of two measurements the better one counts: see `best`.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """bytes: of one weight. gemm: the limits that bound its arithmetic, the best counts."""

    bytes: int
    gemm: tuple[str, ...]


# bf16 weights may also be widened and multiplied as fp32 where a machine's bf16 products are slow
PRECISIONS = {"fp32": Precision(4, ("fp32 GEMM",)), "bf16": Precision(2, ("bf16 GEMM", "fp32 GEMM"))}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = [(512, 768, 3072), (1024, 1024, 1024), (2048, 2048, 2048)]  # (rows, in, out)
CALL_BYTES = 16e6  # read by one call
MEGABYTE = 1e6


@dataclass(frozen=True)
class Limits:
    """Measured limits: a row per working set and number of threads ("mb", "gb_s"), and per GEMM ("gflop_s")."""

    rows: list[dict]

    def step_seconds(self, weight_bytes: int, flops: float, precision: str) -> float:
        """The least time of a step that reads `weight_bytes` and computes `flops`: the longer of the two.

        weight_bytes: one of the working sets that were measured; the best number of threads counts, since one core
        with the whole set may beat many with their shares.
        """
        reads = [row["gb_s"] for row in self.rows if row.get("mb") == weight_bytes / MEGABYTE]
        gemms = [row["gflop_s"] for row in self.rows if row["limit"] in PRECISIONS[precision].gemm]
        return max(weight_bytes / max(reads), flops / max(gemms)) * 1e-9


def measure(working_sets: Iterable[int], *, quick: bool = False) -> Limits:
    """Limits for working sets of these many bytes, with as many threads as torch has now."""
    threads, seconds = torch.get_num_threads(), 0.04 if quick else 0.1
    rows = []
    for size in sorted(set(working_sets)):
        for count in sorted({1, threads}):
            rate, how = read_bandwidth(size, count, seconds)
            rows.append({"limit": "read", "mb": size / MEGABYTE, "threads": count, "gb_s": rate / 1e9, "how": how})
    for name, dtype in DTYPES.items():
        rate, how = gemm_rate(dtype, seconds, SHAPES[:1] if quick else SHAPES)
        rows.append({"limit": f"{name} GEMM", "threads": threads, "gflop_s": rate / 1e9, "how": how})
    return Limits(rows)


def best(first: Limits, last: Limits) -> Limits:
    """The better of two measurements of the same things; both rates stay in the rows, as "first" and "last"."""
    rows = []
    for a, b in zip(first.rows, last.rows, strict=True):
        rate = "gb_s" if "gb_s" in a else "gflop_s"
        rows.append((a if a[rate] >= b[rate] else b) | {"first": a[rate], "last": b[rate]})
    return Limits(rows)


def read_bandwidth(size: int, threads: int, seconds: float = 0.1, turns: int = 3) -> tuple[float, str]:
    """Bytes/s at which `threads` threads together read a working set of `size` bytes, and the way that reached it."""
    best, how = 0.0, ""
    own = torch.get_num_threads()
    torch.set_num_threads(1)  # what the threads below inherit
    try:
        for _ in range(turns):
            for name, way in READS.items():
                rate = _together(way, max(size // threads, 4096), threads, seconds)
                if rate > best:
                    best, how = rate, name
    finally:
        torch.set_num_threads(own)
    return best, how


def _repeated(share: int) -> tuple[Tensor, int]:
    """A buffer of about `share` bytes as many equal rows (stride 0), and the bytes that one pass over them reads."""
    n = max(share // 4, 1)
    rows = math.ceil(CALL_BYTES / (4 * n))
    return torch.ones(n).expand(rows, n), 4 * n * rows


def _sum(share: int) -> tuple[Callable[[], object], int]:
    rows, moved = _repeated(share)
    return lambda: rows.sum(-1), moved


def _maximum(share: int) -> tuple[Callable[[], object], int]:
    rows, moved = _repeated(share)
    integers = rows[0].view(torch.int32).expand(rows.shape)
    return lambda: integers.amax(-1), moved


def _product(share: int) -> tuple[Callable[[], object], int]:
    columns = 1024
    matrix = torch.ones(max(share // (4 * columns), 1), columns)
    vector, out = torch.ones(1, matrix.shape[0]), torch.empty(1, columns)
    return lambda: torch.mm(vector, matrix, out=out), 4 * matrix.numel()


READS = {"fp32 sum": _sum, "int32 maximum": _maximum, "vector-matrix product": _product}


def _together(way: Callable, share: int, threads: int, seconds: float) -> float:
    """Bytes/s of all threads; each has its own memory, made by itself, and starts when all are ready."""
    barrier, rates = threading.Barrier(threads), [0.0] * threads

    def work(i: int) -> None:
        call, moved = way(share)
        call()
        barrier.wait()
        calls, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            call()
            calls += 1
        rates[i] = calls * moved / elapsed

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(rates)


def gemm_rate(
    dtype: torch.dtype, seconds: float = 0.1, shapes: list[tuple[int, int, int]] = SHAPES
) -> tuple[float, str]:
    """FLOP/s of x (rows, in) times w (out, in) transposed, the best of `shapes`; and that shape."""
    best, how = 0.0, ""
    for rows, into, out in shapes:
        x, w = torch.ones(rows, into, dtype=dtype), torch.ones(out, into, dtype=dtype)
        y = torch.empty(rows, out, dtype=dtype)
        torch.mm(x, w.T, out=y)
        deadline = time.perf_counter() + seconds
        while True:
            start = time.perf_counter()
            torch.mm(x, w.T, out=y)
            end = time.perf_counter()
            rate = 2 * rows * into * out / (end - start)
            if rate > best:
                best, how = rate, f"{rows}x{into}x{out}"
            if end > deadline:
                break
    return best, how
