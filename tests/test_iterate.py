"""Iterations of a block as a GPU makes them: graphs over static buffers, kept between decodes, and what they must not
outlive. On a CPU a stand-in records (recorded.py)."""

import contextlib
import copy
import gc
import pickle
import threading

import pytest
import torch
from recorded import Recorder
from tiny import BATCH, VARIANTS, make_condition, make_flow, noise, randomize

from biflow import ops
from biflow.models import block as block_module
from biflow.models import iterate as module
from biflow.solvers import Condition, Guidance

LONG = {"img_size": 10, "num_blocks": 2}  # 25 tokens
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def workspace(monkeypatch):
    """As on a GPU, with drafts; the workspace that the graphs are in."""
    monkeypatch.setattr(module, "CudaRecorder", Recorder)
    monkeypatch.setattr(module, "_WORKSPACES", {})
    monkeypatch.setattr(block_module, "graphable", lambda inputs: True)
    monkeypatch.setattr(ops, "has_fast_bf16", lambda device=None: True)
    monkeypatch.setattr(block_module.Block, "decode_sequential", sequential)
    yield module.workspace(CPU)
    gc.collect()


def sequential(block, z, condition):
    """`Block.decode_sequential` of a CPU."""
    (weights,) = block.packed(condition.precision)
    return ops.decode_block(z, weights, block.config, **block._condition(condition, len(z)))


def states(flow):
    return [s for block in flow.blocks for s in block._iterates.states]


def graphs(workspace):
    return workspace.recorder.graphs


def small_flow(**options):
    return make_flow(num_classes=3, **{**LONG, **options})


Y = torch.tensor([0, 1, 2, -1])


@pytest.mark.parametrize("name", VARIANTS)
def test_all_solvers_agree(name):
    """In two decodes each, the second by replays alone, with other noise."""
    flow = make_flow(std=0.08, **{**VARIANTS[name], **LONG, "layers_per_block": 1})
    y, context = make_condition(flow, BATCH)
    for guidance in ({}, dict(guidance=1.5, attn_temp=0.7), dict(guidance=1.0, guide="a", anneal=False)):
        if guidance and y is None and context is None and "attn_temp" not in guidance:
            continue
        for options in ({"solver": "jacobi"}, {"solver": "windowed", "window": 7}):
            for seed in (0, 1):
                z = noise(flow, seed=seed)
                x, info = flow.decode(z, y, context, **guidance, **options, return_info=True)
                want = flow.decode(z, y, context, **guidance, solver="sequential")
                assert info.fallbacks == ((),) * 2
                assert (x - want).abs().max() <= 1e-4
                assert info.residual.max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_are_those_without_graphs(precision):
    """Bit for bit, from the first one on: recording a window leaves x where it was."""
    flow = small_flow(context_dim=5, class_tokens=2)
    y, context = make_condition(flow, BATCH)
    condition, z = Condition(y, context, Guidance(1.0, attn_temp=0.8), precision), noise(flow)
    for block in flow.blocks:
        iterate = block.iterate(z, condition)
        plain = [module.block_weights(block.weights(), block.config, p, None,
                                      module.plain_weights(block.weights(), block.config, p))
                 for p in (precision, "bf16")]  # fmt: skip
        plain = plain if precision == "fp32" else plain[:1]
        same = module.BlockIterate(*plain, *[None] * (2 - len(plain)), z, block._condition(condition, BATCH))
        assert iterate.has_draft == same.has_draft == (precision == "fp32")
        for start, stop in ((0, 25), (0, 25), (0, 5), (5, 25), (5, 25)):
            for draft in (True, False) if iterate.has_draft else (False,):
                got, want = (i.update(start, stop, draft=draft) for i in (iterate, same))
                assert torch.equal(got, want)
                assert torch.equal(iterate.x, same.x)
        assert torch.equal(iterate.result(), same.result())


