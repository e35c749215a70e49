"""The block's pass over the emulated kernels: attention reads keys and values where a window left them."""

import pytest
import torch
from blocks import BASE, bf16_arithmetic, random_weights, to

from biflow import reference
from biflow.models.iterate import block_weights, plain_weights
from biflow.ops import BlockConfig, BlockWindows, _block_pass

HEADS = dict(BASE, width=64, head_dim=32, tokens=40, qk_norm=True, rope=True)


@pytest.mark.parametrize("fields", [dict(flip=True), dict(start_token=True, gate="swiglu", norm="rmsnorm")], ids=str)
def test_windows_on_the_kernels(backend, monkeypatch, fields):
    """The pass in bf16 with a prefix and guidance; tiles of keys end inside the prefix, a window and after it."""
    if backend.library is None:
        pytest.skip("tests/kernels/test_iterate.py has it on a GPU")
    calls = []

    def attention(q, k, v, *, causal, scale):
        calls.append((q.shape[2], k.shape[2]))
        o = backend.ops.attention_forward(q, k, v, causal, scale, None, None, None, 0.0, None, None, 0, [])
        return o.transpose(1, 2)

    monkeypatch.setattr(_block_pass, "attention", attention)
    config = BlockConfig(**HEADS | fields)
    weights, g = random_weights(config), torch.Generator().manual_seed(0)
    x, context, null = (torch.randn(*n, generator=g) for n in ((2, 40, 4), (2, 30, 64), (30, 64)))
    options = dict(context=context, null_context=null, guidance=1.0, attn_temp=0.7)
    plain = block_weights(weights, config, "bf16", None, plain_weights(weights, config, "bf16"))
    windows = BlockWindows(plain, config, 2, **options)
    for start, stop in ((0, 1), (1, 12), (12, 39), (39, 40), (39, 40)):
        windows(x, start, stop)
    exact = reference.block_params(x.double(), to(torch.float64, weights), config, **to(torch.float64, options))
    with bf16_arithmetic(tiles=True):
        same = reference.block_params(x, weights, config, **options)
    rms = [(t - exact).square().mean().sqrt() for t in (windows.raw, same)]
    assert rms[0] <= 2 * rms[1]
    rows = {0: 1, 1: 11, 12: 27, 39: 1} if config.start_token else {1: 11, 12: 27, 39: 1}
    shift = 0 if config.start_token else 1
    assert {(n, 30 + start - shift + n) for start, n in rows.items()} <= set(calls)
