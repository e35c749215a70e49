"""alignment_error: time and memory of a head's squared errors, beside the plain form, on a CPU.

The plain form is what a training step does without the op: torch's norm, its linear layer, the squares. `ours` and
`plain` are forward and backward of one head; `percent_of_copy` has the time of a torch copy of the bytes that no form
can spare, h read twice and its gradient written once. The Triton kernels have no benchmark yet.

MB: in a process of its own, the peak of the resident set over what it was before a loss over 8 heads, forward and
backward, each of a state of its own; less one state's gradient. The states' gradients are dropped as they come, as in a
network, where the layers before take them up. Linux only.

    python -m benchmarks.bench_alignment [--quick] [--threads N] [--json PATH]
"""

import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from biflow import ops

from .timing import copy_function, keep_memory, main, ratio, turns

# B, T, C, D: heads of the configurations S, M and iTARFlow-B/2
CASES = [("S 64", (64, 16, 128, 4)), ("M 64", (64, 49, 256, 16)), ("B/2 16", (16, 256, 768, 16))]
QUICK = CASES[:2]
HEADS = 8


def plain(h, target, norm_weight, norm_bias, head_weight, head_bias, *, scale, kind, eps):
    if kind == "layernorm":
        y = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps)
    else:
        y = F.rms_norm(h, h.shape[-1:], norm_weight, eps)
    return ((F.linear(y, head_weight, head_bias) - target).square() * scale[..., None]).sum((1, 2))


FORMS = {"ours": ops.alignment_error, "plain": plain}


def head(shape: tuple[int, int, int, int], kind: str, seed: int = 0) -> tuple[list[Tensor | None], Tensor]:
    """h, target and the parameters, all leaves but the target; scale (B,T)."""
    batch, tokens, width, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, tokens, width), (batch, tokens, outputs), (width,), (width,), (outputs, width), (outputs,)]
    drawn = [torch.randn(shape, generator=generator).requires_grad_(i != 1) for i, shape in enumerate(shapes)]
    drawn[3] = drawn[3] if kind == "layernorm" else None
    return drawn, torch.rand(batch, tokens, generator=generator)


class _Dropped(torch.autograd.Function):
    """h, whose gradient goes nowhere."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return None


def extra_bytes(form: str, kind: str, shape: tuple[int, int, int, int]) -> int:
    """Of this process, which must be new: see above."""
    f, options = FORMS[form], {"kind": kind, "eps": 1e-5}

    def loss(heads):
        return sum(f(_Dropped.apply(t[0]), *t[1:], scale=scale, **options).sum() for t, scale in heads)

    loss([head((1, 2, *shape[2:]), kind)]).backward()  # torch's threads and libraries
    heads = [head(shape, kind, seed) for seed in range(HEADS)]
    before = _status("VmRSS")
    loss(heads).backward()
    return max(_status("VmHWM"), before) - before - heads[0][0][0].nbytes


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def _in_a_new_process(*args: object) -> int | None:
    if not Path("/proc/self/status").exists():
        return None
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    code += f"from benchmarks.bench_alignment import extra_bytes; print(extra_bytes(*{args!r}))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


def run(quick: bool = False) -> list[dict]:
    """One row per case and kind: us, x plain, percent of copy bandwidth, MB."""
    keep_memory()
    rows = []
    for case, shape in QUICK if quick else CASES:
        for kind in ("layernorm", "rmsnorm"):
            tensors, scale = head(shape, kind)
            leaves = [t for t in tensors if t is not None and t.requires_grad]

            def step(f, tensors=tensors, scale=scale, kind=kind, leaves=leaves):
                error = f(*tensors, scale=scale, kind=kind, eps=1e-5)
                return error, *torch.autograd.grad(error.sum(), leaves)

            for got, want in zip(*(step(f) for f in FORMS.values()), strict=True):
                assert (got - want).norm() <= 1e-5 * want.norm()
            moved = 3 * tensors[0].nbytes
            calls = {name: lambda f=f, step=step: step(f) for name, f in FORMS.items()}
            times = turns({**calls, "copy": copy_function(moved)}, rounds=3 if quick else 7)
            us = {name: 1e6 * sorted(t)[len(t) // 2] for name, t in times.items()}
            extra = {form: _in_a_new_process(form, kind, shape) for form in FORMS}
            rows.append(
                {
                    "op": "alignment_error forward + backward",
                    "case": case,
                    "kind": kind,
                    "shape": list(shape),
                    "us": us["ours"],
                    "plain_us": us["plain"],
                    "x_plain": ratio(times["ours"], times["plain"]),
                    "percent_of_copy": 100 * us["copy"] / us["ours"],
                    "extra_mb": None if extra["ours"] is None else extra["ours"] / 1e6,
                    "plain_extra_mb": None if extra["plain"] is None else extra["plain"] / 1e6,
                }
            )
    return rows


if __name__ == "__main__":
    main(run, __doc__)