def test_graphs_serve_later_decodes(workspace):
    """Noise, labels, context and the number of passes are no part of a graph; windows and drafts are."""
    flow = small_flow(context_dim=5)
    y, context = make_condition(flow, BATCH)
    options = dict(guidance=1.0, solver="windowed", window=9)
    flow.decode(noise(flow), y, context, **options)
    count = len(graphs(workspace))
    assert count == 2 * (2 + 2 * 3), "in two blocks: keys of the context, three windows, both precisions"
    for k in (1, 2):
        z, y, context = noise(flow, seed=k), y.roll(1), context.roll(1, 0)
        x = flow.decode(z, y, context, **options)
        assert (x - flow.decode(z, y, context, guidance=1.0, solver="sequential")).abs().max() <= 1e-4
    assert len(graphs(workspace)) == count
    assert min(g.replays for g in graphs(workspace)) >= 3


@pytest.mark.parametrize(
    "change",
    [dict(guidance=1.0), dict(guidance=2.0), dict(guidance=1.0, guide="b"), dict(guidance=1.0, anneal=False),
     dict(guidance=1.0, attn_temp=0.5), dict(precision="bf16"), dict(y=None, guidance=1.0, attn_temp=0.5), {}],
    ids=str,
)  # fmt: skip
def test_what_graphs_are_told_apart_by(change):
    """The result after another kind of decode is that of a fresh model."""
    flow = small_flow()
    z, seen = noise(flow), {}
    for options in (dict(guidance=1.0, attn_temp=0.9), change, {}, change):
        given = dict(y=Y, solver="jacobi") | options
        x = flow.decode(z, **given)
        assert torch.equal(x, copy.deepcopy(flow).decode(z, **given))
        seen[str(sorted(options.items()))] = x
    assert len({s.name for s in states(flow)}) == len(seen)
    for n in (1, 3):
        x = flow.decode(z[:n], Y[:n], solver="jacobi")
        assert (x - seen["[]"][:n]).abs().max() < 1e-4


def test_the_oldest_state_goes_first(monkeypatch, workspace):
    monkeypatch.setattr(module, "MAX_STATES", 2)
    flow = small_flow()
    for n in (1, 2, 1, 3):  # 3 replaces 2, which was used longest ago
        flow.decode(noise(flow)[:n], Y[:n], solver="jacobi")
    assert [s.z.shape[0] for s in flow.blocks[0]._iterates.states] == [1, 3]
    count = len(graphs(workspace))
    flow.decode(noise(flow)[:1], Y[:1], solver="jacobi")
    assert len(graphs(workspace)) == count


def test_blocks_share_the_memory_for_keys_and_values(workspace):
    flow = small_flow(num_blocks=4)
    flow.decode(noise(flow), Y, solver="jacobi")
    assert len({id(s.caches) for s in states(flow)}) == 1
    assert len(states(flow)) == 4
    del flow
    gc.collect()
    workspace.recorder.graphs.clear()
    gc.collect()
    assert len(workspace._caches) == 0


def test_graphs_beyond_the_limit_are_none(monkeypatch, workspace):
    monkeypatch.setattr(module, "MAX_GRAPHS", 3)
    flow = small_flow()
    x = flow.decode(noise(flow), Y, solver="windowed", window=5)
    assert len(graphs(workspace)) == 2 * 3
    assert (x - flow.decode(noise(flow), Y, solver="sequential")).abs().max() <= 1e-4


# --- weights that change


CHANGES = {
    "in place": lambda p: p.mul_(-2),
    "data": lambda p: p.data.mul_(-2),
    "numpy": lambda p: p.detach().numpy().__imul__(-2),
    "another storage": lambda p: setattr(p, "data", p.data * -2),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["layers.0.fc1.weight", "pos_embed", "class_embed", "null_context", "proj_out.bias"])
def test_changed_weights_are_seen(change, where, precision, workspace):
    flow = small_flow(context_dim=5)
    y, context = make_condition(flow, BATCH)
    options = dict(guidance=1.0, solver="jacobi", precision=precision)
    z = noise(flow)
    before = flow.decode(z, y, context, **options)
    count = len(graphs(workspace))
    with torch.no_grad():
        CHANGES[change](dict(flow.blocks[1].named_parameters())[where])
    after = flow.decode(z, y, context, **options)
    recorded = len(graphs(workspace)) - count
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(flow).decode(z, y, context, **options))
    read = where not in ("class_embed", "null_context")  # by graphs: these two are read before
    again = change == "another storage" and read
    assert (recorded > 0) == again, "a graph reads the weights where they lie"


