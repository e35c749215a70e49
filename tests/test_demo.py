"""The demo's machinery on tiny models: files, numbers, repeatability, resuming."""

import json
import re

import numpy as np
import pytest
from PIL import Image

import biflow
from biflow import demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo.run_demo(out, quick=True, progress=False)


def without_timings(report):
    return {k: v for k, v in report.items() if k != "timings"}


def test_the_folder_has_every_file(finished):
    out, report = finished
    for run, kind in (("flow", biflow.TarFlow), ("inverse", biflow.BiFlow)):
        assert isinstance(biflow.load(out / run / "model.safetensors"), kind)
        assert (out / run / "config.yaml").is_file()
        assert (out / run / "metrics.jsonl").is_file()
        assert len(list((out / run / "checkpoints").iterdir())) >= 1
    assert (out / "config.yaml").is_file()
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    text = (out / "report.md").read_text()
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert sorted(pictures) == ["curves.png", "samples_exact.png", "samples_learned.png", "trajectory.png"]
    for name in pictures:
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5, name


def test_the_report_has_every_number(finished):
    _, report = finished
    assert report["exact"]["held_out_bits_per_dim"] > 0
    assert report["exact"]["round_trip_max_error"] < 1e-4
    assert report["data"]["classifier_held_out_accuracy"] > 0.9
    assert report["learned"]["reconstruction_mse"] > 0
    trained = demo.demo_config(quick=True).inverse.model.max_guidance
    for kind, guidances in (("exact", demo.GUIDANCES), ("learned", [g for g in demo.GUIDANCES if g <= trained])):
        samples = report[kind]["samples"]
        assert [s["guidance"] for s in samples] == list(guidances)
        for entry in samples:
            for name in ("class_agreement", "frechet", "pixel_mean_difference", "pixel_std_difference"):
                assert isinstance(entry[name], float), name
    assert all(s["distance_to_exact"] > 0 for s in report["learned"]["samples"])
    summary = report["summary"]
    assert summary["learned"]["guidance"] == summary["default_guidance"] == demo.DEFAULT_GUIDANCE
    best = max(s["class_agreement"] for s in report["exact"]["samples"])
    assert summary["exact_at_its_best_guidance"]["class_agreement"] == best
    rows = report["timings"]["decoders"]["batches"]
    assert [row["batch_size"] for row in rows] == [1, 64]
    assert all(row[way] > 0 for row in rows for way in ("learned", "exact_eager", "exact_op"))


def test_an_interrupted_demo_ends_in_the_same_bytes_as_another_one(finished, tmp_path, monkeypatch):
    """Both stages are trained anew here, so the same twice is shown too; only timings differ."""
    out, report = finished

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "train_inverse", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(tmp_path, quick=True, progress=False)
    with pytest.raises(FileExistsError, match="the folder is not empty"):
        demo.run_demo(tmp_path, quick=True, progress=False)
    with pytest.raises(ValueError, match=r"has flow\.run\.seed = 0, this configuration 1; .* \(another --out\)"):
        demo.run_demo(tmp_path, quick=True, seed=1, progress=False, resume=True)
    resumed = demo.run_demo(tmp_path, quick=True, progress=False, resume=True)
    assert without_timings(resumed) == without_timings(report)
    for name in ("samples_exact.png", "samples_learned.png", "trajectory.png"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name


def test_a_folder_that_is_not_a_demo_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a demo to resume"):
        demo.run_demo(tmp_path, quick=True, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
