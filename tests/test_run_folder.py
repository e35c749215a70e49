"""What a run says of itself: speed, environment, sample grids, Weights & Biases."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from tiny_training import changed, flow_config, interrupted, inverse_config, random_flow, same_weights, write_images

import biflow
from biflow import train
from biflow.config import from_mapping, to_mapping
from biflow.train import RunConfig, environment, grids, runs, speed
from biflow.train import metrics as writers


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A run of 20 steps with a checkpoint and a log line every 5, a grid every 10, whose peak is known."""
    out = tmp_path_factory.mktemp("run") / "flow"
    config = flow_config(images, steps=20, every=5, keep=10, peak_flops=1e9, sample_every=10, sample_images=5)
    return config, out, train.train_flow(config, out, progress=False)


def metrics(out, split="train"):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


# --- speed


def test_speed_follows_its_formulas():
    now = iter([0.0, 1.0, 1.5, 4.0, 10.0, 10.0, 12.0, 16.0])
    clock = speed.Speed(images=8, flops=6e9, peak=1e10, clock=lambda: next(now))
    for _ in range(2):  # [0, 4] with a wait of 0.5, [10, 16] with one of 2; what is between does not count
        with clock.step(), clock.data():
            pass
    assert clock.report() == {
        "step_seconds": 5.0,
        "data_seconds": 1.25,
        "data_share": 0.25,
        "images_per_second": 1.6,
        "mfu": pytest.approx(0.12),  # 1.2e9 of 1e10 a second
    }
    assert clock.report() == {}  # from 0 again
    now = iter([0.0, 0.0, 0.0, 2.0])
    unknown = speed.Speed(images=8, flops=6e9, peak=None, clock=lambda: next(now))
    with unknown.step(), unknown.data():
        pass
    assert "mfu" not in unknown.report()


def test_a_run_reports_its_speed(finished, images, tmp_path):
    config, out, _ = finished
    for line in metrics(out):
        assert 0 <= line["data_seconds"] < line["step_seconds"]
        assert line["images_per_second"] == pytest.approx(config.optim.batch_size / line["step_seconds"])
        flops = train.flops.training(config) * line["images_per_second"]
        assert line["mfu"] == pytest.approx(flops / 1e9)
    assert not set(speed.CLOCK[1:]) & set(metrics(out, "val")[0])
    train.train_flow(flow_config(images, steps=1), tmp_path / "run", progress=False)
    assert "mfu" not in metrics(tmp_path / "run")[0]  # nobody knows the peak of a CPU


def test_the_progress_bar_shows_loss_wait_and_mfu():
    line = {"split": "train", "loss": 1.5, "images_per_second": 1234.5, "data_share": 0.031, "mfu": 0.42}
    assert speed.in_progress_bar(line) == {"train": 1.5, "images/s": "1234", "wait": "3%", "mfu": "42%"}
    assert speed.in_progress_bar({"split": "val", "loss": 2.0}) == {"val": 2.0}


# --- environment.json


def test_every_sitting_is_an_entry(finished, tmp_path):
    config, out, model = finished
    (first,) = environment.sittings(out)
    assert first["step"] == 0
    assert (first["torch"], first["biflow"]) == (str(torch.__version__), biflow.__version__)
    assert first["command"] == sys.argv
    assert first["packages"]["numpy"] == np.__version__
    assert {"started", "host", "device", "python", "threads", "cpu_isa", "build", "git"} <= first.keys()
    copy = interrupted(out, tmp_path, 10)
    assert same_weights(train.train_flow(config, copy, resume=True, progress=False), model)
    before, after = environment.sittings(copy)
    assert before == first
    assert after["step"] == 10
    assert after["started"] >= first["started"]


