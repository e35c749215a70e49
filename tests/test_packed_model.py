"""What the models do with packed weights: density in a precision, frozen weights, bf16 decodes."""

import contextlib
import copy
import threading

import pytest
import torch
from tiny import make_condition, make_flow

from biflow.models import block as block_module

VARIANTS = {
    "plain": {},
    "classes": {"num_classes": 3},
    "start-token": {"start_token": True, "scale": "softplus", "clip": ("tanh", 4.0)},
    "shift-only": {"shift_only": True},
    "modern": {
        "norm": "rmsnorm", "gate": "swiglu", "qk_norm": True, "rope": True, "num_classes": 3, "class_tokens": 2,
    },
    "context": {"context_dim": 5},
}  # fmt: skip


def rms(x):
    return x.square().mean().sqrt()


def images(flow, batch=5):
    c = flow.config
    return torch.randn(batch, c.in_channels, c.img_size, c.img_size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_density_in_fp32_is_that_of_the_differentiable_pass(name, isa):
    flow = make_flow(std=0.1, **VARIANTS[name])
    flow.var.uniform_(0.5, 2.0)
    x = images(flow)
    y, context = make_condition(flow, len(x))
    exact = flow.double().encode(x.double(), y, None if context is None else context.double(), return_states=True)
    flow.float()
    plain = flow.encode(x, y, context, return_states=True)
    packed = flow.encode(x, y, context, return_states=True, precision="fp32")
    assert len(packed[2]) == len(plain[2]) == flow.config.num_blocks + 1
    for got, same, want in zip(
        [*packed[:2], *packed[2]], [*plain[:2], *plain[2]], [*exact[:2], *exact[2]], strict=True
    ):
        assert got.dtype == torch.float32
        floor = torch.finfo(torch.float32).eps * rms(want)
        assert rms(got - want) <= 2 * rms(same - want) + floor
    assert torch.equal(flow.log_prob(x, y, context, precision="fp32"), flow._log_prob(*packed[:2]))
    torch.testing.assert_close(
        flow.bits_per_dim(x, y, context, precision="fp32"), flow.bits_per_dim(x, y, context), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_density_in_bf16_is_near_and_another(isa):
    flow = make_flow(std=0.1, num_classes=3)
    x = images(flow)
    y, _ = make_condition(flow, len(x))
    z, logdet = flow.encode(x, y)
    coarse, coarse_logdet = flow.encode(x, y, precision="bf16")
    assert 1e-5 < (coarse - z).abs().max() < 0.05
    assert 1e-6 < (coarse_logdet - logdet).abs().max() < 0.2


def test_density_without_gradient_says_so():
    flow = make_flow()
    with pytest.raises(RuntimeError, match=r"precision: expected None where a gradient is wanted.*got 'fp32'"):
        flow.encode(images(flow), precision="fp32")
    with torch.no_grad(), pytest.raises(ValueError, match="precision: expected one of fp32, bf16, got 'fp8'"):
        flow.log_prob(images(flow), precision="fp8")
    with torch.no_grad(), pytest.raises(TypeError, match=r"expected a model of torch\.float32 weights"):
        flow.double().encode(images(flow).double(), precision="fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_weights_are_looked_at_once(precision):
    flow = make_flow(std=0.1)
    z = torch.randn(2, flow.config.tokens, flow.config.channels, generator=torch.Generator().manual_seed(0))
    before = flow.decode(z, precision=precision)
    with flow.frozen():
        assert torch.equal(flow.decode(z, precision=precision), before)
        flow.blocks[1].proj_out.bias.data.add_(0.5)
        with flow.frozen():
            assert torch.equal(flow.decode(z, precision=precision), before), "inside nobody looks"
        assert torch.equal(flow.decode(z, precision=precision), before), "an inner end is not the outer one"
    after = flow.decode(z, precision=precision)
    assert not torch.allclose(after, before, atol=0.1), "outside every change is seen"
    flow.blocks[0].proj_out.bias.data.add_(0.5)
    with flow.frozen():
        assert not torch.allclose(flow.decode(z, precision=precision), after, atol=0.1), "frozen as they are now"


def test_frozen_ends_with_an_error():
    flow = make_flow(std=0.1)
    z = torch.zeros(1, flow.config.tokens, flow.config.channels)
    before = flow.decode(z)
    with contextlib.suppress(ZeroDivisionError), flow.frozen():
        flow.decode(z)
        raise ZeroDivisionError
    flow.blocks[0].proj_out.bias.data.add_(0.5)
    assert not torch.equal(flow.decode(z), before)


@pytest.mark.parametrize("name", VARIANTS)
def test_bf16_decodes_what_fp32_does_up_to_its_rounding(name, isa):
    flow = make_flow(std=0.1, **VARIANTS[name])
    y, context = make_condition(flow, 4)
    z = torch.randn(4, flow.config.tokens, flow.config.channels, generator=torch.Generator().manual_seed(0))
    options = {"guidance": 1.0} if y is not None or context is not None else {}
    exact = flow.decode(z, y, context, **options)
    coarse, info = flow.decode(z, y, context, precision="bf16", return_info=True, **options)
    assert coarse.dtype == torch.float32
    assert 0 < rms(coarse - exact) < 0.03 * rms(exact)
    assert 1e-6 < info.residual.max() < 0.1, "the certificate is of the exact, fp32 pass: it shows the rounding"


def test_frozen_by_two_that_overlap():
    """One that began first may end first."""
    flow = make_flow(std=0.1)
    z = torch.zeros(1, flow.config.tokens, flow.config.channels)
    first, second = flow.frozen(), flow.frozen()
    first.__enter__()
    second.__enter__()
    before = flow.decode(z)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    flow.blocks[0].proj_out.bias.data.add_(0.5)
    assert not torch.equal(flow.decode(z), before)


def test_unchanged_weights_are_packed_once(monkeypatch):
    from biflow import ops

    flow = make_flow(std=0.1)
    z = torch.zeros(1, flow.config.tokens, flow.config.channels)
    packed = []
    monkeypatch.setattr(ops, "pack_block", lambda *a, pack=ops.pack_block: packed.append(a[-1]) or pack(*a))
    for _ in range(2):
        flow.decode(z)
        with flow.frozen():
            flow.decode(z, precision="bf16")
            flow.decode(z, solver="jacobi")
    assert sorted(packed) == ["bf16"] * 3 + ["fp32"] * 3


@pytest.mark.parametrize("solver", ["sequential", "jacobi"])
def test_another_default_dtype_changes_nothing(solver):
    flow = make_flow(std=0.1)
    z = torch.randn(2, flow.config.tokens, flow.config.channels)
    x = flow.decode(z, solver=solver)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(flow.decode(z, solver=solver), x)
        with torch.no_grad():
            assert flow.encode(x, precision="fp32")[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


# --- several threads


@pytest.fixture
def paused(monkeypatch):
    """Starts a decode in a thread that stops after it looked at the first block's weights, until `go` is set."""
    reached, go = threading.Event(), threading.Event()
    look, threads = block_module.weights_key, []

    def stopping(weights):
        key = look(weights)
        if threading.current_thread() in threads and not reached.is_set():
            reached.set()
            assert go.wait(60)
        return key

    def start(flow, z):
        threads.append(threading.Thread(target=flow.decode, args=(z,)))
        threads[0].start()
        assert reached.wait(60)
        return threads[0]

    monkeypatch.setattr(block_module, "weights_key", stopping)
    yield start, go
    go.set()
    for thread in threads:
        thread.join(60)


def scale(flow, by):
    with torch.no_grad():
        for p in flow.parameters():
            p.mul_(by)


def test_two_threads_that_see_new_weights_keep_no_old_ones(paused):
    """One looked, and packs after another has looked and packed."""
    start, go = paused
    flow = make_flow(std=0.1)
    z = torch.randn(2, flow.config.tokens, flow.config.channels)
    flow.decode(z)
    scale(flow, 1.1)
    first = start(flow, z)
    second = threading.Thread(target=flow.decode, args=(z,))
    second.start()
    second.join(0.3)  # it may have to wait for the first
    go.set()
    first.join(60)
    second.join(60)
    assert torch.equal(flow.decode(z), copy.deepcopy(flow).decode(z))


def test_a_look_from_before_is_not_the_one_of_frozen_weights(paused):
    start, go = paused
    flow = make_flow(std=0.1)
    z = torch.randn(2, flow.config.tokens, flow.config.channels)
    flow.decode(z)
    thread = start(flow, z)
    scale(flow, 1.1)
    threading.Timer(0.3, go.set).start()  # entering may have to wait for the thread
    with flow.frozen():
        thread.join(60)
        assert torch.equal(flow.decode(z), copy.deepcopy(flow).decode(z))


def test_threads_decode_and_encode_at_once():
    """Each to the bits that it gets alone, also right after an update and with weights frozen by some."""
    flow = make_flow(std=0.1, img_size=10, num_classes=3)
    y, _ = make_condition(flow, 4)
    z = torch.randn(4, flow.config.tokens, flow.config.channels, generator=torch.Generator().manual_seed(0))
    x = images(flow, 4)
    calls = [
        lambda f, s=solver, p=precision: f.decode(z, y, solver=s, precision=p)
        for solver in ("sequential", "jacobi") for precision in ("fp32", "bf16")
    ]  # fmt: skip
    calls += [lambda f, p=precision: f.encode(x, y, precision=p)[0] for precision in ("fp32", "bf16")]
    for _ in range(3):
        scale(flow, 1.05)
        with torch.no_grad():
            want, wrong = [call(copy.deepcopy(flow)) for call in calls], []
        together = threading.Barrier(len(calls))

        @torch.no_grad()
        def run(i, want=want, wrong=wrong, together=together):
            together.wait(60)
            for n in range(5):
                with flow.frozen() if i % 2 else contextlib.nullcontext():
                    if not torch.equal(calls[i](flow), want[i]):
                        wrong.append((i, n))

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong == []


def test_a_copy_has_its_own_lock_and_packs():
    flow = make_flow(std=0.1)
    z = torch.randn(2, flow.config.tokens, flow.config.channels)
    with flow.frozen():
        before = flow.decode(z)
        other = copy.deepcopy(flow)
        scale(other, 1.1)
        assert torch.equal(flow.decode(z), before)
        assert not torch.equal(other.decode(z), before), "not frozen"
    assert other.blocks[0]._packing is not flow.blocks[0]._packing
