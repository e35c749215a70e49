"""Ablations: rows trained and compared, kept and resumed."""

import json
from pathlib import Path

import pytest
import tiny_training
import yaml

from biflow import ablation, cli
from biflow.config import to_mapping

EVALUATION = dict(samples=60, guidances=[0.0, 1.0], judge_steps=20, batch_size=60, noise_draws=1)


@pytest.fixture
def study(tmp_path):
    """Two rows: the exact inverse, and a learned one of the same flow."""
    data = tiny_training.write_images(tmp_path / "images.npz", count=400)
    for stage, config in (
        ("flow", tiny_training.flow_config(data, 6, 3)),
        ("inverse", tiny_training.inverse_config(data, 6, 3)),
    ):
        (tmp_path / f"{stage}.yaml").write_text(yaml.safe_dump({"stage": stage, **to_mapping(config)}))
    exact = dict(title="exact", flow="flow.yaml", evaluation=EVALUATION)
    learned = exact | dict(title="learned", inverse="inverse.yaml")
    for name, row in (("exact", exact), ("learned", learned)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(row))
    return tmp_path


def rows(study):
    return [study / "exact.yaml", study / "learned.yaml"]


def test_rows_share_flows_and_seeds_make_a_spread(study, monkeypatch):
    trained = []
    train = ablation.train_flow
    monkeypatch.setattr(ablation, "train_flow", lambda c, out, **k: trained.append(out) or train(c, out, **k))
    out = study / "out"
    results = ablation.run_ablation(rows(study), out, seeds=(0, 1), progress=False)
    assert [[r["seed"] for r in results[name]] for name in ("exact", "learned")] == [[0, 1], [0, 1]]
    assert len(set(trained)) == 2, "one a seed"
    assert results["exact"][0]["held_out_bits_per_dim"] != results["exact"][1]["held_out_bits_per_dim"]
    assert results["exact"][0]["passes"] == 2 * 3
    assert results["learned"][0]["passes"] == 1
    text = (out / "table.md").read_text()
    assert text == ablation.table(results)
    assert (out / "table.png").stat().st_size > 1000
    first = [s["frechet"] for r in results["learned"] for s in r["samples"] if s["guidance"] == 0]
    mean, spread = sum(first) / 2, abs(first[0] - first[1]) / 2**0.5
    assert f"{mean:.4g} ± {spread:.2g}" in text.split("\n")[3]


def test_what_is_finished_is_kept(study, monkeypatch):
    out = study / "out"
    want = ablation.run_ablation(rows(study), out, seeds=(0,), progress=False)
    monkeypatch.setattr(ablation, "_evaluate", lambda *a: pytest.fail("computed again"))
    moved = study / "moved.npz"
    (study / "images.npz").rename(moved)  # where the data lies does not matter
    got = ablation.run_ablation(rows(study), out, seeds=(0,), settings=[f"data.source={moved}"], progress=False)
    assert got == want
    with pytest.raises(ValueError, match=r"learned-0.json: .*inverse.optim.lr|exact-0.json: .*flow.optim.lr = 0.003"):
        ablation.run_ablation(rows(study), out, seeds=(0,), settings=["optim.lr=0.1"], progress=False)


def test_an_older_result_has_the_defaults_of_newer_fields(study):
    out = study / "out"
    want = ablation.run_ablation(rows(study)[:1], out, seeds=(0,), progress=False)
    file = out / "results" / "exact-0.json"
    result = json.loads(file.read_text())
    del result["configuration"]["evaluation"]["denoise"]
    file.write_text(json.dumps(result))
    assert ablation.run_ablation(rows(study)[:1], out, seeds=(0,), progress=False)["exact"] != want["exact"]


def test_command(study, capsys):
    line = ["ablate", *map(str, rows(study)), "--out", str(study / "out"), "--seeds", "3", "--quiet"]
    assert cli.main([*line, "--set", "optim.steps=4", "--data", str(study / "images.npz")]) == 0
    out = capsys.readouterr().out
    assert "| exact | 1 |" in out
    assert "| learned | 1 |" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": 3}, "title: expected str"),
        ({"flow": "nothing"}, "expected a .yaml file or a preset"),
        ({"inverse_settings": ["optim.lr=1"]}, "inverse_settings: expected none without inverse"),
        ({"colour": "red"}, "unknown field 'colour'"),
    ],
)
def test_bad_rows(study, change, message):
    file = study / "exact.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises((ValueError, TypeError), match=message):
        ablation.run_ablation([file], study / "out", progress=False)


def test_the_rows_of_the_repository_can_be_read():
    files = sorted((Path(__file__).parents[1] / "configs" / "ablations").glob("*.yaml"))
    assert len(files) >= 10
    stages = [ablation.read_row(file).training(7, []) for file in files]
    assert sum(inverse is None for _, inverse in stages) == 1, "the exact inverse"
    assert {flow.run.seed for flow, _ in stages} == {7}
    digests = [ablation._digest(flow) for flow, _ in stages]
    assert len(set(digests)) == 2, "all rows but the one without clip share a flow"


def test_bad_calls(study, capsys):
    with pytest.raises(ValueError, match="files of different names"):
        ablation.run_ablation([study / "exact.yaml", study / "exact.yaml"], study / "out")
    with pytest.raises(ValueError, match="seeds: expected at least one, each once, got"):
        ablation.run_ablation([study / "exact.yaml"], study / "out", seeds=(1, 1))
    assert cli.main(["ablate", str(study / "exact.yaml"), "--out", str(study / "out"), "--seeds", "a"]) == 2
    assert "--seeds: expected integers separated by commas, got 'a'" in capsys.readouterr().err
