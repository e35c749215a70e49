"""Passes without gradients: bf16 against fp32, and what graphs must not outlive. On a CPU a stand-in records: like a
CUDA graph it replays what was recorded, on the memory of then."""

import contextlib
import copy
import functools
import gc
import threading
import weakref

import pytest
import torch

import biflow
from biflow.models import passes
from biflow.models.layers import Layer


class Recorded:
    """Replays a call on static inputs into static outputs; the weights are read where they lay when it was recorded."""

    def __init__(self, call, inputs):
        self.inputs = [None if t is None else t.clone() for t in inputs]
        network, method = call.func.__self__, call.func.__name__
        memory = {id(t): alias(t) for t in [*network.parameters(), *network.buffers()]}
        self.call = functools.partial(getattr(copy.deepcopy(network, memory), method), **call.keywords)
        self.replays = 0
        self.outputs = self.call(*self.inputs)

    def replay(self):
        self.replays += 1
        out = self.call(*self.inputs)
        for static, new in zip(leaves(self.outputs), leaves(out), strict=True):
            static.copy_(new)


class Recorder:
    graphs: list

    def __init__(self):
        self.graphs, self.busy = [], False

    @contextlib.contextmanager
    def turn(self, device):
        assert not self.busy
        self.busy = True
        yield
        self.busy = False

    def record(self, *call):
        self.graphs.append(Recorded(*call))
        return self.graphs[-1]

    def wait(self):
        pass


def alias(t):
    """Another tensor over the same memory."""
    return torch.nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, torch.nn.Parameter) else t.detach()


def leaves(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def make_flow():
    return randomize(
        biflow.TarFlow(
            biflow.TarFlowConfig(img_size=8, in_channels=1, patch_size=2, width=128, num_blocks=2, num_classes=10)
        )
    )


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(passes, "CudaRecorder", Recorder)
    monkeypatch.setattr(passes, "graphable", lambda inputs: True)


def randomize(model, std=0.1):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g))
    return model


def make_inverse(**options):
    options = {"img_size": 8, "in_channels": 1, "width": 128, "num_classes": 10, **options}
    return randomize(biflow.BiFlow(biflow.BiFlowConfig(**options)))


Z = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([1, -1, 7])


def graphs_of(model):
    return model.passes._recorder.graphs


@pytest.mark.parametrize("trained", [0.0, 2.0])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_bf16_rounds_what_layers_multiply(trained, guidance):
    model = make_inverse(max_guidance=trained)
    x = model.decode(Z, Y, guidance=guidance)
    low = model.decode(Z, Y, guidance=guidance, precision="bf16")
    assert low.dtype == torch.float32
    error = (low - x).norm() / x.norm()
    assert 1e-5 < error < 3e-2


def test_bf16_is_the_model_with_rounded_weights():
    """The same as a model under autocast, whose linear maps round weights and inputs: equal up to a few roundings."""
    model = make_inverse()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(Z, Y)
    got = model.decode(Z, Y, precision="bf16")
    exact = model.double()(Z.double(), Y)
    images = [biflow.models.layers.unpatchify(t, 2) for t in (expected.float(), exact)]
    assert (got - images[1]).norm() <= 2 * (images[0] - images[1]).norm()


def test_only_linear_weights_of_layers_are_copied():
    model = make_inverse()
    twin = model.passes._low_precision()
    own = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    linear = {id(m.weight) for layer in twin.modules() if isinstance(layer, Layer)
              for m in layer.children() if isinstance(m, torch.nn.Linear)}  # fmt: skip
    copies = [t for t in twin.parameters() if id(t) not in own]
    assert linear
    assert linear <= {id(t) for t in copies}
    assert all(t.dtype == torch.bfloat16 for t in copies)
    assert len(copies) == 2 * len(linear)  # and their biases


