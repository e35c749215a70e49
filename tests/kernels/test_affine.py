"""The CUDA kernels of affine_encode and affine_decode: against the fp64 reference with the tolerances of
tests/test_affine.py; what their work is split by must not show in the results."""

import itertools
import math

import pytest
import torch
from affine_cases import CLIPS, LAYOUTS, OPTIONS, RESULTS, SCALES, assert_matches, make, run_reference, value_and_grads

from biflow import ops, reference

from .backends import get

# Vectors are of 1 to 8 elements, the lanes of a sample 1 to 256 threads, chunks of a sample 4096 elements.
SHAPES = [
    (1, 1, 1),
    (700, 1, 2),  # a lane for each sample, three blocks
    (300, 3, 3),  # 4 lanes, several elements each
    (3, 5, 1),  # one channel
    (5, 7, 4),
    (9, 20, 12),  # 64 lanes in fp32; rows of three vectors
    (5, 31, 15),  # 128 lanes
    (2, 49, 16),
    (2, 100, 19),  # odd rows, two trips of a block
    (1, 3, 1100),  # rows longer than a block, four trips
    (2, 1500, 7),  # three chunks, which split rows of odd length
    (2, 3, 6000),  # five chunks, which split long rows
    (2, 260, 64),  # five chunks of whole rows
    (9, 3, 1400),  # two chunks, two blocks of samples that add theirs
]
LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = [(torch.float64, torch.float64), *itertools.product(LOW, LOW)]


def tail(options, mask):
    """The options of the raw ops, and the mask."""
    kind, c = options.get("clip") or ("none", 0.0)
    return (
        options.get("layout", "scale_shift"), options.get("scale", "exp"), kind, c, options.get("clip_on", "both"),
        options.get("causal", True), options.get("flip", False), mask,
    )  # fmt: skip


def runner(backend):
    """run(direction, x, params, weights, mask, options) -> RESULTS, by the raw ops."""

    def run(direction, x, params, weights, mask, options):
        x, params, grad, grad_logdet = (backend.to(t) for t in (x, params, *weights))
        rest = tail(options, None if mask is None else backend.to(mask))
        forward, backward = (getattr(backend.ops, f"affine_{direction}{kind}") for kind in ("", "_backward"))
        value = forward(x, params, *rest, *((True,) if direction == "decode" else ()))
        grads = backward(grad, grad_logdet, x, params, *rest)
        return [t.cpu() for t in (*value, *grads)]

    return run


def results(backend, x, params, mask=None, **options):
    """RESULTS of both directions, with gradients of ones."""
    weights = (torch.ones_like(x), torch.ones(x.shape[0], dtype=x.dtype if x.dtype == torch.float64 else torch.float32))
    run = runner(backend)
    return [t for direction in ("encode", "decode") for t in run(direction, x, params, weights, mask, options)]


def assert_same_bits(got, want):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        same = torch.equal(a, b) or (torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()))
        assert same, f"{('encode', 'decode')[i // 4]} {RESULTS[i % 4]} differs"


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_matches_reference(backend, dtypes):
    # float32 takes every combination of options, the other dtypes every seventh; shapes and masks rotate
    step = 1 if dtypes[0] == dtypes[1] == torch.float32 else 7
    for i, options in enumerate(OPTIONS[::step]):
        x, params, mask = make(SHAPES[(i + i // len(SHAPES)) % len(SHAPES)], *dtypes, seed=i)
        assert_matches(runner(backend), x, params, mask if i % 5 < 2 else None, options, backend.device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_in_every_layout(backend, layout, shape):
    dtypes = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float16))
    for (data, net), (causal, flip) in zip(dtypes, ((True, False), (True, True), (False, False)), strict=True):
        x, params, mask = make(shape, data, net)
        options = dict(layout=layout, scale="softplus", clip=("tanh", 2.0), clip_on="scale", causal=causal, flip=flip)
        assert_matches(runner(backend), x, params, mask, options, backend.device)


@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 9, 16), (1, 600, 14), (2, 3, 2), (1, 5, 7)], ids=str)
def test_addresses_do_not_matter(backend, shape):
    # contiguous tensors that begin an element or two behind an aligned address
    def moved(t, by):
        room = backend.to(torch.zeros(t.numel() + by, dtype=t.dtype))
        room[by:] = backend.to(t).flatten()
        return room[by:].view(t.shape)

    for (data, net), layout in itertools.product([(torch.float32, torch.bfloat16), (torch.float64,) * 2], LAYOUTS):
        x, params, mask = make(shape, data, net)
        want = results(backend, x, params, mask, layout=layout)
        for by, of_params in ((1, 0), (0, 1), (2, 2)):
            assert_same_bits(results(backend, moved(x, by), moved(params, of_params), mask, layout=layout), want)


