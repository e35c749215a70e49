"""What decoding costs when it does not have the machine to itself.

Two processes: each decodes the same flow, first alone, then both at once; a row has the slower one's time over its time
alone (the fair share of two on the same cores is 2).
After torch: a large torch product on all threads before every decode; a row has the decode's time over that of a decode
that nothing precedes. Torch's threads spin for a while after their work.

    python -m benchmarks.bench_sharing [--quick] [--configs S,M] [--batches 1,16] [--threads N] [--json PATH]
"""

import multiprocessing
import statistics
import time

import torch

from .flows import check_configs, random_flow
from .timing import main

TASKS = {"S": [1, 16, 64], "M": [1, 16], "L": [1]}


def run(quick: bool = False, configs: list[str] | None = None, batches: list[int] | None = None) -> list[dict]:
    """One row per config, batch and precision."""
    check_configs(configs)
    seconds = 0.5 if quick else 3.0
    rows = []
    for name in configs or (["S"] if quick else list(TASKS)):
        for batch in batches or TASKS[name]:
            for precision in ("fp32", "bf16"):
                alone, after = _alone(name, batch, precision, seconds)
                rows.append(
                    {
                        "op": "sharing",
                        "config": name,
                        "batch": batch,
                        "precision": precision,
                        "threads": torch.get_num_threads(),
                        "alone_ms": 1e3 * alone,
                        "two_processes_x": max(_together(name, batch, precision, seconds)) / alone,
                        "after_torch_x": after / alone,
                    }
                )
    return rows


def _task(name: str, batch: int, precision: str):
    flow = random_flow(name)
    z = torch.randn(batch, flow.config.tokens, flow.config.channels, generator=torch.Generator().manual_seed(1))
    return flow, lambda: flow.decode(z, precision=precision)


def _mean(decode, seconds: float) -> float:
    """Mean seconds of a decode over about `seconds`."""
    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - start < seconds:
        decode()
        count += 1
    return (now - start) / max(count, 1)


@torch.inference_mode()
def _alone(name: str, batch: int, precision: str, seconds: float) -> tuple[float, float]:
    """Seconds of a decode alone, and right after a product of torch's."""
    flow, decode = _task(name, batch, precision)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    with flow.frozen():
        decode()
        alone = _mean(decode, seconds)
        times = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            torch.mm(a, b)
            start = time.perf_counter()
            decode()
            times.append(time.perf_counter() - start)
    return alone, statistics.mean(times)


def _together(name: str, batch: int, precision: str, seconds: float) -> list[float]:
    """Mean seconds of a decode in each of two processes at once."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    threads = torch.get_num_threads()
    processes = [
        context.Process(target=_process, args=(name, batch, precision, seconds, threads, ready, results))
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    times = [results.get(timeout=60 + 20 * seconds) for _ in processes]
    for process in processes:
        process.join()
    return times


@torch.inference_mode()
def _process(name: str, batch: int, precision: str, seconds: float, threads: int, ready, results) -> None:
    torch.set_num_threads(threads)
    flow, decode = _task(name, batch, precision)
    with flow.frozen():
        decode()
        ready.wait()
        results.put(_mean(decode, seconds))


if __name__ == "__main__":
    main(run, __doc__, configs=str, batches=int)
