"""What an ablation's flows know of classes: measured at the end and along the training, kept, compared, tabled."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny_ablation import ALIGN, semantics_row, write_study

import biflow
from biflow import ablation, checkpoint, evaluate, train
from biflow.ablation import runner
from biflow.config import to_mapping
from biflow.data import DataConfig, load
from biflow.train import encoders, likelihood, self_supervised


@pytest.fixture
def study(tmp_path):
    return write_study(tmp_path)


def test_semantics_are_measured_along_the_training_and_compared_with_the_baseline(study, monkeypatch):
    out = study / "out"
    files = [semantics_row(study, "aligned", [ALIGN]), semantics_row(study, "plain")]
    decoded, decode = [], evaluate.decode_exact
    monkeypatch.setattr(evaluate, "decode_exact", lambda *a: decoded.append(a[3]) or decode(*a))
    results = ablation.run_ablation(files, out, seeds=(1,), progress=False)
    assert decoded == [0.0] * 6, "three points of two rows"
    result = results["aligned"][0]
    found = result["semantics"]
    assert [point["step"] for point in found["curve"]] == [2, 4, 6]
    assert [(p["block"], p["layer"], p["token_images"]) for p in found["probe"]] == [(0, 0, 120), (1, 0, 120)]
    last = {k: found["curve"][-1][k] for k in ("accuracy", "nll", "ece", "noisy_nats_per_dim")}
    noisy = found["noisy_classification"]
    assert last == {
        **{k: noisy[k] for k in ("accuracy", "nll", "ece")},
        "noisy_nats_per_dim": found["noisy_nats_per_dim"],
    }
    assert [s["guidance"] for s in result["samples"]] == [0.0, 1.0]
    assert found["curve"][-1]["frechet"] == result["samples"][0]["frechet"]
    text = (out / "table.md").read_text()
    assert text == ablation.table(results) + "\n" + ablation.semantics_table(results)
    assert ablation.run_ablation(files, out, seeds=(1,), progress=False) == results, "kept"
    semantics_row(study, "plain", classify_images=10)
    with pytest.raises(ValueError, match=r"semantics\.classify_images = 20, this configuration 10"):
        ablation.run_ablation(files[1:], out, seeds=(1,), progress=False)


def test_numbers_of_the_final_flow_are_those_of_the_library(study):
    out = study / "out"
    result = ablation.run_ablation([semantics_row(study, "aligned", [ALIGN])], out, seeds=(1,), progress=False)[
        "aligned"
    ][0]
    (run,) = (out / "flows").iterdir()
    flow, data = biflow.load(run / "model.safetensors"), load(DataConfig(source=str(study / "images.npz"), flip=True))
    rows = torch.arange(20) * len(data.val_x) // 20
    x, y = data.val_x.batch(rows), data.val_y[rows]
    own = {"generator": torch.Generator().manual_seed(0), "noise_draws": 2}
    want = evaluate.describe_classification(flow.classify(x, **own), y, "gradient")
    found = result["semantics"]
    assert found["noisy_classification"]["nll"] == pytest.approx(want["nll"], rel=1e-5)
    assert found["classification"]["nll"] == pytest.approx(
        evaluate.describe_classification(flow.classify(x), y, "gradient")["nll"], rel=1e-5
    )
    few = torch.arange(8) * 20 // 8
    bayes, gradient = flow.classify(x[few], rule="bayes"), flow.classify(x[few])
    assert found["bayes"]["count"] == 8
    assert found["bayes"]["accuracy"] == float((bayes.argmax(1) == y[few]).double().mean())
    assert found["bayes"]["agreement"] == float((bayes.argmax(1) == gradient.argmax(1)).double().mean())
    assert found["noisy_bayes"]["noise_draws"] == 2
    noisy = likelihood.add_noise(x, 0.1, None, torch.Generator().manual_seed(0))
    assert found["noisy_nats_per_dim"] == pytest.approx(
        float(train.likelihood_loss(flow, noisy, y)[0].detach()), rel=1e-5
    )
    assert re.fullmatch("[0-9a-f]{64}", result["judge_sha256"])


def test_alignment_is_measured_on_held_out_images_beside_its_floor(study):
    """As the run's own validation has it; the floor is of targets' means by position, which beat any other constant."""
    out = study / "out"
    result = ablation.run_ablation(
        [semantics_row(study, "aligned", [ALIGN], classify_images=999)], out, seeds=(1,), progress=False
    )["aligned"][0]
    (run,) = (out / "flows").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = next(line for line in reversed(lines) if line["split"] == "val")
    found = result["semantics"]["alignment"]
    assert found["cosine"] == pytest.approx(-validated["alignment"], abs=0.02), "another draw of the noise"
    (path,) = (out / "encoders").glob("*/encoder.safetensors")
    data = load(DataConfig(source=str(study / "images.npz"), flip=True))
    encoder, _ = encoders.build(train.EncoderConfig(weights=str(path)), data, 2, 0)
    seen, unseen = (encoder(images.batch()).double() for images in (data.train_x, data.val_x))
    mean = torch.nn.functional.normalize(seen.mean(0), dim=-1)
    assert found["floor"] == pytest.approx(float((unseen * mean).sum(-1).mean()), abs=1e-3)
    assert result["encoder"] == {"sha256": checkpoint.fingerprint(encoder, without=("weights",)), **encoder.known}
    assert result["prepare_seconds"].keys() == {"encoder", "features"}


def test_rows_and_seeds_share_an_encoder_and_its_features(study, monkeypatch):
    trained, train_encoder = [], self_supervised.train_encoder
    monkeypatch.setattr(self_supervised, "train_encoder", lambda *a, **k: trained.append(k) or train_encoder(*a, **k))
    forward = ALIGN.replace("features: [[-1, 0]]", "strategy: forward, features: [[-1, 0]]")
    own = ALIGN.replace(", seed: 0", "")
    files = [
        semantics_row(study, name, [setting], curve_samples=0, bayes_images=0)
        for name, setting in (("detach", ALIGN), ("forward", forward), ("own", own))
    ]
    results = ablation.run_ablation(files, study / "out", seeds=(1, 2), progress=False)
    assert [k["seed"] for k in trained] == [0, 1, 2], "one for the rows of seed 0, one a seed for those of the run's"
    assert len({path.name.rsplit("-", 1)[0] for path in (study / "out/features").glob("*.npy")}) == 3
    assert not list((study / "out/flows").glob("*/features"))
    sha = {name: [r["encoder"]["sha256"] for r in found] for name, found in results.items()}
    assert sha["detach"] == sha["forward"] == sha["detach"][:1] * 2
    assert len({*sha["own"], *sha["detach"]}) == 3
    assert results["detach"][0]["prepare_seconds"] == results["forward"][1]["prepare_seconds"], "of who did it"


def test_an_evaluation_that_was_cut_short_goes_on(study, monkeypatch):
    """A point of the curve that was measured before a kill is read; one of other settings is measured again."""
    out, file = study / "out", semantics_row(study, "plain")
    decoded, decode = [], evaluate.decode_exact

    def cut(*a):
        decoded.append(1)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return decode(*a)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "decode_exact", cut)
        with pytest.raises(KeyboardInterrupt):
            ablation.run_ablation([file], out, seeds=(1,), progress=False)
    decoded.clear()
    monkeypatch.setattr(evaluate, "decode_exact", lambda *a: decoded.append(1) or decode(*a))
    results = ablation.run_ablation([file], out, seeds=(1,), progress=False)
    assert len(decoded) == 1, "the last point"
    fresh = ablation.run_ablation([file], study / "fresh", seeds=(1,), progress=False)
    assert results["plain"][0]["semantics"] == fresh["plain"][0]["semantics"]
    (out / "results/plain-1.json").unlink()
    decoded.clear()
    semantics_row(study, "plain", noise_draws=1)
    ablation.run_ablation([file], out, seeds=(1,), progress=False)
    assert len(decoded) == 3


def test_a_checkpoint_that_a_signal_left_is_no_point_of_the_curve(study):
    out, file = study / "out", semantics_row(study, "plain")
    run = out / "flows" / runner._digest(ablation.read_row(file).training(1, [])[0])
    ablation.run_ablation([file], out, seeds=(1,), progress=False)
    (out / "results/plain-1.json").unlink()
    shutil.copytree(run / "checkpoints/step_00000004", run / "checkpoints/step_00000005")
    results = ablation.run_ablation([file], out, seeds=(1,), progress=False)
    assert [point["step"] for point in results["plain"][0]["semantics"]["curve"]] == [2, 4, 6]


def test_steps_to_reach():
    points = ((1, 9.0, 0.2), (2, None, 0.5), (3, 4.0, 0.4), (5, 2.0, 0.6))
    curve = [{"step": s, "frechet": f, "accuracy": a} for s, f, a in points]
    assert ablation.steps_to_reach(curve, 4.0, "frechet") == 3
    assert ablation.steps_to_reach(curve, 6.5, "frechet") == 2, "halfway"
    assert ablation.steps_to_reach(curve, 9.5, "frechet") == 1
    assert ablation.steps_to_reach(curve, 1.9, "frechet") is None
    assert ablation.steps_to_reach(curve, 0.45, "accuracy") == pytest.approx(3.5), "it did not last at 2"
    assert ablation.steps_to_reach(curve, 0.3, "accuracy") == pytest.approx(1 + 1 / 3)
    assert ablation.steps_to_reach(curve, None, "frechet") is None
    assert ablation.semantics_table({"a": [{"semantics_of": "none"}]}) == ""


def semantic_result(curve, representation=None, steps=4, **more):
    """As `run_ablation` wrote it before there were Bayes' rule, alignment and judges."""
    own = {"classification": {"accuracy": 0.5, "nll": 1.0}, "probe": [], "curve": curve}
    flow = {"representation": representation, "optim": {"steps": steps}}
    return [{"title": "r", "seed": 0, "configuration": {"flow": flow}, "semantics": own, **more}]


