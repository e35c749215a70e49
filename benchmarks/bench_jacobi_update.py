"""One fixed-point step, `ops.jacobi_update_`: time, achieved bandwidth and share of the machine's copy bandwidth,
against plain torch (`reference.jacobi_update_`).

Bytes by the model of one pass: 5 N elements of the window (x, z and two parameters in, x out), 4 N with a shift alone.
The limit is a torch copy that moves as many bytes with as many threads.

    python -m benchmarks.bench_jacobi_update [--quick] [--threads N] [--json PATH]
"""

import torch

from biflow import ops, reference

from .timing import copy_function, interleaved, keep_memory, main

# (B, T, D), window, options: the configurations S, M, L whole and by windows, and one that leaves the caches
STARFLOW = {"scale": "softplus", "clip": ("tanh", 4.0)}
CASES = [
    ("S, B = 1", (1, 16, 4), (0, 16), {}),
    ("M, B = 16", (16, 49, 16), (0, 49), {}),
    ("L, B = 16", (16, 256, 12), (0, 256), {}),
    ("L, B = 16, window", (16, 256, 12), (128, 160), {"flip": True}),
    ("L3", (16, 256, 192), (0, 256), {}),
    ("L3, interleaved", (16, 256, 192), (0, 256), {"layout": "interleaved"}),
    ("L3, softplus tanh", (16, 256, 192), (0, 256), STARFLOW),
    ("L3, shift only", (16, 256, 192), (0, 256), {"shift_only": True}),
    ("memory", (32, 256, 768), (0, 256), {}),
]
QUICK = [CASES[0], CASES[3], CASES[4]]


def run(quick: bool = False) -> list[dict]:
    """One row per case: us, GB/s, percent of copy bandwidth, x plain torch."""
    keep_memory()
    rows = []
    for name, (B, T, D), (start, stop), options in QUICK if quick else CASES:
        generator = torch.Generator().manual_seed(0)
        parameters = 1 if options.get("shift_only") else 2
        x, z = (torch.randn(B, T, D, generator=generator) for _ in range(2))
        raw = 0.5 * torch.randn(B, T, parameters * D, generator=generator)

        def step(module, x=x, z=z, raw=raw, start=start, stop=stop, options=options):
            new, moved = x.clone(), torch.empty(2, len(x))
            return (new, moved), lambda: module.jacobi_update_(new, z, raw, moved, start=start, stop=stop, **options)

        (got, ours), (want, plain) = step(ops), step(reference)
        ours(), plain()
        for g, w in zip(got, want, strict=True):
            if not torch.allclose(g, w, atol=1e-5, rtol=1e-5):  # a wrong result has no speed
                raise RuntimeError(f"{name}: jacobi_update_ differs from the reference by {(g - w).abs().max()}")
        moved = 4 * B * (stop - start) * D * (3 + parameters)
        times = interleaved({"ours": ours, "torch": plain, "copy": copy_function(moved)}, 3 if quick else 7)
        rows.append(
            {
                "op": "jacobi_update",
                "case": name,
                "shape": [B, T, D],
                "window": stop - start,
                "mb": moved / 1e6,
                "us": times["ours"] * 1e6,
                "gb_s": moved / times["ours"] / 1e9,
                "copy_gb_s": moved / times["copy"] / 1e9,
                "percent_of_copy": 100 * times["copy"] / times["ours"],
                "torch_us": times["torch"] * 1e6,
                "x_torch": times["torch"] / times["ours"],
            }
        )
    return rows


if __name__ == "__main__":
    main(run, __doc__)
