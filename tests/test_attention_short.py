"""Attention in bf16 on a CPU for short sequences: by tile products, and with a gradient of batched products."""

import pytest
import torch
import torch.nn.functional as F
from dispatched import Dispatched
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from biflow import ops, reference
from biflow.ops import _attention_short
from biflow.ops._attention_short import AttentionByProducts

# products: shorter than 256, any d; tiles: up to 512, d = 32, 64, 96, 128
SHAPES = [(3, 2, 7, 8), (2, 3, 49, 64), (1, 1, 1, 4), (5, 2, 255, 16)]
TILE_SHAPES = [(2, 3, 49, 64), (1, 1, 2, 32), (3, 2, 33, 96), (1, 2, 300, 128), (1, 1, 512, 32)]


def heads(shape, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    batch, count, tokens, d = shape
    q, k, v = torch.randn(batch, tokens, 3, count, d, generator=g).permute(2, 0, 3, 1, 4).to(dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.randn(shape, generator=g).to(dtype)


@pytest.fixture
def no_tiles():
    """As on a CPU without tile products."""
    best = torch.ops.biflow.cpu_isa()
    torch.ops.biflow.force_cpu_isa("avx512" if best == "amx" else best)
    yield
    torch.ops.biflow.force_cpu_isa("best")


@pytest.fixture
def tiles():
    if torch.ops.biflow.cpu_isa() != "amx":
        pytest.skip("this CPU has no tile products")


@pytest.fixture
def calls(monkeypatch, no_tiles):
    """Samples in each call of the gradient by batched products."""
    found, gradients = [], _attention_short._gradients
    monkeypatch.setattr(_attention_short, "_gradients", lambda *a: (found.append(len(a[0])), gradients(*a))[1])
    return found


def compare(shape, causal, scale=None):
    """Value and gradients as good as torch's in bf16, against the reference in float64."""
    q, k, v, grad = heads(shape)
    results = []
    for f in (
        lambda q, k, v: ops.attention(q, k, v, causal=causal, scale=scale),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),
    ):
        o = f(q, k, v)
        results.append([o.detach(), *torch.autograd.grad(o, (q, k, v), grad)])
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    o = reference.attention(*wide, causal=causal, scale=scale)
    results.append([o.detach(), *torch.autograd.grad(o, wide, grad.double())])
    for g, s, e in zip(*results, strict=True):
        assert g.dtype == torch.bfloat16
        error, allowed = ((t.double() - e).norm() for t in (g, s))
        assert error <= 1.5 * allowed, (error / e.norm(), allowed / e.norm())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_good_as_torchs(shape, causal, calls):
    compare(shape, causal)
    assert sum(calls) == shape[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", TILE_SHAPES, ids=str)
def test_tiles_are_as_good_as_torchs(shape, causal, tiles):
    with Dispatched() as called:
        compare(shape, causal, scale=0.2)
    assert {"attention_short", "attention_short_backward"} <= set(called.names)


def test_tiles_of_one_token(tiles):
    q, k, v, grad = heads((2, 1, 1, 32))
    o = ops.attention(q, k, v)
    assert torch.equal(o, v)
    to_q, to_k, to_v = torch.autograd.grad(o, (q, k, v), grad)
    assert torch.equal(to_v, grad)
    assert max(to_q.abs().max(), to_k.abs().max()) < 1e-2


def test_tiles_apart_threads_and_strides(tiles, threads):
    """A head's bits do not depend on what else is there, on the threads, or on strides."""
    q, k, v, grad = heads((40, 2, 70, 64))

    def run(*tensors):
        q, k, v, g = (t.detach().requires_grad_() for t in tensors)
        o = ops.attention(q, k, v, causal=True)
        return [o.detach(), *torch.autograd.grad(o, (q, k, v), g)]

    once = run(q, k, v, grad)
    assert all(map(torch.equal, once, run(*(t.contiguous() for t in (q, k, v, grad)))))
    assert all(map(torch.equal, [t[7:9] for t in once], run(*(t[7:9] for t in (q, k, v, grad)))))
    turned = [t.mT.contiguous().mT for t in (q, k, v, grad)]
    assert all(map(torch.equal, once, run(*turned)))
    threads(3)
    assert all(map(torch.equal, once, run(q, k, v, grad)))


def test_tiles_far_logits(tiles):
    """Logits of thousands, of which one decides; a sequence without weight elsewhere."""
    q, k, v, grad = heads((1, 1, 40, 32))
    q, k = (100 * q.detach()).requires_grad_(), (10 * k.detach()).requires_grad_()
    o = ops.attention(q, k, v)
    gradients = torch.autograd.grad(o, (q, k, v), grad)
    assert all(torch.isfinite(t).all() for t in (o, *gradients))
    want = reference.attention(q.double(), k.double(), v.double())
    assert (o.double() - want).norm() <= 1e-2 * want.norm()


def test_tiles_second_derivative(tiles):
    q, k, v, grad = heads((2, 1, 6, 32))

    def second(f, *tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        first = torch.autograd.grad(f(*tensors[:3]), tensors[:3], tensors[3], create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), tensors)

    got = second(lambda q, k, v: ops.attention(q, k, v, causal=True), q, k, v, grad)
    exact = second(lambda q, k, v: reference.attention(q, k, v, causal=True), *(t.double() for t in (q, k, v, grad)))
    for g, e in zip(got, exact, strict=True):
        assert (g.double() - e).norm() <= 2e-2 * e.norm()


def test_tiles_opcheck_and_bad_input(tiles):
    op = torch.ops.biflow.attention_short
    q, k, v, _ = heads((2, 2, 5, 32))
    torch.library.opcheck(op.default, (q, k, v, True, 0.3), atol=1e-2, rtol=1e-2)
    q, k, v = (t.detach() for t in (q, k, v))
    for arguments, message in (
        ((q.float(), k, v), "q must be bfloat16"),
        ((q, k[:, :1], v), "k must be bfloat16 .* like q"),
        ((q[..., :8], k[..., :8], v[..., :8]), "d = 32, 64, 96 or 128, got 5 and 8"),
        ([t[:, :, :0] for t in (q, k, v)], "expected 0 < T <= 512"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, True, 0.3)
    torch.ops.biflow.force_cpu_isa("avx512")
    try:
        with pytest.raises(RuntimeError, match="this CPU has no tile products"):
            op(q, k, v, True, 0.3)
    finally:
        torch.ops.biflow.force_cpu_isa("best")


def test_value_is_torchs_and_parts_do_not_matter(calls):
    q, k, v, grad = heads((300, 2, 33, 8))
    o = ops.attention(q, k, v, causal=True, scale=0.3)
    assert torch.equal(o, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))
    got = torch.autograd.grad(o, (q, k, v), grad)
    assert len(calls) > 1
    assert max(calls) * 2 * 33 * 33 <= 1 << 18
    few = [t[100:117] for t in (q, k, v)]
    alone = torch.autograd.grad(ops.attention(*few, causal=True, scale=0.3), few, grad[100:117])
    for a, b in zip(alone, got, strict=True):
        torch.testing.assert_close(a, b[100:117])


@pytest.mark.parametrize("causal", [False, True])
def test_products_first_and_second_derivative(causal):
    tensors = [t.detach().requires_grad_() for t in heads((2, 2, 5, 4), torch.float64)[:3]]

    def f(q, k, v):  # in float64 the function itself: it takes any dtype
        return AttentionByProducts.apply(q, k, v, causal, 0.7)

    # logits and g v^T go through fp32
    assert torch.autograd.gradcheck(f, tensors, eps=1e-6, atol=1e-5)
    assert torch.autograd.gradgradcheck(f, tensors, eps=1e-3, atol=1e-3)


def test_layers_in_bf16_train_with_it(calls):
    qkv = torch.randn(2, 6, 48, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        ops.attention_qkv(qkv.bfloat16(), heads=2, causal=True).float().sum().backward()
    assert calls == [2]
    assert torch.isfinite(qkv.grad).all()


@pytest.mark.parametrize("d", [8, 32])
def test_other_calls_are_torchs(calls, d):
    q, k, v, grad = heads((2, 2, 6, d))
    mask = torch.ones(2, 6, dtype=torch.bool)
    torch.ops.biflow.force_cpu_isa("best" if d == 32 else "portable")
    with Dispatched() as called:
        if d == 8:
            with torch.no_grad():
                ops.attention(q, k, v)
        ops.attention(q[:, :, :4], k, v).backward(grad[:, :, :4])
        ops.attention(q, k, v, mask=mask).backward(grad)
        ops.attention(q.float(), k.float(), v.float()).backward(grad.float())
        long = heads((1, 1, 513, d))
        ops.attention(*long[:3]).backward(long[3])
        torch.func.grad(lambda q: ops.attention(q, k.detach(), v.detach()).float().sum())(q.detach())
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            o = ops.attention(forward_ad.make_dual(q, grad), k, v)
            assert forward_ad.unpack_dual(o).tangent is not None
    assert calls == []
    assert "attention_short" not in called.names
