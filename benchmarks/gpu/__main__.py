"""Builds, checks and measures everything on a GPU, within nine minutes, without a network.

    python -m benchmarks.gpu [--only PART,PART] [--out FOLDER] [--peer-ml-tarflow PATH] [--dry-run]

Parts: build, conformance (what the emulator stands for), tests (pytest -m gpu), machine (barriers, weight reads),
limits (copy, GEMM), kernels, models, sanitizer (memcheck and racecheck on small cases). Each runs in a process of its
own; one that fails or takes too long is named in the table, and the next goes on. Everything goes to
FOLDER/<device>.json (default: benchmarks/results); a run of some parts keeps what the file holds of the others.
--dry-run: on the CPU, with tiny shapes: shows that the parts run; writes to FOLDER or nowhere.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 530  # for everything


@dataclass(frozen=True)
class Part:
    """commands: run one after the other, stopping at the first that fails. seconds: the most they may take."""

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]


def parts(work: Path, peer: str | None, dry: bool) -> list[Part]:
    python = (sys.executable, "-m")
    conformance, machine = str(work / "conformance"), str(work / "machine")
    nvcc = ("nvcc", "-std=c++17", "-O2", "-arch=native", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests"))
    sources = sorted(str(p) for p in (ROOT / "tests" / "emulator").glob("conformance*.cu"))
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    small = (*python, "benchmarks.gpu.small_cases")
    measure = (*python, "benchmarks.gpu.measure", "--out", str(work), *(("--dry-run",) if dry else ()))
    peers = ("--peer-ml-tarflow", peer) if peer else ()
    every = [
        Part("build", 200, ((sys.executable, "setup.py", "-q", "build_ext", "--inplace"),)),
        Part("conformance", 90, ((*nvcc, *sources, "-o", conformance), (conformance,))),
        Part("tests", 150, ((*python, "pytest", "-q", "-m", "gpu", "tests"),)),
        Part("machine", 60, ((*nvcc, "benchmarks/gpu/machine.cu", "-o", machine), (machine,))),
        Part("limits", 40, ((*measure, "limits"),)),
        Part("kernels", 120, ((*measure, "kernels"),)),
        Part("models", 150, ((*measure, "models", *peers),)),
        Part("sanitizer", 120, tuple((*sanitizer, tool, *small) for tool in ("memcheck", "racecheck"))),
    ]
    return [p for p in every if not dry or p.name in ("limits", "kernels", "models")]


def run_part(part: Part, seconds: float) -> dict:
    """status ("ok", "failed", "timed out", "skipped"), seconds, the end of what it printed."""
    start, text = time.monotonic(), ""
    for command in part.commands:
        if shutil.which(command[0]) is None and not Path(command[0]).exists():
            return {"status": "skipped", "seconds": 0.0, "output": f"found no {command[0]}"}
        left = seconds - (time.monotonic() - start)
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=max(left, 1),
                errors="replace", env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            out = error.stdout or b""
            text += out if isinstance(out, str) else out.decode(errors="replace")
            return {"status": "timed out", "seconds": time.monotonic() - start, "output": text[-4000:]}
        text += done.stdout
        if done.returncode:
            return {"status": "failed", "seconds": time.monotonic() - start, "output": text[-4000:]}
    return {"status": "ok", "seconds": time.monotonic() - start, "output": text[-4000:]}


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts, with commas")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--peer-ml-tarflow", help="a checkout of apple/ml-tarflow")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    work = ROOT / "build" / "gpu-check"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    chosen = parts(work, args.peer_ml_tarflow, args.dry_run)
    names = [p.name for p in chosen]
    if args.only:
        unknown = set(args.only.split(",")) - set(names)
        if unknown:
            parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
        chosen = [p for p in chosen if p.name in args.only.split(",")]

    deadline, found = time.monotonic() + SECONDS, {}
    for part in chosen:
        print(f"{part.name} ...", flush=True)
        left = deadline - time.monotonic()
        found[part.name] = run_part(part, min(part.seconds, left)) if left > 5 else {"status": "no time left"}
        if part.name == "machine":
            found[part.name]["rows"] = json_lines(found[part.name].get("output", ""))
        results = work / f"{part.name}.json"
        if results.exists():
            found[part.name] |= json.loads(results.read_text())
        if found[part.name]["status"] != "ok":
            print(found[part.name].get("output", ""), flush=True)

    from .measure import machine

    about = machine(args.dry_run)
    folder = args.out or (None if args.dry_run else ROOT / "benchmarks" / "results")
    if folder is not None:
        name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        path = folder / f"{name}.json"
        before = json.loads(path.read_text())["parts"] if path.exists() and args.only else {}
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": about, "parts": before | found}, indent=1) + "\n")
        print(f"wrote {path}")
    print("\n".join(summary(about, found)))
    return 0 if all(part["status"] == "ok" for part in found.values()) else 1


def summary(about: dict, found: dict) -> list[str]:
    from benchmarks.timing import table

    lines = [f"{about['device']} · torch {about['torch']} · commit {about['commit']} · {about['date']}", ""]
    for part in found.values():
        rows = part.get("rows", [])
        kinds: dict[tuple, list[dict]] = {}
        for row in rows:
            kinds.setdefault(next(iter(row)), []).append(row)
        for group in kinds.values():
            lines += [*table(group), ""]
    return lines + [f"{name:12} {part['status']:10} {part.get('seconds', 0):6.0f} s" for name, part in found.items()]


if __name__ == "__main__":
    sys.exit(main())
