"""alignment_error on a CPU: values, gradients, what is kept for them.

The Triton kernels: tests/kernels/test_triton.py.
"""

import math

import pytest
import torch
from dispatched import Dispatched
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from biflow import ops, reference
from biflow.ops import alignment

KINDS = ("layernorm", "rmsnorm")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# (B, T, C, D): one of each, odd, samples that share a chunk, B/2's width, tokens in three chunks, D of two tiles
SHAPES = [(1, 1, 1, 1), (2, 5, 7, 3), (9, 64, 96, 12), (1, 33, 768, 16), (2, 700, 520, 5), (3, 4, 24, 70)]
NAMES = ("E", "h", "norm_weight", "norm_bias", "head_weight", "head_bias")


def make(shape, dtype=F32, *, bias=True, scale="token", seed=0):
    """(h, target, norm_weight, norm_bias, head_weight, head_bias), scale."""
    batch, tokens, width, outputs = shape
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=g, dtype=F64)

    tensors = [draw(batch, tokens, width) + 0.3, draw(batch, tokens, outputs), 1 + 0.3 * draw(width), draw(width)]
    tensors += [draw(outputs, width) / width**0.5, draw(outputs)]
    if not bias:
        tensors[3] = tensors[5] = None
    scales = {"token": draw(batch, tokens).exp(), "sample": draw(batch).exp(), None: None}
    return [None if t is None else t.to(dtype) for t in tensors], None if scale is None else scales[scale].to(dtype)


def value_and_grads(f, tensors, **options):
    """E and the gradients that it has, with a weight for each sample as an adaptive loss has one."""
    leaves = [None if t is None else t.detach().clone() for t in tensors]
    wanted = [t.requires_grad_() for i, t in enumerate(leaves) if t is not None and i != 1]
    error = f(*leaves, **options)
    weight = 1 + torch.arange(len(error), dtype=error.dtype) / 3
    return error.detach(), *torch.autograd.grad(error, wanted, weight)


def terms(shape, bias):
    """Summands of each result; a gradient to h sums over channels what is summed over outputs, and p has a bias."""
    batch, tokens, width, outputs = shape
    rows = batch * tokens
    found = [
        tokens * outputs * width,
        (width + 1) * (outputs + 1),
        rows * outputs,
        rows * outputs,
        rows * width,
        rows * width,
    ]
    return [n for i, n in enumerate(found) if bias or i not in (3, 5)]


def size(exact):
    """What an error is compared with: decisions/0007 has 1 + the exact value, of values of the size of 1."""
    return max(1, exact.square().mean().sqrt()) + exact.abs()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_reference(kind, shape, dtype):
    for bias, scale in ((True, "token"), (False, "sample"), (True, None)):
        tensors, scale = make(shape, dtype, bias=bias, scale=scale)
        options = dict(kind=kind, eps=1e-5)
        wide = [None if t is None else t.double() for t in tensors]
        got, same, exact = (
            value_and_grads(module.alignment_error, t, scale=None if scale is None else scale.to(t[0].dtype), **options)
            for module, t in ((ops, tensors), (reference, tensors), (reference, wide))
        )
        names = [name for i, name in enumerate(NAMES) if bias or i not in (3, 5)]
        for name, g, s, e, n in zip(names, got, same, exact, terms(shape, bias), strict=True):
            assert g.dtype == s.dtype
            assert g.shape == e.shape
            error, allowed = (((t.double() - e).abs() / size(e)).max() for t in (g, s))
            roundings = 8 * n if dtype == F64 else math.sqrt(n)
            assert error <= 2 * allowed + roundings * torch.finfo(g.dtype).eps, (name, error, allowed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [BF16, F16], ids=str)
def test_rounded_products(kind, narrow):
    """dtype: E is that of the reference which rounds the same; the gradients by root mean squares, decisions/0007."""
    tensors, scale = make((4, 33, 96, 12))
    wide, options = [t.double() for t in tensors], dict(kind=kind, eps=1e-5)
    got = value_and_grads(ops.alignment_error, tensors, scale=scale, dtype=narrow, **options)
    same = value_and_grads(reference.alignment_error, tensors, scale=scale, dtype=narrow, **options)
    exact = value_and_grads(reference.alignment_error, wide, scale=scale.double(), **options)
    assert ((got[0] - same[0]).abs() / same[0]).median() < 1e-6
    assert ((same[0] - exact[0]).abs() / exact[0]).median() > 1e-5  # which another rounding would not be
    for name, g, s, e in zip(NAMES, got, same, exact, strict=True):
        assert g.dtype == F32
        error, allowed = ((t.double() - e).norm() / e.norm() for t in (g, s))
        assert error <= 2 * allowed + torch.finfo(F32).eps, (name, error, allowed)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_its_own_dtype_is_no_rounding(dtype):
    tensors, scale = make((2, 5, 8, 3), dtype)
    options = dict(scale=scale, kind="layernorm", eps=1e-5)
    assert torch.equal(ops.alignment_error(*tensors, dtype=dtype, **options), ops.alignment_error(*tensors, **options))


