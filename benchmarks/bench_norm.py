"""Norm, and the residual addition with the norm of its sum: time and bandwidth, against eager torch, on a CPU.

The Triton kernels of a GPU are measured by `python -m benchmarks.gpu --only kernels`. Bytes by the model of one pass
over N elements: norm moves 2 N (x in, y out), add_norm 4 N (x and residual in, h and y out), their gradients 3 N and
4 N (h and the outputs' gradients in, one gradient out). The limit is a torch copy of as many bytes on the same threads.
LayerNorm in float32, as here, is torch's own on a CPU.

    python -m benchmarks.bench_norm [--quick] [--threads N] [--json PATH]
"""

import torch

from biflow import ops, reference

from .timing import copy_function, interleaved, keep_memory, main

# tokens, C: a pass of the configurations S, M, L and iTARFlow-B/2
CASES = [("S 64", 64 * 16, 128), ("M 64", 64 * 49, 256), ("L 16", 16 * 256, 384), ("B/2 16", 16 * 256, 768)]
QUICK = CASES[:2]


def _functions(module, name: str, kind: str, tokens: int, width: int):
    """The call without autograd, and the backward of a graph that is kept."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, width)] * (1 if name == "norm" else 2) + [(width,)] * (2 if kind == "layernorm" else 1)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]

    def call():
        return getattr(module, name)(*leaves, kind=kind, eps=1e-5)

    def forward():
        with torch.no_grad():
            return call()

    out = call()
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in out]
    return forward, lambda: torch.autograd.grad(out, leaves, grads, retain_graph=True)


def run(quick: bool = False) -> list[dict]:
    """One row per case, kind and pass: us, GB/s, percent of copy bandwidth, x eager."""
    keep_memory()
    rows = []
    for case, tokens, width in QUICK if quick else CASES:
        for name, kind in (
            ("norm", "layernorm"),
            ("norm", "rmsnorm"),
            ("add_norm", "layernorm"),
            ("add_norm", "rmsnorm"),
        ):
            ours = _functions(ops, name, kind, tokens, width)
            eager = _functions(reference, name, kind, tokens, width)
            for i, what in enumerate(("", " backward")):
                moved = 4 * tokens * width * ((2, 3) if name == "norm" else (4, 4))[i]
                calls = {"ours": ours[i], "eager": eager[i], "copy": copy_function(moved)}
                times = interleaved(calls, rounds=3 if quick else 7)
                rows.append(
                    {
                        "op": name + what,
                        "case": case,
                        "kind": kind,
                        "shape": [tokens, width],
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
