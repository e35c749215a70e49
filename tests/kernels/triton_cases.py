"""Cases for the Triton kernels, called through their torch ops: on a GPU, or as a script in Triton's interpreter.

    TRITON_INTERPRET=1 python tests/kernels/triton_cases.py        prints {case: what is wrong, or null} as JSON

The interpreter works on CPU tensors, so the script registers the kernels for these. It has no bf16: it truncates.
"""

import contextlib
import importlib
import itertools
import json
import math
import sys
import traceback
from collections.abc import Callable
from functools import partial

import pytest
import torch

from biflow import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# name: shape of x. A row that is no power of two with tiles left over, many short rows in a tile, ...
SHAPES = {
    "one element": (1, 1),
    "ragged": (5, 7, 130),
    "short rows": (37, 5),
    "d = 64": (2, 3, 64),
    "C = 768": (9, 768),
    "power of two": (3, 1024),
    "wide": (2, 3000),
    "more tiles than programs": (2081, 200),
}
# name: dtypes of x, the residual, the weights, and of y where it is not x's
DTYPES = {
    "fp32": (F32, F32, F32, None),
    "fp16": (F16, F16, F16, None),
    "fp16 beside an fp32 stream": (F16, F32, F32, None),
    "fp32 to fp16": (F32, F32, F32, F16),
    "fp32 beside an fp16 stream": (F32, F16, F16, None),
    "bf16": (BF16, BF16, BF16, None),
    "bf16 beside an fp32 stream": (BF16, F32, F32, None),
    "fp32 to bf16": (F32, F32, F32, BF16),
    "bf16 and fp16": (BF16, F16, F32, None),
}
GATE_DTYPES = {"fp32": F32, "fp16": F16, "bf16": BF16}