@pytest.mark.parametrize("shape", [(5, 1, 2), (9, 3, 5), (3, 40, 16), (3, 700, 12), (2, 1300, 8)], ids=str)
def test_batch_does_not_matter(backend, shape):
    # nor the direction: log-determinants of encode and decode have the same bits
    x, params, mask = make(shape, torch.float32, torch.bfloat16)
    together = results(backend, x, params, mask, scale="softplus")
    assert torch.equal(together[1], together[5])
    for i in range(shape[0]):
        alone = results(backend, x[i : i + 1], params[i : i + 1], mask[i : i + 1], scale="softplus")
        assert_same_bits(alone, [t[i : i + 1] for t in together])


def test_order_of_threads_does_not_matter(backend):
    cases = [make(shape) for shape in ((40, 3, 5), (2, 60, 20), (2, 1500, 7))]
    first = [results(backend, *case, scale="sigmoid") for case in cases]
    if backend.library is not None:
        backend.configure("random", seed=7)
    for want, case in zip(first, cases, strict=True):
        assert_same_bits(results(backend, *case, scale="sigmoid"), want)


def test_many_samples(backend):
    for B, T, D in ((70_000, 1, 1), (9_000, 4, 16)):  # 274 blocks of 256 samples, 1125 of eight
        x, params, _ = make((B, T, D))
        out = results(backend, x, params, causal=False)
        torch.testing.assert_close(out[1], -params[..., :D].sum((1, 2)), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(out[0], (x - params[..., D:]) * torch.exp(-params[..., :D]))


def test_many_chunks(backend):
    # 33 of a sample: more than the lanes that add their sums
    x, params, _ = make((2, 700, 192), torch.float32, torch.bfloat16)
    logdet = results(backend, x, params, causal=False)[1]
    torch.testing.assert_close(logdet, -params[..., :192].double().sum((1, 2)).float(), rtol=1e-6, atol=1e-4)


@pytest.mark.gpu
def test_a_grid_of_more_than_65535_blocks():
    backend = get("cuda")
    x, params = (torch.randn(70_000, 64, d * 32, device="cuda") for d in (1, 2))
    z, logdet = backend.ops.affine_encode(x, params, *tail({"causal": False}, None))
    torch.testing.assert_close(logdet, -params[..., :32].double().sum((1, 2)).float(), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(z[-1], (x[-1] - params[-1, :, 32:]) * torch.exp(-params[-1, :, :32]))


def test_decode_without_logdet(backend):
    x, params, _ = make((2, 1500, 7))
    z, logdet = backend.ops.affine_decode(backend.to(x), backend.to(params), *tail({}, None), False)
    assert logdet.shape == (0,)
    torch.testing.assert_close(z.cpu(), reference.affine_decode(x, params))


def test_no_gradient_of_logdet(backend):
    x, params, mask = make((3, 5, 12))
    for direction in ("encode", "decode"):
        backward = getattr(backend.ops, f"affine_{direction}_backward")
        args = (backend.to(x), backend.to(params), *tail({}, backend.to(mask)))
        got = backward(backend.to(torch.ones_like(x)), None, *args)
        want = run_reference(direction, x, params, (torch.ones_like(x), torch.zeros(3)), mask, {})[2:]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu(), b)


def test_large_logits_finite_where_reference_is(backend):
    for scale, clip, a in itertools.product(SCALES, CLIPS, (80.0, -80.0, 30.0, -30.0)):
        x, params, _ = make((2, 3, 20))
        params[..., :20] = a
        weights, options = (torch.ones_like(x), torch.ones(2)), dict(scale=scale, clip=clip)
        got = runner(backend)("encode", x, params, weights, None, options)
        same = run_reference("encode", x, params, weights, None, options)
        exact = run_reference("encode", x.double(), params.double(), weights, None, options)
        for g, s, e in zip(got, same, exact, strict=True):
            finite = s.isfinite()
            assert g[finite].isfinite().all(), (scale, clip, a)
            torch.testing.assert_close(g[finite].double(), e[finite], rtol=1e-5, atol=1e-5)


def test_extremes_of_the_functions(backend):
    # exp overflows to inf, underflows through subnormals to 0, NaN propagates
    a = torch.tensor([0.0, 88.7, 89.0, 200.0, math.inf, -87.0, -95.0, -103.0, -104.5, -math.inf, math.nan])
    z = torch.ones(1, 1, a.numel())
    params = torch.cat((a, torch.zeros_like(a)))[None, None]
    x = results(backend, z, params, causal=False)[4][0, 0]
    torch.testing.assert_close(x, torch.exp(a.double()).float(), rtol=3e-7, atol=2e-45, equal_nan=True)
    for scale, clip in itertools.product(SCALES, CLIPS):
        got = results(backend, z, torch.full_like(params, math.nan), causal=False, scale=scale, clip=clip)
        assert all(got[i].isnan().all() for i in (0, 1, 4, 5)), (scale, clip)
    # softplus: exp far left, the identity far right
    x = results(backend, z, params, causal=False, scale="softplus")[4][0, 0]
    exact = torch.nn.functional.softplus(a.double() + 0.541324854612918, threshold=1e9).float()
    torch.testing.assert_close(x, exact, rtol=1e-5, atol=2e-45, equal_nan=True)


def test_far_left_softplus_is_exp(backend):
    # log sigma = t and its gradient 1, also where sigma underflows
    a = torch.tensor([-30.0, -60.0, -95.0, -120.0])
    x, params = torch.zeros(1, 1, 4), torch.cat((a, torch.zeros(4)))[None, None]
    for direction in ("encode", "decode"):
        options = dict(scale="softplus", causal=False)
        weights = torch.zeros_like(x), torch.ones(1)
        _, logdet, _, grad = runner(backend)(direction, x, params, weights, None, options)
        torch.testing.assert_close(logdet, -(a + 0.541324854612918).sum()[None])
        if direction == "decode":  # encode's has 0 / sigma^2
            assert grad[0, 0, :4].tolist() == [-1.0] * 4


def test_softplus_between_the_tails_of_float_and_double(backend):
    # log softplus(t) differs from t by e^t / 2: by what a double sees, and a float does not
    a = torch.tensor([-18.0, -20.0, -25.0, -30.0], dtype=torch.float64)
    x, params = torch.zeros(1, 1, 4, dtype=torch.float64), torch.cat((a, torch.zeros_like(a)))[None, None]
    weights = torch.zeros_like(x), torch.ones(1, dtype=torch.float64)
    for direction in ("encode", "decode"):
        logdet = runner(backend)(direction, x, params, weights, None, dict(scale="softplus", causal=False))[1]
        exact = -torch.log1p(torch.exp(a + 0.541324854612918)).log().sum()[None]
        torch.testing.assert_close(logdet, exact, rtol=1e-14, atol=0)


def test_hard_clip_gradient_at_its_boundary(backend):
    # as torch.clamp: passes on the closed interval
    a = torch.tensor([-0.75, -0.5, 0.0, 0.5, 0.75])
    params = torch.cat((a, a))[None, None]
    grad = results(backend, torch.ones(1, 1, 5), params, clip=("hard", 0.5), causal=False)[3]
    assert (grad != 0).tolist() == [[[False, True, True, True, False] * 2]]


def test_nan_spreads_as_on_a_cpu(backend):
    x, params, _ = make((1, 4, 8))
    params[0, 1, 3], params[0, 2, 8 + 5] = math.nan, math.nan  # an a and a b
    weights = torch.ones_like(x), torch.ones(1)
    for scale, clip in itertools.product(SCALES, CLIPS):
        options = dict(scale=scale, clip=clip)
        for direction, more in (("encode", {}), ("decode", {"return_logdet": True})):
            got = runner(backend)(direction, x, params, weights, None, options)
            want = value_and_grads(getattr(ops, f"affine_{direction}"), x, params, weights, **options, **more)
            assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(got, want, strict=True)), (direction, options)


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 1, 4), (2, 1500, 7)], ids=str)
def test_last_token_in_block_order_gets_no_gradient(backend, shape):
    for flip, layout in itertools.product((False, True), LAYOUTS):
        x, params, _ = make(shape)
        out = results(backend, x, params, flip=flip, layout=layout)
        for grad in (out[3], out[7]):
            zero_rows = (grad == 0).all(dim=2)
            assert zero_rows[:, 0 if flip else -1].all()
            assert zero_rows.sum() == 2


