"""`make gpu-check`, as far as it goes without a GPU: its measuring parts on tiny shapes, its bookkeeping."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as check  # noqa: E402


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_dry_run(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert set(found["parts"]) == {"limits", "kernels", "models"}
    assert {"device", "torch", "commit", "date", "packages"} <= set(found["machine"])
    items = {row["item"] for row in found["parts"]["models"]["rows"]}
    assert {"one-pass reverse B/2", "density B/2", "density TARFlow-64", "eager step B/2"} <= items
    ops = {row["op"] for row in found["parts"]["kernels"]["rows"]}
    assert {"affine_encode", "affine_decode backward", "attention_qkv", "add_norm", "gate swiglu"} <= ops
    for line in ("one-pass reverse B/2", "models       ok"):  # the table
        assert line in done.stdout


def test_unknown_part():
    done = run("--only", "kernel")
    assert done.returncode == 2
    assert "expected some of build, conformance, tests, machine, limits, kernels, models, sanitizer" in done.stderr


def part(*code, seconds=20):
    return check.Part("part", seconds, tuple((sys.executable, "-c", c) for c in code))


def test_a_part_that_fails_is_named_and_stops():
    found = check.run_part(part("print(1)", "import sys; print(2); sys.exit(3)", "print(4)"), 20)
    assert found["status"] == "failed"
    assert found["output"].split() == ["1", "2"]


def test_a_part_that_hangs_is_ended():
    found = check.run_part(part("import time; print(1, flush=True); time.sleep(60)"), 1)
    assert found["status"] == "timed out"
    assert found["output"].split() == ["1"]
    assert found["seconds"] < 30


def test_a_part_without_its_tool_is_skipped():
    found = check.run_part(check.Part("part", 9, (("no-such-tool", "x"),)), 9)
    assert found == {"status": "skipped", "seconds": 0.0, "output": "found no no-such-tool"}


def test_every_part_fits():
    """Limits of the parts leave the last ones some time; all of it ends within nine minutes."""
    assert check.SECONDS < 540
    every = check.parts(ROOT, None, dry=False)
    assert [p.name for p in every] == [
        "build", "conformance", "tests", "machine", "limits", "kernels", "models", "sanitizer",
    ]  # fmt: skip
    assert all(p.commands and 0 < p.seconds < check.SECONDS / 2 for p in every)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="found no nvcc")
@pytest.mark.parametrize("part", ["conformance", "machine"])
def test_programs_compile(part, tmp_path):
    """For a named architecture: a machine without a GPU has no native one."""
    (wanted,) = (p for p in check.parts(tmp_path, None, dry=False) if p.name == part)
    command = ["-arch=sm_90a" if word == "-arch=native" else word for word in wanted.commands[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
