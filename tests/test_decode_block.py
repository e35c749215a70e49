"""decode_block: the exact sequential inverse of one flow block, against reference.decode_block in fp64 (DESIGN 8)."""

import dataclasses

import pytest
import torch
from blocks import BASE, CASES, decoded_by, error_and_allowed, make_case, random_weights, to

from biflow import reference
from biflow.ops.decode_block import BlockConfig, decode_block, pack_block


@pytest.fixture(scope="module")
def expected():
    """name -> the references in fp64 and fp32"""
    results = {}

    def get(name):
        if name not in results:
            config, weights, z, options = make_case(name)
            exact = reference.decode_block(z.double(), to(torch.float64, weights), config, **to(torch.float64, options))
            results[name] = exact, reference.decode_block(z, weights, config, **options)
        return results[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_parity(name, isa, expected):
    config, weights, z, options = make_case(name)
    x = decode_block(z, pack_block(weights, config), config, **options)
    exact, plain = expected(name)
    assert exact.abs().max() < 100, "the case must be well conditioned"
    error, allowed = error_and_allowed(x, plain, exact)
    assert error <= allowed, f"error {error:.2e} of decode_block, {allowed:.2e} allowed"


@pytest.mark.parametrize("name", ["tarflow", "start_token_flip", "context_and_class_tokens", "sigmoid_clip_scale"])
def test_encode_gives_z_back(name):
    config, weights, z, options = make_case(name)
    x = decode_block(z, pack_block(weights, config), config, **options)
    raw = reference.block_params(x.double(), to(torch.float64, weights), config, **to(torch.float64, options))
    back, _ = reference.affine_encode(x.double(), raw, **decoded_by(config))
    torch.testing.assert_close(back.float(), z, atol=2e-5, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["guided_annealed", "context", "tails", "wide_panels", "tiles", "crew"])
def test_a_sample_does_not_depend_on_batch_or_threads(name, precision, isa, threads):
    config, weights, z, options = make_case(name, batch=67)  # more than a group of 64 rows
    packed = pack_block(weights, config, precision)

    def rows(value, pick):
        return value[pick] if isinstance(value, torch.Tensor) and value.shape[0] == 67 else value

    def decode(pick):
        return decode_block(z[pick], packed, config, **{k: rows(v, pick) for k, v in options.items()})

    threads(1)
    whole = decode(slice(None))
    for first, last in [(0, 1), (66, 67), (3, 5), (10, 13), (20, 24), (30, 35), (1, 50)]:
        assert torch.equal(decode(slice(first, last)), whole[first:last])
    for n in (2, 3):
        threads(n)
        assert torch.equal(decode(slice(None)), whole)
        assert torch.equal(decode(slice(5, 6)), whole[5:6])  # a crew of n


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(gate="swiglu", norm="rmsnorm", num_classes=3, class_tokens=2),
        dict(start_token=True, rope=True, flip=True),
        dict(mlp_hidden=544),  # four phases: a half would not be whole tiles
    ],
)
def test_two_threads_share_the_heads_and_hidden_units_of_few_rows(changes, precision, isa, threads):
    """So many weights that up to 31 rows are shared by columns, not by samples."""
    sizes = dict(tokens=5, width=256, head_dim=64, mlp_hidden=1024, layers=2)
    config = BlockConfig(**{**BASE, **sizes, **changes})
    packed = pack_block(random_weights(config), config, precision)
    z, context, null = torch.randn(4, 5, 4), torch.randn(4, 3, 256), torch.randn(4, 3, 256)
    for rows, guidance in [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0), (1, 0.7), (2, 0.7), (3, 0.7)]:
        given = dict(context=context[:rows], null_context=null[:rows], guidance=guidance, attn_temp=0.8)
        threads(1)
        one = decode_block(z[:rows], packed, config, **given)
        threads(2)
        assert torch.equal(decode_block(z[:rows], packed, config, **given), one)


