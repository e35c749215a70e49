"""Linear probes: of data that a line separates and of noise, of a flow's layers, on the command line."""

import json
import sys

import numpy as np
import pytest
import torch
from tiny_training import flow_config, random_flow, write_images

import biflow
from biflow import cli
from biflow.data import load
from biflow.evaluate import ProbeConfig, linear_probe, probe_flow
from biflow.evaluate.probe import TOKEN_SEED, layer_features


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", count=200)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "flow"
    biflow.train.train_flow(flow_config(images, steps=20), out, progress=False)
    return out


def points(count, seed):
    """Three classes that lines separate, in a space with a constant and a very large column."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = torch.randn(count, 4, generator=g) + 12 * torch.nn.functional.one_hot(y, 4)
    return torch.cat([x, torch.ones(count, 1), 1e6 * torch.randn(count, 1, generator=g)], 1), y


def test_separable_classes_are_told_apart_and_noise_is_not():
    (x, y), (val, val_y) = points(300, 0), points(150, 1)
    found = linear_probe(x, y, val, val_y)
    assert (found["accuracy"], found["train_accuracy"], found["images"], found["converged"]) == (1.0, 1.0, 300, True)
    noise = linear_probe(torch.randn(300, 4), y, torch.randn(3000, 4), torch.arange(3000) % 3)
    assert abs(noise["accuracy"] - 1 / 3) < 0.1
    assert not linear_probe(x, y, val, val_y, penalty=1e6, iterations=1)["converged"]


def test_standardising_is_by_the_training_features():
    """Against scikit-learn's own pipeline."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 5, generator=g) * 3 + 1, torch.arange(200) % 2
    x[:, 0] += y
    val, val_y = x[100:] - 1, y[100:]
    want = make_pipeline(StandardScaler(), LogisticRegression(C=0.5)).fit(x[:100].double(), y[:100])
    assert linear_probe(x[:100], y[:100], val, val_y, 0.5)["accuracy"] == want.score(val.double(), val_y)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(train_y=torch.zeros(9, dtype=torch.int64)), "expected at least two classes, got"),
        (dict(val_y=torch.arange(2)), "val: expected as many features as labels, at least 1; got 3 and 2"),
        (dict(val=torch.zeros(3, 5)), "val: expected 2 features as in train, got 5"),
        (dict(train=torch.full((9, 2), float("nan"))), "train: expected finite features"),
    ],
)
def test_bad_features(change, reason):
    given = dict(train=torch.zeros(9, 2), train_y=torch.arange(9) % 2, val=torch.zeros(3, 2), val_y=torch.arange(3) % 2)
    with pytest.raises(ValueError, match=reason):
        linear_probe(**{**given, **change})


def test_features_are_means_over_tokens_without_a_label(images):
    data = load(flow_config(images).data)
    flow = random_flow(flow_config(images).model)
    rows = torch.tensor([5, 0, 7])
    found, _ = layer_features(flow, data.train_x, rows, [(1, 0), (0, 0)], batch_size=2)
    x = data.train_x.batch(rows)
    want = flow.encode(x, features=[(1, 0)])[-1][1, 0].mean(1)
    torch.testing.assert_close(found[1, 0], want.detach())
    assert list(found) == [(1, 0), (0, 0)]
    labelled = flow.encode(x, data.train_y[rows], features=[(1, 0)])[-1][1, 0].mean(1)
    assert not torch.allclose(found[1, 0], labelled, atol=1e-3), "a label would have been told"


def test_probe_flow_is_the_probe_of_every_layer(images):
    data = load(flow_config(images).data)
    flow = random_flow(flow_config(images).model)
    config = ProbeConfig(train_images=50, held_out_images=10, batch_size=16)
    seen = []
    found = probe_flow(flow, data, config=config, progress=seen.append)
    assert [(row["block"], row["layer"]) for row in found] == [(0, 0), (1, 0)]
    assert sum(seen) == 60
    rows, val = torch.arange(50) * len(data.train_x) // 50, torch.arange(10) * len(data.val_x) // 10
    x = layer_features(flow, data.train_x, rows, [(1, 0)], 16)[0][1, 0]
    v = layer_features(flow, data.val_x, val, [(1, 0)], 16)[0][1, 0]
    want = linear_probe(x, data.train_y[rows], v, data.val_y[val])
    assert {k: found[1][k] for k in want} == want
    assert found[1]["images"] == 50