def curve_columns(results):
    """Column -> cells by row, of the table about curves."""
    lines = [line for line in ablation.semantics_table(results).split("\n\n") if "at the end" in line][-1].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines if line.startswith("|")]
    return {name: [row[index] for row in rows] for index, name in enumerate(head)}


def test_rows_are_compared_with_the_longest_run_without_alignment():
    def points(*frechet):
        return [{"step": 2 * k + 2, "frechet": f, "accuracy": 0.5} for k, f in enumerate(frechet)]

    aligned = {"strategy": "detach"}
    found = curve_columns(
        {
            "short": semantic_result(points(5.0), steps=2),
            "long": semantic_result(points(5.0, 3.0)),
            "empty": semantic_result([], aligned),
            "late": semantic_result(points(5.0, 4.0), aligned),
            "soon": semantic_result(points(3.5, 2.5), aligned),
        }
    )
    assert found["steps"] == ["2", "4", "4", "4", "4"]
    assert found["Frechet distance at the end"] == ["5", "3", "", "4", "2.5"]
    assert found["Frechet distance less the baseline's"] == ["2", "0", "", "1", "-0.5"]
    assert found["steps to the baseline's final Frechet distance"] == ["(1 of 1 never)", "4", "", "(1 of 1 never)", "3"]
    assert found["baseline's steps / own, Frechet distance, by seed"] == ["never", "1.00", "", "never", "1.33"]
    assert found["baseline's steps / own, accuracy, by seed"] == ["1.00", "1.00", "", "1.00", "1.00"]


