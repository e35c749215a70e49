"""What benchmarks share: interleaved medians, the machine's copy bandwidth, what machine it was, the command line."""

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


def machine_info() -> dict:
    """What a number depends on: CPU, cores, threads, instruction set, torch, commit, date (UTC)."""
    from biflow.models.layers import device_name  # tables and the commit are there for a build that failed, too

    return {
        "cpu": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.biflow.cpu_isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def resident_bytes(name: str) -> int:
    """Of this process, by /proc/self/status (Linux): "VmRSS", the resident memory, or "VmHWM", its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def commit() -> str:
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def turns(
    functions: dict[str, Callable[[], object]], rounds: int = 7, sample_s: float = 0.02
) -> dict[str, list[float]]:
    """Seconds per call of each function, one number a turn, measured in turns A B C, B C A, ..., so that a slow moment
    hits all.

    Each turn repeats its function for about `sample_s` seconds; what the one before drove out of the caches is refilled
    by up to three calls that are not counted. If a call takes more than a second, three turns without them must do.
    """
    seconds = {name: _seconds(f) for name, f in functions.items()}
    slow = max(seconds.values()) > 1
    if not slow:  # the first call may have built something
        seconds = {name: min(seconds[name], _seconds(f)) for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for _ in range(min(rounds, 3) if slow else rounds):
        for name in names:
            repeats = max(1, round(sample_s / max(seconds[name], 1e-7)))
            if not slow:
                _seconds(functions[name], min(repeats, 3))
            times[name].append(_seconds(functions[name], repeats))
        names.append(names.pop(0))
    return times


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int = 7, sample_s: float = 0.02
) -> dict[str, float]:
    """Median seconds per call of each function, over `turns`."""
    return {name: statistics.median(t) for name, t in turns(functions, rounds, sample_s).items()}


def ratio(times: list[float], base: list[float]) -> float:
    """How many times faster than `base`: the median of the ratios turn by turn, so that drift cancels."""
    return statistics.median(b / t for t, b in zip(times, base, strict=True))


def _seconds(f: Callable[[], object], repeats: int = 1) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        f()
    return (time.perf_counter() - start) / repeats


def keep_memory() -> None:
    """Makes glibc keep freed memory for this process, so that timings do not measure page faults of fresh outputs.

    Without it every tensor over 32 MB is mapped and unmapped on each call, which costs more than a memory-bound kernel.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold, one_gigabyte = -3, -1, 1 << 30
        libc.mallopt(mmap_threshold, one_gigabyte)
        libc.mallopt(trim_threshold, one_gigabyte)


def copy_function(bytes_moved: int) -> Callable[[], object]:
    """A torch copy that reads bytes_moved / 2 and writes as much, on torch's threads: the limit of one-pass kernels."""
    source = torch.zeros(max(1, bytes_moved // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def write_json(path: str | Path, rows: list[dict], **sections: object) -> None:
    """Machine information, further sections and the rows of a benchmark."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine_info(), **sections, "rows": rows}, indent=1) + "\n")


def table(rows: list[dict]) -> list[str]:
    """Lines of a table with a column for every key, as wide as its values."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_cell(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in cells]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def main(run: Callable[..., list[dict]], description: str, **lists: type) -> None:
    """The command line of a benchmark: prints the rows of run(quick=..., **lists).

    lists: further options of `run` that take comma-separated values, name -> type of one.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few cases, few repetitions")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice)")
    parser.add_argument("--json", help="write the rows and the machine to this file")
    for name in lists:
        parser.add_argument(f"--{name.replace('_', '-')}", help="comma-separated")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in lists}
    rows = run(quick=args.quick, **{k: [lists[k](v) for v in text.split(",")] for k, text in given.items() if text})
    print("\n".join(table(rows)))
    if args.json:
        write_json(args.json, rows)
