"""norm and add_norm on a CPU, on every instruction set, against the fp64 reference.

The Triton kernels: tests/kernels/test_triton.py.
"""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from dispatched import Dispatched
from torch._subclasses.fake_tensor import FakeTensorMode

from biflow import ops, reference
from biflow.models.layers import Layer, Norm

KINDS = ("layernorm", "rmsnorm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# odd, a head, B/2's width, no leading dimension, longer than a kernel's row
SHAPES = [(2, 5, 7), (2, 3, 4, 64), (6, 768), (33,), (2, 9000)]


def make(shape, dtype=torch.float32, seed=0, bias=True):
    """x, residual, weight, bias."""
    g = torch.Generator().manual_seed(seed)
    shapes = (shape, shape, shape[-1:], shape[-1:] if bias else None)
    return [None if s is None else torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def value_and_grads(f, tensors, **options):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out = f(*leaves, **options)
    out = out if isinstance(out, tuple) else (out,)
    weights = [torch.sin(1 + torch.arange(o.numel(), dtype=torch.float64)).view(o.shape).to(o.dtype) for o in out]
    total = sum((o * w).sum() for o, w in zip(out, weights, strict=True))
    return *(o.detach() for o in out), *torch.autograd.grad(total, [t for t in leaves if t is not None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, shape, dtype, isa):
    rows, width = math.prod(shape[:-1]), shape[-1]
    for bias in (True, False):
        tensors = make(shape, dtype, bias=bias)
        for name in ("norm", "add_norm"):
            given = tensors if name == "add_norm" else [tensors[0], *tensors[2:]]
            outputs = 2 if name == "add_norm" else 1
            options = dict(kind=kind, eps=1e-5)
            exact = [None if t is None else t.double() for t in given]
            got, same, exact = (
                value_and_grads(getattr(module, name), t, **options)
                for module, t in ((ops, given), (reference, given), (reference, exact))
            )
            assert len(got) == 2 * outputs + 1 + bias
            terms = [1] * outputs + [width] * outputs + [rows] * (1 + bias)
            for i, (g, s, e, n) in enumerate(zip(got, same, exact, terms, strict=True)):
                assert g.dtype == dtype
                size = 1 + e.abs()
                error, allowed = (((t.double() - e).abs() / size).max() for t in (g, s))
                # a channel's mean and scale are sums over the row, also where y has only one of them: decisions/0007
                roundings = 8 * n if dtype == torch.float64 else math.sqrt(n)
                assert error <= 2 * allowed + roundings * torch.finfo(dtype).eps, (name, i, error, allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_apart_and_threads_do_not_matter(kind, threads):
    """A row has the same bits wherever it lies; all results have the same bits for any number of threads."""
    tensors = make((3000, 100))
    options = dict(kind=kind, eps=1e-5, dtype=torch.bfloat16)
    once = value_and_grads(ops.add_norm, tensors, **options)
    threads(3)
    for a, b in zip(once, value_and_grads(ops.add_norm, tensors, **options), strict=True):
        assert torch.equal(a, b)
    few = value_and_grads(ops.add_norm, [t[1000:1033] for t in tensors[:2]] + tensors[2:], **options)
    assert torch.equal(few[0], once[0][1000:1033])


def test_bytes_around_the_results_stay(isa):
    x, residual, weight, _ = make((5, 21))
    for call in (
        lambda: ops.norm(x, weight, kind="rmsnorm", eps=1e-5),
        lambda: ops.add_norm(x, residual, weight, kind="layernorm", eps=1e-5)[1],
    ):
        call()  # a row past the end would be the allocator's own words: glibc aborts on its next call
        torch.empty(5, 21).normal_()


def test_a_half_branch_beside_an_fp32_stream():
    x, h, weight, bias = make((3, 5, 32))
    options = dict(kind="layernorm", eps=1e-5)
    y, total = ops.add_norm(x.bfloat16(), h, weight, bias, **options)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x.bfloat16() + h)
    assert torch.equal(y, ops.norm(total, weight, bias, dtype=torch.bfloat16, **options))
    assert torch.equal(y, ops.norm(total, weight, bias, **options).bfloat16())


def test_a_row_that_is_constant_or_huge():
    x = torch.stack([torch.full((8,), 3.0), torch.zeros(8), 1e18 * torch.ones(8)])
    assert torch.equal(ops.norm(x, torch.ones(8), kind="layernorm", eps=1e-5), torch.zeros(3, 8))
    torch.testing.assert_close(ops.norm(x, torch.ones(8), kind="rmsnorm", eps=1e-6)[[0, 2]], torch.ones(2, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    tensors = [t.requires_grad_() for t in make((2, 3, 4), torch.float64)]

    def f(x, r, w, b):
        y, h = ops.add_norm(x, r, w, b, kind=kind, eps=1e-3)
        return y, h, ops.norm(h * y, w, kind=kind, eps=1e-3)

    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


@pytest.mark.parametrize("narrow", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivative_in_fp32(kind, narrow):
    """Of the kernel's gradient, as the reference has it; the third too, where torch's own norm has it right."""
    tensors = make((3, 6))
    x = tensors[0] if narrow is None else tensors[0].to(narrow)

    def second(module, x, *others):
        leaves = [t.clone().requires_grad_() for t in (x, *others)]
        y, h = module.add_norm(*leaves, kind=kind, eps=1e-2)
        first = torch.autograd.grad((y.sin() * h.cos()).float().sum(), leaves, create_graph=True)
        further = kind == "rmsnorm"  # torch's layer_norm has a wrong third derivative: docs/measured.md
        again = torch.autograd.grad(sum(f.square().float().sum() for f in first), leaves, create_graph=further)
        return *again, *(torch.autograd.grad(sum(a.square().float().sum() for a in again), leaves) if further else ())

    got = second(ops, x, *tensors[1:])
    exact = second(reference, *(t.double() for t in (x, *tensors[1:])))
    tolerance = 1e-4 if narrow is None else 6e-2
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).norm() <= tolerance * e.norm()


def test_transforms_of_torch_func():
    x, residual, weight, _ = make((4, 6))

    def f(x):
        return ops.add_norm(x, residual[0], weight, kind="rmsnorm", eps=1e-5)[0].square().sum()

    want = torch.stack([torch.autograd.functional.jacobian(f, row) for row in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(f))(x), want)
    tangent = torch.func.jvp(f, (x[0],), (x[1],))[1]
    torch.testing.assert_close(tangent, want[0] @ x[1])


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    x, h, weight, bias = make((6, 4, 10))
    options = dict(kind=kind, eps=1e-5)
    y, total = ops.add_norm(x, h, weight, bias, **options)
    loose = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, h)]
    for got, want in zip(ops.add_norm(*loose, weight, bias, **options), (y, total), strict=True):
        assert torch.equal(got, want)
    wide = torch.cat([x, x], dim=-1)
    assert torch.equal(ops.norm(wide[..., :10], weight, bias, **options), ops.norm(x, weight, bias, **options))


def test_empty():
    x, weight = torch.zeros(0, 3, 4, requires_grad=True), torch.ones(4, requires_grad=True)
    y, h = ops.add_norm(x, x, weight, kind="rmsnorm", eps=1e-6)
    assert y.shape == h.shape == x.shape
    (y.sum() + h.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(4))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_fullgraph(kind):
    tensors = make((3, 4, 12))

    def f(x, r, w, b):
        y, h = ops.add_norm(x, r, w, b, kind=kind, eps=1e-5)
        return y, ops.norm(h[:, 1:], w, kind=kind, eps=1e-5, dtype=torch.bfloat16).float()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_grads(f, tensors), value_and_grads(compiled, tensors), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", KINDS)
def test_layer_under_autocast(norm):
    """Norms in the dtype that the next linear layer reads: the bits of a norm in fp32 that autocast converts.

    LayerNorm in fp32 alone is torch's: there up to roundings.
    """
    torch.manual_seed(0)
    layer = Layer(32, 16, 64, norm, "gelu", True)
    h = torch.randn(2, 5, 32)
    seen = []
    for linear in (layer.qkv, layer.fc1):
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    results = []
    for widen in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if widen:
                patch.setattr(Norm, "forward", lambda self, x, dtype=None, f=Norm.forward: f(self, x))
                patch.setattr(Norm, "add", lambda self, x, h, dtype=None, f=Norm.add: f(self, x, h, torch.float32))
            x = h.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = sum(layer(x, x, None, causal=True))
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert results[0][0].dtype == torch.float32
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) if norm == "rmsnorm" else (a - b).norm() <= 1e-2 * b.norm()


def test_on_a_gpu_the_torch_op_is_called():
    """Shapes and dtypes as the fake kernels promise them; what runs is in tests/kernels/test_triton.py."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(4, 3, 8, device="cuda", dtype=torch.bfloat16)
        h, weight = torch.empty(4, 3, 8, device="cuda"), torch.empty(8, device="cuda")
        wide, wide_weight = torch.empty(2, 9000, device="cuda"), torch.empty(9000, device="cuda")
        with Dispatched() as called:
            y = ops.norm(h, weight, kind="rmsnorm", eps=1e-6, dtype=torch.bfloat16)
            z, total = ops.add_norm(x, h, weight, weight, kind="layernorm", eps=1e-6)
            ops.norm(h.double(), weight, kind="rmsnorm", eps=1e-6)
            ops.norm(wide, wide_weight, kind="rmsnorm", eps=1e-6)
    assert called.names == ["norm", "add_norm"]
    half, full = (torch.bfloat16, "cuda"), (torch.float32, "cuda")
    assert [(t.dtype, t.device.type) for t in (y, z, total)] == [half, half, full]
    assert y.shape == z.shape == total.shape == x.shape


@pytest.mark.parametrize("stem", ["norm", "gate"])
def test_on_a_gpu_a_second_derivative_is_refused(stem):
    with FakeTensorMode():
        t = torch.empty(4, 8, device="cuda")
        context = SimpleNamespace(saved_tensors=[t] * (5 if stem == "norm" else 2))
        with pytest.raises(RuntimeError, match=r"biflow: on CUDA .* first derivative"):
            sys.modules[f"biflow.ops.{stem}"]._second_derivative(context, *[t] * (4 if stem == "norm" else 1))


X, W = torch.zeros(2, 3, 8), torch.ones(8)
BAD = {
    "not a tensor": (TypeError, "x: expected a Tensor, got list", ([1.0], W), {}),
    "integer": (TypeError, "x: expected float32.*got torch.int64", (X.long(), W), {}),
    "no dimension": (ValueError, r"x: expected \(\.\.\., C\) with.* one channel, got shape \(\)", (X[0, 0, 0], W), {}),
    "no channel": (ValueError, r"at least one channel, got shape \(2, 3, 0\)", (X[..., :0], W[:0]), {}),
    "no weight": (TypeError, "weight: expected a Tensor, got NoneType", (X, None), {}),
    "weight's shape": (ValueError, r"weight: expected shape \(8,\), got \(7,\)", (X, W[:7]), {}),
    "weight's dtype": (TypeError, "weight: expected float32.*got torch.int32", (X, W.int()), {}),
    "weight in fp64": (TypeError, "weight: float64 goes with float64 x only", (X, W.double()), {}),
    "weight's device": (ValueError, "weight: expected device cpu like x, got meta", (X, W.to("meta")), {}),
    "bias' shape": (ValueError, r"bias: expected shape \(8,\), got \(8, 1\)", (X, W, W[:, None]), {}),
    "kind": (ValueError, "kind: expected one of layernorm, rmsnorm, got 'batchnorm'", (X, W), {"kind": "batchnorm"}),
    "eps": (ValueError, "eps: expected a finite number > 0, got 0", (X, W), {"eps": 0}),
    "eps text": (TypeError, "eps: expected a number, got str '1'", (X, W), {"eps": "1"}),
    "dtype": (TypeError, "dtype: expected float32.*got torch.int64", (X, W), {"dtype": torch.int64}),
    "dtype fp64": (TypeError, "dtype: expected float32.*got torch.float64", (X, W), {"dtype": torch.float64}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, args, options = BAD[case]
    options = {"kind": "rmsnorm", "eps": 1e-6} | options
    with pytest.raises(error, match=message):
        ops.norm(*args, **options)
    with pytest.raises(error, match=message):
        ops.add_norm(args[0], args[0], *args[1:], **options)


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (None, TypeError, "residual: expected a Tensor, got NoneType"),
        (X[0], ValueError, r"residual: expected shape \(2, 3, 8\), got \(3, 8\)"),
        (X.double(), TypeError, "residual: float64 goes with float64 x only"),
        (X.to("meta"), ValueError, "residual: expected device cpu like x, got meta"),
    ],
    ids=["none", "shape", "fp64", "device"],
)
def test_bad_residual(residual, error, message):
    with pytest.raises(error, match=message):
        ops.add_norm(X, residual, W, kind="rmsnorm", eps=1e-6)
