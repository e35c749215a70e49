"""`make gpu-check`, as far as it goes without a GPU: its measuring parts on tiny shapes, its bookkeeping."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import __main__ as check  # noqa: E402
from benchmarks.gpu import measure  # noqa: E402
from benchmarks.gpu.limits import Case  # noqa: E402
from benchmarks.gpu.timing import Call, Timer  # noqa: E402
from benchmarks.gpu.tools import AGAIN, UNTIL, find, json_lines  # noqa: E402


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_dry_run(tmp_path):
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert set(found["parts"]) == {"limits", "decode", "models", "kernels", "training", "compiled"}
    assert {"device", "torch", "commit", "date", "packages"} <= set(found["machine"])
    items = {row["item"] for row in found["parts"]["models"]["rows"]}
    assert {"one-pass reverse B/2", "density B/2", "density TARFlow-64"} <= items
    decodes = found["parts"]["decode"]["rows"]
    assert {row["decode"] for row in decodes if "decode" in row} == {"S", "B/2", "TARFlow-64", "AFHQ"}
    assert {row["phases"] for row in decodes if "phases" in row} == {"B/2", "TARFlow-64"}
    timed = [row for row in decodes if "us_step" in row]
    assert len(timed) > 0.9 * len(decodes)  # all but what starts slowly, on a slow machine
    ops = {row["op"] for row in found["parts"]["kernels"]["rows"]}
    assert {"affine_encode", "affine_decode backward", "attention_qkv", "add_norm", "gate swiglu"} <= ops
    assert {"attention_qkv forward + backward", "alignment_error forward + backward"} <= ops
    assert all("error" in row for name in ("models", "kernels") for row in found["parts"][name]["rows"] if "us" in row)
    steps = found["parts"]["training"]["rows"]
    assert [row["item"].split(", ")[1] for row in steps] == ["flow B/2", "inverse B/2", "flow TARFlow-64"]
    assert all(min(row["ms_step"], row["images_s"], row["x_eager"], row["error"]) > 0 for row in steps)
    assert len([row for row in found["parts"]["compiled"]["rows"] if "x_compile" in row]) == 8
    assert not any("failed" in row for part in found["parts"].values() for row in part["rows"])
    for line in ("one-pass reverse B/2", "models       ok", "decode       ok"):  # the table
        assert line in done.stdout
    assert len(done.stdout.splitlines()) < 60


def test_unknown_part():
    done = run("--only", "kernel")
    assert done.returncode == 2
    assert (
        "expected some of build, conformance, tests, limits, machine, decode, models, kernels, training, memcheck, "
        "racecheck, compiled" in done.stderr
    )


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


def test_what_a_part_that_hangs_started_ends_with_it():
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{child}']); print(p.pid); p.wait()"
    found = check.run_part(part(code), 2)
    assert found["status"] == "timed out"
    for _ in range(100):  # the process that inherits it may take a moment to collect it
        try:
            state = Path(f"/proc/{int(found['output'])}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            break
        if state == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {found['output']} lives")


@pytest.mark.parametrize("dry", [False, True])
def test_rates_of_an_earlier_run_serve_a_run_of_some_parts(tmp_path, monkeypatch, dry):
    """limits are measured again, in the same run; the rates of machine.cu may be those that the file holds."""
    rows, seen = [{"number": "weights read by all", "mb": 1.0, "gb_s": 2.0}], []
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": {"machine": {"rows": rows}, "limits": {"rows": [1]}}}))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "facts", lambda *_: {"device": "gpu", "torch": "t", "commit": "c", "date": "now"})

    def run_part(part, seconds):
        work = tmp_path / "build" / "gpu-check"
        seen.append((part.name, json_lines((work / "machine.jsonl").read_text()), [p.name for p in work.iterdir()]))
        return {"status": "ok", "seconds": 1.0}

    monkeypatch.setattr(check, "run_part", run_part)
    monkeypatch.setattr(
        sys, "argv", ["gpu", "--only", "decode", "--out", str(tmp_path), *(["--dry-run"] if dry else [])]
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check.main() == 0
    assert seen == [("decode", rows, ["machine.jsonl"])]
    kept = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (set(kept), kept["machine"]["rows"]) == ({"machine", "limits", "decode"}, rows)


def test_a_part_has_what_the_later_ones_leave():
    """One that checks, and may hang, only if it is the last."""
    one, two = check.Part("one", 100, (("x", UNTIL),)), part(seconds=150)
    assert check.allowed(part(seconds=100), [two], 525) == 100
    assert check.allowed(part(seconds=100), [two], 60) == 60
    assert check.allowed(part(seconds=100), [], 525) == 525
    assert check.allowed(one, [two], 250) == 100
    assert check.allowed(one, [two], 200) == 100
    assert check.allowed(one, [two], 525) == 375
    assert check.allowed(one, [], 525) == 525
    assert check.allowed(one, [], 50) == 50


def test_a_command_knows_when_it_must_have_ended():
    code = "import sys, time; print(float(sys.argv[1]) - time.monotonic())"
    wanted = check.Part("part", 20, ((sys.executable, "-c", code, UNTIL),))
    left = float(check.run_part(wanted, 20)["output"])
    assert 5 < left < 17.5  # some are left to end in


def test_a_command_that_asks_for_it_is_run_again(tmp_path):
    count = (
        f"import pathlib, sys; p = pathlib.Path({str(tmp_path / 'n')!r}); n = len(p.read_text()) if p.exists() else 0"
    )
    code = f"{count}; p.write_text('x' * (n + 1)); print(n); sys.exit({AGAIN} if n < 2 else 0)"
    found = check.run_part(part(code, "print('next')"), 60)
    assert (found["status"], found["output"].split()) == ("ok", ["0", "1", "2", "next"])
    forever = check.run_part(part(f"import sys, time; time.sleep(0.2); sys.exit({AGAIN})"), 2)
    assert forever["status"] == "timed out"


ABOUT = {"device": "d", "torch": "t", "commit": "c", "date": "now"}
HANGS = """
import sys, time, pathlib, json
from benchmarks.gpu import measure
from benchmarks.gpu.limits import Case

