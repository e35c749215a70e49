"""attention against the fp64 reference (error <= 2 x the same-dtype reference's + one rounding), and its edges."""

import math

import pytest
import torch

from biflow import ops, reference

# (B, H, Tq, Tk, d): one key, odd, cross attention, head_dim 64, longer than a block of SDPA
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 7, 7, 5), (2, 2, 3, 11, 8), (1, 2, 33, 33, 64), (1, 1, 600, 600, 16)]


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
    for causal in (False, True) if shape[2] == shape[3] else (False,):
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


Q, M = torch.zeros(2, 3, 4, 8), torch.ones(2, 4, dtype=torch.bool)
BAD = {
    "not a tensor": (TypeError, "q: expected a Tensor, got NoneType", (None, Q, Q), {}),
    "integer": (TypeError, "q: expected float32.*got torch.int64", (Q.long(), Q.long(), Q.long()), {}),
    "dtypes differ": (TypeError, "v: expected torch.float32 like q, got torch.bfloat16", (Q, Q, Q.bfloat16()), {}),
    "device": (ValueError, "k: expected device cpu like q, got meta", (Q, Q.to("meta"), Q), {}),
    "3-D": (ValueError, r"k: expected \(B, H, T, d\), got shape \(3, 4, 8\)", (Q, Q[0], Q), {}),
    "heads": (ValueError, r"k: expected \(B, H, Tk, d\) = \(2, 3, 4, 8\), got \(2, 2, 4, 8\)", (Q, Q[:, :2], Q), {}),
    "v tokens": (ValueError, r"v: expected .* = \(2, 3, 4, 8\), got \(2, 3, 3, 8\)", (Q, Q, Q[:, :, :3]), {}),
    "causal cross": (ValueError, "as many queries as keys, got 3 and 4", (Q[:, :, :3], Q, Q), {"causal": True}),
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
