"""How calls are recorded as CUDA graphs, with a stand-in for streams. On a GPU: tests/kernels/test_passes.py."""

import contextlib
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


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(passes, "_CAPTURING", weakref.WeakValueDictionary())


def test_warming_up_keeps_off_the_capture_stream(streams, monkeypatch):
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
    capture = passes._capture_stream(recorder)
    for _ in range(2):
        passes.CudaGraph(lambda t: runs.append(current[-1]), (torch.zeros(2),), capture, "pool")
    assert capture.priority < 0
    assert runs == [current[0], current[0], "pool", capture] * 2


def test_live_recorders_have_streams_of_their_own(streams):
    recorders = [passes.CudaRecorder() for _ in range(20)]
    taken = [passes._capture_stream(r).cuda_stream for r in recorders]
    for _ in range(12):
        Stream()  # somebody else's
    recorders += [passes.CudaRecorder() for _ in range(12)]
    taken += [passes._capture_stream(r).cuda_stream for r in recorders[20:]]
    assert len(set(taken)) == 32
    del recorders[4]
    recorders.append(passes.CudaRecorder())
    assert passes._capture_stream(recorders[-1]).cuda_stream == taken[4]
