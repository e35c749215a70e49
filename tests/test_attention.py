"""attention against the fp64 reference (error <= 2 x the same-dtype reference's + one rounding), and its edges."""

import importlib
import math
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from biflow import ops, reference

attention_module = importlib.import_module("biflow.ops.attention")  # the package's name `attention` is the function

# (B, H, Tq, Tk, d): one key, odd, other keys than queries, one query, head_dim 64, longer than a block of SDPA
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 7, 7, 5),
    (2, 2, 3, 11, 8),
    (2, 2, 1, 9, 8),
    (1, 2, 33, 33, 64),
    (1, 1, 600, 600, 16),
]


def make(shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    B, H, Tq, Tk, d = shape
    q, k, v = (torch.randn(B, H, T, d, generator=g, dtype=torch.float64).to(dtype) for T in (Tq, Tk, Tk))
    mask = torch.rand(B, Tk, generator=g) > 0.4
    mask[-1, 0] = False  # causal: the first query of the last sample has no key
    return q, k, v, mask


def value_and_grads(f, q, k, v, **options):
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = f(*leaves, **options)
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    q, k, v, mask = make(shape, dtype)
    for causal in (False, True):
        for m in (None, mask):
            # small logits: torch's fused backward recomputes exp(logit - logsumexp), so its error grows with them
            for scale in (None, 0.7 * shape[4] ** -0.5):
                options = dict(causal=causal, scale=scale, mask=m)
                got = value_and_grads(ops.attention, q, k, v, **options)
                same = value_and_grads(reference.attention, q, k, v, **options)
                exact = value_and_grads(reference.attention, q.double(), k.double(), v.double(), **options)
                for name, g, s, e in zip("oqkv", got, same, exact, strict=True):
                    assert g.dtype == dtype
                    size = 1 + e.abs()
                    error, allowed = (((t.double() - e).abs() / size).max() for t in (g, s))
                    # sums over the keys and over d: docs/decisions/0007
                    floor = torch.finfo(dtype).eps * math.sqrt(shape[3] + shape[4])
                    assert error <= 2 * allowed + floor, (name, options, error, allowed)


def test_query_without_keys_gives_zero_and_no_gradient():
    q, k, v, _ = make((2, 2, 5, 5, 4))
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0] = False
    mask[1, :2] = False
    for causal in (False, True):
        out, *grads = value_and_grads(ops.attention, q, k, v, causal=causal, mask=mask)
        assert (out[0] == 0).all()
        assert (out[1, :, :2] == 0).all() == causal
        assert (out[1, :, 2:] != 0).all()
        assert all(g.isfinite().all() and (g[0] == 0).all() for g in grads)


def test_nan_in_masked_keys_and_values_does_not_leak():
    q, k, v, _ = make((1, 2, 6, 6, 4))
    mask = torch.tensor([[True, True, False, True, False, True]])
    want = value_and_grads(ops.attention, q, k, v, mask=mask, causal=True)
    k[:, :, ~mask[0]], v[:, :, ~mask[0]] = math.nan, math.inf
    got = value_and_grads(ops.attention, q, k, v, mask=mask, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_causality():
    q, k, v, _ = make((1, 1, 5, 5, 3), torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda t: ops.attention(q, k, t, causal=True)[0, 0], v)
    influence = jacobian.abs().amax(dim=(1, 2, 3, 5))  # [query, key]
    assert (influence.triu(1) == 0).all()
    assert (influence.tril() > 0).sum() == 15


@pytest.mark.parametrize("queries", [1, 2, 5])
def test_fewer_queries_than_keys_are_the_last_ones(queries):
    """Row i of causal attention over all tokens, whose earlier keys were kept: also where a mask leaves it no key."""
    q, k, v, mask = make((2, 3, 6, 6, 4), torch.float64)
    mask[1, :4] = False
    for m in (None, mask):
        whole = ops.attention(q, k, v, causal=True, mask=m)
        got = ops.attention(q[:, :, 6 - queries :], k, v, causal=True, mask=m)
        torch.testing.assert_close(got, whole[:, :, 6 - queries :], rtol=1e-12, atol=0)


def test_empty():
    q, k, v = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 0, 8), torch.zeros(2, 3, 0, 8)
    assert torch.equal(ops.attention(q, k, v), torch.zeros_like(q))
    assert ops.attention(q[:0], q[:0], q[:0], causal=True).shape == (0, 3, 4, 8)
    assert ops.attention(k, q, q).shape == (2, 3, 0, 8)