def rows():
    return [{"us": 1.0}, {"us": 2.0}]

cases = [Case({"op": "a"}, rows), Case({"op": "b"}, lambda: time.sleep(60), limit=0.5), Case({"op": "c"}, rows)]
found = measure.measure(cases, pathlib.Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]))
print(json.dumps({"found": found}))
"""


def test_a_row_that_hangs_costs_itself_only(tmp_path):
    """The process ends, is started again, and goes on after it; rows before it are not measured twice."""
    path = tmp_path / "rows.jsonl"
    found = check.run_part(check.Part("part", 90, ((sys.executable, "-c", HANGS, str(path), "90"),)), 90)
    assert found["status"] == "ok", found["output"]
    a, b = [{"op": "a", "us": 1.0}, {"op": "a", "us": 2.0}], {"op": "b", "failed": "hung for 0.5 s"}
    rows = [*a, b, {"op": "c", "us": 1.0}, {"op": "c", "us": 2.0}]
    assert json_lines(path.read_text()) == rows
    assert json_lines(found["output"])[-1] == {"found": rows}  # also what the first process measured
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_that_is_late_is_no_failure(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = HANGS.replace("limit=0.5", "limit=60")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), "1"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json_lines(path.read_text())[-1] == {"op": "b", "left_out": "not through in the time left"}


def test_rows_without_time_are_left_out_and_named(tmp_path):
    def case(name, **options):
        return Case({"op": name, "batch": 1}, lambda: {"us": 1.0}, **options)

    until = time.monotonic() + 30
    rows = measure.measure([case("a", needs=60.0), case("b"), case("c", needs=5.0)], tmp_path / "rows.jsonl", until)
    assert rows[0] == {"op": "a", "batch": 1, "left_out": "no time left"}
    assert [row["us"] for row in rows[1:]] == [1.0, 1.0]
    late = measure.measure([case("d")], tmp_path / "late.jsonl", time.monotonic() - 1)
    lines = check.summary(ABOUT, {"p": {"status": "ok", "rows": rows + late}})
    assert lines[-1].split() == ["p", "ok", "0", "s", "2", "rows", "left", "out"]
    assert sum(line.split()[:1] in (["b"], ["c"]) for line in lines) == 2


def test_numbers_of_the_machine_are_told_from_failures():
    """Rows of machine.cu: barriers in microseconds, rates of the set that decides, and what could not be measured."""
    rows = [{"number": "grid barrier, release flag", "blocks": 132, "us": 0.9137}]
    rows += [{"number": "grid barrier, polled", "blocks": 132, "failed": "no such kernel"}]
    rows += [{"number": "weights read by all", "mb": mb, "blocks": 132, "gb_s": 5000} for mb in (28.4, 45.0)]
    lines = check.summary(ABOUT, {"machine": {"status": "failed", "rows": rows, "output": "launch: no\n"}})
    assert [line.split() for line in lines[2:7]] == [
        ["number", "blocks", "us"], ["grid", "barrier,", "release", "flag", "132", "0.9137"], [],
        ["number", "mb", "blocks", "gb_s"], ["weights", "read", "by", "all", "28.4", "132", "5000"],
    ]  # fmt: skip
    assert "failed: machine: grid barrier, polled: no such kernel" in lines
    assert lines[-1].split() == ["machine", "failed", "0", "s", "launch:", "no"]


def test_long_calls_are_timed_as_often_as_fits(monkeypatch):
    """Each from an idle device on."""
    timer, taken, waits = Timer(torch.device("cpu")), iter([0.2, 9.0, 0.3, 0.1, 0.2, 0.3]), []
    monkeypatch.setattr(timer, "_event", lambda call, cold: next(taken))
    assert timer.few(print) == 0.2
    timer.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    assert timer.few(print, seconds=2.0) == 9.0
    assert len(waits) == 1
    assert timer.few(print, seconds=2.0, most=3) == 0.2
    assert timer.few(print, seconds=0.5) == 0.3
    assert len(waits) == 1 + 3 + 1


def test_failures_before_the_end_of_the_output_are_kept():
    kept = check.kept("a FAILED test\nfine\n" + "x\n" * 4000 + "end")
    assert kept.startswith("a FAILED test\n")
    assert "fine" not in kept
    assert kept.endswith("end")


def test_an_unsupported_device_skips_the_part():
    found = check.run_part(part("import sys; print('Error: Device not supported'); sys.exit(1)"), 20)
    assert (found["status"], found["output"]) == ("skipped", "Device not supported")


def test_a_part_has_its_environment():
    wanted = check.Part("part", 20, ((sys.executable, "-c", "import os; print(os.environ['A'])"),), {"A": "b"})
    assert check.run_part(wanted, 20)["output"] == "b\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    done = run("--only", "build")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu-check: expected a CUDA device")
    assert len(done.stderr.splitlines()) == 1


def test_rows_survive_what_fails(tmp_path):
    timer, path = Timer(torch.device("cpu")), tmp_path / "rows.jsonl"

    def fails():
        raise ValueError("no such\nkernel")

    def compared():
        calls = {"ours": Call(lambda: None), "at once": Call(fails), "made": fails}
        return timer(calls, cold=True).row(lambda seconds: {"us": seconds})

    def later():
        assert len(json_lines(path.read_text())) == 2  # written as they are made
        return {"us": 1.0}

    cases = [Case({"op": name}, f) for name, f in (("a", fails), ("b", compared), ("c", later))]
    measure.measure(cases, path)
    with path.open("a") as file:
        file.write('{"op": "cut sh')
    a, b, c = json_lines(path.read_text())
    assert a == {"op": "a", "failed": "ValueError: no such kernel"}
    assert b["failed"] == "at once: ValueError: no such kernel; made: ValueError: no such kernel"
    assert set(b) == {"op", "us", "failed"}
    assert c == {"op": "c", "us": 1.0}
    lines = check.summary(ABOUT, {"p": {"status": "failed", "rows": [a, b, c]}})
    assert "failed: p: a: ValueError: no such kernel" in lines


def test_a_part_without_its_tool_is_skipped():
    found = check.run_part(check.Part("part", 9, (("no-such-tool", "x"),)), 9)
    assert found == {"status": "skipped", "seconds": 0.0, "output": "found no no-such-tool"}


def test_every_part_fits():
    """All of it ends within nine minutes."""
    assert check.SECONDS < 535
    every = check.parts(ROOT, None, dry=False)
    assert [p.name for p in every] == [
        "build", "conformance", "tests", "limits", "machine", "decode", "models", "kernels", "training", "memcheck",
        "racecheck", "compiled",
    ]  # fmt: skip
    assert sum(p.seconds for p in every[:6]) <= check.SECONDS  # what decides has its time in any case
    limits = {p.name: p.seconds for p in every}
    assert (limits["conformance"], limits["tests"]) <= (60, 100)
    for p in every:  # measuring parts end by themselves, with all rows in place
        assert any("benchmarks.gpu.measure" in c for c in p.commands) == any(UNTIL in c for c in p.commands)
    assert all(p.commands and 0 < p.seconds < check.SECONDS / 2 for p in every)


@pytest.mark.skipif(find("nvcc") is None, reason="found no nvcc")
@pytest.mark.parametrize("part", ["conformance", "machine"])
def test_programs_compile(part, tmp_path):
    """For a named architecture: a machine without a GPU has no native one."""
    (wanted,) = (p for p in check.parts(tmp_path, None, dry=False) if p.name == part)
    command = ["-arch=sm_90a" if word == "-arch=native" else word for word in wanted.commands[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
