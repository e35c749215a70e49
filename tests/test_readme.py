"""The README's code runs: its Python blocks as they stand, its `biflow` commands with tiny settings added."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()

# What makes a README command small, put after it.
SMALL = ["model.width=32", "model.head_dim=16", "model.num_blocks=2", "optim.steps=2", "optim.batch_size=8"]
SMALL += ["optim.warmup_steps=1", "run.tensorboard=false", "run.threads=1"]
TINY = {"train": SMALL, "distill": SMALL, "demo": ["--quick"], "bench": ["--quick"], "evaluate": ["--samples", "40"]}
TINY["calibrate"] = ["--batches", "1", "--repetitions", "1"]


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str = TEXT) -> list[list[str]]:
    """The arguments of every `biflow ...` line of the bash blocks, in order."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("biflow ")]


def test_readme_has_code_and_commands():
    """A README rewritten in another format must not make the tests below pass by running nothing."""
    assert len(blocks("python")) >= 2
    assert {c[0] for c in commands()} >= {
        "demo",
        "train",
        "distill",
        "compare",
        "sample",
        "calibrate",
        "evaluate",
        "classify",
        "probe",
        "info",
        "data",
        "bench",
        "inpaint",
        "edit",
        "interpolate",
    }


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)


@pytest.mark.slow
def test_biflow_commands_run(tmp_path):
    """In one folder and in order, since later commands read what earlier ones wrote."""
    for command, *arguments in commands():
        call = [command, *arguments, *TINY.get(command, [])]
        program = [sys.executable, "-c", "import sys; from biflow.cli import main; sys.exit(main())", *call]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ONE_THREAD)
        assert done.returncode == 0, f"biflow {shlex.join(call)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "samples.png").stat().st_size > 0


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
    assert ["demo", "--out", "runs/demo"] in commands()
    assert "biflow demo --out $(OUT)" in makefile


def test_commands_that_train_on_imagenet_do_it_on_a_gpu():
    """In the README, in docs/ and in what presets say of themselves; a training without it would be on the CPU."""
    found = []
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "biflow" / "presets").glob("*.yaml")):
        text = path.read_text().replace("\\\n", " ")
        found += [(path.name, line) for line in re.findall(r"biflow (?:train|distill) imagenet\d+_.*", text)]
    assert {"README.md", "latents.md", "distributed.md", "perceptual.md"} <= {name for name, _ in found}
    assert [each for each in found if "run.device=cuda" not in each[1]] == []


def test_readme_points_to_files_that_exist():
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    assert [link for link in links if not (ROOT / link).exists()] == []