def test_opcheck():
    q, k, v, mask = make((2, 2, 5, 5, 4))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    # composite: autograd comes from the ops inside, so the registration test of opaque ops does not apply
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.biflow.attention.default, (*leaves, True, 0.5, None), test_utils=tests)
    torch.library.opcheck(torch.ops.biflow.attention.default, (*leaves, True, 0.5, mask), test_utils=tests)


def test_compile_fullgraph():
    q, k, v, mask = make((2, 2, 5, 5, 4))
    for options in (dict(causal=True), dict(mask=mask), dict(causal=True, mask=mask)):
        f = torch.compile(lambda a, b, c: ops.attention(a, b, c, **options), fullgraph=True, backend="aot_eager")  # noqa: B023
        want = value_and_grads(ops.attention, q, k, v, **options)
        for a, b in zip(value_and_grads(f, q, k, v), want, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast():
    q, k, v, mask = make((2, 2, 5, 5, 4))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask=mask)
    assert out.dtype == torch.bfloat16


# --- attention_qkv ----------------------------------------------------------------------------------------------------


def make_qkv(B, T, H, d, dtype, *, norm=True, rope=True, prefix=0):
    """qkv and the options of a layer: norm weights and rotary tables as a model keeps them, float32 beside bf16."""
    g = torch.Generator().manual_seed(3)
    table = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"heads": H, "prefix": prefix}
    if norm:
        options |= {name: (torch.rand(d, generator=g) + 0.5).to(table) for name in ("q_norm", "k_norm")}
    if rope:
        angle = 3 * torch.rand(T - prefix, d // 2, generator=g)
        options["rope"] = (angle.cos().to(table), angle.sin().to(table))
    return torch.randn(B, T, 3 * H * d, generator=g, dtype=torch.float64).to(dtype), options


def qkv_and_grads(f, qkv, options):
    """The value, and gradients to qkv and the norms' weights."""
    leaves = {"qkv": qkv} | {n: options[n] for n in ("q_norm", "k_norm") if n in options}
    leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    out = f(**options | leaves)
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weights).sum(), list(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "prefix"), [((2, 1, 1, 4), 0), ((2, 9, 3, 8), 2), ((1, 40, 2, 64), 0)], ids=str)
def test_qkv_matches_reference(shape, prefix, dtype, isa):
    B, T, H, d = shape
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) > 0.3
    mask[:, 0] = True
    for norm, rope, more in (
        (False, False, {"causal": True}),
        (True, False, {"mask": mask}),
        (False, True, {"scale": 0.7 * d**-0.5}),
        (True, True, {"causal": True, "mask": mask}),
        (True, True, {"causal": True}),
        (True, False, {}),
    ):
        qkv, options = make_qkv(*shape, dtype, norm=norm, rope=rope, prefix=prefix)
        options |= more
        exact = {
            name: tuple(t.double() for t in o) if name == "rope" else o.double() if name.endswith("norm") else o
            for name, o in options.items()
        }
        got = qkv_and_grads(ops.attention_qkv, qkv, options)
        same = qkv_and_grads(reference.attention_qkv, qkv, options)
        for g, s, e in zip(got, same, qkv_and_grads(reference.attention_qkv, qkv.double(), exact), strict=True):
            size = 1 + e.abs()
            error, allowed = (((t.double() - e).abs() / size).max() for t in (g, s))
            # sums over the keys and over d; of all heads' tokens for the norms' weights: docs/decisions/0007
            terms = (T + d) * (B * T * H if e.dim() == 1 else 1)
            assert error <= 2 * allowed + torch.finfo(dtype).eps * math.sqrt(terms), (options, error, allowed)


