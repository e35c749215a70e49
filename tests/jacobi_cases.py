"""What the tests of jacobi_update_ share, on a CPU and in tests/kernels: options, inputs, the comparison with fp64."""

import itertools

import torch

from biflow import reference

OPTIONS = [
    dict(layout=layout, scale=scale, clip=clip, clip_on=clip_on, flip=flip)
    for layout, scale, clip, clip_on, flip in itertools.product(
        ("scale_shift", "shift_scale", "interleaved"),
        ("exp", "softplus", "sigmoid"),
        (None, ("hard", 0.7), ("tanh", 0.9)),
        ("both", "scale"),
        (False, True),
    )
] + [
    dict(shift_only=True, clip=clip, scale=scale, flip=flip)
    for clip, scale, flip in itertools.product((None, ("hard", 0.7)), ("exp", "sigmoid"), (False, True))
]


def make(shape, shift_only=False, dtype=torch.float32, **_):
    g = torch.Generator().manual_seed(0)
    B, T, D = shape
    x, z = (torch.randn(B, T, D, generator=g).to(dtype) for _ in range(2))
    raw = 0.8 * torch.randn(B, T, D if shift_only else 2 * D, generator=g).to(dtype)
    return x, z, raw, torch.full((2, B), 7.0, dtype=dtype)


def stepped(op, tensors, dtype=torch.float32, **options):
    """(x after the step, moved)"""
    x, z, raw, moved = (t.to(dtype).clone() for t in tensors)
    assert op(x, z, raw, moved, **options) is None
    return x, moved


def assert_parity(op, shape, every=1, device="cpu"):
    """The error is at most twice that of the fp32 reference, plus one rounding of 1 + |value|, for all options.

    every: of how many options one is taken. device: where op and the fp32 reference run.
    """
    tokens = shape[1]
    for number, options in list(enumerate(OPTIONS))[shape[2] % every :: every]:
        start = number % tokens
        stop = start + 1 + number // tokens % (tokens - start)
        tensors, call = make(shape, **options), dict(options, start=start, stop=stop)
        exact = stepped(reference.jacobi_update_, tensors, torch.float64, **call)
        there = [t.to(device) for t in tensors]
        plain = stepped(reference.jacobi_update_, there, **call)
        got = stepped(op, there, **call)
        for what, g, p, e in zip(("x", "moved"), got, plain, exact, strict=True):
            error, same = (((t.cpu() - e).abs() / (1 + e.abs())).max() for t in (g, p))
            assert error <= 2 * same + torch.finfo(torch.float32).eps, f"{what} with {call}"
