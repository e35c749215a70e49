"""How calls are recorded as CUDA graphs, with a stand-in for streams. On a GPU: tests/kernels/test_passes.py."""

import contextlib
import itertools
import weakref

import pytest
import torch

from biflow.models import passes


class Stream:
    """torch has 32 streams of a priority and hands them out in turn."""

    made = 0

    def __init__(self, device="cuda:0", priority=0):
        self.device, self.cuda_stream, self.priority = device, Stream.made % 32, priority
        Stream.made += 1

    def wait_stream(self, other):
        pass


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    handles = itertools.count()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(passes, "_POOLS", weakref.WeakValueDictionary())


def test_warming_up_keeps_off_the_capture_stream(monkeypatch):
    """Else what cuBLAS keeps for that stream lies outside the graphs' pool, and may go while graphs write to it."""
    current, runs = [Stream()], []

    @contextlib.contextmanager
    def within(stream):
        current.append(stream)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(own, *, pool, stream, capture_error_mode):
        runs.append(pool)
        with within(stream):
            yield

    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    recorder = passes.CudaRecorder()
    graphs = [recorder.record(lambda t: runs.append(current[-1]), (torch.zeros(2),)) for _ in range(2)]
    capture = runs[3]
    assert capture.priority < 0
    assert runs == [current[0], current[0], 0, capture] * len(graphs)


def test_live_pools_have_streams_of_their_own():
    pools = [passes._Pool() for _ in range(20)]
    for _ in range(12):
        Stream()  # somebody else's
    pools += [passes._Pool() for _ in range(12)]
    taken = [pool.stream.cuda_stream for pool in pools]
    assert len(set(taken)) == 32
    del pools[4]
    pools.append(passes._Pool())
    assert pools[-1].stream.cuda_stream == taken[4]


def test_a_pool_ends_with_its_last_graph(monkeypatch):
    """torch refuses to record into a pool whose graphs have all gone, and wants graphs that share one on one stream.

    What cuBLAS keeps for the stream lies in the pool, so that the stream goes too.
    """

    class Graph:
        def __init__(self, call, inputs, stream, pool):
            self.given = stream, pool

    monkeypatch.setattr(passes, "CudaGraph", Graph)
    recorder = passes.CudaRecorder()
    first = recorder.record(None)
    second = recorder.record(None)
    stream = first.given[0]
    assert first.given == second.given == (stream, 0)
    del first
    assert recorder.record(None).given == (stream, 0)
    del second
    later = recorder.record(None).given
    assert later[0] is not stream
    assert later[1] == 1
