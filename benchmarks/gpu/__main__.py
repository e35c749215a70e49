"""Builds, checks and measures everything on a GPU, within nine minutes, without a network.

    python -m benchmarks.gpu [--only PART,PART] [--out FOLDER] [--commit NAME] [--peer-ml-tarflow PATH] [--dry-run]

Parts: build; what is wrong: conformance (what the emulator stands for), tests (pytest -m gpu); what decides: limits
(copy, GEMM), machine (barriers, weight reads), decode (the exact inverse); models (the learned inverse, the density),
kernels, training (a step of both stages); memcheck and racecheck (small cases); compiled (what torch.compile makes of
models, kernels and a training step). Within a part, too, what decides comes first. Each runs in a process of its own;
one that fails or takes too long is named in the table, keeps the rows it has, and the next goes on; so does a measuring
part after a row that hangs. What one does not take of its time is that of the measuring parts after it, and of the last
part: with --only there is more. Everything goes to FOLDER/<device>.json (default: benchmarks/results), after every
part; what decides and what failed is printed at the end. A run of some parts keeps what the file holds of the others.
--commit: where there is no git. --dry-run: on the CPU, with tiny shapes: shows that the parts run; writes to FOLDER or
nowhere. The exit status is 1 if a part failed or found no time, not if it was skipped because its tool is not there;
without a GPU it is 2.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.timing import commit

from .summary import summary
from .tools import AGAIN, UNTIL, find, json_lines

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 525  # for everything
SHOWN = 1500  # characters of what a part printed that did not end well
PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "cupy-cuda12x")
UNSUPPORTED = "Device not supported"  # compute-sanitizer's words


@dataclass(frozen=True)
class Part:
    """commands: run one after the other, stopping at the first that fails. seconds: the most they may take.

    UNTIL in a command becomes the end of that time. One that ends with AGAIN is run again.
    """

    name: str
    seconds: int
    commands: tuple[tuple[str, ...], ...]
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def measures(self) -> bool:
        """Whether it has use for any time: it ends by itself, with the rows that it could measure."""
        return any(UNTIL in command for command in self.commands)


def parts(work: Path, peer: str | None, dry: bool) -> list[Part]:
    python = (sys.executable, "-m")
    conformance, machine = str(work / "conformance"), str(work / "machine")
    nvcc = (find("nvcc") or "nvcc", "-std=c++17", "-O2", "-arch=native")
    nvcc = (*nvcc, "-I", str(ROOT / "csrc"), "-I", str(ROOT / "tests"))
    sources = sorted(str(p) for p in (ROOT / "tests" / "emulator").glob("conformance*.cu"))
    pytest = (*python, "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "benchmarks.gpu.first_failures", "tests")
    if importlib.util.find_spec("xdist"):
        pytest = (*pytest, "-n", "8")
    measure = (*python, "benchmarks.gpu.measure", "--out", str(work), "--until", UNTIL)
    measure = (*measure, *(("--dry-run",) if dry else ()))
    peers = ("--peer-ml-tarflow", peer) if peer else ()

    def sanitizer(tool: str) -> Part:
        program = (
            find("compute-sanitizer") or "compute-sanitizer",
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
        )
        command = (*program, "--tool", tool, *python, "benchmarks.gpu.small_cases")
        return Part(tool, 45, (command,), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    every = [
        Part("build", 160, ((*python, "benchmarks.gpu.build"),)),
        Part("conformance", 60, ((*nvcc, *sources, "-o", conformance), (conformance,))),
        Part("tests", 100, (pytest,)),
        Part("limits", 20, ((*measure, "limits"),)),
        Part("machine", 35, ((*nvcc, "benchmarks/gpu/machine.cu", "-o", machine), (machine,))),
        Part("decode", 150, ((*measure, "decode", *peers),)),
        Part("models", 60, ((*measure, "models", *peers),)),
        Part("kernels", 50, ((*measure, "kernels"),)),
        Part("training", 40, ((*measure, "training", *peers),)),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Part("compiled", 60, ((*measure, "compiled"),)),
    ]
    return [p for p in every if not dry or p.measures]


def allowed(part: Part, later: list[Part], left: float) -> float:
    """Seconds of a part: its own, or what all parts after it leave, if that is more and they have no use for it; never
    more than are left."""
    if later and not part.measures:
        return min(left, part.seconds)
    return min(left, max(part.seconds, left - sum(p.seconds for p in later)))


def hand_over(work: Path, rows: list[dict]) -> None:
    """Rows of `machine`, to where the parts after it look."""
    (work / "machine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_part(part: Part, seconds: float) -> dict:
    """status ("ok", "failed", "timed out", "skipped"), seconds, all it printed."""
    start = time.monotonic()
    until = start + seconds

    def result(status: str) -> dict:
        printed.seek(0)
        output = printed.read().decode(errors="replace")
        if status == "failed" and UNSUPPORTED in output:
            return {"status": "skipped", "seconds": time.monotonic() - start, "output": UNSUPPORTED}
        return {"status": status, "seconds": time.monotonic() - start, "output": output}

    with tempfile.TemporaryFile() as printed:  # not a pipe: a process that lives on would hold it open
        for command in part.commands:
            if shutil.which(command[0]) is None:
                return {"status": "skipped", "seconds": 0.0, "output": f"found no {command[0]}"}
            # the time it takes to end, and to say so, is left before it is ended
            words, status = [str(until - 3) if word == UNTIL else word for word in command], AGAIN
            while status == AGAIN:
                process = subprocess.Popen(
                    words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **part.environment},
                    start_new_session=True,
                )  # fmt: skip
                try:
                    status = process.wait(max(until - time.monotonic(), 1))
                except subprocess.TimeoutExpired:
                    return result("timed out")
                finally:  # with all that it started
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                if status == AGAIN and time.monotonic() >= until:
                    return result("timed out")
            if status:
                return result("failed")
        return result("ok")


def kept(output: str) -> str:
    """The end, and what pytest said of failures before it."""
    before, end = output[:-4000], output[-4000:]
    named = [line[:300] for line in before.splitlines() if re.search(r"\b(FAILED|ERROR)\b", line)]
    return "\n".join([*named[:200], end])


def facts(name: str | None, dry: bool) -> dict:
    """What a number depends on."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    about = {
        "device": f"dry run on {platform.machine()}",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": versions,
        "commit": name or commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if dry:
        return about
    properties = torch.cuda.get_device_properties(0)
    return about | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": properties.total_memory / 1e9,
        "cuda": torch.version.cuda,
    }


