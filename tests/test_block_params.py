"""block_params and BlockWindows: one parallel pass over packed weights, against reference.block_params in fp64."""

import re

import pytest
import torch
from blocks import BASE, CASES, decoded_by, error_and_allowed, make_case, random_weights, to

from biflow import ops, reference
from biflow.ops import BlockConfig, BlockWindows, block_params, decode_block, jacobi_update_, pack_block

PRECISIONS = ("fp32", "bf16")
# what a window can get wrong: its place in data order, prefixes, two sequences a sample, the shift by one, tails
WINDOW_CASES = [
    "guided_annealed",
    "start_token_flip",
    "modern",
    "class_tokens",
    "context",
    "shift_only",
    "tails",
    "tiles",
]


@pytest.fixture(scope="module")
def expected():
    """name -> the references in fp64 and fp32; x is the case's z"""
    results = {}

    def get(name):
        if name not in results:
            config, weights, x, options = make_case(name)
            exact = reference.block_params(x.double(), to(torch.float64, weights), config, **to(torch.float64, options))
            results[name] = exact, reference.block_params(x, weights, config, **options)
        return results[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_parity(name, isa, expected):
    config, weights, x, options = make_case(name)
    raw = block_params(x, pack_block(weights, config), config, **options)
    exact, plain = expected(name)
    assert raw.shape == exact.shape
    error, allowed = error_and_allowed(raw, plain, exact)
    assert error <= allowed, f"error {error:.2e} of block_params, {allowed:.2e} allowed"


def rms(t):
    return t.double().square().mean().sqrt().item()


def jacobi_step(x, z, packed, config, options):
    """One step over all tokens, in place; (2, B), how far it moved."""
    moved = torch.empty(2, len(x))
    affine = {k: v for k, v in decoded_by(config).items() if k != "causal"} | {
        "shift_only": config.shift_only,
        "flip": config.flip,
    }
    jacobi_update_(x, z, block_params(x, packed, config, **options), moved, start=0, stop=config.tokens, **affine)
    return moved


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_a_decoded_block_is_a_fixed_point(name, precision, isa):
    """Token by token or all at once, in any group of rows: the same bits of parameters, with bf16 too.

    But for AMX's attention of many queries, in heads of whole tiles: it rounds queries and weights to bf16, that of one
    query does not. Then the two differ by no more than twice what bf16 costs either.
    """
    config, weights, z, options = make_case(name)
    packed = pack_block(weights, config, precision)
    x = decode_block(z, packed, config, **options)
    again = x.clone()
    moved = jacobi_step(again, z, packed, config, options)
    tiles = isa == "amx" and precision == "bf16" and config.head_dim % 32 == 0
    if not tiles and config.scale == "exp" and config.clip is None:
        assert torch.equal(again, x)
    elif not tiles:  # which product is fused with a sum is the compiler's choice in each kernel of the affine map
        assert moved[0].max() <= 4 * torch.finfo(torch.float32).eps
    if not tiles:
        assert moved[1].max() < 5e-6  # roundings of x, over the smallest sigma
    fixed = z.clone()
    for _ in range(config.tokens):
        jacobi_step(fixed, z, packed, config, options)
    end = fixed.clone()
    assert jacobi_step(fixed, z, packed, config, options)[0].eq(0).all(), "T passes suffice, exactly"
    assert torch.equal(fixed, end)
    exact = decode_block(z, pack_block(weights, config), config, **options)
    floor = 4 * torch.finfo(torch.float32).eps * rms(exact)
    assert rms(fixed - x) <= (2 * rms(x - exact) if precision == "bf16" else 0) + floor


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WINDOW_CASES)
def test_windows_in_order_give_the_whole_pass(name, precision, isa):
    config, weights, x, options = make_case(name)
    packed = pack_block(weights, config, precision)
    whole = block_params(x, packed, config, **options)
    for size in (1, 5, 16, config.tokens):
        windows = BlockWindows(packed, config, len(x), **options)
        for start in range(0, config.tokens, size):
            assert windows(x, start, min(start + size, config.tokens)) is windows.raw
        assert torch.equal(windows.raw, whole), f"windows of {size}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WINDOW_CASES)
def test_a_window_can_be_evaluated_again(name, precision, isa):
    """As the solvers do it: with other values in the window and after it, NaN among them; then with the right ones."""
    config, weights, x, options = make_case(name)
    packed = pack_block(weights, config, precision)
    whole = block_params(x, packed, config, **options)
    windows = BlockWindows(packed, config, len(x), **options)
    for start in range(0, config.tokens, 3):
        stop = min(start + 3, config.tokens)
        tokens = torch.arange(config.tokens).flip(0) if config.flip else torch.arange(config.tokens)
        for wrong in (float("nan"), 7.0):
            windows(torch.where((tokens >= start)[:, None], wrong, x), start, stop)
        windows(x, start, stop)
    assert torch.equal(windows.raw, whole)