def test_no_state_of_replaced_weights_stays():
    """Nor what it holds of them."""
    flow = small_flow()
    for n in (1, 2, 3):
        flow.decode(noise(flow)[:n], Y[:n], solver="jacobi")
    weight = flow.blocks[0].layers[0].fc1.weight
    weight.data = weight.data * 2
    flow.decode(noise(flow)[:1], Y[:1], solver="jacobi")
    assert [s.z.shape[0] for s in flow.blocks[0]._iterates.states] == [1]
    assert [s.z.shape[0] for s in flow.blocks[1]._iterates.states] == [2, 3, 1]


def test_frozen_looks_once(monkeypatch):
    flow = small_flow()
    looks = []
    original = block_module.Block.weights
    monkeypatch.setattr(block_module.Block, "weights", lambda block: looks.append(1) or original(block))
    z = noise(flow)
    want = flow.decode(z, Y, solver="jacobi")
    looks.clear()
    with flow.frozen():
        for _ in range(3):
            assert torch.equal(flow.decode(z, Y, solver="jacobi"), want)
    assert len(looks) == 2 * 2, "two blocks, two precisions"
    flow.decode(z, Y, solver="jacobi")
    assert len(looks) == 4 * 2


def test_frozen_sees_what_changed_before_it():
    flow, other = small_flow(), randomize(small_flow(), 0.08, seed=5)
    z = noise(flow)
    with flow.frozen():
        flow.decode(z, Y, solver="jacobi")
    flow.load_state_dict(other.state_dict())
    with flow.frozen():
        for _ in range(2):
            assert torch.equal(flow.decode(z, Y, solver="jacobi"), other.decode(z, Y, solver="jacobi"))


def test_moving_copying_and_pickling_a_block_forget():
    flow = small_flow()
    flow.decode(noise(flow), Y, solver="jacobi")
    assert states(flow)
    assert states(copy.deepcopy(flow)) == []
    block = pickle.loads(pickle.dumps(flow.blocks[0]))
    assert (block._iterates.states, block._iterates._weights) == ([], {})
    flow.double()
    assert states(flow) == []
    assert all(b._iterates._weights == {} for b in flow.blocks)


# --- iterations at the same time, and those that end badly


def test_results_are_the_callers():
    flow = small_flow()
    first = flow.decode(noise(flow), Y, solver="jacobi")
    kept = first.clone()
    flow.decode(-noise(flow), Y, solver="jacobi")
    assert torch.equal(first, kept)


def test_two_iterations_at_a_time_do_not_meet(workspace):
    flow = small_flow()
    block, condition = flow.blocks[0], Condition(Y)
    z = noise(flow), noise(flow, seed=1)
    want = []
    for each in z:
        alone = block.iterate(each, condition)
        want.append([alone.update(0, 25).clone() for _ in range(3)] + [alone.result()])
        del alone
    assert len(workspace._caches) == 1
    both = [block.iterate(each, condition) for each in z]
    for k in range(3):
        for iterate, steps in zip(both, want, strict=True):
            assert torch.equal(iterate.update(0, 25), steps[k])
    for iterate, steps in zip(both, want, strict=True):
        assert torch.equal(iterate.result(), steps[3])
    del both, iterate
    gc.collect()
    assert [c.taken for c in workspace._caches] == [False, False]
    block.iterate(z[0], condition).update(0, 25)
    assert len(workspace._caches) == 2, "and then they are used again"


@pytest.mark.parametrize("when", ["start", "record", "replay"])
def test_an_error_leaves_nothing_behind(monkeypatch, when, workspace):
    flow = small_flow()
    z = noise(flow)
    want = flow.decode(z, Y, solver="jacobi", guidance=1.0)
    if when != "replay":
        for block in flow.blocks:
            block._iterates.forget()

    def fail(*args, **options):
        raise MemoryError("as a GPU may")

    place = {
        "start": (module.State, "begin"), "record": (Recorder, "record"), "replay": (module.BlockPass, "__call__"),
    }[when]  # fmt: skip
    with monkeypatch.context() as patch:
        if when == "replay":
            patch.setattr(graphs(workspace)[-1].__class__, "replay", fail)
        else:
            patch.setattr(*place, fail)
        with pytest.raises(MemoryError):
            flow.decode(z, Y, solver="jacobi", guidance=1.0)
    gc.collect()
    assert not any(c.taken for c in workspace._caches)
    assert torch.equal(flow.decode(z, Y, solver="jacobi", guidance=1.0), want)
    assert len({id(s.caches) for s in states(flow)}) == 1


