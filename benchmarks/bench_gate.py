"""Gates: time and bandwidth, against eager torch, on a CPU.

The Triton kernels of a GPU are measured by `python -m benchmarks.gpu --only kernels`. Bytes by the model of one pass:
of F results "gelu" moves 2 F elements and 3 F for the gradient, "swiglu" 3 F and 5 F. The limit is a torch copy of as
many bytes on the same threads; an exponential or an error function of each element comes on top. On a CPU "gelu" is
torch's own.

    python -m benchmarks.bench_gate [--quick] [--threads N] [--json PATH]
"""

import torch

from biflow import ops, reference

from .timing import copy_function, interleaved, keep_memory, main

# tokens, hidden width F: the MLPs of the configurations S, M, L and iTARFlow-B/2
CASES = [("S 64", 64 * 16, 512), ("M 64", 64 * 49, 1024), ("L 16", 16 * 256, 1536), ("B/2 16", 16 * 256, 3072)]
QUICK = CASES[:2]


def _functions(module, kind: str, tokens: int, hidden: int):
    """The call without autograd, and the backward of a graph that is kept."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn((tokens, hidden * (2 if kind == "swiglu" else 1)), generator=generator).requires_grad_()

    def forward():
        with torch.no_grad():
            return module.gate(m, kind)

    out = module.gate(m, kind)
    grad = torch.ones_like(out)
    return forward, lambda: torch.autograd.grad(out, m, grad, retain_graph=True)


def run(quick: bool = False) -> list[dict]:
    """One row per case, kind and pass: us, GB/s, percent of copy bandwidth, x eager."""
    keep_memory()
    rows = []
    for case, tokens, hidden in QUICK if quick else CASES:
        for kind, elements in (("gelu", (2, 3)), ("swiglu", (3, 5))):
            ours = _functions(ops, kind, tokens, hidden)
            eager = _functions(reference, kind, tokens, hidden)
            for i, what in enumerate(("", " backward")):
                moved = 4 * tokens * hidden * elements[i]
                calls = {"ours": ours[i], "eager": eager[i], "copy": copy_function(moved)}
                times = interleaved(calls, rounds=3 if quick else 7)
                rows.append(
                    {
                        "op": "gate" + what,
                        "case": case,
                        "kind": kind,
                        "shape": [tokens, hidden],
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
