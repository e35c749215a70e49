"""`biflow classify`: what it prints is what the model says of the right images, and wrong use is one line."""

import json

import numpy as np
import pytest
import torch

import biflow
from biflow import cli, evaluate

TINY = [
    "model.width=16", "model.head_dim=8", "model.num_blocks=2", "model.layers_per_block=1", "optim.steps=80",
    "optim.batch_size=32", "optim.lr=1e-2", "optim.ema=0", "run.tensorboard=false", "run.threads=1", "--quiet",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify") / "flow"
    assert cli.main(["train", "digits_flow", *TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def held_out():
    data = biflow.data.load(biflow.data.DataConfig())
    return data.val_x.batch(), data.val_y


def report(capsys, *words):
    capsys.readouterr()
    assert cli.main(["classify", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_both_rules_on_held_out_images(run, held_out, capsys):
    x, y = held_out
    flow = biflow.load(run / "model.safetensors")
    found = report(capsys, run, "--rule", "both", "--top-k", 3)
    assert (found["images"], found["held_out"], found["noise_draws"]) == (len(y), True, 0)
    scores = {rule: flow.classify(x, rule=rule) for rule in ("gradient", "bayes")}
    for rule in scores:
        want = evaluate.describe_classification(scores[rule], y, rule, 3)
        assert {k: found[rule][k] for k in want} == want
        assert sum(found[rule]["predicted"]) == len(y)
        assert found[rule]["seconds"] > 0
    assert found["agreement"] == float((scores["gradient"].argmax(1) == scores["bayes"].argmax(1)).double().mean())
    assert found["bayes"]["accuracy"] > 0.2, "even a flow trained for seconds beats chance"


def test_noise_and_the_number_of_images(run, held_out, capsys):
    x, y = held_out
    rows = torch.arange(20) * len(x) // 20
    flow = biflow.load(run / "model.safetensors")
    found = report(capsys, run, "--n", 20, "--noise-draws", 2, "--seed", 3, "--batch-size", 7)
    scores = flow.classify(x[rows], noise_draws=2, generator=torch.Generator().manual_seed(3))
    assert (found["images"], list(found)) == (20, ["images", "held_out", "noise_draws", "gradient"])
    assert found["gradient"]["nll"] == pytest.approx(
        evaluate.describe_classification(scores, y[rows], "gradient")["nll"], rel=1e-4
    )


def test_images_without_labels_are_classified_into_a_file(run, held_out, capsys, tmp_path):
    x = held_out[0][:12]
    np.savez(tmp_path / "images.npz", images=x.permute(0, 2, 3, 1).numpy())
    out = tmp_path / "labels.npz"
    found = report(capsys, run, "--data", tmp_path / "images.npz", "--top-k", 4, "--out", out)
    assert "accuracy" not in found["gradient"]
    written = np.load(out)
    assert written["labels"].shape == (found["images"], 4)
    assert written["scores"].shape == (found["images"], 10)
    np.testing.assert_array_equal(written["labels"][:, 0], written["scores"].argmax(1))


BAD = {
    "rule": ("{run} --rule odds", "--rule: expected one of gradient, bayes, both, got 'odds'"),
    "file of another kind": ("{run} --out labels.json", "--out: expected a file ending in .npz"),
    "a file of both": ("{run} --rule both --out labels.npz", "one rule; got 'labels.npz' with --rule both"),
    "file nowhere": ("{run} --out {tmp}/none/labels.npz", "--out: expected an existing folder"),
    "no flow": ("{tmp}/inverse.safetensors", "expected a TarFlow, got a BiFlow"),
    "no classes": ("{tmp}/plain.safetensors --data digits", "expected a model with classes"),
    "no such data": ("{run} --data none.npz", "none.npz: no such file"),
    "no such device": ("{run} --device abacus", "device: expected 'cpu'"),
}


@pytest.mark.parametrize(("line", "message"), BAD.values(), ids=BAD.keys())
def test_wrong_use_is_one_line(line, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"img_size": 8, "in_channels": 1, "width": 16, "head_dim": 8, "num_blocks": 1}
    biflow.save(biflow.BiFlow(biflow.BiFlowConfig(**small)), tmp_path / "inverse.safetensors")
    biflow.save(biflow.TarFlow(biflow.TarFlowConfig(**small)), tmp_path / "plain.safetensors")
    capsys.readouterr()
    assert cli.main(["classify", *[word.format(run=run, tmp=tmp_path) for word in line.split()]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("biflow: ")