@pytest.mark.parametrize("precision", passes.PRECISIONS)
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.mul_(2),
        lambda p: p.detach().numpy().__imul__(2),
        lambda p: p.mul_(2),
        lambda p: setattr(p, "data", p.data * 2),
    ],
    ids=["data", "numpy", "in place", "another storage"],
)
def test_changed_weights_are_seen_on_a_cpu(precision, change):
    model = make_inverse()
    before = model.decode(Z, Y, precision=precision)
    with torch.no_grad():
        change(model.groups[0][0].proj.weight)
    after = model.decode(Z, Y, precision=precision)
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(model).decode(Z, Y, precision=precision))


@pytest.mark.parametrize("precision", passes.PRECISIONS)
def test_one_graph_per_shape(recorder, precision):
    model = make_inverse()
    expected = make_inverse()
    for z, y in ((Z, Y), (2 * Z, Y), (Z[:2], Y[:2]), (3 * Z, Y), (Z, None)):
        got = model.decode(z, y, precision=precision)
        assert torch.equal(got, expected.decode(z, y, precision=precision))
    assert [g.replays for g in graphs_of(model)] == [3, 1, 1]


def test_guidance_is_an_input_of_the_graph(recorder):
    model = make_inverse(max_guidance=3.0)
    out = [model.decode(Z, Y, guidance=w) for w in (0.0, 1.0, 2.0)]
    assert len(graphs_of(model)) == 1
    assert not torch.equal(out[0], out[1])
    assert torch.equal(out[0][1], out[2][1])  # unconditional: guidance does not act
    model = make_inverse()
    out = [model.decode(Z, Y, guidance=w) for w in (0.0, 1.0, 2.0)]
    assert len(graphs_of(model)) == 2  # one pass, two passes
    assert torch.allclose(out[2] - out[0], 2 * (out[1] - out[0]), atol=1e-5)


@pytest.mark.parametrize("precision", passes.PRECISIONS)
def test_results_are_the_callers(recorder, precision):
    model = make_inverse()
    first = model.decode(Z, Y, precision=precision)
    kept = first.clone()
    model.decode(-Z, Y, precision=precision)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("precision", passes.PRECISIONS)
def test_graphs_see_an_average_swapped_in(recorder, precision):
    """As validation and sampling swap the averaged weights in and out: in place."""
    model, other = make_inverse(), randomize(make_inverse(), std=0.2)
    before = model.decode(Z, Y, precision=precision)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.decode(Z, Y, precision=precision), other.decode(Z, Y, precision=precision))
    assert len(graphs_of(model)) == 1  # recorded once: the graph reads the weights where they lie
    model.load_state_dict(make_inverse().state_dict())
    assert torch.equal(model.decode(Z, Y, precision=precision), before)


@pytest.mark.parametrize("precision", passes.PRECISIONS)
def test_graphs_do_not_outlive_replaced_weights(recorder, precision):
    model, other = make_inverse(), randomize(make_inverse(), std=0.2)
    model.decode(Z, Y, precision=precision)
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data = new.data.clone()
    assert torch.equal(model.decode(Z, Y, precision=precision), other.decode(Z, Y, precision=precision))
    assert len(graphs_of(model)) == 2
    linear = model.groups[1][0].fc2
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 2)
    assert torch.equal(model.decode(Z, Y, precision=precision), copy.deepcopy(model).decode(Z, Y, precision=precision))


def test_moving_a_model_forgets(recorder):
    model = make_inverse()
    model.decode(Z, Y, precision="bf16")
    assert model.double().passes._graphs == {}


def test_forget(recorder):
    model = make_inverse()
    model.decode(Z, Y, precision="bf16")
    model.passes.forget()
    assert model.passes._twin is None
    assert len(model.passes._graphs) == 0


def test_the_oldest_graph_goes_first(recorder, monkeypatch):
    monkeypatch.setattr(passes, "MAX_GRAPHS", 2)
    model = make_inverse()
    for n in (1, 2, 1, 3):  # 3 replaces 2, which was used longest ago
        model.decode(Z[:n], None)
    assert {len(g.graph.inputs[0]) for g in model.passes._graphs.values()} == {1, 3}
    model.decode(Z[:1], None)
    assert len(graphs_of(model)) == 3


