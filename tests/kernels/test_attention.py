"""attention_forward against the fp64 reference: error <= 2 x the same-dtype reference's + one rounding.

The same bits for every division of the work (plan), so that what holds for one holds for all.
"""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from biflow import ops, reference

from .backends import get

attention_module = importlib.import_module("biflow.ops.attention")  # the package's name `attention` is the function

DTYPES = (torch.bfloat16, torch.float16)
# one key, less than 16 (a short tile), one tile, 17 (just not short) after a tile, a short end, four tiles
TOKENS = (1, 15, 64, 81, 130, 200)


def attend(backend, q, k, v, *, causal=False, scale=None, mask=None, plan=()):
    """ops.attention by the op that the kernel is; plan: [row_tiles, warps, blocks, stages] of csrc/attention.h."""
    q, k, v = (backend.to(t) for t in (q, k, v))
    mask = mask if mask is None else backend.to(mask)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = backend.ops.attention_forward(q, k, v, causal, scale, mask, None, None, 0.0, None, None, 0, list(plan))
    return o.transpose(1, 2).cpu()


def attend_qkv(backend, qkv, *, heads, causal=False, mask=None, q_norm=None, k_norm=None, rope=None, prefix=0, plan=()):
    """The same of ops.attention_qkv."""
    qkv, mask, q_norm, k_norm, cos, sin = (
        t if t is None else backend.to(t) for t in (qkv, mask, q_norm, k_norm, *(rope or (None, None)))
    )
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    o = backend.ops.attention_forward(
        q, k, v, causal, q.shape[3] ** -0.5, mask, q_norm, k_norm, 1e-6, cos, sin, prefix, list(plan)
    )
    return o.flatten(2).cpu()


def make(shape, dtype, keys=None, seed=0):
    """q, k, v of (B, H, T, d), and a mask that leaves the last sample's first query without a key if causal."""
    g = torch.Generator().manual_seed(seed)
    B, H, T, d = shape
    Tk = T if keys is None else keys
    q, k, v = (torch.randn(B, H, n, d, generator=g).to(dtype) for n in (T, Tk, Tk))
    mask = torch.rand(B, Tk, generator=g) > 0.4
    mask[-1, :1] = False
    return q, k, v, mask


