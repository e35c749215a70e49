"""Times on a GPU: recorded calls, replayed between events, in turns. On a machine without one (a dry run) a clock."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU there is


@dataclass
class Call:
    """f() without arguments. graph: whether it can be recorded; a call that is timed with its launches cannot."""

    f: Callable[[], object]
    graph: bool = True


class Timer:
    """Median seconds per call of several calls, in turns A B C, B C A, ...

    Calls that leave the L2 (`cold`) are timed one by one after a write of FLUSH_BYTES; others `calls` in a row in one
    recording. Nothing recorded includes launches from Python; what cannot be recorded is queued and timed likewise.
    """

    def __init__(self, device: torch.device, rounds: int = 15):
        self.device, self.rounds = device, rounds
        self._flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def __call__(self, calls: dict[str, Call], *, cold: bool, seconds: float = 2.0) -> dict[str, float]:
        """seconds: about how long it may take in all; a call that takes long gets fewer rounds, at least three."""
        if self.device.type != "cuda":
            return {name: statistics.median(_clock(call.f) for _ in range(2)) for name, call in calls.items()}
        repeats = 1 if cold else 20
        ready = {name: self._prepare(call, repeats) for name, call in calls.items()}
        first = {name: self._event(play, cold) for name, play in ready.items()}
        rounds = max(3, min(self.rounds, int(seconds / max(sum(first.values()), 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for _ in range(rounds):
            for name in names:
                times[name].append(self._event(ready[name], cold) / repeats)
            names.append(names.pop(0))
        return {name: statistics.median(t) for name, t in times.items()}

    def _prepare(self, call: Call, repeats: int) -> Callable[[], object]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call.f()
        torch.cuda.current_stream(self.device).wait_stream(side)
        if not call.graph:
            return lambda: [call.f() for _ in range(repeats)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call.f()
        return graph.replay

    def _event(self, play: Callable[[], object], cold: bool) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self._flush.fill_(1.0)
        start.record()
        play()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3


def _clock(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start
