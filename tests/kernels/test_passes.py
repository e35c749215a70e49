"""Passes on a GPU: recorded graphs against direct calls, streams, threads, changing weights. What does not need a GPU:
tests/test_passes.py."""

import copy
import gc
import math
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

import biflow
from biflow.models import passes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPE = dict(img_size=8, in_channels=1, width=128, num_classes=10)
PRECISIONS = passes.PRECISIONS


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


def on_a_cpu(model, precision, inputs, **options):
    """The pass in torch on a CPU, in `precision` and in fp64."""
    dtype = torch.bfloat16 if precision == "bf16" else None
    twin, inputs = copy.deepcopy(model).cpu(), [t.cpu() for t in inputs]
    with torch.no_grad():
        same = twin(*inputs, layer_dtype=dtype, **options)
        exact = twin.double()(*(t.double() if t.is_floating_point() else t for t in inputs), **options)
    return same, exact


def check(got, same, exact):
    """fp32, with an error at most twice that of torch on a CPU and a rounding of a sum of `width` terms."""
    assert got.dtype == torch.float32
    error, allowed = (((t.double().cpu() - exact).norm() / exact.norm()).item() for t in (got, same))
    bound = 2 * allowed + math.sqrt(SHAPE["width"]) * torch.finfo(torch.float32).eps
    assert error <= bound, f"error {error:.2e}, allowed {bound:.2e}"


def images(model, precision, z, y):
    """What `check` compares with."""
    size = model.config.patch_size
    return tuple(biflow.models.layers.unpatchify(t, size) for t in on_a_cpu(model, precision, (z, y)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trained", [0.0, 2.0])
def test_decode(precision, trained):
    model = make_inverse(max_guidance=trained)
    for batch in (1, 5, 1):
        z, y = noise(batch, seed=batch)
        for _ in range(2):
            got = model.decode(z, y, precision=precision)
            check(got, *images(model, precision, z, y))
    assert len(model.passes._graphs) == 2
    assert not torch.equal(model.decode(z, y, guidance=1.5, precision=precision), got)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_encode(precision):
    flow = make_flow()
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    y = torch.tensor([1, -1, 4])
    with torch.no_grad():
        z, logdet, states = flow.encode(x.cuda(), y.cuda(), return_states=True, precision=precision)
    results = [(a, b, *c) for a, b, c in on_a_cpu(flow, precision, (x, y), return_states=True)]
    for got, same, exact in zip((z, logdet, *states), *results, strict=True):
        check(got, same, exact)


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
    wants = [{batch: images(m, "bf16", *noise(batch, seed=batch)) for batch in (1, 2, 3)} for m in models]
    wrong = []

    def work(model, want):
        try:
            for batch in (1, 2, 3, 1, 2, 3):
                check(model.decode(*noise(batch, seed=batch), precision="bf16"), *want[batch])
        except BaseException as reason:
            wrong.append(reason)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(models, wants, strict=True)]
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
    check(after, *images(model, precision, z, y))


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
    check(out, *images(model, precision, z, y))
    assert torch.equal(model.decode(z, y, precision=precision), expected)  # and nothing of it was kept


@pytest.mark.parametrize("precision", PRECISIONS)
def test_graphs_that_go_leave_the_others_whole(monkeypatch, precision):
    """Of three shapes one is recorded anew at every call, in the place of the graph that was used longest ago."""
    monkeypatch.setattr(passes, "MAX_GRAPHS", 2)
    model = make_inverse()
    wants = {batch: images(model, precision, *noise(batch, seed=batch)) for batch in (1, 5, 64)}
    for batch in (1, 5, 64, 5, 1, 1, 64, 5, 64, 1, 5):
        check(model.decode(*noise(batch, seed=batch), precision=precision), *wants[batch])
    for p in model.parameters():
        p.data = p.data.clone()  # the graphs of both shapes are replaced, one after the other
    for batch in (1, 5, 1, 5):
        check(model.decode(*noise(batch, seed=batch), precision=precision), *wants[batch])


def test_after_a_reduce_overhead_compile():
    """It empties cuBLAS's workspaces. In a process of its own: after a wrong address no CUDA test could run."""
    call = "from kernels.test_passes import replay_after_reduce_overhead as f; f('fp32'); f('bf16')"
    path = os.pathsep.join(str(p) for p in (Path(__file__).parents[1], Path(biflow.__file__).parents[1]))
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", call], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def replay_after_reduce_overhead(precision):
    model, (z, y) = make_inverse(), noise(64)
    first = model.decode(z, y, precision=precision)
    check(first, *images(model, precision, z, y))
    a = torch.randn(512, 512, device="cuda")
    product = torch.compile(lambda a: (a @ a).relu() @ a, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            product(a)
    torch.cuda.empty_cache()
    held = [torch.full((1 << 20,), 3.0, device="cuda") for _ in range(64)]  # where emptied workspaces may have been
    for _ in range(3):
        assert torch.equal(model.decode(z, y, precision=precision), first)
    assert all((t == 3).all() for t in held)
    z, y = noise(5)
    check(model.decode(z, y, precision=precision), *images(model, precision, z, y))


def test_a_graph_knows_how_fp32_products_are_made():
    model, (z, y), matmul = make_inverse(), noise(64), torch.backends.cuda.matmul
    try:
        results = []
        for name in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = name
            results.append(model.decode(z, y))
    finally:
        matmul.fp32_precision = "none"
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])  # TF32 rounds: sm_80 and later


def test_graphs_go_with_the_last_reference_to_their_model():
    gc.collect()
    gc.disable()
    try:
        model = make_inverse()
        for precision in PRECISIONS:
            model.decode(*noise(5), precision=precision)
        gone = [weakref.ref(recorded.graph) for recorded in model.passes._graphs.values()]
        del model
        assert [r() for r in gone] == [None, None]
    finally:
        gc.enable()


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
    z, y = z.to("cuda:1"), y.to("cuda:1")
    got = model.decode(z, y, precision="bf16")
    check(got, *images(model, "bf16", z, y))
    check(expected, *images(model, "bf16", z, y))