def make_qkv(B, T, H, d, dtype, prefix=0):
    g = torch.Generator().manual_seed(1)
    qkv = 3 * torch.randn(B, T, 3 * H * d, generator=g)
    qkv[:, 1::3] *= 3e-4  # where the norms' eps matters
    angle = 3 * torch.randn(T - prefix, d // 2, generator=g)
    norms = [torch.rand(d, generator=g) + 0.5 for _ in range(2)]
    return qkv.to(dtype), (angle.cos(), angle.sin()), *norms


def check(got, same, exact):
    """`same`: of the reference in the dtype of `got`, `exact` in fp64."""
    assert got.shape == exact.shape
    assert got.dtype == same.dtype
    error, allowed = (((t.double() - exact).abs() / (1 + exact.abs())).max() for t in (got, same))
    assert error <= 2 * allowed + torch.finfo(got.dtype).eps, (error, allowed)


def wide(options):
    """The options of the reference in fp64."""
    widen = {torch.float32: torch.Tensor.double}
    return {
        name: tuple(t.double() for t in o)
        if isinstance(o, tuple)
        else widen.get(getattr(o, "dtype", None), lambda t: t)(o)
        for name, o in options.items()
    }


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("T", TOKENS)
def test_matches_reference(backend, T, d):
    for dtype in DTYPES:
        q, k, v, mask = make((2, 2, T, d), dtype)
        for options in ({}, {"causal": True}, {"mask": mask}, {"causal": True, "mask": mask, "scale": 0.3}):
            exact = reference.attention(q.double(), k.double(), v.double(), **options)
            check(attend(backend, q, k, v, **options), reference.attention(q, k, v, **options), exact)


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("d", [32, 64, 128])
def test_norms_and_rotary_embedding(backend, d, prefix):
    T, H = 75, 3
    for dtype in DTYPES:
        qkv, rope, q_norm, k_norm = make_qkv(2, T, H, d, dtype, prefix)
        mask = torch.arange(T) % 5 != 1
        for options in (
            {"q_norm": q_norm, "k_norm": k_norm},
            {"rope": rope, "prefix": prefix},
            {"q_norm": q_norm, "k_norm": k_norm, "rope": rope, "prefix": prefix, "causal": True},
            {"k_norm": k_norm, "rope": rope, "prefix": prefix, "mask": mask.expand(2, T)},
        ):
            exact = reference.attention_qkv(qkv.double(), heads=H, **wide(options))
            same = reference.attention_qkv(qkv, heads=H, **options)
            check(attend_qkv(backend, qkv, heads=H, **options), same, exact)


PLANS = {  # of T = 330 (6 tiles of keys) and (row_tiles, warps, blocks, stages)
    "a tile of queries each": (1, 4, 6, 6),
    "several turns": (1, 4, 2, 6),
    "one block, one warp": (1, 1, 1, 6),
    "streamed": (1, 4, 6, 3),
    "streamed, a deep ring": (1, 2, 11, 5),
    "streamed, eight warps": (1, 8, 3, 3),
    "two tiles of rows": (2, 2, 6, 6),
    "two tiles of rows, turns": (2, 4, 1, 6),
    "two tiles of rows, streamed": (2, 4, 3, 3),
    "two tiles of rows, eight warps": (2, 8, 2, 3),
}


@pytest.mark.parametrize("plan", PLANS)
def test_plans_give_the_same_bits(backend, plan):
    T, H = 330, 2
    for d in (32, 64, 128):
        if PLANS[plan][0] == 2 and d == 128:
            continue
        qkv, rope, q_norm, k_norm = make_qkv(2, T, H, d, torch.bfloat16, 2)
        for causal in (False, True):
            options = {"heads": H, "causal": causal, "q_norm": q_norm, "k_norm": k_norm, "rope": rope, "prefix": 2}
            got = attend_qkv(backend, qkv, **options, plan=PLANS[plan])
            assert torch.equal(got, attend_qkv(backend, qkv, **options))
            exact = reference.attention_qkv(qkv.double(), **wide(options))
            check(got, reference.attention_qkv(qkv, **options), exact)


@pytest.mark.parametrize("streamed", [False, True])
def test_as_many_keys_as_do_not_fit(backend, streamed):
    """The plan's own choice: 227 KB of shared memory hold 448 keys and values of d = 128."""
    T = 460 if streamed else 400
    q, k, v, mask = make((1, 2, T, 128), torch.bfloat16)
    exact = reference.attention(q.double(), k.double(), v.double(), mask=mask)
    check(attend(backend, q, k, v, mask=mask), reference.attention(q, k, v, mask=mask), exact)


def test_a_long_sequence(backend):
    """Seventeen tiles of keys, the last one short: the values, whatever the plan."""
    long_sequence(backend, 1, 1, 1030, 32, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("T", [1024, 2500])
def test_long_sequences(T, d):
    for dtype in DTYPES:
        long_sequence(get("cuda"), 2, 3, T, d, dtype)


def long_sequence(backend, B, H, T, d, dtype):
    qkv, rope, q_norm, k_norm = make_qkv(B, T, H, d, dtype, 2)
    for causal in (False, True):
        options = {"heads": H, "causal": causal, "q_norm": q_norm, "k_norm": k_norm, "rope": rope, "prefix": 2}
        exact = reference.attention_qkv(qkv.double(), **wide(options))
        check(attend_qkv(backend, qkv, **options), reference.attention_qkv(qkv, **options), exact)


@pytest.mark.parametrize(("queries", "keys"), [(1, 200), (70, 65), (17, 144), (200, 63)])
def test_other_keys_than_queries(backend, queries, keys):
    for d in (32, 64, 128):
        q, k, v, mask = make((2, 3, queries, d), torch.float16, keys)
        for m in (None, mask):
            exact = reference.attention(q.double(), k.double(), v.double(), mask=m)
            check(attend(backend, q, k, v, mask=m), reference.attention(q, k, v, mask=m), exact)


# one query, a tile's edge between them, more queries than a block's, whole tiles of keys that the first do not see
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 200), (3, 66), (64, 80), (70, 135), (17, 144), (150, 290)])
def test_causal_with_fewer_queries_than_keys(backend, queries, keys):
    """Aligned at the end: query i sees the keys up to Tk - Tq + i."""
    for d in (32, 64, 128):
        q, k, v, mask = make((2, 3, queries, d), torch.bfloat16, keys)
        mask[-1, : keys - queries + 1] = False  # no key for the first query
        for m in (None, mask):
            exact = reference.attention(q.double(), k.double(), v.double(), mask=m, causal=True)
            same = reference.attention(q, k, v, mask=m, causal=True)
            check(attend(backend, q, k, v, mask=m, causal=True), same, exact)


@pytest.mark.parametrize("plan", [(1, 1, 10, 5), (1, 4, 3, 3), (2, 2, 1, 5), (2, 4, 2, 3)], ids=str)
def test_fewer_queries_give_the_same_bits_by_every_plan(backend, plan):
    q, k, v, mask = make((1, 2, 150, 64), torch.bfloat16, 290)
    for m in (None, mask):
        got = attend(backend, q, k, v, mask=m, causal=True, plan=plan)
        assert torch.equal(got, attend(backend, q, k, v, mask=m, causal=True))


