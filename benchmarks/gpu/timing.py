"""Times on a GPU: recorded calls, replayed between events, in turns. On a machine without one (a dry run) a clock."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU there is


@dataclass
class Call:
    """f() without arguments. graph: whether it can be recorded; a call that is timed with its launches cannot.

    result: what f computes, where f does not return it.
    """

    f: Callable[[], object]
    graph: bool = True
    result: Callable[[], object] | None = None


@dataclass
class Times:
    """Median seconds a call; why a call has none; how far off its result was."""

    seconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def row(self, per_call: Callable[[float], dict]) -> dict:
        """per_call(seconds) of "ours" and its error, how many times its time the others take ("x_..."), what failed."""
        row, ours = {}, self.seconds.get("ours")
        if ours is not None:
            row = per_call(ours) | {f"x_{name}": t / ours for name, t in self.seconds.items() if name != "ours"}
            row |= {"error": self.errors["ours"]} if "ours" in self.errors else {}
        if self.failed:
            row["failed"] = "; ".join(f"{name}: {why}" for name, why in self.failed.items())
        return row


def reason(error: Exception) -> str:
    """One line, not too long: the rest of a compiler's message helps nobody in a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Timer:
    """Median seconds per call of several calls, in turns A B C, B C A, ...; one that fails leaves the others theirs.

    Calls that leave the L2 (`cold`) are timed one by one after a write of FLUSH_BYTES; others `calls` in a row in one
    recording. Nothing recorded includes launches from Python; what cannot be recorded is queued and timed likewise.
    """

    def __init__(self, device: torch.device, rounds: int = 15):
        self.device, self.rounds = device, rounds
        self._flush = torch.empty(FLUSH_BYTES // 4, device=device) if device.type == "cuda" else None

    def __call__(
        self,
        calls: dict[str, Call | Callable[[], Call]],
        *,
        cold: bool,
        seconds: float = 2.0,
        check: Callable[[object], float] | None = None,
    ) -> Times:
        """calls: or functions that make them, where that may fail. seconds: about how long it may take in all; a call
        that takes long gets fewer rounds, at least three. check: gets what a call computes, returns its error; where
        it raises (parity.py), the call is not timed."""
        repeats = 1 if cold or self.device.type != "cuda" else 20
        ready, first, times, failed, errors = {}, {}, {name: [] for name in calls}, {}, {}
        for name, call in calls.items():
            try:
                call = call if isinstance(call, Call) else call()
                if check is not None:
                    errors[name] = check((call.result or call.f)())
                play = self._prepare(call, repeats)
                first[name], ready[name] = self._event(play, cold), play
            except Exception as error:
                failed[name] = reason(error)
        rounds = max(3, min(self.rounds, int(seconds / max(sum(first.values()), 1e-6))))
        names = list(ready)
        for turn in range(rounds if self.device.type == "cuda" else 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)] if names else []:
                try:
                    if name not in failed:
                        times[name].append(self._event(ready[name], cold) / repeats)
                except Exception as error:
                    failed[name] = reason(error)
        return Times({name: statistics.median(t) for name, t in times.items() if name not in failed}, failed, errors)

    def few(self, call: Callable[[], object], *, seconds: float = 2.0, most: int = 7) -> float:
        """Median seconds of a call that takes long and has run before: of as many as fit, at least one.

        From an idle device to an idle device: with its launches, and with what the host waits for in between. A dry
        run calls it once.
        """
        times = []
        wait = functools.partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else None
        while len(times) < (most if wait else 1) and (not times or sum(times) + times[-1] <= seconds):
            if wait:
                wait()
            times.append(self._event(call, cold=False))
        return statistics.median(times)

    def _prepare(self, call: Call, repeats: int) -> Callable[[], object]:
        if self.device.type != "cuda":
            return call.f
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call.f()
        torch.cuda.synchronize(self.device)  # what failed on the GPU is this call's
        if not call.graph:
            return lambda: [call.f() for _ in range(repeats)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call.f()
        return graph.replay

    def _event(self, play: Callable[[], object], cold: bool) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            play()
            return time.perf_counter() - begin
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if cold:
            self._flush.fill_(1.0)
        start.record()
        play()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3
