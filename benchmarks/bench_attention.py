"""Attention: time and arithmetic rate, against eager torch and against this machine's matrix multiplication.

Work: 4 B H T^2 d floating-point operations (q k^T and p v), half of it when causal. The limit is a torch matmul of the
same dtype on the same threads.

    python -m benchmarks.bench_attention [--quick] [--threads N] [--json PATH]
"""

import torch

from biflow import ops, reference

from .timing import interleaved, main

# (B, H, T, d), causal: the parallel passes of the configurations S, M, L and iTARFlow-B/2
CASES = [
    ("S", (64, 2, 16, 64), True),
    ("M", (64, 4, 49, 64), True),
    ("L", (16, 6, 256, 64), True),
    ("B/2", (4, 12, 256, 64), True),
    ("B/2 reverse", (4, 12, 268, 64), False),
]
QUICK = CASES[:2]


def matmul_function(size: int = 1024):
    """A square matmul in fp32 and its number of floating-point operations."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return lambda: a @ b, 2 * size**3


def run(quick: bool = False) -> list[dict]:
    """One row per case: us, GFLOP/s, percent of the matmul rate, x eager."""
    matmul, matmul_flops = matmul_function()
    rows = []
    for name, shape, causal in QUICK if quick else CASES:
        B, H, T, d = shape
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        flops = 4 * B * H * T * T * d * (0.5 if causal else 1)
        with torch.no_grad():
            times = interleaved(
                {
                    "ours": lambda q=q, k=k, v=v, c=causal: ops.attention(q, k, v, causal=c),
                    "eager": lambda q=q, k=k, v=v, c=causal: reference.attention(q, k, v, causal=c),
                    "matmul": matmul,
                },
                rounds=3 if quick else 7,
            )
        rate, limit = flops / times["ours"] / 1e9, matmul_flops / times["matmul"] / 1e9
        rows.append(
            {
                "op": "attention",
                "case": name,
                "shape": list(shape),
                "causal": causal,
                "us": times["ours"] * 1e6,
                "gflop_s": rate,
                "matmul_gflop_s": limit,
                "percent_of_matmul": 100 * rate / limit,
                "eager_us": times["eager"] * 1e6,
                "x_eager": times["eager"] / times["ours"],
            }
        )
    return rows


if __name__ == "__main__":
    main(run, __doc__)
