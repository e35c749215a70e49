"""Affine coupling: time, achieved bandwidth and share of the machine's copy bandwidth, against eager torch.

Bytes by the model of one pass: encode and decode move 4 N elements (data in, params in, data out), a backward 7 N
(data, params and gradient in; gradients of data and params out). The limit is a torch copy that moves as many bytes
with as many threads.

    python -m benchmarks.bench_affine [--quick] [--threads N] [--json PATH]
"""

import torch

from biflow import ops, reference

from .timing import copy_function, interleaved, keep_memory, main

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


if __name__ == "__main__":
    main(run, __doc__)
