"""What this GPU can do, measured in the run that is judged by it: copy bandwidth and GEMM rate."""

from functools import partial

import torch

from .timing import Call, Timer

COPY_BYTES = 4 << 30  # read plus written
GEMM = 8192


def measure(timer: Timer, dry: bool) -> list[dict]:
    """Rows with "limit" and "gb_s" or "tflop_s". Random data: zeros run faster."""
    device, size = timer.device, COPY_BYTES // 8 if not dry else 1 << 16
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    seconds = timer({"copy": Call(partial(target.copy_, source))}, cold=True)["copy"]
    rows = [{"limit": "copy", "mb": 8 * size / 1e6, "gb_s": 8 * size / seconds / 1e9}]
    del source, target
    n = GEMM if not dry else 128
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = timer({"gemm": Call(partial(torch.mm, a, b))}, cold=True)["gemm"]
        rows.append({"limit": f"{name} GEMM", "n": n, "tflop_s": 2 * n**3 / seconds / 1e12})
    return rows


def rate(limits: list[dict], name: str) -> float:
    """Bytes/s of "copy", FLOP/s of a GEMM."""
    row = next(row for row in limits if row["limit"] == name)
    return row["gb_s"] * 1e9 if "gb_s" in row else row["tflop_s"] * 1e12