def test_other_kinds_of_decode_make_room(monkeypatch, workspace):
    """Where memory runs out, states that nobody uses go, and it is tried once more."""
    flow = small_flow()
    z, block = noise(flow), flow.blocks[0]
    flow.decode(z[:1], Y[:1], solver="jacobi")
    used = block.iterate(z[:2], Condition(Y[:2]))
    make, room = module._make_state, []

    def scarce(*args):
        if sum(len(b._iterates.states) for b in flow.blocks) > 1:
            raise torch.OutOfMemoryError
        room.append(1)
        return make(*args)

    monkeypatch.setattr(module, "_make_state", scarce)
    third = block.iterate(z, Condition(Y))
    assert room == [1]
    assert [len(b._iterates.states) for b in flow.blocks] == [2, 0], "the one in use and the new one"
    assert third.update(0, 25).isfinite().all()
    assert used.update(0, 25).isfinite().all()
    with pytest.raises(torch.OutOfMemoryError):
        block.iterate(z[:3], Condition(Y[:3]))


def test_a_graph_per_precision_of_fp32_products(workspace):
    """What a graph was recorded with must not outlive torch.set_float32_matmul_precision."""
    flow, matmul = small_flow(), torch.backends.cuda.matmul
    z, block = noise(flow), flow.blocks[0]
    try:
        for precision in ("ieee", "tf32", "ieee", "tf32"):
            matmul.fp32_precision = precision
            block.iterate(z, Condition(Y)).update(0, 25)
            gc.collect()
    finally:
        matmul.fp32_precision = "none"
    assert len(block._iterates.states) == 2


def test_bad_conditions_are_named():
    flow = small_flow(context_dim=5)
    block, z = flow.blocks[0], noise(flow)
    with pytest.raises(ValueError, match=r"y: expected shape \(4,\), got \(3,\)"):
        block.iterate(z, Condition(Y[:3], torch.zeros(4, 3, 5)))
    with pytest.raises(ValueError, match=r"z: expected shape \(B, 25, 4\), got \(4, 24, 4\)"):
        block.iterate(z[:, :24], Condition(Y, torch.zeros(4, 3, 5)))


def test_inference_mode_and_back():
    flow = small_flow()
    z = noise(flow)
    with torch.inference_mode():
        first = flow.decode(z, Y, solver="jacobi")
    second = flow.decode(z, Y, solver="jacobi")
    assert torch.equal(first, second)
    flow.encode(torch.zeros(2, 1, 10, 10), Y[:2])[0].sum().backward()  # training goes on


def test_another_default_dtype_changes_nothing():
    flow = small_flow(context_dim=5)
    y, context = make_condition(flow, BATCH)
    want = flow.decode(noise(flow), y, context, solver="jacobi", guidance=1.0)
    z, other = noise(flow), copy.deepcopy(flow)
    torch.set_default_dtype(torch.float64)
    try:
        got = other.decode(z, y, context, solver="jacobi", guidance=1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)


def test_threads():
    flow = small_flow()
    z = [noise(flow)[:n] for n in (1, 2, 3, 3)]
    options = [dict(solver="jacobi"), dict(solver="windowed", window=9), dict(solver="jacobi"), dict(solver="jacobi")]
    expected = [flow.decode(n, None, **o) for n, o in zip(z, options, strict=True)]
    wrong = []

    def work(k):
        for _ in range(5):
            if not torch.equal(flow.decode(z[k], None, **options[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_while_a_graph_is_recorded_nothing_is_kept(monkeypatch):
    """Inside torch.compile or the caller's own graph there is no other one."""
    flow = small_flow()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(block_module, "recording", lambda: True)
        x = flow.decode(noise(flow), Y, solver="jacobi")
    assert states(flow) == []
    assert (x - flow.decode(noise(flow), Y, solver="jacobi")).abs().max() <= 1e-4
