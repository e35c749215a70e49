"""The block's parallel pass over plain weights, which a GPU takes: on the CPU, against reference.block_params in fp64
and against the packed kernels."""

import pytest
import torch
from blocks import BASE, CASES, bf16_arithmetic, error_and_allowed, make_case, random_weights, to

from biflow import reference
from biflow.ops import BlockConfig, BlockWindows, block_params, pack_block
from biflow.ops.decode_block import block_shapes, block_weights, plain_weights

PRECISIONS = ("fp32", "bf16")
WINDOW_CASES = ["guided_annealed", "start_token_flip", "modern", "class_tokens", "context", "shift_only", "one_token"]


def plain_block(weights, config, precision="fp32"):
    """What `pack_block` makes of CUDA tensors, of any."""
    return block_weights(weights, config, precision, None, plain_weights(weights, config, precision))


def rms(t):
    return t.double().square().mean().sqrt().item()


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    config, weights, x, options = make_case(name)
    raw = block_params(x, plain_block(weights, config), config, **options)
    exact = reference.block_params(x.double(), to(torch.float64, weights), config, **to(torch.float64, options))
    same = reference.block_params(x, weights, config, **options)
    assert raw.shape == exact.shape
    error, allowed = error_and_allowed(raw, same, exact)
    assert error <= allowed, f"error {error:.2e}, {allowed:.2e} allowed"


@pytest.mark.parametrize("name", CASES)
def test_parity_in_bf16(name):
    """No further off than twice the reference with the same weights, inputs, keys and values rounded."""
    config, weights, x, options = make_case(name)
    raw = block_params(x, plain_block(weights, config, "bf16"), config, **options)
    exact = reference.block_params(x.double(), to(torch.float64, weights), config, **to(torch.float64, options))
    with bf16_arithmetic(tiles=True):
        same = reference.block_params(x, weights, config, **options)
    assert raw.dtype == torch.float32
    assert rms(raw - exact) <= 2 * rms(same - exact)
    if rms(same - exact):
        assert rms(raw - exact) > 1e-5, "it is in bf16"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_as_the_packed_kernels(name, precision):
    config, weights, x, options = make_case(name)
    raw = block_params(x, plain_block(weights, config, precision), config, **options)
    packed = block_params(x, pack_block(weights, config, precision), config, **options)
    exact = block_params(x, pack_block(weights, config), config, **options)
    floor = 2e-5 if precision == "fp32" else 3 * rms(packed - exact) + 1e-6
    assert rms(raw - packed) <= floor


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", WINDOW_CASES)
def test_windows_in_order_give_the_whole_pass(name, precision):
    config, weights, x, options = make_case(name)
    plain = plain_block(weights, config, precision)
    whole = block_params(x, plain, config, **options)
    for size in (1, 5, config.tokens):
        windows = BlockWindows(plain, config, len(x), **options)
        for start in range(0, config.tokens, size):
            assert windows(x, start, min(start + size, config.tokens)) is windows.raw
        # the products' sums of other numbers of rows are in another order
        assert rms(windows.raw - whole) <= (1e-6 if precision == "fp32" else 2e-2) * rms(whole), f"windows of {size}"


@pytest.mark.parametrize("name", WINDOW_CASES)
def test_a_window_can_be_evaluated_again(name):
    """With NaN or other values in the window and after it, then with the right ones: nothing of them is left."""
    config, weights, x, options = make_case(name)
    plain = plain_block(weights, config)
    once, again = (BlockWindows(plain, config, len(x), **options) for _ in range(2))
    tokens = torch.arange(config.tokens).flip(0) if config.flip else torch.arange(config.tokens)
    for start in range(0, config.tokens, 3):
        stop = min(start + 3, config.tokens)
        for wrong in (float("nan"), 7.0):
            again(torch.where((tokens >= start)[:, None], wrong, x), start, stop)
        for windows in (once, again):
            windows(x, start, stop)
    assert torch.equal(again.raw, once.raw)


