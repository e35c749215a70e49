"""TarFlow as a module: the cache of packed weights, copies, autocast, compilation, refusal of bad input."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from tiny import BATCH, VARIANTS, images, make_condition, make_flow, noise

import biflow
from biflow.models.layers import patchify
from biflow.ops._weights import weights_key


def test_a_fresh_model_is_the_identity():
    flow = biflow.TarFlow(biflow.TarFlowConfig(img_size=4, in_channels=1, width=16, head_dim=8, num_blocks=2))
    x = images(flow)
    z, logdet = flow.encode(x)
    assert torch.equal(z, patchify(x, 2))
    assert (logdet == 0).all()


def _replaced(flow):
    flow.blocks[0].proj_in.weight = torch.nn.Parameter(flow.blocks[0].proj_in.weight + 0.1)


def _written_through_numpy(flow):
    flow.blocks[1].layers[0].fc2.weight.detach().numpy()[3, 5] += 3


CHANGES = {
    "optimizer": lambda flow, other: torch.optim.AdamW(flow.parameters(), 0.02).step(),
    "load_state_dict": lambda flow, other: flow.load_state_dict(other.state_dict()),
    "load_state_dict-assign": lambda flow, other: flow.load_state_dict(other.state_dict(), assign=True),
    "in-place": lambda flow, other: torch.no_grad()(flow.blocks[1].layers[0].qkv.weight.mul_)(1.5),
    "detached": lambda flow, other: flow.blocks[1].class_embed.detach().add_(1.0),
    "lerp-foreach": lambda flow, other: torch.no_grad()(torch._foreach_lerp_)(
        list(flow.parameters()), list(other.parameters()), 0.5
    ),
    "parameter-replaced": lambda flow, other: _replaced(flow),
    # these move no version counter
    "one-value-of-data": lambda flow, other: flow.blocks[0].layers[0].qkv.weight.data[5, 7].add_(3.0),
    "signs-of-data": lambda flow, other: flow.blocks[0].layers[0].proj.weight.data.neg_(),
    "numpy": lambda flow, other: _written_through_numpy(flow),
    "inference-mode": lambda flow, other: torch.inference_mode()(flow.load_state_dict)(other.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_decode_sees_changed_weights(change):
    """The packed weights are a cache: it must notice every way weights change."""
    flow, other = make_flow(num_classes=3), make_flow(num_classes=3, seed=1)
    y, z = torch.tensor([0, 1, 2, -1]), noise(flow)
    before = flow.decode(z, y)
    (packed,) = flow.blocks[0].packed("fp32")
    flow.decode(z, y)
    assert flow.blocks[0].packed("fp32")[0] is packed, "unchanged weights are packed once"
    flow.log_prob(images(flow), y).sum().backward()
    CHANGES[change](flow, other)
    after, info = flow.decode(z, y, return_info=True)
    assert info.residual.max() <= 1e-4, "the certificate uses the new weights, decode the old"
    assert (after - before).abs().max() > 1e-3


def test_decode_sees_data_of_strided_weights_changed():
    flow, z = make_flow(), noise(make_flow())
    layer = flow.blocks[0].layers[0].fc1
    layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t())
    before = flow.decode(z)
    layer.weight.data.mul_(1.5)
    after, info = flow.decode(z, return_info=True)
    assert info.residual.max() <= 1e-5
    assert (after - before).abs().max() > 1e-4


def test_weights_key_reads_every_byte(isa):
    """Any byte, anywhere in a tensor of several strides and a rest, and the shape; the same key on every ISA."""
    w = torch.arange(700, dtype=torch.int16)
    key = weights_key([w, w])
    for i in range(700):
        changed = w.clone()
        changed[i] ^= 1 << (i % 15)
        assert weights_key([changed, w]) != key
        assert weights_key([w, changed]) != key
    assert weights_key([w, w.clone()]) == key
    assert weights_key([w.view(7, 100), w]) != key
    assert weights_key([w, w, w[:0]]) != key
    assert weights_key([-torch.ones(64), w]) != weights_key([torch.ones(64), w])
    torch.ops.biflow.force_cpu_isa("best")
    assert weights_key([w, w]) == key


def test_new_weights_at_an_old_address_are_seen():
    """The allocator hands out freed addresses again: other weights may lie exactly where the packed ones lay."""
    flow, z = make_flow(), noise(make_flow())
    layer = flow.blocks[0].layers[0].fc1
    for seed in range(20):
        layer.weight = None  # frees the old weights, if nothing else holds them
        layer.weight = torch.nn.Parameter(torch.full((64, 16), 0.01 * seed))
        assert flow.decode(z, return_info=True)[1].residual.max() <= 1e-5


def test_copies_are_independent():
    flow = make_flow(num_classes=3, rope=True)
    z = noise(flow)
    want = flow.decode(z)
    twin, thawed = copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))
    buffer = io.BytesIO()
    torch.save(flow.state_dict(), buffer)
    buffer.seek(0)
    loaded = biflow.TarFlow(flow.config)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(2)
    for model in (twin, thawed, loaded):
        assert torch.equal(model.decode(z), want)
    assert not torch.equal(flow.decode(z), want)
    assert not [key for key in flow.state_dict() if "packed" in key or "rope" in key]


def test_bf16_autocast():
    flow = make_flow(num_classes=3, **{k: v for k, v in VARIANTS["modern"].items() if k != "num_classes"})
    x, (y, _) = images(flow), make_condition(flow, BATCH)
    z, logdet = flow.encode(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_logdet = flow.encode(x, y)
        flow.log_prob(x, y).sum().backward()
        decoded = flow.decode(z, y)
        denoised = flow.denoise(x, y)
    assert low.dtype == low_logdet.dtype == torch.float32
    assert 0 < (low - z).abs().max() < 0.1
    assert 0 < (low_logdet - logdet).abs().max() < 0.1
    assert all(p.grad.isfinite().all() for p in flow.parameters())
    assert torch.equal(decoded, flow.decode(z, y)), "precision='fp32' holds under autocast"
    assert torch.equal(denoised, flow.denoise(x, y))


def test_bf16_weights_encode():
    flow, low = make_flow(), make_flow(dtype=torch.bfloat16)
    z, logdet = low.encode(images(low))
    assert z.dtype == torch.bfloat16
    assert logdet.dtype == torch.float32
    assert (z.float() - flow.encode(images(flow))[0]).abs().max() < 0.1


@pytest.mark.parametrize("name", ["classes", "modern", "shift-only", "context"])
def test_encode_compiles_into_one_graph(name):
    shape = {"num_blocks": 2, "layers_per_block": 1}
    flow = make_flow(**{**VARIANTS[name], **shape})
    x, (y, context) = images(flow), make_condition(flow, BATCH)
    z, logdet = flow.encode(x, y, context)
    flow.log_prob(x, y, context).sum().backward()
    want = {key: p.grad.clone() for key, p in flow.named_parameters() if p.grad is not None}  # no null context
    flow.zero_grad()
    torch._dynamo.reset()
    encode = torch.compile(flow.encode, fullgraph=True, backend="aot_eager")
    got_z, got_logdet = encode(x, y, context)
    torch.testing.assert_close(got_z, z)
    torch.testing.assert_close(got_logdet, logdet)
    (0.5 * got_z.square().sum() - got_logdet.sum()).neg().backward()
    for key, grad in want.items():
        torch.testing.assert_close(flow.get_parameter(key).grad, grad, rtol=1e-4, atol=1e-5, msg=key)


def test_decode_compiles_around_the_packing():
    """The graph breaks where weights are packed; new weights are seen there."""
    flow = make_flow(num_classes=3)
    y, z = torch.tensor([0, 1, 2, -1]), noise(flow)
    torch._dynamo.reset()
    decode = torch.compile(flow.decode, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(decode(z, y, guidance=0.5), flow.decode(z, y, guidance=0.5))
        flow.blocks[0].layers[0].qkv.weight.data[5, 7] += 3


# --- bad input

BAD_CALLS = {
    "list": (lambda f: f.encode([[1.0]]), TypeError, "x: expected a floating-point tensor, got list"),
    "uint8": (
        lambda f: f.encode(torch.zeros(1, 1, 4, 4, dtype=torch.uint8)),
        TypeError,
        "x: expected a floating-point tensor, got torch.uint8",
    ),
    "fp64": (
        lambda f: f.encode(torch.zeros(1, 1, 4, 4, dtype=torch.float64)),
        TypeError,
        "x: expected torch.float32, the model's dtype; got torch.float64",
    ),
    "channels": (
        lambda f: f.encode(torch.zeros(1, 3, 4, 4)),
        ValueError,
        "expected shape (any, 1, 4, 4), got (1, 3, 4, 4)",
    ),
    "dims": (lambda f: f.log_prob(torch.zeros(4, 4)), ValueError, "x: expected shape (any, 1, 4, 4), got (4, 4)"),
    "device": (lambda f: f.encode(torch.zeros(1, 1, 4, 4, device="meta")), ValueError, "expected a tensor on cpu"),
    "nan": (
        lambda f: f.encode(torch.full((1, 1, 4, 4), torch.nan)),
        ValueError,
        "x: expected finite values, got 16 NaN or infinite of 16",
    ),
    "y-range": (
        lambda f: f.encode(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3])),
        ValueError,
        "y: expected labels in [0, 3) or -1 (unconditional), got values in [0, 3]",
    ),
    "y-below": (lambda f: f.encode(torch.zeros(1, 1, 4, 4), torch.tensor([-2])), ValueError, "got values in [-2, -2]"),
    "y-dtype": (
        lambda f: f.encode(torch.zeros(1, 1, 4, 4), torch.tensor([0], dtype=torch.int32)),
        TypeError,
        "y: expected an int64 tensor, got torch.int32",
    ),
    "y-int": (lambda f: f.sample(1, 2), TypeError, "y: expected an int64 tensor, got int"),
    "y-shape": (lambda f: f.sample(2, torch.tensor([0])), ValueError, "y: expected shape (2,), got (1,)"),
    "y-device": (
        lambda f: f.sample(1, torch.zeros(1, dtype=torch.int64, device="meta")),
        ValueError,
        "y: expected a tensor on cpu, got one on meta",
    ),
    "context": (
        lambda f: f.encode(torch.zeros(1, 1, 4, 4), None, torch.zeros(1, 1, 5)),
        ValueError,
        "context: expected None for a model with context_dim=0",
    ),
    "z-dims": (
        lambda f: f.decode(torch.zeros(1, 1, 4, 4)),
        ValueError,
        "z: expected shape (any, 4, 4), got (1, 1, 4, 4)",
    ),
    "z-dtype": (
        lambda f: f.decode(torch.zeros(1, 4, 4, dtype=torch.bfloat16)),
        TypeError,
        "z: expected torch.float32, the model's dtype; got torch.bfloat16",
    ),
    "z-inf": (lambda f: f.decode(torch.full((1, 4, 4), torch.inf)), ValueError, "z: expected finite values"),
    "guidance": (
        lambda f: f.decode(torch.zeros(1, 4, 4), guidance=-1.0),
        ValueError,
        "guidance: expected a finite number >= 0, got -1",
    ),
    "n-float": (lambda f: f.sample(2.0), TypeError, "n: expected an int, got float 2.0"),
    "n-negative": (lambda f: f.sample(-1), ValueError, "n: expected 0 or more, got -1"),
    "temperature": (
        lambda f: f.sample(1, temperature=math.nan),
        ValueError,
        "temperature: expected a finite number >= 0, got nan",
    ),
    "temperature-fp32": (
        lambda f: f.sample(1, temperature=1e300),
        ValueError,
        "temperature: expected a finite number >= 0 as float32, got 1e+300",
    ),
    "denoise": (lambda f: f.sample(1, denoise=True), ValueError, "denoise: expected a model with noise_std > 0"),
    "option": (lambda f: f.sample(1, steps=3), TypeError, "steps"),
    "bin-width": (
        lambda f: f.bits_per_dim(torch.zeros(1, 1, 4, 4), bin_width=0),
        ValueError,
        "bin_width: expected a finite number > 0, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refuses(name):
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=re.escape(message)):
        call(make_flow(num_classes=3))


def test_refuses_conditions_of_other_models():
    flow = make_flow()
    with pytest.raises(ValueError, match="y: expected None for a model without classes"):
        flow.encode(images(flow), torch.zeros(BATCH, dtype=torch.int64))
    flow = make_flow(context_dim=5)
    with pytest.raises(ValueError, match=re.escape("context: expected shape (4, any, 5), got (3, 2, 5)")):
        flow.encode(images(flow), None, torch.zeros(3, 2, 5))


def test_refuses_to_pack_weights_of_another_device():
    with pytest.raises(ValueError, match="decode: weights: expected a CPU tensor, got one on meta"):
        make_flow().to("meta").blocks[0].packed("fp32")


def test_refuses_to_decode_in_fp64():
    flow = make_flow(dtype=torch.float64)
    with pytest.raises(TypeError, match=re.escape("expected a model of torch.float32 weights, got torch.float64")):
        flow.decode(noise(flow).double())