def test_garbage_in_masked_params_does_not_leak(backend):
    for causal, flip in ((False, False), (True, False), (True, True)):
        x, params, mask = make((2, 9, 5))
        mask[:] = torch.arange(9) < 6  # padding at the end
        reader = ~mask if not causal else torch.roll(~mask, 1 if flip else -1, 1)  # who reads each row of params
        clean = params.clone()
        clean[reader], params[reader] = 0.0, math.nan
        options = dict(causal=causal, flip=flip)
        got, want = (results(backend, x, p, mask, **options) for p in (params, clean))
        assert_same_bits(got, want)
        assert torch.equal(got[0][~mask], x[~mask])
        assert torch.equal(got[2][~mask], torch.ones_like(x)[~mask])
        assert (got[3][reader] == 0).all()


def test_masked_nan_data_passes_through(backend):
    x, params, mask = make((1, 4, 3))
    mask[:] = torch.tensor([True, True, False, False])
    x[~mask] = math.nan
    z, logdet, *_ = results(backend, x, params, mask)
    assert z[mask].isfinite().all()
    assert z[~mask].isnan().all()
    assert logdet.isfinite().all()


def test_all_masked(backend):
    x, params, _ = make((2, 1500, 7))
    z, logdet, grad, grad_params, *_ = results(backend, x, params, torch.zeros(2, 1500, dtype=torch.bool))
    assert torch.equal(z, x)
    assert torch.equal(logdet, torch.zeros(2))
    assert torch.equal(grad, torch.ones_like(x))
    assert torch.equal(grad_params, torch.zeros_like(params))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(backend, shape):
    x, params = torch.zeros(shape), torch.zeros(*shape[:2], 2 * shape[2])
    z, logdet, grad, grad_params = results(backend, x, params)[:4]
    assert z.shape == grad.shape == x.shape
    assert grad_params.shape == params.shape
    assert torch.equal(logdet, torch.zeros(shape[0]))


