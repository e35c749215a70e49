"""`biflow compare`: what differs between runs, and what came out."""

import json
import re
import shutil

import pytest
from tiny_training import changed, flow_config, inverse_config, random_flow, write_images

from biflow import cli, compare, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two flows, with other rates and other steps, in folder/a and folder/b, and an inverse."""
    folder = tmp_path_factory.mktemp("runs")
    images = write_images(folder / "images.npz")
    a = flow_config(images, steps=12, every=2, keep=1, peak_flops=1e9)
    train.train_flow(a, folder / "a", progress=False)
    b = changed(flow_config(images, steps=9, every=3, keep=1), "optim", lr=1e-3)
    train.train_flow(b, folder / "b", progress=False)
    flow = random_flow(a.model)
    train.train_inverse(inverse_config(images, steps=2, every=1), flow, folder / "inverse", progress=False)
    return folder


@pytest.fixture
def copies(runs, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(runs / name, tmp_path / name)
    return tmp_path


def lines(out, split):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in found if line["split"] == split}


def test_only_what_differs_is_there(runs):
    found = compare.compare([runs / "a", runs / "b"])
    assert found["configuration"] == {
        "optim.steps": [12, 9],
        "optim.lr": [3e-3, 1e-3],
        "run.log_every": [2, 3],
        "run.validate_every": [2, 3],
        "run.checkpoint_every": [2, 3],
        "run.peak_flops": [1e9, None],
    }
    assert found["environment"] == {}
    assert found["stage"] == "flow"


def test_results_and_equal_steps(runs):
    found = compare.compare([runs / "a", runs / "b"])
    a, b = found["runs"]
    val, other = lines(runs / "a", "val"), lines(runs / "b", "val")
    assert (a["name"], a["step"], a["steps"], b["step"], b["steps"]) == ("a", 12, 12, 9, 9)
    assert a["val"]["loss"] == val[12]["loss"]
    assert b["best"]["loss"] == min(line["loss"] for line in other.values())
    assert a["step_seconds"] > 0
    assert (a["mfu"] > 0, b["mfu"]) == (True, None)
    common = found["at_equal_steps"]["val"]
    assert common["step"] == [6]
    assert common["loss"] == [[val[6]["loss"]], [other[6]["loss"]]]
    assert not {"seconds", "step_seconds"} & found["at_equal_steps"]["train"].keys()
    assert {"loss", "lr", "grad_norm"} <= found["at_equal_steps"]["train"].keys()


def test_a_run_that_is_going_on(copies):
    """Half a line at the end, no held-out loss yet, or nothing at all."""
    file = copies / "b" / "metrics.jsonl"
    kept = [line for line in file.read_text().splitlines() if json.loads(line)["step"] == 3]
    file.write_text(kept[0] + "\n" + '{"step": 6, "split": "tr')
    found = compare.compare([copies / "a", copies / "b"])
    assert found["runs"][1]["step"] == 3
    assert found["runs"][1]["val"] is found["runs"][1]["best"] is None
    assert found["at_equal_steps"]["val"]["step"] == []
    compare.table(found)
    file.unlink()
    (copies / "b" / "environment.json").unlink()  # of an older version
    found = compare.compare([copies / "a", copies / "b"])
    assert (found["runs"][1]["step"], found["runs"][1]["train"]) == (0, None)
    assert found["environment"]["torch"][1] is None
    compare.table(found)


def test_other_environments_and_losses_that_are_not_finite(copies):
    path = copies / "b" / "environment.json"
    entries = json.loads(path.read_text())
    entries[-1]["packages"]["numpy"] = "1.0"
    entries[-1]["started"] = "another time"
    path.write_text(json.dumps(entries))
    file = copies / "b" / "metrics.jsonl"
    values = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**v, "loss": None} if v["split"] == "val" else v) + "\n" for v in values))
    found = compare.compare([copies / "a", copies / "b"])
    assert list(found["environment"]) == ["packages.numpy"]
    assert found["runs"][1]["best"] is None
    (last,) = [line.split() for line in compare.table(found) if line.startswith("  held-out loss, last")]
    assert last[-1] == "-"


def test_runs_of_one_name_are_told_apart(runs, copies):
    found = compare.compare([runs / "a", copies / "a"])
    assert [run["name"] for run in found["runs"]] == [f"{runs.name}/a", f"{copies.name}/a"]
    text = "\n".join(compare.table(found))
    assert "configuration: the same" in text
    assert "environment: the same" in text


def test_the_command(runs, tmp_path, capsys):
    out, plot = tmp_path / "compare.json", tmp_path / "compare.png"
    files = ["--json", str(out), "--plot", str(plot)]
    assert cli.main(["compare", f"{runs}/a", f"{runs}/b", *files]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert ["a", "b"] in rows
    assert ["optim.lr", "0.003", "0.001"] in rows
    assert ["step", "12", "of", "12", "9", "of", "9"] in rows
    assert "optim.batch_size" not in text
    assert json.loads(out.read_text()) == json.loads(json.dumps(compare.compare([runs / "a", runs / "b"])))
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a"], "expected at least two folders, got 1"),
        (["a", "a"], "expected each folder once"),
        (["a", "inverse"], r"expected one stage, since their losses are different quantities, got .*\(inverse\)"),
        (["a", "."], "expected the folder of a run, found no config.yaml"),
    ],
)
def test_what_cannot_be_compared(names, reason, runs, capsys):
    assert cli.main(["compare", *(f"{runs}/{name}" for name in names)]) == 2
    assert re.search(reason, capsys.readouterr().err)
