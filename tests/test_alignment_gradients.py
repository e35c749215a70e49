"""What the table of tests/alignment_gradients.py claims: exact zeros and equalities; gradients of the true inverse."""

import pytest
import torch
from alignment_gradients import BLOCKS, LAYERS, STRATEGIES, Setting, table
from tiny import VARIANTS, images, make_condition, make_flow

import biflow

PLACES = [(block, layer) for block in (0, 1, BLOCKS - 1) for layer in (0, LAYERS - 1)]


@pytest.fixture(scope="module")
def setting():
    return Setting()


def reached(grads):
    return {name for name, g in grads.items() if g.any()}


@pytest.mark.parametrize(("block", "layer"), PLACES)
def test_what_each_strategy_reaches(setting, block, layer):
    """Block by block, exactly: a zero is no small number."""
    names = [str(i) for i in range(BLOCKS)]
    own = {"projector", names[block]}
    expected = {
        "forward": own | set(names[:block]),
        "detach": own,
        "reverse, cached": own,
        "reverse, live": own | set(names[block:]),
    }
    assert {s: reached(setting.aligned(s, block, layer)) for s in STRATEGIES} == expected


@pytest.mark.parametrize(("block", "layer"), PLACES)
def test_cached_reverse_is_detach(setting, block, layer):
    """The same bits: with the cached context nothing of the reverse enters a feature."""
    detach, cached = (setting.aligned(s, block, layer) for s in ("detach", "reverse, cached"))
    assert all(torch.equal(detach[name], cached[name]) for name in detach)


def test_values_do_not_depend_on_the_strategy(setting):
    found = [setting.features(s, 1, 1) for s in STRATEGIES]
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= 1e-12
    grads = [setting.aligned(s, 1, 1) for s in STRATEGIES]
    for other in grads[1:]:
        assert (other["projector"] - grads[0]["projector"]).norm() <= 1e-10 * grads[0]["projector"].norm()


def test_strategies_differ_where_they_reach_the_same(setting):
    """The aligned block's own gradient: the encode's equals detach's, the live one has a term of its own."""
    forward, detach, live = (setting.aligned(s, 1, 1)["1"] for s in ("forward", "detach", "reverse, live"))
    assert (forward - detach).norm() <= 1e-12 * detach.norm()
    assert (live - detach).norm() > 0.01 * detach.norm()
    first = [setting.aligned(s, 0, 0) for s in ("forward", "detach")]
    assert all(torch.equal(first[0][name], first[1][name]) for name in first[0])


@pytest.mark.parametrize("context", ["cached", "live"])
def test_a_loss_on_states_reaches_the_blocks_above(setting, context):
    """What the paper's appendix A.4 says of features holds for the states, in either context."""
    for block in range(BLOCKS):
        grads = setting.gradients(lambda block=block: setting.state(context, block).pow(3).mean())
        assert reached(grads) == {str(i) for i in range(block, BLOCKS)}


# --- the live gradient is that of a decode


def sequential_reverse(flow, z, y, context, wanted):
    """Token by token with a graph, the whole network for each: features of (block, layer), and x_0, in data order."""
    u, found = z, {}
    for index in reversed(range(len(flow.blocks))):
        block = flow.blocks[index]
        u = u.flip(1) if block.config.flip else u
        prefix, tokens = block.project_context(context, len(u)), []
        for t in range(u.shape[1]):
            known = torch.cat([*tokens, u.new_zeros(len(u), u.shape[1] - t, u.shape[2])], dim=1)
            tokens.append(block.affine_inverse(u, block.params(known, y, prefix))[:, t : t + 1])
        u = torch.cat(tokens, dim=1)
        layers = [layer for own, layer in wanted if own == index]
        kept = block.features(u, y, prefix, layers)[1]
        found |= {(index, k): h.flip(1) if block.config.flip else h for k, h in kept.items()}
        u = u.flip(1) if block.config.flip else u
    return u, found


def gradients(flow, output):
    """Of a fixed nonlinear function of `output`."""
    loss = (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sin().sum()
    grads = torch.autograd.grad(loss, list(flow.parameters()), allow_unused=True, retain_graph=True)
    zipped = zip(flow.named_parameters(), grads, strict=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zipped}


@pytest.mark.parametrize("name", VARIANTS)
def test_live_gradients_are_those_of_a_decode_token_by_token(name):
    flow = make_flow(dtype=torch.float64, std=0.2, **VARIANTS[name])
    x, (y, context) = images(flow), make_condition(flow, 4)
    wanted = [(2, 0), (0, 0)]
    with torch.no_grad():
        z = flow.encode(x, y, context)[0] * flow.var.sqrt()
    x_0, features = sequential_reverse(flow, z, y, context, wanted)
    live = biflow.pseudo_reverse(flow, x, y, context, context="live", features=wanted)
    pairs = [(x_0, live.states[0]), *[(features[key], live.features[key]) for key in wanted]]
    for theirs, ours in pairs:
        assert (ours - theirs).abs().max() <= 1e-10
        want, got = gradients(flow, theirs), gradients(flow, ours)
        scale = max(float(g.abs().max()) for g in want.values())
        assert max(float((got[k] - want[k]).abs().max()) for k in want) <= 1e-9 * scale


def test_live_gradients_with_strong_coupling():
    """Terms of the series grow before they vanish; after T - 1 of them it is exact."""
    flow = make_flow(dtype=torch.float64, std=0.35, img_size=6, num_blocks=1, scale="softplus", clip=("tanh", 2.0))
    x = images(flow)
    with torch.no_grad():
        z = flow.encode(x)[0] * flow.var.sqrt()
    want = gradients(flow, sequential_reverse(flow, z, None, None, [])[0])
    got = gradients(flow, biflow.pseudo_reverse(flow, x, context="live").states[0])
    scale = max(float(g.abs().max()) for g in want.values())
    assert max(float((got[k] - want[k]).abs().max()) for k in want) <= 1e-9 * scale


def test_the_table_is_printed(setting):
    lines = table(setting)
    assert len(lines) == 2 + 3 * len(STRATEGIES) + 2
    assert {line.count("|") for line in lines} == {8}
    assert lines[2].startswith("| block 0, layer 0 | forward | ")
    assert [cell.strip() == "0" for cell in lines[7].split("|")[3:7]] == [True, True, False, True]