@pytest.mark.parametrize("name", ["tarflow", "start_token_flip", "context", "modern"])
def test_what_is_not_finite_stays_in_its_sample_and_window(name):
    """torch's attention multiplies the values of later tokens by 0, which NaN survives: not those of later windows."""
    config, weights, x, options = make_case(name, batch=3)
    plain, shift = plain_block(weights, config), 0 if config.start_token else 1
    order = [config.tokens - 1 - n if config.flip else n for n in range(config.tokens)]
    for poison in (float("nan"), float("inf")):
        clean, bad = (BlockWindows(plain, config, 3, **options) for _ in range(2))
        poisoned = x.clone()
        poisoned[1, order[4], 0] = poison
        for start in (0, 3, 6):
            clean(x, start, start + 3)
            bad(poisoned, start, start + 3)
        assert torch.equal(bad.raw[[0, 2]], clean.raw[[0, 2]])
        assert torch.equal(bad.raw[1, order[:3]], clean.raw[1, order[:3]])
        assert bad.raw[1, order[5 + shift :]].isnan().all()
    x[1, order[8]] = float("nan")  # nothing comes from the last token: it is not read
    assert block_params(x, plain, config, **options).isfinite().all()


def test_a_window_writes_its_rows_only():
    for name, start, want in [("tarflow", 4, [4, 5]), ("tarflow", 0, [0, 1]), ("start_token_flip", 4, [3, 4])]:
        config, weights, x, _ = make_case(name)
        windows = BlockWindows(plain_block(weights, config), config, len(x))
        windows(x, 0, 4)
        windows.raw.fill_(7)
        windows(x, start, start + 2)
        assert (windows.raw != 7).all(2).all(0).nonzero().flatten().tolist() == want


@pytest.mark.parametrize("name", ["context", "class_tokens", "guided_annealed"])
def test_another_condition_in_the_same_buffers(name):
    """As a CUDA graph is used again: `fill`, `prefill`, and the same windows."""
    config, weights, x, options = make_case(name)
    plain = plain_block(weights, config)
    other = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    windows, want = (BlockWindows(plain, config, len(x), **o) for o in (options, other))
    windows(x, 0, 9)
    windows._pass.fill(want._given)
    windows._pass.prefill()
    assert torch.equal(windows(x, 0, 9), want(x, 0, 9))


def test_fp32_weights_are_those_given():
    """A graph over them sees what is written into them; bf16 copies the layers' linear maps alone."""
    config, weights, x, _ = make_case("modern")
    plain = plain_block(weights, config)
    assert list(plain.plain) == [name for name in block_shapes(config) if name != "class_embed"]
    assert all(t.data_ptr() == weights[name].data_ptr() for name, t in plain.plain.items())
    before = block_params(x, plain, config)
    weights["layers.0.fc1.weight"].mul_(2)
    assert not torch.equal(block_params(x, plain, config), before)
    low = plain_block(weights, config, "bf16").plain
    rounded = {name for name, t in low.items() if t.dtype == torch.bfloat16}
    assert rounded == {
        f"layers.{j}.{linear}.{what}"
        for j in range(config.layers) for linear in ("qkv", "proj", "fc1", "fc2") for what in ("weight", "bias")
    }  # fmt: skip
    assert all(low[name].data_ptr() == weights[name].data_ptr() for name in low.keys() - rounded)


def test_empty_batch():
    for name in ("guided_annealed", "context"):
        config, weights, x, options = make_case(name, batch=0)
        plain = plain_block(weights, config)
        assert block_params(x, plain, config, **options).shape == (0, 9, 8)
        assert BlockWindows(plain, config, 0, **options)(x, 2, 5).shape == (0, 9, 8)


def test_strides_gradients_and_devices():
    config, weights, x, _ = make_case("tarflow")
    plain = plain_block(weights, config)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(block_params(strided, plain, config), block_params(x, plain, config))
    with pytest.raises(RuntimeError, match="no_grad"):
        block_params(x.clone().requires_grad_(), plain, config)
    with pytest.raises(ValueError, match="y: expected None for a block without classes"):
        block_params(x, plain, config, y=torch.zeros(7, dtype=torch.int64))
    classes = BlockConfig(**BASE, num_classes=2)
    plain = plain_block(random_weights(classes), classes)
    with pytest.raises(ValueError, match="y: expected device cpu like x, got meta"):
        block_params(x, plain, classes, y=torch.zeros(7, dtype=torch.int64, device="meta"))


def test_compile():
    config, weights, x, options = make_case("class_tokens")
    plain = plain_block(weights, config)

    def step(x):
        return block_params(x * 1.0, plain, config, **options) + 1.0

    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, step(x))