def test_frozen_looks_once(monkeypatch):
    model = make_inverse()
    looks = []
    monkeypatch.setattr(passes, "_hash", lambda module: looks.append(1))
    with model.frozen():
        for _ in range(3):
            model.decode(Z, Y, precision="bf16")
    assert len(looks) == 1
    model.decode(Z, Y, precision="bf16")
    assert len(looks) == 2


@pytest.mark.parametrize("precision", passes.PRECISIONS)
def test_frozen_looks_at_every_graph(recorder, precision):
    """Weights replaced between two calls are seen by the graphs of all shapes, inside `frozen` too."""
    model, other = make_inverse(), randomize(make_inverse(), std=0.2)
    shapes = (3, 1)
    for n in shapes:
        model.decode(Z[:n], Y[:n], precision=precision)
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data = new.data.clone()
    with model.frozen():
        for n in (*shapes, *shapes):
            got = model.decode(Z[:n], Y[:n], precision=precision)
            assert torch.equal(got, other.decode(Z[:n], Y[:n], precision=precision))
    assert len(graphs_of(model)) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda model, p: p.data.mul_(2),
        lambda model, p: p.detach().numpy().__imul__(2),
        lambda model, p: setattr(p, "data", p.data * 2),
        lambda model, p: fused_step(model),
    ],
    ids=["data", "numpy", "another storage", "fused optimizer"],
)
def test_writes_that_torch_does_not_count(recorder, monkeypatch, change):
    """On a GPU no hash tells of them: the weights are rounded for every call."""
    monkeypatch.setattr(passes, "_hash", lambda module: None)
    model = make_inverse()
    before = model.decode(Z, Y, precision="bf16")
    change(model, model.groups[0][0].proj.weight)
    after = model.decode(Z, Y, precision="bf16")
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(model).decode(Z, Y, precision="bf16"))


def transpose(p):
    """Another matrix over the same storage."""
    p.data = p.data.t()


@pytest.mark.parametrize("precision", passes.PRECISIONS)
@pytest.mark.parametrize("frozen", [False, True])
def test_graphs_do_not_outlive_strides(recorder, precision, frozen):
    model = make_inverse()
    before = model.decode(Z, Y, precision=precision)
    transpose(model.groups[0][0].proj.weight)  # square
    with model.frozen() if frozen else contextlib.nullcontext():
        after = [model.decode(Z, Y, precision=precision) for _ in range(2)]
    assert not torch.equal(before, after[0])
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], copy.deepcopy(model).decode(Z, Y, precision=precision))


def test_a_graph_per_precision_of_fp32_products(recorder):
    """What a graph was recorded with must not outlive torch.set_float32_matmul_precision."""
    model, matmul = make_inverse(), torch.backends.cuda.matmul
    try:
        for precision in ("ieee", "tf32", "ieee", "tf32"):
            matmul.fp32_precision = precision
            model.decode(Z, Y)
    finally:
        matmul.fp32_precision = "none"
    assert [g.replays for g in graphs_of(model)] == [2, 2]


