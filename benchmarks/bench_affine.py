"""Affine coupling: time, achieved bandwidth and share of the machine's copy bandwidth, against eager torch.

Bytes by the model of one pass: encode and decode move 4 N elements (data in, params in, data out), a backward 7 N
(data, params and gradient in; gradients of data and params out). The limit is a torch copy that moves as many bytes
with as many threads.

    python benchmarks/bench_affine.py [--quick] [--threads N] [--json PATH]
"""

import argparse

import torch
from timing import copy_function, interleaved, keep_memory, write_json

from biflow import ops, reference

# (B, T, D), dtype of data, dtype of params, options. fp32: 4 N elements are 0.8 MB (L2), 13 MB (L3), 100 MB (memory)
F32, BF16 = torch.float32, torch.bfloat16
STARFLOW = {"scale": "softplus", "clip": ("tanh", 4.0), "causal": False}
CASES = [
    ("L2", (4, 64, 192), F32, F32, {}),
    ("L3", (16, 256, 192), F32, F32, {}),
    ("memory", (32, 256, 768), F32, F32, {}),
    ("memory, bf16 params", (32, 256, 768), F32, BF16, {}),
    ("memory, bf16", (32, 512, 768), BF16, BF16, {}),
    ("memory, D=12", (32, 16384, 12), F32, F32, {}),
    ("memory, D=4 flip", (32, 49152, 4), F32, F32, {"flip": True}),
    ("memory, interleaved", (32, 256, 768), F32, F32, {"layout": "interleaved"}),
    ("memory, softplus tanh", (32, 256, 768), F32, F32, STARFLOW),
    ("L2, softplus tanh", (4, 64, 192), F32, F32, STARFLOW),
]
QUICK = [CASES[0], CASES[2], CASES[5]]


def _functions(module, direction, x, params, options):
    """The forward call without autograd, and the backward of a graph that is kept."""
    f = getattr(module, f"affine_{direction}")

    def forward():
        with torch.no_grad():
            return f(x, params, **options)

    leaves = [x.clone().requires_grad_(), params.clone().requires_grad_()]
    out = f(*leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in out]

    def backward():
        return torch.autograd.grad(out, leaves, grads, retain_graph=True)

    return forward, backward


def run(quick: bool = False, rounds: int | None = None) -> list[dict]:
    """One row per case and pass: us, GB/s, percent of copy bandwidth, x eager."""
    keep_memory()
    rows = []
    rounds = rounds or (3 if quick else 5)
    for name, shape, data, net, options in QUICK if quick else CASES:
        generator = torch.Generator().manual_seed(0)
        B, T, D = shape
        x = torch.randn(shape, generator=generator).to(data)
        params = (0.5 * torch.randn((B, T, 2 * D), generator=generator)).to(net)
        for direction in ("encode",) if quick else ("encode", "decode"):
            ours = _functions(ops, direction, x, params, options)
            eager = _functions(reference, direction, x, params, options)
            for i, what in enumerate(("", " backward")):
                per_element = (2 + i) * data.itemsize + (2 + 2 * i) * net.itemsize
                moved = x.numel() * per_element
                times = interleaved({"ours": ours[i], "eager": eager[i], "copy": copy_function(moved)}, rounds)
                rows.append(
                    {
                        "op": f"affine_{direction}{what}",
                        "case": name,
                        "shape": list(shape),
                        "data": str(data)[6:],
                        "params": str(net)[6:],
                        "mb": moved / 1e6,
                        "us": times["ours"] * 1e6,
                        "gb_s": moved / times["ours"] / 1e9,
                        "copy_gb_s": moved / times["copy"] / 1e9,
                        "percent_of_copy": 100 * times["copy"] / times["ours"],
                        "eager_us": times["eager"] * 1e6,
                        "x_eager": times["eager"] / times["ours"],
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three cases, encode only: under 10 s")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--json", help="write the rows and the machine to this file")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = run(args.quick)
    print(f"{'op':24}{'case':24}{'MB':>7}{'us':>10}{'GB/s':>7}{'copy':>7}{'% copy':>8}{'x eager':>9}")
    for r in rows:
        print(
            f"{r['op']:24}{r['case']:24}{r['mb']:7.1f}{r['us']:10.1f}{r['gb_s']:7.1f}{r['copy_gb_s']:7.1f}"
            f"{r['percent_of_copy']:8.0f}{r['x_eager']:9.1f}"
        )
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