def test_guidance_is_an_extrapolation_of_two_runs_for_the_first_free_token():
    """Token 1 depends on token 0 alone, so its guided value follows from unguided runs of the op."""
    config = BlockConfig(**{**BASE, "tokens": 2, "num_classes": 3})
    weights = random_weights(config)
    packed = pack_block(weights, config)
    z, y = torch.randn(4, 2, 4), torch.tensor([0, 1, 2, -1])

    def raw(labels, shift):  # x1 = z1 e^a + b, at z1 = 0 and 1
        probe = z.clone()
        probe[:, 1] = shift
        return decode_block(probe, packed, config, y=labels)[:, 1].double()

    def a_and_b(labels):
        b = raw(labels, 0.0)
        return (raw(labels, 1.0) - b).log(), b

    (a, b), (null_a, null_b) = a_and_b(y), a_and_b(torch.full((4,), -1))
    g = 1.7
    want = z[:, 1].double() * (a + g * (a - null_a)).exp() + b + g * (b - null_b)
    for anneal in (True, False):  # at the last token both weights are g
        got = decode_block(z, packed, config, y=y, guidance=g, anneal=anneal)
        torch.testing.assert_close(got[:, 1].double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[3], decode_block(z[3:], packed, config)[0])  # y = -1: guidance changes nothing


def test_no_label_is_the_mean_class():
    config = BlockConfig(**{**BASE, "num_classes": 3})
    weights = random_weights(config)
    z = torch.randn(2, 9, 4)
    packed = pack_block(weights, config)
    mean = decode_block(z, packed, config, y=torch.tensor([-1, -1]))
    assert torch.equal(mean, decode_block(z, packed, config))
    last = decode_block(z, packed, config, y=torch.tensor([2, 2]))
    assert not torch.allclose(mean, last, atol=1e-3)
    plain = dataclasses.replace(config, num_classes=0)
    added = {k: v for k, v in weights.items() if k != "class_embed"}
    added["proj_in.bias"] = added["proj_in.bias"] + weights["class_embed"].mean(0)[0]
    torch.testing.assert_close(mean, decode_block(z, pack_block(added, plain), plain), atol=1e-5, rtol=1e-5)


def test_one_token_without_start_is_untouched():
    config, weights, z, _ = make_case("one_token")
    assert torch.equal(decode_block(z, pack_block(weights, config), config), z)


def test_out():
    config, weights, z, options = make_case("guided_annealed")
    packed = pack_block(weights, config)
    x = decode_block(z, packed, config, **options)
    out = torch.full_like(z, float("nan"))
    assert decode_block(z, packed, config, out=out, **options) is out
    assert torch.equal(out, x)
    itself = z.clone()
    assert decode_block(itself, packed, config, out=itself, **options) is itself
    assert torch.equal(itself, x)
    buffer = torch.zeros(z.numel() + 4)
    start, overlapping = buffer[4:].view_as(z), buffer[:-4].view_as(z)
    with pytest.raises(ValueError, match="overlap"):
        decode_block(start, packed, config, out=overlapping, **options)


def test_non_contiguous_z_and_empty_batch():
    config, weights, z, _ = make_case("tarflow")
    packed = pack_block(weights, config)
    strided = z.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_block(strided, packed, config), decode_block(z, packed, config))
    assert decode_block(z[:0], packed, config).shape == (0, 9, 4)


def op_arguments(name):
    """What decode_block passes to the functional torch op."""
    seen = []
    config, weights, z, options = make_case(name, batch=2)
    packed = pack_block(weights, config)

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.biflow.decode_block_.default:
                seen.append((args[:-1], kwargs))
            return func(*args, **(kwargs or {}))

    with Spy():
        decode_block(z, packed, config, **options)
    return seen[0]


@pytest.mark.parametrize("name", ["tarflow", "class_tokens"])
def test_opcheck(name):
    args, kwargs = op_arguments(name)
    torch.library.opcheck(torch.ops.biflow.decode_block.default, args, kwargs)
    out = torch.empty_like(args[0])
    torch.library.opcheck(torch.ops.biflow.decode_block_.default, (*args, out), kwargs)


def test_compile():
    config, weights, z, options = make_case("class_tokens")
    packed = pack_block(weights, config)

    def step(z, y, out):
        x = decode_block(z * 1.0, packed, config, y=y, guidance=1.0)
        decode_block(z, packed, config, y=y, out=out)
        return x + out

    out = torch.empty_like(z)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(z, options["y"], out)
    assert torch.equal(got, step(z, options["y"], torch.empty_like(z)))
    assert torch.equal(out, decode_block(z, packed, config, y=options["y"]))


