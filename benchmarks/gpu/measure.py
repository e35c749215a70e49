"""One measuring part of gpu-check in a process of its own: appends every row to FOLDER/<part>.jsonl as it is made.

python -m benchmarks.gpu.measure PART --out FOLDER [--peer-ml-tarflow PATH] [--dry-run]

A row that fails says why ("failed"), and the next goes on; the exit status is 1 then.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import kernels, limits, models
from .timing import Timer, reason
from .tools import json_lines


def measure(cases: Iterable[limits.Case], path: Path) -> list[dict]:
    rows = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        try:
            row = case.labels | case.run()
        except Exception as error:
            row = case.labels | {"failed": reason(error)}
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if "failed" in row:
            print("failed:", row, flush=True)
        gc.collect()  # graphs and what autograd keeps
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("limits", "kernels", "models"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-ml-tarflow")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    timer, dry = Timer(torch.device("cpu" if args.dry_run else "cuda")), args.dry_run
    known = args.out / "limits.jsonl"
    found = json_lines(known.read_text()) if known.exists() else measure(limits.cases(timer, dry), known)
    rows = found
    if args.part == "kernels":
        rows = measure(kernels.cases(timer, found, dry), args.out / "kernels.jsonl")
    elif args.part == "models":
        rows = measure(models.cases(timer, found, dry, args.peer_ml_tarflow), args.out / "models.jsonl")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