def test_queries_without_keys_give_zero(backend):
    q, k, v, _ = make((3, 2, 70, 64), torch.bfloat16)
    mask = torch.ones(3, 70, dtype=torch.bool)
    mask[0] = False  # no key at all
    mask[1, :66] = False  # causal: none for the first queries, and none in the first tile for the others
    for causal in (False, True):
        o = attend(backend, q, k, v, mask=mask, causal=causal)
        assert (o[0] == 0).all()
        assert (o[1, :, :66] == 0).all() == causal
        assert (o[1, :, 66:] != 0).any(dim=-1).all()
        assert torch.equal(o[2:], attend(backend, q[2:], k[2:], v[2:], causal=causal))
    assert (attend(backend, q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert attend(backend, q[:, :, :0], k, v).shape == (3, 2, 0, 64)


@pytest.mark.parametrize("T", [40, 83, 200])
def test_nan_in_masked_keys_and_values_does_not_leak(backend, T):
    for d in (32, 64, 128):
        qkv, rope, q_norm, k_norm = make_qkv(2, T, 2, d, torch.bfloat16)
        mask = torch.rand(2, T, generator=torch.Generator().manual_seed(5)) > 0.3
        options = {"heads": 2, "mask": mask, "q_norm": q_norm, "k_norm": k_norm, "rope": rope, "causal": True}
        want = attend_qkv(backend, qkv, **options)
        parts = qkv.unflatten(2, (3, -1))
        parts[:, :, 1][~mask], parts[:, :, 2][~mask] = math.nan, math.inf
        assert torch.equal(attend_qkv(backend, qkv, **options), want)


def test_nan_in_a_query_stays_there(backend):
    q, k, v, _ = make((1, 2, 40, 64), torch.bfloat16)
    want = attend(backend, q, k, v)
    q[0, 1, 21, 5] = math.nan
    got = attend(backend, q, k, v)
    assert got[0, 1, 21].isnan().all()
    got[0, 1, 21] = want[0, 1, 21]
    assert torch.equal(got, want)


def test_large_logits(backend):
    """The sums are brought to a new largest logit in every tile; the largest logits are far from those of exp."""
    q, k, v, _ = make((1, 2, 200, 64), torch.bfloat16)
    k *= 20 * torch.linspace(0.1, 1, 200)[:, None].bfloat16()
    exact = reference.attention(q.double(), k.double(), v.double())
    check(attend(backend, q, k, v), reference.attention(q, k, v), exact)


def test_strides(backend):
    """Of samples, heads and tokens in any order; what 16-byte accesses cannot read is copied."""
    g = torch.Generator().manual_seed(2)
    want = make((2, 3, 50, 32), torch.float16)[:3]
    expected = attend(backend, *want)
    padded = torch.randn(3, 50, 2, 3, 40, generator=g).half()  # (H, T, B, q k v, 40)
    shifted = torch.randn(2, 3, 50, 3, 33, generator=g).half()  # rows are not aligned
    turned = torch.randn(2, 3, 3, 32, 50, generator=g).half()  # channels are not side by side
    views = (padded.permute(2, 0, 1, 3, 4)[..., 8:], shifted[..., 1:], turned.permute(0, 1, 4, 2, 3))
    for view in views:
        q, k, v = backend.to(view).unbind(3)
        for t, values in zip((q, k, v), want, strict=True):
            t.copy_(values)
        for given in ((q, k, v), (want[0], k, want[2]), (q, want[1], v)):  # strides of their own each
            assert torch.equal(attend(backend, *given), expected)
    one = backend.to(torch.empty(1 + want[0].numel()).half())[1:].view(want[0].shape)  # contiguous, not aligned
    assert torch.equal(attend(backend, one.copy_(want[0]), *want[1:]), expected)
    shared = want[1][:, :1].expand(2, 3, 50, 32)
    assert torch.equal(attend(backend, want[0], shared, want[2]), attend(backend, want[0], shared.clone(), want[2]))


@pytest.mark.parametrize(
    "plan",
    [(3, 4, 1, 4), (2, 3, 1, 4), (1, 16, 1, 4), (1, 4, 0, 4), (1, 4, 5, 4), (1, 4, 2, 3), (1, 4, 4, 2), (1, 4, 4, 15)],
)  # the last one: 240 KB of shared memory
def test_plans_that_do_not_suit(backend, plan):
    q, k, v, _ = make((1, 1, 200, 64), torch.bfloat16)
    with pytest.raises(RuntimeError, match="attention_forward: CUDA error 1: "):
        attend(backend, q, k, v, plan=plan)
    assert attend(backend, q, k, v).isfinite().all()  # the next launch does not report the error again


def test_what_the_public_functions_hand_over(backend, monkeypatch):
    monkeypatch.setattr(attention_module, "_kernel_takes", lambda *_: True)
    qkv, rope, q_norm, k_norm = make_qkv(2, 20, 2, 64, torch.bfloat16, 3)
    mask = torch.arange(20).expand(2, 20) % 3 != 1
    options = {"heads": 2, "causal": True, "mask": mask, "q_norm": q_norm, "k_norm": k_norm, "rope": rope, "prefix": 3}
    want = attend_qkv(backend, qkv, **options)
    q, k, v, small = make((2, 2, 20, 64), torch.float16)
    with backend.public():
        tensors = [backend.to(t) for t in (mask, q_norm, k_norm.bfloat16(), *rope)]
        got = attention_module._attention_qkv(backend.to(qkv), 2, True, 0.125, *tensors[:3], 1e-6, *tensors[3:], 3)
        alone = attention_module._attention(*(backend.to(t) for t in (q, k, v)), True, 0.3, backend.to(small))
    changed = attend_qkv(backend, qkv, **options | {"k_norm": k_norm.bfloat16().float()})
    assert torch.equal(got.cpu(), changed)
    assert not torch.equal(want, changed)
    assert torch.equal(alone.cpu(), attend(backend, q, k, v, causal=True, scale=0.3, mask=small))


def test_what_has_nothing_to_fuse_is_torchs(monkeypatch):
    monkeypatch.setattr(attention_module, "_kernel_takes", lambda *_: True)  # the kernel itself has no CPU form
    q, k, v, _ = make((2, 2, 20, 64), torch.float16)
    qkv = make_qkv(2, 20, 2, 64, torch.float16)[0]
    for causal in (False, True):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert torch.equal(ops.attention(q, k, v, causal=causal), want)
        heads = qkv.unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        want = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)
        assert torch.equal(ops.attention_qkv(qkv, heads=2, causal=causal), want)
    with pytest.raises(NotImplementedError, match="attention_forward"):  # queries at the end of more keys
        ops.attention(q[:, :, :7], k, v, causal=True)


# --- torch's machinery around the kernel: on a GPU only ---------------------------------------------------------------


@pytest.mark.gpu
def test_opcheck():
    backend = get("cuda")
    qkv, (cos, sin), q_norm, k_norm = make_qkv(2, 20, 2, 64, torch.bfloat16, 3)
    q, k, v = backend.to(qkv).unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    mask, q_norm, k_norm, cos, sin = (backend.to(t) for t in (torch.rand(2, 20) > 0.4, q_norm, k_norm, cos, sin))
    op = torch.ops.biflow.attention_forward.default
    torch.library.opcheck(op, (q, k, v, False, 0.125, None, None, None, 0.0, None, None, 0, []))
    torch.library.opcheck(op, (q, k, v, True, 0.125, mask, q_norm, k_norm, 1e-6, cos, sin, 3, []))


@pytest.mark.gpu
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler):
    backend = get("cuda")
    q, k, v, mask = (backend.to(t) for t in make((2, 2, 70, 64), torch.bfloat16))

    def layer(q, k, v, mask):
        return 2 * ops.attention(q + 1, k, v, causal=True, mask=mask)

    got = torch.compile(layer, fullgraph=True, backend=compiler)(q, k, v, mask)
    torch.testing.assert_close(got, layer(q, k, v, mask))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    backend = get("cuda")
    q, k, v, _ = (backend.to(t) for t in make((2, 2, 400, 128), torch.bfloat16))  # 224 KB of shared memory
    mask = torch.ones(2, 400, dtype=torch.bool, device=q.device)  # without one it is torch's
    want = ops.attention(q, k, v, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.attention(q, k, v, mask=mask)
    graph.replay()
    assert torch.equal(got, want)


@pytest.mark.gpu
def test_tensors_of_two_devices_are_refused():
    backend = get("cuda")
    qkv, (cos, sin), q_norm, k_norm = make_qkv(2, 20, 2, 64, torch.bfloat16)
    q, k, v = backend.to(qkv).unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    rest = {"mask": torch.rand(2, 20) > 0.4, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin}
    for name in rest:
        given = {n: t if n == name else backend.to(t) for n, t in rest.items()}
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of q"):
            torch.ops.biflow.attention_forward(
                q, k, v, False, 0.125, *(given[n] for n in ("mask", "q_norm", "k_norm")), 1e-6, given["cos"],
                given["sin"], 0, [],
            )  # fmt: skip