def fused_step(model):
    """As training does: it does not count as a change of the parameters' version."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model(Z, Y).square().sum().backward()
    optimizer.step()


def test_inference_mode_and_back(recorder):
    model = make_inverse()
    with torch.inference_mode():
        first = model.decode(Z, Y, precision="bf16")
    second = model.decode(Z, Y, precision="bf16")
    assert torch.equal(first, second)


def test_threads(recorder):
    model = make_inverse()
    expected = [model.decode(Z[:n], None, precision="bf16") for n in (1, 2, 3)]
    wrong = []

    def work(n):
        for _ in range(20):
            if not torch.equal(model.decode(Z[:n], None, precision="bf16"), expected[n - 1]):
                wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_copies_and_pickles_start_anew():
    model = make_inverse()
    model.decode(Z, Y, precision="bf16")
    other = copy.deepcopy(model)
    assert other.passes._module is other
    assert other.passes._twin is None
    assert torch.equal(other.decode(Z, Y, precision="bf16"), model.decode(Z, Y, precision="bf16"))


@pytest.mark.parametrize("make", [make_inverse, make_flow])
def test_a_model_goes_with_its_last_reference(recorder, make):
    """Its weights and graphs with it: they must not wait for a collection of cycles."""
    gc.collect()
    gc.disable()
    try:
        model = make()
        if make is make_inverse:
            for precision in passes.PRECISIONS:
                model.decode(Z, Y, precision=precision)
            gone = [weakref.ref(t) for t in (model.passes._twin, *graphs_of(model))]
            assert len(gone) == 3
        else:
            gone = []
        gone += [weakref.ref(t) for t in (model, model.passes, *model.parameters())]
        del model
        assert [r() for r in gone if r() is not None] == []
    finally:
        gc.enable()


def test_passes_without_their_module():
    kept = make_inverse().passes
    with pytest.raises(ReferenceError, match="expected the module"):
        kept("forward", "bf16", Z, Y, None)


def test_another_stream_may_read_the_rounded_weights_that_go(recorder):
    model, waited = make_inverse(), []
    model.decode(Z, Y, precision="bf16")
    old = weakref.ref(model.passes._twin)
    model.passes._recorder.wait = lambda: waited.append(old() is not None)
    for p in model.parameters():
        p.data = p.data.clone()
    model.decode(Z, Y, precision="bf16")
    assert waited == [True]
    assert model.passes._twin is not old()


@pytest.mark.parametrize("precision", passes.PRECISIONS)
def test_compiles_in_one_graph(precision):
    model = make_inverse()
    compiled = torch.compile(lambda z, y: model.decode(z, y, precision=precision), fullgraph=True, backend="aot_eager")
    assert_same_pass(compiled(Z, Y), model.decode(Z, Y, precision=precision))


def assert_same_pass(got, want):
    """fp32, and the same bits: the same products are rounded, heads and embeddings are not."""
    assert got.dtype == want.dtype == torch.float32
    assert torch.equal(got, want)


@pytest.mark.parametrize("precision", passes.PRECISIONS)
@pytest.mark.parametrize(("trained", "guidance"), [(0.0, 0.0), (0.0, 1.5), (2.0, 1.5)])
def test_what_a_graph_of_the_users_records(monkeypatch, precision, trained, guidance):
    model = make_inverse(max_guidance=trained)
    want = model.decode(Z, Y, guidance=guidance, precision=precision)
    monkeypatch.setattr(passes, "recording", lambda: True)
    assert_same_pass(model.decode(Z, Y, guidance=guidance, precision=precision), want)


def test_what_a_graph_of_the_users_records_of_a_density(recorder, monkeypatch):
    flow, x = make_flow(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        wants = flow.passes("forward", "bf16", x, Y, None)
        monkeypatch.setattr(passes, "recording", lambda: True)
        for got, want in zip(flow.passes("forward", "bf16", x, Y, None), wants, strict=True):
            assert_same_pass(got, want)


def test_training_goes_on_after_a_pass():
    model = make_inverse()
    model.decode(Z, Y, precision="bf16")
    model(Z, Y).sum().backward()
    assert all(p.grad is not None for p in model.groups[0].parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_density_in_bf16(recorder):
    """What `TarFlow.encode(precision=)` calls on a GPU: z and logdet fp32, no further off than under autocast."""
    flow, x = make_flow(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    outputs = [flow.passes("forward", "bf16", x, Y, None, return_states=states) for states in (False, True, True)]
    assert len(graphs_of(flow)) == 2
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert [len(o) for o in outputs] == [2, 3, 3]
    z, logdet, states = outputs[2]
    assert len(states) == 3
    assert {t.dtype for t in (z, logdet, *states)} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        same = flow(x, Y)
    exact = flow.double()(x.double(), Y)
    for got, rounded, want in zip((z, logdet), same, exact, strict=True):
        assert (got - want).norm() <= 2 * (rounded - want).norm() + 1e-6