def test_strides_do_not_matter(backend):
    x, params, mask = make((4, 6, 10))
    want = results(backend, x, params, mask)
    loose = (x.transpose(0, 1).contiguous().transpose(0, 1), torch.cat((params, params), 2)[..., :20])
    assert_same_bits(results(backend, *loose, mask.t().contiguous().t()), want)


def test_gradcheck(backend):
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, direction, x, params, options, mask):
            ctx.save_for_backward(x, params)
            ctx.rest = direction, options, mask
            more = (True,) if direction == "decode" else ()
            return getattr(backend.ops, f"affine_{direction}")(x, params, *tail(options, mask), *more)

        @staticmethod
        def backward(ctx, grad, grad_logdet):
            direction, options, mask = ctx.rest
            op = getattr(backend.ops, f"affine_{direction}_backward")
            return None, *op(grad, grad_logdet, *ctx.saved_tensors, *tail(options, mask)), None, None

    for i, (scale, clip) in enumerate(itertools.product(SCALES, CLIPS)):
        x, params, mask = (backend.to(t) for t in make((2, 3, 2), torch.float64))
        x.requires_grad_(), params.requires_grad_()
        layout, clip_on = LAYOUTS[i % 3], ("both", "scale")[i % 2]
        options = dict(layout=layout, scale=scale, clip=clip, clip_on=clip_on, flip=bool(i % 2))
        for direction in ("encode", "decode"):
            args = (direction, x, params, options, mask)
            assert torch.autograd.gradcheck(Op.apply, args)


