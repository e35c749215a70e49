"""The parallel reverse: states and features of the encode and of a decode, for every option of a flow; bad input."""

import pytest
import torch
from tiny import BATCH, VARIANTS, images, make_condition, make_flow

import biflow
from biflow.models import pseudo_reverse as pseudo_reverse_module
from biflow.models.block import Block
from biflow.models.layers import patchify
from biflow.ops import BlockConfig
from biflow.solvers import solve_adjoint

CONTEXTS = ("cached", "live")


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_those_of_the_encode(name, dtype, bound, context):
    flow = make_flow(dtype=dtype, **VARIANTS[name])
    x, (y, tokens) = images(flow), make_condition(flow, BATCH)
    z, _, states = flow.encode(x, y, tokens, return_states=True)
    found = biflow.pseudo_reverse(flow, x, y, tokens, context=context)
    assert list(found.states) == [3, 2, 1, 0]
    assert torch.equal(found.states[3], z)
    for index, state in enumerate(states):
        assert found.states[index].dtype == dtype
        assert (found.states[index] - state).abs().max() <= bound
    assert (found.states[2] - found.states[3]).abs().max() > 0.01, "a flow that does nothing would pass"


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_states_are_those_of_a_decode_token_by_token(name, context):
    flow = make_flow(**VARIANTS[name])
    x, (y, tokens) = images(flow), make_condition(flow, BATCH)
    found = biflow.pseudo_reverse(flow, x, y, tokens, context=context)
    decoded = flow.decode(found.states[3], y, tokens, solver="sequential")
    assert (found.states[0] - patchify(decoded, flow.config.patch_size)).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", ["scale_shift", "shift_scale", "interleaved"])
def test_a_block_undoes_its_affine_map_in_every_layout(layout):
    block = Block(BlockConfig(tokens=4, channels=3, width=8, head_dim=8, mlp_hidden=8, layers=1, layout=layout))
    x, raw = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    assert (block.affine_inverse(block.affine(x, raw)[0], raw) - x).abs().max() <= 1e-12


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ["modern", "start-token", "context"])
def test_features_are_those_of_the_layers(name, context):
    """Against what hooks on the layers see of the encode, turned into data order and without the prefix."""
    flow = make_flow(dtype=torch.float64, **{**VARIANTS[name], "layers_per_block": 2})
    x, (y, tokens) = images(flow), make_condition(flow, BATCH)
    wanted, seen = [(b, k) for b in range(3) for k in range(2)], {}
    handles = [
        flow.blocks[b]
        .layers[k]
        .register_forward_hook(lambda module, inputs, output, key=(b, k): seen.__setitem__(key, output[0] + output[1]))
        for b, k in wanted
    ]
    with torch.no_grad():
        flow.encode(x, y, tokens)
    for handle in handles:
        handle.remove()
    found = biflow.pseudo_reverse(flow, x, y, tokens, context=context, features=wanted).features
    assert list(found) == [(2, 0), (2, 1), (1, 0), (1, 1), (0, 0), (0, 1)]
    for (b, k), h in found.items():
        assert h.shape == (BATCH, 4, 16)
        want = seen[b, k][:, -4:]
        assert (h - (want.flip(1) if b % 2 else want)).abs().max() <= 1e-10


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_states_of_an_encode_in_the_place_of_images(context):
    """As training has them: with a graph, which is not touched."""
    flow = make_flow(num_classes=3)
    x, (y, _) = images(flow), make_condition(flow, BATCH)
    states = flow.encode(x, y, return_states=True)[2]
    ours, own = (biflow.pseudo_reverse(flow, given, y, context=context, features=[(1, 0)]) for given in (states, x))
    assert torch.equal(ours.features[1, 0], own.features[1, 0])
    assert all(torch.equal(ours.states[i], own.states[i]) for i in range(4))
    ours.features[1, 0].sum().backward()
    assert flow.blocks[0].proj_in.weight.grad is None
    states[3].sum().backward()
    assert flow.blocks[0].proj_in.weight.grad is not None


@pytest.mark.parametrize("context", CONTEXTS)
def test_blocks_below_until_are_not_run(context):
    flow = make_flow()
    x, ran = images(flow), []
    whole = biflow.pseudo_reverse(flow, x, context=context, features=[(2, 0)])
    states = flow.encode(x, return_states=True)[2]
    flow.blocks[1].proj_in.register_forward_hook(lambda *_: ran.append(1))
    flow.blocks[2].proj_in.register_forward_hook(lambda *_: ran.append(2))
    part = biflow.pseudo_reverse(flow, states, context=context, features=[(2, 0)], until=2)
    assert set(ran) == {2}
    assert list(part.states) == [3, 2]
    assert torch.equal(part.states[2], whole.states[2])
    assert torch.equal(part.features[2, 0], whole.features[2, 0])


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_without_gradients(context, mode):
    flow = make_flow()
    want = biflow.pseudo_reverse(flow, images(flow), context=context, features=[(0, 0)])
    with mode():
        found = biflow.pseudo_reverse(flow, images(flow), context=context, features=[(0, 0)])
    assert not found.states[0].requires_grad
    assert torch.equal(found.states[0], want.states[0])
    assert torch.equal(found.features[0, 0], want.features[0, 0])


