"""BiFlow, the learned inverse as a module: one pass, its trajectory heads, its conditions."""

import contextlib
import copy
import re

import pytest
import torch
from tiny import make_reverse

import biflow
from biflow.models.layers import unpatchify

CLASSES = {"num_classes": 3, "class_tokens": 2}
GUIDED = {**CLASSES, "max_guidance": 3.0}
PLAIN_LAYER = {"norm": "layernorm", "gate": "gelu", "qk_norm": False, "rope": False}


def noise(batch=3, seed=0, dtype=torch.float32):
    return torch.randn(batch, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("config", [{}, CLASSES, GUIDED, PLAIN_LAYER, {"pos_embed": False}], ids=str)
def test_one_pass_gives_images_and_states(config):
    rev = make_reverse(**config)
    y = torch.tensor([0, -1, 2]) if "num_classes" in config else None
    clean, states = rev(noise(), y, return_states=True)
    assert clean.shape == (3, 4, 4)
    assert [s.shape for s in states] == [(3, 4, 4)] * 3
    assert torch.equal(rev(noise(), y), clean)
    assert torch.equal(rev.decode(noise(), y), unpatchify(clean, 2))


def test_states_are_in_encode_order():
    """states[i] predicts x_i: group k, k = 1..B in decode order, ends in x_{B-k}, and later groups do not touch it."""
    rev = make_reverse()
    clean, states = rev(noise(), return_states=True)
    for group in range(4):
        changed = copy.deepcopy(rev)
        with torch.no_grad():
            changed.groups[group][0].proj.weight.add_(0.1)
        other_clean, other = changed(noise(), return_states=True)
        assert not torch.equal(other_clean, clean)
        moved = [not torch.equal(a, b) for a, b in zip(states, other, strict=True)]
        assert moved == [index <= 2 - group for index in range(3)]


def test_every_token_sees_every_token():
    rev = make_reverse(std=0.3).double()
    jacobian = torch.autograd.functional.jacobian(lambda z: rev(z)[0], noise(1, dtype=torch.float64))[:, :, 0]
    assert (jacobian.abs().amin((1, 3)) > 0).all()
    assert (jacobian.abs().amax((1, 3)) > 1e-4).all()


def test_every_weight_learns():
    rev = make_reverse(**GUIDED)
    clean, states = rev(noise(), torch.tensor([0, -1, 2]), torch.tensor([1.0, 0.0, 2.0]), return_states=True)
    sum(t.square().sum() for t in (clean, *states)).backward()
    for key, p in rev.named_parameters():
        assert p.grad is not None, key
        assert p.grad.abs().max() > 0, key


def count_passes(rev, **options):
    calls = []
    rev.proj_in.register_forward_hook(lambda *_: calls.append(1))
    x = rev.decode(noise(), torch.tensor([0, 1, -1]), **options)
    return x, len(calls)


def test_trained_guidance_is_an_input_of_one_pass():
    rev, y = make_reverse(**GUIDED), torch.tensor([0, 1, -1])
    plain, passes = count_passes(rev)
    assert passes == 1
    guided, passes = count_passes(make_reverse(**GUIDED), guidance=2.0)
    assert passes == 1
    torch.testing.assert_close(guided, unpatchify(rev(noise(), y, torch.tensor([2.0, 2.0, 0.0])), 2))
    assert (guided - plain)[:2].abs().amin() > 0
    torch.testing.assert_close(guided[2], plain[2], msg="a dropped label is not guided")


def test_other_guidance_takes_two_passes():
    rev, y = make_reverse(**CLASSES), torch.tensor([0, 1, -1])
    plain, passes = count_passes(rev)
    assert passes == 1
    guided, passes = count_passes(make_reverse(**CLASSES), guidance=2.0)
    assert passes == 2
    with torch.no_grad():
        conditional, without = rev(noise(), y), rev(noise())
    torch.testing.assert_close(guided, unpatchify(conditional + 2 * (conditional - without), 2))
    torch.testing.assert_close(guided[2], plain[2], msg="a dropped label is not guided")


@pytest.mark.parametrize("config", [CLASSES, GUIDED], ids=["two-pass", "trained"])
def test_without_labels_nothing_is_guided(config):
    rev = make_reverse(**config)
    want = rev.decode(noise(), torch.full((3,), -1))
    for options in ({}, {"guidance": 2.0}):
        torch.testing.assert_close(rev.decode(noise(), **options), want)


def test_labels_and_guidance_matter():
    rev = make_reverse(**GUIDED)
    z = noise(1).expand(5, -1, -1)
    out = rev.decode(z, torch.tensor([0, 1, 2, -1, 0]))
    for i in range(4):
        assert all((out[i] - out[j]).abs().max() > 1e-4 for j in range(i))
    torch.testing.assert_close(out[4], out[0])
    strengths = [rev.decode(z[:1], torch.tensor([0]), guidance=g) for g in (0.0, 0.5, 1.0, 3.0)]
    for i, a in enumerate(strengths):
        assert all((a - b).abs().max() > 1e-5 for b in strengths[:i])


def test_samples_are_reproducible():
    rev, y = make_reverse(**GUIDED), torch.tensor([0, 1, 2])
    g = torch.Generator()
    a = rev.sample(3, y, guidance=1.0, generator=g.manual_seed(1))
    assert torch.equal(a, rev.sample(3, y, guidance=1.0, generator=g.manual_seed(1)))
    z = torch.randn(3, 4, 4, generator=g.manual_seed(1))
    torch.testing.assert_close(a, rev.decode(z, y, guidance=1.0))
    cold = rev.sample(3, y, temperature=0.5, generator=g.manual_seed(1))
    torch.testing.assert_close(cold, rev.decode(0.5 * z, y))
    assert rev.sample(0).shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    "mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)
def test_sampling_has_no_graph(mode):
    rev = make_reverse(**GUIDED)
    with mode():
        x = rev.sample(2, torch.tensor([0, 1]), guidance=1.0)
    assert not x.requires_grad
    assert x.shape == (2, 1, 4, 4)


def test_a_fresh_model_predicts_zero():
    rev = biflow.BiFlow(biflow.BiFlowConfig(img_size=4, in_channels=1, width=16, head_dim=8, num_blocks=2))
    clean, states = rev(noise(), return_states=True)
    assert (clean == 0).all()
    assert all((s == 0).all() for s in states)


def test_bf16_autocast():
    rev = make_reverse(**GUIDED)
    y, w = torch.tensor([0, 1, -1]), torch.tensor([1.0, 2.0, 0.0])
    want = rev(noise(), y, w)
    with torch.autocast("cpu", torch.bfloat16):
        low = rev(noise(), y, w)
        decoded = rev.decode(noise(), y, guidance=1.0)
    low.float().sum().backward()
    assert 0 < (low - want).abs().max() < 0.05
    assert torch.equal(decoded, rev.decode(noise(), y, guidance=1.0)), "precision='fp32' holds under autocast"


@pytest.mark.slow
def test_compiles_into_one_graph():
    rev = make_reverse(**GUIDED)
    arguments = noise(), torch.tensor([0, 1, -1]), torch.tensor([1.0, 2.0, 0.0])
    torch._dynamo.reset()
    compiled = torch.compile(rev, fullgraph=True, backend="aot_eager")
    got, states = compiled(*arguments, return_states=True)
    want, want_states = rev(*arguments, return_states=True)
    torch.testing.assert_close([got, *states], [want, *want_states])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.decode(torch.zeros(1, 4, 3)), ValueError, "z: expected shape (any, 4, 4), got (1, 4, 3)"),
        (lambda r: r.decode(torch.zeros(1, 4, 4, dtype=torch.int32)), TypeError, "z: expected a floating-point tensor"),
        (lambda r: r.decode(torch.zeros(1, 4, 4).double()), TypeError, "expected torch.float32, the model's dtype"),
        (lambda r: r.decode(torch.full((1, 4, 4), torch.nan)), ValueError, "z: expected finite values, got 16 NaN"),
        (lambda r: r.decode(noise(1), torch.tensor([3])), ValueError, "y: expected labels in [0, 3) or -1"),
        (
            lambda r: r.decode(noise(1), torch.tensor([0.0])),
            TypeError,
            "y: expected an int64 tensor, got torch.float32",
        ),
        (lambda r: r.decode(noise(2), torch.tensor([0])), ValueError, "y: expected shape (2,), got (1,)"),
        (lambda r: r.decode(noise(1), guidance=-1), ValueError, "guidance: expected a finite number >= 0, got -1"),
        (lambda r: r.decode(noise(1), guidance=3.5), ValueError, "guidance: expected at most 3 (as trained), got 3.5"),
        (lambda r: r.decode(noise(1), guidance="1"), TypeError, "guidance: expected a number, got str '1'"),
        (lambda r: r.decode(noise(1), precision="fp16"), ValueError, "expected one of fp32, bf16, got 'fp16'"),
        (lambda r: r.sample(-1), ValueError, "n: expected 0 or more, got -1"),
        (lambda r: r.sample(True), TypeError, "n: expected an int, got bool True"),
        (lambda r: r.sample(1, generator=3), TypeError, "generator: expected a torch.Generator or None, got int 3"),
        (lambda r: r.sample(1, temperature=-1.0), ValueError, "temperature: expected a finite number >= 0, got -1"),
        (lambda r: r.double().sample(1), TypeError, "expected a model of torch.float32 weights, got torch.float64"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call(make_reverse(**GUIDED))


def test_refuses_conditions_without_classes():
    with pytest.raises(ValueError, match="y: expected None for a model without classes"):
        make_reverse().decode(noise(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="guidance: expected 0 for a model without classes, got 1"):
        make_reverse().decode(noise(1), guidance=1.0)
