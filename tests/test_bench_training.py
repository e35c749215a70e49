"""The benchmark of a training step: rows, the checkout as a peer, and that no wrong gradient gets a time."""

import importlib
from types import SimpleNamespace

import pytest
from ml_tarflow_checkout import TRAINED

import biflow
from biflow.cli import tools


@pytest.fixture(scope="module")
def b():
    tools._import("bench_training")
    names = ("bench_training", "flows")
    return SimpleNamespace(**{name: importlib.import_module(f"{tools.PACKAGE}.{name}") for name in names})


@pytest.fixture(autouse=True)
def small(b, monkeypatch):
    monkeypatch.setitem(b.flows.CONFIGS, "S", b.flows.CONFIGS["S"] | {"num_blocks": 2, "layers_per_block": 1})


def test_training_step_against_torch(b, monkeypatch):
    rows = b.bench_training.run(quick=True, configs=["S"], batches=[3])
    assert [(r["stage"], r["precision"]) for r in rows] == [
        (stage, precision) for stage in ("flow", "inverse") for precision in ("fp32", "bf16")
    ]
    for row in rows:
        assert min(row["ms"], row["eager_ms"], row["x_eager"], row["x_best_eager"]) > 0
        assert 0 < row["gradient_distance"] <= b.bench_training.BOUNDS[row["precision"]]
    gate = biflow.ops.gate
    monkeypatch.setattr(biflow.ops, "gate", lambda m, kind: 1.1 * gate(m, kind))
    with pytest.raises(RuntimeError, match=r"flow S, fp32: gradients are 0\.\d+ apart"):
        b.bench_training.run(quick=True, configs=["S"], batches=[3])


def test_training_step_against_a_checkout(b, tmp_path):
    (tmp_path / "transformer_flow.py").write_text(TRAINED)
    options = dict(quick=True, configs=["S"], batches=[3], peer_ml_tarflow=[str(tmp_path)])
    rows = b.bench_training.run(**options)
    assert [(r["stage"], "x_ml_tarflow" in r) for r in rows] == [("flow", True)] * 2 + [("inverse", False)] * 2
    for row in rows[:2]:
        assert min(row["ml_tarflow_ms"], row["x_ml_tarflow"], row["x_best_ml_tarflow"]) > 0
        assert 0 < row["gradient_distance"] <= b.bench_training.BOUNDS[row["precision"]]
    (tmp_path / "transformer_flow.py").write_text(TRAINED.replace("0.5 * z", "0.6 * z"))
    with pytest.raises(RuntimeError, match=r"flow S, fp32: gradients are 0\.\d+ apart"):
        b.bench_training.run(**options)
