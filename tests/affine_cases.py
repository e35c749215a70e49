"""What the tests of the affine ops share, on a CPU and in tests/kernels: options, inputs, the comparison with fp64."""

import itertools
import math

import torch

from biflow import reference

LAYOUTS = ("scale_shift", "shift_scale", "interleaved")
SCALES = ("exp", "softplus", "sigmoid")
CLIPS = (None, ("hard", 0.7), ("tanh", 0.9))
OPTIONS = [
    dict(layout=layout, scale=scale, clip=clip, clip_on=clip_on, causal=causal, flip=flip)
    for layout, scale, clip, clip_on, causal, flip in itertools.product(
        LAYOUTS, SCALES, CLIPS, ("both", "scale"), (True, False), (False, True)
    )
]
RESULTS = ("output", "logdet", "grad input", "grad params")


def make(shape, data=torch.float32, net=None, seed=0, spread=1.0):
    """x, params, mask for shape (B, T, D)."""
    g = torch.Generator().manual_seed(seed)
    B, T, D = shape
    x = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(data)
    params = (spread * torch.randn(B, T, 2 * D, generator=g, dtype=torch.float64)).to(net or data)
    mask = torch.rand(B, T, generator=g) > 0.3
    return x, params, mask


def value_and_grads(op, x, params, weights, **options):
    """output, logdet and the gradients of a random linear functional of both."""
    x, params = x.clone().requires_grad_(), params.clone().requires_grad_()
    y, logdet = op(x, params, **options)
    wy, wl = (w.to(t.dtype) for w, t in zip(weights, (y, logdet), strict=True))
    grads = torch.autograd.grad((y * wy).sum() + (logdet * wl).sum(), (x, params))
    return y.detach(), logdet.detach(), *grads


def run_reference(direction, x, params, weights, mask, options, device="cpu"):
    """RESULTS of biflow.reference, on a device; direction: "encode" or "decode"."""
    extra = {} if direction == "encode" else {"return_logdet": True}
    op = getattr(reference, f"affine_{direction}")
    x, params, *weights = (t.to(device) for t in (x, params, *weights))
    mask = None if mask is None else mask.to(device)
    return [t.cpu() for t in value_and_grads(op, x, params, weights, **options, **extra, mask=mask)]


def excess(got, same, exact, floor):
    """Error of `got` beyond what DESIGN allows, relative to 1 + |exact|; <= 0 passes."""
    size = 1 + exact.abs()
    error, allowed = (((t.double() - exact).abs() / size).max().item() for t in (got, same))
    return error - (2 * allowed + floor)


def assert_matches(run, x, params, mask, options, device="cpu"):
    """RESULTS of run(direction, x, params, weights, mask, options) in both directions, against fp64.

    device: where the reference of the same dtype runs: where the kernels do, as exp and log differ between devices.
    """
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(t, generator=g, dtype=torch.float64) for t in (x.shape, x.shape[:1])]
    logdet_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weights = [w.to(x.dtype if w.dim() == 3 else logdet_dtype) for w in weights]
    for direction in ("encode", "decode"):
        inputs = (x, params, weights, mask, options)
        got = run(direction, *inputs)
        same = run_reference(direction, *inputs, device)
        exact = run_reference(direction, x.double(), params.double(), weights, mask, options)
        for i, name in enumerate(RESULTS):
            assert got[i].dtype == (same[i].dtype if i else x.dtype)
            terms = x[0].numel() if name == "logdet" else 1
            # docs/decisions/0007
            roundings = 8 * terms if x.dtype == torch.float64 else math.sqrt(terms)
            floor = roundings * torch.finfo(got[i].dtype).eps
            over = excess(got[i], same[i], exact[i], floor)
            assert over <= 0, (
                f"{direction} {name} over by {over:.2e}: {tuple(x.shape)} {x.dtype} {params.dtype} {options}"
            )
