"""affine_encode / affine_decode: against the fp64 reference (error <= 2 x the same-dtype reference's + one rounding),
and against mathematics: round trip, log-determinant of the autograd Jacobian, triangularity, gradcheck."""

import itertools
import math

import pytest
import torch
from affine_cases import CLIPS, LAYOUTS, OPTIONS, SCALES, assert_matches, make, value_and_grads
from torch._subclasses.fake_tensor import FakeTensorMode

from biflow import ops, reference
from biflow.ops import _checks

# one token, one channel (pairs in memory), less than a vector, odd, rows read in place, a row of several pieces, chunks
SHAPES = [(2, 1, 4), (3, 5, 1), (2, 7, 4), (1, 5, 12), (2, 3, 19), (2, 4, 192), (1, 2, 1100), (1, 1500, 7)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]


def run_ops(direction, x, params, weights, mask, options):
    extra = {} if direction == "encode" else {"return_logdet": True}
    op = getattr(ops, f"affine_{direction}")
    return value_and_grads(op, x, params, weights, **options, **extra, mask=mask)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_matches_reference(isa, dtypes):
    # float32 takes every combination of options, the other dtypes every fifth; shapes and masks rotate
    step = 1 if dtypes[0] == dtypes[1] == torch.float32 else 5
    for i, options in enumerate(OPTIONS[::step]):
        for j, masked in enumerate((False, True)):
            x, params, mask = make(SHAPES[(i + 3 * j) % len(SHAPES)], *dtypes, seed=i)
            assert_matches(run_ops, x, params, mask if masked else None, options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_in_every_layout(isa, layout, shape):
    for dtypes, (causal, flip) in itertools.product(DTYPES, ((True, False), (True, True), (False, False))):
        x, params, mask = make(shape, *dtypes)
        options = dict(layout=layout, scale="softplus", clip=("tanh", 2.0), clip_on="scale", causal=causal, flip=flip)
        assert_matches(run_ops, x, params, None, options)
        assert_matches(run_ops, x, params, mask, options)


@pytest.mark.parametrize("shape", [(4, 1400, 768), (2, 200_001, 11)], ids=str)
def test_outputs_that_bypass_the_caches(isa, shape):
    # above 16 MB: the bits of the same samples in two smaller calls; rows on vector boundaries, and mostly not
    x, params, _ = make(shape)
    half = shape[0] // 2
    for op in (ops.affine_encode, lambda *args, **kw: ops.affine_decode(*args, return_logdet=True, **kw)):
        whole = value_and_grads(op, x, params, (x, x[:, 0, 0]), flip=True)
        halves = [value_and_grads(op, x[s], params[s], (x[s], x[s][:, 0, 0]), flip=True)
                  for s in (slice(half), slice(half, None))]  # fmt: skip
        for got, *parts in zip(whole, *halves, strict=True):
            assert torch.equal(got, torch.cat(parts))


def test_large_logits_finite_where_reference_is(isa):
    for scale, clip, a in itertools.product(SCALES, CLIPS, (80.0, -80.0, 30.0, -30.0)):
        x, params, _ = make((2, 3, 20))
        params[..., :20] = a
        got = value_and_grads(ops.affine_encode, x, params, (x, x[:, 0, 0]), scale=scale, clip=clip)
        same = value_and_grads(reference.affine_encode, x, params, (x, x[:, 0, 0]), scale=scale, clip=clip)
        exact = value_and_grads(
            reference.affine_encode, x.double(), params.double(), (x, x[:, 0, 0]), scale=scale, clip=clip
        )
        for g, s, e in zip(got, same, exact, strict=True):
            finite = s.isfinite()
            assert g[finite].isfinite().all(), (scale, clip, a)
            torch.testing.assert_close(g[finite].double(), e[finite], rtol=1e-5, atol=1e-5)


def test_extremes_of_the_vector_functions(isa):
    # exp overflows to inf, underflows through subnormals to 0, NaN propagates
    a = torch.tensor([0.0, 88.7, 89.0, 200.0, math.inf, -87.0, -95.0, -103.0, -104.5, -math.inf, math.nan])
    z = torch.ones(1, 1, a.numel())
    params = torch.cat((a, torch.zeros_like(a)))[None, None]
    x = ops.affine_decode(z, params, causal=False)[0, 0]
    exact = torch.exp(a.double()).float()
    torch.testing.assert_close(x, exact, rtol=3e-7, atol=2e-45, equal_nan=True)
    for scale, clip in itertools.product(SCALES, CLIPS):
        y = ops.affine_decode(z, torch.full_like(params, math.nan), causal=False, scale=scale, clip=clip)
        assert y.isnan().all(), (scale, clip)


def test_hard_clip_gradient_at_its_boundary():
    # as torch.clamp: passes on the closed interval
    a = torch.tensor([-0.75, -0.5, 0.0, 0.5, 0.75])
    params = torch.cat((a, a))[None, None].requires_grad_()
    z, logdet = ops.affine_encode(torch.ones(1, 1, 5), params, clip=("hard", 0.5), causal=False)
    (grad,) = torch.autograd.grad(z.sum() + logdet.sum(), params)
    assert (grad != 0).tolist() == [[[False, True, True, True, False] * 2]]


def test_last_token_in_block_order_gets_no_gradient():
    for flip, last in ((False, 4), (True, 0)):
        x, params, _ = make((2, 5, 3))
        grad = value_and_grads(ops.affine_encode, x, params, (x, x[:, 0, 0]), flip=flip)[3]
        zero_rows = (grad == 0).all(dim=2)
        assert zero_rows[:, last].all()
        assert zero_rows.sum() == 2


def test_logdet_gradient_alone_and_output_gradient_alone():
    x, params, _ = make((2, 5, 3))
    params.requires_grad_()
    for pick in (0, 1):
        got = torch.autograd.grad(ops.affine_encode(x, params, scale="softplus")[pick].sum(), params)[0]
        want = torch.autograd.grad(reference.affine_encode(x, params, scale="softplus")[pick].sum(), params)[0]
        torch.testing.assert_close(got, want)
    got = torch.autograd.grad(ops.affine_decode(x, params).sum(), params)[0]
    torch.testing.assert_close(got, torch.autograd.grad(reference.affine_decode(x, params).sum(), params)[0])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_round_trip(scale, clip):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        x, params, mask = make((2, 33, 12), dtype)
        options = dict(scale=scale, clip=clip, flip=True, mask=mask)
        z, logdet = ops.affine_encode(x, params, **options)
        back, logdet_back = ops.affine_decode(z, params, **options, return_logdet=True)
        torch.testing.assert_close(back, x, rtol=tolerance, atol=tolerance * 10)
        assert torch.equal(logdet, logdet_back)


@pytest.mark.parametrize(("causal", "flip"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logdet_is_slogdet_of_the_jacobian(layout, causal, flip):
    # a token-wise network makes a causal block of it; without the shift the params must not depend on x
    T, D = 4, 3
    g = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((D, 16), (16, 2 * D)))
    x, fixed, _ = make((1, T, D), torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    for scale, clip, m in itertools.product(SCALES, CLIPS, (None, mask)):

        def encode(v, scale=scale, clip=clip, m=m):
            params = torch.tanh(v @ w1) @ w2 if causal else fixed
            return ops.affine_encode(v, params, layout=layout, scale=scale, clip=clip, causal=causal, flip=flip, mask=m)

        jacobian = torch.autograd.functional.jacobian(lambda v: encode(v)[0], x).reshape(T * D, T * D)
        _, logdet = encode(x)
        assert abs(torch.linalg.slogdet(jacobian).logabsdet - logdet[0]) < 1e-9
        blocks = jacobian.reshape(T, D, T, D).abs().amax(dim=(1, 3))  # [z token, x token]
        above = blocks.tril(-1) if flip else blocks.triu(1)
        assert (above == 0).all()
        if causal and m is None:
            assert (blocks.tril(-1) if not flip else blocks.triu(1)).max() > 0


def test_gradcheck():
    for scale, clip, (layout, clip_on, flip) in itertools.product(
        SCALES, CLIPS, (("scale_shift", "both", False), ("interleaved", "scale", True))
    ):
        x, params, mask = make((2, 3, 2), torch.float64)
        x.requires_grad_(), params.requires_grad_()
        options = dict(layout=layout, scale=scale, clip=clip, clip_on=clip_on, flip=flip, mask=mask)
        assert torch.autograd.gradcheck(lambda a, b: ops.affine_encode(a, b, **options), (x, params))  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda a, b: ops.affine_decode(a, b, **options, return_logdet=True),  # noqa: B023
            (x, params),
        )


def test_second_derivative_is_refused():
    x, params, _ = make((1, 3, 2))
    params.requires_grad_()
    for out in (ops.affine_encode(x, params)[0], ops.affine_decode(x, params)):
        (grad,) = torch.autograd.grad((out**2).sum(), params, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(grad.sum(), params)


def test_garbage_in_masked_params_does_not_leak():
    for causal, flip in ((False, False), (True, False), (True, True)):
        x, params, mask = make((2, 9, 5))
        mask[:] = torch.arange(9) < 6  # padding at the end
        reader = ~mask if not causal else (torch.roll(~mask, 1 if flip else -1, 1))  # who reads each row of params
        clean = params.clone()
        clean[reader], params[reader] = 0.0, math.nan
        got = value_and_grads(ops.affine_encode, x, params, (x, x[:, 0, 0]), causal=causal, flip=flip, mask=mask)
        want = value_and_grads(ops.affine_encode, x, clean, (x, x[:, 0, 0]), causal=causal, flip=flip, mask=mask)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(got[0][~mask], x[~mask])
        assert (got[3][reader] == 0).all()


def test_masked_nan_data_passes_through():
    x, params, mask = make((1, 4, 3))
    mask[:] = torch.tensor([True, True, False, False])
    x[~mask] = math.nan
    z, logdet = ops.affine_encode(x, params, mask=mask)
    assert z[mask].isfinite().all()
    assert z[~mask].isnan().all()
    assert logdet.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 9000, 12), (3, 300, 192), (2, 5, 20000)], ids=str)
