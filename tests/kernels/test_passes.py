"""Passes on a GPU: recorded graphs against direct calls, streams, threads, changing weights. What does not need a GPU:
tests/test_passes.py."""

import threading

import pytest
import torch

import biflow
from biflow.models import passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPE = dict(img_size=8, in_channels=1, width=128, num_classes=10)
PRECISIONS = {"fp32": 1e-5, "bf16": 3e-2}  # largest relative error against fp64


def randomize(model, std=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g))
    return model


def make_inverse(seed=0, **options):
    return randomize(biflow.BiFlow(biflow.BiFlowConfig(**SHAPE, **options)), seed=seed).cuda()


def make_flow():
    return randomize(biflow.TarFlow(biflow.TarFlowConfig(**SHAPE, patch_size=2, num_blocks=2, head_dim=64))).cuda()


def noise(batch, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 16, 4, generator=g).cuda(), torch.randint(-1, 10, (batch,), generator=g).cuda()


def exact(model, z, y):
    """In fp64, on the CPU."""
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    return biflow.models.layers.unpatchify(twin.double()(z.double().cpu(), y.cpu()), model.config.patch_size)


def error(got, want):
    return ((got.double().cpu() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trained", [0.0, 2.0])
def test_decode(precision, trained):
    model = make_inverse(max_guidance=trained)
    for batch in (1, 5, 1):
        z, y = noise(batch, seed=batch)
        for _ in range(2):
            got = model.decode(z, y, precision=precision)
            assert got.dtype == torch.float32
            assert error(got, exact(model, z, y)) < PRECISIONS[precision]
    assert len(model.passes._graphs) == 2
    assert not torch.equal(model.decode(z, y, guidance=1.5, precision=precision), got)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encode(precision):
    flow = make_flow()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    y = torch.tensor([1, -1, 4])
    z, logdet, states = flow.encode(x.cuda(), y.cuda(), return_states=True, precision=precision)
    with torch.no_grad():
        want = flow.cpu().double()(x.double(), y, return_states=True)
    for got, reference in zip((z, logdet, *states), (*want[:2], *want[2]), strict=True):
        assert got.dtype == torch.float32
        assert error(got, reference) < PRECISIONS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_streams(precision):
    """Calls on several streams share static buffers: they must not meet in them."""
    model = make_inverse()
    given = [noise(7, seed=i) for i in range(4)]
    expected = [model.decode(z, y, precision=precision) for z, y in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for stream, (z, y) in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                got.append(model.decode(z, y, precision=precision))
        torch.cuda.synchronize()
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_threads_and_models():
    """First calls record; two models in two threads record at the same time."""
    models = [make_inverse(seed=i) for i in range(2)]
    wrong = []

    def work(model):
        try:
            for batch in (1, 2, 3, 1, 2, 3):
                z, y = noise(batch, seed=batch)
                if error(model.decode(z, y, precision="bf16"), exact(model, z, y)) > PRECISIONS["bf16"]:
                    wrong.append(batch)
        except Exception as reason:
            wrong.append(reason)

    threads = [threading.Thread(target=work, args=(m,)) for m in models]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("swap", ["load_state_dict", "data", "fused optimizer"])
def test_weights_change(precision, swap):
    model, other = make_inverse(), make_inverse(seed=9)
    z, y = noise(3)
    before = model.decode(z, y, precision=precision)
    if swap == "load_state_dict":
        model.load_state_dict(other.state_dict())
    elif swap == "data":
        for own, new in zip(model.parameters(), other.parameters(), strict=True):
            own.data = new.data.clone()
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        model(z, y).square().sum().backward()
        optimizer.step()
    after = model.decode(z, y, precision=precision)
    assert not torch.equal(before, after)
    assert error(after, exact(model, z, y)) < PRECISIONS[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inside_a_graph_of_the_users(precision):
    model = make_inverse()
    z, y = noise(3)
    for _ in range(2):
        expected = model.decode(z, y, precision=precision)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        model.passes.forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            out = model.decode(z, y, precision=precision)
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, expected.double().cpu()) < PRECISIONS[precision]
    assert torch.equal(model.decode(z, y, precision=precision), expected)  # and nothing of it was kept


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(passes, "MAX_GRAPHS", 2)
    model = make_inverse()
    for batch in range(1, 9):
        model.decode(*noise(batch), precision="bf16")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for batch in range(1, 9):
        model.decode(*noise(batch), precision="bf16")
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
    assert len(model.passes._graphs) == 2


def test_inference_mode_and_back():
    model = make_inverse()
    z, y = noise(2)
    with torch.inference_mode():
        first = model.decode(z, y, precision="bf16")
    assert torch.equal(first, model.decode(z, y, precision="bf16"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device():
    model, (z, y) = make_inverse(), noise(2)
    expected = model.decode(z, y, precision="bf16")
    model.to("cuda:1")
    assert error(model.decode(z.to("cuda:1"), y.to("cuda:1"), precision="bf16"), expected.double().cpu()) < 1e-3