@pytest.mark.parametrize("context", CONTEXTS)
def test_autocast(context):
    """The same rounded parameters that the encode used give the same states; gradients are finite."""
    flow = make_flow(num_classes=3)
    x = images(flow)
    with torch.autocast("cpu", torch.bfloat16):
        states = flow.encode(x, return_states=True)[2]
        found = biflow.pseudo_reverse(flow, x, context=context, features=[(0, 0)])
    assert found.states[0].dtype == torch.float32
    # live: block 0's features come from a second pass; its input differs from the cached one by rounding only
    assert max((found.states[i] - s).abs().max() for i, s in enumerate(states)) <= 1e-5
    found.features[0, 0].float().square().sum().backward()
    grads = [p.grad for p in flow.blocks[0].layers.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


def test_repeated_backward_passes_add_up():
    """A live gradient frees its graph like any other, and accumulates in the weights."""
    flow = make_flow(dtype=torch.float64)
    loss = [biflow.pseudo_reverse(flow, images(flow), context="live").states[0].pow(3).sum() for _ in range(2)]
    loss[0].backward()
    once = flow.blocks[2].proj_out.weight.grad.clone()
    loss[1].backward()
    torch.testing.assert_close(flow.blocks[2].proj_out.weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss[0].backward()


def test_second_derivatives_are_refused():
    flow = make_flow(dtype=torch.float64)
    x_0 = biflow.pseudo_reverse(flow, images(flow), context="live").states[0]
    (grad,) = torch.autograd.grad(x_0.pow(3).sum(), flow.blocks[0].proj_out.bias, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


# --- the solver behind the live gradient


@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_the_adjoint_of_a_triangular_system(strength):
    g = torch.Generator().manual_seed(0)
    jacobian = strength * torch.randn(2, 6, 6, generator=g, dtype=torch.float64).tril(-1)
    grad = torch.randn(2, 6, 1, generator=g, dtype=torch.float64)
    calls = []

    def transposed(v):
        calls.append(1)
        return jacobian.mT @ v

    got = solve_adjoint(transposed, grad, 5)
    want = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - jacobian.mT, grad)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * float(want.abs().max()))
    assert len(calls) <= 5
    assert (solve_adjoint(transposed, grad, 1) - want).abs().max() > 1e-3


def test_the_adjoint_stops_at_rounding():
    calls = []

    def weak(v):
        calls.append(1)
        return 1e-3 * v.roll(-1, 1)

    solve_adjoint(weak, torch.ones(1, 100, 1), 99)
    assert 2 <= len(calls) <= 4
    calls.clear()
    solve_adjoint(weak, torch.ones(1, 100, 1), 0)
    assert calls == []
    solve_adjoint(weak, torch.ones(1, 100, 1), 99, eps=1e-3)
    assert len(calls) == 1


def test_under_autocast_the_series_ends_at_the_rounding_of_its_products(monkeypatch):
    """Fewer products than in fp32, and a gradient as near to that of fp32 as the whole series under autocast has it."""
    flow, solve = make_flow(img_size=16, patch_size=2), pseudo_reverse_module.solve_adjoint
    pictures = images(flow)

    def gradient(enabled, given=True):
        terms = []

        def counted(transposed, grad, limit, eps=None):
            return solve(lambda v: terms.append(1) or transposed(v), grad, limit, eps if given else None)

        monkeypatch.setattr(pseudo_reverse_module, "solve_adjoint", counted)
        flow.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            states = flow.encode(pictures, return_states=True)[2]
            found = biflow.pseudo_reverse(flow, states, context="live").states[0]
        found.pow(3).mean().backward()
        return torch.cat([p.grad.flatten() for p in flow.parameters()]), len(terms)

    (exact, many), (whole, as_many), (found, few) = gradient(False), gradient(True, given=False), gradient(True)
    assert few < 0.7 * min(many, as_many)
    assert (found - exact).norm() <= 1.5 * (whole - exact).norm()


# --- bad input

X = torch.zeros(2, 1, 4, 4)
STATE = torch.zeros(2, 4, 4)
BAD = {
    "context": (dict(context="frozen"), ValueError, "context: expected one of cached, live, got 'frozen'"),
    "block": (dict(features=[(3, 0)]), ValueError, "features: block: expected 0 to 2, got 3"),
    "block below until": (dict(features=[(0, 0)], until=1), ValueError, "features: block: expected 1 to 2, got 0"),
    "layer": (dict(features=[(1, 1)]), ValueError, "features: layer of block 1: expected 0 to 0, got 1"),
    "layer of another type": (dict(features=[(1, 0.0)]), TypeError, "layer of block 1: expected an int, got float 0.0"),
    "until": (dict(until=3), ValueError, "until: expected 0 to 2, got 3"),
    "labels": (dict(y=torch.zeros(2, dtype=torch.int64)), ValueError, "y: expected None for a model without classes"),
    "number of states": (dict(x=[STATE] * 3), ValueError, "x: expected 4 states (num_blocks + 1), got 3"),
    "shape of a state": (
        dict(x=[*[STATE] * 3, STATE[:1]]), ValueError, "x[3]: expected shape (2, 4, 4), got (1, 4, 4)",
    ),
    "dtype of a state": (dict(x=[STATE.double()] * 4), TypeError, "x[0]: expected torch.float32, the model's dtype"),
    "not images": (dict(x="digits.npz"), TypeError, "x: expected images or the states of an encode, got str"),
    "images of another size": (dict(x=X[..., :2]), ValueError, "x: expected shape (any, 1, 4, 4), got (2, 1, 4, 2)"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(options, error, message):
    flow = make_flow()
    with pytest.raises(error) as raised:
        biflow.pseudo_reverse(flow, **{"x": X, **options})
    assert message in str(raised.value)
