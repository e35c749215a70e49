"""`biflow calibrate`: what it measures, prints and writes, and what it refuses."""

import re

import pytest
import torch
import yaml
from tiny import make_flow, make_reverse

import biflow
from biflow import checkpoint, cli
from biflow.models.layers import device_name

LONG = {"img_size": 10, "num_blocks": 1}  # 25 tokens: windows of 16 only


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.safetensors"
    biflow.save(make_flow(num_classes=3, **LONG), path, {"step": 3})
    return path


def test_the_command_writes_into_the_file(model, capsys):
    before = biflow.load(model)
    line = ["calibrate", str(model), "--batches", "1,2", "--repetitions", "1"]
    assert cli.main([*line, "--guidance", "0", "--guidance", "1"]) == 0
    captured = capsys.readouterr()
    after = biflow.load(model)
    situations = [(p, batch, g) for p in ("bf16", "fp32") for batch in (1, 2) for g in (0, 1)]
    assert [(e.precision, e.batch, e.guidance) for e in after.policy.entries] == situations
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert checkpoint.describe(model)["metadata"]["step"] == 3
    rows = captured.out.splitlines()
    words = "device threads precision batch guidance tol block solver window passes ms on"
    assert rows[0].split() == words.split()
    assert [row.split()[:7] for row in rows[1:-1]] == [
        ["cpu", str(torch.get_num_threads()), p, str(n), str(g), "1e-05", "0"] for p, n, g in situations
    ]
    assert all(row.endswith(device_name(torch.device("cpu"))) for row in rows[1:-1])
    assert rows[-1] == f"{model}: calibrated"
    assert "calibrate: 100%" in captured.err
    assert cli.main(["info", str(model)]) == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["metadata"] == {"step": 3}
    assert [(e["batch"], len(e["blocks"])) for e in found["policy"]] == [(n, 1) for _, n, _ in situations]
    assert re.fullmatch(r"(sequential|jacobi|windowed 16), \d+ passes, [\d.e+-]+ ms", found["policy"][0]["blocks"][0])
    assert cli.main([*line, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert len(biflow.load(model).policy.entries) == 8, "calibrated again, with the guided ones kept"


def test_the_temperature_of_the_unconditional_pass_is_measured_with(tmp_path, capsys):
    model = tmp_path / "plain.safetensors"  # without classes guidance acts through it alone
    biflow.save(make_flow(), model)
    line = ["calibrate", str(model), "--batches", "1", "--precision", "fp32", "--repetitions", "1", "--quiet"]
    assert cli.main([*line, "--guidance", "1", "--attn-temp", "1.5"]) == 0
    assert {e.guidance for e in biflow.load(model).policy.entries} == {1.0}
    assert cli.main([*line, "--guidance", "1"]) == 2
    assert "attn_temp other than 1" in capsys.readouterr().err


def test_the_command_writes_elsewhere(model, tmp_path):
    before = model.read_bytes()
    out = tmp_path / "other.safetensors"
    line = ["calibrate", str(model), "--batches", "1", "--precision", "fp32", "--repetitions", "1", "--quiet"]
    assert cli.main([*line, "--out", str(out)]) == 0
    assert model.read_bytes() == before
    assert len(biflow.load(out).policy.entries) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batches 1,many", "--batches: expected numbers separated by commas, got '1,many'"),
        ("--batches 0", "batches: expected at least 1, got 0"),
        ("--precision fp32,fp8", "precision: expected one of fp32, bf16, got 'fp8'"),
        ("--guidance=-1", "guidance: expected a finite number >= 0, got -1"),
        ("--tol 0", "tol: expected a finite number > 0, got 0"),
        ("--device cuda:99", "device: expected"),
        ("--device abacus", "device: expected 'cpu'"),
        ("--out nowhere/m.safetensors", "--out: expected an existing folder, got nowhere"),
    ],
)
def test_the_command_refuses(options, message, model, capsys):
    before = model.read_bytes()
    assert cli.main(["calibrate", str(model), *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert model.read_bytes() == before


def test_the_command_measures_where_it_is_told(model, monkeypatch, capsys):
    line = ["calibrate", str(model), "--batches", "1", "--precision", "fp32", "--repetitions", "1", "--quiet"]
    assert cli.main([*line, "--device", "cpu"]) == 0
    assert {e.device for e in biflow.load(model).policy.entries} == {"cpu"}
    moved = []

    def load(path, device):
        moved.append(device)
        raise ValueError("far enough")

    monkeypatch.setattr("biflow.ops._checks.local_device", torch.device)
    monkeypatch.setattr(checkpoint, "load", load)
    assert cli.main([*line, "--device", "cuda:1"]) == 2
    assert moved == [torch.device("cuda", 1)]
    assert "far enough" in capsys.readouterr().err


def test_the_command_takes_flows_only(tmp_path, capsys):
    biflow.save(make_reverse(), tmp_path / "m.safetensors")
    assert cli.main(["calibrate", str(tmp_path / "m.safetensors")]) == 2
    assert "expected a TarFlow, got a BiFlow" in capsys.readouterr().err