def test_qkv_is_attention_of_its_heads():
    """Order of channels (q, k, v; head; channel), the rotation of pairs by hand, tokens of the prefix as they are."""
    qkv, options = make_qkv(2, 5, 3, 4, torch.float64, norm=False, prefix=2)
    q, k, v = (t.unflatten(2, (3, 4)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    turn = torch.zeros(5, 4, 4, dtype=torch.float64)
    for t in range(5):
        for i in range(2):
            cos, sin = (1.0, 0.0) if t < 2 else (table[t - 2, i] for table in options["rope"])
            turn[t, 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[cos, -sin], [sin, cos]])
    q, k = (torch.einsum("tij,bhtj->bhti", turn, x) for x in (q, k))
    want = reference.attention(q, k, v, causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ops.attention_qkv(qkv, **options, causal=True), want)


def test_heads_alone(isa):
    """attention_heads against its own formula in torch's functions: values, gradients, second derivatives."""
    qkv, options = make_qkv(3, 25, 2, 6, torch.float32, prefix=3)
    leaves = [qkv, options["q_norm"], options["k_norm"]]
    grads = [torch.randn(3, 25, 2, 6).transpose(1, 2), torch.randn(3, 2, 6, 25).mT, torch.randn(3, 2, 25, 6)]

    def derivatives(f, dtype):
        own = [t.to(dtype).requires_grad_() for t in leaves]
        heads = f(own[0], 2, own[1], own[2], 1e-6, *(t.to(dtype) for t in options["rope"]), 3)
        first = torch.autograd.grad(heads, own, [g.to(dtype) for g in grads], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), own)
        return *heads, *first, *second

    got = derivatives(torch.ops.biflow.attention_heads, torch.float32)
    want = derivatives(sys.modules["biflow.ops.attention"]._heads, torch.float64)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g - w).norm() <= 1e-5 * w.norm()


def test_heads_threads_and_opcheck(threads):
    qkv, options = make_qkv(40, 60, 2, 10, torch.float32, prefix=3)
    arguments = (2, options["q_norm"], None, 1e-6, *options["rope"], 3)
    once = torch.ops.biflow.attention_heads(qkv, *arguments)
    gradient = torch.ops.biflow.attention_heads_backward(*once, qkv, *arguments)
    threads(3)
    assert all(map(torch.equal, once, torch.ops.biflow.attention_heads(qkv, *arguments)))
    assert all(map(torch.equal, gradient, torch.ops.biflow.attention_heads_backward(*once, qkv, *arguments)))
    small = make_qkv(2, 6, 2, 10, torch.float32, prefix=3)
    given = (small[0].requires_grad_(), 2, small[1]["q_norm"], None, 1e-6, *small[1]["rope"], 3)
    torch.library.opcheck(torch.ops.biflow.attention_heads.default, given)


def test_qkv_nan_in_masked_tokens_does_not_leak():
    qkv, options = make_qkv(2, 6, 2, 4, torch.float32)
    options["mask"] = mask = torch.tensor([[True, True, False, True, False, True]] * 2)
    want = qkv_and_grads(ops.attention_qkv, qkv, options)
    parts = qkv.unflatten(2, (3, -1))
    parts[:, :, 1][~mask], parts[:, :, 2][~mask] = math.nan, math.inf
    for f in (ops.attention_qkv, reference.attention_qkv):
        for a, b in zip(qkv_and_grads(f, qkv, options), want, strict=True):
            torch.testing.assert_close(a, b)


def test_qkv_empty_and_strided():
    qkv, options = make_qkv(2, 5, 2, 8, torch.float32)
    assert ops.attention_qkv(qkv[:0], **options).shape == (0, 5, 16)
    assert ops.attention_qkv(qkv[:, :0], heads=2).shape == (2, 0, 16)
    wide = torch.zeros(5, 2, 60)
    wide[..., 7:55] = qkv.transpose(0, 1)
    strided = wide[..., 7:55].transpose(0, 1)
    assert torch.equal(ops.attention_qkv(strided, **options), ops.attention_qkv(qkv, **options))