def test_rounded_products_of_fp64():
    tensors, scale = make((2, 5, 8, 3), F64)
    options = dict(scale=scale, kind="layernorm", eps=1e-5, dtype=BF16)
    torch.testing.assert_close(ops.alignment_error(*tensors, **options), reference.alignment_error(*tensors, **options))


def test_half_states_beside_fp32_heads():
    tensors, scale = make((2, 5, 24, 3))
    options = dict(scale=scale, kind="rmsnorm", eps=1e-6)
    mixed = [tensors[0].bfloat16(), *tensors[1:]]
    got = value_and_grads(ops.alignment_error, mixed, **options)
    want = value_and_grads(ops.alignment_error, [mixed[0].float(), *tensors[1:]], **options)
    assert [t.dtype for t in got] == [F32, BF16, F32, F32, F32, F32]
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1].bfloat16())
    for a, b in zip(got[2:], want[2:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean(kind):
    """The state is centred before it is multiplied: a hundred deviations from 0 cost no digits but those of h."""
    tensors, _ = make((2, 6, 64, 4))
    tensors[0] += 100
    wide = [t.double() for t in tensors]
    got, same, exact = (
        value_and_grads(m.alignment_error, t, kind=kind, eps=1e-5)
        for m, t in ((ops, tensors), (reference, tensors), (reference, wide))
    )
    for g, s, e, n in zip(got, same, exact, terms((2, 6, 64, 4), True), strict=True):
        error, allowed = (((t.double() - e).abs() / size(e)).max() for t in (g, s))
        assert error <= 2 * allowed + math.sqrt(n) * torch.finfo(F32).eps


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    (h, target, *params), scale = make((2, 3, 5, 4), F64)

    def f(h, *params):
        return ops.alignment_error(h, target, *params, scale=scale, kind=kind, eps=1e-3)

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in (h, *params)])