def test_git_of_a_folder(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        git("init")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    assert environment.git(tmp_path) is None  # no commit yet
    (tmp_path / "code.py").write_text("x = 1\n")
    git("add", "code.py")
    git("commit", "-m", "first")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text("a: 1\n")  # untracked: what a run writes is no change of code
    found = environment.git(tmp_path / "runs")
    assert found == {"root": str(tmp_path.resolve()), "commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "code.py").write_text("x = 2\n")
    assert environment.git(tmp_path)["dirty"] is True


def test_without_git_a_run_goes_on(monkeypatch, tmp_path):
    def missing(*args, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    environment.record(tmp_path, 0, torch.device("cpu"))
    assert environment.sittings(tmp_path)[0]["git"] == {"folder": None, "biflow": None}


def test_another_file_in_its_place_is_an_error(tmp_path):
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(ValueError, match=r"environment\.json: expected a list of sittings, got dict"):
        environment.record(tmp_path, 0, torch.device("cpu"))
    (tmp_path / "environment.json").write_text("[")
    with pytest.raises(ValueError, match=r"environment\.json: expected JSON"):
        environment.record(tmp_path, 0, torch.device("cpu"))


# --- sample grids


def test_grids_are_drawn_by_the_averaged_model_and_change_nothing(finished, images, tmp_path):
    config, out, model = finished
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step_00000010.png", "step_00000020.png"]
    again = grids.draw(model, config.run, tmp_path, 20)
    assert again.read_bytes() == (out / "samples/step_00000020.png").read_bytes()
    without = changed(config, "run", sample_every=None)
    assert same_weights(train.train_flow(without, tmp_path / "run", progress=False), model)
    assert not (tmp_path / "run" / "samples").exists()


def test_a_grid_is_what_the_model_samples(images, tmp_path, monkeypatch):
    """Classes in turn, fixed noise, guidance 1 or what is trained in, rows of about the square root."""
    drawn = []
    monkeypatch.setattr(grids.plots, "save_grid", lambda rows, path: drawn.append(list(rows)))
    config = inverse_config(images, sample_every=1, sample_images=6).run
    torch.manual_seed(0)
    model = biflow.BiFlow(inverse_config(images).model)
    torch.nn.init.normal_(model.heads[-1][1].weight)
    grids.draw(model, config, tmp_path, 1)
    y, generator = torch.arange(6) % 2, torch.Generator().manual_seed(grids.SEED)
    want = model.sample(6, y, guidance=1.0, generator=generator)
    assert [len(row) for row in drawn[0]] == [3, 3]
    torch.testing.assert_close(torch.cat(drawn[0]), want)
    strong = inverse_config(images, sample_every=1, sample_images=6, sample_guidance=2.0).run
    grids.draw(model, strong, tmp_path, 1)
    assert not torch.allclose(torch.cat(drawn[1]), want, atol=1e-3)


def test_a_grid_leaves_nothing_prepared_in_the_model(images, tmp_path):
    flow = random_flow(flow_config(images).model)
    grids.draw(flow, RunConfig(sample_every=1, sample_images=2), tmp_path, 1)
    assert all(not block._packs[1] for block in flow.blocks)


@pytest.mark.parametrize(
    ("stage", "model", "run", "reason"),
    [
        (flow_config, {"in_channels": 4}, {}, r"run\.sample_vae: expected with run\.sample_every 5 the autoencoder"),
        (
            flow_config,
            {},
            {"sample_vae": "models/vae"},
            r"run\.sample_vae: expected None with images \(model\.in_chann",
        ),
        (flow_config, {"in_channels": 4}, {"sample_vae": ""}, "sample_vae: expected an autoencoder's folder or name"),
        (inverse_config, {}, {"sample_guidance": 3.0}, r"sample_guidance: expected at most model\.max_guidance 2"),
        (flow_config, {"num_classes": 0}, {"sample_guidance": 1.0}, "sample_guidance: expected 0 without classes"),
        (flow_config, {}, {"sample_every": 0}, "sample_every: expected a finite number of at least 1"),
        (flow_config, {}, {"sample_images": 0}, "sample_images: expected"),
        (flow_config, {}, {"peak_flops": 0.0}, "peak_flops: expected a finite number > 0"),
        (flow_config, {}, {"wandb": ""}, "wandb: expected the name of a project"),
    ],
)
def test_settings_that_cannot_be(stage, model, run, reason):
    with pytest.raises(ValueError, match=reason):
        changed(stage("images.npz", **{"sample_every": 5, **run}), "model", **model)


# --- Weights & Biases


class FakeRun:
    """What biflow uses of a run of wandb."""

    def __init__(self, settings):
        self.settings, self.logged, self.defined, self.finished = settings, [], [], None

    def define_metric(self, name, step_metric):
        self.defined.append((name, step_metric))

    def log(self, values):
        assert self.finished is None
        self.logged.append(values)

    def finish(self, exit_code):
        self.finished = exit_code


@pytest.fixture
def fake_wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()  # find_spec reads it
    module.started = []
    module.init = lambda **settings: module.started.append(FakeRun(settings)) or module.started[-1]
    module.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_metrics_and_a_resumed_run_goes_on_in_the_same_one(finished, fake_wandb, tmp_path):
    config = changed(finished[0], "run", wandb="flows")
    out = tmp_path / "named"
    model = train.train_flow(config, out, progress=False)
    (first,) = fake_wandb.started
    assert first.settings["project"] == "flows"
    assert first.settings["name"] == "named"
    assert first.settings["config"]["optim"]["lr"] == config.optim.lr
    assert first.defined == [("*", "step")]
    losses = [values for values in first.logged if "train/loss" in values]
    assert [values["step"] for values in losses] == [5, 10, 15, 20]
    assert [values["train/loss"] for values in losses] == [line["loss"] for line in metrics(out)]
    pictures = [values["samples"] for values in first.logged if "samples" in values]
    assert pictures == [("image", str(out / f"samples/step_000000{step}.png")) for step in (10, 20)]
    assert first.finished == 0
    copy = interrupted(out, tmp_path, 10)
    assert same_weights(train.train_flow(config, copy, resume=True, progress=False), model)
    second = fake_wandb.started[1]
    assert second.settings["id"] == first.settings["id"]
    assert second.settings["resume"] == "allow"
    assert same_weights(model, finished[2])  # nothing of it reaches the training


def test_a_run_that_fails_is_marked_so(finished, fake_wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(train.trainer.Trainer, "save", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train_flow(changed(finished[0], "run", wandb="flows"), tmp_path / "run", progress=False)
    assert fake_wandb.started[0].finished == 1


def test_a_missing_wandb_is_an_error_before_anything_is_done(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'biflow\[wandb\]'"):
        train.train_flow(changed(finished[0], "run", wandb="flows"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wandb_itself_takes_it_offline(images, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = flow_config(images, steps=4, every=2, wandb="flows", sample_every=4, sample_images=2)
    train.train_flow(config, tmp_path / "run", progress=False)
    identity = (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))


# --- TensorBoard, resuming


def test_tensorboard_shows_speed_and_samples(images, tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = flow_config(images, steps=4, every=2, tensorboard=True, sample_every=2, sample_images=2, peak_flops=1e9)
    train.train_flow(config, tmp_path / "run", progress=False)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {f"train/{name}" for name in ("loss", *speed.CLOCK)} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Images("samples")] == [2, 4]


def test_what_does_not_change_the_weights_may_change_on_resume(finished, tmp_path):
    out = interrupted(finished[1], tmp_path, 10)
    fields = {"sample_every": None, "sample_images": 3, "peak_flops": None, "activation_checkpointing": True}
    config = changed(finished[0], "run", tensorboard=True, **fields)
    assert same_weights(train.train_flow(config, out, resume=True, progress=False), finished[2])
    with pytest.raises(ValueError, match=r"run\.compile = False, this configuration True"):
        train.train_flow(changed(config, "run", compile=True), out, resume=True, progress=False)


def test_a_run_from_before_these_settings_can_be_resumed(finished):
    stored = {"stage": "flow", **to_mapping(finished[0])}
    new = ("wandb", "peak_flops", "compile", "activation_checkpointing")
    stored["run"] = {k: v for k, v in stored["run"].items() if k not in new and not k.startswith("sample")}
    fields = {k: v for k, v in runs.with_defaults(stored).items() if k != "stage"}
    plain = changed(finished[0], "run", peak_flops=None, sample_every=None, sample_images=16)
    assert from_mapping(train.FlowTraining, fields) == plain
