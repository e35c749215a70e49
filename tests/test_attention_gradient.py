"""The gradient by batched products: bf16 on a CPU, short sequences."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from biflow import ops, reference
from biflow.ops import _attention_gradient
from biflow.ops._attention_gradient import AttentionByProducts

SHAPES = [(3, 2, 7, 8), (2, 3, 49, 64), (1, 1, 1, 4), (5, 2, 255, 16)]


def heads(shape, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    batch, count, tokens, d = shape
    q, k, v = torch.randn(batch, tokens, 3, count, d, generator=g).permute(2, 0, 3, 1, 4).to(dtype)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), torch.randn(shape, generator=g).to(dtype)


@pytest.fixture
def calls(monkeypatch):
    found, gradients = [], _attention_gradient._gradients
    monkeypatch.setattr(_attention_gradient, "_gradients", lambda *a: (found.append(len(a[0])), gradients(*a))[1])
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_as_good_as_torchs(shape, causal, calls):
    q, k, v, grad = heads(shape)
    got = torch.autograd.grad(ops.attention(q, k, v, causal=causal), (q, k, v), grad)
    assert sum(calls) == shape[0]
    same = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal), (q, k, v), grad)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(reference.attention(*wide, causal=causal), wide, grad.double())
    for g, s, e in zip(got, same, exact, strict=True):
        assert g.dtype == torch.bfloat16
        error, allowed = ((t.double() - e).norm() for t in (g, s))
        assert error <= 1.1 * allowed + 1e-6 * len(e), (error / e.norm(), allowed / e.norm())


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
def test_first_and_second_derivative(causal):
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


def test_other_calls_are_torchs(calls):
    q, k, v, grad = heads((2, 2, 6, 8))
    mask = torch.ones(2, 6, dtype=torch.bool)
    with torch.no_grad():
        ops.attention(q, k, v)
    ops.attention(q[:, :, :4], k, v).backward(grad[:, :, :4])
    ops.attention(q, k, v, mask=mask).backward(grad)
    ops.attention(q.float(), k.float(), v.float()).backward(grad.float())
    long = heads((1, 1, 256, 4))
    ops.attention(*long[:3]).backward(long[3])
    torch.func.grad(lambda q: ops.attention(q, k.detach(), v.detach()).float().sum())(q.detach())
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        o = ops.attention(forward_ad.make_dual(q, grad), k, v)
        assert forward_ad.unpack_dual(o).tangent is not None
    assert calls == []
