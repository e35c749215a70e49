"""One measuring part of gpu-check in a process of its own: appends every row to FOLDER/<part>.jsonl as it is made.

python -m benchmarks.gpu.measure PART --out FOLDER [--until SECONDS] [--peer-ml-tarflow PATH] [--dry-run]

A row that fails says why ("failed"), and the next goes on; the exit status is 1 then. One for which there is no time
until SECONDS (of time.monotonic, which processes share) says "left_out". One that hangs ends the process with the
status AGAIN: started again, it goes on after that row.
"""

import argparse
import gc
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from . import decode, kernels, limits, models, training
from .timing import Timer, reason
from .tools import AGAIN, json_lines


def measure(cases: Iterable[limits.Case], path: Path, until: float = math.inf) -> list[dict]:
    """All rows in `path`, those of a process before this one that ended with AGAIN among them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    counter = path.with_suffix(".done")  # cases, not rows: there while a part is not through
    done = int(counter.read_text()) if counter.exists() else 0

    def write(rows: list[dict], count: int) -> None:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        counter.write_text(str(count))
        for row in rows:
            if "failed" in row:
                print("failed:", row, flush=True)

    for index, case in enumerate(cases):
        if index < done:
            continue
        left = until - time.monotonic()
        if left < case.needs or left <= 0:
            write([case.labels | {"left_out": "no time left"}], index + 1)
            continue

        def give_up(case: limits.Case = case, index: int = index, left: float = left) -> None:
            late = left < case.limit  # then nothing is wrong with the row, and there is no time for others
            what = {"left_out": "not through in the time left"} if late else {"failed": f"hung for {case.limit:g} s"}
            write([case.labels | what], index + 1)
            os._exit(int(any("failed" in row for row in json_lines(path.read_text()))) if late else AGAIN)

        try:
            found = _watched(case.run, min(case.limit, left), give_up)
        except Exception as error:
            found = {"failed": reason(error)}
        write([case.labels | row for row in (found if isinstance(found, list) else [found])], index + 1)
        gc.collect()  # graphs and what autograd keeps
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    counter.unlink(missing_ok=True)
    return json_lines(path.read_text()) if path.exists() else []


def _watched(run: Callable[[], object], seconds: float, give_up: Callable[[], None]) -> object:
    """run(), and give_up() beside it if it takes longer: nothing else ends a call that waits for a GPU."""
    watch = threading.Timer(min(seconds, threading.TIMEOUT_MAX), give_up)
    watch.daemon = True
    watch.start()
    try:
        return run()
    finally:
        watch.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("limits", "decode", "models", "kernels", "training", "compiled"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, default=math.inf)
    parser.add_argument("--peer-ml-tarflow")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        torch.set_num_threads(1)  # a second one waits for a core where others compute (docs/measured.md)
    timer, dry, until = Timer(torch.device("cpu" if args.dry_run else "cuda")), args.dry_run, args.until

    def rows(part: str) -> list[dict]:
        path = args.out / f"{part}.jsonl"
        return json_lines(path.read_text()) if path.exists() else []

    found = rows("limits") or measure(limits.cases(timer, dry), args.out / "limits.jsonl", until)
    if args.part == "decode":
        cases = decode.cases(timer, found, rows("machine"), dry, args.peer_ml_tarflow, rows("decode"))
    elif args.part == "kernels":
        cases = kernels.cases(timer, found, dry)
    elif args.part == "models":
        cases = models.cases(timer, found, dry, args.peer_ml_tarflow)
    elif args.part == "training":
        cases = training.cases(timer, found, dry, args.peer_ml_tarflow)
    elif args.part == "compiled":
        cases = itertools.chain(*(part.compiled(timer, found, dry) for part in (models, kernels, training)))
    else:
        cases = None
    if cases is not None:
        found = measure(cases, args.out / f"{args.part}.jsonl", until)
    return 1 if any("failed" in row for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