def test_a_window_writes_its_rows_only():
    for name in ("tarflow", "start_token_flip"):
        config, weights, x, _ = make_case(name)
        windows = BlockWindows(pack_block(weights, config), config, len(x))
        windows(x, 0, 4)
        windows.raw.fill_(7)
        windows(x, 4, 6)
        written = (windows.raw != 7).all(2).all(0)
        want = [3, 4] if config.flip else [4, 5]
        assert written.nonzero().flatten().tolist() == want


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["tarflow", "start_token_flip", "context", "wide_panels", "tiles"])
def test_causality_holds_for_nan_and_inf(name, precision, isa):
    """What is at token n reaches the parameters of later tokens of its own sample, and nothing else."""
    config, weights, x, options = make_case(name, batch=3)
    packed = pack_block(weights, config, precision)
    clean = block_params(x, packed, config, **options)
    order = [config.tokens - 1 - n if config.flip else n for n in range(config.tokens)]
    for n in range(config.tokens - 1):
        for poison in (float("nan"), float("inf")):
            bad = x.clone()
            bad[1, order[n], 0] = poison
            raw = block_params(bad, packed, config, **options)
            assert torch.equal(raw[[0, 2]], clean[[0, 2]])
            assert torch.equal(raw[1, order[: n + 1]], clean[1, order[: n + 1]])
            assert raw[1, order[n + 1]].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["guided_annealed", "context", "tails", "wide_panels", "tiles", "crew"])
def test_a_sample_does_not_depend_on_batch_or_threads(name, precision, isa, threads):
    config, weights, x, options = make_case(name, batch=23)  # more than a group of 128 rows
    packed = pack_block(weights, config, precision)

    def rows(value, pick):
        return value[pick] if isinstance(value, torch.Tensor) and value.shape[0] == 23 else value

    def params(pick, size=None):
        given = {k: rows(v, pick) for k, v in options.items()}
        if size is None:
            return block_params(x[pick], packed, config, **given)
        windows = BlockWindows(packed, config, len(x[pick]), **given)
        for start in range(0, config.tokens, size):
            windows(x[pick], start, min(start + size, config.tokens))
        return windows.raw

    threads(1)
    whole = params(slice(None))
    for pick in (slice(0, 1), slice(22, 23), slice(3, 5), slice(10, 13), slice(1, 19)):
        assert torch.equal(params(pick), whole[pick])
    for n in (2, 3):
        threads(n)
        assert torch.equal(params(slice(None)), whole)
        assert torch.equal(params(slice(0, 1)), whole[:1])  # a crew of n
        assert torch.equal(params(slice(0, 2), size=4), whole[:2])
        assert torch.equal(params(slice(0, 1), size=2), whole[:1])  # few rows, which two threads share in two phases


def test_empty_batch():
    config, weights, x, options = make_case("guided_annealed", batch=0)
    packed = pack_block(weights, config)
    assert block_params(x, packed, config, **options).shape == (0, 9, 8)
    assert BlockWindows(packed, config, 0, **options)(x, 2, 5).shape == (0, 9, 8)


def test_non_contiguous_x():
    config, weights, x, _ = make_case("tarflow")
    packed = pack_block(weights, config)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(block_params(strided, packed, config), block_params(x, packed, config))
    with pytest.raises(ValueError, match="x: expected a contiguous tensor"):
        BlockWindows(packed, config, len(x))(strided, 0, 9)


def test_no_gradient():
    config, weights, x, options = make_case("context")
    packed = pack_block(weights, config)
    windows = BlockWindows(packed, config, len(x), **options)
    free = block_params(x, packed, config, **options)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        block_params(x, packed, config, **options)
    with pytest.raises(RuntimeError, match="no_grad"):
        windows(x, 0, 9)
    with pytest.raises(RuntimeError, match="no_grad"):
        block_params(x.detach(), packed, config, **options | {"context": options["context"].requires_grad_()})
    with torch.no_grad():
        assert torch.equal(block_params(x, packed, config, **options), free)
        assert torch.equal(windows(x, 0, 9), free)


def op_arguments(name):
    """What BlockWindows passes to the torch op."""
    seen = []
    config, weights, x, options = make_case(name, batch=2)
    windows = BlockWindows(pack_block(weights, config), config, 2, **options)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.biflow.block_params_.default:
                seen.append((args, kwargs))
            return func(*args, **(kwargs or {}))

    windows._cache.zero_()  # opcheck compares what the op left alone, and NaN is not NaN
    with Spy():
        windows(x, 0, 4)
    return seen[0]


@pytest.mark.parametrize("name", ["tarflow", "class_tokens"])
def test_opcheck(name):
    args, kwargs = op_arguments(name)
    torch.library.opcheck(torch.ops.biflow.block_params_.default, args, kwargs)
    torch.library.opcheck(torch.ops.biflow.block_params_.default, (*args[:-1], None), kwargs)