def test_no_gradient():
    config, weights, z, _ = make_case("tarflow")
    packed = pack_block(weights, config)
    x = decode_block(z.requires_grad_(), packed, config)
    with pytest.raises(RuntimeError, match="no gradient"):
        x.sum().backward()
    with pytest.raises(RuntimeError, match="no_grad"):
        decode_block(z, packed, config, out=torch.empty(z.shape))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(width=30), ValueError, "width: expected a multiple of head_dim 8, got 30"),
        (dict(head_dim=5, width=30), ValueError, "head_dim: expected an even number up to 256, got 5"),
        (dict(head_dim=258, width=258), ValueError, "head_dim: expected an even number up to 256, got 258"),
        (dict(tokens=0), ValueError, r"tokens: expected 1 to 2\^24 - 1, got 0"),
        (dict(layers=1.5), TypeError, "layers: expected an int, got float 1.5"),
        (dict(layers=True), TypeError, "layers: expected an int, got bool True"),
        (dict(qk_norm="no"), TypeError, "qk_norm: expected a bool, got str 'no'"),
        (dict(flip="x"), TypeError, "flip: expected a bool, got str 'x'"),
        (dict(norm="batchnorm"), ValueError, "norm: expected one of layernorm, rmsnorm, got 'batchnorm'"),
        (dict(gate="relu"), ValueError, "gate: expected one of"),
        (dict(scale="tanh"), ValueError, "scale: expected one of exp, softplus, sigmoid, got 'tanh'"),
        (dict(layout="ab"), ValueError, "layout: expected one of"),
        (dict(clip=("soft", 1.0)), ValueError, "clip: expected None, .* got .*soft"),
        (dict(clip=("hard", 0.0)), ValueError, "clip: expected a finite c > 0, got 0.0"),
        (dict(clip=("hard", True)), ValueError, "clip: expected a finite c > 0, got True"),
        (dict(clip=3.0), ValueError, "clip: expected None, .* got 3.0"),
        (dict(class_tokens=2), ValueError, "class_tokens: expected 0 where num_classes is 0, got 2"),
    ],
)
def test_bad_config(fields, error, message):
    with pytest.raises(error, match=message):
        BlockConfig(**{**BASE, **fields})


def test_bad_weights():
    config = BlockConfig(**BASE)
    weights = random_weights(config)
    with pytest.raises(ValueError, match=r"missing weights: \['layers.1.qkv.bias'\]; unexpected weights: \['extra'\]"):
        pack_block({k: v for k, v in weights.items() if k != "layers.1.qkv.bias"} | {"extra": z0}, config)
    with pytest.raises(ValueError, match=r"layers.0.fc1.weight: expected shape \(64, 32\), got \(32, 64\)"):
        pack_block(weights | {"layers.0.fc1.weight": weights["layers.0.fc1.weight"].T}, config)
    with pytest.raises(TypeError, match=r"proj_in.weight: expected float32, got torch.float64"):
        pack_block(weights | {"proj_in.weight": weights["proj_in.weight"].double()}, config)
    with pytest.raises(ValueError, match=r"proj_in.weight: expected a CPU.* tensor, got one on meta"):
        pack_block(weights | {"proj_in.weight": weights["proj_in.weight"].to("meta")}, config)


