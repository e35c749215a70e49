"""alignment_error: time and memory of a head's squared errors, beside the plain form, on a CPU.

The plain form is what a training step does without the op: torch's norm, its linear layer, the squares. Rows of one
head have its forward and backward; `percent_of_copy` has the time of a torch copy of the bytes that no form can spare,
h read twice and its gradient written once; `off` is the largest difference of E or a gradient, by root mean squares.
The Triton kernels are measured by `python -m benchmarks.gpu --only kernels`.

`extra_mb`: in a process of its own, the peak of the resident set over what it was before a loss over 8 heads, forward
and backward, each of a state of its own; less one state's gradient. The states' gradients are dropped as they come, as
in a network, where the layers before take them up. Linux only.

Rows of a training step have the whole of it: trajectory, both passes of the inverse with guidance, gradients, AdamW;
`kept_mb` is what autograd keeps for it, without the weights.

    python -m benchmarks.bench_alignment [--quick] [--threads N] [--json PATH]
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import biflow
from biflow import ops, train
from biflow.models.reverse import Head
from biflow.train import distill

from .timing import copy_function, keep_memory, main, ratio, resident_bytes, turns

# B, T, C, D: heads of the configurations S, M and iTARFlow-B/2
CASES = [("S 64", (64, 16, 128, 4)), ("M 64", (64, 49, 256, 16)), ("B/2 16", (16, 256, 768, 16))]
HEADS = 8
# what flow and inverse share, layers a block and a group, batch: configs/ablations/base/inverse.yaml; B/2's width
STEPS = [
    ("ablations 64", {"img_size": 28, "in_channels": 1, "patch_size": 4, "num_blocks": 4, "width": 128}, 2, 64),
    ("B/2 4, 2 blocks", {"img_size": 32, "in_channels": 4, "patch_size": 2, "num_blocks": 2, "width": 768}, 1, 4),
]
KINDS = ("layernorm", "rmsnorm")


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
    before = resident_bytes("VmRSS")
    loss(heads).backward()
    return max(resident_bytes("VmHWM"), before) - before - heads[0][0][0].nbytes


def _in_a_new_process(*args: object) -> int | None:
    if not Path("/proc/self/status").exists():
        return None
    code = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
    code += f"from benchmarks.bench_alignment import extra_bytes; print(extra_bytes(*{args!r}))"
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


def head_row(case: str, shape: tuple[int, int, int, int], kind: str, rounds: int) -> dict:
    tensors, scale = head(shape, kind)
    leaves = [t for t in tensors if t is not None and t.requires_grad]

    def step(f):
        error = f(*tensors, scale=scale, kind=kind, eps=1e-5)
        return error, *torch.autograd.grad(error.sum(), leaves)

    off = max(((a - b).norm() / b.norm()).item() for a, b in zip(*(step(f) for f in FORMS.values()), strict=True))
    assert off <= 1e-5, (case, kind, off)
    moved = 3 * tensors[0].nbytes
    calls = {name: partial(step, f) for name, f in FORMS.items()}
    times = turns({**calls, "copy": copy_function(moved)}, rounds)
    us = {name: 1e6 * statistics.median(t) for name, t in times.items()}
    extra = {form: _in_a_new_process(form, kind, shape) for form in FORMS}
    return {
        "op": "alignment_error forward + backward",
        "case": case,
        "kind": kind,
        "shape": list(shape),
        "us": us["ours"],
        "plain_us": us["plain"],
        "x_plain": ratio(times["ours"], times["plain"]),
        "percent_of_copy": 100 * us["copy"] / us["ours"],
        "off": off,
        "extra_mb": None if extra["ours"] is None else extra["ours"] / 1e6,
        "plain_extra_mb": None if extra["plain"] is None else extra["plain"] / 1e6,
    }


class PlainHead(Head):
    """The same head, whose norm and predictions are kept."""

    def error(self, h: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        return distill.squared_error(self(h), target, scale)


def step_row(case: str, shape: dict, layers: int, batch: int, kind: str, rounds: int) -> dict:
    torch.manual_seed(0)
    flow = biflow.TarFlow(biflow.TarFlowConfig(**shape, layers_per_block=layers, num_classes=10, noise_std=0.1))
    own = {"num_classes": 10, "class_tokens": 4, "guidance_tokens": 2, "max_guidance": 4.0, "norm": kind}
    config = train.InverseTraining(model=biflow.BiFlowConfig(**shape, layers_per_group=layers, **own))
    x = 2 * torch.rand(batch, shape["in_channels"], shape["img_size"], shape["img_size"]) - 1
    calls, kept, gradients = {}, {}, {}
    for form in FORMS:
        torch.manual_seed(1)
        model = biflow.BiFlow(config.model)
        for head in model.heads:
            torch.nn.init.normal_(head[1].weight, std=0.02)
        if form == "plain":
            weights = model.heads.state_dict()
            model.heads = torch.nn.ModuleList(
                PlainHead(kind, shape["width"], config.model.channels) for _ in model.heads
            )
            model.heads.load_state_dict(weights)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(2)
            train.alignment_loss(model, flow, x, torch.arange(batch) % 10, generator, config)[0].backward()
            optimizer.step()

        kept[form], gradients[form] = _kept_bytes(model, step)
        calls[form] = step
    off = ((gradients["ours"] - gradients["plain"]).norm() / gradients["plain"].norm()).item()
    assert off <= 1e-5, (case, kind, off)
    times = turns(calls, rounds)
    us = {name: 1e6 * statistics.median(t) for name, t in times.items()}
    return {
        "op": "training step",
        "case": case,
        "kind": kind,
        "us": us["ours"],
        "plain_us": us["plain"],
        "x_plain": ratio(times["ours"], times["plain"]),
        "off": off,
        "kept_mb": kept["ours"] / 1e6,
        "plain_kept_mb": kept["plain"] / 1e6,
    }


def _kept_bytes(model: torch.nn.Module, step: Callable[[], None]) -> tuple[int, Tensor]:
    """What autograd keeps of a first step beside the weights, and that step's gradient."""
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {}

    def keep(t):
        storages.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return sum(s.nbytes() for where, s in storages.items() if where not in weights), gradient


def run(quick: bool = False) -> list[dict]:
    """A row per case and kind: us, x plain, the difference from plain; percent of copy bandwidth and MB, or MB kept.

    quick: the smallest head alone.
    """
    keep_memory()
    cases, steps, rounds = (CASES[:1], [], 3) if quick else (CASES, STEPS, 7)
    rows = [head_row(*case, kind, rounds) for case in cases for kind in KINDS]
    return rows + [step_row(*case, kind, rounds) for case in steps for kind in KINDS]


if __name__ == "__main__":
    main(run, __doc__)