def test_the_public_ops_reach_these_kernels(backend):
    x, params, mask = make((2, 33, 12))
    with backend.public():
        z, logdet = ops.affine_encode(backend.to(x), backend.to(params), scale="softplus", mask=backend.to(mask))
        back = ops.affine_decode(z, backend.to(params), scale="softplus", mask=backend.to(mask))
    torch.testing.assert_close(back.cpu(), x, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(logdet.cpu(), reference.affine_encode(x, params, scale="softplus", mask=mask)[1])


def test_bad_input_is_refused(backend):
    x, params, mask = (backend.to(t) for t in make((2, 3, 4)))
    rest = tail({}, None)
    for args in ((x, params[..., :7], *rest), (x, params.double(), *rest), (x[0], params, *rest),
                 (x, params, *rest[:-1], mask[:1]), (x, params, "ab", *rest[1:])):  # fmt: skip
        with pytest.raises(RuntimeError, match="affine"):
            backend.ops.affine_encode(*args)
    for grad, grad_logdet in ((x[:1], None), (x.double(), None), (x, x[:, 0, 0].double()), (x, x[:1, 0, 0])):
        with pytest.raises(RuntimeError, match="affine: the gradient"):
            backend.ops.affine_encode_backward(grad, grad_logdet, x, params, *rest)


# --- torch's machinery around the kernels: on a GPU only ------------------------------------------------------------


@pytest.mark.gpu
def test_opcheck():
    backend = get("cuda")
    x, params, mask = (backend.to(t) for t in make((2, 3, 4)))
    rest = tail(dict(scale="softplus", clip=("tanh", 2.0)), mask)
    grads = [t.clone().requires_grad_() for t in (x, params)]
    torch.library.opcheck(torch.ops.biflow.affine_encode.default, (*grads, *rest))
    torch.library.opcheck(torch.ops.biflow.affine_decode.default, (*grads, *rest, True))
    grad, grad_logdet = torch.randn_like(x), torch.randn(2, device="cuda")
    torch.library.opcheck(torch.ops.biflow.affine_encode_backward.default, (grad, grad_logdet, x, params, *rest))
    torch.library.opcheck(torch.ops.biflow.affine_decode_backward.default, (grad, None, x, params, *rest))


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler):
    backend = get("cuda")
    x, params, mask = (backend.to(t) for t in make((2, 6, 5)))

    def loss(x, params):
        z, logdet = ops.affine_encode(x, 0.5 * params, scale="softplus", clip=("tanh", 4.0), flip=True, mask=mask)
        back = ops.affine_decode(z + 1, params.to(torch.bfloat16), causal=False)
        return (z**2).sum() - logdet.sum() + back.sum()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    got, want = (
        value_and_grads(lambda a, b, f=f: (f(a, b), a.sum()), x, params, (torch.ones(()), torch.zeros(())))
        for f in (compiled, loss)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused():
    get("cuda")
    x, params, mask = make((2, 3, 4))
    for args in ((x.cuda(), params, mask.cuda()), (x.cuda(), params.cuda(), mask)):
        with pytest.raises(ValueError, match="expected device cuda:0 like x, got cpu"):
            ops.affine_encode(*args[:2], mask=args[2])
        with pytest.raises(RuntimeError, match="must be on the device of x"):
            torch.ops.biflow.affine_encode(*args[:2], *tail({}, args[2]))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    get("cuda")
    x, params, _ = (t.cuda() for t in make((2, 1500, 7)))
    want = ops.affine_encode(x, params)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.affine_encode(x, params)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