def test_single_tokens_are_probed_image_by_image(images):
    """The first token of each image says nothing of a label that its other tokens tell, and no label leaks across."""
    data = load(flow_config(images).data)
    flow = random_flow(flow_config(images).model)
    config = ProbeConfig(train_images=50, held_out_images=10, tokens=3, batch_size=16)
    found = probe_flow(flow, data, [(1, 0)], config)[0]
    plain = probe_flow(flow, data, [(1, 0)], ProbeConfig(train_images=50, held_out_images=10, batch_size=16))[0]
    assert {name: found[name] for name in plain} == plain, "the pooled probe is the same"
    assert (found["images"], found["token_images"]) == (50, 150)
    g = torch.Generator().manual_seed(TOKEN_SEED)
    sides = []
    for source, labels, count in ((data.train_x, data.train_y, 50), (data.val_x, data.val_y, 10)):
        rows = torch.arange(count) * len(source) // count
        h = flow.encode(source.batch(rows), features=[(1, 0)])[-1][1, 0].detach()
        chosen = torch.rand(count, 4, generator=g).argsort(1)[:, :3]
        assert all(len(set(row)) == 3 for row in chosen.tolist())
        sides += [h[torch.arange(count)[:, None], chosen].reshape(3 * count, -1), labels[rows].repeat_interleave(3)]
    want = linear_probe(*sides)
    assert {name: found[f"token_{name}"] for name in want} == want
    assert found["token_accuracy"] != found["accuracy"]


def test_more_tokens_than_there_are_is_all_of_them(images):
    flow, data = random_flow(flow_config(images).model), load(flow_config(images).data)
    config = ProbeConfig(train_images=20, held_out_images=10, tokens=99)
    assert probe_flow(flow, data, [(0, 0)], config)[0]["token_images"] == 20 * 4
    with pytest.raises(ValueError, match="tokens: expected at least 0, got -1"):
        ProbeConfig(tokens=-1)


def test_data_without_labels_and_a_missing_library(images, tmp_path, monkeypatch):
    flow = random_flow(flow_config(images).model)
    np.savez(tmp_path / "plain.npz", images=np.load(images)["images"])
    with pytest.raises(ValueError, match="expected labelled images, some of them held out, to probe with; got none"):
        probe_flow(flow, load(flow_config(tmp_path / "plain.npz").data))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"expected scikit-learn for a linear probe .*pip install 'biflow\[train\]'"):
        probe_flow(flow, load(flow_config(images).data))


def test_the_command_prints_a_table_and_writes_json(run, images, tmp_path, capsys):
    out = tmp_path / "probe.json"
    assert cli.main(["probe", str(run), "--train", "60", "--json", str(out), "--quiet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text())
    flow, data = biflow.load(run / "model.safetensors"), load(flow_config(images).data)
    assert found["probe"] == probe_flow(flow, data, config=ProbeConfig(train_images=60))
    assert found["train"] == 60
    assert lines[0] == "| block | layer | held-out accuracy | training accuracy |"
    assert lines[2].startswith(f"| 0 | 0 | {found['probe'][0]['accuracy']:.4f} |")
    assert len(lines) == 4
    assert cli.main(["probe", str(run), "--features", "1:0", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["probe", str(run), "--train", "60", "--tokens", "2", "--json", str(out), "--quiet"]) == 0
    lines, found = capsys.readouterr().out.splitlines(), json.loads(out.read_text())
    assert found["probe"] == probe_flow(flow, data, config=ProbeConfig(train_images=60, tokens=2))
    assert lines[0].endswith("| training accuracy | held-out accuracy, one token | training accuracy, one token |")
    assert f"| {found['probe'][0]['token_accuracy']:.4f} |" in lines[2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{run} --features 1", "--features: expected BLOCK:LAYER such as 3:1, or all alone, got '1'"),
        (
            "{run} --features all --features 1:0",
            "--features: expected BLOCK:LAYER such as 3:1, or all alone, got 'all'",
        ),
        ("{run} --features 1:0 --features 1:0", "--features: expected each once, got 1:0 1:0"),
        ("{run} --features 2:0 --quiet", "features: block: expected 0 to 1, got 2"),
        ("{run} --json {tmp}/none/probe.json", "--json: expected an existing folder"),
        ("{run} --penalty 0", "penalty: expected a finite number > 0, got 0"),
        ("{run} --data none.npz", "none.npz: no such file"),
    ],
)
def test_wrong_use_is_one_line(line, message, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["probe", *[word.format(run=run, tmp=tmp_path) for word in line.split()]]) == 2
    error = capsys.readouterr().err
    assert message in error