def gradients(f: Callable, leaves: list, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of f and the leaves' gradients, None left out."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    out = f(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    wanted = [t for t in leaves if t is not None]
    grads = [g.to(o.dtype) for g, o in zip(grads, out, strict=True)]
    return [o.detach() for o in out] + list(torch.autograd.grad(out, wanted, grads))


def compare(got: list, same: list, exact: list, terms: list[float], names: list[str]) -> None:
    """Error at most twice that of the same-dtype reference and a rounding of a sum of so many terms."""
    for g, s, e, n, name in zip(got, same, exact, terms, names, strict=True):
        assert g.dtype == s.dtype, f"{name}: expected {s.dtype}, got {g.dtype}"
        assert g.shape == e.shape, f"{name}: expected {tuple(e.shape)}, got {tuple(g.shape)}"
        if not g.numel():
            continue
        size = 1 + e.abs()
        error, allowed = (((t.double() - e).abs() / size).max().item() for t in (g, s))
        bound = 2 * allowed + math.sqrt(n) * torch.finfo(g.dtype).eps
        assert error <= bound, f"{name}: error {error:.2e}, allowed {bound:.2e}"


def draw(device: str, *shape: int, dtype: torch.dtype = torch.float64, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(device)


def norm(device: str, shape: tuple, dtypes: tuple, kind: str, bias: bool, residual: bool, view: Callable = lambda t: t):
    """Values and gradients against the reference. view: from a tensor of `shape` to x."""
    x_dtype, residual_dtype, weight_dtype, dtype = dtypes
    x = view(draw(device, *shape, dtype=x_dtype, seed=0) + 0.3)  # a mean that matters
    width = x.shape[-1]
    leaves = [x, draw(device, *x.shape, dtype=residual_dtype, seed=1) if residual else None]
    leaves += [draw(device, width, dtype=weight_dtype, seed=2)]
    leaves += [draw(device, width, dtype=weight_dtype, seed=3) if bias else None]
    grads = [draw(device, *x.shape, seed=4 + i) for i in range(2 if residual else 1)]

    def ours(x, r, w, b):
        if r is None:
            return torch.ops.biflow.norm(x, w, b, kind, 1e-5, dtype)
        return torch.ops.biflow.add_norm(x, r, w, b, kind, 1e-5, dtype)

    def plain(x, r, w, b, dtype=dtype):
        options = dict(kind=kind, eps=1e-5, dtype=dtype)
        return reference.norm(x, w, b, **options) if r is None else reference.add_norm(x, r, w, b, **options)

    exact = [None if t is None else t.double() for t in leaves]
    rounded = [g.to(dtype or x_dtype) if i == 0 else g for i, g in enumerate(grads)]
    rounded = [g.to(torch.promote_types(x_dtype, residual_dtype)) if i else g for i, g in enumerate(rounded)]
    rows = x.numel() // max(width, 1)
    # one channel: x - mean is 0, and the gradient a rounding error of grad - grad over sqrt(eps)
    inner = 1 / 1e-5 if width == 1 and kind == "layernorm" else width
    terms = [1] * len(grads) + [inner] * (1 + residual) + [rows] * (1 + bias)
    names = ["y", "h"][: len(grads)] + ["grad x", "grad residual"][: 1 + residual] + ["grad weight", "grad bias"]
    compare(
        gradients(ours, leaves, rounded),
        gradients(plain, leaves, rounded),
        gradients(partial(plain, dtype=None), exact, rounded),
        terms,
        names[: len(terms)],
    )


def gate(device: str, shape: tuple, dtype: torch.dtype, kind: str, view: Callable = lambda t: t):
    m = view(3 * draw(device, *shape, dtype=dtype, seed=0))
    shape = reference.gate(m, kind).shape
    grad = draw(device, *shape, dtype=dtype, seed=1)
    runs = [gradients(lambda m: torch.ops.biflow.gate(m, kind), [m], [grad])]
    runs += [gradients(lambda m: reference.gate(m, kind), [t], [grad]) for t in (m, m.double())]
    compare(*runs, [1, 1], ["y", "grad m"])


# name: shape of h and D. Rows in two programs, channels in chunks with a rest, outputs in tiles with a rest, ...
ALIGNMENTS = {
    "one of each": (1, 1, 1, 1),
    "ragged": (3, 7, 130, 5),
    "d = 64": (2, 5, 64, 16),
    "outputs in tiles": (2, 9, 70, 70),
    "C = 768": (1, 17, 768, 12),
    "more tiles than programs": (1, 40, 8192, 3),
}
# name: dtypes of h, of the target and scale, of the weights, and of what is multiplied
ALIGNMENT_DTYPES = {
    "fp32": (F32, F32, F32, None),
    "fp16": (F16, F16, F16, None),
    "fp32, products of fp16": (F32, F32, F32, F16),
    "fp16 beside fp32, products of fp16": (F16, F32, F32, F16),
    "bf16": (BF16, BF16, BF16, None),
    "fp32, products of bf16": (F32, F32, F32, BF16),
    "bf16 beside fp32, products of bf16": (BF16, F32, F32, BF16),
}


def alignment(
    device: str,
    shape: tuple,
    dtypes: tuple,
    kind: str,
    bias: bool,
    scale: str | None,
    view: Callable = lambda t: t,
    mean: float = 0.3,
):
    """Errors and gradients against the reference; view: from a tensor (B,T,C) to h."""
    h_dtype, target_dtype, weight_dtype, dtype = dtypes
    h = view((draw(device, *shape[:3], seed=0) + mean).to(h_dtype))
    batch, tokens, width = h.shape
    outputs, rows = shape[3], batch * tokens
    target = draw(device, batch, tokens, outputs, dtype=target_dtype, seed=1)
    leaves = [h, 1 + 0.3 * draw(device, width, seed=2), 0.5 * draw(device, width, seed=3) if bias else None]
    leaves += [draw(device, outputs, width, seed=4) / width**0.5, draw(device, outputs, seed=5) if bias else None]
    leaves[1:] = [None if t is None else t.to(weight_dtype) for t in leaves[1:]]
    sizes = {"token": (batch, tokens), "sample": (batch,)}
    scale = draw(device, *sizes[scale], seed=6).exp().to(target_dtype) if scale else None
    grad = 1 + draw(device, batch, dtype=F32, seed=7).abs()

    def ours(*leaves):
        return torch.ops.biflow.alignment_error(leaves[0], target, *leaves[1:], scale, kind, 1e-5, dtype)

    def plain(*leaves, dtype=dtype):
        return reference.alignment_error(leaves[0], target, *leaves[1:], scale=scale, kind=kind, eps=1e-5, dtype=dtype)

    exact = [None if t is None else t.double() for t in leaves]
    got, same, exact = (
        gradients(ours, leaves, [grad]),
        gradients(plain, leaves, [grad]),
        gradients(partial(plain, dtype=None), exact, [grad]),
    )
    names = ["E", "grad h", "grad norm_weight", "grad norm_bias", "grad head_weight", "grad head_bias"]
    terms = [tokens * outputs * width, (width + 1) * (outputs + 1)] + [rows * outputs] * 2 + [rows * width] * 2
    if not bias:
        names, terms = ([t for i, t in enumerate(of) if i not in (3, 5)] for of in (names, terms))
    if dtype is not None:  # docs/decisions/0007
        for g, s, e, name in zip(got, same, exact, names, strict=True):
            error, allowed = ((t.double() - e).norm() / e.norm() for t in (g, s))
            assert error <= 2 * allowed + torch.finfo(g.dtype).eps, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
        assert ((got[0] - same[0]).abs() / same[0].abs()).median() < 1e-5
        return
    for results in zip(got, same, exact, terms, names, strict=True):
        e = results[2]
        ones = 2.0 ** max(0, math.floor(math.log2(e.square().mean().sqrt().item() + 1e-30))) if e.numel() else 1
        compare(*([t / ones] for t in results[:3]), *([t] for t in results[3:]))


def alignment_again(device: str):
    """The same bits, without and with gradients, and of each row alone."""
    h, target, w = (draw(device, *s, dtype=F32, seed=i) for i, s in enumerate(((3, 40, 70), (3, 40, 5), (5, 70))))
    args = (target, h[0, 0], None, w, None, None, "layernorm", 1e-5, None)
    runs = [gradients(lambda h: torch.ops.biflow.alignment_error(h, *args), [h], [h[:, 0, 0]]) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    alone = [torch.ops.biflow.alignment_error(h[b : b + 1], target[b : b + 1], *args[1:]) for b in range(3)]
    assert torch.equal(torch.cat(alone), runs[0][0])


def alignment_tiles(device: str):
    """One tile for few outputs, several for many: which changes speed alone."""
    tile = importlib.import_module("biflow.ops._triton.alignment").tile
    assert [tile(outputs)["OUTPUTS"] for outputs in (1, 16, 17, 33, 500)] == [16, 16, 32, 32, 32]


def alignment_of_nothing(device: str):
    for batch, tokens in ((0, 3), (2, 0)):
        h, target, w = (torch.ones(s, device=device) for s in ((batch, tokens, 6), (batch, tokens, 2), (2, 6)))
        out = gradients(
            lambda h, w, target=target: torch.ops.biflow.alignment_error(
                h, target, w[0], None, w, None, None, "rmsnorm", 1e-5, None
            ),
            [h, w],
            [torch.ones(batch, device=device)],
        )
        assert [tuple(t.shape) for t in out] == [(batch,), (batch, tokens, 6), (2, 6)]
        assert not any(t.any() for t in out)


def alignment_opcheck(device: str):
    h, target = draw(device, 2, 3, 8, dtype=F16, seed=0).requires_grad_(), draw(device, 2, 3, 4, dtype=F32, seed=1)
    w, b, head, c = (
        draw(device, *s, dtype=F32, seed=i).requires_grad_() for i, s in enumerate(((8,), (8,), (4, 8), (4,)))
    )
    for norm_bias, head_bias, scale in ((b, c, target[..., 0]), (None, None, None)):
        args = (h, target, w, norm_bias, head, head_bias, scale, "layernorm", 1e-5, F16)
        torch.library.opcheck(torch.ops.biflow.alignment_error.default, args)
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(torch.ops.biflow.alignment_error_backward.default, (target[:, 0, 0], *args))


def only_one_output_is_used(device: str):
    x, r, w = (draw(device, *s, dtype=F32, seed=i) for i, s in enumerate(((4, 12), (4, 12), (12,))))
    grad = draw(device, 4, 12, dtype=F32, seed=3)

    def ours(x, r, w):
        return torch.ops.biflow.add_norm(x, r, w, None, "rmsnorm", 1e-6, None)

    def plain(x, r, w):
        return reference.add_norm(x, r, w, kind="rmsnorm", eps=1e-6)

    for got, want in (
        [gradients(lambda *t, f=f: f(*t)[0], [x, r, w], [grad]) for f in (ours, plain)],
        [gradients(lambda x, r, f=f: f(x, r, w)[1], [x, r], [grad]) for f in (ours, plain)],
    ):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def the_norm_is_that_of_the_rounded_sum(device: str):
    x, r, w = (draw(device, *s, dtype=F16, seed=i) for i, s in enumerate(((6, 40), (6, 40), (40,))))
    y, h = torch.ops.biflow.add_norm(x, r, w, None, "layernorm", 1e-5, None)
    assert torch.equal(h, x + r)
    assert torch.equal(y, torch.ops.biflow.norm(h, w, None, "layernorm", 1e-5, None))


def same_bits_again(device: str):
    x, w, b = (draw(device, *s, dtype=F32, seed=i) for i, s in enumerate(((60, 96), (96,), (96,))))
    runs = [
        gradients(lambda x, w, b: torch.ops.biflow.norm(x, w, b, "layernorm", 1e-5, None), [x, w, b], [x])
        for _ in range(3)
    ]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def empty(device: str):
    x, w = torch.zeros(0, 6, device=device), torch.ones(6, device=device)
    out = gradients(lambda x, w: torch.ops.biflow.add_norm(x, x, w, None, "rmsnorm", 1e-6, None), [x, w], [x, x])
    assert [tuple(t.shape) for t in out] == [(0, 6), (0, 6), (0, 6), (6,)]
    assert torch.equal(out[3], torch.zeros_like(w))
    for kind, width in (("swiglu", 3), ("gelu", 6)):
        y, grad = gradients(lambda m, kind=kind: torch.ops.biflow.gate(m, kind), [x], [x[:, :width]])
        assert (tuple(y.shape), tuple(grad.shape)) == ((0, width), (0, 6))


def second_derivative_is_refused_on_a_gpu(device: str):
    x, w = draw(device, 3, 8, dtype=F32, seed=0).requires_grad_(), torch.ones(8, device=device)
    for out in (
        torch.ops.biflow.norm(x, w, None, "rmsnorm", 1e-6, None),
        torch.ops.biflow.add_norm(x, x, w, None, "layernorm", 1e-6, None)[0],
        torch.ops.biflow.gate(x, "gelu"),
    ):
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivative"):
            torch.autograd.grad(grad.sum(), x)


def opcheck(device: str):
    x, h = (draw(device, 3, 5, 12, dtype=d, seed=0).requires_grad_() for d in (F16, F32))
    w, b = (draw(device, 12, dtype=F32, seed=i).requires_grad_() for i in (1, 2))
    calls = torch.ops.biflow
    for bias in (None, b):
        torch.library.opcheck(calls.norm.default, (h, w, bias, "layernorm", 1e-5, F16))
        torch.library.opcheck(calls.add_norm.default, (x, h, w, bias, "rmsnorm", 1e-5, None))
        args = (h.detach(), h.detach(), h.detach(), w.detach(), None if bias is None else bias.detach())
        torch.library.opcheck(calls.norm_backward.default, (*args, "layernorm", 1e-5, F16))
        torch.library.opcheck(calls.norm_backward.default, (args[0], None, *args[2:], "rmsnorm", 1e-5, None))
    for kind in ("swiglu", "gelu"):
        torch.library.opcheck(calls.gate.default, (h, kind))
        grad = h.detach() if kind == "gelu" else h.detach()[..., ::2]
        torch.library.opcheck(calls.gate_backward.default, (grad, h.detach(), kind))


def bad_input(device: str):
    """The ops check what would read out of bounds, without the public functions before them."""
    x, w = torch.zeros(3, 8, device=device), torch.zeros(7, device=device)
    for call, error in (
        (lambda: torch.ops.biflow.norm(x, w, None, "rmsnorm", 1e-6, None), ValueError),
        (lambda: torch.ops.biflow.add_norm(x, x[:2], x[0], None, "rmsnorm", 1e-6, None), ValueError),
        (lambda: torch.ops.biflow.norm(x, x[0], None, "norm", 1e-6, None), ValueError),
        (lambda: torch.ops.biflow.gate(x[:, :7], "swiglu"), ValueError),
        (lambda: torch.ops.biflow.gate(x.long(), "gelu"), TypeError),
        (
            lambda: torch.ops.biflow.alignment_error(
                x[None], x[None], x[0], None, x, None, None, "rmsnorm", 1e-6, None
            ),
            ValueError,
        ),
    ):
        with pytest.raises(error):
            call()


def needs_gpu(name: str) -> bool:
    """Whether a case cannot run in the interpreter, by its name."""
    return "bf16" in name or name.endswith("on a gpu")


def cases() -> dict[str, Callable[[str], None]]:
    """Every case by name."""
    found = {}
    options = list(itertools.product(("layernorm", "rmsnorm"), (True, False), (True, False)))
    for i, (name, shape) in enumerate(SHAPES.items()):
        for j, (kind, bias, residual) in enumerate(options):
            if name == "more tiles than programs" and j not in (0, 7):
                continue
            dtypes = list(DTYPES)[(i + j // 2) % len(DTYPES) if j % 2 else 0]
            text = f"norm, {name}, {kind}{' bias' * bias}{' residual' * residual}, {dtypes}"
            found[text] = partial(norm, shape=shape, dtypes=DTYPES[dtypes], kind=kind, bias=bias, residual=residual)
    for name, dtypes in DTYPES.items():
        both = {"bias": True, "residual": True}
        found[f"norm, every dtype, {name}"] = partial(norm, shape=(6, 136), dtypes=dtypes, kind="layernorm", **both)
    views = {
        "part of the tokens": ((3, 7, 24), lambda t: t[:, 2:]),
        "part of the channels": ((4, 40), lambda t: t[:, 3:30]),
        "expanded": ((1, 5, 24), lambda t: t.expand(3, 5, 24)),
        "heads": ((2, 5, 3, 16), lambda t: t.transpose(1, 2)),
        "transposed": ((24, 6), lambda t: t.t()),
        "every other channel": ((4, 40), lambda t: t[:, ::2]),
        "one row": ((24,), lambda t: t),
    }
    for name, (shape, view) in views.items():
        found[f"norm, {name}"] = partial(
            norm, shape=shape, dtypes=DTYPES["fp32"], kind="layernorm", bias=True, residual=False, view=view
        )
        found[f"gate, {name}"] = partial(gate, shape=shape, dtype=F32, kind="gelu", view=view)
    for kind in ("swiglu", "gelu"):
        for shape in ((1, 2), (37, 10), (3, 5, 266), (2, 4100)):
            for name, dtype in GATE_DTYPES.items():
                found[f"gate, {kind}, {shape}, {name}"] = partial(gate, shape=shape, dtype=dtype, kind=kind)
    options = list(itertools.product(("layernorm", "rmsnorm"), (True, False)))
    for i, (name, shape) in enumerate(ALIGNMENTS.items()):
        for j, (kind, bias) in enumerate(options):
            if name == "more tiles than programs" and j:
                continue
            scale, dtypes = ("token", "sample", None)[(i + j) % 3], list(ALIGNMENT_DTYPES)[(i + j) % 3 * (j % 2)]
            found[f"alignment, {name}, {kind}{' bias' * bias}, {dtypes}"] = partial(
                alignment, shape=shape, dtypes=ALIGNMENT_DTYPES[dtypes], kind=kind, bias=bias, scale=scale
            )
    full = {"kind": "layernorm", "bias": True, "scale": "token"}
    for name, dtypes in ALIGNMENT_DTYPES.items():
        found[f"alignment, every dtype, {name}"] = partial(alignment, shape=(2, 9, 136, 20), dtypes=dtypes, **full)
    for name, (shape, view) in views.items():
        if len(shape) == 3:
            found[f"alignment, {name}"] = partial(
                alignment, shape=(*shape, 5), dtypes=ALIGNMENT_DTYPES["fp32"], view=view, **full
            )
    found["alignment, beside channels that are NaN"] = partial(
        alignment,
        shape=(2, 5, 70, 5),
        dtypes=ALIGNMENT_DTYPES["fp32"],
        view=lambda t: torch.nn.functional.pad(t, (8, 8), value=math.nan)[..., 8:-8],
        **full,
    )
    found["alignment, few channels of fp16"] = partial(
        alignment, shape=(4, 1, 3, 2), dtypes=ALIGNMENT_DTYPES["fp16"], kind="rmsnorm", bias=True, scale=None
    )
    found["alignment, a large mean"] = partial(
        alignment, shape=(2, 5, 200, 4), dtypes=ALIGNMENT_DTYPES["fp32"], mean=100, **full
    )
    for case in (
        alignment_again,
        alignment_tiles,
        alignment_of_nothing,
        alignment_opcheck,
        only_one_output_is_used,
        the_norm_is_that_of_the_rounded_sum,
        same_bits_again,
        empty,
        second_derivative_is_refused_on_a_gpu,
        opcheck,
        bad_input,
    ):
        found[case.__name__.replace("_", " ")] = case
    return found


class Guards:
    """NaN on both sides of all memory that an op allocates: where a store without its mask would go."""

    ROOM = 1 << 14  # elements; more than a tile

    def __init__(self):
        self.rooms, self.new_empty = [], torch.Tensor.new_empty

    def __enter__(self) -> None:
        def guarded(tensor: torch.Tensor, *size, **options) -> torch.Tensor:
            out = self.new_empty(tensor, *size, **options)
            if type(tensor) is not torch.Tensor or not out.numel():
                return out
            room = self.new_empty(tensor, out.numel() + 2 * self.ROOM, dtype=out.dtype).fill_(math.nan)
            self.rooms.append(room)
            return room[self.ROOM : -self.ROOM].view(out.shape)

        self.rooms.clear()
        torch.Tensor.new_empty = guarded

    def __exit__(self, *error: object) -> None:
        torch.Tensor.new_empty = self.new_empty
        for room in self.rooms if error[0] is None else ():
            assert room[: self.ROOM].isnan().all(), "Error: written before a result"
            assert room[-self.ROOM :].isnan().all(), "Error: written behind a result"


def main() -> None:
    for stem, ops in (
        ("norm", ("norm", "add_norm", "norm_backward")),
        ("gate", ("gate", "gate_backward")),
        ("alignment", ("alignment_error", "alignment_error_backward")),
    ):
        module = importlib.import_module(f"biflow.ops.{stem}")
        for op in ops:
            torch.library.impl(f"biflow::{op}", "CPU", getattr(module, f"_{op}"))
    results, guards = {}, Guards()
    for name, case in cases().items():
        if not needs_gpu(name):
            try:
                with (
                    contextlib.nullcontext() if case in (opcheck, alignment_opcheck) else guards
                ):  # it compares offsets into storages too
                    case("cpu")
                results[name] = None
            except Exception:
                results[name] = traceback.format_exc(limit=-3)
                if "--stop" in sys.argv:
                    sys.exit(f"{name}: {results[name]}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