z0 = torch.zeros(2, 9, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(z=torch.zeros(2, 8, 4)), ValueError, r"z: expected shape \(B, 9, 4\), got \(2, 8, 4\)"),
        (dict(z=torch.zeros(9, 4)), ValueError, r"z: expected shape \(B, 9, 4\), got \(9, 4\)"),
        (dict(z=z0.double()), TypeError, "z: expected float32, got torch.float64"),
        (dict(z=z0.to("meta")), ValueError, "z: expected a CPU.* tensor, got one on meta"),
        (dict(z=[[0.0]]), TypeError, "z: expected a Tensor, got list"),
        (dict(out=torch.zeros(2, 9, 5)), ValueError, r"out: expected shape \(2, 9, 4\), got \(2, 9, 5\)"),
        (dict(out=torch.zeros(2, 4, 9).transpose(1, 2)), ValueError, "out: expected a contiguous tensor"),
        (dict(y=torch.zeros(3, dtype=torch.int64)), ValueError, r"y: expected shape \(2,\), got \(3,\)"),
        (dict(y=torch.zeros(2)), TypeError, "y: expected an int64 Tensor, got torch.float32"),
        (dict(y=[0, 1]), TypeError, "y: expected an int64 Tensor, got list"),
        (dict(guide="c"), ValueError, "guide: expected one of a, b, ab, got 'c'"),
        (dict(guide="aa"), ValueError, "guide: expected one of a, b, ab, got 'aa'"),
        (dict(guide="ba"), ValueError, "guide: expected one of a, b, ab, got 'ba'"),
        (dict(guidance=-1.0), ValueError, "guidance: expected a finite number >= 0, got -1.0"),
        (dict(guidance=float("nan")), ValueError, "guidance: expected a finite number >= 0, got nan"),
        (dict(guidance=None), TypeError, "guidance: expected a number, got NoneType None"),
        (dict(guidance="1"), TypeError, "guidance: expected a number, got str '1'"),
        (dict(attn_temp=0.0), ValueError, "attn_temp: expected a finite number > 0, got 0.0"),
        (dict(guidance=1e300), ValueError, r"guidance: expected a finite number >= 0 as float32, got 1e\+300"),
        (dict(guidance=3.4028236e38), ValueError, "guidance: expected a finite number >= 0 as float32, got 3.4"),
        (dict(attn_temp=1e300), ValueError, r"attn_temp: expected a finite number > 0 as float32, got 1e\+300"),
        (dict(attn_temp=1e-300), ValueError, "attn_temp: expected a finite number > 0 as float32, got 1e-300"),
        (dict(attn_temp="x"), TypeError, "attn_temp: expected a number, got str 'x'"),
        (dict(anneal="no"), TypeError, "anneal: expected a bool, got str 'no'"),
        (dict(context=[1]), TypeError, "context: expected a Tensor, got list"),
        (dict(context=torch.zeros(2, 3, 31)), ValueError, r"context: expected shape \(2, S, 32\), got \(2, 3, 31\)"),
        (dict(context=torch.zeros(2, 3, 32).double()), TypeError, "context: expected float32, got torch.float64"),
        (dict(context=torch.zeros(2, 3, 32), guidance=1.0), ValueError, "null_context: expected a Tensor"),
        (
            dict(context=torch.zeros(2, 3, 32), null_context=torch.zeros(4, 32)),
            ValueError,
            r"null_context: expected shape \(3, 32\) or \(2, 3, 32\), got \(4, 32\)",
        ),
        (dict(context=torch.zeros(2, 3, 32), null_context=3), TypeError, "null_context: expected a Tensor, got int"),
        (dict(null_context=torch.zeros(4, 32)), ValueError, "null_context: expected None without context"),
        (dict(weights={}), TypeError, "weights: expected the result of pack_block, got dict"),
        (
            dict(config=BlockConfig(**{**BASE, "num_classes": 2, "flip": True})),
            ValueError,
            "config: expected the one the weights were packed for",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    config = BlockConfig(**{**BASE, "num_classes": 2})
    call = dict(z=z0, weights=pack_block(random_weights(config), config), config=config) | arguments
    with pytest.raises(error, match=message):
        decode_block(**call)


def test_packing_checks_where_it_writes():
    config = BlockConfig(**BASE)
    weights = [t for name, t in random_weights(config).items() if name != "class_embed"]
    packed = pack_block(random_weights(config), config)
    options = dict(packed.shape_options, tokens=config.tokens, channels=config.channels)
    size = torch.ops.biflow.packed_block_size(weights, **options)
    assert packed.packed.shape == (size,)
    again = torch.empty(size)
    torch.ops.biflow.pack_block_(weights, again, **options)
    assert torch.equal(again, packed.packed)
    with pytest.raises(RuntimeError, match=rf"packed: expected shape \({size},\), got \({size - 1},\)"):
        torch.ops.biflow.pack_block_(weights, again[:-1], **options)
    with pytest.raises(RuntimeError, match="packed: expected float32, got Double"):
        torch.ops.biflow.pack_block_(weights, again.double(), **options)


def test_the_torch_op_checks_again():
    args, kwargs = op_arguments("tarflow")
    op = torch.ops.biflow.decode_block
    size = args[1].numel()
    with pytest.raises(RuntimeError, match=rf"packed: expected shape \({size},\), got \({size - 16},\)"):
        op(args[0], args[1][:-16], *args[2:], **kwargs)
    with pytest.raises(RuntimeError, match="z: expected float32, got Double"):
        op(args[0].double(), *args[1:], **kwargs)
    for name, value, wanted in (
        ("guidance", 1e300, "guidance must be finite and >= 0 as float32"),
        ("guidance", -1.0, "guidance must be finite and >= 0 as float32, got -1"),
        ("attn_temp", 1e-300, "attn_temp must be finite and > 0 as float32"),
    ):
        with pytest.raises(RuntimeError, match=wanted):
            op(*args, **{**kwargs, name: value})
    with pytest.raises(RuntimeError, match="clip_value must be finite and > 0 as float32"):
        op(*args, **{**kwargs, "clip": "tanh", "clip_value": 1e300})
    with pytest.raises(RuntimeError, match="unknown norm"):
        op(*args, **{**kwargs, "norm": "none"})
