"""Whole flows decoded sequentially as on a GPU: packed weights and graphs that blocks keep, streams and threads.

On a machine without a GPU the kernels run on the emulator, and a stand-in records (tests/recorded.py)."""

import copy
import gc
import pickle
import threading

import pytest
import torch
from recorded import Recorder
from tiny import BATCH, VARIANTS, make_condition, make_flow, noise

from biflow.models import block as block_module
from biflow.models import iterate
from biflow.models import sequential as module
from biflow.ops.decode_block import gpu_plan
from biflow.solvers import Condition

from .backends import emulated

KERNELS = ("decode_block_", "decode_block_buffers", "packed_block_size", "pack_block_")


class Place:
    """Where flows are decoded."""

    def __init__(self, device):
        self.device = device

    def flow(self, **config):
        return make_flow(**config).to(self.device)

    def to(self, t):
        return None if t is None else t.to(self.device)


class _Ops:
    """torch.ops.biflow with the kernels of decode_block from the emulator."""

    def __init__(self, real, kernels):
        self._real, self._kernels = real, kernels

    def __getattr__(self, name):
        return getattr(self._kernels if name in KERNELS else self._real, name)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield Place(torch.device("cuda", 0))
        return
    backend = emulated("plain", "forward")
    backend.configure("forward")
    monkeypatch.setattr(torch.ops, "biflow", _Ops(torch.ops.biflow, backend.ops))
    monkeypatch.setattr(iterate, "CudaRecorder", Recorder)
    monkeypatch.setattr(iterate, "_WORKSPACES", {})
    monkeypatch.setattr(block_module, "graphable", lambda inputs: True)
    yield Place(torch.device("cpu"))
    gc.collect()


@pytest.fixture(params=["one launch", "a graph"])
def launches(request, monkeypatch):
    """Both ways in which a decode runs, whatever this device's own is."""

    def plan(weights, batch, given):
        found, words = gpu_plan(weights, batch, given)
        return [int(request.param == "one launch"), *found[1:]], words

    if request.param == "a graph":
        monkeypatch.setattr(module, "gpu_plan", plan)
    return request.param


def plain(flow):
    """The same flow on the CPU, with its own kernels."""
    return copy.deepcopy(flow).cpu()


@pytest.fixture
def expected(monkeypatch):
    """flow.decode on the CPU."""
    real = torch.ops.biflow

    def decode(flow, z, *condition, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_module, "graphable", lambda inputs: False)
            patch.setattr(torch.ops, "biflow", getattr(torch.ops.biflow, "_real", real))
            return plain(flow).decode(z, *condition, solver="sequential", **options)

    return decode


@pytest.mark.parametrize("name", VARIANTS)
def test_as_on_a_cpu(place, launches, expected, name):
    flow = place.flow(std=0.05, **VARIANTS[name])
    y, context = make_condition(flow, BATCH)
    for seed, options in enumerate(
        ({}, dict(guidance=1.5, attn_temp=0.7), dict(guidance=1.0, guide="a", anneal=False))
    ):
        z = noise(flow, seed=seed).cpu()
        for precision, far in (("fp32", 2e-5), ("bf16", 5e-2)):
            given = (place.to(z), place.to(y), place.to(context))
            x, info = flow.decode(*given, solver="sequential", precision=precision, return_info=True, **options)
            want = expected(flow, z, y, context, precision=precision, **options)
            assert (x.cpu() - want).abs().max() <= far
            assert info.residual.max() <= 10 * far


def test_a_graph_serves_later_decodes(place, launches, expected):
    """Other noise and labels; other kinds of decode have graphs of their own, of which the newest are kept."""
    flow = place.flow(num_classes=3)
    for k in range(3):
        z, y = noise(flow, seed=k).cpu(), torch.tensor([k, 1, 2, -1])
        x = flow.decode(place.to(z), place.to(y), guidance=1.0)
        assert (x.cpu() - expected(flow, z, y, guidance=1.0)).abs().max() <= 2e-5
    states = [s for block in flow.blocks for s in block._sequential.states]
    assert len(states) == (0 if launches == "one launch" else 3)
    for k in range(6):
        flow.decode(place.to(noise(flow).cpu()[: k % 4 + 1]), guidance=0.5 * k, attn_temp=0.5)
    assert all(len(block._sequential.states) <= iterate.MAX_STATES for block in flow.blocks)


@torch.no_grad()
def test_weights_that_change_are_seen(place, launches, expected):
    flow = place.flow(num_classes=3)
    z, y = noise(flow).cpu(), torch.tensor([0, 1, 2, -1])

    def right():
        x = flow.decode(place.to(z), place.to(y))
        return bool((x.cpu() - expected(flow, z, y)).abs().max() <= 2e-5)

    assert right()
    weight = flow.blocks[0].layers[0].fc1.weight
    weight.mul_(1.5)
    assert right()
    weight.data = weight.data * 0.5  # another address
    assert right()
    flow.blocks[1].class_embed.data.add_(0.3)  # no version counter moves
    assert right()
    with flow.frozen():
        assert right()
        weight.add_(0.4)  # what must not be done: it is not looked at
        assert not right()
    assert right()


def test_nothing_is_saved_or_copied(place, launches):
    flow = place.flow()
    flow.decode(place.to(noise(flow).cpu()))
    assert all(block._sequential._weights for block in flow.blocks)
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert all(not block._sequential._weights and not block._sequential.states for block in other.blocks)
    flow.double()
    assert all(not block._sequential._weights and not block._sequential.states for block in flow.blocks)


def test_fallback_of_some_samples(place, launches, expected):
    """What the iterative solvers give up on is decoded here, a part of the batch."""
    flow = place.flow(num_classes=3)
    z, y = noise(flow).cpu(), torch.tensor([0, 1, 2, -1])
    block = flow.blocks[1]
    some = torch.tensor([0, 2])
    condition = Condition(place.to(y))
    x = block.decode_sequential(place.to(z), condition)
    part = block.decode_sequential(place.to(z)[place.to(some)], condition.rows(place.to(some)))
    assert (part - x[place.to(some)]).abs().max() <= 1e-4 * x.abs().max()


def test_what_does_not_fit_is_refused(place):
    flow = place.flow(num_classes=3)
    with pytest.raises(ValueError, match="z: expected shape"):
        flow.decode(place.to(noise(flow).cpu()[:, :1]))
    with pytest.raises(ValueError, match="expected finite values"):
        flow.decode(place.to(noise(flow).cpu().fill_(float("nan"))))
    assert flow.decode(place.to(noise(flow).cpu()[:0])).shape[0] == 0


@pytest.mark.gpu
@torch.no_grad()
def test_streams_and_threads(launches):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    place = Place(torch.device("cuda", 0))
    flow = place.flow(num_classes=3)
    given = [(place.to(noise(flow, seed=k).cpu()), place.to(torch.tensor([0, 1, 2, -1]))) for k in range(3)]
    want = [flow.decode(*g) for g in given]
    torch.cuda.synchronize()
    wrong = []

    def work(k):
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong.extend(k for _ in range(20) if not torch.equal(flow.decode(*given[k]), want[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
