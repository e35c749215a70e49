"""What this GPU can do, measured in the run that is judged by it: copy bandwidth and GEMM rate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from .timing import Call, Timer

COPY_BYTES = 4 << 30  # read plus written
GEMM = 8192


@dataclass
class Case:
    """One row, or several of a kind: what it is, and a function that measures the rest of it.

    needs: seconds that must be left, or it is left out. limit: seconds after which it counts as hanging.
    """

    labels: dict
    run: Callable[[], dict | list[dict]]
    needs: float = 0.0
    limit: float = 60.0


def cases(timer: Timer, dry: bool) -> Iterator[Case]:
    """Rows with "limit" and "gb_s" or "tflop_s"."""
    yield Case({"limit": "copy"}, partial(_copy, timer, dry))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        yield Case({"limit": f"{name} GEMM"}, partial(_gemm, timer, dtype, dry))


def _copy(timer: Timer, dry: bool) -> dict:
    """The faster of the driver's copy and of a kernel that reads and writes. Random data: zeros run faster."""
    size = COPY_BYTES // 8 if not dry else 1 << 16
    source = torch.randn(size, device=timer.device)
    to = torch.empty_like(source)
    calls = {"driver": Call(partial(to.copy_, source)), "kernel": Call(partial(torch.neg, source, out=to))}
    times = timer(calls, cold=True)
    rates = {f"{who}_gb_s": 8 * size / seconds / 1e9 for who, seconds in times.seconds.items()}
    if not rates:
        raise RuntimeError("; ".join(times.failed.values()))
    return {"mb": 8 * size / 1e6, "gb_s": max(rates.values())} | rates


def _gemm(timer: Timer, dtype: torch.dtype, dry: bool) -> dict:
    n = GEMM if not dry else 128
    a, b = (torch.randn(n, n, device=timer.device).to(dtype) for _ in range(2))
    times = timer({"ours": Call(partial(torch.mm, a, b))}, cold=True)
    return {"n": n} | times.row(lambda seconds: {"tflop_s": 2 * n**3 / seconds / 1e12})


def bound(limits: list[dict], work: dict[str, float]) -> float | None:
    """Seconds that the work takes at least: bytes of "copy", FLOPs of "bf16 GEMM". None if a rate is not known."""
    rates = {row["limit"]: row["gb_s"] * 1e9 if "gb_s" in row else row.get("tflop_s", 0) * 1e12 for row in limits}
    if not all(rates.get(name) for name in work):
        return None
    return max(amount / rates[name] for name, amount in work.items())


def share(seconds: float, limit: float | None) -> dict:
    return {} if limit is None else {"percent_of_limit": 100 * limit / seconds}