def main() -> int:
    deadline = time.monotonic() + SECONDS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="parts, with commas")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--commit", help="name of what is measured (default: git describe)")
    parser.add_argument("--peer-ml-tarflow", help="a checkout of apple/ml-tarflow")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    work = ROOT / "build" / "gpu-check"
    chosen = parts(work, args.peer_ml_tarflow, args.dry_run)
    names = [p.name for p in chosen]
    if args.only:
        unknown = set(args.only.split(",")) - set(names)
        if unknown:
            parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
        chosen = [p for p in chosen if p.name in args.only.split(",")]
    if not args.dry_run and not torch.cuda.is_available():
        print(f"gpu-check: expected a CUDA device, torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    about, found, path, before = facts(args.commit, args.dry_run), {}, None, {}
    folder = args.out or (None if args.dry_run else ROOT / "benchmarks" / "results")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + ".json")
        before = json.loads(path.read_text())["parts"] if path.exists() and args.only else {}
    if "machine" not in {part.name for part in chosen}:  # a GPU's rates of an earlier run are its rates
        hand_over(work, before.get("machine", {}).get("rows", []))
    for i, part in enumerate(chosen):
        print(f"{part.name} ...", flush=True)
        left = deadline - time.monotonic()
        seconds = allowed(part, chosen[i + 1 :], left)
        found[part.name] = one = run_part(part, seconds) if left > 5 else {"status": "no time left"}
        rows = work / f"{part.name}.jsonl"
        if part.name == "machine":
            hand_over(work, json_lines(one.get("output", "")))
        if rows.exists():
            one["rows"] = json_lines(rows.read_text())
        one["output"] = kept(one.get("output", ""))
        if one["status"] != "ok":
            print(one["output"][-SHOWN:], flush=True)
        if path is not None:
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps({"machine": about, "parts": before | found}, indent=1) + "\n")
            os.replace(scratch, path)
    print("\n".join(summary(about, found)))
    if path is not None:
        print(f"wrote {path}")
    return 0 if all(part["status"] in ("ok", "skipped") for part in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