def test_same_bits_for_any_number_of_threads(shape):
    x, params, mask = make(shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(value_and_grads(ops.affine_encode, x, params, (x, x[:, 0, 0]), scale="softplus", mask=mask))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_strides_do_not_matter():
    x, params, mask = make((4, 6, 10))
    want = ops.affine_encode(x, params, mask=mask)
    loose = (x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((params, params), 2)[..., :20])
    got = ops.affine_encode(*loose, mask=mask.t().contiguous().t())
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, want, strict=True))
    params.requires_grad_()
    (a,) = torch.autograd.grad(ops.affine_encode(x, params)[0].sum(), params)  # an expanded gradient
    (b,) = torch.autograd.grad((ops.affine_encode(x, params)[0] * torch.ones_like(x)).sum(), params)
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(shape):
    x, params = torch.zeros(shape, requires_grad=True), torch.zeros(*shape[:2], 2 * shape[2], requires_grad=True)
    z, logdet = ops.affine_encode(x, params)
    assert z.shape == x.shape
    assert torch.equal(logdet, torch.zeros(shape[0]))
    (z.sum() + logdet.sum()).backward()
    assert params.grad.shape == params.shape
    assert ops.affine_decode(x, params).shape == x.shape


def test_opcheck():
    x, params, mask = make((2, 3, 4))
    tail = ("scale_shift", "softplus", "tanh", 2.0, "both", True, False, mask)
    grad, grad_logdet = torch.randn_like(x), torch.randn(2)
    grads = [x.clone().requires_grad_(), params.clone().requires_grad_()]
    torch.library.opcheck(torch.ops.biflow.affine_encode.default, (*grads, *tail))
    torch.library.opcheck(torch.ops.biflow.affine_decode.default, (*grads, *tail, True))
    torch.library.opcheck(torch.ops.biflow.affine_decode.default, (*grads, *tail[:-1], None, False))
    torch.library.opcheck(torch.ops.biflow.affine_encode_backward.default, (grad, grad_logdet, x, params, *tail))
    torch.library.opcheck(torch.ops.biflow.affine_decode_backward.default, (grad, None, x, params, *tail))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend):
    x, params, mask = make((2, 6, 5))

    def loss(x, params):
        z, logdet = ops.affine_encode(x, 0.5 * params, scale="softplus", clip=("tanh", 4.0), flip=True, mask=mask)
        back = ops.affine_decode(z + 1, params.to(torch.bfloat16), causal=False)
        return (z**2).sum() - logdet.sum() + back.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    results = []
    for f in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in (x, params)]
        value = f(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    # a network under autocast writes bf16 params beside fp32 x
    x, _, _ = make((2, 6, 5))
    net = torch.nn.Linear(5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        params = net(x)
        z, logdet = ops.affine_encode(x, params)
        (z.square().sum() - logdet.sum()).backward()
    assert (params.dtype, z.dtype, logdet.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert net.weight.grad.abs().sum() > 0


X, P, M = torch.zeros(2, 3, 4), torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=torch.bool)
BAD = {
    "not a tensor": (TypeError, "x: expected a Tensor, got list", ([1.0], P), {}),
    "x integer": (TypeError, "x: expected float32.*got torch.int64", (X.long(), P), {}),
    "params complex": (TypeError, "params: expected float32.*got torch.complex64", (X, P.to(torch.complex64)), {}),
    "fp64 beside fp32": (TypeError, "float64 goes with float64 only", (X, P.double()), {}),
    "fp32 beside fp64": (TypeError, "float64 goes with float64 only", (X.double(), P), {}),
    "x 2-D": (ValueError, r"x: expected \(B, T, D\), got shape \(3, 4\)", (X[0], P), {}),
    "params width": (ValueError, r"expected \(B, T, 2D\) = \(2, 3, 8\), got \(2, 3, 7\)", (X, P[..., :7]), {}),
    "params tokens": (ValueError, r"= \(2, 3, 8\), got \(2, 2, 8\)", (X, P[:, :2]), {}),
    "device": (ValueError, "x: expected a CPU.* tensor, got one on meta: this build", (X.to("meta"), P.to("meta")), {}),
    "params device": (ValueError, "expected device cpu like x, got meta", (X, P.to("meta")), {}),
    "mask dtype": (TypeError, "mask: expected a bool Tensor, got torch.float32", (X, P), {"mask": M.float()}),
    "mask shape": (ValueError, r"mask: expected \(B, T\) = \(2, 3\), got \(2, 2\)", (X, P), {"mask": M[:, :2]}),
    "layout": (ValueError, "layout: expected one of scale_shift.*got 'ab'", (X, P), {"layout": "ab"}),
    "scale": (ValueError, "scale: expected one of exp.*got 'relu'", (X, P), {"scale": "relu"}),
    "clip_on": (ValueError, "clip_on: expected one of both, scale, got 'shift'", (X, P), {"clip_on": "shift"}),
    "clip kind": (ValueError, r"clip: expected None.*got \('soft', 1.0\)", (X, P), {"clip": ("soft", 1.0)}),
    "clip bare": (ValueError, "clip: expected None.*got 3.0", (X, P), {"clip": 3.0}),
    "clip negative": (ValueError, "finite c > 0, got -1.0", (X, P), {"clip": ("hard", -1.0)}),
    "clip nan": (ValueError, "finite c > 0, got nan", (X, P), {"clip": ("hard", math.nan)}),
    "clip infinite in fp32": (ValueError, "finite c > 0 as float32, got 1e.300", (X, P), {"clip": ("tanh", 1e300)}),
    "clip 0 in fp32": (ValueError, "finite c > 0 as float32, got 1e-300", (X, P), {"clip": ("tanh", 1e-300)}),
    "clip bool": (ValueError, "finite c > 0, got True", (X, P), {"clip": ("hard", True)}),
    "causal": (TypeError, "causal: expected a bool, got str 'no'", (X, P), {"causal": "no"}),
    "flip": (TypeError, "flip: expected a bool, got int 1", (X, P), {"flip": 1}),
    "clip text": (ValueError, "finite c > 0, got '1'", (X, P), {"clip": ("hard", "1")}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    error, message, args, options = BAD[case]
    with pytest.raises(error, match=message):
        ops.affine_encode(*args, **options)
    with pytest.raises(error, match=message.replace("x: ", "z: ").replace("like x", "like z")):
        ops.affine_decode(*args, **options)


def test_cuda_tensors_are_refused_with_the_remedy(monkeypatch):
    # fake tensors: no GPU is needed
    with FakeTensorMode():
        monkeypatch.setattr(_checks, "DEVICES", ("cpu", "cuda"))
        wide, x = (torch.empty(1, 1, d, device="cuda") for d in (2**30 + 1, 4))
        with pytest.raises(ValueError, match=r"x: expected D <= 2\^30 on CUDA, got 1073741825"):
            ops.affine_encode(wide, torch.cat((wide, wide), 2))
        with pytest.raises(ValueError, match="x: expected a CPU tensor, got one on cuda:0: the op has no kernel for"):
            _checks.check_device("x", x, ("cpu",))
        monkeypatch.setattr(_checks, "DEVICES", ("cpu",))
        with pytest.raises(ValueError, match=r"x: .* got one on cuda:0: .* install the CUDA toolkit"):
            ops.affine_encode(x, torch.cat((x, x), 2))


def test_direct_call_of_the_op_is_checked_too():
    tail = ("scale_shift", "exp", "none", 0.0, "both", True, False)
    for args in ((X, P[..., :7], *tail, None), (X, P.double(), *tail, None), (X, P, "ab", *tail[1:], None),
                 (X, P, *tail, M[:1]), (X[0], P, *tail, None)):  # fmt: skip
        with pytest.raises(RuntimeError, match="affine"):
            torch.ops.biflow.affine_encode(*args)