def test_qkv_opcheck_compile_autocast():
    qkv, options = make_qkv(2, 6, 2, 8, torch.float32, prefix=1)
    arguments = (qkv.clone().requires_grad_(), 2, True, 0.4, None, options["q_norm"], None, 1e-6, *options["rope"], 1)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")  # as in test_opcheck
    torch.library.opcheck(torch.ops.biflow.attention_qkv.default, arguments, test_utils=tests)
    compiled = torch.compile(ops.attention_qkv, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(qkv_and_grads(f, qkv, options) for f in (compiled, ops.attention_qkv)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention_qkv(qkv.bfloat16(), **options).dtype == torch.bfloat16


# --- which kernel -----------------------------------------------------------------------------------------------------


def traced(f, *shapes, dtype=torch.bfloat16) -> list[str]:
    """The ops that f calls with CUDA tensors of the shapes; none is run."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(f)(*[torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes])
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.fixture
def with_cuda_kernels(monkeypatch):
    monkeypatch.setattr(attention_module, "_HAS_KERNEL", True)


def test_kernel_on_a_gpu(with_cuda_kernels):
    kernel = "biflow.attention_forward.default"

    def causal(q, k, v, weights):
        return ops.attention(q, k, v, causal=True, mask=weights > 0)

    def qkv(x, weight, table):
        return ops.attention_qkv(x, heads=2, q_norm=weight, k_norm=weight, rope=(table, table), prefix=3)

    for d in (32, 64, 128):
        assert traced(causal, *[(2, 3, 5, d)] * 3, (2, 5)) == ["aten.gt.Scalar", kernel, "aten.transpose.int"]
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert kernel in traced(causal, *[(2, 3, 5, 64)] * 3, (2, 5), dtype=torch.float16)
    assert kernel in traced(qkv, (2, 20, 384), (64,), (17, 32))
    assert kernel in traced(torch.func.functionalize(qkv), (2, 20, 384), (64,), (17, 32))
    late = [(2, 3, 5, 64), (2, 3, 9, 64)]  # queries at the end of more keys
    assert kernel in traced(lambda q, k: ops.attention(q, k, k, causal=True), *late)
    assert kernel not in traced(lambda q, k: ops.attention(q, k, k, causal=True, scale=0.0), *late)
    assert kernel not in traced(lambda q, k: ops.attention(q, k, k, causal=True), *late, dtype=torch.float32)
    odd = [(2, 3, 5, 48), (2, 3, 9, 48)]
    assert kernel not in traced(lambda q, k: ops.attention(q, k, k, causal=True), *odd)
    # nothing to fuse
    assert kernel not in traced(lambda q, k, v: ops.attention(q, k, v, causal=True), *[(2, 3, 5, 64)] * 3)
    assert kernel not in traced(lambda x: ops.attention_qkv(x, heads=2), (2, 20, 384))


def test_no_kernel_where_a_gradient_is_wanted(with_cuda_kernels):
    with FakeTensorMode():
        q = torch.empty(2, 3, 5, 64, dtype=torch.bfloat16, device="cuda")
    x, weight = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert attention_module._kernel_takes(q, 0.1, x, None)
    assert not attention_module._kernel_takes(q, 0.1, x, weight)
    with torch.no_grad():
        assert attention_module._kernel_takes(q, 0.1, x, weight)
    with torch.autograd.forward_ad.dual_level():
        assert not attention_module._kernel_takes(q, 0.1, torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("wanted", [False, True])
def test_gradients_are_seen_while_compiling(monkeypatch, wanted):
    seen = []

    def takes(q, scale, *inputs):
        seen.append(attention_module._wants_gradient(*inputs))
        return False

    monkeypatch.setattr(attention_module, "_kernel_takes", takes)
    qkv, options = make_qkv(1, 4, 2, 8, torch.float32)
    options["q_norm"].requires_grad_(wanted)
    torch.compile(lambda x: ops.attention_qkv(x, **options), fullgraph=True, backend="aot_eager")(qkv)
    assert seen
    assert set(seen) == {wanted}


# --- bad input --------------------------------------------------------------------------------------------------------

Q, K, M = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 3, 8), torch.ones(2, 4, dtype=torch.bool)
BAD = {
    "not a tensor": (TypeError, "q: expected a Tensor, got NoneType", (None, Q, Q), {}),
    "integer": (TypeError, "q: expected float32.*got torch.int64", (Q.long(), Q.long(), Q.long()), {}),
    "dtypes differ": (TypeError, "v: expected torch.float32 like q, got torch.bfloat16", (Q, Q, Q.bfloat16()), {}),
    "device": (ValueError, "k: expected device cpu like q, got meta", (Q, Q.to("meta"), Q), {}),
    "3-D": (ValueError, r"k: expected \(B, H, T, d\), got shape \(3, 4, 8\)", (Q, Q[0], Q), {}),
    "heads": (ValueError, r"k: expected \(B, H, Tk, d\) = \(2, 3, 4, 8\), got \(2, 2, 4, 8\)", (Q, Q[:, :2], Q), {}),
    "v tokens": (ValueError, r"v: expected .* = \(2, 3, 4, 8\), got \(2, 3, 3, 8\)", (Q, Q, Q[:, :, :3]), {}),
    "causal cross": (ValueError, "at most as many queries as keys, got 4 and 3", (Q, K, K), {"causal": True}),
    "mask dtype": (TypeError, "mask: expected a bool Tensor, got torch.float32", (Q, Q, Q), {"mask": M.float()}),
    "mask shape": (ValueError, r"mask: expected \(B, Tk\) = \(2, 4\), got \(2, 3\)", (Q, Q, Q), {"mask": M[:, :3]}),
    "causal": (TypeError, "causal: expected a bool, got str 'no'", (Q, Q, Q), {"causal": "no"}),
    "scale": (TypeError, "scale: expected a number, got str '1'", (Q, Q, Q), {"scale": "1"}),
    "d = 0": (ValueError, "scale: d = 0", (Q[..., :0], Q[..., :0], Q[..., :0]), {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, args, options = BAD[case]
    with pytest.raises(error, match=message):
        ops.attention(*args, **options)


X, W, TABLE = torch.zeros(2, 4, 48), torch.ones(8), (torch.ones(4, 4), torch.zeros(4, 4))
BAD_QKV = {
    "not a tensor": (TypeError, "qkv: expected a Tensor, got NoneType", None, {}),
    "integer": (TypeError, "qkv: expected float32.*got torch.int64", X.long(), {}),
    "4-D": (ValueError, r"qkv: expected \(B, T, 3 H d\) with H = 2, got shape \(1, 2, 4, 48\)", X[None], {}),
    "channels": (ValueError, r"3 H d\) with H = 5", X, {"heads": 5}),
    "no heads": (ValueError, "heads: expected at least 1, got 0", X, {"heads": 0}),
    "heads": (TypeError, "heads: expected an int, got float 2.0", X, {"heads": 2.0}),
    "prefix": (ValueError, "prefix: expected 0 to T = 4, got 5", X, {"prefix": 5}),
    "prefix type": (TypeError, "prefix: expected an int, got bool True", X, {"prefix": True}),
    "causal": (TypeError, "causal: expected a bool, got int 1", X, {"causal": 1}),
    "mask": (ValueError, r"mask: expected \(B, T\) = \(2, 4\), got \(2, 3\)", X, {"mask": M[:, :3]}),
    "norm shape": (ValueError, r"k_norm: expected \(d\) = \(8,\), got \(7,\)", X, {"k_norm": W[:7]}),
    "norm dtype": (TypeError, "q_norm: expected float32.*got torch.int64", X, {"q_norm": W.long()}),
    "norm device": (ValueError, "q_norm: expected device cpu like qkv, got meta", X, {"q_norm": W.to("meta")}),
    "rope": (TypeError, r"rope: expected \(cos, sin\) or None, got Tensor", X, {"rope": W}),
    "rope shape": (ValueError, r"cos: expected \(T - prefix, d / 2\) = \(3, 4\)", X, {"rope": TABLE, "prefix": 1}),
    "rope dtypes": (TypeError, "sin: expected torch.float32 like cos", X, {"rope": (TABLE[0], TABLE[1].double())}),
    "odd d": (ValueError, "rope: expected an even d, got 1", X, {"heads": 16, "rope": TABLE}),
    "eps": (ValueError, "eps: expected a finite number > 0, got 0", X, {"eps": 0}),
    "eps 0 in fp32": (ValueError, "eps: expected a finite number > 0 as float32, got 1e-300", X, {"eps": 1e-300}),
    "scale": (TypeError, "scale: expected a number, got str '1'", X, {"scale": "1"}),
}


@pytest.mark.parametrize("case", BAD_QKV)
def test_bad_qkv(case):
    error, message, qkv, options = BAD_QKV[case]
    with pytest.raises(error, match=message):
        ops.attention_qkv(qkv, **{"heads": 2} | options)
