"""Ablations: rows trained and compared, kept and resumed."""

import json
from pathlib import Path

import pytest
import tiny_training
import yaml
from tiny_ablation import EVALUATION, write_study

from biflow import ablation, cli
from biflow.ablation import runner
from biflow.train import environment


@pytest.fixture
def study(tmp_path):
    """Two rows: the exact inverse, and a learned one of the same flow."""
    return write_study(tmp_path)


def rows(study):
    return [study / "exact.yaml", study / "learned.yaml"]


def test_rows_share_flows_and_seeds_make_a_spread(study, monkeypatch):
    trained = []
    train = runner.train_flow
    monkeypatch.setattr(runner, "train_flow", lambda c, out, **k: trained.append(out) or train(c, out, **k))
    out = study / "out"
    results = ablation.run_ablation(rows(study), out, seeds=(0, 1), progress=False)
    assert [[r["seed"] for r in results[name]] for name in ("exact", "learned")] == [[0, 1], [0, 1]]
    assert len(set(trained)) == 2, "one a seed"
    assert results["exact"][0]["held_out_bits_per_dim"] != results["exact"][1]["held_out_bits_per_dim"]
    assert {s["passes"] for s in results["exact"][0]["samples"]} == {2 * 3}
    assert {s["passes"] for s in results["learned"][0]["samples"]} == {1}
    shared = "held_out_bits_per_dim"  # of the flow, which both rows have
    assert [r[shared] for r in results["learned"]] == [r[shared] for r in results["exact"]]
    text = (out / "table.md").read_text()
    assert text == ablation.table(results)
    assert (out / "table.png").stat().st_size > 1000
    first = [s["frechet"] for r in results["learned"] for s in r["samples"] if s["guidance"] == 0]
    mean, spread = sum(first) / 2, abs(first[0] - first[1]) / 2**0.5
    assert f"{mean:.4g} ± {spread:.2g}" in text.split("\n")[3]


def test_what_is_finished_is_kept(study, monkeypatch):
    out = study / "out"
    want = ablation.run_ablation(rows(study), out, seeds=(0,), progress=False)
    monkeypatch.setattr(runner, "_evaluate", lambda *a: pytest.fail("computed again"))
    moved = study / "moved.npz"
    (study / "images.npz").rename(moved)  # where the data lies does not matter
    got = ablation.run_ablation(rows(study), out, seeds=(0,), settings=[f"data.source={moved}"], progress=False)
    assert got == want
    code = environment.own_git() or {}
    assert want["exact"][0]["environment"].get("commit") == code.get("commit")
    assert want["exact"][0]["environment"]["finished"].endswith("+00:00")
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


def test_a_call_with_fewer_rows_keeps_the_others_in_the_table(study):
    out = study / "out"
    ablation.run_ablation(rows(study), out, seeds=(0, 1), progress=False)
    whole = (out / "table.md").read_text()
    ablation.run_ablation(rows(study)[1:], out, seeds=(1,), progress=False)
    again = (out / "table.md").read_text()
    assert sorted(again.splitlines()) == sorted(whole.splitlines())
    assert "| exact | 2 |" in again


def test_a_run_that_diverges_is_told_of_and_the_others_go_on(study):
    row = yaml.safe_load((study / "exact.yaml").read_text())
    (study / "wild.yaml").write_text(yaml.safe_dump(row | {"title": "wild", "flow_settings": ["optim.lr=1e18"]}))
    files = [study / "wild.yaml", study / "exact.yaml"]
    results = ablation.run_ablation(files, study / "out", seeds=(0,), progress=False)
    assert results["wild"][0]["failed"].startswith("step ")
    text = (study / "out" / "table.md").read_text()
    assert "| exact | 1 |" in text
    assert f"- wild, seed 0: {results['wild'][0]['failed']}" in text
    assert "| wild |" not in text
    assert ablation.run_ablation(files, study / "out", seeds=(0,), progress=False) == results, "kept"


def test_settings_of_one_stage(study):
    settings = ["optim.lr=0.5", "flow.optim.lr=0.1", "inverse.optim.steps=5"]
    flow, inverse = ablation.read_row(study / "learned.yaml").training(0, settings)
    assert (flow.optim.lr, inverse.optim.lr) == (0.1, 0.5)
    assert inverse.optim.steps == 5 != flow.optim.steps


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
    digests = [runner._digest(flow) for flow, _ in stages]
    assert len(set(digests)) == 2, "all rows but the one without clip share a flow"


def test_bad_calls(study, capsys):
    with pytest.raises(ValueError, match="files of different names"):
        ablation.run_ablation([study / "exact.yaml", study / "exact.yaml"], study / "out")
    with pytest.raises(ValueError, match="seeds: expected at least one, each once, got"):
        ablation.run_ablation([study / "exact.yaml"], study / "out", seeds=(1, 1))
    assert cli.main(["ablate", str(study / "exact.yaml"), "--out", str(study / "out"), "--seeds", "a"]) == 2
    assert "--seeds: expected integers separated by commas, got 'a'" in capsys.readouterr().err


