"""One measuring part of gpu-check in a process of its own: writes FOLDER/<part>.json with its rows.

python -m benchmarks.gpu.measure PART --out FOLDER [--peer-ml-tarflow PATH] [--dry-run]
"""

import argparse
import importlib.metadata
import json
from pathlib import Path

import torch

from benchmarks.timing import machine_info

from . import kernels, limits, models
from .timing import Timer

PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x")


def machine(dry: bool) -> dict:
    """What a number depends on."""
    about = machine_info()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    about["packages"] = versions
    if dry:
        return about | {"device": "dry run on " + about["cpu"]}
    properties = torch.cuda.get_device_properties(0)
    return about | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("limits", "kernels", "models"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peer-ml-tarflow")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    timer = Timer(torch.device("cpu" if args.dry_run else "cuda"))
    if args.part == "limits":
        rows = limits.measure(timer, args.dry_run)
    else:
        known = args.out / "limits.json"
        found = json.loads(known.read_text())["rows"] if known.exists() else limits.measure(timer, args.dry_run)
        if args.part == "kernels":
            rows = kernels.run(timer, found, args.dry_run)
        else:
            rows = models.run(timer, found, args.dry_run, args.peer_ml_tarflow)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{args.part}.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