def test_a_mixture_with_a_branch_without_gradient():
    """What the docstring says of (p + w u) / (1 + w)."""
    (h, target, *params), _ = make((3, 4, 10, 5), F64)
    u, w = make((3, 4, 10, 5), F64, seed=1)[0][1], torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    norm_weight, norm_bias, head_weight, head_bias = params
    p = reference.norm(h, norm_weight, norm_bias, kind="layernorm", eps=1e-5) @ head_weight.t() + head_bias
    mix = w[:, None, None]
    want = (((p + mix * u) / (1 + mix) - target) ** 2).sum((1, 2))
    folded = (1 + mix) * target - mix * u
    got = ops.alignment_error(h, folded, *params, scale=(1 + w) ** -2, kind="layernorm", eps=1e-5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_nothing_is_kept_but_the_state(kind, dtype):
    """Bytes of what autograd keeps: h where it lies, and what is small. The plain form keeps norm(h) too, at least."""
    shape = (4, 40, 256, 8)
    tensors, scale = make(shape)
    prefixed = torch.cat([tensors[0][:, :3], tensors[0]], dim=1).requires_grad_()
    leaves = [t.clone().requires_grad_() for t in tensors[2:]]
    kept = {}
    for module in (ops, reference):
        seen = {}

        def keep(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            error = module.alignment_error(
                prefixed[:, 3:], tensors[1], *leaves, scale=scale, kind=kind, eps=1e-5, dtype=dtype
            )
        assert module is reference or prefixed.untyped_storage().data_ptr() in seen
        seen.pop(prefixed.untyped_storage().data_ptr(), None)
        kept[module] = sum(seen.values())
        error.sum().backward()
    small = sum(t.nbytes for t in (tensors[1], scale, *leaves))
    assert kept[ops] == small
    assert kept[reference] >= small + tensors[0].nbytes // (2 if dtype == BF16 else 1)


class Made(TorchDispatchMode):
    """Within, where the results of torch's functions lie, and how many bytes there."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, BF16])
def test_nothing_as_large_as_the_state_is_made_but_its_gradient(kind, dtype):
    """The functions that the ops call on a CPU, which a dispatch mode does not see through an op; four chunks."""
    rows = 2 * alignment._CHUNK * torch.get_num_threads() // (4 * 512)
    tensors, scale = make((2, rows, 512, 4))
    given = {t.untyped_storage().data_ptr() for t in (*tensors, scale)}
    args = (*tensors, scale, kind, 1e-5, dtype)
    with torch.no_grad():
        with Made() as made:
            alignment._alignment_error_cpu(*args)
        largest = max(size for where, size in made.storages.items() if where not in given)
        assert largest <= tensors[0].nbytes // 4
        with Made() as made:
            grad_h, *_ = alignment._alignment_error_backward_cpu(torch.ones(2), *args)
    large = {where for where, size in made.storages.items() if size > tensors[0].nbytes // 4} - given
    assert large == {grad_h.data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    (h, target, *params), scale = make((6, 4, 10, 5))
    options = dict(kind=kind, eps=1e-5)
    want = value_and_grads(ops.alignment_error, [h, target, *params], scale=scale, **options)
    views = {
        "tokens behind a prefix": torch.cat([h[:, :2], h], dim=1)[:, 2:],
        "tokens first": h.transpose(0, 1).contiguous().transpose(0, 1),
        "part of the channels": torch.cat([h, h], dim=2)[..., :10],
        "channels first": h.transpose(1, 2).contiguous().transpose(1, 2),
    }
    for name, view in views.items():
        assert torch.equal(view, h)
        leaf = view.detach().requires_grad_()
        leaves = [p.clone().requires_grad_() for p in params]
        loose = [t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in leaves]
        turned = target.transpose(0, 2).contiguous().transpose(0, 2)
        error = ops.alignment_error(leaf, turned, *loose, scale=scale.t().contiguous().t(), **options)
        grads = torch.autograd.grad(error, [leaf, *leaves], 1 + torch.arange(6) / 3)
        for got, expected in zip((error, *grads), want, strict=True):
            rounding = torch.finfo(torch.float32).eps * float(expected.abs().max())  # of sums in another order
            assert float((got - expected).detach().abs().max()) <= 4 * rounding, name


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_empty(shape):
    tensors, _ = make((*shape, 6, 2))
    error, grad_h, *grads = value_and_grads(ops.alignment_error, tensors, kind="layernorm", eps=1e-5)
    assert torch.equal(error, torch.zeros(shape[0]))
    assert grad_h.shape == tensors[0].shape
    assert [t.shape for t in grads] == [t.shape for t in tensors[2:]]
    assert not any(t.any() for t in grads)


def test_without_gradients_and_for_some_of_them():
    tensors, scale = make((3, 4, 10, 5))
    options = dict(scale=scale, kind="layernorm", eps=1e-5)
    want = ops.alignment_error(*tensors, **options)
    leaves = [t.clone().requires_grad_() for t in tensors]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            got = ops.alignment_error(*leaves, **options)
        assert not got.requires_grad
        assert torch.equal(got, want)
    all_grads = value_and_grads(ops.alignment_error, tensors, **options)
    (grad,) = torch.autograd.grad(
        ops.alignment_error(*tensors[:4], leaves[4], tensors[5], **options), leaves[4], 1 + torch.arange(3) / 3
    )
    assert torch.equal(grad, all_grads[4])


def test_numpy_arrays():
    tensors, scale = make((2, 3, 8, 4))
    options = dict(kind="layernorm", eps=1e-5)
    got = ops.alignment_error(*(t.numpy() for t in tensors), scale=scale.numpy(), **options)
    assert torch.equal(torch.from_numpy(got), ops.alignment_error(*tensors, scale=scale, **options))


def test_autocast_changes_nothing():
    """dtype says what is rounded, not the surroundings."""
    tensors, scale = make((3, 4, 10, 5))
    options = dict(scale=scale, kind="layernorm", eps=1e-5)
    want = value_and_grads(ops.alignment_error, tensors, **options)
    with torch.autocast("cpu", BF16):
        got = value_and_grads(ops.alignment_error, tensors, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_same_bits_again():
    tensors, scale = make((5, 300, 96, 12))
    runs = [value_and_grads(ops.alignment_error, tensors, scale=scale, kind="layernorm", eps=1e-5) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    tensors, scale = make((2, 3, 8, 4), bias=bias)
    tensors = [None if t is None else t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
    args = (*tensors, scale, "layernorm", 1e-5, BF16)
    torch.library.opcheck(torch.ops.biflow.alignment_error.default, args)
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(torch.ops.biflow.alignment_error_backward.default, (torch.ones(2), *args))


def test_compile_fullgraph():
    (h, target, *params), scale = make((3, 6, 12, 4))

    def f(h, target, *params):
        return ops.alignment_error(h[:, 2:] * 2, target[:, 2:], *params, scale=scale[:, 2:], kind="rmsnorm", eps=1e-5)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    plain, built = (value_and_grads(g, [h, target, *params]) for g in (f, compiled))
    for a, b in zip(built, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused():
    tensors, _ = make((2, 3, 8, 4))
    tensors[0].requires_grad_()
    error = ops.alignment_error(*tensors, kind="layernorm", eps=1e-5)
    (grad,) = torch.autograd.grad(error.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="alignment_error has first derivatives only"):
        torch.autograd.grad(grad.sum(), tensors[0])


def test_on_a_gpu_the_torch_op_is_called():
    """Shapes and dtypes as the fake kernels promise them; what runs is in tests/kernels/test_triton.py."""
    with FakeTensorMode(), torch.no_grad():
        shapes = ((2, 3, 8), (2, 3, 4), (8,), (8,), (4, 8), (4,))
        tensors = [torch.empty(shape, dtype=BF16, device="cuda") for shape in shapes]
        scale = torch.empty(2, 3, device="cuda")
        with Dispatched() as called:
            error = ops.alignment_error(*tensors, scale=scale, kind="layernorm", eps=1e-5)
    assert called.names == ["alignment_error"]
    assert (error.shape, error.dtype, error.device.type) == ((2,), F32, "cuda")


GOOD, SCALE = make((2, 3, 8, 4))
GOOD = dict(zip(("h", "target", "norm_weight", "norm_bias", "head_weight", "head_bias"), GOOD, strict=True))
BAD = {
    "no tensor": (TypeError, "h: expected a Tensor, got list", {"h": [1.0]}),
    "integers": (TypeError, "h: expected float32.*got torch.int64", {"h": GOOD["h"].long()}),
    "two dimensions": (ValueError, r"h: expected \(B, T, C\).*got shape \(3, 8\)", {"h": GOOD["h"][0]}),
    "no channel": (ValueError, r"at least one channel, got shape \(2, 3, 0\)", {"h": GOOD["h"][..., :0]}),
    "target's tokens": (
        ValueError, r"target: expected shape \(2, 3, D\) with D >= 1, got \(2, 2, 4\)",
        {"target": GOOD["target"][:, :2]}),
    "no output": (ValueError, r"D >= 1, got \(2, 3, 0\)", {"target": GOOD["target"][..., :0]}),
    "target's dtype": (TypeError, "target: float64 goes with float64 h only", {"target": GOOD["target"].double()}),
    "target's gradient": (
        ValueError, "target: expected a tensor that requires no gradient",
        {"target": GOOD["target"].clone().requires_grad_()}),
    "norm_weight": (
        ValueError, r"norm_weight: expected shape \(8,\), got \(7,\)", {"norm_weight": GOOD["norm_weight"][:7]}),
    "no norm_weight": (TypeError, "norm_weight: expected a Tensor, got NoneType", {"norm_weight": None}),
    "norm_bias": (ValueError, r"norm_bias: expected shape \(8,\), got \(1,\)", {"norm_bias": GOOD["norm_bias"][:1]}),
    "head_weight": (
        ValueError, r"head_weight: expected shape \(4, 8\), got \(8, 4\)", {"head_weight": GOOD["head_weight"].t()}),
    "head_weight's dtype": (
        TypeError, "head_weight: expected float32.*got torch.int32", {"head_weight": GOOD["head_weight"].int()}),
    "head_bias": (ValueError, r"head_bias: expected shape \(4,\), got \(8,\)", {"head_bias": GOOD["norm_bias"]}),
    "device": (ValueError, "head_bias: expected device cpu like h", {"head_bias": GOOD["head_bias"].to("meta")}),
    "scale": (ValueError, r"scale: expected shape \(2, 3\) or \(2,\), got \(3, 2\)", {"scale": SCALE.t()}),
    "scale is a number": (TypeError, "scale: expected a Tensor, got float", {"scale": 2.0}),
    "scale's gradient": (
        ValueError, "scale: expected a tensor that requires no gradient", {"scale": SCALE.clone().requires_grad_()}),
    "kind": (ValueError, "kind: expected one of layernorm, rmsnorm, got 'none'", {"kind": "none"}),
    "eps": (ValueError, "eps: expected a finite number > 0, got 0", {"eps": 0}),
    "eps text": (TypeError, "eps: expected a number, got str", {"eps": "1"}),
    "dtype": (TypeError, "dtype: expected float32, bfloat16.*got torch.float64", {"dtype": F64}),
    "dtype of integers": (TypeError, "dtype: expected float32, bfloat16.*got torch.int32", {"dtype": torch.int32}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, change = BAD[case]
    with pytest.raises(error, match=message):
        ops.alignment_error(**({"kind": "rmsnorm", "eps": 1e-6} | GOOD | change))
