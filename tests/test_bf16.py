"""precision="bf16" of pack_block: decode_block and block_params against a reference that rounds what they round."""

import pytest
import torch
from blocks import BASE, CASES, bf16_arithmetic, make_case, random_weights, to

from biflow import reference
from biflow.ops import BlockConfig, BlockWindows, block_params, decode_block, pack_block


def rms(t):
    return t.double().square().mean().sqrt().item()


@pytest.fixture(scope="module")
def expected():
    """exact: fp64, nothing rounded; rounded: fp64 sums of bf16 values; plain: fp32 sums of them"""
    results = {}

    def get(op, name, tiles=False):
        if (op, name, tiles) not in results:
            config, weights, x, options = make_case(name)
            wide = x.double(), to(torch.float64, weights), config, to(torch.float64, options)
            exact = op(*wide[:3], **wide[3])
            with bf16_arithmetic(tiles):
                results[op, name, tiles] = exact, op(*wide[:3], **wide[3]), op(x, weights, config, **options)
        return results[op, name, tiles]

    return get


@pytest.mark.parametrize("op", [block_params, decode_block], ids=lambda op: op.__name__)
@pytest.mark.parametrize("name", CASES)
def test_parity(op, name, isa, expected):
    """Root mean square errors: a last bit of bf16 falls this way or that by what order a sum has, so that the largest
    error of some hundred elements is a draw, and twice the reference's draw no bound."""
    config, weights, x, options = make_case(name)
    got = op(x, pack_block(weights, config, "bf16"), config, **options)
    exact, _, plain = expected(getattr(reference, op.__name__), name)
    floor = torch.finfo(torch.float32).eps * rms(exact)
    assert rms(got - exact) <= 2 * rms(plain - exact) + floor


@pytest.mark.parametrize("name", ["modern", "tails", "tiles"])
def test_what_is_rounded(name, isa, expected):
    """Most elements are those of the reference that rounds the same things and sums in fp64, to the last bits of fp32.

    Where a value lies half-way between two of bf16, its last bit may fall the other way. Keys and values that are not
    rounded, or queries that are, show as medians of 2e-4 and ratios of 0.6. With swiglu: gelu is computed to 7e-5 only.
    """
    config, weights, x, options = make_case(name)
    raw = block_params(x, pack_block(weights, config, "bf16"), config, **options)
    exact, rounded, _ = expected(reference.block_params, name, tiles=isa == "amx" and config.head_dim % 32 == 0)
    error = (raw - rounded).abs()
    assert error.median() < 1e-6
    assert rms(error) < 0.4 * rms(exact - rounded)


@pytest.mark.parametrize("name", ["guided_annealed", "start_token_flip", "modern", "context"])
def test_it_is_not_fp32(name):
    config, weights, x, options = make_case(name)
    packed = {precision: pack_block(weights, config, precision) for precision in ("fp32", "bf16")}
    assert {precision: p.precision for precision, p in packed.items()} == {"fp32": "fp32", "bf16": "bf16"}
    for op in (block_params, decode_block):
        fine, coarse = (op(x, packed[precision], config, **options) for precision in ("fp32", "bf16"))
        assert 1e-4 < (fine - coarse).abs().max() < 5e-2


def test_what_touches_the_data_stays_fp32():
    """proj_in, proj_out, embeddings and biases: a block whose layers add nothing loses nothing to bf16."""
    config = BlockConfig(**{**BASE, "num_classes": 3, "start_token": True})
    weights = random_weights(config)
    for name in weights:
        if name.endswith(("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")):
            weights[name] = torch.zeros_like(weights[name])
    z = torch.randn(7, 9, 4, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    fine, coarse = (decode_block(z, pack_block(weights, config, p), config, y=y) for p in ("fp32", "bf16"))
    assert torch.equal(fine, coarse)
    assert (fine - z).abs().max() > 0.1


def test_packing_halves_the_layers():
    """In words of 32 bits; widths that fill their tiles."""
    config = BlockConfig(**{**BASE, "width": 128, "head_dim": 64, "mlp_hidden": 512, "layers": 3})
    weights = random_weights(config)
    fine, coarse = (pack_block(weights, config, p).packed.numel() for p in ("fp32", "bf16"))
    assert fine - coarse == 3 * (4 * 128 * 128 + 2 * 128 * 512) // 2


def test_rounding_of_weights_is_to_nearest_even(isa):
    """1 + 2^-8 lies half-way between 1 and the next bf16 number, 1 + 3 * 2^-8 half-way and goes up: ties to even."""
    config = BlockConfig(**{**BASE, "layers": 1, "pos_embed": False})
    weights = random_weights(config)
    ties = {1 + 2**-8: 1.0, 1 + 3 * 2**-8: 1 + 2**-6, 1 + 2**-8 + 2**-20: 1 + 2**-7, -1 - 2**-8: -1.0}
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    for value, rounded in ties.items():
        one = weights | {"layers.0.fc2.weight": weights["layers.0.fc2.weight"].clone().fill_(value)}
        other = weights | {"layers.0.fc2.weight": weights["layers.0.fc2.weight"].clone().fill_(rounded)}
        got, want = (block_params(x, pack_block(w, config, "bf16"), config) for w in (one, other))
        assert torch.equal(got, want)


def test_keys_and_values_take_half_the_room():
    config = BlockConfig(**{**BASE, "tokens": 64, "width": 128, "head_dim": 64})
    weights = random_weights(config)
    fine, coarse = (BlockWindows(pack_block(weights, config, p), config, 2)._cache.numel() for p in ("fp32", "bf16"))
    assert fine == 2 * coarse == 2 * 2 * 2 * 64 * 128 * 2 // 2


@pytest.mark.parametrize("precision", ["fp16", "BF16", None, torch.bfloat16])
def test_bad_precision(precision):
    config = BlockConfig(**BASE)
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, got"):
        pack_block(random_weights(config), config, precision)