def test_curves_of_different_judges_are_not_compared():
    point = [{"step": 2, "frechet": 3.0, "accuracy": 0.5}]
    results = {
        "plain": semantic_result(point, judge_sha256="a"),
        "other": semantic_result(point, {"strategy": "detach"}, judge_sha256="b"),
    }
    found = curve_columns(results)
    assert found["Frechet distance less the baseline's"] == ["0", "(1 of 1: another judge)"]
    assert found["steps to the baseline's final Frechet distance"] == ["2", "(1 of 1: another judge)"]
    assert found["baseline's steps / own, Frechet distance, by seed"] == ["1.00", ""]
    assert found["accuracy less the baseline's"] == ["0", "0"], "no judge is asked"


def test_rows_of_flowback_differ_in_the_alignment_and_the_steps_alone():
    folder = Path(__file__).parents[1] / "configs" / "flowback"
    trained = {path.stem: ablation.read_row(path).training(0, [])[0] for path in folder.glob("*.yaml")}
    plain = to_mapping(trained["baseline"])
    assert plain["representation"] is None
    assert set(trained) == {
        "baseline", "baseline_1000", "detach", "detach_1000", "detach_first", "forward", "forward_1000", "reverse_live",
    }  # fmt: skip
    for name, config in trained.items():
        steps = 1000 if name.endswith("_1000") else 2000
        found = {**to_mapping(config), "representation": None}
        assert found["optim"].pop("steps") == steps
        assert found == {**plain, "optim": {k: v for k, v in plain["optim"].items() if k != "steps"}}
    aligned = [c.representation for name, c in trained.items() if not name.startswith("baseline")]
    assert {own.strategy for own in aligned} == {"detach", "forward", "reverse"}
    assert len({own.encoder for own in aligned}) == 1, "one encoder for all rows"
    assert all(own.cache_features is True and own.encoder.seed is not None for own in aligned)
    for short in ("detach", "forward"):
        assert trained[f"{short}_1000"].representation == trained[short].representation