def test_compile():
    config, weights, x, options = make_case("class_tokens")
    packed = pack_block(weights, config)

    def step(x):
        return block_params(x * 1.0, packed, config, **options) + 1.0

    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x))


x0 = torch.zeros(2, 9, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=torch.zeros(2, 8, 4)), ValueError, r"x: expected shape \(B, 9, 4\), got \(2, 8, 4\)"),
        (dict(x=x0.double()), TypeError, "x: expected float32, got torch.float64"),
        (dict(x=x0.to("meta")), ValueError, "x: expected a CPU.* tensor, got one on meta"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), ValueError, r"y: expected shape \(2,\), got \(3,\)"),
        (dict(guide="c"), ValueError, "guide: expected one of a, b, ab, got 'c'"),
        (dict(guidance=-1.0), ValueError, "guidance: expected a finite number >= 0, got -1.0"),
        (dict(context=torch.zeros(2, 3, 32), guidance=1.0), ValueError, "null_context: expected a Tensor"),
        (dict(weights={}), TypeError, "weights: expected the result of pack_block, got dict"),
        (dict(config=BlockConfig(**BASE, flip=True)), ValueError, "config: expected the one the weights were packed"),
    ],
)
def test_bad_arguments(arguments, error, message):
    config = BlockConfig(**{**BASE, "num_classes": 2})
    call = dict(x=x0, weights=pack_block(random_weights(config), config), config=config) | arguments
    with pytest.raises(error, match=message):
        block_params(**call)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(batch=2.0), TypeError, "batch: expected an int, got float 2.0"),
        (dict(batch=-1), ValueError, "batch: expected an int >= 0, got -1"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), ValueError, r"y: expected shape \(2,\), got \(3,\)"),
        (dict(weights={}), TypeError, "weights: expected the result of pack_block, got dict"),
        (dict(x=torch.zeros(3, 9, 4)), ValueError, r"x: expected shape \(2, 9, 4\), got \(3, 9, 4\)"),
        (dict(x=x0.double()), TypeError, "x: expected float32, got torch.float64"),
        (dict(start=4, stop=4), ValueError, "start, stop: expected 0 <= start < stop <= 9, got 4 and 4"),
        (dict(stop=10), ValueError, "start, stop: expected 0 <= start < stop <= 9, got 0 and 10"),
        (dict(start=-1), ValueError, "start, stop: expected 0 <= start < stop <= 9, got -1 and 9"),
        (dict(start=0.5), TypeError, "start: expected an int, got float 0.5"),
        (dict(stop=True), TypeError, "stop: expected an int, got bool True"),
    ],
)
def test_bad_windows(arguments, error, message):
    config = BlockConfig(**{**BASE, "num_classes": 2})
    call = dict(weights=pack_block(random_weights(config), config), config=config, batch=2) | arguments
    x, start, stop = call.pop("x", x0), call.pop("start", 0), call.pop("stop", 9)
    with pytest.raises(error, match=message):
        BlockWindows(**call)(x, start, stop)


def test_the_torch_op_checks_again():
    args, kwargs = op_arguments("tarflow")
    op = torch.ops.biflow.block_params_
    size, cache = args[1].numel(), tuple(args[-1].shape)
    with pytest.raises(RuntimeError, match=rf"packed: expected shape \({size},\), got \({size - 16},\)"):
        op(args[0], args[1][:-16], *args[2:], **kwargs)
    with pytest.raises(RuntimeError, match=re.escape(f"cache: expected shape {cache}, got (1, {cache[1]})")):
        op(*args[:-1], args[-1][:1], **kwargs)
    with pytest.raises(RuntimeError, match="cache must be 64-byte aligned"):
        op(*args[:-1], torch.empty(args[-1].numel() + 1)[1:].view_as(args[-1]), **kwargs)
    with pytest.raises(RuntimeError, match="a window that starts at 2 needs a cache"):
        op(*args[:-1], None, **{**kwargs, "start": 2})
    with pytest.raises(RuntimeError, match="expected 0 <= start < stop <= 9, got 4 and 10"):
        op(*args, **{**kwargs, "start": 4, "stop": 10})
    with pytest.raises(RuntimeError, match="prefix_tokens must be >= 0, got -1"):
        torch.ops.biflow.block_cache_size(prefix_tokens=-1, tokens=9, width=32, layers=2, head_dim=8, precision="fp32")


def test_affine_ops_take_the_parameters():
    """The documented use: encode with causal=False, and decode gives x back."""
    config, weights, x, options = make_case("start_token_flip")
    raw = block_params(x, pack_block(weights, config), config, **options)
    z, logdet = ops.affine_encode(x, raw, **decoded_by(config))
    want = reference.block_params(x.double(), to(torch.float64, weights), config)
    want_z, want_logdet = reference.affine_encode(x.double(), want, **decoded_by(config))
    torch.testing.assert_close(z.double(), want_z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logdet.double(), want_logdet, atol=1e-4, rtol=1e-5)