def test_results_in_the_repository_are_of_its_rows_as_they_are():
    """So that a table is filled over several sittings, and a row that is changed is noticed."""
    root = Path(__file__).parents[1]
    files = sorted((root / "benchmarks/ablations/fashion_mnist/results").glob("*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text())
        row = ablation.read_row(root / f"configs/ablations/{found['row']}.yaml")
        assert file.stem == f"{found['row']}-{found['seed']}"
        assert found["title"] == row.title
        want = runner._configuration(*row.training(found["seed"], []), row.evaluation)
        assert runner._with_defaults(found["configuration"]) == want


# --- orderings --------------------------------------------------------------------------------------------------------


def result(seed, **frechet_at):
    """A result with the given Frechet distances; g10 is that of guidance 1.0."""
    return {
        "seed": seed,
        "title": "t",
        "samples": [{"guidance": int(k[1:]) / 10, "frechet": v} for k, v in frechet_at.items()],
    }


@pytest.mark.parametrize(
    ("worse", "verdict"),
    [
        ([5.0, 7.0, 9.0], "holds"),  # differences 4, 4, 4
        ([1.5, 2.0, 7.0], "within noise"),  # 0.5, -1, 2
        ([0.0, 1.0, 3.0], "does not hold"),  # -1, -2, -2
        ([1.9, 5.0], "within noise"),  # 0.9, 2: two seeds say little
        ([5.0], "one seed"),
    ],
)
def test_an_ordering_is_judged_seed_by_seed(worse, verdict):
    results = {
        "a": [result(s, g0=v) for s, v in enumerate([1.0, 3.0, 5.0])],
        "b": [result(s, g0=v) for s, v in enumerate(worse)],
    }
    found = ablation.compare(ablation.Ordering(better="a", worse="b", source="s", guidance=0.0), results)
    assert found.verdict == verdict
    assert found.seeds == len(worse)
    want = [w - b for b, w in zip([1.0, 3.0, 5.0], worse, strict=False)]
    assert found.difference == pytest.approx(sum(want) / len(want))
    if len(want) > 1:
        mean = sum(want) / len(want)
        variance = sum((d - mean) ** 2 for d in want) / (len(want) - 1)
        quantile = {2: 12.706, 3: 4.3027}[len(want)]  # of Student's t, 97.5%, one degree of freedom less than seeds
        assert found.noise == pytest.approx(quantile * (variance / len(want)) ** 0.5, rel=1e-4)


def test_an_ordering_without_guidance_takes_each_rows_best():
    results = {"a": [result(0, g0=4.0, g10=2.0)], "b": [result(0, g0=3.0, g10=9.0)]}
    best = ablation.compare(ablation.Ordering(better="a", worse="b", source="s"), results)
    assert (best.better, best.worse, best.difference) == (2.0, 3.0, 1.0)
    fixed = ablation.compare(ablation.Ordering(better="a", worse="b", source="s", guidance=0.0), results)
    assert fixed.difference == -1.0


def test_an_ordering_that_results_lack_is_left_out():
    results = {"a": [result(0, g0=4.0)], "b": [result(1, g0=3.0)]}
    orderings = [
        ablation.Ordering(better="a", worse="b", source="no common seed", guidance=0.0),
        ablation.Ordering(better="a", worse="c", source="no such row", guidance=0.0),
        ablation.Ordering(better="a", worse="b", source="no such guidance", guidance=2.0),
    ]
    assert [ablation.compare(o, results) for o in orderings] == [None] * 3
    assert "no such row" not in ablation.orderings_table(results, orderings)


def test_the_table_has_the_orderings(study, capsys):
    file = study / "orderings.yaml"
    file.write_text("first: {better: learned, worse: exact, source: a paper, guidance: 1.0}\n")
    line = ["ablate", *map(str, rows(study)), "--out", str(study / "out"), "--seeds", "0", "--quiet"]
    assert cli.main([*line, "--orderings", str(file)]) == 0
    assert "| learned | exact | 1 |" in capsys.readouterr().out
    text = (study / "out" / "table.md").read_text()
    assert "| one seed | a paper |" in text
    assert "In all: 1 one seed." in text
    file.write_text("first: {better: learned, worse: learned, source: a paper}\n")
    assert cli.main([*line, "--orderings", str(file)]) == 2
    assert "expected two rows, got 'learned' twice" in capsys.readouterr().err


def test_the_orderings_of_the_repository_name_its_rows():
    folder = Path(__file__).parents[1] / "configs" / "ablations"
    orderings = ablation.read_orderings(folder / "base" / "orderings.yaml")
    assert len(orderings) >= 9
    for ordering in orderings:
        for name in (ordering.better, ordering.worse):
            row = ablation.read_row(folder / f"{name}.yaml")
            assert ordering.guidance is None or ordering.guidance in row.evaluation.guidances


def test_rows_that_differ_in_evaluation_share_the_inverse(study, monkeypatch):
    noisy = yaml.safe_load((study / "learned.yaml").read_text())
    noisy["evaluation"] = EVALUATION | {"guidances": [0.0]}
    (study / "other.yaml").write_text(yaml.safe_dump(noisy))
    trained, train = [], runner.train_inverse
    monkeypatch.setattr(runner, "train_inverse", lambda c, f, out, **k: trained.append(out) or train(c, f, out, **k))
    files = [study / "learned.yaml", study / "other.yaml"]
    results = ablation.run_ablation(files, study / "out", seeds=(0,), progress=False)
    assert len(trained) == 2
    assert len(set(trained)) == 1
    assert results["learned"][0]["samples"][0] == results["other"][0]["samples"][0]


def test_runs_keep_their_folder():
    """Those from before alignment and encoded data, under the names that they had then; whoever decodes the images."""
    flow, inverse = tiny_training.flow_config("images.npz"), tiny_training.inverse_config("images.npz")
    assert (runner._digest(flow), runner._digest(flow, inverse)) == ("4974d37e405a", "a8ba2fadd725")
    assert runner._digest(tiny_training.changed(flow, "data", workers=2, index="a.npz")) == "4974d37e405a"
    for field, value in (("crop", "random"), ("exclude", "bad.txt"), ("posterior", "mean"), ("seed", 1)):
        assert runner._digest(tiny_training.changed(flow, "data", **{field: value})) != "4974d37e405a"
    assert runner._digest(tiny_training.changed(flow, "run", compile=True)) != "4974d37e405a"
